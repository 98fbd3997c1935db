import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import SMALL_MODELS, random_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Counting, toy_model, toy_tokenizer

from llamalet import Model, format, reference
from llamalet.errors import CheckpointError, ConfigError, FormatError, NonFiniteError, TokenizerError, UsageError
from llamalet.generate import generate, stream
from llamalet.sampler import Sampler
from llamalet.tokenizer import StreamDecoder, pack

CONFIG = SMALL_MODELS["gqa-tied"]  # vocabulary 300, context 32
GREEDY = {"temperature": 0.0}


def count_from(start: int, prompt_length: int = 1, **options) -> list[int]:
    sampler = Sampler(CONFIG.vocab_size, temperature=0.0)
    return list(generate(Counting(CONFIG), list(range(start, start + prompt_length)), sampler, **options))


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


@pytest.mark.parametrize("prompt_length", [0, 33, 1000])
def test_a_prompt_that_does_not_fit_is_refused_at_once(prompt_length):
    with pytest.raises(UsageError, match=f"the prompt has {prompt_length} tokens; the model takes 1 to 32"):
        generate(Counting(CONFIG), list(range(prompt_length)), Sampler(CONFIG.vocab_size))


def test_no_work_is_done_before_or_after_it_is_needed():
    transformer = Counting(CONFIG)
    tokens = generate(transformer, [100, 101], Sampler(CONFIG.vocab_size, temperature=0.0), max_new_tokens=3)
    assert transformer.passes == 0
    assert next(tokens) == 102 and transformer.passes == 1
    assert list(tokens) == [103, 104] and transformer.passes == 3


@settings(max_examples=200)
@given(st.lists(st.integers(0, 299), max_size=30))
def test_streamed_pieces_are_the_text_and_never_empty(tokens):
    vocabulary = toy_tokenizer()
    pieces = list(stream(tokens, StreamDecoder(vocabulary)))
    assert "" not in pieces
    assert "".join(pieces) == vocabulary.decode(tokens)


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
    tokens = list(generate(model.transformer, ids, Sampler(300, seed=3, **filters), max_new_tokens=9))
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
    model.transformer = reference.NumpyTransformer(format.ModelFile(path, format.read(path).header, broken))
    with pytest.raises(NonFiniteError, match="300 of 300 logits"):
        list(model.generate("a"))


def test_wrong_settings_are_refused_at_once(model):
    with pytest.raises(ConfigError, match="temperature=-1"):
        model.generate("a", temperature=-1)
    with pytest.raises(ConfigError, match="seed=-2"):
        model.generate("a", seed=-2)
    with pytest.raises(UsageError, match="the prompt has"):
        model.generate("a band " * 20)
    with pytest.raises(ConfigError, match="backend='gpu'"):
        Model.load(model.path, backend="gpu")


# --- the tokenizer must be the model's ---


def test_a_missing_tokenizer_is_told(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    (tmp_path / "model.tokenizer.bin").rename(tmp_path / "elsewhere")
    with pytest.raises(TokenizerError, match="no tokenizer beside it .*-z"):
        Model.load(path, backend="numpy")
    assert Model.load(path, tokenizer=tmp_path / "elsewhere", backend="numpy").tokenizer.vocab_size == 300


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    (tmp_path / "other.bin").write_bytes(pack(toy_tokenizer(299).pieces()))
    with pytest.raises(TokenizerError, match="299 entries where the model has vocab_size=300"):
        Model.load(path, tokenizer=tmp_path / "other.bin", backend="numpy")


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    path = toy_model(tmp_path, CONFIG)
    rows = toy_tokenizer().pieces()
    other = tmp_path / "other.bin"
    other.write_bytes(pack([*rows[:-1], (b"other", rows[-1][1])]))
    with pytest.raises(TokenizerError, match="not the vocabulary that .*model.bin was trained with"):
        Model.load(path, tokenizer=other, backend="numpy")


# --- training checkpoints ---


def write_checkpoint(folder, seed: int = 0) -> None:
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


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", None),
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
    (tmp_path / "step" / file).unlink()
    if content is not None:
        (tmp_path / "step" / file).write_text(content)
    with pytest.raises(CheckpointError, match="step"):
        Model.load(tmp_path / "step", backend="numpy")


def test_weights_of_another_shape_than_the_config_says_are_refused(tmp_path):
    write_checkpoint(tmp_path / "step")
    state = json.loads((tmp_path / "step" / "state.json").read_text())
    state["model_config"]["n_layers"] = 3
    (tmp_path / "step" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="not those of the config"):
        Model.load(tmp_path / "step", backend="numpy")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        Model.load(tmp_path, backend="numpy")
    with pytest.raises(FormatError, match="no such model file"):
        Model.load(tmp_path / "missing.bin", backend="numpy")


def test_without_safetensors_a_checkpoint_names_what_to_install(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "step")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UsageError, match="pip install safetensors"):
        Model.load(tmp_path / "step", backend="numpy")


def test_a_checkpoint_without_its_tokenizer_says_so(tmp_path):
    write_checkpoint(tmp_path / "step")
    shutil.move(tmp_path / "step" / "tokenizer.model", tmp_path / "t.model")
    with pytest.raises(TokenizerError, match="no such tokenizer file"):
        Model.load(tmp_path / "step", backend="numpy")
    assert Model.load(tmp_path / "step", tokenizer=tmp_path / "t.model", backend="numpy").path == tmp_path / "step"
