"""The figures beyond decoding and prompts: depths, passes, caches, sampling, drafts, and ik_llama.cpp."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from toy import SMALL_MODELS, toy_data, toy_model

from benchmarks import drafts, figures, peers, random_models, report, runtime
from benchmarks.figures import Contest
from benchmarks.report import (
    ANY_DTYPE,
    CACHES,
    DRAFT_MODEL,
    DRAFTS,
    IK_LLAMA_CPP,
    LLAMA_CPP,
    LLAMA_CPP_FLASH,
    LLAMA_CPP_Q8_CACHE,
    LOOKUP,
    NUMPY,
    OURS,
    PLAIN,
    Key,
    Results,
)  # fmt: skip
from benchmarks.shapes import SHAPES, Shape
from llamalet import model_file
from llamalet.config import ModelConfig
from llamalet.drafting import Lookup
from llamalet.errors import ConfigError, DataError
from llamalet.kernels.transformer import Transformer
from llamalet.runtime import Model

CAPTURED = Path(__file__).parent / "captured"
CONFIG = ModelConfig.create(
    dim=96, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=320, max_seq_len=640
)
SHAPE = Shape(config=CONFIG, tokens=8, depths=(0, 64), depth_tokens=2)


def program(path: Path, lines: str) -> str:
    """Write a Python program that stands for a peer."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{lines}")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    """A contest with a small q8 model."""
    folder = tmp_path_factory.mktemp("contest")
    contest = Contest("110M", SHAPE, "q8", folder, folder / "tokenizer.bin", threads=1, transformer=None)
    random_models.write_llamalet(contest.file("bin"), CONFIG, "q8", np.random.default_rng(0))
    return contest


@pytest.fixture(scope="module")
def transformer(contest: Contest) -> Transformer:
    return Transformer(model_file.read(contest.file("bin")), threads=1)


# -- what the peers print ---------------------------------------------------------------------------------------------


def test_llama_bench_after_many_positions_tells_caches_apart() -> None:
    lines = (CAPTURED / "llama-bench-depths.jsonl").read_text()
    assert dict(peers.parse_llama_bench_after(lines)) == {
        (LLAMA_CPP, "prefill 128 after 256"): 76.465335,
        (LLAMA_CPP, "decode after 256"): 2.414837,
        (LLAMA_CPP_FLASH, "prefill 128 after 256"): 151.096623,
        (LLAMA_CPP_FLASH, "decode after 256"): 1.706767,
        (LLAMA_CPP_Q8_CACHE, "decode after 0"): 1.523477,
        (LLAMA_CPP_Q8_CACHE, "decode after 256"): 1.816282,
    }


def test_llama_bench_is_asked_for_caches_of_8_bits_only_where_it_has_them(tmp_path: Path) -> None:
    rows = 'print(\'{"type_k": "f16", "flash_attn": 1, "n_prompt": 0, "n_depth": 64, "avg_ts": 5.5}\')'
    note = f"open({str(tmp_path / 'words')!r}, 'a').write(' '.join(sys.argv) + '\\n')"
    bench = program(tmp_path / "bench", f"{note}\n{rows}")
    for q8 in (False, True):
        found = peers.llama_bench_after(bench, tmp_path, 2, depth=64, prompt=0, tokens=3, q8=q8)
        assert found == {(LLAMA_CPP_FLASH, "decode after 64"): 5.5}
    calls = (tmp_path / "words").read_text().splitlines()
    assert ["-ctk q8_0 -ctv q8_0" in call for call in calls] == [False, False, True]
    assert all("-p 0 -n 3 -d 64 -r 1" in call for call in calls)


def test_the_fastest_setting_of_ik_llama_cpp_counts(tmp_path: Path) -> None:
    captured = (CAPTURED / "ik-llama-bench.json").read_text()
    rows = json.loads(captured)
    best = {name: max(row["avg_ts"] for row in rows if row["test"] == name) for name in ("pp16", "tg2")}
    expected = {(IK_LLAMA_CPP, "prefill 16"): best["pp16"], (IK_LLAMA_CPP, "decode"): best["tg2"]}
    assert len(rows) == 4 and dict(peers.parse_ik_llama_bench(f"{captured}\nwarning: [something]")) == expected
    faster = [row | {"avg_ts": 1000.0} for row in rows if row["test"] == "tg2"]  # with -rtr 1
    lines = f"print({json.dumps(faster)!r} if sys.argv[sys.argv.index('-rtr') + 1] == '1' else {captured!r})"
    found = peers.ik_llama_bench(program(tmp_path / "ik", lines), tmp_path, 1, prompts=[16], tokens=2, repeats=1)
    assert found == expected | {(IK_LLAMA_CPP, "decode"): 1000.0}


def test_a_peer_that_crashes_costs_the_other_figures_nothing(contest: Contest, tmp_path: Path) -> None:
    crash = program(tmp_path / "llama-bench", "sys.exit('no AMX' if '-d' in sys.argv else 0)")
    ik = program(tmp_path / "ik", f"print({(CAPTURED / 'ik-llama-bench.json').read_text()!r})")
    config = runtime.RuntimeBenchConfig(peer_llama_bench=crash, peer_ik_bench=ik, figures="decode,depths")
    results = Results()
    found = dict(runtime.peer_turns(config, contest, results))
    assert list(found) == [Key("110M", "q8", "prefill 16", IK_LLAMA_CPP), Key("110M", "q8", "decode", IK_LLAMA_CPP)]
    reasons = list(results.missing.values())
    assert [text.split(":")[0] for text in reasons] == ["llama-bench after 0", "llama-bench after 64"]
    assert "no AMX" in reasons[0]


# -- ratios -----------------------------------------------------------------------------------------------------------


def filled(rates: dict[tuple[str, str, str, str], float]) -> Results:
    return Results({Key(*key): [value] for key, value in rates.items()})


def test_the_better_small_cache_is_held_against_the_best_of_llama_cpp() -> None:
    at = "decode after 4096"
    results = filled(
        {
            ("110M", "q8", at, CACHES["f32"]): 99.0,
            ("110M", "q8", at, CACHES["bf16"]): 14.0,
            ("110M", "q8", at, CACHES["q8"]): 18.0,
            ("110M", "q8", at, LLAMA_CPP): 9.0,
            ("110M", "q8", at, LLAMA_CPP_FLASH): 8.0,
            ("110M", "q8", at, LLAMA_CPP_Q8_CACHE): 10.0,
        }
    )
    small, bf16 = results.checks()
    assert (small.value, small.bar, small.met) == (1.8, 1.7, True) and "kv q8 / llama.cpp" in small.what
    assert (bf16.value, bf16.bar, bf16.met) == (1.4, 1.35, True)
    head, line = report._depth_lines(results, "110M")
    assert head.split()[-4:] == ["ratio", "bar", "bf16", "bar"]
    assert line.split() == "q8 4096 99.0 14.0 18.0 9.0 8.0 10.0 1.80 1.70 met 1.40 1.35 met".split()


def test_ik_llama_cpp_has_bars_of_its_own() -> None:
    results = filled(
        {
            ("110M", "q4", "decode", OURS): 21.0,
            ("110M", "q4", "decode", LLAMA_CPP): 10.0,
            ("110M", "q4", "decode", IK_LLAMA_CPP): 20.0,
        }
    )
    assert [(check.what, check.value, check.met) for check in results.checks()] == [
        ("q4 decode / llama.cpp", 2.1, True),
        ("q4 decode / ik_llama.cpp", 1.05, False),
    ]
    lines = list(report.shape_lines(results, "110M", CONFIG, 1))
    assert lines[1].split()[-4:] == ["bar", "/", "ik", "bar"]
    assert lines[2].split()[-6:] == ["2.10", "1.25", "met", "1.05", "1.10", "MISSED"]


def test_what_may_be_at_most_a_bar() -> None:
    results = filled(
        {
            ("15M", "f32", "pass of 1", OURS): 2.0,
            ("15M", "f32", "pass of 4", OURS): 2.5,
            ("15M", "f32", "pass of 8", OURS): 3.5,
            ("1B", ANY_DTYPE, "cache", CACHES["f32"]): 100.0,
            ("1B", ANY_DTYPE, "cache", CACHES["bf16"]): 50.0,
            ("1B", ANY_DTYPE, "cache", CACHES["q8"]): 28.0,
            ("1B", ANY_DTYPE, "sampling peaked", OURS): 119e-6,
            ("1B", ANY_DTYPE, "sampling peaked", NUMPY): 3e-3,
        }
    )
    found = [(check.value, check.bar, check.met) for check in results.checks()]
    assert found == [
        (1.25, 1.3, True), (1.75, 1.6, False), (0.5, 0.5, True), (0.28, 0.27, False), (119.0, 120.0, True)
    ]  # fmt: skip
    text = "\n".join(report.shape_lines(results, "1B", CONFIG, 1))
    assert "sampling peaked logits takes 119.0 microseconds, in numpy 3000" in text
    assert "caches of 8192 positions: f32 0.0 MB, bf16 0.0 MB, q8 0.0 MB" in text


# -- our own figures --------------------------------------------------------------------------------------------------


def test_decoding_after_many_positions(
    contest: Contest, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "PROMPT_DEPTH", 64)
    seen: list[tuple[str, int]] = []
    decode = transformer.decode
    monkeypatch.setattr(
        transformer, "decode", lambda cache, token: seen.append((cache.kind, cache.length)) or decode(cache, token)
    )
    found = dict(figures.measure_depths(contest, transformer))
    depths = [contest.key(f"decode after {depth}", CACHES[kind]) for kind in CACHES for depth in (0, 64)]
    assert set(found) == {*depths, contest.key("prefill 512 after 64")} and min(found.values()) > 0
    assert set(seen) == {(kind, length) for kind in CACHES for length in (0, 1, 64, 65)}


def test_the_depths_fit_into_the_context() -> None:
    for shape in SHAPES.values():
        assert max(shape.depths) + shape.depth_tokens <= shape.config.max_seq_len
        assert not figures.late_prompt(shape) or figures.PROMPT_DEPTH + figures.LATE_PROMPT <= shape.config.max_seq_len


def test_passes_start_at_one_position(
    contest: Contest, transformer: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "PASS_REPEATS", 2)
    seen: list[tuple[int, int]] = []
    extend = transformer.extend
    monkeypatch.setattr(
        transformer, "extend", lambda cache, ids: seen.append((cache.length, len(ids))) or extend(cache, ids)
    )
    found = dict(figures.measure_passes(contest, transformer))
    assert [key.figure for key in found] == ["pass of 1", "pass of 4", "pass of 8"] and min(found.values()) > 0
    assert seen == [(16, 4), (16, 8)] * 2


def test_choosing_tokens_and_bytes_of_caches() -> None:
    found = dict(figures.measure_sampling("15M", SHAPE))
    assert {(key.figure, key.contender) for key in found} == {
        (f"sampling {kind}", contender) for kind in ("peaked", "spread", "flat") for contender in (OURS, NUMPY)
    }
    assert all(0 < value < 0.1 for value in found.values())
    sizes = [value for _, value in figures.count_cache_bytes("110M", SHAPES["110M"])]
    assert sizes == [603979776, 301989888, 603979776 * 0.265625]


# -- drafts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short texts."""
    sizes = {"N_PROMPTS": 2, "NEW_TOKENS": 6, "PROMPT_TOKENS": 5, "PASSAGE_TOKENS": 6, "BEGUN_TOKENS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(drafts, name, value)


@pytest.mark.usefixtures("few")
def test_stories_with_and_without_drafts(tmp_path: Path) -> None:
    config = SMALL_MODELS["gqa-tied"]
    target, data = toy_model(tmp_path, config), toy_data(tmp_path / "data", config.vocab_size)
    small = toy_model(tmp_path, config, name="small")  # the same weights: all that it proposes is kept
    results = Results()
    drafts.measure(str(target), str(small), str(data), 1, results)
    found = {(key.figure, key.contender) for key in results.turns if not key.figure.endswith("kept")}
    stories, repeats = ([f"{kind}, T={n}" for n in (0, 1)] for kind in ("stories", "repeats"))
    assert found == {
        *((figure, name) for figure in stories for name in (PLAIN, LOOKUP, DRAFT_MODEL)),
        *((figure, name) for figure in repeats for name in (PLAIN, LOOKUP)),
    }
    assert results.turns[Key(DRAFTS, ANY_DTYPE, "stories, T=1, kept", DRAFT_MODEL)] == [1.0]
    text = "\n".join(report.draft_lines(results))
    assert "100% of its proposals kept" in text and "repeats, T=0" in text
    assert len([check for check in results.checks() if check.shape == DRAFTS]) == 6


def test_the_prompts_of_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(toy_model(tmp_path, SMALL_MODELS["gqa-tied"]), threads=1, backend="numpy")
    fixed = list(drafts.story_tokens(model, None))
    assert len(fixed) == drafts.N_PROMPTS == len({tuple(tokens) for tokens in fixed})
    assert all(tokens[0] == 1 and len(tokens) > drafts.PASSAGE_TOKENS for tokens in fixed)
    monkeypatch.setattr(drafts, "PASSAGE_TOKENS", 3)
    assert drafts.repeating([1, 5, 6, 7, 8])[:11] == [1, 5, 6, 7, 5, 6, 7, 5, 6, 7, 5]
    data = str(toy_data(tmp_path / "data", 300))
    with pytest.raises(DataError, match="14 stories of over 3 tokens, need 50"):
        list(drafts.story_tokens(model, data))
    other = toy_data(tmp_path / "other", 310)
    with pytest.raises(ConfigError, match="has another vocabulary"):
        next(drafts.story_tokens(model, str(other)))


@pytest.mark.usefixtures("few")
def test_a_draft_that_changes_a_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(toy_model(tmp_path, SMALL_MODELS["gqa-tied"]), threads=1, backend="numpy")
    generate = drafts.generate

    def wrong(model, prompt, draft, temperature, seed):
        return generate(model, prompt, draft, temperature, seed)[draft is not None :]

    monkeypatch.setattr(drafts, "generate", wrong)
    with pytest.raises(AssertionError, match="text 0 at temperature 0 is another with lookup"):
        list(drafts.measure_texts(model, [[1, 5, 6]], {LOOKUP: Lookup()}, 0.0))


def test_drafts_need_a_target() -> None:
    with pytest.raises(ConfigError, match="draft=small.bin: needs draft_target"):
        runtime.RuntimeBenchConfig(draft="small.bin")
    results = Results()
    drafts.measure(None, None, None, 1, results)
    assert list(report.draft_lines(results)) == [
        "  not available: drafts need trained models: --draft-target=PATH --draft=PATH"
    ]
