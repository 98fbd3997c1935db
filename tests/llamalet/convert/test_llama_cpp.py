"""What llama.cpp makes of our GGUF files; needs llama-cpp-python, which is in the extra [peers]."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from gguf_makes import MAKES
from other_programs import FACTOR, LLAMA_CPP_FACTORS, logits, write_gguf
from toy import random_tensors, toy_llama3, toy_tokenizer
from vocabularies import HARD

from llamalet import Model, tokenizer
from llamalet.config import LinearScaling, ModelConfig, RopeDivisors, rope_frequencies
from llamalet.convert import bin_file, gguf_file
from llamalet.convert.imported_model import ImportedModel, llama3_scaling
from llamalet.convert.probes import probes
from llamalet.tokenizer import Tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is in the extra [peers]")

ROOT = Path(__file__).parents[3]
FLOAT32 = 0  # of GGML's types
N_TOKENS = 100
LLAMA2 = ModelConfig.create(
    dim=64, n_layers=2, n_heads=4, hidden_dim=176, vocab_size=300, max_seq_len=256, tied=False
)  # fmt: skip
LLAMA3 = ModelConfig.create(
    dim=128, n_layers=2, n_heads=32, n_kv_heads=8, head_dim=8, hidden_dim=256, vocab_size=toy_llama3().vocab_size,
    max_seq_len=256, rope_theta=5e5, rope_scaling=dataclasses.replace(llama3_scaling(32.0), original_max_seq_len=8192),
)  # fmt: skip
OTHER_HEADS = dataclasses.replace(LLAMA3, n_heads=6, n_kv_heads=2, head_dim=32)
TEXTS = (*HARD, "Once upon a time", "a band  of\n\n\nbandits' 12345 \U0001f600\u200d", " leading", "x" * 3000)


def source_of(config: ModelConfig, vocabulary: Tokenizer, seed: int = 0, data: bytes = b"") -> ImportedModel:
    tensors = random_tensors(config, seed, 0.4)
    return ImportedModel(
        name="toy",
        config=config,
        tensors=tensors,
        tokenizer=vocabulary,
        tokenizer_data=data or tokenizer.pack(vocabulary.pieces()),
    )


def theirs(path: Path, **options: object) -> "llama_cpp.Llama":
    return llama_cpp.Llama(str(path), verbose=False, **options)


def check_greedy(tmp_path: Path, source: ImportedModel, prompt: str) -> None:
    """The most likely tokens after a prompt are llama.cpp's, and so is their text."""
    gguf_file.write(tmp_path / "m.gguf", source)
    bin_file.write(tmp_path / "m.bin", source, 3, dtype="f32")
    peer = theirs(
        tmp_path / "m.gguf", n_ctx=source.config.max_seq_len, n_threads=1, type_k=FLOAT32, type_v=FLOAT32,
        flash_attn=False,
    )  # fmt: skip
    model = Model.load(tmp_path / "m.bin", threads=1)
    ids = model.tokenizer.encode(prompt, bos=True)
    assert peer.tokenize(prompt.encode(), add_bos=True) == ids
    generated = peer.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    expected = [next(generated) for _ in range(N_TOKENS)]
    ours = "".join(model.generate(prompt, temperature=0.0, max_new_tokens=N_TOKENS, ignore_eos=True))
    assert ours == model.tokenizer.decode(ids + expected)[len(model.tokenizer.decode(ids)) :]
    for at in range(len(ids), len(ids) + N_TOKENS, 9):  # text can hide ids: the tokens too
        assert int(np.argmax(model.logits((ids + expected)[:at])[-1])) == (ids + expected)[at]


@pytest.mark.parametrize(
    ("config", "vocabulary"),
    [(LLAMA2, toy_tokenizer(300)), (LLAMA3, toy_llama3()), (OTHER_HEADS, toy_llama3())],
    ids=["llama 2", "llama 3", "another head_dim"],
)
def test_the_most_likely_tokens_are_the_same(tmp_path, config, vocabulary):
    check_greedy(tmp_path, source_of(config, vocabulary), "a band")


def test_the_demo_model_tells_the_same_story(tmp_path):
    check_greedy(tmp_path, bin_file.read(str(ROOT / "llamalet" / "assets" / "demo.bin")), "Once upon a time")


ROPE_CONFIG = dataclasses.replace(LLAMA2, max_seq_len=64)
ROPE_TENSORS = random_tensors(ROPE_CONFIG, seed=5, scale=0.2)
ROPE_IDS = np.random.default_rng(1).integers(3, ROPE_CONFIG.vocab_size, 60)


def check_logits(path: Path, divisors: np.ndarray | float) -> None:
    """llama.cpp computes what a model does whose RoPE frequencies are divided."""
    peer = theirs(path, n_ctx=64, n_threads=1, type_k=FLOAT32, type_v=FLOAT32, flash_attn=False, logits_all=True)
    peer.eval(ROPE_IDS.tolist())
    expected = logits(ROPE_CONFIG, ROPE_TENSORS, rope_frequencies(ROPE_CONFIG) / divisors, ROPE_IDS)
    np.testing.assert_allclose(peer.scores[: len(ROPE_IDS)], expected, atol=1e-3)


@pytest.mark.parametrize(("keys", "factor"), LLAMA_CPP_FACTORS)
def test_metadata_scales_rope(tmp_path, keys, factor):
    write_gguf(tmp_path / "m.gguf", ROPE_CONFIG, ROPE_TENSORS, keys=keys)
    check_logits(tmp_path / "m.gguf", factor)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_a_tensor_divides_rope_and_a_factor_again(tmp_path, factor):
    divisors = np.array([1.0, 1.25, 1.5, 2.25, 3.0, 0.75, 9.5, 70.0], np.float32)
    more = {"rope_freqs.weight": divisors}
    write_gguf(tmp_path / "m.gguf", ROPE_CONFIG, ROPE_TENSORS, keys={FACTOR: factor}, more=more)
    check_logits(tmp_path / "m.gguf", factor * divisors)
    scaled = dataclasses.replace(ROPE_CONFIG, rope_scaling=RopeDivisors(divisors=tuple(factor * divisors)))
    source = dataclasses.replace(source_of(scaled, toy_tokenizer(300)), tensors=ROPE_TENSORS)
    gguf_file.write(tmp_path / "ours.gguf", source)
    check_logits(tmp_path / "ours.gguf", factor * divisors)


def test_linear_scaling_is_theirs(tmp_path):
    scaled = dataclasses.replace(ROPE_CONFIG, rope_scaling=LinearScaling(factor=4.0))
    source = dataclasses.replace(source_of(scaled, toy_tokenizer(300)), tensors=ROPE_TENSORS)
    gguf_file.write(tmp_path / "ours.gguf", source)
    check_logits(tmp_path / "ours.gguf", 4.0)


@pytest.mark.parametrize(
    "vocabulary",
    [toy_tokenizer(300), toy_llama3(), tokenizer.load(ROOT / "llamalet" / "assets" / "demo.tokenizer.model")],
    ids=["toy", "toy llama 3", "demo"],
)
def test_the_ids_are_the_same(tmp_path, vocabulary):
    check_ids(tmp_path, vocabulary)


@pytest.mark.parametrize(
    "name", ["llama2-tokenizer.model", "llama2-tokenizer.bin", "llama3-tokenizer.bin", "tok512.bin"]
)
def test_the_ids_of_real_vocabularies_are_the_same(tmp_path, name, shared_data):
    check_ids(tmp_path, tokenizer.load(shared_data / name))


def check_ids(tmp_path: Path, vocabulary: Tokenizer) -> None:
    config = dataclasses.replace(LLAMA2, vocab_size=vocabulary.vocab_size)
    gguf_file.write(tmp_path / "m.gguf", source_of(config, vocabulary))
    peer = theirs(tmp_path / "m.gguf", vocab_only=True)
    assert (peer.token_bos(), peer.token_eos()) == (vocabulary.bos_id, vocabulary.eos_id)
    for text in TEXTS:
        assert peer.tokenize(text.encode(), add_bos=True) == vocabulary.encode(text, bos=True), text


@pytest.mark.parametrize("make", MAKES)
def test_the_ids_of_every_make_are_the_same(tmp_path, make):
    """Padded by 7 rows; where llama.cpp decides by a token's name what it is, our file says so beside."""
    vocabulary, data = MAKES[make]()
    config = dataclasses.replace(LLAMA2, vocab_size=vocabulary.vocab_size + 7)
    notes = gguf_file.write(tmp_path / "m.gguf", source_of(config, vocabulary, data=data))
    peer = theirs(tmp_path / "m.gguf", vocab_only=True)
    decided = [name for name in vocabulary.added if peer_decides(peer, name, 3)]
    decided += [name for name in vocabulary.special if peer_decides(peer, name, 4)]
    assert bool(decided) == any("decides by their names" in note for note in notes)
    for text in (*TEXTS, *probes(vocabulary)):
        for special in (False, True):
            if special or not any(name in text for name in decided):
                found = peer.tokenize(text.encode(), add_bos=True, special=special)
                assert found == vocabulary.encode(text, bos=True, special=special), (text, special)
    ends = {id for id in range(config.vocab_size) if llama_cpp.llama_vocab_is_eog(peer._model.vocab, id)}
    assert ends == vocabulary.stop_ids or any("llama.cpp stops at" in note for note in notes)


CONTROL, USER_DEFINED = 1 << 3, 1 << 4  # llama.cpp's attributes of tokens


def peer_decides(peer: "llama_cpp.Llama", name: str, kind: int) -> bool:
    """Return whether llama.cpp takes a token for special (3), or for one that is text (4)."""
    (id,) = peer.tokenize(name.encode(), add_bos=False, special=True)
    attributes = llama_cpp.llama_vocab_get_attr(peer._model.vocab, id)
    return bool(attributes & {3: CONTROL, 4: USER_DEFINED}[kind])
