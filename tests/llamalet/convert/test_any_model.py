"""Model.load opens a model in any format, and computes what it computes from an exported .bin of the same width."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy import SMALL_MODELS, random_tensors, toy_model, toy_tokenizer

import training.run.checkpoint
from llamalet import Chat, Model, model_file
from llamalet.convert import bin_file, formats, gguf_file, huggingface
from llamalet.convert.imported_model import ImportedModel
from llamalet.errors import CheckpointError, ConfigError, FormatError, NonFiniteError, TokenizerError, UsageError
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.tokenizer import pack, write_bin
from training.run.run_state import RunState

ROOT = Path(__file__).parents[3]
CONFIG = SMALL_MODELS["gqa-untied"]
VOCABULARY = toy_tokenizer(CONFIG.vocab_size)
TENSORS = random_tensors(CONFIG, seed=3)
MODEL = ImportedModel(
    name="toy",
    config=CONFIG,
    tensors=TENSORS,
    tokenizer=VOCABULARY,
    tokenizer_data=pack(VOCABULARY.pieces()),
    chat_template="{{ bos_token }}{{ messages[0].content }}",
)
IDS = np.arange(3, 3 + 20)


def write_checkpoint(run: Path) -> Path:
    state = RunState(
        step=2, val_loss=1.0, tokenizer_sha256=VOCABULARY.sha256, data="data", train_config={}, model_config=CONFIG,
        tokenizer="tokenizer.bin",
    )  # fmt: skip
    return training.run.checkpoint.save(
        run,
        state,
        model_state={name + ".weight": tensor for name, tensor in TENSORS.items()},
        optimizer_state={},
        tokenizer_data=MODEL.tokenizer_data,
    )


def half(tensor: np.ndarray) -> torch.Tensor:
    return torch.tensor(tensor).half()


def make(kind: str, folder: Path) -> Path:
    """Write MODEL in a format; return its path."""
    path = folder / "m"
    if kind in ("checkpoint", "run"):
        step = write_checkpoint(path)
        return path if kind == "run" else step
    if kind.startswith("gguf"):
        gguf_file.write(path.with_suffix(".gguf"), MODEL, kind.removeprefix("gguf "))
        return path.with_suffix(".gguf")
    if kind.startswith("hf"):
        huggingface.write(path, MODEL, "bf16" if kind == "hf bf16" else "f32")
        if kind == "hf f16":
            weights = safetensors.torch.load_file(path / "model.safetensors")
            halves = {name: tensor.half() for name, tensor in weights.items()}
            safetensors.torch.save_file(halves, path / "model.safetensors", {"format": "pt"})
        return path
    if kind.startswith("meta"):
        path.mkdir()
        torch.save({f"{name}.weight": half(tensor) for name, tensor in TENSORS.items()}, path / "consolidated.00.pth")
        fields = {
            "dim": CONFIG.dim,
            "n_layers": CONFIG.n_layers,
            "n_heads": CONFIG.n_heads,
            "norm_eps": CONFIG.norm_eps,
        }
        (path / "params.json").write_text(json.dumps(fields | {"n_kv_heads": CONFIG.n_kv_heads}))
        write_bin(path / "tokenizer.model", VOCABULARY)
        return path / "consolidated.00.pth" if kind == "meta .pth" else path
    if kind == "llama2c":
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
        arguments = {name: getattr(CONFIG, name) for name in names}
        state = {f"{name}.weight": torch.tensor(tensor) for name, tensor in TENSORS.items()}
        torch.save({"model": state, "model_args": arguments}, path.with_suffix(".pt"))
        write_bin(path.with_name("tokenizer.model"), VOCABULARY)
        return path.with_suffix(".pt")
    version, _, dtype = kind.removeprefix("bin v").partition(" ")
    bin_file.write(path.with_suffix(".bin"), MODEL, int(version), dtype=dtype or None)
    return path.with_suffix(".bin")


# What is opened -> what it becomes, as the model line says.
KINDS = {
    "checkpoint": "f32", "run": "f32", "hf f32": "f32", "hf bf16": "bf16", "hf f16": "bf16 (from F16)",
    "meta": "bf16 (from F16)", "meta .pth": "bf16 (from F16)", "llama2c": "f32",
    "gguf f32": "f32", "gguf f16": "bf16 (from F16)", "gguf q8_0": "q8 (from Q8_0)",
    "gguf q4_0": "q8 (from Q4_0)", "bin v0": "f32", "bin v2": "q8", "bin v3 bf16": "bf16", "bin v3 q4": "q4",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [None, "q4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_any_format_computes_what_its_export_does(tmp_path, kind, dtype):
    path = make(kind, tmp_path)
    model = Model.load(path, backend="numpy", dtype=dtype)
    exact = dtype is None or kind == "bin v3 q4"
    assert model.dtype == KINDS[kind] if exact else model.dtype.startswith("q4 (from ")
    assert model.tokenizer.encode("a band") == VOCABULARY.encode("a band")
    if kind.startswith("bin") and exact:
        expected = model_file.read(path)
    else:
        source = formats.read(formats.kind_of(path), str(path))
        width = dtype or source.dtype
        expected = model_file.write(tmp_path / "export.bin", 3, source.config, source.tensors, dtype=width)
    exported = Model.load(expected.path, backend="numpy", tokenizer=write_vocabulary(tmp_path))
    np.testing.assert_array_equal(model.logits(IDS), exported.logits(IDS))
    assert "".join(model.generate("a", seed=1)) == "".join(exported.generate("a", seed=1))


def write_vocabulary(folder: Path) -> Path:
    write_bin(folder / "vocabulary.bin", VOCABULARY)
    return folder / "vocabulary.bin"


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8", "q4"])
def test_the_kernels_take_a_converted_model_as_they_take_a_file(tmp_path, dtype):
    path = make("hf f32", tmp_path)
    source = huggingface.read(str(path))
    bin_file.write(tmp_path / "e.bin", source, 3, dtype=dtype)
    model, exported = Model.load(path, dtype=dtype, threads=1), Model.load(tmp_path / "e.bin", threads=1)
    np.testing.assert_array_equal(model.logits(IDS), exported.logits(IDS))


def test_rows_are_converted_a_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file.tensors, "BLOCK_WEIGHTS", 1000)
    asked = []

    class Watched:
        def __init__(self, tensor: np.ndarray) -> None:
            self.shape, self.tensor = tensor.shape, tensor

        def __getitem__(self, rows: slice) -> np.ndarray:
            asked.append((rows.stop - rows.start) * (len(self.shape) - 1))  # rows of matrices
            return self.tensor[rows]

    watched = {name: Watched(tensor) for name, tensor in TENSORS.items()}
    file = model_file.in_memory(tmp_path, CONFIG, watched, "q8")
    assert max(asked) == 16
    whole = model_file.write(tmp_path / "m.bin", 3, CONFIG, TENSORS, dtype="q8")
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(file.tensors[name][0], tensor[0])


def test_a_checkpoint_outlives_its_files(tmp_path):
    path = make("checkpoint", tmp_path)
    found = formats.read("checkpoint", str(path))
    (path / MODEL_SAFETENSORS).unlink()
    np.testing.assert_array_equal(found.tensors["norm"][0:5], TENSORS["norm"][:5])


@pytest.mark.parametrize("kind", ["gguf f32", "hf f32"])
def test_the_chat_template_that_comes_with_a_model_is_used(tmp_path, kind):
    pytest.importorskip("jinja2")
    chat = Chat(Model.load(make(kind, tmp_path), backend="numpy"), max_new_tokens=2)
    "".join(chat.say("a band"))
    assert chat.n_read == len(VOCABULARY.encode("a band", bos=True))


@pytest.mark.parametrize("kind", ["checkpoint", "gguf f32", "hf f32", "llama2c"])
def test_a_named_tokenizer_replaces_the_model_s_own(tmp_path, kind):
    path = make(kind, tmp_path)
    other = toy_tokenizer(CONFIG.vocab_size)
    rows = other.pieces()
    rows[-1] = (b"qqq", rows[-1][1])
    (tmp_path / "other.bin").write_bytes(pack(rows))
    if kind == "checkpoint":  # it says which one it was trained with
        with pytest.raises(TokenizerError, match="other.bin: not the vocabulary that .*step-00000002 was trained with"):
            Model.load(path, tokenizer=tmp_path / "other.bin", backend="numpy")
    else:
        model = Model.load(path, tokenizer=tmp_path / "other.bin", backend="numpy")
        assert model.tokenizer.sha256 != VOCABULARY.sha256
    (tmp_path / "long.bin").write_bytes(pack([*rows, (b"rrr", -1e3)]))
    with pytest.raises(TokenizerError, match="long.bin: 301 entries where the model has vocab_size=300"):
        Model.load(path, tokenizer=tmp_path / "long.bin", backend="numpy")


def test_a_model_without_a_tokenizer_says_why(tmp_path):
    path = make("hf f32", tmp_path)
    (path / "tokenizer.json").write_text("{")
    model = Model.load(path, backend="numpy")
    assert model.logits([1, 2]).shape == (2, CONFIG.vocab_size)
    with pytest.raises(TokenizerError, match="m: has no tokenizer that can be read: .*tokenizer.json.*--tokenizer"):
        model.score("a band")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a model.")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("text.txt", "text.txt: .*is this a model file"),
        ("folder", "folder: holds no model: neither a checkpoint"),
        ("gone.gguf", "gone.gguf: no such model file or folder$"),
    ):
        with pytest.raises(FormatError, match=words):
            Model.load(tmp_path / name, backend="numpy")
    with pytest.raises(FormatError, match=r"llamalet convert meta-llama/Llama-3.2-1B NAME.bin --from=hf"):
        Model.load("meta-llama/Llama-3.2-1B", backend="numpy")
    with pytest.raises(ConfigError, match="dtype='q5': must be one of f32, bf16, q8, q4"):
        Model.load(make("gguf f32", tmp_path), dtype="q5", backend="numpy")


def test_weights_that_are_not_finite_are_refused_by_file_and_name(tmp_path):
    huggingface.write(tmp_path / "m", MODEL)
    path = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFiniteError, match="m: norm holds NaN or infinite weights"):
        Model.load(tmp_path / "m", backend="numpy")


def test_a_checkpoint_s_digests_are_compared_on_request(tmp_path):
    path = make("checkpoint", tmp_path)
    Model.load(path, backend="numpy", verify=True)
    data = bytearray((path / MODEL_SAFETENSORS).read_bytes())
    data[-9] ^= 1
    (path / MODEL_SAFETENSORS).write_bytes(data)
    Model.load(path, backend="numpy")
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        Model.load(path, backend="numpy", verify=True)


def test_pytorch_s_files_say_that_they_need_torch(tmp_path, monkeypatch):
    paths = [make("llama2c", tmp_path), make("meta", tmp_path)]
    monkeypatch.setitem(sys.modules, "torch", None)
    for path in paths:
        with pytest.raises(UsageError, match="reading PyTorch's files needs torch: pip install torch"):
            Model.load(path, backend="numpy")


def test_a_bin_needs_none_of_the_readers(tmp_path):
    path = toy_model(tmp_path, dataclasses.replace(CONFIG))
    code = (
        "import sys; from llamalet import Model; Model.load(sys.argv[1], backend='numpy'); "
        "print(*[name for name in sys.modules if name.startswith('llamalet.convert.')])"
    )
    words = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"llamalet.convert.formats", "llamalet.convert.imported_model"}
