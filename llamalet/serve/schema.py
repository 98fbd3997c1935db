"""The body of a request -> what is asked for, or an ApiError that says what is wrong with it.

The fields are OpenAI's, and some of vLLM's and llama.cpp's: top_k, min_p, ignore_eos, add_special_tokens, cache_salt,
return_token_ids, return_tokens_as_token_ids. Fields that nobody here knows are ignored and reported; known ones that
would change the answer, and cannot, are refused.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llamalet.checks import shown
from llamalet.engine import Request
from llamalet.sampler import MASK, MAX_TEMPERATURE, SamplingConfig
from llamalet.serve.api_error import ApiError
from llamalet.serve.json_body import Fields, is_number, refuse
from llamalet.serve.prompts import Prompt, read_messages, read_prompts
from llamalet.serve.served_model import Limits, ServedModel

DEFAULT_MAX_TOKENS = 16  # of a completion; OpenAI's
MAX_BIAS = 100.0  # OpenAI's

NO_EFFECT = (
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "prediction", "reasoning_effort", "verbosity",
    "safety_identifier", "prompt_cache_key",
)  # fmt: skip
"""Fields that are known and change no text."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "repeat_penalty": (1,),
    "min_tokens": (0,), "stop_token_ids": ([],), "bad_words": ([],), "allowed_token_ids": (), "prompt_logprobs": (),
    "include_stop_str_in_output": (False,), "truncate_prompt_tokens": (), "use_beam_search": (False,),
    "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "json_schema": (), "grammar": ("",), "mirostat": (0,),
}  # fmt: skip
"""Fields that would change the text, and the values with which they do not."""

UNSUPPORTED_COMPLETION: dict[str, tuple[Any, ...]] = {"suffix": ("",)}
UNSUPPORTED_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "modalities": (["text"],), "audio": (), "web_search_options": (), "documents": ([],), "chat_template": (),
    "chat_template_kwargs": ({},), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "echo": (False,),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        kind: completion or chat.
        model: what the client calls the model.
        stream: whether the answer comes in chunks.
        include_usage: whether a last chunk counts tokens.
        prompts: what is continued.
        n: number of texts for each prompt.
        requests: for the engine: the n texts of the first prompt, of the second, and so on.
        seed: of the first of these; each has one more than the last.
        echo: whether a text begins with its prompt.
        logprobs: number of alternatives for each token; None: no logprobs.
        return_token_ids: whether the answer has the ids of prompts and texts.
        tokens_as_ids: whether logprobs name a token token_id:7.
        unknown_fields: names of fields that were ignored, in ASCII.
    """

    kind: Literal["completion", "chat"]
    model: str
    stream: bool
    include_usage: bool
    prompts: list[Prompt]
    n: int
    requests: list[Request]
    seed: int
    echo: bool
    logprobs: int | None
    return_token_ids: bool
    tokens_as_ids: bool
    unknown_fields: list[str]

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def n_reserved_tokens(self) -> int:
        """Tokens of all texts, prompts included, if none ends early."""
        return sum(len(request.prompt) + (request.sampling.max_new_tokens or 0) for request in self.requests)


def read_completion(body: bytes, served: ServedModel) -> Asked:
    """Return what the body of a request to /v1/completions asks for.

    Raises:
        ApiError: 400, naming the field that is wrong; 404 for another model.
    """
    fields = Fields.read(body)
    model = served.check_name(fields.text("model"))
    echo = fields.flag("echo")
    logprobs = fields.whole("logprobs", 0, served.limits.logprobs)
    bos = fields.flag("add_special_tokens", True)
    for name, neutral in UNSUPPORTED_COMPLETION.items():
        fields.only(name, neutral)
    best_of = fields.whole("best_of", 1)
    settings = _Settings.read(fields, served)
    if best_of not in (None, settings.n):
        raise ApiError(400, f"best_of={shown(best_of)}: must be n={settings.n}", param="best_of")
    return _asked(
        "completion", model, fields, settings, served,
        prompts=read_prompts(fields.take("prompt"), served, bos=bos),
        echo=echo, logprobs=logprobs, max_tokens=DEFAULT_MAX_TOKENS,
    )  # fmt: skip


def read_chat(body: bytes, served: ServedModel) -> Asked:
    """Return what the body of a request to /v1/chat/completions asks for.

    Raises:
        ApiError: 400, naming the field that is wrong; 404 for another model.
    """
    fields = Fields.read(body)
    model = served.check_name(fields.text("model"))
    wants_logprobs = fields.flag("logprobs")
    n_top = fields.whole("top_logprobs", 0, served.limits.logprobs)
    if n_top is not None and not wants_logprobs:
        raise ApiError(400, f"top_logprobs={n_top}: needs logprobs=true", param="top_logprobs")
    for name, neutral in UNSUPPORTED_CHAT.items():
        fields.only(name, neutral)
    settings = _Settings.read(fields, served)
    return _asked(
        "chat", model, fields, settings, served,
        prompts=[read_messages(fields.take("messages"), served)],
        echo=False, logprobs=(n_top or 0) if wants_logprobs else None, max_tokens=None,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """The fields that both kinds of requests have."""

    stream: bool
    include_usage: bool
    n: int
    sampling: SamplingConfig
    max_tokens: int | None
    stop: list[str]
    bias: dict[int, float]
    salt: str
    return_token_ids: bool
    tokens_as_ids: bool

    @classmethod
    def read(cls, fields: Fields, served: ServedModel) -> "_Settings":
        """Take the fields; see Fields for the errors."""
        limits = served.limits
        stream, usage = fields.flag("stream"), _include_usage(fields.take("stream_options"))
        n = fields.whole("n", 1, limits.texts)
        max_tokens, alias = fields.whole("max_tokens"), fields.whole("max_completion_tokens")
        sampling = SamplingConfig(
            temperature=fields.number("temperature", 1.0, 0.0, MAX_TEMPERATURE),
            top_p=fields.number("top_p", 1.0, 0.0, 1.0),
            top_k=max(0, fields.whole("top_k", -1) or 0),  # vLLM writes -1 for off
            min_p=fields.number("min_p", 0.0, 0.0, 1.0),
            seed=-1 if (seed := fields.whole("seed", -1, MASK)) is None else seed,
            ignore_eos=fields.flag("ignore_eos"),
        )
        settings = cls(
            stream=stream,
            include_usage=stream and usage,
            n=1 if n is None else n,
            sampling=sampling,
            max_tokens=max_tokens if alias is None else alias,
            stop=_stop_strings(fields.take("stop"), limits),
            bias=_bias(fields.take("logit_bias"), served),
            salt=fields.text("cache_salt", limits.salt_chars) or "",
            return_token_ids=fields.flag("return_token_ids"),
            tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
        )
        for name in NO_EFFECT:
            fields.take(name)
        for name, neutral in UNSUPPORTED.items():
            fields.only(name, neutral)
        return settings


def _include_usage(value: Any) -> bool:
    """Return what stream_options says."""
    if value is None:
        return False
    if not isinstance(value, dict):
        refuse("stream_options", value, "an object")
    found = value.get("include_usage")
    if found is not None and not isinstance(found, bool):
        refuse("stream_options.include_usage", found, "true or false")
    return bool(found)


def _stop_strings(value: Any, limits: Limits) -> list[str]:
    """Return what the field stop says: a text or several; an empty one is none."""
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > limits.stops:
        refuse("stop", value, f"a text, or a list of at most {limits.stops}")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not 0 < len(text) <= limits.stop_chars:
            name = "stop" if isinstance(value, str) else f"stop[{number}]"
            refuse(name, text, f"a text of 1 to {limits.stop_chars} characters")
    return texts


def _bias(value: Any, served: ServedModel) -> dict[int, float]:
    """Return what the field logit_bias says: an object with token ids, as texts, and numbers."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > served.limits.biases:
        refuse("logit_bias", value, f"an object with at most {served.limits.biases} token ids and what to add to them")
    found = {}
    for key, number in value.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            refuse("logit_bias", key, "an object whose keys are token ids")
        if not is_number(number) or abs(number) > MAX_BIAS:
            refuse(f"logit_bias.{key}", number, f"a number from {-MAX_BIAS:g} to {MAX_BIAS:g}")
        found[int(key)] = float(number)
    served.check_ids("logit_bias", list(found))
    return found


def _asked(
    kind: Literal["completion", "chat"],
    model: str,
    fields: Fields,
    settings: _Settings,
    served: ServedModel,
    *,
    prompts: list[Prompt],
    echo: bool,
    logprobs: int | None,
    max_tokens: int | None,
) -> Asked:
    """Return what is asked for. `max_tokens` counts if the request does not say; None: to the end of the context."""
    limits, n = served.limits, settings.n
    if len(prompts) * n > limits.texts:
        raise ApiError(400, f"n={n}: {len(prompts)} prompts give at most {limits.texts} texts", param="n")
    wanted = max_tokens if settings.max_tokens is None else settings.max_tokens
    configs = settings.sampling.for_texts(len(prompts) * n)
    wants_prompts = echo and logprobs is not None
    requests = []
    for number, config in enumerate(configs):
        prompt = prompts[number // n]
        room = served.context - len(prompt.ids) + 1  # the last token needs no position: nothing is computed after it
        requests.append(
            Request(
                prompt=prompt.ids,
                sampling=dataclasses.replace(config, max_new_tokens=room if wanted is None else min(wanted, room)),
                stop_tokens=served.model.stop_tokens,
                yields_stop=True,
                bias=settings.bias,
                decoder=prompt.decoder.fork(),
                stop=settings.stop,
                logprobs=logprobs,
                prompt_logprobs=logprobs if wants_prompts else None,
                salt=settings.salt,
            )
        )
    asked = Asked(
        kind=kind, model=model, stream=settings.stream, include_usage=settings.include_usage, prompts=prompts, n=n,
        requests=requests, seed=configs[0].seed, echo=echo, logprobs=logprobs,
        return_token_ids=settings.return_token_ids, tokens_as_ids=settings.tokens_as_ids, unknown_fields=fields.left,
    )  # fmt: skip
    if logprobs is not None:
        n_prompt = n * asked.n_prompt_tokens
        n_tokens = asked.n_reserved_tokens - (0 if wants_prompts else n_prompt)
        if n_tokens * (logprobs + 1) > limits.all_logprobs:
            raise ApiError(
                400, f"logprobs: {n_tokens} tokens with {logprobs} alternatives each are too many; "
                f"at most {limits.all_logprobs} logprobs in an answer: ask for fewer texts, or give max_tokens",
                param="logprobs",
            )  # fmt: skip
    return asked
