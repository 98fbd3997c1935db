"""Small served models, and what a server would answer to a request, without a server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from toy import SMALL_MODELS, random_tensors, toy_llama3, toy_model

from llamalet import Model, model_file
from llamalet.config import ModelConfig
from llamalet.engine import Engine
from llamalet.serve import schema
from llamalet.serve.answers import Answer
from llamalet.serve.served_model import ServedModel
from llamalet.tokenizer import pack


def toy_story_model(folder: Path, **options: Any) -> ServedModel:
    """Return a model of random weights with Llama 2's kind of vocabulary: 300 tokens, a context of 32."""
    path = toy_model(folder, SMALL_MODELS["gqa-tied"], name="story", scale=0.3)
    return ServedModel(Model.load(path, backend="numpy"), **options)


def toy_chat_model(folder: Path, **options: Any) -> ServedModel:
    """Return a model of random weights with Llama 3's kind of vocabulary and 7 rows more: a context of 128."""
    path, vocabulary = folder / "chat.bin", toy_llama3()
    config = ModelConfig.create(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=vocabulary.vocab_size + 7,
        max_seq_len=128,
    )  # fmt: skip
    tensors = random_tensors(config, seed=3, scale=0.3)
    inside = ("bin", pack(vocabulary.pieces()))
    model_file.write(path, 3, config, tensors, dtype="f32", tokenizer_sha256=vocabulary.sha256, tokenizer=inside)
    return ServedModel(Model.load(path, backend="numpy"), **options)


Read = Callable[[bytes, ServedModel], schema.Asked]


def run(served: ServedModel, asked: schema.Asked, **engine: Any) -> tuple[Answer, bytes]:
    """Return a finished answer, and the bytes of its chunks: each is taken after a step of the engine."""
    answer, made = Answer(asked, "7", 5, served), b""
    worker = Engine(served.model.transformer, undrawn=served.undrawn, **engine)
    index_of = {worker.add(request): index for index, request in enumerate(asked.requests)}
    while not answer.finished:
        for event in worker.step():
            answer.push(index_of[event.id], event)
        made += answer.chunk() if asked.stream else b""
    return answer, made


def ask(served: ServedModel, read: Read, **fields: Any) -> dict[str, Any]:
    """Return the answer to a request that is not streamed."""
    answer, _ = run(served, read(json.dumps(fields).encode(), served))
    return json.loads(answer.body())


def complete(served: ServedModel, **fields: Any) -> dict[str, Any]:
    """Return the answer to a completion that is not streamed."""
    return ask(served, schema.read_completion, **fields)


def chat(served: ServedModel, **fields: Any) -> dict[str, Any]:
    """Return the answer to a chat that is not streamed."""
    return ask(served, schema.read_chat, **fields)


def stream(served: ServedModel, read: Read, **fields: Any) -> list[dict[str, Any]]:
    """Return the events of a streamed answer, whose end is checked."""
    answer, made = run(served, read(json.dumps(fields | {"stream": True}).encode(), served))
    *events, last, rest = (made + answer.done()).split(b"\n\n")
    assert (last, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-softmax of logits (T, V), in float64."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
