"""The training half from end to end, on models of a few thousand parameters."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from torch import nn
from toy import SMALL_MODELS, toy_data, toy_state, toy_tokenizer

import train
from configurator import parse
from llamalet import model_file
from llamalet.errors import CheckpointError, ConfigError, DataError, DiskError, UsageError
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.model_file.checkpoint import find_best, find_latest, list_steps, newest_best
from llamalet.shards import Shards
from llamalet.tokenizer import BOS_ID, write_bin
from model import Llama
from training.batches import Windows
from training.config import TrainConfig, with_defaults
from training.optimizer import Muon, Optimizer, clip_gradients
from training.run import checkpoint, run_folder
from training.schedule import learning_rate
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
VOCAB = 300
SMALL = [
    "--dim=32", "--n_layers=2", "--n_heads=2", "--max_seq_len=32", "--batch_size=2", "--max_iters=4",
    "--warmup_iters=1", "--eval_interval=2", "--eval_iters=2", "--log_interval=1", "--learning_rate=1e-2",
    "--compile=False", "--threads=1",
]  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_data(tmp_path / "data" / "toy", VOCAB)
    return tmp_path


WANDB = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def run(*argv: str, processes: int = 1, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run train.py as people do, through torchrun if in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | WANDB
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *argv]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def weights_of(run_dir: Path, step: int) -> str:
    path = run_dir / "checkpoints" / f"step-{step:08d}" / MODEL_SAFETENSORS
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("kind", "reached"), [("adamw", 2.0), ("muon", 0.5)])
def test_one_batch_is_overfitted_in_ten_steps(kind, reached):
    torch.manual_seed(0)
    config = SMALL_MODELS["gqa-tied"]
    model = Llama(config)
    optimizer = Optimizer(model, kind=kind, rate=2e-2, betas=(0.9, 0.95), weight_decay=0.0, dtype=torch.float32)
    tokens = torch.randint(0, config.vocab_size, (1, 17))
    losses = []
    for _ in range(11):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        losses.append(loss.item())
        loss.backward()
        optimizer.step(2e-2)
    assert losses[0] == pytest.approx(5.7, abs=0.3)  # ln 300: nothing known yet
    assert losses[10] < reached


@pytest.mark.parametrize("largest", [0.5, 5.0, 0.0])
def test_clipping_is_torchs_clipping(largest):
    gradients = torch.arange(4.0), torch.tensor([[1.0]])  # norm sqrt(15)
    ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2))
    for ours_one, theirs_one, gradient in zip(ours, theirs, gradients, strict=True):
        ours_one.grad, theirs_one.grad = gradient.clone(), gradient.clone()
    unused = nn.Parameter(torch.zeros(2))
    norm = clip_gradients([*ours, unused], largest)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, largest or math.inf), rtol=0, atol=0)
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        assert torch.equal(ours_one.grad, theirs_one.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_muon_is_torchs_muon_bit_for_bit(dtype, monkeypatch):
    # torch's multiplies in bfloat16 only, so it is made to take its own word for another type.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.to(dtype, copy=True))
    generator = torch.Generator().manual_seed(0)
    shapes = (24, 16), (16, 24), (16, 16)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = (
        Muon(ours, rate=1e-2, weight_decay=0.1, dtype=dtype),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(ours, theirs, starts, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, start)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_goes_on_where_it_stopped(kind):
    config = SMALL_MODELS["gqa-untied"]
    tokens = torch.randint(0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))

    def fresh() -> tuple[Llama, Optimizer]:
        torch.manual_seed(0)
        model = Llama(config)
        return model, Optimizer(model, kind=kind, rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, dtype=torch.float32)

    def steps(model: Llama, optimizer: Optimizer, count: int) -> None:
        for _ in range(count):
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step(1e-2)

    whole, optimizer = fresh()
    steps(whole, optimizer, 4)
    first, optimizer = fresh()
    steps(first, optimizer, 2)
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    steps(second, resumed, 2)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_learning_rate_warms_up_and_comes_down():
    rates = [learning_rate(step, peak=1.0, floor=0.1, warmup=4, total=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == pytest.approx(0.1)


def test_windows_begin_at_documents_and_the_stream_depends_on_seed_and_place_alone(project):
    data = Shards.open(project / "data" / "toy")
    windows = Windows(data.split("train"), 64, data.document_starts("train"))
    tokens, targets = map(torch.from_numpy, windows.training_batch(7, 0, len(windows)))
    assert (tokens[:, 0] == BOS_ID).all()  # documents of 50 tokens fit into windows of 64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    halves = [torch.from_numpy(windows.training_batch(7, start, 2)[0]) for start in (0, 2)]
    assert torch.equal(torch.cat(halves), tokens[:4])
    assert not torch.equal(tokens, torch.from_numpy(windows.training_batch(8, 0, len(windows))[0]))


@pytest.mark.trains
def test_two_processes_are_one_with_twice_the_accumulation_bit_for_bit(project):
    batch = f"--total_batch_tokens={2 * 2 * 32}"
    for name, processes in (("one", 1), ("two", 2)):
        ended = forked.run(project, [*SMALL, batch, f"--out_dir={name}"], processes=processes)
        assert ended.codes == [0] * processes, ended.err
    assert weights_of(project / "one", 4) == weights_of(project / "two", 4)
    losses = [
        [json.loads(line).get("val_loss") for line in (project / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert any(losses[0]) and losses[0] == pytest.approx(losses[1])


@pytest.mark.trains
def test_compile_ddp_wandb_evaluation_save_and_resume_together(project):
    """What llama2.c's users asked for in vain: all of it in one run."""
    options = [*SMALL, "--compile=True", "--wandb_log", "--total_batch_tokens=128"]
    run(*options, "--out_dir=parts", "--max_iters=2", processes=2, cwd=project)
    ended = forked.run(project, [*options, "--out_dir=parts", "--resume"], processes=2, environment=WANDB)
    assert ended.codes == [0, 0], ended.err
    assert list(project.glob("**/offline-run-*"))
    for step in (2, 4):
        assert (project / "parts" / "checkpoints" / f"step-{step:08d}").is_dir()
    file = model_file.read(project / "parts" / "model.bin", verify=True)
    assert file.config.dim == 32 and not any("_orig_mod" in name or "module" in name for name in file.tensors)
    assert (project / "parts" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_is_exact(project):
    assert train.main([*SMALL, "--out_dir=whole", "--keep=9", "--no-sample", "--decay_lr=False"]) == 0
    assert train.main([*SMALL, "--out_dir=parts", "--max_iters=2", "--no-sample", "--decay_lr=False"]) == 0
    assert train.main([*SMALL, "--out_dir=parts", "--resume", "--no-sample", "--decay_lr=False"]) == 0
    assert weights_of(project / "whole", 4) == weights_of(project / "parts", 4)


def test_a_damaged_checkpoint_is_passed_over_loudly(project, capsys):
    train.main([*SMALL, "--keep=9", "--no-sample"])
    path = project / "out" / "checkpoints" / "step-00000004" / MODEL_SAFETENSORS
    damage(path)
    assert find_latest("out") == Path("out/checkpoints/step-00000002")
    assert "step-00000004 is skipped" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        checkpoint.load(path.parent)


def save_steps(run_dir: Path, losses: dict[int, float | None], keep: int = 9) -> list[int]:
    """Save a checkpoint for each step, all of one run, and return the steps that are kept."""
    for step, loss in losses.items():
        checkpoint.save(
            run_dir, toy_state(SMALL_MODELS["gqa-tied"], step, loss), model_state={"w": np.ones(2, np.float32)},
            optimizer_state={}, tokenizer_data=b"t", keep=keep,
        )  # fmt: skip
    return [int(path.name.removeprefix("step-")) for path in list_steps(run_dir)]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(tmp_path, capsys):
    save_steps(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None})
    for best in (2, 3, 1, 4):
        found = find_best(tmp_path)
        assert found == tmp_path / "checkpoints" / f"step-{best:08d}"
        damage(found / MODEL_SAFETENSORS)
    assert find_best(tmp_path) is None
    assert "step-00000002 is skipped" in capsys.readouterr().err
    assert find_best(tmp_path / "nowhere") is None


def test_going_back_leaves_the_later_checkpoints_out(tmp_path):
    assert save_steps(tmp_path, {300: 3.0, 900: 1.0, 1000: 2.0}) == [300, 900, 1000]
    assert save_steps(tmp_path, {400: 2.5}, keep=2) == [400, 900, 1000]  # never the one just written
    debris = tmp_path / "checkpoints" / ".step-00000950.tmp"
    debris.mkdir()
    moved = checkpoint.go_back(tmp_path, 400)
    assert [path.name for path in moved] == ["step-00000900", "step-00001000"] and not debris.exists()
    assert checkpoint.load(moved[0]).state.step == 900
    assert find_latest(tmp_path) == find_best(tmp_path) == newest_best(tmp_path)
    assert save_steps(tmp_path, {500: 2.4, 900: 2.3}, keep=2) == [500, 900]
    assert [path.name for path in checkpoint.go_back(tmp_path, 500)] == ["step-00000900"]


def test_resuming_from_an_earlier_checkpoint_is_exact_and_leaves_the_later_ones(project, capsys):
    options = [*SMALL, "--no-sample", "--max_iters=6"]
    assert train.main([*options, "--keep=9"]) == 0
    whole = weights_of(project / "out", 6)
    damage(project / "out" / "checkpoints" / "step-00000006" / MODEL_SAFETENSORS)
    assert train.main([*options, "--keep=1", "--resume=out/checkpoints/step-00000002"]) == 0
    assert "checkpoints/abandoned/step-00000006" in capsys.readouterr().out
    assert weights_of(project / "out", 6) == whole
    assert checkpoint.load("out/checkpoints/abandoned/step-00000004").state.step == 4
    assert find_latest("out") == Path("out/checkpoints/step-00000006")


def test_the_checkpoints_of_two_runs_are_not_mixed(project):
    options = [*SMALL, "--no-sample", "--max_iters=2"]
    for name in ("a", "b"):
        train.main([*options, f"--out_dir={name}"])
    before = weights_of(project / "b", 2)
    with pytest.raises(CheckpointError, match="b: holds the checkpoints of an earlier run"):
        train.main([*options, "--out_dir=b", "--resume=a/checkpoints/step-00000002", "--max_iters=4"])
    with pytest.raises(CheckpointError, match="--overwrite would remove"):
        train.main([*options, "--out_dir=b", "--resume", "--overwrite"])
    assert weights_of(project / "b", 2) == before
    assert train.main([*options, "--out_dir=c", "--resume=a/checkpoints/step-00000002", "--max_iters=4"]) == 0


def test_a_run_goes_on_with_its_own_optimizer_and_shape(project):
    train.main([*SMALL, "--no-sample", "--max_iters=2"])
    with pytest.raises(ConfigError, match="dim=64: the checkpoint has 32.*optimizer=adamw: the checkpoint has muon's"):
        train.main(["--resume", "--dim=64", "--optimizer=adamw"])


def test_data_that_move_during_training_do_not_end_it(project, monkeypatch):
    step = Trainer.optimizer_step

    def step_and_move(trainer):
        (project / "data" / "toy" / "tokenizer.bin").unlink(missing_ok=True)
        return step(trainer)

    monkeypatch.setattr(Trainer, "optimizer_step", step_and_move)
    assert train.main([*SMALL, "--no-sample"]) == 0


def test_data_with_another_vocabulary_than_they_were_made_with_are_refused(project):
    write_bin(project / "data" / "toy" / "tokenizer.bin", toy_tokenizer(VOCAB + 1))
    with pytest.raises(DataError, match=r"tokenizer\.bin: not the vocabulary that the data were made with"):
        train.main(SMALL)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_a_memory_error(project, monkeypatch, error):
    def fail(trainer):
        raise error

    monkeypatch.setattr(Trainer, "optimizer_step", fail)
    with pytest.raises(MemoryError):
        train.main(SMALL)


@pytest.mark.parametrize(
    "name",
    ["model.bin", "model.tokenizer.bin", "model.generation_config.json", "config.toml", "metrics.jsonl", ".lock"],
)
def test_a_folder_in_the_place_of_a_file_is_found_before_the_first_step(project, name):
    (project / "out" / name).mkdir(parents=True)
    with pytest.raises(DiskError, match=f"{name}: is in the place of a file"):
        train.main([*SMALL, "--no-sample"])
    assert not list_steps(project / "out")


@pytest.mark.parametrize("name", ["out", "out/checkpoints"])
def test_a_file_in_the_place_of_a_folder_is_found_before_the_first_step(project, name):
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).touch()
    with pytest.raises(DiskError, match=f"{name}: cannot be written to: .*{name}: not a folder"):
        train.main([*SMALL, "--no-sample"])


def test_an_out_dir_with_a_line_end_in_its_name_is_refused(project):
    with pytest.raises(UsageError, match="has a control character in its name; choose another name"):
        train.main([*SMALL, "--out_dir=a\nb"])


@pytest.mark.trains
def test_without_numbas_compiler_the_run_says_so_once(project, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert run(*SMALL, cwd=project).stderr.count("taking backend=numpy") == 1


def test_config_toml_reads_back_what_was_typed(project):
    name = 'caf\u00e9 \U0001f600 "x" \\ \x7f\n'
    config = TrainConfig(wandb_run_name=name, out_dir="run")
    run_folder.set_up(Path("run"), config, 0, continues=False)
    again = parse(TrainConfig, ["run/config.toml"], program="", description="", toml=True)
    assert again == config


def test_a_run_from_before_there_was_a_choice_of_schedules_keeps_its_own():
    saved = dataclasses.asdict(TrainConfig(learning_rate=0.5))
    assert with_defaults(saved)().schedule == "wsd" and with_defaults(saved)().learning_rate == 0.5
    del saved["schedule"]
    assert with_defaults(saved)().schedule == "cosine"


def test_a_warm_up_longer_than_the_run_is_told(project, capsys):
    train.main([*SMALL, "--no-sample", "--max_iters=2", "--warmup_iters=9"])
    assert "never ends: it has 9 steps, the run 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (["--vocab_size=512"], (ConfigError, DataError), "512"),
        (["--data=nowhere"], DataError, "nowhere"),
        (["--total_batch_tokens=100"], ConfigError, "total_batch_tokens"),
        (["--lerning_rate=1"], UsageError, "did you mean --learning_rate"),
        (["--resume"], CheckpointError, "out"),
        (["--dim=30", "--n_heads=4"], ConfigError, "dim=30"),
        (["--batch_size=0", "--max_iters=0"], ConfigError, "batch_size"),
    ],
)
def test_mistakes(project, argv, error, words):
    with pytest.raises(error, match=words):
        train.main([*SMALL, *argv])


def test_a_second_run_does_not_overwrite_the_first(project):
    train.main([*SMALL, "--no-sample"])
    with pytest.raises((ConfigError, CheckpointError), match="--resume"):
        train.main([*SMALL, "--no-sample"])
    assert train.main([*SMALL, "--no-sample", "--overwrite"]) == 0


@pytest.mark.slow
def test_without_data_the_commands_that_make_some_are_named(tmp_path):
    done = run(cwd=tmp_path, code=DataError.exit_code)
    assert "tinystories.py download" in done.stderr and "tinystories.py pretokenize" in done.stderr
    assert done.stderr.count("\n") == 1
