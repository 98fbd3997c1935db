"""What only the page asks for: the page itself, and looks inside the model.

Each look is a plain function; `routes` mounts them. The logits come from the engine, like any text. Attention weights
come from the numpy reference, on a thread of their own, so that the engine never waits for a look; they are bounded in
length, and one is computed at a time.
"""

import asyncio
import json
import math
import mimetypes
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llamalet import story_grammar
from llamalet.checks import token_ids
from llamalet.config import ModelConfig
from llamalet.engine import Begun, Ended, Request
from llamalet.errors import LlamaletError, UsageError, one_line
from llamalet.kv_cache import KVCache
from llamalet.reference import PREFILL_CHUNK, hidden_states
from llamalet.runtime import Model
from llamalet.sampler import Choose, Generator, Rule, SamplingConfig
from llamalet.serve.api_error import ApiError
from llamalet.serve.daemon_threads import INLINE_BYTES, DaemonThreads
from llamalet.serve.exchange import Exchange, Receive, Scope, Send
from llamalet.serve.served_model import ServedModel
from llamalet.serve.worker import Worker
from llamalet.strict import build, parse_json
from llamalet.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starlette.routing import Route

Asked = TypeVar("Asked")

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
)

MAX_SHOWN = 100
"""Tokens of a distribution that are listed."""
MAX_STEP = 1 << 16
"""Coins of a seed, which are drawn one after the other."""
MAX_ATTENTION_TOKENS = 1024
MAX_PRODUCTS = 2 * 10**11
"""Weights times tokens: numpy takes some ten seconds for so many."""
MAX_LOOKS = 8
"""Attention passes that run or wait at once."""
MAX_SMALL_LOOKS = 64
"""Other looks, and bodies that are read."""
BODY_BYTES, TOKEN_BYTES = 4096, 16
"""What a look's body may have: bytes, and bytes for each position of the context."""

GRAMMAR_SEED, NEAR_TRUTH = 0, 1.3
"""A model speaks the grammar if a story drawn with this seed costs it at most this many times the grammar's nats."""


# --- what the page sends, as JSON objects ---


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionAsked:
    """What may follow some tokens, under a sampler's settings.

    Attributes:
        tokens: ids, at least one.
        temperature, top_p, top_k, min_p, seed: see SamplingConfig.
        step: number of coins that this seed has drawn before.
        n: how many of the most likely tokens to list.
    """

    tokens: list[int]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    step: int = 0
    n: int = 20

    def sampling(self) -> SamplingConfig:
        """Return the settings.

        Raises:
            ConfigError: if one is out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        return SamplingConfig(max_new_tokens=0, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionAsked:
    """What the last of some tokens, at least one, looks at."""

    tokens: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TruthAsked:
    """What the grammar says of the token after these, which may be none; `n`: see DistributionAsked."""

    tokens: list[int] = field(default_factory=list)
    n: int = 20


# --- the looks ---


def distribution(
    logits: NDArray[np.float32],
    config: SamplingConfig,
    step: int = 0,
    *,
    n: int = 20,
    undrawn: Collection[int] = (),
    choose: Choose,
) -> dict[str, Any]:
    """Return what each step of the sampler makes of a distribution, and what one coin falls on.

    Args:
        logits: float32 (V,), finite.
        config: the sampler's settings; its seed is not -1.
        step: how many coins the seed has drawn before; 0 gives the first token of a text.
        n: how many tokens to list.
        undrawn: ids that are never drawn.
        choose: what chooses the token: the model's own.

    Returns:
        token: the id that is drawn. coin: the random number in [0, 1); None at temperature 0, which needs none.
        entropy, entropy_drawn: in nats, before and after all steps. kept: how many tokens are left after each step.
        rows: the n most likely tokens, the likeliest first, and the drawn one. Each has its token; its rank, the number
        of likelier ones; its probability raw (the model's), tempered, and drawn (after all steps); cut_by, the step
        that excluded it, or None; and interval, the part of [0, 1) where the coin falls on it, or None. rest: what the
        probabilities of all other tokens sum to.

    Raises:
        UsageError: if a logit is NaN or infinite.
    """
    if not np.isfinite(logits).all():
        raise UsageError("the logits are NaN or infinite: the weights are damaged, or the training diverged")
    rule = Rule.create(config, len(logits), undrawn)
    generator = Generator(config.seed)
    for _ in range(step):
        generator.next_float()
    coin = generator.next_float() if rule.temperature else np.float32(0)
    token = choose(logits, rule, coin)

    raw = np.exp(logits.astype(np.float64) - logits.max())
    raw /= raw.sum()
    possible = np.setdiff1d(np.arange(rule.n_drawn), rule.left_out)
    tempered, cut_by = np.zeros(len(logits), np.float32), np.full(len(logits), "", dtype="U11")
    cut_by[np.setdiff1d(np.arange(len(logits)), possible)] = "vocabulary"
    kept = {"vocabulary": len(possible)}
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = logits[possible] / rule.temperature
    if rule.temperature and np.isfinite(scaled.max()):
        weights = np.exp(scaled - scaled.max())
        tempered[possible] = weights / _sums(weights)[-1]
        order = possible[np.argsort(-tempered[possible], kind="stable")]
        for name, n_kept in _kept(tempered[order], rule).items():
            cut_by[order[n_kept:]] = name
            order = order[:n_kept]
            kept[name] = n_kept
        filtered = bool(rule.top_k or rule.top_p or rule.min_p)
        line = order if filtered else possible  # run.c goes through all tokens in the order of their ids
    else:
        tempered[token] = 1.0
        cut_by[possible[possible != token]] = "temperature"
        kept |= dict.fromkeys(("top_k", "top_p", "min_p"), 1)
        line = np.array([token])
    drawn = np.zeros(len(logits))
    drawn[line] = tempered[line] / tempered[line].sum(dtype=np.float64)
    ends = np.zeros(len(logits))
    ends[line] = np.cumsum(drawn[line])

    listed = np.argsort(-raw, kind="stable")[:n].tolist()
    if token not in listed:
        listed.append(token)
    stages = {"raw": raw, "tempered": tempered, "drawn": drawn}
    rows = [
        {
            "token": id,
            "rank": int(np.count_nonzero(logits > logits[id])),
            **{name: float(stage[id]) for name, stage in stages.items()},
            "cut_by": str(cut_by[id]) or None,
            "interval": [float(ends[id] - drawn[id]), float(ends[id])] if drawn[id] else None,
        }
        for id in listed
    ]
    return {
        "token": token,
        "coin": float(coin) if rule.temperature else None,
        "entropy": _entropy(raw),
        "entropy_drawn": _entropy(drawn),
        "kept": kept,
        "rows": rows,
        "rest": {name: max(0.0, 1 - float(stage[listed].sum())) for name, stage in stages.items()},
    }


def _kept(ranked: NDArray[np.float32], rule: Rule) -> dict[str, int]:
    """Return how many of the most likely tokens are left after each filter; `ranked`: their probabilities, sorted.

    In float32, as in sampler.choose_by_weight, so that the numbers are those of the tokens that can be drawn.
    """
    kept = len(ranked)
    found = {}
    if rule.top_k:
        kept = min(kept, rule.top_k)
    found["top_k"] = kept
    if rule.top_p:
        sums = _sums(ranked[:kept])
        bound = rule.top_p * sums[-1] if rule.top_k else rule.top_p
        kept = min(int(np.searchsorted(sums, bound, side="right")), kept - 1) + 1
    found["top_p"] = kept
    if rule.min_p:
        kept = min(kept, int(np.count_nonzero(ranked >= rule.min_p * ranked[0])))
    found["min_p"] = kept
    return found


def _sums(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the float32 sums of values[: i + 1], added one by one as the sampler does."""
    return np.cumsum(values, dtype=np.float32)


def _entropy(probabilities: NDArray[np.float64]) -> float:
    """Return the entropy of probabilities (V,), in nats."""
    positive = probabilities[probabilities > 0]
    return max(0.0, float(-(positive * np.log(positive)).sum()))


def attention(tensors: Any, config: ModelConfig, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Return how much the last of some tokens looks at each of them: (L, H, T), each head's weights sum to 1.

    Args:
        tensors: the model's, by name.
        config: its shape.
        tokens: ids (T,).

    Raises:
        UsageError: if there are none or too many, one is not in the vocabulary, or the model is too large.
    """
    ids = token_ids(tokens, config.vocab_size)
    most = min(config.max_seq_len, MAX_ATTENTION_TOKENS)
    if len(ids) > most:
        raise UsageError(f"tokens: {len(ids)}; attention is shown of 1 to {most}")
    if config.n_params * len(ids) > MAX_PRODUCTS:
        raise UsageError(
            f"tokens: {len(ids)} through {config.n_params:,} weights would take too long here; attention of at most "
            f"{MAX_PRODUCTS // config.n_params} tokens is shown for this model"
        )
    cache = KVCache(config, len(ids), "f32")
    for start in range(0, len(ids) - 1, PREFILL_CHUNK):
        hidden_states(tensors, config, ids[None, start : min(start + PREFILL_CHUNK, len(ids) - 1)], cache)
    seen: list[NDArray[np.float32]] = []
    hidden_states(tensors, config, ids[None, -1:], cache, seen)
    return np.stack([weights.reshape(config.n_heads, len(ids)) for weights in seen])


def truth(tokenizer: Tokenizer, tokens: Sequence[int], n: int = 20) -> dict[str, Any]:
    """Return the probabilities that the grammar of the demo model's stories gives to the next token.

    Returns:
        problem: why there are none, in words; None if there are. rows: [token, probability], the most likely first.
        n_possible: how many tokens are possible. entropy: in nats.
    """
    found = story_grammar.next_tokens(tokenizer, tokens)
    rows = sorted(found.items(), key=lambda row: (-row[1], row[0]))
    return {
        "problem": None if rows else "no story of the grammar begins like this",
        "rows": rows[:n],
        "n_possible": len(rows),
        "entropy": _entropy(np.array(list(found.values()))),
    }


def vocabulary(tokenizer: Tokenizer) -> list[Any]:
    """Return each token as the page shows it: its text, its bytes if they are no UTF-8 alone, null if it is no text."""
    shown: list[Any] = []
    for id in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(id)
        try:
            shown.append(data.decode() if data else None)
        except UnicodeDecodeError:
            shown.append(list(data))
    return shown


def facts(model: Model, name: str, *, is_chat: bool, speaks_grammar: bool) -> dict[str, Any]:
    """Return what the page needs to know of a model before it shows anything; `vocabulary`: see there."""
    tokenizer, config = model.tokenizer, model.config
    return {
        "name": name,
        "n_parameters": config.n_params,
        "dtype": model.dtype,
        **{key: getattr(config, key) for key in ("dim", "n_layers", "n_heads", "vocab_size")},
        "context": config.max_seq_len,
        "begins": list(tokenizer.ids.prefix),
        "stops": sorted(model.stop_tokens),
        "adds_space": tokenizer.adds_space,
        "names": {id: name for name, id in tokenizer.special.items()},
        "vocabulary": vocabulary(tokenizer),
        "is_chat": is_chat,
        "speaks_grammar": speaks_grammar,
    }


def grammar_test(model: Model) -> tuple[list[int], float] | None:
    """Return a story of the grammar as ids, and its nats; None if the model cannot know the grammar."""
    text, log_prob = story_grammar.draw_scored(np.random.default_rng(GRAMMAR_SEED))
    tokenizer = model.tokenizer
    if not tokenizer.adds_space or not (tokenizer.ids.prefix or tokenizer.eos_id is not None):
        return None
    ids = [*tokenizer.encode_document(text), tokenizer.separator_id]
    return None if len(ids) > model.config.max_seq_len else (ids, -log_prob)


# --- the routes ---


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return the content and the media type of each file of the page, by its name."""
    found = {}
    for path in sorted(PAGE.iterdir()):
        if kind := {".js": "text/javascript"}.get(path.suffix) or mimetypes.guess_type(path.name)[0]:
            found[path.name] = path.read_bytes(), f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
    return found


class _Look:
    """A function that answers one exchange, as an ASGI application that reports a user's mistakes."""

    def __init__(self, answer: Callable[[Exchange, Scope], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope["exchange"], scope)
        except LlamaletError as error:
            raise ApiError(400, one_line(error)) from None


def routes(served: ServedModel, worker: Worker) -> "list[Route]":
    """Return the routes of the page and of what it asks for.

    Args:
        served: the model.
        worker: what runs the engine.
    """
    from starlette.routing import Route

    model, files = served.model, page_files()
    threads, attention_thread = DaemonThreads("looks", 2, MAX_SMALL_LOOKS), DaemonThreads("attention", 1, MAX_LOOKS)
    known: dict[str, bool] = {}
    facts_body: list[bytes] = []  # once it has been asked for

    async def read(exchange: Exchange, kind: type[Asked]) -> Asked:
        """Return the object in a request's body.

        Raises:
            ApiError: if it is too large.
            UsageError: if it is not one of this kind.
        """
        body, most = await exchange.body(), BODY_BYTES + TOKEN_BYTES * model.config.max_seq_len
        if len(body) > most:
            raise ApiError(413, f"the body has {len(body)} bytes; a look at this model takes at most {most}")
        if len(body) <= INLINE_BYTES:
            return parsed(body, kind)
        return await exchange.unless_gone(threads.call(parsed, body, kind))

    async def begun(exchange: Exchange, request: Request) -> Begun:
        """Return what the engine says once it has read a request's prompt.

        Raises:
            ApiError: if it has no room for the prompt, or cannot read it.
        """
        exchange.n_prompt = len(request.prompt)
        found: Begun | None = None
        with worker.run([request]) as texts:
            watch = asyncio.create_task(exchange.watch(texts))
            try:
                async for events in texts:
                    for _, event in events:
                        if isinstance(event, Begun):
                            found = event
                        elif isinstance(event, Ended) and event.error is not None:
                            raise ApiError.of(event.error)
            finally:
                watch.cancel()
        if found is None:
            raise ApiError(503, "the server is busy; try again")
        return found

    async def speaks_grammar(exchange: Exchange) -> bool:
        """Return whether the model has learnt the grammar's language; the first call tries it."""
        if "grammar" not in known:
            speaks = False
            if test := await threads.call(grammar_test, model):
                ids, nats = test
                nothing = SamplingConfig(max_new_tokens=0, seed=0)
                event = await begun(exchange, Request(prompt=ids, sampling=nothing, prompt_logprobs=0))
                found = -math.fsum(entry.logprob for entry in event.prompt_logprobs or () if entry is not None)
                speaks = found < NEAR_TRUTH * nats
            known["grammar"] = speaks
        return known["grammar"]

    async def send_file(exchange: Exchange, scope: Scope) -> None:
        name = scope["path_params"].get("name", "index.html")
        if name not in files:  # looked up in a table: no path of a request is ever opened
            raise ApiError(404, "there is nothing at this path")
        content, kind = files[name]
        await exchange.answer(200, content, PAGE_HEADERS, kind=kind)

    async def send_facts(exchange: Exchange, _: Scope) -> None:
        if not facts_body:
            speaks, is_chat = await speaks_grammar(exchange), served.template is not None
            found = await threads.call(facts, model, served.names[0], is_chat=is_chat, speaks_grammar=speaks)
            facts_body.append(json.dumps(found).encode())
        await exchange.answer(200, facts_body[0])

    async def send_distribution(exchange: Exchange, _: Scope) -> None:
        asked = await read(exchange, DistributionAsked)
        _at_most("step", asked.step, MAX_STEP)
        _at_most("n", asked.n, MAX_SHOWN)
        token_ids(asked.tokens, model.config.vocab_size)
        config = asked.sampling()
        event = await begun(exchange, Request(prompt=asked.tokens, sampling=config, wants_logits=True))
        assert event.logits is not None
        options = {"n": asked.n, "undrawn": served.undrawn, "choose": model.transformer.choose}
        await exchange.answer_json(await threads.call(distribution, event.logits, config, asked.step, **options))

    async def send_attention(exchange: Exchange, _: Scope) -> None:
        asked = await read(exchange, AttentionAsked)
        look = attention_thread.call(attention, model.transformer.tensors, model.config, asked.tokens)
        weights = await exchange.unless_gone(look)
        await exchange.answer_json({"layers": np.round(weights.astype(np.float64), 4).tolist()})

    async def send_truth(exchange: Exchange, _: Scope) -> None:
        asked = await read(exchange, TruthAsked)
        _at_most("n", asked.n, MAX_SHOWN)
        _at_most("number of tokens", len(asked.tokens), model.config.max_seq_len)
        if asked.tokens:
            token_ids(asked.tokens, model.tokenizer.vocab_size)
        if not await speaks_grammar(exchange):
            raise UsageError("this model was not trained on the stories of the grammar")
        await exchange.answer_json(await threads.call(truth, model.tokenizer, asked.tokens, asked.n))

    return [
        Route("/", _Look(send_file), methods=["GET"]),
        Route("/page/model", _Look(send_facts), methods=["GET"]),
        Route("/page/distribution", _Look(send_distribution), methods=["POST"]),
        Route("/page/attention", _Look(send_attention), methods=["POST"]),
        Route("/page/truth", _Look(send_truth), methods=["POST"]),
        Route("/page/{name}", _Look(send_file), methods=["GET"]),
    ]


def parsed(body: bytes, kind: type[Asked]) -> Asked:
    """Return the object in a body.

    Raises:
        UsageError: if it is not one of this kind.
    """
    return build(kind, parse_json(body, "the body", UsageError), "the body", UsageError)


def _at_most(name: str, value: int, most: int) -> None:
    """Raise a UsageError if a number is too large."""
    if value > most:
        raise UsageError(f"{name}={value}: must be at most {most}")
