import dataclasses
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from toy import SMALL_MODELS, in_memory, random_tensors

from llamalet import model_file, reference, tokenizer
from llamalet.config import ModelConfig
from llamalet.cores import physical_cores, thread_count
from llamalet.errors import ConfigError, UsageError
from llamalet.kernels import bfloat16, simd, threads
from llamalet.kernels import transformer as kernels_transformer
from llamalet.kernels.layers import stack_weights
from llamalet.kernels.transformer import POSITIONS_PER_PASS, Transformer
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import KINDS
from llamalet.model_file import quantize

DTYPES = ("f32", "bf16", "q8", "q4", "v2")

# Floats differ by the order of the sums alone. With integers the activations are rounded to 1/127 of a group's largest
# after every step, so that a last bit may become a whole step.
BOUND = {"f32": 1e-5, "bf16": 1e-5, "q8": 0.05, "q4": 0.05, "v2": 0.05}  # of the largest logit


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


# No width is a multiple of a vector's.
ODD_MODEL = ModelConfig.create(
    dim=36, n_layers=2, n_heads=6, n_kv_heads=1, hidden_dim=50, vocab_size=301, max_seq_len=40
)


@pytest.fixture(params=[*SMALL_MODELS, "odd"])
def file(dtype, request):
    """Each small model in each kind of weights; v2 where its widths allow."""
    small_config = SMALL_MODELS.get(request.param, ODD_MODEL)
    if dtype == "v2" and small_config.dim % 16 + small_config.hidden_dim % 16:
        pytest.skip("v2 needs groups of 16 at least")
    return in_memory(small_config, dtype)


def write(path: Path, version: int, config: ModelConfig, **changes: np.ndarray) -> model_file.ModelFile:
    model_file.write(path, version, config, random_tensors(config) | changes, tokenizer_sha256=None)
    return model_file.read(path)


def some_tokens(config: ModelConfig, n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, n)


def test_equals_the_reference(file, dtype):
    tokens = some_tokens(file.config, file.config.max_seq_len)
    expected = reference.forward(file.tensors, file.config, tokens[None])[0]
    bound = BOUND[dtype] * np.abs(expected).max()
    model = Transformer(file, kv="f32")
    np.testing.assert_allclose(model.logits(tokens), expected, rtol=0, atol=bound)
    cache = model.new_cache()
    decoded = [model.decode(cache, token) for token in tokens]
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=bound)


def test_a_prompt_in_pieces_equals_the_whole(file):
    """Bit for bit, also where a piece is a single token."""
    tokens = some_tokens(file.config, file.config.max_seq_len)
    model, whole = Transformer(file, kv="f32"), KVCache(file.config, len(tokens))
    expected = model.prefill(whole, tokens)
    for cut in [*range(2, len(tokens) - 2, 3), len(tokens) - 1]:
        pieces = model.new_cache()
        model.prefill(pieces, tokens[:cut])
        np.testing.assert_array_equal(model.prefill(pieces, tokens[cut:]), expected)
        for layer in range(file.config.n_layers):
            for found, kept in zip(*(cache.read(layer, 0, len(tokens)) for cache in (pieces, whole)), strict=True):
                np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_has_the_same_logits_however_it_is_read(dtype, kind):
    """Bit for bit: decoded, in a prompt cut anywhere, in a batch, by one thread and by three, past several pieces."""
    config = ModelConfig.create(
        dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=100, max_seq_len=600
    )
    file, tokens, rng = in_memory(config, dtype), some_tokens(config, 560), np.random.default_rng(0)
    models = [Transformer(file, threads=n) for n in (1, 3)]

    def cache_of(n: int) -> KVCache:
        cache = KVCache(config, kind=kind)
        if n:
            models[0].prefill(cache, tokens[:n])
        return cache

    decoded, cache = [], cache_of(0)
    for token in tokens:
        decoded.append(models[1].decode(cache, token))
    for model in models:
        for _ in range(4):
            cache = cache_of(0)
            for piece in np.split(tokens, np.sort(rng.integers(1, len(tokens), 5))):
                if len(piece):
                    found = model._append(cache, piece, all_logits=True)
                    np.testing.assert_array_equal(found, decoded[cache.length - len(piece) : cache.length])
        for size in (2, 20):
            ends = rng.integers(1, len(tokens), size)
            batch = model.decode_batch([cache_of(end) for end in ends], tokens[ends])
            np.testing.assert_array_equal(batch, [decoded[end] for end in ends])
        for size in (1, 3, 20):
            firsts = rng.integers(0, len(tokens) - 6, size)
            lasts = firsts + rng.integers(1, 5, size)
            lasts[0] = min(firsts[0] + 40, len(tokens) - 1)
            caches, pieces = [cache_of(n) for n in firsts], [tokens[a:b] for a, b in zip(firsts, lasts, strict=True)]
            order = rng.permutation(size)
            found = model.extend_batch([caches[n] for n in order], [pieces[n] for n in order])
            np.testing.assert_array_equal(found, [decoded[lasts[n] - 1] for n in order])
            if size == 1:
                rest = min(POSITIONS_PER_PASS - 1, len(tokens) - 1)
                found = model.extend_batch([cache_of(0), cache_of(rest)], [tokens[:rest], tokens[rest : rest + 1]])
                np.testing.assert_array_equal(found, [decoded[rest - 1], decoded[rest]])
            for cache, last in zip(caches, lasts, strict=True):  # what was kept is right, too
                np.testing.assert_array_equal(model.decode(cache, tokens[last]), decoded[last])


def test_caches_are_of_the_kind_that_suits_the_weights_or_the_one_that_is_chosen(dtype):
    file = in_memory(SMALL_MODELS["gqa-untied"], dtype)
    for backend in (Transformer, reference.NumpyTransformer):
        assert backend(file).new_cache().kind == ("f32" if dtype == "f32" else "bf16")
        assert backend(file, kv="q8").new_cache(3).kind == "q8"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_cache_equals_the_reference(kind):
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], max_seq_len=600)
    file, tokens = in_memory(config, "f32"), some_tokens(config, 600)
    model, numpy_model = Transformer(file), reference.NumpyTransformer(file)
    caches = [KVCache(config, kind=kind) for _ in range(2)]
    found, expected = model.prefill(caches[0], tokens), numpy_model.prefill(caches[1], tokens)
    # A key's last bit may be rounded the other way, which is a whole step of the kind.
    bound = {"f32": BOUND["f32"], "bf16": 0.01, "q8": 0.01}[kind]
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


def test_a_sequence_gets_the_same_logits_in_a_batch_as_alone(file):
    """Bit for bit: a row's products are summed in one order, whatever else is computed."""
    model, rng = Transformer(file), np.random.default_rng(0)
    tokens = some_tokens(file.config, file.config.max_seq_len)
    for size in (1, 2, 3, 7, POSITIONS_PER_PASS + 2):
        lengths = rng.integers(0, file.config.max_seq_len - 3, size)
        batch, alone = [[model.new_cache() for _ in range(size)] for _ in range(2)]
        for caches in (batch, alone):
            for cache, length in zip(caches, lengths, strict=True):
                if length:
                    model.prefill(cache, tokens[:length])
        n_steps = 3
        for _ in range(n_steps):
            ids = rng.integers(0, file.config.vocab_size, size)
            found = model.decode_batch(batch, ids)
            assert found.shape == (size, file.config.vocab_size)
            np.testing.assert_array_equal(found, [model.decode(c, i) for c, i in zip(alone, ids, strict=True)])
        assert [cache.length for cache in batch] == [length + n_steps for length in lengths]


def test_bfloat16_without_tile_registers(monkeypatch):
    monkeypatch.setattr(bfloat16, "instructions", lambda: None)
    file = in_memory(ODD_MODEL, "bf16")
    test_equals_the_reference(file, "bf16")
    test_a_sequence_gets_the_same_logits_in_a_batch_as_alone(file)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads, dtype):
    file = in_memory(SMALL_MODELS["gqa-tied"], dtype)
    tokens = some_tokens(file.config, 20)
    models = [Transformer(file, threads=n) for n in (3, threads)]
    np.testing.assert_array_equal(models[0].logits(tokens), models[1].logits(tokens))
    caches = [model.new_cache() for model in models]
    for token in tokens:
        expected, found = (model.decode(cache, token) for model, cache in zip(models, caches, strict=True))
        np.testing.assert_array_equal(found, expected)


def test_caches_take_turns_grow_and_forget(file):
    model, tokens = Transformer(file), some_tokens(file.config, file.config.max_seq_len)
    expected = [model.decode(cache, token) for cache in [model.new_cache()] for token in tokens]
    first, second = model.new_cache(), model.new_cache(file.config.max_seq_len)
    for position, token in enumerate(tokens):
        np.testing.assert_array_equal(model.decode(first, token), expected[position])
        np.testing.assert_array_equal(model.decode(second, token), expected[position])
    first.truncate(3)
    np.testing.assert_array_equal(model.decode(first, tokens[3]), expected[3])


def test_a_prompt_of_several_passes():
    config = ModelConfig.create(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=400)
    model, tokens = Transformer(in_memory(config, "q8")), some_tokens(config, 2 * POSITIONS_PER_PASS + 7)
    logits, cache = model.logits(tokens), model.new_cache()
    np.testing.assert_array_equal(model.prefill(cache, tokens[:5]), logits[4])
    np.testing.assert_array_equal(model.prefill(cache, tokens[5:]), logits[-1])
    assert cache.length == len(tokens)


@pytest.mark.parametrize(("version", "dtype"), [(0, None), (1, None), (3, "f32"), (3, "bf16"), (3, "q8"), (3, "q4")])
def test_weights_stay_where_the_file_is_mapped(tmp_path, version, dtype):
    config = SMALL_MODELS["gqa-untied"]
    file = model_file.write(tmp_path / "model.bin", version, config, random_tensors(config), dtype=dtype)
    matrices, seen = stack_weights(file)._asdict(), set()
    for name, tensor in file.tensors.items():
        *layer, matrix = name.replace("layers.", "").split(".")
        if not matrix.endswith("norm"):
            seen.add(matrix)
            packed = isinstance(tensor, quantize.Packed)
            stacks = matrices[matrix] if packed else [matrices[matrix]]
            for stack, part in zip(stacks, tensor[:2] if packed else [tensor], strict=True):
                address = stack.first.__array_interface__["data"][0] + stack.distance * int(layer[0] if layer else 0)
                assert address == part.__array_interface__["data"][0] and stack.first.nbytes == part.nbytes
    assert seen == {"wq", "wk", "wv", "wo", "w1", "w2", "w3", "output", "tok_embeddings"}


def test_weights_that_are_not_of_a_file_may_lie_anywhere():
    config = ModelConfig.create(dim=32, n_layers=3, n_heads=2, vocab_size=50, max_seq_len=8)
    tensors = {name: np.asfortranarray(tensor) for name, tensor in random_tensors(config).items()}
    model = Transformer(model_file.ModelFile(Path("memory"), model_file.Header(1, config), tensors))
    expected = reference.forward(tensors, config, np.arange(8)[None])[0]
    found = [model.decode(cache, token) for cache in [model.new_cache()] for token in range(8)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND["f32"] * np.abs(expected).max())


@pytest.mark.parametrize("name", ["tok_embeddings", "layers.1.feed_forward.w2", "layers.0.attention_norm", "norm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_weights_reach_the_logits(name, bad, tmp_path):
    config = SMALL_MODELS["gqa-untied"]
    file = write(tmp_path / "model.bin", 1, config)
    tensors = {key: tensor.copy() for key, tensor in file.tensors.items()}
    tensors[name][5 % len(tensors[name])] = bad
    model = Transformer(model_file.ModelFile(file.path, file.header, tensors))
    with np.errstate(all="ignore"):
        assert not np.isfinite(model.decode(model.new_cache(), 5)).all()
        assert not np.isfinite(model.prefill(model.new_cache(), [5] * 9)).all()


@pytest.mark.parametrize("dtype", ["q8", "q4", "v2"])
def test_a_bad_scale_reaches_the_logits(dtype):
    file = in_memory(SMALL_MODELS["gqa-tied"], dtype)
    for name in ("tok_embeddings", "layers.1.attention.wv"):
        weight = file.tensors[name]
        scales = weight.scales.copy()
        scales.reshape(-1)[5] = np.nan if dtype == "v2" else 0x7FC0
        model = Transformer(
            model_file.ModelFile(file.path, file.header, file.tensors | {name: weight._replace(scales=scales)})
        )
        assert np.isnan(model.logits(np.arange(20))).any()


def test_what_a_caller_can_get_wrong_is_named(file):
    model, context = Transformer(file), file.config.max_seq_len
    for wrong in (-1, file.config.vocab_size):
        with pytest.raises(UsageError, match=f"token {wrong}"):
            model.decode(model.new_cache(), wrong)
        with pytest.raises(UsageError, match=f"token {wrong}"):
            model.prefill(model.new_cache(), [1, wrong])
    cache = model.new_cache()
    model.prefill(cache, [1] * context)
    with pytest.raises(UsageError, match=f"context is {context}"):
        model.decode(cache, 1)
    with pytest.raises(UsageError, match=f"context is {context}"):
        model.logits([1] * (context + 1))
    with pytest.raises(UsageError, match=f"context is {context}"):
        model.decode_batch([other := model.new_cache(), cache], [1, 1])
    assert other.length == 0
    for caches in ([other], [other, other]):
        with pytest.raises(UsageError, match="2 tokens for"):
            model.decode_batch(caches, [1, 1])
        with pytest.raises(UsageError, match="2 pieces for"):
            model.extend_batch(caches, [[1], [1, 2]])
    for piece, message in [
        ([], "at least one"),
        ([1] * (context + 1), f"context is {context}"),
        ([1] * POSITIONS_PER_PASS, f"{POSITIONS_PER_PASS + 1} tokens for a pass"),
    ]:
        with pytest.raises(UsageError, match=message):
            model.extend_batch([other, model.new_cache()], [[1], piece])
        assert other.length == 0
    with pytest.raises(ConfigError, match="threads=0"):
        Transformer(file, threads=0)


def test_callers_on_several_threads_do_not_disturb_each_other(tmp_path):
    config = SMALL_MODELS["gqa-tied"]
    model, tokens = Transformer(write(tmp_path / "model.bin", 1, config), threads=3), some_tokens(config, 30)
    expected = [model.decode(cache, token) for cache in [model.new_cache()] for token in tokens]
    found: list[list[np.ndarray]] = [[] for _ in range(4)]

    def decode(logits: list[np.ndarray]) -> None:
        cache = model.new_cache()
        logits.extend(model.decode(cache, token) for token in tokens)

    threads = [threading.Thread(target=decode, args=(logits,)) for logits in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for logits in found:
        np.testing.assert_array_equal(logits, expected)


def test_the_cache_of_another_model_is_refused():
    model = Transformer(in_memory(ODD_MODEL, "f32"))
    cache = KVCache(SMALL_MODELS["gqa-tied"])
    with pytest.raises(UsageError, match="another model's"):
        model.decode(cache, 1)
    with pytest.raises(UsageError, match="another model's"):
        model.decode_batch([model.new_cache(), cache], [1, 1])


def test_helpers_end_with_the_model(tmp_path):
    config = SMALL_MODELS["gqa-tied"]
    model = Transformer(write(tmp_path / "model.bin", 1, config), threads=3)
    model.decode(model.new_cache(), 1)
    helpers = list(model._team._threads)
    assert len(helpers) == 2 and all(helper.is_alive() for helper in helpers)
    del model
    for helper in helpers:
        helper.join(timeout=30)
        assert not helper.is_alive()


def test_a_helper_that_fails_does_not_hang_the_caller():
    class PlantedError(Exception):
        pass

    first_job_done, waiting = threading.Event(), threading.Event()

    def work(shared: np.ndarray, generation: int, thread: int) -> None:
        if thread:
            waiting.wait()
            raise PlantedError
        if first_job_done.is_set():
            waiting.set()
            while shared[threads.GENERATION] == generation:
                pass

    team = threads.ThreadTeam(work, 2)
    team.run(())  # the helpers start after it
    first_job_done.set()
    with pytest.raises(PlantedError):
        team.run(())


def test_a_job_that_comes_while_a_helper_turns_away_wakes_it():
    second_job, came_back = threading.Event(), threading.Event()
    polls = []

    def work(shared: np.ndarray, generation: int, thread: int) -> None:
        if thread:
            polls.append(thread)
            (came_back.set if len(polls) > 1 else second_job.wait)()
        elif team._threads:  # the helpers start after the first job
            second_job.set()
            came_back.wait(timeout=30)

    team = threads.ThreadTeam(work, 2)
    team.run(())
    team.run(())
    assert came_back.is_set()
    helpers = list(team._threads)
    team.stop()
    assert len(helpers) == 1 and not any(helper.is_alive() for helper in helpers)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"NUMBA_NUM_THREADS": "3", "OMP_NUM_THREADS": "4"}, 3), ({"OMP_NUM_THREADS": "4,2"}, 4), ({}, None)],
)
def test_thread_count(environment, expected, monkeypatch):
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert thread_count() == (expected or physical_cores())
    assert thread_count(7) == 7
    assert 1 <= physical_cores() <= os.cpu_count()


def test_a_bad_thread_count_is_refused(monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "many")
    with pytest.raises(ConfigError, match="NUMBA_NUM_THREADS=many"):
        thread_count()
    with pytest.raises(ConfigError, match="threads=40000"):
        thread_count(40_000)


def test_tells_llama2_c_story(shared_data):
    """Greedy, 200 steps: the text that llama2.c's run prints for its own model."""
    file = model_file.read(shared_data / "stories260K.bin")
    vocabulary = tokenizer.load(shared_data / "tok512.bin", file.config.vocab_size)
    model = Transformer(file)
    cache, ids = model.new_cache(), [vocabulary.bos_id]
    while len(ids) < 200:
        ids.append(int(model.decode(cache, ids[-1]).argmax()))
    beginning = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
    assert vocabulary.decode(ids).strip().startswith(beginning)


SCRIPT = """
import sys, numpy
sys.path.insert(0, "tests")
from toy import SMALL_MODELS
from llamalet.kernels.transformer import Transformer
from toy import in_memory
model = Transformer(in_memory(SMALL_MODELS["gqa-tied"], sys.argv[1]))
numpy.save(sys.argv[2], numpy.stack([model.logits(numpy.arange(20))[-1], model.decode(model.new_cache(), 3)]))
"""


@pytest.mark.compiles
@pytest.mark.parametrize("path", simd.available_paths()[1:])
@pytest.mark.parametrize("dtype", ["q8", "q4"])
def test_another_instruction_path_gives_the_same_logits(dtype, path, tmp_path):
    """Bit for bit: each sums the products of a group exactly, and the groups in one order."""
    environment = os.environ | {"LLAMALET_SIMD": path, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, dtype, str(tmp_path / "logits.npy")]
    root = Path(__file__).parents[3]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert result.stderr.count("\n") == 1 and "compiling the kernels" in result.stderr
    model = Transformer(in_memory(SMALL_MODELS["gqa-tied"], dtype))
    expected = np.stack([model.logits(np.arange(20))[-1], model.decode(model.new_cache(), 3)])
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


def test_a_transformer_that_has_gone_leaves_nothing_for_a_forked_process(monkeypatch):
    hooks = []
    monkeypatch.setattr(os, "register_at_fork", lambda **hook: hooks.append(hook), raising=False)
    transformer = Transformer(in_memory(SMALL_MODELS["gqa-tied"], "f32"), threads=1)
    assert transformer in kernels_transformer._alive
    del transformer
    gc.collect()
    assert not hooks and not [one for one in kernels_transformer._alive if one.config == SMALL_MODELS["gqa-tied"]]
