"""Models from elsewhere, trained further."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from makes import BOS_EOS, byte_level
from toy import SMALL_MODELS, random_tensors, toy_data, toy_model

import tinystories
import train
from llamalet import Model, model_file, tokenizer
from llamalet.config import Llama3Scaling, ModelConfig
from llamalet.convert import bin_file, formats, gguf_file, huggingface
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import CheckpointError, ConfigError, DataError, FormatError, TokenizerError
from llamalet.model_file.checkpoint import find_best
from llamalet.shards import Shards
from training.run import checkpoint

VOCAB = 300
SCALED = ModelConfig.create(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, hidden_dim=48, vocab_size=VOCAB, max_seq_len=4096,
    rope_theta=5e5, tied=False,
    rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32),
)  # fmt: skip
FEW_STEPS = [
    "--max_iters=2", "--batch_size=2", "--max_seq_len=32", "--warmup_iters=1", "--eval_iters=2", "--threads=1",
    "--compile=False", "--no-sample",
]  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_data(tmp_path / "data" / "toy" / "tok300", VOCAB)
    return tmp_path


def train_further(path: object, *argv: str, out: str = "further") -> checkpoint.Checkpoint:
    """Train two steps and return the checkpoint of before the first."""
    assert train.main([*FEW_STEPS, f"--init_from={path}", f"--out_dir={out}", *argv]) == 0
    return checkpoint.load(f"{out}/checkpoints/step-00000000")


def check_same(state: dict[str, np.ndarray], path: Path) -> None:
    tensors = model_file.read(path).tensors
    assert {name + ".weight" for name in tensors} == state.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(state[name + ".weight"], tensor), name


@pytest.mark.parametrize("config", [SMALL_MODELS["gqa-tied"], SMALL_MODELS["mha-untied"]], ids=["tied", "untied"])
def test_a_bin_is_trained_further_from_its_own_weights(project, config):
    path = toy_model(project, config)
    before = train_further(path)
    check_same(before.model_state, path)
    after = checkpoint.load("further/checkpoints/step-00000002")
    assert not np.array_equal(before.model_state["norm.weight"], after.model_state["norm.weight"])


def test_what_no_option_says_comes_with_the_model_and_stays(project):
    path = toy_model(project, SCALED, version=3, dtype="f32")
    before = train_further(path)
    check_same(before.model_state, path)
    assert before.model_config.rope_scaling == SCALED.rope_scaling
    assert (before.model_config.rope_theta, before.model_config.head_dim) == (5e5, 12)
    assert before.model_config.max_seq_len == 32, "as typed"
    assert train.main(["--resume", "--out_dir=further", "--max_iters=3", "--schedule=cosine"]) == 0
    assert model_file.read("further/model.bin").config.rope_scaling == SCALED.rope_scaling


def test_large_contexts_are_not_trained_unless_asked_for(project):
    path = toy_model(project, SCALED, version=3, dtype="f32")
    toy_data(project / "data" / "toy" / "tok300", VOCAB, n_tokens=3000)
    options = [option for option in FEW_STEPS if not option.startswith("--max_seq_len")]
    assert train.main([*options, f"--init_from={path}", "--max_iters=1", "--batch_size=1"]) == 0
    assert checkpoint.load("out/checkpoints/step-00000001").model_config.max_seq_len == 1024


def test_runs_and_checkpoints_and_other_formats_are_read(project):
    path = toy_model(project, SMALL_MODELS["gqa-untied"])
    first = train_further(path, out="first")
    best = find_best("first")
    assert best is not None
    ended = checkpoint.load(best).model_state
    for name in ("first", str(best)):
        again = train_further(name, out=f"from-{Path(name).name}")
        assert all(np.array_equal(again.model_state[key], ended[key]) for key in ended)
    source = dataclasses.replace(formats.read("bin", str(path)), tokenizer=None, tokenizer_data=b"")
    huggingface.write(project / "folder", source)
    hub = train_further("folder", out="from-hf")
    assert all(np.array_equal(hub.model_state[key], first.model_state[key]) for key in ended)


def test_a_resumed_run_does_not_start_over(project, capsys):
    path = toy_model(project, SMALL_MODELS["gqa-tied"])
    train_further(path)
    path.unlink()
    assert train.main([*FEW_STEPS, f"--init_from={path}", "--out_dir=further", "--resume=auto", "--max_iters=3"]) == 0
    assert "after step 2 of 3" in capsys.readouterr().out
    for resume in ("--resume", "--resume=further"):
        with pytest.raises(CheckpointError, match=r"model\.bin: a resumed run has its own weights; leave out"):
            train_further(path, resume)


@pytest.mark.parametrize("form", ["bin beside", "bin inside", "gguf", "run"])
def test_the_command_that_is_printed_makes_data_that_fit(project, form):
    source = formats.read("bin", str(toy_model(project, SMALL_MODELS["gqa-tied"])))
    path = project / {"gguf": "my model.gguf", "run": "first"}.get(form, "my model.bin")
    if form == "gguf":
        gguf_file.write(path, source)
    elif form == "run":
        train_further("model.bin", out="first")
    else:
        bin_file.write(path, source, 1 if form == "bin beside" else 3, dtype=None if form == "bin beside" else "f32")
    (project / "plays.txt").write_text("\n\n".join(f"band {i} and an end. " * 20 for i in range(40)))
    shutil.rmtree("data")
    text = ["pretokenize", "plays.txt", "--document=blankline", "--vocab-size=290", "--workers=1"]
    assert tinystories.main([*text, "--data-dir=my data"]) == 0
    with pytest.raises(ConfigError, match=r"\(290 tokens\)") as refused:
        train_further(path, "--data=my data")
    command = shlex.split(str(refused.value).rpartition("with that one: ")[2])
    assert command[:2] == ["python", "tinystories.py"] and "--document=blankline" in command
    assert tinystories.main(command[2:]) == 0
    toy_data(project / "my data" / "newer", VOCAB + 1)
    assert train_further(path, "--data=my data").state.data.startswith("my data/plays/tok300-")


def test_without_data_the_models_vocabulary_is_named(project):
    path = toy_model(project, SMALL_MODELS["gqa-tied"])
    shutil.rmtree("data")
    with pytest.raises(DataError, match=f"pretokenize --vocab={re.escape(str(path))}`"):
        train_further(path)
    (project / "model.tokenizer.bin").unlink()
    with pytest.raises(TokenizerError, match="a model without a tokenizer"):
        formats.read_tokenizer(path)


def test_another_shape_or_vocabulary_is_refused(project):
    path = toy_model(project, SMALL_MODELS["gqa-tied"])
    with pytest.raises(ConfigError, match=r"dim=32: .*model\.bin has 64"):
        train_further(path, "--dim=32")
    for name, words in (
        ("nowhere.bin", "nowhere.bin: no such model file or folder$"),
        ("meta-llama/Llama-3.2-1B", "llamalet convert meta-llama/Llama-3.2-1B NAME.bin --from=hf$"),
        ("data", "data: holds no model"),
    ):
        with pytest.raises(FormatError, match=words):
            train_further(name)
    path = toy_model(project, dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=VOCAB + 1))
    fix = f"pretokenize --source=toy --vocab={re.escape(str(path))}$"
    with pytest.raises(ConfigError, match=rf"another vocabulary \(300 tokens\) than that of .* \(301\); .*{fix}"):
        train_further(path)


NAMES = (*BOS_EOS.values(), "<|end_of_turn|>")


def hugging_face_folder(path: Path, rows: int, declared: dict, **generation: object) -> Path:
    """A model with byte-level tokens, of which tokenizer.json does not say what begins and ends texts."""
    config = dataclasses.replace(SMALL_MODELS["gqa-tied"], vocab_size=rows)
    huggingface.write(path, ImportedModel(name="toy", config=config, tensors=random_tensors(config)))
    (path / "tokenizer.json").write_text(byte_level(special=NAMES).to_str())
    (path / "tokenizer_config.json").write_text(json.dumps(declared))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_a_padded_model_whose_texts_begin_with_nothing_is_trained_further(project, capsys):
    """Its documents are separated by EOS; what ends its texts stays with it through every step."""
    hub = hugging_face_folder(project / "hub", 384, {"eos_token": "<|end_of_turn|>"}, eos_token_id=[342, 341])
    Path("t.txt").write_text("\n".join(["the ba den mur"] * 300))
    tinystories.main(["pretokenize", "t.txt", "--document=line", f"--vocab={hub}", "--workers=1"])
    data = Shards.open(next(Path("data").glob("t/tok343-*")))
    tokens = data.split("train")[:]
    assert data.meta.bos_id == 342 and tokens[0] == 342
    assert np.count_nonzero(tokens == 342) == data.meta.splits["train"].documents == 285
    options = [*(option for option in FEW_STEPS if option != "--no-sample"), "--eval_interval=1"]
    assert train.main([*options, f"--init_from={hub}", f"--data={data.folder}", "--out_dir=further"]) == 0
    captured = capsys.readouterr()
    assert "run it with" in captured.out and "no stories" not in captured.err
    assert train.main(["--resume", "--out_dir=further", "--max_iters=3", "--no-sample"]) == 0
    expected = tokenizer.load(hub / "tokenizer.json").ids
    for path in ("further", "further/model.bin"):
        model = Model.load(path, backend="numpy")
        assert model.config.vocab_size == 384 and model.tokenizer.ids == expected
        assert model.stop_tokens == {341, 342} and expected.prefix == ()
    # The same tokens with another beginning are other data.
    other = hugging_face_folder(project / "other", 384, BOS_EOS)
    capsys.readouterr()
    tinystories.main(["pretokenize", "t.txt", "--document=line", f"--vocab={other}", "--workers=1"])
    assert "kept" not in capsys.readouterr().out and Shards.open(data.folder, verify=True).meta.bos_id == 341


def test_a_vocabulary_without_any_end_is_refused_by_name(project):
    hub = hugging_face_folder(project / "hub", 384, {})
    Path("t.txt").write_text("the ba den mur\n" * 30)
    with pytest.raises(TokenizerError, match="hub: the vocabulary has neither BOS nor EOS"):
        tinystories.main(["pretokenize", "t.txt", f"--vocab={hub}"])


def test_data_of_more_tokens_than_the_model_has_rows_are_refused(project):
    toy_data(project / "data" / "toy" / "tok300", VOCAB + 1)
    with pytest.raises(ConfigError, match=r"another vocabulary \(301 tokens\) than that of .* \(300\)"):
        train.main([*FEW_STEPS, f"--init_from={toy_model(project, SMALL_MODELS['gqa-tied'])}"])
