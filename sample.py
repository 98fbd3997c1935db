"""Tell stories with a model, without PyTorch.

Usage:
    python sample.py                                    the newest model under out/, else the demo model
    python sample.py out/model.bin -i "Once upon a time" -t 0.8 -s 7
    python sample.py stories15M.bin -z tokenizer.bin -n 256
    python sample.py out/model.bin --num-samples=64     many stories at once: several times as fast as one by one
    python sample.py out/model.bin -n 0 --overflow=roll --ignore-eos       for ever, until Ctrl-C
    python sample.py Llama-3.2-1B-Instruct.bin -m chat -y "You are a pirate."       a conversation, until Ctrl-D

The text goes to stdout, everything else to stderr. For tamer or wilder texts change the temperature or top-p, not both;
-t 0 always takes the most likely token. With the same -t, -p and -s the tokens are those of llama2.c's run.
"""

import io
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from configurator import parse
from llamalet.chat import Chat
from llamalet.errors import ConfigError, FormatError, LlamaletError, UsageError, run
from llamalet.generate import generate_batch
from llamalet.runtime import Model
from llamalet.sampler import KEEP, Overflow, SamplingConfig
from llamalet.tokenizer import StreamDecoder, Tokenizer

OUT = Path("out")
DEMO_MODEL = Path(__file__).parent / "assets" / "demo.bin"
DEFAULT_STEPS = 256
MAX_SAMPLES = 100_000
# Options that only one of the modes has, and what they are when they are not given.
STORY_OPTIONS = {"steps": None, "num_samples": 1, "ignore_eos": False}
CHAT_OPTIONS = {"system_prompt": None, "chat_template": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Options of sample.py. Short flags are llama2.c's."""

    checkpoint: str | None = None
    """the model: a .bin or a training checkpoint"""
    prompt: Annotated[str, arg(aliases=("-i",))] = ""
    """the beginning of the story, or the first message of a chat; - reads it from stdin"""
    tokenizer: Annotated[str | None, arg(aliases=("-z",))] = None
    """a tokenizer's file, of any kind; the one inside the model or beside it if not given"""
    temperature: Annotated[float, arg(aliases=("-t",))] = 1.0
    """divides the logits: 0 takes the most likely token, 1 draws as the model has learnt"""
    top_p: Annotated[float, arg(aliases=("-p",))] = 0.9
    """draw from the fewest most likely tokens that exceed this share; 0 and 1 switch it off"""
    top_k: int = 0
    """draw from this many of the most likely tokens; 0 switches it off"""
    min_p: float = 0.0
    """drop tokens below this share of the most likely one's probability; 0 switches it off"""
    seed: Annotated[int, arg(aliases=("-s",))] = -1
    """the same seed gives the same story; -1 takes a random one and prints it"""
    steps: Annotated[int | None, arg(aliases=("-n",))] = None
    """end at this many positions, prompt included (256); 0 ends where the context does, or never if that rolls"""
    max_new_tokens: int | None = None
    """end after this many new tokens; instead of -n; in a chat, each answer"""
    num_samples: int = 1
    """how many stories to tell, up to 64 at once; each has its own seed, one more than the last"""
    ignore_eos: bool = False
    """go on where the model ends the story"""
    overflow: Overflow = "stop"
    """where the context is full: stop, or roll, which forgets the older half of it, --keep aside, and goes on"""
    keep: int = KEEP
    """how many of the first tokens a rolling context never forgets: without a few of them models lose the thread"""
    mode: Annotated[Literal["generate", "chat"], arg(aliases=("-m",))] = "generate"
    """generate continues the prompt; chat is for models that were trained to answer: a message a line"""
    system_prompt: Annotated[str | None, arg(aliases=("-y",))] = None
    """how a chat model shall answer"""
    chat_template: str | None = None
    """llama2, llama3, or a file with a Jinja template; the model's own if not given"""
    threads: int | None = None
    """how many threads compute; one for each physical core if not given"""
    backend: Literal["numba", "numpy"] = "numba"
    """numpy is slow and needs no compiler"""
    verify: bool | None = None
    """verify the checksum of a large file too; small ones always are"""

    def __post_init__(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        problems = []
        try:
            self.sampling()
        except ConfigError as error:
            problems.append(str(error))
        if self.steps is not None and self.max_new_tokens is not None:
            problems.append("-n counts the prompt and --max-new-tokens does not: give one of them")
        if self.steps is not None and self.steps < 0:
            problems.append(f"steps={self.steps}: must not be negative (0 goes on to the end of the context)")
        if self.keep != KEEP and self.overflow != "roll":
            problems.append(f"keep={self.keep}: says what a rolling context keeps; give --overflow=roll too")
        chat = self.mode == "chat"
        why = "is for stories; in a chat --max-new-tokens ends each answer" if chat else "is for chats; add -m chat"
        for name, default in (STORY_OPTIONS if chat else CHAT_OPTIONS).items():
            if getattr(self, name) != default:
                problems.append(f"{name}: {why}")
        if self.num_samples > MAX_SAMPLES:
            problems.append(f"num_samples={self.num_samples}: must be at most {MAX_SAMPLES}")
        if self.num_samples > 1 and self.steps == 0 and self.overflow == "roll" and self.ignore_eos:
            problems.append(f"num_samples={self.num_samples}: the first story would never end; give -n a number")
        for name in ("max_new_tokens", "num_samples", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be positive")
        if self.checkpoint == "":
            problems.append("checkpoint='': must name a .bin or a training checkpoint")
        if problems:
            raise ConfigError.from_problems(problems)

    def sampling(self) -> SamplingConfig:
        """Return the options that are the sampler's."""
        return SamplingConfig(**{field.name: getattr(self, field.name) for field in fields(SamplingConfig)})


def main(argv: Sequence[str]) -> int:
    """Tell stories as the command line says."""
    hint_at_prompt(argv)
    config = parse(SampleConfig, argv, program="sample.py", description=str(__doc__), positional=("checkpoint",))
    for standard in (sys.stdin, sys.stdout):
        if isinstance(standard, io.TextIOWrapper):
            standard.reconfigure(encoding="utf-8")
    prompt = read_stdin() if config.prompt == "-" else config.prompt
    path = Path(config.checkpoint) if config.checkpoint is not None else choose_model()
    start = time.perf_counter()
    model = Model.load(
        path, tokenizer=config.tokenizer, backend=config.backend, threads=config.threads, verify=config.verify
    )
    load_s = time.perf_counter() - start
    note(f"model {model.path}: {model.config.n_params / 1e6:.2f}M parameters, {model.dtype}, loaded in {load_s:.2f} s")
    configs = config.sampling().for_texts(config.num_samples)
    if config.mode == "chat":
        converse(model, prompt, config, configs[0])
    else:
        tell(model, prompt, config, configs)
    return 0


def hint_at_prompt(argv: Sequence[str]) -> None:
    """Tell those who know llama.cpp's -p, the prompt, that here it is llama2.c's, top-p."""
    for word, value in zip(argv, argv[1:], strict=False):
        if word == "-p":
            try:
                float(value)
            except ValueError:
                raise UsageError(f"-p '{value}': -p is top-p, a number, as in llama2.c; the prompt is -i") from None


def read_stdin() -> str:
    """Return the text on stdin without its last line end, which the shell puts there.

    Raises:
        UsageError: if there is none or it is no text.
    """
    if sys.stdin is None:
        raise UsageError("-i -: there is no stdin to read the prompt from")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("-i -: what stands on stdin is no text in UTF-8") from None


def choose_model() -> Path:
    """Return the newest .bin under out/, or the demo model where there is none, and say which.

    Raises:
        FormatError: if there is neither.
    """
    found = [path for path in OUT.rglob("*.bin") if not path.name.endswith(".tokenizer.bin")]
    if found:
        newest = max(found, key=lambda path: path.stat().st_mtime_ns)
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime))
        note(f"no model named: taking the newest under {OUT}/, {newest} of {made}")
        return newest
    if DEMO_MODEL.is_file():
        note(f"no model named and no .bin under {OUT}/: taking the demo model {DEMO_MODEL}")
        return DEMO_MODEL
    raise FormatError(f"no model named and no .bin under {OUT}/; train one (make demo) or name a file")


def converse(model: Model, first: str, config: SampleConfig, sampling: SamplingConfig) -> None:
    """Answer one message after the other, until Ctrl-C or the end of stdin."""
    chat = Chat(model, sampling, system=config.system_prompt, template=config.chat_template)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    note(f"seed {sampling.seed}" + ("; Ctrl-C or Ctrl-D ends the conversation" if interactive else ""))
    try:
        for message in messages(first, interactive):
            try:
                pieces = chat.say(message)
            except UsageError as error:
                if not interactive:
                    raise
                note(str(error))
                continue
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)


def messages(first: str, interactive: bool) -> Iterator[str]:
    """Yield what the user says: the first message, if there is one, then a line of stdin each, but for empty ones.

    Raises:
        UsageError: if a line is no text.
    """
    if first:
        yield first
    while sys.stdin is not None:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            # input() lets the line be edited; unlike readline, it tells a line's end from the end of stdin.
            line = input()
        except EOFError:
            if interactive:
                print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            raise UsageError("what stands on stdin is no text in UTF-8") from None
        if message := line.strip():
            yield message


def tell(model: Model, prompt: str, config: SampleConfig, configs: Sequence[SamplingConfig]) -> None:
    """Print a story for each seed, one after the other though they are made together; then their speed."""
    ids, seeds = model.tokenizer.encode(prompt, bos=True), [one.seed for one in configs]
    limit, room = new_tokens(config, len(ids)), model.config.max_seq_len - len(ids) + 1
    if config.overflow == "stop" and limit is not None and limit > room:
        note(f"the context has room for {room} new tokens; --overflow=roll goes on after them")
    limited = [replace(one, max_new_tokens=limit) for one in configs]
    events = generate_batch(model.transformer, [ids] * len(seeds), limited, stop_tokens=model.stop_tokens)
    clock, page = Clock(), Page(model.tokenizer, ids, seeds)
    try:
        for number, token in events:
            if token is not None:
                clock.tick()
            page.add(number, token)
    except (KeyboardInterrupt, LlamaletError):
        page.close()
        raise
    finally:
        note(speed(len(ids), clock, len(seeds)))


class Page:
    """Prints stories that are made together one after the other, each as far as it is known."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._decoders = [StreamDecoder(tokenizer) for _ in seeds]
        self._unprinted = ["".join(decoder.push(token) for token in prompt) for decoder in self._decoders]
        self._ended = [False] * len(seeds)
        self._n_begun = 1
        self._current = 0
        self._announce()
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
        """Print what there is of all stories that have begun, as if they ended here."""
        self._seeds = self._seeds[: self._n_begun]
        self._ended = [True] * self._n_begun
        self._print()

    def _print(self) -> None:
        """Print what is new in the current story and, if that has ended, the next ones."""
        while self._current < len(self._seeds):
            print(self._unprinted[self._current], end="", flush=True)
            self._unprinted[self._current] = ""
            if not self._ended[self._current]:
                return
            print(flush=True)
            self._current += 1
            if self._current < len(self._seeds):
                print()
                self._announce()

    def _announce(self) -> None:
        """Say which story comes next."""
        note(f"seed {self._seeds[self._current]}")


class Clock:
    """When the first and the newest token came."""

    def __init__(self) -> None:
        self.start = self.first = self.newest = time.perf_counter()
        self.tokens = 0

    def tick(self) -> None:
        """Note that a token has come."""
        self.newest = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first = self.newest


def new_tokens(config: SampleConfig, n_prompt: int) -> int | None:
    """Return how many tokens to make after a prompt of `n_prompt`, BOS included; None ends where the context does.

    Raises:
        UsageError: if the prompt leaves no room for one.
    """
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    steps = DEFAULT_STEPS if config.steps is None else config.steps
    if steps == 0:
        return None
    # llama2.c's count: every pass through the model is one step, and the last prompt token's already gives a new one.
    if steps < n_prompt:
        raise UsageError(f"the prompt takes {n_prompt} of the {steps} positions; give a larger -n, or --max-new-tokens")
    return steps - n_prompt + 1


def speed(n_prompt: int, clock: Clock, n_stories: int) -> str:
    """Return the line about tokens per second, after a prompt of `n_prompt`."""

    def rate(n: int, seconds: float) -> str:
        return f"{n} tokens, {n / seconds if seconds > 0 else math.inf:.1f} tokens/s"

    if not clock.tokens:
        return "no tokens"
    if n_stories > 1:
        return f"{n_stories} stories: {rate(clock.tokens, clock.newest - clock.start)}"
    prompt, story = rate(n_prompt, clock.first - clock.start), rate(clock.tokens - 1, clock.newest - clock.first)
    return f"prompt: {prompt}; story: {story}"


def note(message: str) -> None:
    """Print a line that is no part of the story."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
