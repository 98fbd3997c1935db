"""What `llamalet generate` and `llamalet chat` do at a terminal: stories and answers on stdout, all else on stderr."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from llamalet.chat import Chat
from llamalet.drafting import Draft
from llamalet.errors import LlamaletError, UsageError, fail, note
from llamalet.tokenizer import StreamDecoder, Tokenizer


def print_stories(
    tokenizer: Tokenizer, prompt: Sequence[int], seeds: Sequence[int], events: Iterable[tuple[int, int | None]],
    draft: Draft | None = None,
) -> None:  # fmt: skip
    """Print the stories that continue a prompt, one after the other although they come together; then their speed.

    Args:
        tokenizer: the model's vocabulary.
        prompt: ids that all stories begin with.
        seeds: each story's, printed above it.
        events: (number of the story, token), and (number, None) at its end. After an error or Ctrl-C in them, the
            stories that have begun are printed as far as they go.
        draft: what proposes the tokens of a single story, to say how many were kept.
    """
    clock, page = Clock(), Page(tokenizer, prompt, seeds)
    try:
        for number, token in events:
            if token is not None:
                clock.tick()
            page.add(number, token)
    except (KeyboardInterrupt, LlamaletError):
        page.close()
        raise
    finally:
        kept = f"; {draft.kept} of {draft.proposed} drafted tokens kept" if draft is not None else ""
        note(speed(len(prompt), clock, len(seeds)) + kept)


class Page:
    """Prints stories that are generated together one after the other, each as far as it is known."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._decoders = [StreamDecoder(tokenizer) for _ in seeds]
        self._unprinted = ["".join(decoder.push(token) for token in prompt) for decoder in self._decoders]
        self._ended = [False] * len(seeds)
        self._n_begun = 1
        self._current = 0
        self._print_seed()
        self._print()

    def add(self, number: int, token: int | None) -> None:
        """Take a story's next token, or None for its end."""
        decoder = self._decoders[number]
        self._unprinted[number] += decoder.finish() if token is None else decoder.push(token)
        self._ended[number] = token is None
        self._n_begun = max(self._n_begun, number + 1)
        if number == self._current:
            self._print()

    def close(self) -> None:
        """Print the rest of all stories that have begun, as if they ended here."""
        self._seeds = self._seeds[: self._n_begun]
        self._ended = [True] * self._n_begun
        self._print()

    def _print(self) -> None:
        """Print the new part of the current story and, if it has ended, the next ones."""
        while self._current < len(self._seeds):
            print(self._unprinted[self._current], end="", flush=True)
            self._unprinted[self._current] = ""
            if not self._ended[self._current]:
                return
            print(flush=True)
            self._current += 1
            if self._current < len(self._seeds):
                print()
                self._print_seed()

    def _print_seed(self) -> None:
        """Say which story comes next."""
        note(f"seed {self._seeds[self._current]}")


class Clock:
    """The times of the first and the newest token."""

    def __init__(self) -> None:
        self.start = self.first = self.newest = time.perf_counter()
        self.tokens = 0

    def tick(self) -> None:
        """Record that a token has come."""
        self.newest = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first = self.newest


def speed(n_prompt: int, clock: Clock, n_stories: int) -> str:
    """Return the line about tokens per second, after a prompt of `n_prompt`."""

    def rate(n: int, seconds: float) -> str:
        return f"{n} tokens, {n / seconds if seconds > 0 else math.inf:.1f} tokens/s"

    if not clock.tokens:
        return "no tokens"
    if n_stories > 1:
        return f"{n_stories} stories: {rate(clock.tokens, clock.newest - clock.start)}"
    prompt = f"prompt: {rate(n_prompt, clock.first - clock.start)}"
    story = f"; story: {rate(clock.tokens - 1, clock.newest - clock.first)}" if clock.tokens > 1 else ""
    return prompt + story


def converse(chat: Chat, first: str, seed: int) -> int:
    """Answer one message after the other, beginning with `first`, until Ctrl-C or the end of stdin.

    A message that is refused, by the template or for want of room, costs one line; the conversation goes on without it.

    Returns:
        The exit code: UsageError's if every message was refused.
    """
    code, answered = 0, False
    interactive = sys.stdin is not None and sys.stdin.isatty()
    note(f"seed {seed}" + ("; Ctrl-C or Ctrl-D ends the conversation" if interactive else ""))
    try:
        for message in read_messages(first, interactive):
            try:
                pieces = chat.say(message)
            except UsageError as error:
                code = fail(str(error), error.exit_code)
                continue
            answered = True
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
    return 0 if answered else code


def read_messages(first: str, interactive: bool) -> Iterator[str]:
    """Yield the user's messages: the first one, if there is one, then each line of stdin that is not empty.

    Raises:
        UsageError: if a line is not text.
    """
    if first:
        yield first
    while sys.stdin is not None:
        if interactive:
            note("> ", end="")
        try:
            # input() lets the user edit the line; unlike readline, it tells an empty line from the end of stdin.
            line = input()
        except EOFError:
            if interactive:
                note("")
            return
        except UnicodeDecodeError:
            raise UsageError("stdin is not text in UTF-8") from None
        if message := line.strip():
            yield message


def read_stdin() -> str:
    """Return the text on stdin without its last newline, which the shell puts there.

    Raises:
        UsageError: if there is none or it is not text.
    """
    if sys.stdin is None:
        raise UsageError("-i -: there is no stdin to read the prompt from")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("-i -: stdin is not text in UTF-8") from None
