import io
import re
import sys

import pytest
from toy import SMALL_MODELS, toy_model

import export
import llamalet
import sample
from llamalet import cli
from llamalet.convert import formats
from llamalet.convert.imported_model import difference
from llamalet.errors import ConfigError, LlamaletError, UsageError

CONFIG = SMALL_MODELS["gqa-tied"]  # vocabulary 300, context 32


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(toy_model(tmp_path, CONFIG))


def without_times(err: str) -> str:
    return re.sub(r"[0-9.]+ (tokens/s|s$)", r"N \1", err, flags=re.MULTILINE)


# --- the commands ---


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_command(words, capsys):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for command in ("generate", "chat", "evaluate", "convert"):
        assert f"llamalet {command} " in out


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llamalet {llamalet.__version__}\n"


def test_an_unknown_command_names_the_nearest():
    with pytest.raises(UsageError, match="unknown command 'genrate'; did you mean llamalet generate"):
        cli.main(["genrate"])
    with pytest.raises(UsageError, match="unknown command '12'; must be one of generate, chat, serve, "):
        cli.main(["12"])


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate", "convert"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert out.startswith(f"usage: llamalet {command} [MODEL]") and "SUPPRESS" not in out
    assert ("--num-samples" in out) == (command == "generate")
    assert ("--system-prompt" in out) == (command == "chat")


@pytest.mark.parametrize(
    "words",
    [
        ["-s", "3"],
        ["-i", "a band", "-s", "3", "-n", "9"],
        ["-s", "3", "-n", "4", "-i", "a band"],
        ["-s", "3", "--ignore-eos"],
        ["-s", "3", "-n", "0", "-i", "a band and a ban"],
        ["-s", "3", "--ignore-eos", "--overflow=roll", "--max-new-tokens=100", "--keep=2"],
        ["-s", "3", "--overflow=roll", "-n", "200", "-i", "a band " * 20],
        ["-t", "0", "-s", "1", "--max-new-tokens=1"],
        ["-s", "3", "--num-samples=3"],
    ],
)
def test_generate_tells_the_stories_of_sample(model, words, capsys):
    printed = []
    for program in (sample.main, lambda words: cli.main(["generate", *words])):
        assert program([model, "--backend=numpy", *words]) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out != ""
    assert without_times(printed[0].err) == without_times(printed[1].err)


@pytest.mark.parametrize(
    "words", [["-i", "a band " * 20], ["--overflow=roll", "--keep=32"], ["-i", "a band", "-n", "2"]]
)
def test_generate_refuses_what_sample_refuses(model, words):
    said = []
    for program in (sample.main, lambda words: cli.main(["generate", *words])):
        with pytest.raises(UsageError) as caught:
            program([model, "--backend=numpy", *words])
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_chat_is_for_chats_and_generate_for_stories(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a band\n"))
    words = [model, "--backend=numpy", "--chat-template=llama2", "--max-new-tokens=3", "-s", "2"]
    assert cli.main(["chat", *words]) == 0
    told = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("a band\n"))
    assert sample.main([*words, "-m", "chat"]) == 0
    assert capsys.readouterr().out == told
    with pytest.raises(ConfigError, match="chat_template: is for chats; use llamalet chat"):
        cli.main(["generate", *words])
    for option in ("--steps=0", "--num-samples=2", "--ignore-eos"):
        name = option[2:].partition("=")[0].replace("-", "_")
        with pytest.raises(ConfigError, match=f"{name}: is for stories; in a chat --max-new-tokens"):
            cli.main(["chat", model, option])
    with pytest.raises(UsageError, match="unknown option -m"):
        cli.main(["chat", model, "-m", "chat"])


def test_the_sampling_options_are_those_of_the_class():
    options = cli.read_sample_options(["-t", "0.5", "-p", "0.7", "--top_k=3", "--seed=9", "--min-p", "0.1"], "x", "")
    assert options.sampling == llamalet.SamplingConfig(temperature=0.5, top_p=0.7, top_k=3, seed=9, min_p=0.1)
    assert cli.read_sample_options([], "x", "").sampling == llamalet.SamplingConfig()


# --- convert ---


@pytest.mark.parametrize(("out", "words"), [("b.bin", []), ("b.bin", ["--dtype=q8"]), ("b.gguf", []), ("b", [])])
def test_convert_writes_what_reads_back_as_the_model(model, tmp_path, capsys, out, words):
    assert cli.main(["convert", model, out, *words]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {out}: " in shown and ("read back" in shown) and "NOT" not in shown
    read = formats.read(formats.kind_of(tmp_path / out), out)
    found = formats.read("bin", model)
    assert read.config == found.config and read.tokenizer.vocab_size == CONFIG.vocab_size
    assert (difference(found.tensors, read.tensors) == 0) == (not words)


def test_convert_to_version_3_keeps_the_width(model, tmp_path):
    assert cli.main(["convert", model, "b.bin", "--version=3"]) == 0
    assert formats.read("bin", "b.bin").stored == {"F32"}


@pytest.mark.parametrize(("out", "words"), [("b.bin", ["--version=2"]), ("b.bin", ["--dtype", "q4"]), ("b.bin", [])])
def test_convert_writes_the_bytes_of_export(model, tmp_path, out, words):
    assert cli.main(["convert", model, out, *words]) == 0
    assert export.main(["other.bin", "--bin", model, *words, "--no-check"]) == 0
    assert (tmp_path / out).read_bytes() == (tmp_path / "other.bin").read_bytes()


def test_convert_takes_the_tokenizer_that_is_named(model, tmp_path):
    tokenizer = (tmp_path / "model.tokenizer.bin").rename(tmp_path / "elsewhere")
    assert cli.main(["convert", model, "b.bin", "-z", str(tokenizer), "--version=3"]) == 0
    assert llamalet.Model.load("b.bin", backend="numpy").tokenizer.vocab_size == CONFIG.vocab_size


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "name the model and the file or folder"),
        (["model.bin"], "name the model and the file or folder"),
        (["model.bin", ""], "OUT='': must not be empty"),
        (["model.bin", "b.onnx"], "out=b.onnx: must end in .bin or .gguf"),
        (["model.bin", "b.bin", "--dtype=q5"], "dtype=q5: must be one of f32, bf16, q8, q4 in a bin"),
        (["model.bin", "b.gguf", "--version=1"], "version=1: only a .bin has versions"),
        (["model.bin", "b.bin", "--version=7"], "version=7: must be one of 0, 1, 2, 3"),
        (["model.bin", "model.bin"], "model.bin: is the model to export, which would be lost"),
        (["model.bin", "b.bin", "--rope_theta=5", "--from", "hf"], "rope_theta, rope_scaling: model.bin says"),
        (["gone.bin", "b.bin"], "gone.bin: no such model file or folder"),
        (["model.bin", "b.bin", "--from=onnx"], "--from=onnx: must be one of checkpoint, hf"),
    ],
)
def test_convert_refuses_what_means_nothing(model, words, complaint):
    with pytest.raises(LlamaletError, match=re.escape(complaint)):
        cli.main(["convert", *words])
