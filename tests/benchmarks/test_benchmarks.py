import json
import multiprocessing
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

from benchmarks import figures, peers, random_models, report, runtime, training
from benchmarks.report import LLAMA2C, LLAMA_CPP, LLAMA_CPP_FLASH, OURS, Key, Results
from benchmarks.shapes import CONTEXT, Shape
from llamalet import model_file
from llamalet.config import Llama3Scaling, ModelConfig, rope_frequencies
from llamalet.errors import ConfigError, UsageError
from llamalet.model_file.header import DTYPES
from llamalet.model_file.quantize import dequantize
from llamalet.reference import NumpyTransformer

CONFIG = ModelConfig.create(
    dim=96, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=320, max_seq_len=CONTEXT
)
STRETCHED = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=512)

LLAMA_BENCH_LINES = """warning: something
{"type_k": "f16", "flash_attn": 0, "n_depth": 0, "n_prompt": 128, "n_gen": 0, "avg_ts": 9558.887226}
{"type_k": "f16", "flash_attn": false, "n_depth": 0, "n_prompt": 0, "n_gen": 64, "avg_ts": 1501.592321}
{"type_k": "f16", "flash_attn": 1, "n_depth": 0, "n_prompt": 512, "n_gen": 0, "avg_ts": 12271.469055}
{"type_k": "f16", "flash_attn": true, "n_depth": 0, "n_prompt": 0, "n_gen": 64, "avg_ts": 1984.008089}
"""
BATCHED_BENCH_LINES = """0.00.004.194 W llama_context: n_ctx is not divisible by n_seq_max
{"flash_attn": 1, "pp": 8, "tg": 32, "pl": 1, "speed_pp": 2791.3, "speed_tg": 1957.306152, "speed": 2081.7}
{"flash_attn": 1, "pp": 8, "tg": 32, "pl": 16, "speed_pp": 7932.1, "speed_tg": 3467.519287, "speed": 3907.4}
"""
CMAKE_CACHE = """// comment
CMAKE_BUILD_TYPE:STRING=Release
CMAKE_CXX_FLAGS:STRING=
CMAKE_CXX_FLAGS_DEBUG:STRING=-g
CMAKE_CXX_FLAGS_RELEASE:STRING=-O3 -DNDEBUG
GGML_NATIVE:BOOL=ON
GGML_BLAS:BOOL=OFF
GGML_CUDA:BOOL=OFF
"""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def program(path: Path, *, out: str = "", err: str = "", code: int = 0) -> str:
    """Write a program that prints what a peer would."""
    lines = [f"#!{sys.executable}", "import sys", f"print({out!r})", f"print({err!r}, file=sys.stderr)"]
    path.write_text("\n".join([*lines, f"sys.exit({code})"]))
    path.chmod(0o755)
    return str(path)


# -- what the peers print ---------------------------------------------------------------------------------------------


def test_llama_bench_lines() -> None:
    assert dict(peers.parse_llama_bench(LLAMA_BENCH_LINES)) == {
        (LLAMA_CPP, "prefill 128"): 9558.887226,
        (LLAMA_CPP, "decode"): 1501.592321,
        (LLAMA_CPP_FLASH, "prefill 512"): 12271.469055,
        (LLAMA_CPP_FLASH, "decode"): 1984.008089,
    }


def test_batched_bench_counts_generated_tokens_only() -> None:
    assert dict(peers.parse_batched_bench(BATCHED_BENCH_LINES)) == {
        (LLAMA_CPP_FLASH, "batch 1"): 1957.306152,
        (LLAMA_CPP_FLASH, "batch 16"): 3467.519287,
    }


def test_cmake_flags() -> None:
    assert peers.cmake_flags(CMAKE_CACHE) == "Release -O3 -DNDEBUG GGML_NATIVE=ON GGML_BLAS=OFF"


def test_llama_cpp_build_finds_the_build_folder(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    bench = program(tmp_path / "bin" / "llama-bench", err="version: 0.5.0\nbuilt with GNU 12.2.0")
    assert peers.llama_cpp_build(bench) == "version: 0.5.0; built with GNU 12.2.0; build flags unknown"
    (tmp_path / "CMakeCache.txt").write_text(CMAKE_CACHE)
    assert peers.llama_cpp_build(bench).endswith("12.2.0; Release -O3 -DNDEBUG GGML_NATIVE=ON GGML_BLAS=OFF")


def test_llama2c_rate_and_build(tmp_path: Path) -> None:
    run = program(tmp_path / "run", out="Once", err="achieved tok/s: 812.500000")
    assert peers.llama2c_decode(run, tmp_path, tmp_path, 2, 8) == {(LLAMA2C, "decode"): 812.5}
    assert "without OpenMP" in peers.llama2c_build(run)
    (tmp_path / "runomp").write_bytes(b"\x7fELF\0libgomp.so.1\0GCC: (Debian 12.2.0-14) 12.2.0\0")
    assert peers.llama2c_build(str(tmp_path / "runomp")).endswith("GCC: (Debian 12.2.0-14) 12.2.0, with OpenMP")


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exit code 3: no such model"):
        peers.llama2c_decode(program(tmp_path / "run", err="no such model", code=3), tmp_path, tmp_path, 1, 8)
    with pytest.raises(UsageError, match="reports no tok/s"):
        peers.llama2c_decode(program(tmp_path / "run", out="Hello"), tmp_path, tmp_path, 1, 8)


def test_a_peer_that_is_another_program_says_so(tmp_path: Path) -> None:
    stranger = program(tmp_path / "run", out="{}", err="unknown option --version", code=2)
    assert peers.llama_cpp_build(stranger) == "version unknown; build flags unknown"
    for build in (peers.llama_cpp_build, peers.llama2c_build):
        with pytest.raises(UsageError, match="missing: cannot be"):
            build(str(tmp_path / "missing"))
    (tmp_path / "text").write_text("no program")
    with pytest.raises(UsageError, match="text: cannot be started: Permission denied"):
        peers.llama_cpp_build(str(tmp_path / "text"))
    other = program(tmp_path / "other", out='{"rows": 1}')
    with pytest.raises(UsageError, match="other: prints no measurements"):
        peers.llama_bench(other, tmp_path, 1, prompts=[8], tokens=1, repeats=1)
    with pytest.raises(UsageError, match="other: prints no measurements"):
        peers.batched_bench(other, tmp_path, 1, batches=[1], tokens=1)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_files_are_sound(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    path = tmp_path / "model.bin"
    random_models.write_llamalet(path, CONFIG, dtype, rng)
    file = model_file.read(path, verify=True)
    assert (file.version, file.dtype, file.config) == (3, dtype, CONFIG)
    weights = dequantize(file.tensors["layers.1.feed_forward.w2"])
    # As large in every type: uniform between +-2 ** -7 and +-2 ** -5, or about it.
    assert 0.01 < weights.std() < 0.03 and abs(weights.mean()) < 0.003 and abs(weights).max() < 0.05
    assert np.isfinite(NumpyTransformer(file).logits([1, 5])).all()


@pytest.mark.parametrize("dtype", ["f32", "q8"])
def test_llama2c_files_have_its_versions(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    random_models.write_llama2c(tmp_path / "model.bin", CONFIG, dtype, rng)
    file = model_file.read(tmp_path / "model.bin")
    assert (file.version, file.config) == (random_models.LLAMA2C_VERSIONS[dtype], CONFIG)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gguf_files_hold_the_same_tensors(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    gguf = pytest.importorskip("gguf")
    random_models.write_gguf(tmp_path / "model.gguf", CONFIG, dtype, rng)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.get_field("llama.attention.head_count_kv").contents() == CONFIG.n_kv_heads
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(list(model_file.tensor_specs(1, CONFIG)))
    w2 = found["blk.1.ffn_down.weight"]
    assert (list(w2.shape), w2.tensor_type.name) == (
        [160, 96],
        random_models.GGUF_TYPES[dtype],
    )  # the row's length first
    assert found["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    weights = gguf.quants.dequantize(w2.data, w2.tensor_type)
    assert 0.01 < weights.std() < 0.03 and abs(weights).max() < 0.05


def test_gguf_carries_rope_scaling(tmp_path: Path, rng: np.random.Generator) -> None:
    gguf = pytest.importorskip("gguf")
    config = ModelConfig.create(
        dim=64, n_layers=1, n_heads=1, hidden_dim=64, vocab_size=64, max_seq_len=64, rope_scaling=STRETCHED
    )
    random_models.write_gguf(tmp_path / "model.gguf", config, "q4", rng)
    factors = next(t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight").data
    plain = config.rope_theta ** (-np.arange(0, 64, 2) / 64)
    assert factors.max() == STRETCHED.factor and factors.min() == 1
    np.testing.assert_allclose(plain / factors, rope_frequencies(config), rtol=1e-6)


# -- ratios -----------------------------------------------------------------------------------------------------------


def filled(rates: dict[tuple[str, str, str, str], list[float]]) -> Results:
    return Results({Key(*key): turns for key, turns in rates.items()})


def test_the_ratio_is_to_the_fastest_rival_by_medians() -> None:
    results = filled(
        {
            ("15M", "f32", "decode", OURS): [900.0, 100.0, 880.0],
            ("15M", "f32", "decode", LLAMA_CPP): [700.0],
            ("15M", "f32", "decode", LLAMA_CPP_FLASH): [720.0],
            ("15M", "f32", "decode", LLAMA2C): [800.0],
        }
    )
    assert results.rival("15M", "f32", "decode") == (LLAMA2C, 800.0)
    assert results.ratio("15M", "f32", "decode") == 1.1
    (check,) = results.checks()
    assert check == ("15M", "f32 decode / llama2.c", 1.1, 1.0, False) and check.met


def test_runq_is_no_rival_of_q8() -> None:
    results = filled({("15M", "q8", "decode", OURS): [2000.0], ("15M", "q8", "decode", LLAMA2C): [800.0]})
    assert results.ratio("15M", "q8", "decode") is None and not list(results.checks())
    results.add(Key("15M", "q8", "decode", LLAMA_CPP), 2000.0)
    (check,) = results.checks()
    assert check.value == 1.0 and not check.met and str(check).endswith("MISSED")


def test_q8_is_held_against_f32_and_its_memory() -> None:
    results = filled(
        {
            ("1B", "f32", "decode", OURS): [10.0],
            ("1B", "q8", "decode", OURS): [29.0],
            ("1B", "f32", "file", OURS): [4e9],
            ("1B", "q8", "file", OURS): [1.1e9],
            ("1B", "q8", "resident", OURS): [1.3e9],
            ("1B", "q8", "cache", OURS): [1e7],
        }
    )
    assert [(check.value, check.met) for check in results.checks()] == [(2.9, False), (0.275, True), (190.0, True)]


def test_the_lines_say_what_is_missing() -> None:
    results = filled({("15M", "q8", "decode", LLAMA_CPP): [2000.0], ("15M", "f32", "decode at 128", OURS): [500.0]})
    results.missing[Key("15M", "q8", "decode")] = "no such kernel"
    text = "\n".join(report.shape_lines(results, "15M", CONFIG, 1))
    assert "not available        2000.0" in text and "not available: no such kernel" in text
    assert "milliseconds per token by position: 2.000 at 128" in text


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(figures, "PASS_REPEATS", 2)
    shape = Shape(config=CONFIG, tokens=8, batch_tokens=2, depths=(0,), depth_tokens=2)
    monkeypatch.setattr(runtime, "SHAPES", {"15M": shape})
    bench = program(tmp_path / "llama-bench", out=LLAMA_BENCH_LINES)
    program(tmp_path / "llama-batched-bench", out=BATCHED_BENCH_LINES)
    run = program(tmp_path / "run", err="achieved tok/s: 0.5")
    options = ["--dtypes=f32", "--turns=2", "--shapes=15M", "--threads=1", f"--out={tmp_path}/out"]
    assert runtime.main([*options, f"--peer-llama-bench={bench}", f"--peer-run={run}"]) == 0
    found = json.loads((tmp_path / "out" / "runtime.json").read_bytes())
    turns = {(row["figure"], row["contender"]): row["turns"] for row in found["figures"]}
    assert turns["decode", LLAMA2C] == [0.5, 0.5] and turns["batch 16", LLAMA_CPP_FLASH] == [3467.519287] * 2
    ours = {figure for figure, contender in turns if contender == OURS}
    assert ours >= {"decode", "read", "decode at 1", "decode at 1024", "prefill 128", "prefill 512", "start", "file"}
    assert all(value > 0 for values in turns.values() for value in values)
    assert turns["decode after 0", LLAMA_CPP_FLASH] == [1984.008089] * 2
    assert found["bars"][0]["what"] == "f32 decode / llama.cpp fa"
    text = capsys.readouterr().out
    assert "sample.py's first word after" in text and "drafts need trained models" in text


PEER_TRAIN = """
import sys, time
assert "--dim=32" in sys.argv and "--compile=True" in sys.argv, sys.argv
for number in range(10**6):
    print(f"{number} | loss 10.4 | lr 1e-4 | 2.50ms | mfu 1.00%")
    time.sleep(0.001)
"""


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers in forks of a process that has imported torch, instead of new processes."""
    server = forked.server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)


@pytest.mark.trains
@pytest.mark.usefixtures("forks")
def test_training_beside_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stories15M.toml").write_text("dim = 32\nn_layers = 1\nn_heads = 2\nmax_seq_len = 16\nbatch_size = 2\n")
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "train.py").write_text(PEER_TRAIN)
    eager = training.Rung(dtype="f32", compile=False)
    monkeypatch.setattr(training, "CONFIGS", tmp_path)
    monkeypatch.setattr(training, "VOCABULARY", 300)
    monkeypatch.setattr(training, "rungs", lambda device: {"eager": eager, training.TRAINED: eager})
    out = tmp_path / "out"
    options = ["--device=cpu", "--batch-size=2", "--turns=2", "--steps=1", "--threads=1", "--peak-tflops=0.1"]
    assert training.main([*options, f"--out={out}", f"--peer-train={tmp_path / 'peer'}"]) == 0
    found = json.loads((out / "training.json").read_bytes())
    figures = {(row["contender"], row["figure"]): row["turns"] for row in found["figures"]}
    assert figures[training.PEER, "step"] == [2.5, 2.5]
    assert all(len(turns) == 2 and min(turns) >= 0 for turns in figures.values())
    ours = {figure for contender, figure in figures if contender == training.TRAINED}
    assert ours == {"step", "forward", "memory", "compile"} and not found["missing"]
    text = capsys.readouterr().out
    assert "2 x 16 tokens a step" in text and "ratio: tokens/s against llama2.c's train.py" in text
    assert (out / "training.png").stat().st_size > 1000


@pytest.mark.trains
@pytest.mark.usefixtures("forks")
def test_a_trainer_that_fails_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = {"broken": training.Rung(dtype="f32", compile=False), "eager": training.Rung(dtype="f32", compile=False)}
    sound = training.ours
    monkeypatch.setattr(training, "VOCABULARY", 300)
    monkeypatch.setattr(training, "rungs", lambda device: rungs)

    def ours(options, rung, device, steps):
        return sound(options | ({"n_heads": 7} if rung is rungs["broken"] else {}), rung, device, steps)

    monkeypatch.setattr(training, "ours", ours)
    shape = {"dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 16, "batch_size": 2}
    results, config = Results(), training.TrainingBenchConfig(turns=1, steps=1)
    training.measure(config, "15M", shape, torch.device("cpu"), 1, tmp_path, results)
    assert [key.contender for key in training.contenders_of(results, "15M")] == ["eager"]
    ((key, reason),) = results.missing.items()
    assert key.contender == "broken" and "ConfigError" in reason and "n_heads" in reason


def test_each_shape_is_that_of_its_configuration() -> None:
    config, gpu, cpu = training.TrainingBenchConfig(shapes="15M,110M"), torch.device("cuda"), torch.device("cpu")
    assert config.shape("110M", gpu) == dict(dim=768, n_layers=12, n_heads=12, max_seq_len=1024, batch_size=16)
    assert [config.shape(name, cpu)["batch_size"] for name in ("15M", "110M")] == [8, 2]
    with pytest.raises(ConfigError) as caught:
        training.TrainingBenchConfig(shapes="15M,7B", turns=0, peer_train="/no/peer")
    assert all(part in str(caught.value) for part in ("shapes=7B", "turns=0", "peer_train=/no/peer"))


def test_options_are_checked_together() -> None:
    with pytest.raises(ConfigError) as caught:
        runtime.RuntimeBenchConfig(shapes="15M,7B", dtypes="q5", figures="speed", turns=0, tokens=1, peer_run="/no/run")
    text = str(caught.value)
    assert all(part in text for part in ("shapes=7B", "dtypes=q5", "figures=speed", "turns=0", "tokens=1", "peer_run="))


def test_large_shapes_leave_out_float32_unless_asked() -> None:
    assert runtime.RuntimeBenchConfig().shape("1B").dtypes == ("q8", "q4")
    assert runtime.RuntimeBenchConfig(dtypes="f32, q8").shape("1B").dtypes == ("f32", "q8")


def test_bandwidth_reads_everything_each_time() -> None:
    memory = np.arange(1000, dtype=np.float32)
    assert figures._sum(memory, 1) == memory.sum()
    assert figures._sum(memory, 3) == memory.sum() + memory[1:].sum() + memory[2:].sum()
    assert figures.read_bandwidth(1 << 16, 2) > 0
