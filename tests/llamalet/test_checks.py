"""What Python callers may pass, and the one error for everything else."""

import copy
import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import SMALL_MODELS, toy_model, toy_tokenizer

from llamalet import Chat, Model, SamplingConfig, Tokenizer, model_file, shards
from llamalet.convert import formats
from llamalet.errors import FormatError, LlamaletError, UsageError
from llamalet.generate import generate_batch
from llamalet.tokenizer import StreamDecoder

CONFIG = SMALL_MODELS["gqa-tied"]
INTEGERS = [getattr(np, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
# No number, no text and no path.
JUNK = [
    None, b"x", [], {}, np.array([1, 2]), np.array(0.5), 3 + 4j, [[1], [2, 3]], np.ma.masked, Ellipsis, {1},
]  # fmt: skip
# No list of ids: nothing, a number, a text, what has no order, times, numbers with a gradient.
NO_IDS = [
    None, 5, np.int64(5), np.array(5), "1", b"1", bytearray(b"1"), {1}, frozenset({1}), {1: 2}, np.array([5], "m8[s]"),
    np.timedelta64(5, "s"), [np.timedelta64(5, "s")], torch.ones(2, requires_grad=True), torch.tensor(5), [None],
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return toy_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def model(path) -> Model:
    return Model.load(path, backend="numpy")


@pytest.mark.parametrize("number", INTEGERS)
def test_numpy_s_integers_are_integers(model, path, number):
    expected = "".join(model.generate("a", seed=5, max_new_tokens=4, top_k=3, keep=2))
    given = dict(seed=number(5), max_new_tokens=number(4), top_k=number(3), keep=number(2))
    assert "".join(model.generate("a", **given)) == expected
    assert list(model.generate_batch(["a"], batch_size=number(1), **given))
    same = model.logits([1, 5, 7])
    for ids in (np.array([1, 5, 7], number), [number(1), number(5), number(7)], [1, np.uint64(5), number(7)]):
        assert (model.logits(ids) == same).all()
        assert model.tokenizer.decode(ids) == model.tokenizer.decode([1, 5, 7])
    assert model.tokenizer.token_bytes(number(97)) == model.tokenizer.token_bytes(97)
    assert StreamDecoder(model.tokenizer).push(number(97)) == StreamDecoder(model.tokenizer).push(97)
    assert Model.load(path, backend="numpy", threads=number(1)).config == CONFIG
    assert type(SamplingConfig(seed=number(5)).seed) is int


def test_the_largest_seed_and_numpy_s_floats(model):
    assert SamplingConfig(seed=np.uint64(2**64 - 1)).seed == 2**64 - 1
    for number in (np.float16, np.float32, np.float64, np.int64, int):
        config = SamplingConfig(temperature=number(1), top_p=number(0), ignore_eos=np.True_)
        assert config == SamplingConfig(temperature=1.0, top_p=0.0, ignore_eos=True)
        assert type(config.temperature) is float and type(config.ignore_eos) is bool


def test_ids_may_come_one_by_one_or_from_torch(model):
    expected = model.logits([1, 2, 3])
    for ids in (iter([1, 2, 3]), (id for id in (1, 2, 3)), torch.tensor([1, 2, 3]), range(1, 4)):
        assert (model.logits(ids) == expected).all()
    config = [SamplingConfig(seed=1, max_new_tokens=3)]
    expected = list(generate_batch(model.transformer, [[1, 260]], config))
    assert list(generate_batch(model.transformer, [iter([1, 260])], config)) == expected


def test_a_prompt_of_ids_may_be_an_array(model):
    config = [SamplingConfig(seed=1, max_new_tokens=3)]
    expected = list(generate_batch(model.transformer, [[1, 260]], config))
    assert list(generate_batch(model.transformer, [np.array([1, 260], np.uint16)], config)) == expected
    for prompt in ([1, 2.5], [1, 300], [[1]], ["a"], np.array([1.0])):
        with pytest.raises(UsageError, match="token"):
            generate_batch(model.transformer, [prompt], config)


def calls(model: Model, path: Path, value: object):
    """Calls of every public function, with a value that none of them takes."""
    yield from (
        lambda field=field: SamplingConfig(**{field: value})
        for field in ("temperature", "top_p", "top_k", "min_p", "seed", "overflow", "keep", "ignore_eos")
    )
    yield lambda: model.generate(value)
    yield lambda: model.generate_batch([value])
    yield lambda: model.score(value)
    yield lambda: model.tokenizer.encode(value)
    yield lambda: model.tokenizer.encode(value, special=True)
    yield lambda: model.tokenizer.token_bytes(value)
    yield lambda: StreamDecoder(model.tokenizer).push(value)
    for load in (Model.load, Tokenizer.load, model_file.read, shards.Shards.open, formats.open_model, formats.kind_of):
        yield lambda load=load: load(value)
    yield lambda: formats.read(value, str(path))
    yield lambda: formats.read("bin", value)
    yield lambda: Model.load(path, backend=value)
    yield lambda: Chat(value)
    if value is not None:
        yield lambda: model.generate("a", value)
        yield lambda: SamplingConfig(max_new_tokens=value)
        yield lambda: model.generate_batch(["a"], batch_size=value)
        yield lambda: Chat(model, template=value)
        yield lambda: Chat(model, system=value)
        for option in ("tokenizer", "dtype", "threads", "kv", "verify"):
            yield lambda option=option: Model.load(path, backend="numpy", **{option: value})


@pytest.mark.parametrize("value", JUNK, ids=repr)
def test_any_other_value_ends_in_a_line(model, path, value):
    for number, call in enumerate(calls(model, path, value)):
        with pytest.raises(LlamaletError) as caught:
            call()
        assert "\n" not in str(caught.value), (number, caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, path: model.generate("a", temperature="a"),
        lambda model, path: model.generate("a", seed=True),
        lambda model, path: model.generate("a", seed=2.0),
        lambda model, path: model.generate("a", temperature=10**400),
        lambda model, path: model.generate("a", ignore_eos=1),
        lambda model, path: model.generate_batch("several"),
        lambda model, path: model.tokenizer.decode("1"),
        lambda model, path: model.tokenizer.decode(5),
        lambda model, path: model.tokenizer.decode([True]),
        lambda model, path: model.tokenizer.token_bytes(-1),
        lambda model, path: model.tokenizer.token_bytes(300),
        lambda model, path: model.logits(np.ones((1, 2), int)),
        *(lambda model, path, ids=ids: model.logits(ids) for ids in NO_IDS),
        *(lambda model, path, ids=ids: generate_batch(model.transformer, [ids], [SamplingConfig()]) for ids in NO_IDS),
        lambda model, path: model.logits([1] * 33),
        lambda model, path: Model.load(path, backend="numpy", threads=0),
        lambda model, path: Model.load(path, backend="numpy", threads="2"),
        lambda model, path: Model.load(path, backend="numba", threads=True),
        lambda model, path: Model.load(""),
        lambda model, path: Model.load(f"{path}\0"),
        lambda model, path: Model.load(str(path).encode()),
        lambda model, path: Model.load("x" * 5000),
        lambda model, path: Model.load("x\ud800"),
        lambda model, path: Model.load(path, backend="numpy", tokenizer=f"{path}\0"),
        lambda model, path: shards.find_newest(""),
    ],
)
def test_wrong_values_of_the_right_type_do_too(model, path, call):
    with pytest.raises(LlamaletError) as caught:
        call(model, path)
    assert "\n" not in str(caught.value) and "shape ()" not in str(caught.value)


def test_a_message_shows_a_long_value_shortened():
    with pytest.raises(LlamaletError) as caught:
        SamplingConfig(temperature="x" * 10_000)
    assert len(str(caught.value)) < 100 and "must be a number" in str(caught.value)


# --- copies, pickles, forks ---


def test_a_model_is_copied_and_pickled_by_its_path(model, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    relative = Model.load(path.name, backend="numpy")
    monkeypatch.chdir("/")
    expected = model.logits([1, 260])
    for made in (copy.copy(relative), copy.deepcopy(relative), pickle.loads(pickle.dumps(relative))):
        assert made is not relative and (made.logits([1, 260]) == expected).all()
    assert len(pickle.dumps(model)) < 1000  # the place, not the weights


def test_a_pickle_of_a_file_that_has_changed_is_refused(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    pickled = pickle.dumps(Model.load(path, backend="numpy"))
    toy_model(tmp_path, CONFIG, seed=1)
    with pytest.raises(FormatError, match="has changed"):
        pickle.loads(pickled)
    path.unlink()
    with pytest.raises(FormatError, match="no such model file"):
        pickle.loads(pickled)


def test_a_model_of_no_file_says_why_it_cannot_be_copied(model):
    made = Model(Path("memory"), model.transformer, toy_tokenizer())
    with pytest.raises(UsageError, match="Model.load"):
        copy.deepcopy(made)


def _compute(model: Model, expected: np.ndarray) -> None:
    same = all((model.logits([1, 260, 261]) == expected).all() for _ in range(3))
    os._exit(0 if same and next(TEXT) is not None else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_computes_whatever_another_thread_was_doing(path):
    model = Model.load(path, threads=2)
    expected, ended = model.logits([1, 260, 261]), threading.Event()
    global TEXT
    TEXT = model.generate("an", seed=1, ignore_eos=True)  # begun before the fork: it samples after it
    next(TEXT)

    def work() -> None:
        while not ended.is_set():
            model.logits([1, 260, 261])
            "".join(model.generate("an", seed=1, max_new_tokens=9))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(25):
            child = multiprocessing.get_context("fork").Process(target=_compute, args=(model, expected), daemon=True)
            child.start()
            child.join(timeout=20)
            stuck = child.is_alive()
            child.kill()
            assert not stuck and child.exitcode == 0
    finally:
        ended.set()
        thread.join()
    assert (model.logits([1, 260, 261]) == expected).all()
