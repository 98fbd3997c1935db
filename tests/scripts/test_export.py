import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import SMALL_MODELS, random_tensors, toy_data, toy_state

import export
from llamalet import cli, model_file, shards, tokenizer
from llamalet.convert import formats
from llamalet.errors import CheckpointError, ConfigError, DataError, DiskError, FormatError, UsageError
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.kernels.transformer import Transformer
from llamalet.runtime import Model
from parity import proof
from training.run import checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = dataclasses.replace(SMALL_MODELS["gqa-tied"], max_seq_len=64)
PIPES = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")


def save_checkpoint(run: Path, data: Path, step: int, val_loss: float, seed: int = 0) -> Path:
    vocabulary = data / "tokenizer.bin"
    return checkpoint.save(
        run,
        toy_state(CONFIG, step, val_loss, data=str(data), tokenizer_sha256=tokenizer.load(vocabulary).sha256),
        model_state={f"{name}.weight": array for name, array in random_tensors(CONFIG, seed, scale=0.05).items()},
        optimizer_state={},
        tokenizer_data=vocabulary.read_bytes(),
        keep=5,
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with prepared data and a run of two checkpoints, the first of which is the better one."""
    monkeypatch.chdir(tmp_path)
    data = toy_data(tmp_path / "data" / "toy", CONFIG.vocab_size)
    save_checkpoint(tmp_path / "out", data, 10, 2.0, seed=10)
    save_checkpoint(tmp_path / "out", data, 20, 3.0, seed=20)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "name", "kind"),
    [
        (["--version=0"], "model_v0.bin", "version 0, f32"),
        ([], "model.bin", "version 1, f32"),
        (["--version=2"], "model_q8.bin", "version 2, q8 in groups of 64"),
        (["--version=3"], "model_v3_q8.bin", "version 3, q8 in groups of 64"),
        (["--version=3", "--dtype=f32"], "model_v3_f32.bin", "version 3, f32"),
        (["--dtype=bf16"], "model_v3_bf16.bin", "version 3, bf16"),
        (["--dtype=q4"], "model_v3_q4.bin", "version 3, q4 in groups of 32"),
    ],
)
def test_export_alone_takes_the_best_checkpoint_and_proves_the_file(project, capsys, argv, name, kind):
    assert export.main(argv) == 0
    shown = capsys.readouterr().out
    assert f"wrote out/{name}: {kind}," in shown and "is proved" in shown and f"python sample.py out/{name}" in shown
    file = model_file.read(project / "out" / name)
    expected = random_tensors(CONFIG, seed=10, scale=0.05)
    np.testing.assert_array_equal(file.tensors["norm"], expected["norm"])
    assert Model.load(project / "out" / name, backend="numpy").logits([1, 2]).shape == (2, CONFIG.vocab_size)
    assert export.main(["--verify", f"out/{name}"]) == 0


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        ("file/new.bin", DiskError, "file: cannot be written to"),
        ("file/new-hf", DiskError, "file/new-hf: cannot be written to"),
        ("file/deep/new.gguf", DiskError, "file/deep: cannot be written to"),
        ("folder.bin", ConfigError, "folder.bin: is a folder; a .bin is a file"),
        ("file", ConfigError, "file: is a file; a Hugging Face model is a folder"),
        pytest.param("pipe.gguf", ConfigError, "pipe.gguf: is a pipe or a device; a .gguf is a file", marks=PIPES),
        pytest.param("/dev/null", ConfigError, "/dev/null: is a pipe or a device; a Hugging Face", marks=PIPES),
    ],
)
def test_a_place_that_cannot_be_written_is_known_before_a_model_is_read(project, monkeypatch, out, error, words):
    def read(*_args, **_options):
        raise AssertionError("this work comes too early")

    monkeypatch.setattr(formats, "read", read)
    (project / "file").write_text("in the way")
    (project / "folder.bin").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(project / "pipe.gguf")
    for command in (lambda: export.main([out, "--hf=some/one"]), lambda: cli.main(["convert", "some.gguf", out])):
        with pytest.raises(error, match=words):
            command()


@pytest.mark.parametrize(
    ("out", "file"),
    [
        ("q.bin", "q.tokenizer.model"),
        ("q.bin", "q.tokenizer.json"),
        ("q.bin", "q.generation_config.json"),
        ("q.bin", "q.chat_template.jinja"),
        ("q", "q/tokenizer.json"),
        ("q", "q/config.json"),
    ],
)
@pytest.mark.parametrize("kind", ["a folder", "a link to nothing"])
def test_what_is_in_the_place_of_a_file_beside_the_model_is_known_before_it_is_read(
    project, monkeypatch, out, file, kind
):
    def read(*_args, **_options):
        raise AssertionError("this work comes too early")

    monkeypatch.setattr(formats, "read", read)
    if kind == "a folder":
        (project / file).mkdir(parents=True)
    else:
        (project / file).parent.mkdir(exist_ok=True)
        (project / file).symlink_to("nowhere")
    for command in (lambda: export.main([out, "--hf=some/one"]), lambda: cli.main(["convert", "some.gguf", out])):
        with pytest.raises(DiskError, match=f"{file}: is {kind}, not a file; move it away"):
            command()


def test_a_checkpoint_can_be_named(project):
    export.main(["there/last.bin", "--checkpoint=out/checkpoints/step-00000020", "--no-check"])
    expected = random_tensors(CONFIG, seed=20, scale=0.05)
    np.testing.assert_array_equal(model_file.read(project / "there" / "last.bin").tensors["norm"], expected["norm"])


def test_another_run_is_exported_into_its_own_folder(project, capsys):
    save_checkpoint(project / "runs" / "b", project / "data" / "toy", 10, 2.0, seed=7)
    for named in ("runs/b", "runs/b/checkpoints/step-00000010"):
        export.main([f"--checkpoint={named}", "--version=0", "--no-check"])
        assert "wrote runs/b/model_v0.bin" in capsys.readouterr().out
        (project / "runs" / "b" / "model_v0.bin").unlink()
    assert not list((project / "out").glob("*.bin"))


def test_damaged_checkpoints_are_not_exported(project, capsys):
    best, last = (project / "out" / "checkpoints" / f"step-{step:08d}" / MODEL_SAFETENSORS for step in (10, 20))
    best.write_bytes(b"damaged")
    assert export.main(["--no-check"]) == 0
    assert "step-00000010 is skipped" in capsys.readouterr().err
    expected = random_tensors(CONFIG, seed=20, scale=0.05)
    np.testing.assert_array_equal(model_file.read(project / "out" / "model.bin").tensors["norm"], expected["norm"])
    last.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="out: none of its checkpoints is valid"):
        export.main(["--checkpoint=out"])
    with pytest.raises(CheckpointError, match="no valid checkpoint under out/"):
        export.main([])


def test_another_runtime_is_not_proved(project, capsys, monkeypatch):
    """The proof must see an error of one percent in one matrix of one layer."""
    export.main(["--version=1", "--no-check"])

    def wrong(file: model_file.ModelFile, backend: str, threads: int | None, kv: str | None) -> Transformer:
        tensors = dict(file.tensors)
        tensors["layers.1.attention.wo"] = tensors["layers.1.attention.wo"] * np.float32(1.01)
        return Transformer(dataclasses.replace(file, tensors=tensors), threads, kv)

    monkeypatch.setattr(proof, "open_backend", wrong)
    assert export.main(["--verify", "out/model.bin"]) == FormatError.exit_code
    assert "NOT proved: logits differ" in capsys.readouterr().out
    assert export.main([]) == FormatError.exit_code
    assert "run it" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("f32", "wq is not the checkpoint's"),
        ("bf16", "wq is not the checkpoint's"),
        ("q8", "q8 weights are off by"),
        ("q4", "q4 weights are off by"),
    ],
)
def test_another_checkpoint_is_not_proved(project, dtype, words):
    """One matrix of one layer is another's."""
    path = project / "out" / f"model_v3_{dtype}.bin"
    export.main(["--no-check", f"--dtype={dtype}"])
    own = random_tensors(CONFIG, seed=10, scale=0.05)
    assert not proof.prove(path, originals=own).problems
    own["layers.1.attention.wq"] = random_tensors(CONFIG, seed=20, scale=0.05)["layers.1.attention.wq"]
    found = proof.prove(path, originals=own)
    assert any(words in problem for problem in found.problems)


def test_data_of_another_tokenizer_is_not_used(project, capsys):
    export.main(["--no-check"])
    path = project / "data" / "toy" / shards.META_FILE
    table = shards.read_meta(path)
    shards.write_meta(path, dataclasses.replace(table, tokenizer_sha256="00" * 32))
    assert export.main(["--verify", "out/model.bin"]) == 0
    assert "not compared (no prepared data with this tokenizer" in capsys.readouterr().out
    with pytest.raises(DataError, match="another tokenizer"):
        export.main(["--verify", "out/model.bin", "--data=data/toy"])


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (["--version=4"], ConfigError, "version=4: must be one of 0, 1, 2, 3"),
        (["--version=2", "--dtype=q4"], ConfigError, "dtype=q4: version 2 has one dtype"),
        (["--dtype=q5"], ConfigError, "dtype=q5: must be one of f32, bf16, q8, q4"),
        (["out"], ConfigError, "out: holds .* --checkpoint=out"),
        (["a.bin", "--verify=b.bin"], ConfigError, "existing file"),
        (["--verify=gone.bin"], FormatError, "gone.bin: no such model file"),
        (["--checkpoint=gone"], CheckpointError, "gone"),
        (["--checkpoint=model.bin"], UsageError, "--verify"),
        (["--versoin=2"], UsageError, "did you mean --version"),
        (["--data=gone"], DataError, "gone"),
    ],
)
def test_mistakes(project, argv, error, words):
    with pytest.raises(error, match=words):
        export.main(argv)


def test_no_checkpoint_yet_is_one_line(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "export.py"), "--version=2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == CheckpointError.exit_code
    assert "python train.py" in done.stderr and done.stderr.count("\n") == 1


def test_a_killed_export_leaves_the_old_file(project, monkeypatch):
    export.main(["--no-check"])
    before = (project / "out" / "model.bin").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export.main(["--no-check", "--checkpoint=out/checkpoints/step-00000020"])
    assert (project / "out" / "model.bin").read_bytes() == before
    assert sorted(path.suffix for path in (project / "out").iterdir()) == ["", ".bin", ".bin"]
