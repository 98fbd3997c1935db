"""A model ready to use: its weights, a forward pass, its tokenizer."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, Union

import numpy as np
from numpy.typing import NDArray

from llamalet.checks import checked, choice, elements, file_path
from llamalet.convert.formats import Check, open_model
from llamalet.cores import thread_count
from llamalet.drafting import LOOKUP, Draft, Lookup, SmallModel
from llamalet.errors import FormatError, TokenizerError, UsageError, note
from llamalet.files import stamp
from llamalet.forward_pass import ForwardPass, Tokens
from llamalet.generate import generate_batch, stream
from llamalet.kv_kinds import KINDS
from llamalet.model_file.reader import ModelFile
from llamalet.sampler import SamplingConfig
from llamalet.scoring import NOTHING, Evaluation, evaluate_documents
from llamalet.tokenizer import StreamDecoder, Tokenizer

BACKENDS = ("numba", "numpy")

SMALL_DRAFT_BYTES = 4 << 20
"""A draft whose file is smaller computes a token in less time than two threads need to meet often enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a model came from: enough to open it again, in another process too.

    Attributes:
        path: of the file or folder, absolute.
        options: the other arguments of Model.load.
        stamp: see files.stamp.
    """

    path: Path
    options: dict[str, Any]
    stamp: object


AnyDraft = Union["Model", str, os.PathLike[str], Draft, None]
"""What Model.generate takes as a draft."""


class Model:
    """A model in memory, ready to generate.

    A copy, or a pickle that is read in another process, opens the file again; it must be the same as it was. After a
    fork both processes can use the model.

    Attributes:
        path: where it was read from.
        config: its shape.
        transformer: its forward pass.
        stop_tokens: the ids that end a text: EOS, the end of a turn, and in this project's models BOS, which begins the
            next text in training data.
        dtype: what its matrices are made of, and from what: "q8 (from Q4_K)".
        chat_template: the Jinja template that was inside it, if there was one.
    """

    def __init__(
        self,
        path: Path,
        transformer: ForwardPass,
        tokenizer: Tokenizer | None,
        *,
        dtype: str = "f32",
        chat_template: str | None = None,
        stop_tokens: frozenset[int] | None = None,
        problem: str = "the model has no tokenizer",
    ) -> None:
        self.path = path
        self.config = transformer.config
        self.transformer = transformer
        self._tokenizer, self._problem = tokenizer, problem
        if stop_tokens is None:
            stop_tokens = frozenset() if tokenizer is None else tokenizer.stop_ids
        self.stop_tokens = stop_tokens
        self.dtype = dtype
        self.chat_template = chat_template
        self._origin: Origin | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        backend: str = "numba",
        threads: int | None = None,
        kv: str | None = None,
        verify: bool | None = None,
        check: Check | None = None,
    ) -> Self:
        """Open a model in any format.

        A .bin is mapped. Any other model is converted in memory, and keeps the width of its weights unless `dtype` says
        otherwise: float32 stays, 16 bits become bfloat16, quantized weights become q8.

        Args:
            path: a .bin; a training checkpoint, or a run's folder (its best checkpoint); a .gguf; a Hugging Face
                folder; Meta's folder or a .pth in it; llama2.c's ckpt.pt.
            dtype: f32, bf16, q8 or q4.
            tokenizer: the tokenizer's file; None takes the model's own.
            backend: numba, or numpy, which is slow and needs no compiler.
            threads: number of threads; None leaves it to the backend.
            kv: how KV caches keep numbers: f32, bf16 or q8. None takes f32 for weights of float32, else bf16.
            verify: whether to verify the checksums of a .bin or a checkpoint; None verifies small .bin files only.
            check: is called before what takes long, with the model's path, its shape, its tokenizer and the chat
                template inside it, if there is one. What it raises ends the loading, and so does a missing tokenizer.

        Raises:
            FormatError: if there is no model at `path`, it is damaged, or it cannot be read.
            CheckpointError: the same for a checkpoint.
            TokenizerError: if the tokenizer is damaged, or another model's. A model without one loads; what needs text
                says what is missing.
            ConfigError: on an unknown backend, dtype or kv, or a bad number of threads, here or in the environment.
            UsageError: if `path` is no path, or a library that the format needs is not installed.
        """
        choice("backend", backend, BACKENDS)
        if kv is not None:
            choice("kv", kv, KINDS)
        named = None if tokenizer is None else file_path("tokenizer", tokenizer)
        verify = None if verify is None else checked("verify", verify, bool)
        options: dict[str, Any] = {"dtype": dtype, "tokenizer": named, "verify": verify}
        opened = open_model(file_path("path", path), **options, check=check)
        file = opened.file
        model = cls(
            file.path,
            open_backend(file, backend, threads, kv),
            opened.tokenizer,
            dtype=f"{file.dtype} (from {opened.stored})" if opened.stored else file.dtype,
            chat_template=opened.chat_template,
            stop_tokens=opened.stop_ids,
            problem=opened.problem,
        )
        options |= {"tokenizer": named and named.absolute(), "backend": backend, "threads": threads, "kv": kv}
        model._origin = Origin(path=file.path.absolute(), options=options, stamp=stamp(file.path))
        return model

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy a model as the place that it was opened from.

        Raises:
            UsageError: if it was not opened by Model.load.
        """
        if self._origin is None:
            raise UsageError("only a model that Model.load opened can be copied or pickled")
        return _open_again, (type(self), self._origin)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's vocabulary.

        Raises:
            TokenizerError: if it has none; logits need none.
        """
        if self._tokenizer is None:
            raise TokenizerError(self._problem)
        return self._tokenizer

    @property
    def undrawn(self) -> frozenset[int]:
        """The ids that no text may get: rows of the embeddings without a token, which pad them to a round number."""
        if self._tokenizer is None:
            return frozenset()
        return self._tokenizer.unused.union(range(self._tokenizer.vocab_size, self.config.vocab_size))

    def logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """Return the logits after each token, computed from an empty cache.

        Args:
            tokens: ids (T,), at most the context.

        Returns:
            float32 (T, V).
        """
        return self.transformer.logits(tokens)

    def score(self, text: str) -> Evaluation:
        """Return how well the model predicts a text: its loss in nats per token and bits per byte.

        Each token is predicted from those before it: all of them, or in a long text at least half a context.

        Args:
            text: any text that is not empty.

        Raises:
            UsageError: if the text is empty.
            NonFiniteError: if the model's logits are NaN or infinite.
        """
        if not checked("text", text, str):
            raise UsageError("there is no text to score")
        ids = np.array(self.tokenizer.encode(text, bos=True))
        return sum(evaluate_documents(self.transformer, self.tokenizer, [ids]), NOTHING)

    def generate(
        self,
        prompt: str = "",
        sampling: SamplingConfig | None = None,
        *,
        draft: AnyDraft = None,
        **options: Any,
    ) -> Iterator[str]:
        """Return the text that continues a prompt, piece by piece as it is generated.

        The same seed and settings always give the same text:

            model.generate("Once upon a time", temperature=0.8, seed=7)

        Args:
            prompt: the beginning; if it is empty, the model begins.
            sampling: how tokens are chosen and when the text ends.
            draft: what proposes tokens, for more speed and the same text: a smaller Model of the same vocabulary, the
                path of one, which is opened each time, or "lookup", which proposes what followed the newest tokens
                before.
            options: fields of SamplingConfig, which replace those of `sampling`.

        Raises:
            ConfigError: on an unknown option, or listing every value out of range.
            UsageError: if the prompt is longer than a context that does not roll, or the draft has another vocabulary.
            LlamaletError: if there is no model at the draft's path; see load.
            NonFiniteError: with a token, if the logits of the model or of the draft are NaN or infinite.
        """
        return (text for _, text in self.generate_batch([prompt], sampling, draft=draft, **options))

    def new_draft(self, draft: AnyDraft) -> Draft | None:
        """Return what `generate` takes as a draft, ready to propose; see there."""
        if draft is None or isinstance(draft, Draft):
            return draft
        if isinstance(draft, str) and draft == LOOKUP:
            return Lookup()
        small = draft if isinstance(draft, Model) else self.open_draft(draft)
        if small.config.vocab_size != self.config.vocab_size:
            mine, its = self.config.vocab_size, small.config.vocab_size
            raise UsageError(f"draft: has {its} tokens, the model {mine}: they must be the same")
        if not small.tokenizer.has_same_tokens(self.tokenizer):
            raise UsageError("draft: has another vocabulary than the model, so it cannot propose tokens to it")
        return SmallModel(small.transformer)

    def open_draft(self, path: str | os.PathLike[str]) -> "Model":
        """Open a model as a draft, with this one's backend, threads, kind of cache and, if named, tokenizer file.

        A small one gets a single thread: a second would be in the way of this model's, which wait for work.

        Raises:
            LlamaletError: see load.
        """
        options: dict[str, Any] = {} if self._origin is None else self._origin.options
        same = {name: options[name] for name in ("tokenizer", "backend", "threads", "kv") if name in options}
        path = file_path("draft", path)
        if path.is_file() and path.stat().st_size < SMALL_DRAFT_BYTES:
            same["threads"] = 1
        return type(self).load(path, **same)

    def generate_batch(
        self,
        prompts: Iterable[str],
        sampling: SamplingConfig | None = None,
        *,
        batch_size: int | None = None,
        draft: AnyDraft = None,
        **options: Any,
    ) -> Iterator[tuple[int, str]]:
        """Return the texts that continue several prompts, generated together, as (number of the prompt, piece).

        This is several times as fast as one after the other, and each text is the one that `generate` gives alone:

            texts = [""] * len(prompts)
            for number, piece in model.generate_batch(prompts, seed=7):
                texts[number] += piece

        Args:
            prompts: any number of beginnings.
            sampling: see generate. Its seed is that of the first text; each has one more than the last.
            batch_size: number of texts in progress at once, at most 64; None: as many as memory has room for.
            draft: see generate; for a single prompt.
            options: see generate.

        Raises:
            ConfigError: see generate.
            UsageError: see generate, or if the batch size is out of range.
        """
        ids = [self.tokenizer.encode(prompt, bos=True) for prompt in elements("prompts", prompts)]
        configs = SamplingConfig.create(sampling, options).for_texts(len(ids))
        decoders = [StreamDecoder(self.tokenizer) for _ in ids]
        for decoder, prompt_ids in zip(decoders, ids, strict=True):
            for token in prompt_ids:
                decoder.push(token)
        events = generate_batch(
            self.transformer, ids, configs, stop_tokens=self.stop_tokens, undrawn=self.undrawn, batch_size=batch_size,
            draft=self.new_draft(draft),
        )  # fmt: skip
        return stream(events, decoders)


def open_backend(file: ModelFile, backend: str, threads: int | None, kv: str | None) -> ForwardPass:
    """Return the forward pass of a model file on one of the BACKENDS; numpy where numba is told not to compile.

    `kv` is the kind of its caches, as for Model.load.

    Raises:
        ConfigError: if the number of threads is out of range, here or in the environment.
        UsageError: if numba cannot be imported.
    """
    if threads is not None or backend == "numba":
        thread_count(threads)
    # Importing and compiling the kernels takes longest, so every other error comes first.
    if usable_backend(backend) == "numba":
        from llamalet.kernels.transformer import Transformer

        return Transformer(file, threads, kv)
    from llamalet.reference import NumpyTransformer

    return NumpyTransformer(file, kv)


def usable_backend(backend: str) -> str:
    """Return one of the BACKENDS, or numpy, with a note, where numba is told not to compile.

    Raises:
        UsageError: if numba cannot be imported.
    """
    if backend == "numba":
        from llamalet.kernels.environment import import_numba

        if not import_numba():
            note("llamalet: NUMBA_DISABLE_JIT is set, so that numba compiles nothing: taking backend=numpy")
            return "numpy"
    return backend


def _open_again(cls: type[Model], origin: Origin) -> Model:
    """Return the model of a pickle or a copy.

    Raises:
        FormatError: if it is no longer there, or another one is.
    """
    model = cls.load(origin.path, **origin.options)
    if stamp(model.path) != origin.stamp:
        raise FormatError(f"{origin.path}: has changed since the model was opened that this is a copy of")
    return model
