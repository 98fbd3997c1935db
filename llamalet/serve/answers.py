"""The engine's events -> OpenAI's JSON: a whole answer, or the chunks of a stream.

What all chunks of a choice have in common is written once, when the answer begins: a token costs the JSON of its text
and a few joined strings.
"""

from llamalet.engine import Begun, Event, NewToken
from llamalet.serve.api_error import ApiError
from llamalet.serve.schema import Asked
from llamalet.serve.served_model import ServedModel
from llamalet.serve.token_json import ChatLogprobs, CompletionLogprobs, dumps

IDS = {"completion": "cmpl", "chat": "chatcmpl"}
OBJECTS = {"completion": "text_completion", "chat": "chat.completion"}
CHUNK_OBJECTS = {"completion": "text_completion", "chat": "chat.completion.chunk"}
DONE = b"data: [DONE]\n\n"


class _Choice:
    """One text of an answer: what of it has not been sent yet, and what is counted."""

    __slots__ = (
        "index", "head", "parts", "ids", "logprobs", "stops", "is_new", "has_ids", "n_tokens", "n_cached", "ended",
        "finish",
    )  # fmt: skip

    def __init__(self, index: int, head: str, stops: frozenset[int], asked: Asked) -> None:
        self.index, self.head, self.stops = index, head, stops
        self.parts: list[str] = []
        self.ids: list[int] = []
        self.logprobs: CompletionLogprobs | ChatLogprobs | None = None
        self.is_new = True  # nothing is known of it yet
        self.has_ids = asked.return_token_ids
        self.n_tokens = self.n_cached = 0
        self.ended, self.finish = False, ""


class Answer:
    """What a request is answered with, as far as the engine's events tell.

    The events of all choices are pushed as they come. For a stream, `chunk` then returns what is new, once for each
    step of the engine, and `done` its end; otherwise `body` returns the answer when it is finished.

    Attributes:
        finished: whether all texts have ended, or one has failed.
        failure: what the client is told if a text failed: nothing else of the answer counts then.
        n_new_tokens: of all texts, those that ended them included.
    """

    def __init__(self, asked: Asked, request_id: str, created: int, served: ServedModel) -> None:
        """Begin an answer.

        Args:
            asked: the request.
            request_id: names it; any text.
            created: seconds since 1970.
            served: the model.
        """
        self.failure: ApiError | None = None
        self._asked, self._is_chat = asked, asked.kind == "chat"
        kind = CHUNK_OBJECTS[asked.kind] if asked.stream else OBJECTS[asked.kind]
        self._start = (
            f'{{"id":{dumps(f"{IDS[asked.kind]}-{request_id}")},"object":"{kind}","created":{created},'
            f'"model":{dumps(asked.model)},"system_fingerprint":{dumps(served.fingerprint)},"seed":{asked.seed},'
            f'"choices":['
        )
        self._end = ',"usage":null}\n\n' if asked.include_usage else "}\n\n"
        self._plain_end = f',"logprobs":null,"finish_reason":null}}]{self._end}'
        self._before, self._after = ('"delta":{"content":', "}") if self._is_chat else ('"text":', "")
        self._choices = []
        for index, request in enumerate(asked.requests):
            stops = frozenset[int]() if request.sampling.ignore_eos else frozenset(request.stop_tokens)
            choice = _Choice(index, f'data: {self._start}{{"index":{index},', stops, asked)
            if asked.logprobs is not None:
                choice.logprobs = (
                    ChatLogprobs(served, as_ids=asked.tokens_as_ids)
                    if self._is_chat
                    else CompletionLogprobs(
                        served,
                        asked.prompts[index // asked.n],
                        as_ids=asked.tokens_as_ids,
                        echo=asked.echo,
                        ranks=asked.return_token_ids,
                    )  # fmt: skip
                )
            self._choices.append(choice)
        self._n_open = len(self._choices)
        self._touched: dict[int, _Choice] = {}
        self._out: list[str] = []  # of a stream, what comes before the texts of this step

    @property
    def finished(self) -> bool:
        """Whether all texts have ended, or one has failed."""
        return not self._n_open or self.failure is not None

    @property
    def n_new_tokens(self) -> int:
        """Tokens of all texts, those that ended them included."""
        return sum(choice.n_tokens for choice in self._choices)

    @property
    def n_cached_tokens(self) -> int:
        """Tokens of the prompts that came from the prefix cache; of a prompt with several texts, those of the first."""
        return sum(choice.n_cached for choice in self._choices[:: self._asked.n])

    def push(self, index: int, event: Event) -> None:
        """Take an event of the choice with this number."""
        choice = self._choices[index]
        self._touched[index] = choice
        if isinstance(event, NewToken):
            choice.n_tokens += 1
            if event.text:
                choice.parts.append(event.text)
            if choice.has_ids:
                choice.ids.append(event.token)
            if event.logprobs is not None and choice.logprobs is not None:
                choice.logprobs.add(event.token, event.logprobs, event.token in choice.stops)
        elif isinstance(event, Begun):
            choice.n_cached = event.n_cached
            self._begin(choice)
            if event.prompt_logprobs is not None and choice.logprobs is not None:
                choice.logprobs.add_prompt(event.prompt_logprobs)
        else:
            self._n_open -= 1
            choice.ended, choice.finish = True, event.reason
            if event.reason == "error":
                self.failure = ApiError.of(event.error or RuntimeError())
                return
            if choice.is_new and event.reason != "cancelled":  # no new tokens were asked for
                self._begin(choice)
            choice.parts.append(event.text)

    def _begin(self, choice: _Choice) -> None:
        """Take what comes before a choice's new text: its prompt, or in the stream of a chat whose message it is."""
        choice.is_new = False
        if self._asked.echo:
            choice.parts.append(self._asked.prompts[choice.index // self._asked.n].text)
        if self._asked.stream and (self._is_chat or self._asked.return_token_ids):
            ids = self._prompt_ids(choice.index) if self._asked.return_token_ids else ""
            if self._is_chat:
                self._out.append(
                    f'{choice.head}"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]'
                    f"{ids}{self._end}"
                )
            else:
                self._out.append(f'{choice.head}"text":"","logprobs":null,"finish_reason":null{ids}}}]{self._end}')

    def chunk(self) -> bytes:
        """Return the server-sent events for all that was pushed since the last call; none if it is not visible yet."""
        if not self._touched:
            return b""
        out = self._out
        for choice in self._touched.values():
            text = "".join(choice.parts)
            if choice.ended or choice.logprobs is not None or choice.has_ids:
                if choice.finish != "error":
                    self._append_details(choice, text)
            elif text:
                out.append(f"{choice.head}{self._before}{dumps(text)}{self._after}{self._plain_end}")
            choice.parts.clear()
        found = "".join(out).encode()
        self._touched.clear()
        out.clear()
        return found

    def _append_details(self, choice: _Choice, text: str) -> None:
        """Add the event of a choice that has more than text."""
        finish = dumps(choice.finish) if choice.ended else "null"
        content = f"{self._before}{dumps(text)}{self._after}" if text or not self._is_chat else '"delta":{}'
        self._out.append(
            f'{choice.head}{content},"logprobs":{_logprobs(choice)},"finish_reason":{finish}{_new_ids(choice)}}}]{self._end}'
        )
        choice.ids.clear()

    def done(self) -> bytes:
        """Return the end of a stream, after the last chunk: the number of tokens if asked for, and [DONE]."""
        if not self._asked.include_usage:
            return DONE
        return f'data: {self._start}],"usage":{dumps(self.usage)}}}\n\n'.encode() + DONE

    @staticmethod
    def error_event(error: ApiError) -> bytes:
        """Return an error as an event of a stream that has begun."""
        return b"data: " + error.body() + b"\n\n"

    def body(self) -> bytes:
        """Return the whole of a finished answer, as JSON."""
        choices = []
        for choice in self._choices:
            text = dumps("".join(choice.parts))
            content = f'"message":{{"role":"assistant","content":{text}}}' if self._is_chat else f'"text":{text}'
            ids = _new_ids(choice)
            if choice.has_ids and not self._is_chat:
                ids += self._prompt_ids(choice.index)
            choices.append(
                f'{{"index":{choice.index},{content},"logprobs":{_logprobs(choice)},'
                f'"finish_reason":{dumps(choice.finish)}{ids}}}'
            )
        ids = self._prompt_ids(0) if self._is_chat and self._asked.return_token_ids else ""
        return f'{self._start}{",".join(choices)}],"usage":{dumps(self.usage)}{ids}}}'.encode()

    @property
    def usage(self) -> dict[str, object]:
        """The numbers of tokens, as OpenAI's JSON has them: each prompt once, and all new tokens."""
        n_prompt, n_new = self._asked.n_prompt_tokens, self.n_new_tokens
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "prompt_tokens_details": {"cached_tokens": self.n_cached_tokens},
        }

    def _prompt_ids(self, index: int) -> str:
        """Return a field with the ids of a choice's prompt, to be added to an object."""
        return f',"prompt_token_ids":{dumps(self._asked.prompts[index // self._asked.n].ids)}'


def _logprobs(choice: _Choice) -> str:
    """Return the JSON of a choice's logprobs since the last time."""
    return "null" if choice.logprobs is None else choice.logprobs.take()


def _new_ids(choice: _Choice) -> str:
    """Return a field with the new ids of a choice, to be added to an object; nothing if they are not asked for."""
    return f',"token_ids":{dumps(choice.ids)}' if choice.has_ids else ""
