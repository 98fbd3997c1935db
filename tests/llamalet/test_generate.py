import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import SMALL_MODELS, Counting, ListCache, random_tensors, toy_model, toy_tokenizer

from llamalet import Chat, Model, model_file, reference
from llamalet.config import ModelConfig
from llamalet.engine import MAX_BATCH
from llamalet.errors import CheckpointError, ConfigError, FormatError, NonFiniteError, TokenizerError, UsageError
from llamalet.generate import generate_batch, stream
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import cache_bytes
from llamalet.sampler import MASK, Sampler, SamplingConfig
from llamalet.tokenizer import StreamDecoder, pack

CONFIG = SMALL_MODELS["gqa-tied"]  # vocabulary 300, context 32
GREEDY = {"temperature": 0.0}


def tokens_of(transformer, prompt: list[int], stop_tokens=(), **options) -> Iterator[int]:
    """The tokens that continue one prompt."""
    events = generate_batch(transformer, [prompt], [SamplingConfig(**options)], stop_tokens=stop_tokens)
    return (token for _, token in events if token is not None)


def count_from(start: int, prompt_length: int = 1, **options) -> list[int]:
    return list(tokens_of(Counting(CONFIG), list(range(start, start + prompt_length)), **GREEDY, **options))


# --- tokens ---


def test_tokens_follow_until_a_stop_token():
    assert count_from(100, 3, stop_tokens=(7, 110)) == list(range(103, 110))
    assert count_from(100, 3, stop_tokens=(103,)) == []


def test_without_a_stop_token_the_context_is_filled_and_no_more():
    for prompt_length in (1, 2, 31, 32):
        assert count_from(100, prompt_length) == list(range(100 + prompt_length, 100 + 33))


def test_a_number_of_new_tokens():
    assert count_from(100, 5, max_new_tokens=4) == [105, 106, 107, 108]
    assert count_from(100, 5, max_new_tokens=0) == []
    assert count_from(100, 30, max_new_tokens=99) == [130, 131, 132]


@pytest.mark.parametrize("prompt_length", [33, 1000])
def test_a_prompt_that_does_not_fit_is_refused_at_once(prompt_length):
    with pytest.raises(UsageError, match=f"the prompt has {prompt_length} tokens; the model takes 1 to 32"):
        tokens_of(Counting(CONFIG), list(range(prompt_length)))


def test_no_work_is_done_before_or_after_it_is_needed():
    transformer = Counting(CONFIG)
    tokens = tokens_of(transformer, [100, 101], max_new_tokens=3, **GREEDY)
    assert transformer.passes == 0
    assert next(tokens) == 102 and transformer.passes == 1
    assert list(tokens) == [103, 104] and transformer.passes == 3


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 299), max_size=30), min_size=1, max_size=3), st.randoms())
def test_streamed_pieces_are_the_texts_and_never_empty(texts, random):
    vocabulary = toy_tokenizer()
    turns = [number for number, tokens in enumerate(texts) for _ in range(len(tokens) + 1)]
    random.shuffle(turns)
    rest = [iter([*tokens, None]) for tokens in texts]
    pieces = list(
        stream(((number, next(rest[number])) for number in turns), [StreamDecoder(vocabulary) for _ in texts])
    )
    assert "" not in [piece for _, piece in pieces]
    for number, tokens in enumerate(texts):
        assert "".join(piece for n, piece in pieces if n == number) == vocabulary.decode(tokens)


# --- batches ---


def random_model(config: ModelConfig = CONFIG, scale: float = 0.1) -> reference.NumpyTransformer:
    """A model in memory; with a larger scale it has clear preferences."""
    header = model_file.Header(1, config)
    file = model_file.ModelFile(Path("memory"), header, random_tensors(config, scale=scale))
    return reference.NumpyTransformer(file)


def collect(events) -> list[list[int]]:
    """The texts of a batch, each closed exactly once and by its last event."""
    texts: dict[int, list[int]] = {}
    closed = set()
    for number, token in events:
        assert number not in closed
        if token is None:
            closed.add(number)
            texts.setdefault(number, [])
        else:
            texts.setdefault(number, []).append(token)
    assert closed == set(range(len(texts)))
    return [texts[number] for number in range(len(texts))]


@st.composite
def requests(draw) -> list[tuple[list[int], dict]]:
    """Prompts and the settings of their texts, some of which roll; some prompts are alike."""
    prompts = draw(st.lists(st.lists(st.integers(3, 299), min_size=1, max_size=70), min_size=1, max_size=4))
    asked = []
    for _ in range(draw(st.integers(1, 8))):
        prompt = draw(st.sampled_from(prompts))
        roll = len(prompt) > CONFIG.max_seq_len or draw(st.booleans())
        options = {
            "temperature": draw(st.sampled_from([0.0, 0.7, 1.0])),
            "top_p": draw(st.sampled_from([0.9, 1.0])),
            "seed": draw(st.integers(0, MASK)),
            "max_new_tokens": draw(st.integers(0, 60) if roll else st.none() | st.integers(0, 40)),
            "ignore_eos": draw(st.booleans()),
            "overflow": "roll" if roll else "stop",
            "keep": draw(st.sampled_from([0, 4, 31])),
        }
        asked.append((prompt, options))
    return asked


@pytest.fixture(scope="module", params=["numpy", (1, None), (2, None), (3, "bf16"), (3, "q8"), (3, "q4")], ids=str)
def any_model(request, tmp_path_factory):
    """A forward pass of each kind."""
    if request.param == "numpy":
        return random_model(scale=0.3)
    from llamalet.kernels.transformer import Transformer

    version, dtype = request.param
    folder = tmp_path_factory.mktemp("model")
    return Transformer(model_file.read(toy_model(folder, CONFIG, version=version, dtype=dtype, scale=0.3)))


def test_each_of_many_texts_is_the_one_it_is_alone(any_model):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, 1 + n % 23).tolist() for n in range(70)]
    configs = [SamplingConfig(seed=n, top_p=1.0, max_new_tokens=9) for n in range(70)]
    texts = collect(generate_batch(any_model, prompts, configs, stop_tokens=range(20)))
    assert len({len(text) for text in texts}) > 3
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        alone = tokens_of(any_model, prompt, range(20), seed=number, top_p=1.0, max_new_tokens=9)
        assert text == list(alone)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_each_text_of_a_batch_is_the_one_it_is_alone(any_model, data):
    asked = data.draw(requests())
    stop_tokens = data.draw(st.sets(st.integers(3, 299), max_size=20))
    alone = [list(tokens_of(any_model, prompt, stop_tokens, **options)) for prompt, options in asked]
    order = data.draw(st.permutations(range(len(asked))))
    prompts, configs = [asked[i][0] for i in order], [SamplingConfig(**asked[i][1]) for i in order]
    batch_size = data.draw(st.integers(1, 9))
    events = generate_batch(any_model, prompts, configs, stop_tokens=stop_tokens, batch_size=batch_size)
    assert collect(events) == [alone[i] for i in order]


def greedy(n: int, **options) -> list[SamplingConfig]:
    return [SamplingConfig(**GREEDY, **options)] * n


def test_texts_that_end_leave_and_waiting_ones_take_their_places():
    model = Counting(CONFIG)
    prompts = [[100], [108], [103], [105], [109]]  # all end before 110
    texts = collect(generate_batch(model, prompts, greedy(5), stop_tokens=[110], batch_size=2))
    assert texts == [list(range(prompt[0] + 1, 110)) for prompt in prompts]
    # 108 makes 109 and its place goes to 103, which goes on beside 100; the last goes on by itself.
    assert model.steps[:2] == [[101, 109], [102, 104]]
    assert all(len(step) == 2 for step in model.steps)
    assert model.steps[-1] == [109, 107]


def test_more_texts_than_a_batch_holds_wait():
    model = Counting(CONFIG)
    prompts = [[100 + n % 7] * (1 + n % 20) for n in range(150)]
    texts = collect(generate_batch(model, prompts, greedy(150, max_new_tokens=5)))
    assert texts == [[prompt[-1] + made for made in range(1, 6)] for prompt in prompts]
    assert max(map(len, model.steps)) == MAX_BATCH == 64


def test_a_batch_is_no_larger_than_memory_has_room_for(monkeypatch):
    # Two more caches than there are texts: one that grows beside its old memory, one with the prompt that they share.
    config = dataclasses.replace(CONFIG, max_seq_len=512)
    for n_fit, n_new, largest in ((5.5, None, 3), (0.5, None, 1), (1.2, 7, 7), (1e6, None, 9)):
        monkeypatch.setattr("llamalet.generate.free_memory", lambda n_fit=n_fit: int(n_fit * cache_bytes(config, 512)))
        model = Counting(config)
        collect(generate_batch(model, [[100 + n] for n in range(9)], greedy(9, max_new_tokens=n_new)))
        assert max(map(len, model.steps), default=1) == largest


def test_texts_with_one_prompt_read_it_once():
    model = Counting(CONFIG)
    prompts = [[100, 101]] * 5 + [[7]] + [[100, 101]] * 2
    assert collect(generate_batch(model, prompts, greedy(8, max_new_tokens=1))) == [[102]] * 5 + [[8]] + [[102]] * 2
    assert model.passes == 2


def test_a_batch_does_no_work_before_it_is_needed():
    model = Counting(CONFIG)
    events = generate_batch(model, [[100], [200]], greedy(2, max_new_tokens=2))
    assert model.passes == 0
    assert [next(events), model.passes, next(events), model.passes] == [(0, 101), 1, (1, 201), 2]
    assert list(events) == [(0, 102), (0, None), (1, 202), (1, None)]
    assert model.passes == 4
    assert list(generate_batch(model, [], [])) == []
    assert list(generate_batch(model, [[1], [2]], greedy(2, max_new_tokens=0))) == [(0, None), (1, None)]
    assert model.passes == 4


def test_a_batch_that_cannot_be_made_is_refused_at_once():
    model = Counting(CONFIG)
    for prompts, options, batch_size, message in (
        ([[1], []], {}, None, "the prompt is empty"),
        ([[1], [1] * 33], {}, None, "the prompt has 33 tokens; the model takes 1 to 32"),
        ([[1]], {}, 0, "batch_size=0: must be between 1 and 64"),
        ([[1]], {}, 65, "batch_size=65"),
        ([[1]], {"overflow": "roll", "keep": 32}, None, "keep=32: a context of 32 positions can keep 0 to 31"),
    ):
        with pytest.raises(UsageError, match=message):
            generate_batch(model, prompts, greedy(len(prompts), **options), batch_size=batch_size)
    with pytest.raises(ValueError, match="shorter"):
        generate_batch(model, [[1], [2]], greedy(1))
    assert model.passes == 0


def test_ctrl_c_between_two_tokens_leaves_the_model_usable(any_model, monkeypatch):
    expected = collect(generate_batch(any_model, [[5], [6, 7]], greedy(2)))
    draws, sample = iter(range(99)), Sampler.sample

    def interrupted(self, logits):
        if next(draws) == 11:
            raise KeyboardInterrupt
        return sample(self, logits)

    with monkeypatch.context() as now:
        now.setattr(Sampler, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(generate_batch(any_model, [[5], [6, 7]], greedy(2)))
    assert collect(generate_batch(any_model, [[5], [6, 7]], greedy(2))) == expected


# --- past the context ---


@pytest.mark.parametrize("keep", [0, 1, 4, 16, 31])
@pytest.mark.parametrize("prompt_length", [1, 3, 31, 32, 33, 34, 50, 100])
def test_a_rolling_cache_holds_the_first_tokens_and_the_newest(monkeypatch, keep, prompt_length):
    seen = []
    model = Counting(CONFIG)
    monkeypatch.setattr(model, "new_cache", lambda: seen.append(ListCache(32)) or seen[-1])
    prompt = list(range(100, 100 + prompt_length))
    tokens = tokens_of(model, prompt, overflow="roll", keep=keep, **GREEDY)
    text = list(prompt)
    for token, _ in zip(tokens, range(200), strict=False):
        (cache,) = seen
        assert len(cache) <= 32
        if len(text) <= 32:
            assert cache == text
        else:
            newest = len(cache) - keep
            assert newest > (32 - keep) // 2
            assert cache == text[:keep] + text[len(text) - newest :]
        text.append(token)
    assert text == [100 + n if 100 + n < 300 else 100 + n - 300 for n in range(len(text))]
    assert len(text) == prompt_length + 200


def test_a_rolled_cache_gives_the_logits_of_the_tokens_that_are_left(monkeypatch):
    """In a model of one layer, keys and values depend on nothing but their token and its place."""
    config = ModelConfig.create(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=300, max_seq_len=32
    )
    model = random_model(config, scale=0.3)
    seen, sample = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, logits: seen.append(logits) or sample(self, logits))
    prompt = np.random.default_rng(2).integers(3, 300, 45).tolist()
    made = list(tokens_of(model, prompt, seed=3, overflow="roll", max_new_tokens=120))
    assert len(made) == 120
    left = [*prompt[:4], *prompt[18:45]]  # 14 were dropped when the 33rd came: 18 and 13 more
    for logits, token in zip(seen, made, strict=True):
        np.testing.assert_allclose(logits, model.logits(left)[-1], atol=2e-4, rtol=1e-4)
        if len(left) == 32:
            del left[4:18]
        left.append(token)


def test_a_text_that_rolls_needs_no_more_memory(monkeypatch):
    model = random_model()
    caches = []
    monkeypatch.setattr(model, "new_cache", lambda: caches.append(KVCache(CONFIG)) or caches[-1])
    tokens = tokens_of(model, [1], seed=1, overflow="roll")
    for _ in range(40):
        next(tokens)
    (cache,) = caches
    keys, values = cache.keys, cache.values
    for _ in range(1000):
        next(tokens)
    assert cache.keys is keys and cache.values is values and cache.length <= 32 and len(caches) == 1


def test_stop_tokens_and_a_number_of_tokens_end_a_text_that_rolls():
    assert count_from(100, overflow="roll", max_new_tokens=99) == list(range(101, 200))
    assert count_from(100, overflow="roll", stop_tokens=[250]) == list(range(101, 250))
    assert count_from(100, overflow="roll", max_new_tokens=0) == []


# --- a model from its file ---


@pytest.fixture
def model(tmp_path) -> Model:
    return Model.load(toy_model(tmp_path, CONFIG), backend="numpy")


def test_logits_are_the_reference_forward_pass(model):
    tokens = [1, 260, 5, 299]
    expected = reference.forward(random_tensors(CONFIG), CONFIG, np.array([tokens]))[0]
    assert model.logits(tokens).shape == (4, 300)
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-4)


def test_a_seed_makes_one_text(model):
    text = "".join(model.generate("a band", seed=5))
    assert text == "".join(model.generate("a band", seed=5))
    assert text != "".join(model.generate("a band", seed=6))
    assert len({"".join(model.generate(seed=-1)) for _ in range(3)}) == 3


@pytest.mark.parametrize(
    "filters", [{"temperature": 0.5}, {"top_p": 0.3}, {"top_p": 1.0, "top_k": 3}, {"top_p": 1.0, "min_p": 0.7}]
)
def test_text_continues_the_prompt(model, filters):
    ids = model.tokenizer.encode("a ban", bos=True)
    tokens = list(tokens_of(model.transformer, ids, seed=3, max_new_tokens=9, **filters))
    text = model.generate("a ban", max_new_tokens=9, seed=3, ignore_eos=True, **filters)
    assert "a ban" + "".join(text) == model.tokenizer.decode(ids + tokens)


def test_only_a_text_without_a_prompt_loses_its_first_space(model, monkeypatch):
    (token,) = model.tokenizer.encode("ban")
    assert model.tokenizer.token_bytes(token) == b" ban"
    one_word = np.eye(300, dtype=np.float32)[[token]]
    model.transformer = Counting(CONFIG)
    monkeypatch.setattr(model.transformer, "logits", lambda tokens: one_word)
    assert "".join(model.generate("", max_new_tokens=2, **GREEDY)) == "ban ban"
    assert "".join(model.generate("a", max_new_tokens=2, **GREEDY)) == " ban ban"


def test_texts_made_together_are_those_made_alone(model):
    prompts = ["a band", "", "a band", "dent", "and a ban. "]
    texts = [""] * 5
    for number, piece in model.generate_batch(prompts, seed=5, batch_size=2):
        assert piece
        texts[number] += piece
    assert texts == ["".join(model.generate(prompt, seed=5 + n)) for n, prompt in enumerate(prompts)]
    assert len(set(texts)) == 5
    assert list(model.generate_batch([])) == []


def test_text_goes_on_past_the_context(model):
    rolled = model.generate("a ban", max_new_tokens=100, seed=3, ignore_eos=True, overflow="roll", keep=2)
    ids = model.tokenizer.encode("a ban", bos=True)
    tokens = tokens_of(model.transformer, ids, seed=3, max_new_tokens=100, overflow="roll", keep=2)
    assert "a ban" + "".join(rolled) == model.tokenizer.decode([*ids, *tokens])
    assert "".join(model.generate("a band " * 30, overflow="roll", max_new_tokens=5, seed=1))


def test_the_last_seed_is_followed_by_the_first(model):
    texts = ["", ""]
    for number, piece in model.generate_batch(["a", "a"], seed=MASK):
        texts[number] += piece
    assert texts == ["".join(model.generate("a", seed=seed)) for seed in (MASK, 0)]


@pytest.mark.parametrize("stop", [1, 2])
def test_a_story_ends_at_bos_and_at_eos_unless_told_otherwise(model, stop):
    model.transformer = Counting(CONFIG)
    model.tokenizer.encode = lambda text, bos: [stop - 1]
    assert "".join(model.generate("", **GREEDY)) == ""
    assert model.transformer.passes == 1
    assert len("".join(model.generate("", ignore_eos=True, **GREEDY))) > 5


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    model = Model.load(path, backend="numpy")
    broken = dict(random_tensors(CONFIG), norm=np.full(CONFIG.dim, np.nan, np.float32))
    model.transformer = reference.NumpyTransformer(model_file.ModelFile(path, model_file.read(path).header, broken))
    with pytest.raises(NonFiniteError, match="300 of 300 logits"):
        list(model.generate("a"))


def test_settings_come_as_one_object_or_as_options(model):
    config = SamplingConfig(temperature=0.7, seed=5, max_new_tokens=9)
    text = "".join(model.generate("a", config))
    assert text == "".join(model.generate("a", temperature=0.7, seed=5, max_new_tokens=9))
    assert text == "".join(model.generate("a", dataclasses.replace(config, seed=6), seed=5))
    assert text == "".join(piece for _, piece in model.generate_batch(["a"], config, batch_size=1))


def test_wrong_settings_are_refused_at_once(model):
    with pytest.raises(ConfigError, match="temperature=-1"):
        model.generate("a", temperature=-1)
    with pytest.raises(ConfigError, match="seed=-2"):
        model.generate("a", seed=-2)
    with pytest.raises(ConfigError, match="unknown sampling option max_tokens; did you mean max_new_tokens"):
        model.generate_batch(["a"], max_tokens=2)
    with pytest.raises(UsageError, match="the prompt has"):
        model.generate("a band " * 20)
    with pytest.raises(ConfigError, match="overflow='spill': must be one of stop, roll"):
        model.generate("a", overflow="spill")
    with pytest.raises(ConfigError, match="backend='gpu'"):
        Model.load(model.path, backend="gpu")
    with pytest.raises(ConfigError, match="kv=.f16.: must be one of f32, bf16, q8"):
        Model.load(model.path, kv="f16")


# --- the tokenizer must be the model's ---


def test_a_missing_tokenizer_is_told(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    (tmp_path / "model.tokenizer.bin").rename(tmp_path / "elsewhere")
    alone = Model.load(path, backend="numpy")
    assert alone.logits([1, 2]).shape == (2, 300)
    for needs_text in (lambda: alone.score("a band"), lambda: alone.generate("a"), lambda: Chat(alone)):
        with pytest.raises(TokenizerError, match="no tokenizer beside it .*--tokenizer"):
            needs_text()
    assert Model.load(path, tokenizer=tmp_path / "elsewhere", backend="numpy").tokenizer.vocab_size == 300


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    for n, config in ((301, CONFIG), (300, dataclasses.replace(CONFIG, vocab_size=601))):
        path = toy_model(tmp_path, config, tokenizer=toy_tokenizer(n))
        with pytest.raises(TokenizerError, match=f"{n} entries where the model has vocab_size={config.vocab_size}"):
            Model.load(path, backend="numpy")


def test_rows_without_a_token_are_never_drawn(tmp_path):
    """An embedding padded from 300 to 384 rows, whose head prefers the padding."""
    config = dataclasses.replace(CONFIG, vocab_size=384, tied=False)
    head = np.zeros((384, config.dim), np.float32)
    head[300:] = 9.0 * np.sign(np.arange(84) % 2 - 0.5)[:, None]
    path = toy_model(tmp_path, config, tokenizer=toy_tokenizer(300), output=head)
    model = Model.load(path, backend="numpy")
    assert model.logits([1, 2]).shape == (2, 384)
    for temperature in (0, 1.0):
        configs = [SamplingConfig(temperature=temperature, max_new_tokens=9, seed=seed) for seed in (1, 2)]
        events = generate_batch(model.transformer, [[1]] * 2, configs, undrawn=model.undrawn)
        assert all(token is None or token < 300 for _, token in events)
    "".join(model.generate("a", max_new_tokens=9, ignore_eos=True, seed=1))


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    rows = toy_tokenizer().pieces()
    other = tmp_path / "other.bin"
    other.write_bytes(pack([*rows[:-1], (b"other", rows[-1][1])]))
    with pytest.raises(TokenizerError, match="not the vocabulary that .*model.bin was trained with"):
        Model.load(path, tokenizer=other, backend="numpy")


# --- training checkpoints ---


def write_checkpoint(folder, seed: int = 0, val_loss: float | None = None) -> None:
    folder.mkdir(parents=True)
    tensors = {f"{name}.weight": tensor for name, tensor in random_tensors(CONFIG, seed).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    vocabulary = toy_model(folder, CONFIG).with_name("model.tokenizer.bin").rename(folder / "tokenizer.model")
    (folder / "model.bin").unlink()
    state = {
        "model_config": CONFIG.to_dict(),
        "tokenizer": vocabulary.name,
        "tokenizer_sha256": toy_tokenizer().sha256,
        "step": 7,
        "val_loss": val_loss,
    }
    (folder / "state.json").write_text(json.dumps(state))


def test_a_checkpoint_is_read_without_torch(tmp_path):
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000009", seed=1)
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000010", seed=2)
    newest = Model.load(tmp_path / "run", backend="numpy")
    assert newest.path.name == "step-00000010"
    older = Model.load(tmp_path / "run" / "checkpoints" / "step-00000009", backend="numpy")
    for model, seed in ((newest, 2), (older, 1)):
        expected = reference.forward(random_tensors(CONFIG, seed), CONFIG, np.array([[1, 2, 3]]))[0]
        np.testing.assert_allclose(model.logits([1, 2, 3]), expected, atol=1e-4)
        assert "".join(model.generate("a", seed=1))


def test_a_runs_best_checkpoint_is_taken(tmp_path):
    for step, loss in ((1, 2.5), (2, 1.5), (3, 2.0), (4, None)):
        write_checkpoint(tmp_path / "checkpoints" / f"step-0000000{step}", val_loss=loss)
    for best in (2, 3, 1, 4):
        found = Model.load(tmp_path, backend="numpy").path
        assert found.name == f"step-0000000{best}"
        shutil.rmtree(found)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{"),
        ("state.json", "[]"),
        ("state.json", "{}"),
        ("state.json", '{"model_config": {"dim": 64}, "tokenizer": "tokenizer.model"}'),
        ("model.safetensors", "not a safetensors file"),
        ("model.safetensors", ""),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, file, content):
    write_checkpoint(tmp_path / "step")
    (tmp_path / "step" / file).write_text(content)
    with pytest.raises(CheckpointError, match="step"):
        Model.load(tmp_path / "step", backend="numpy")


def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path):
    write_checkpoint(tmp_path / "step")
    state = json.loads((tmp_path / "step" / "state.json").read_text())
    state["model_config"]["n_layers"] = 3
    (tmp_path / "step" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="layers.2.attention_norm.weight is missing"):
        Model.load(tmp_path / "step", backend="numpy")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    write_checkpoint(tmp_path / "step")
    (tmp_path / "step" / "state.json").unlink()
    with pytest.raises(FormatError, match=r"no config\.json \(Hugging Face\) and no state\.json \(a checkpoint\)"):
        Model.load(tmp_path / "step", backend="numpy")
    shutil.rmtree(tmp_path / "step")
    with pytest.raises(FormatError, match="holds no model: neither a checkpoint"):
        Model.load(tmp_path, backend="numpy")
    with pytest.raises(FormatError, match="no such model file"):
        Model.load(tmp_path / "missing.bin", backend="numpy")


def test_a_checkpoint_without_its_tokenizer_says_so(tmp_path):
    write_checkpoint(tmp_path / "step")
    shutil.move(tmp_path / "step" / "tokenizer.model", tmp_path / "t.model")
    with pytest.raises(TokenizerError, match="no such tokenizer file"):
        Model.load(tmp_path / "step", backend="numpy").score("a band")
    assert Model.load(tmp_path / "step", tokenizer=tmp_path / "t.model", backend="numpy").path == tmp_path / "step"
