import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy import SMALL_MODELS, toy_model, toy_tokenizer

import sample
from llamalet import Model, command, errors, kv_cache, model_options
from llamalet.sampler import Sampler
from llamalet.tokenizer import Tokenizer, pack

CONFIG = SMALL_MODELS["gqa-tied"]  # vocabulary 300, context 32

ONCE = "Once upon a time, there was a little girl named Lily."
LILY = (
    ONCE + " She loved to play outside in the park. One day, she saw a big, red ball. She wanted to play with it, but "
    "it was too high.\nLily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She "
    "said, \"I want to play with your ball, but I can't find it.\"\nLily was sad and didn't know what to do. She said, "
    "\"I'm sorry, Lily. I didn't know what to do.\"\nLily didn't want to help her mom, so she\n"
)
LILY_SEED_42 = (
    ONCE + " She loved to play outside in the sun. One day, her mom asked her to teach him a nice way to play in the "
    "sun. Lily was so excited to go outside and jump in the sky. \nAs she walked, she saw a tall toy car that was much "
    'carrots. The toys asked her to buy some cars and Lily all nicely. The car was curious and said, "What\'s wrong?" '
    'Lily said, "I am sorry, I want to help you." \nThey both ate the cards and toys and had a brilliant, bunnys. They '
    "put the car and ate the ball together. Lily was happy that the ball could read\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder) -> Path:
    return toy_model(folder, CONFIG)


def tell(capsys, *words: object) -> tuple[str, str]:
    assert sample.main(["--backend=numpy", *map(str, words)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def refuse(capsys, *words: object) -> str:
    """Run as from the shell; return the one line of the refusal."""
    argv, sys.argv = sys.argv, ["sample.py", "--backend=numpy", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as caught:
            command.run(sample.main)
    finally:
        sys.argv = argv
    captured = capsys.readouterr()
    assert caught.value.code not in (0, None)
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0]
    return lines[0]


# --- the story ---


def test_the_text_is_all_that_goes_to_stdout(model, capsys):
    out, err = tell(capsys, model, "-i", "a band", "-s", 5, "-n", 20)
    text = "".join(Model.load(model, backend="numpy").generate("a band", seed=5, max_new_tokens=20 - 3))
    ids = toy_tokenizer().encode("a band", bos=True)
    assert len(ids) == 4
    assert out == "a band" + text + "\n"
    assert f"model {model}" in err and "seed 5" in err
    assert re.search(r"loaded in \d+\.\d+ s", err)
    assert re.search(r"prompt: 4 tokens, [\d.]+ tokens/s; story: 16 tokens, [\d.]+ tokens/s", err)


def test_a_draft_tells_the_same_story(model, capsys):
    words = (model, "-s", 5, "-n", 30, "-i", "a band")
    plain = tell(capsys, *words)[0]
    for draft in ("lookup", model):
        out, err = tell(capsys, *words, f"--draft={draft}")
        assert out == plain and re.search(r"; \d+ of \d+ drafted tokens kept", err)
    assert "draft is for a single story" in refuse(capsys, model, "--draft=lookup", "--num-samples=2")
    assert "nowhere.bin" in refuse(capsys, model, "--draft=nowhere.bin")
    assert "draft" in refuse(capsys, model, "--draft=lookup", "-m", "chat")


def test_short_and_long_flags_are_the_same(model, capsys):
    short = tell(capsys, model, "-t", 0.7, "-p", 0.8, "-s", 9, "-n", 12, "-i", "and", "-m", "generate")[0]
    long = ["--temperature=0.7", "--top-p", 0.8, "--seed=9", "--steps=12", "--prompt=and"]
    assert short == tell(capsys, f"--checkpoint={model}", *long)[0]
    tokenizer = model.with_name("model.tokenizer.bin").rename(model.with_name("other"))
    assert short == tell(capsys, model, "-t", 0.7, "-p", 0.8, "-s", 9, "-n", 12, "-i", "and", "-z", tokenizer)[0]


def test_every_filter_reaches_the_sampler(model, capsys):
    plain = tell(capsys, model, "-s", 1, "-p", 1)[0]
    greedy = tell(capsys, model, "-s", 1, "-t", 0)[0]
    for words in (["--top-k=1", "-p", 1], ["--min-p=1", "-p", 1], ["-p", 1e-6]):
        assert tell(capsys, model, "-s", 1, *words)[0] == greedy != plain


def test_a_random_seed_is_printed_and_tells_the_story_again(model, capsys):
    out, err = tell(capsys, model)
    seed = re.search(r"^seed (\d+)$", err, re.MULTILINE)
    assert seed and out == tell(capsys, model, "-s", seed[1])[0]
    assert tell(capsys, model, "-s", -1)[1] != tell(capsys, model, "--seed=-1")[1]


def test_several_stories_have_seeds_of_their_own(model, capsys):
    out, err = tell(capsys, model, "--num-samples=3", "-s", 11, "-i", "a")
    alone = [tell(capsys, model, "-s", seed, "-i", "a")[0] for seed in (11, 12, 13)]
    assert out == "\n".join(alone)
    assert re.findall(r"^seed (\d+)$", err, re.MULTILINE) == ["11", "12", "13"]


@pytest.mark.slow
def test_more_stories_than_a_batch_holds_come_in_their_order(model, capsys):
    out, err = tell(capsys, model, "--num-samples=70", "-s", 3, "-i", "a")
    alone = [tell(capsys, model, "-s", seed, "-i", "a")[0] for seed in range(3, 73)]
    assert out == "\n".join(alone)
    assert re.findall(r"^seed (\d+)$", err, re.MULTILINE) == [str(seed) for seed in range(3, 73)]
    assert re.search(r"^70 stories: [1-9]\d+ tokens, [\d.]+ tokens/s$", err, re.MULTILINE)


@pytest.mark.parametrize("words", [["-n", 0], ["-n", 0, "--num-samples=3"]])
def test_ctrl_c_keeps_the_text(model, capsys, monkeypatch, words):
    n_samples = 3 if len(words) > 2 else 1
    whole = [tell(capsys, model, "-t", 0, "-n", 0, "--ignore-eos", "-i", "a")[0].strip("\n")] * n_samples
    passes = iter(range(9 * n_samples))
    draw = Sampler.sample

    def interrupted(self, logits):
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return draw(self, logits)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main(["--backend=numpy", str(model), "-t", "0", "--ignore-eos", "-i", "a", *map(str, words)])
    out, err = capsys.readouterr()
    assert out.endswith("\n") and err.endswith("tokens/s\n")
    stories = out.rstrip("\n").split("\n\n")
    assert len(stories) == n_samples
    for story, full in zip(stories, whole, strict=True):
        assert 1 < len(story) < len(full) and full.startswith(story)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_an_endless_story_ends_at_ctrl_c(model):
    words = [sys.executable, sample.__file__, model, "--backend=numpy", "-n", "0", "--overflow=roll", "--ignore-eos"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as program:
        begun = program.stdout.read(500)  # more than the context of 32 tokens could spell
        program.send_signal(signal.SIGINT)
        rest, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert len(begun) == 500 and rest.endswith("\n")
    assert err.splitlines()[-1] == "error: stopped by Ctrl-C"
    assert re.search(r"story: \d+ tokens, [\d.]+ tokens/s", err)


@pytest.mark.parametrize(
    ("words", "n_new"),
    [
        (["-n", 6], 3),  # 4 of the prompt, and the last of them already gives a new one
        (["-n", 4], 1),
        (["-n", 0], 29),
        (["-n", 999], 29),
        ([], 29),
        (["--max-new-tokens", 6], 6),
        (["--max-new-tokens=999"], 29),
        (["--overflow=roll"], 253),
        (["--overflow=roll", "-n", 6], 3),
        (["--overflow=roll", "--max-new-tokens=99", "--keep=0"], 99),
    ],
)
def test_lengths(model, capsys, words, n_new):
    err = tell(capsys, model, "-i", "a band", "--ignore-eos", "-s", 2, *words)[1]
    story = f"; story: {n_new - 1} tokens"
    assert story in err if n_new > 1 else "story" not in err


def test_ignore_eos_goes_on(model, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "stop_ids", frozenset(range(300)))
    out, err = tell(capsys, model, "-i", "a")
    assert out == "a\n" and "no tokens" in err
    assert "story: 30 tokens" in tell(capsys, model, "-i", "a", "--ignore-eos")[1]


def test_a_prompt_from_stdin(model, capsys, monkeypatch):
    out = []
    for end in ("", "\n"):  # echo's line end is no part of the prompt
        monkeypatch.setattr(sys, "stdin", io.StringIO("a band\n and" + end))
        out.append(tell(capsys, model, "-i", "-", "-n", 15, "-s", 3)[0])
    assert out[0] == out[1] and out[0].startswith("a band\n and")


def test_a_prompt_that_is_no_text_is_refused_before_a_model_is_sought(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="latin-1"))
    with pytest.raises(errors.UsageError, match="-i -: stdin is not text in UTF-8"):
        sample.main(["gone.bin", "-i", "-"])
    with pytest.raises(errors.UsageError, match="-i=.*not valid UTF-8"):
        sample.main(["gone.bin", "-i", "caf\udce9"])


def test_no_prompt_has_no_stray_space(model, capsys):
    for seed in range(5):
        assert not tell(capsys, model, "-s", seed, "-n", 1)[0].startswith("  ")


# --- which model ---


def test_the_newest_model_under_out_is_told(folder, capsys):
    (folder / "out" / "run").mkdir(parents=True)
    old = toy_model(folder / "out", CONFIG, name="old")
    new = toy_model(folder / "out" / "run", CONFIG, name="new")
    os.utime(old, (1_000_000_000, 1_000_000_000))
    os.utime(new, (1_100_000_000, 1_100_000_000))
    err = tell(capsys, "-n", 3)[1]
    assert "out/run/new.bin of 2004-11-09" in err and "old.bin" not in err


def test_the_demo_model_is_told(folder, capsys, monkeypatch):
    demo = toy_model(folder, CONFIG, name="demo")
    monkeypatch.setattr(model_options, "DEMO_MODEL", demo)
    assert f"the demo model {demo}" in tell(capsys, "-n", 3)[1]


# --- what people get wrong ---


def test_wrong_words_end_in_one_line(model, capsys):
    assert "did you mean --temperature" in refuse(capsys, model, "--temprature=1")
    assert "the prompt is -i" in refuse(capsys, model, "-p", "Once upon a time")
    assert "-n counts the prompt and --max-new-tokens does not" in refuse(capsys, model, "-n", 5, "--max-new-tokens=5")
    assert "unexpected argument" in refuse(capsys, model, "Once upon a time")
    assert "not a chat model" in refuse(capsys, model, "-m", "chat")
    assert "system_prompt: is for chats; use llamalet chat, or add -m chat" in refuse(
        capsys, model, "-y", "You are a pirate"
    )
    assert "steps: is for stories" in refuse(capsys, model, "-m", "chat", "-n", 5)
    assert "-m=poem: must be one of generate, chat" in refuse(capsys, model, "-m", "poem")
    assert "backend" in refuse(capsys, model, "--backend=gpu")
    assert "needs a value" in refuse(capsys, model, "--top-k")
    assert "overflow" in refuse(capsys, model, "--overflow=spill")
    assert "keep=32: a context of 32 positions" in refuse(capsys, model, "--overflow=roll", "--keep=32")
    endless = ["-n", 0, "--overflow=roll", "--ignore-eos", "--num-samples=2"]
    assert "the first story would never end" in refuse(capsys, model, *endless)
    assert "MODEL=''" in refuse(capsys, "")
    line = refuse(
        capsys, model, "-t", -1, "-p", 2, "--top-k=-3", "--min-p=7", "-s", -9, "--num-samples=0", "-n", -1, "--keep=-1"
    )
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "num_samples", "steps", "keep"):
        assert name in line


def test_wrong_files_end_in_one_line(model, folder, capsys):
    assert "missing.bin: no such model file" in refuse(capsys, folder / "missing.bin")
    (folder / "torn.bin").write_bytes(model.read_bytes()[:-100])
    (folder / "torn.tokenizer.bin").write_bytes((folder / "model.tokenizer.bin").read_bytes())
    assert "torn.bin" in refuse(capsys, folder / "torn.bin")
    (folder / "empty.bin").touch()
    assert "empty.bin" in refuse(capsys, folder / "empty.bin")
    assert "is it a model?" in refuse(capsys, model, "-z", model) or "tokenizer" in refuse(capsys, model, "-z", model)
    assert "no such tokenizer file" in refuse(capsys, model, "-z", folder / "missing")
    (folder / "long.bin").write_bytes(pack(toy_tokenizer(301).pieces()))
    assert "301 entries where the model has vocab_size=300" in refuse(capsys, model, "-z", folder / "long.bin")
    (folder / "run").mkdir()
    assert "neither a checkpoint" in refuse(capsys, folder / "run")
    shutil.copy(model, folder / "alone.bin")
    assert "no tokenizer beside it" in refuse(capsys, folder / "alone.bin")


def test_prompts_that_do_not_fit_end_in_one_line(model, capsys):
    assert "the model takes 1 to 32" in refuse(capsys, model, "-i", "a band " * 30, "-n", 0)
    assert tell(capsys, model, "-i", "a band " * 30, "--max-new-tokens=2", "--overflow=roll")[0].startswith("a band a")
    assert "the prompt has 4 tokens, more than the 3 positions" in refuse(capsys, model, "-i", "a band", "-n", 3)
    assert "not valid UTF-8" in refuse(capsys, model, "-i", "a\udcff")


def test_a_cache_without_room_ends_in_one_line(model, capsys, monkeypatch):
    monkeypatch.setattr(kv_cache, "free_memory", lambda: 1000)
    with pytest.raises(errors.UsageError, match=r"a KV cache of 32 positions takes 0 MB, and 0 MB of memory are free"):
        sample.main(["--backend=numpy", str(model)])


def test_help_lists_the_options_and_advises(capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "temperature or top-p, not both" in " ".join(out.split())
    for flag in ("-t", "-p", "-s", "-n", "-i", "-z", "-m", "-y", "--min-p", "--max-new-tokens", "--num-samples"):
        assert flag in out


# --- llama2.c's own model ---


@pytest.fixture
def stories260k(shared_data) -> list[str]:
    return [str(shared_data / "stories260K.bin"), "-z", str(shared_data / "tok512.bin")]


def test_llama2c_tells_this_story_at_temperature_0(stories260k, capsys):
    assert tell(capsys, *stories260k, "-t", 0, "-n", 200)[0] == LILY


def test_llama2c_draws_this_story(stories260k, capsys):
    assert tell(capsys, *stories260k, "-t", 1.0, "-p", 0.9, "-s", 42)[0] == LILY_SEED_42


def test_a_context_that_is_too_short_for_n_is_named(model, capsys):
    _, err = tell(capsys, model, "-n", 1000, "--ignore-eos", "-s", 1)
    assert "room for" in err and "--overflow=roll" in err
    _, err = tell(capsys, model, "-n", 8, "-s", 1)
    assert "room for" not in err


@pytest.mark.parametrize("words", [["--keep=7"], ["--num-samples=100000000000"]])
def test_options_that_would_do_nothing_or_never_end_are_refused(capsys, model, words):
    with pytest.raises(errors.ConfigError, match="keep=7|num_samples=100000000000"):
        tell(capsys, model, *words)
