"""The training half from end to end, on models of a few thousand parameters."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODELS
from torch import nn
from toy import toy_data

import train
from llamalet import format
from llamalet.errors import CheckpointError, ConfigError, DataError, UsageError
from llamalet.shards import Shards
from llamalet.tokenizer import BOS_ID
from model import Llama
from training import checkpoint
from training.batches import Windows
from training.optimizer import Optimizer, clip_gradients, learning_rate

ROOT = Path(__file__).parent.parent
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


def run(*argv: str, processes: int = 1, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run train.py as people do, in its own processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *argv]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def weights_of(run_dir: Path, step: int) -> str:
    path = run_dir / "checkpoints" / f"step-{step:08d}" / checkpoint.MODEL
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("kind", "reached"), [("adamw", 2.0), ("muon", 0.5)])
def test_one_batch_is_overfitted_in_ten_steps(kind, reached):
    torch.manual_seed(0)
    config = SMALL_MODELS["gqa-tied"]
    model = Llama(config)
    optimizer = Optimizer(model, kind=kind, rate=2e-2, betas=(0.9, 0.95), weight_decay=0.0)
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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_goes_on_where_it_stopped(kind):
    config = SMALL_MODELS["gqa-untied"]
    tokens = torch.randint(0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))

    def fresh() -> tuple[Llama, Optimizer]:
        torch.manual_seed(0)
        model = Llama(config)
        return model, Optimizer(model, kind=kind, rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)

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


def test_two_processes_are_one_with_twice_the_accumulation_bit_for_bit(project):
    batch = f"--total_batch_tokens={2 * 2 * 32}"
    run(*SMALL, batch, "--out_dir=one", cwd=project)
    run(*SMALL, batch, "--out_dir=two", processes=2, cwd=project)
    assert weights_of(project / "one", 4) == weights_of(project / "two", 4)
    losses = [
        [json.loads(line).get("val_loss") for line in (project / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert any(losses[0]) and losses[0] == pytest.approx(losses[1])


def test_compile_ddp_wandb_evaluation_save_and_resume_together(project):
    """What llama2.c's users asked for in vain: all of it in one run."""
    options = [*SMALL, "--compile=True", "--wandb_log", "--total_batch_tokens=128"]
    run(*options, "--out_dir=parts", "--max_iters=2", processes=2, cwd=project)
    run(*options, "--out_dir=parts", "--resume", processes=2, cwd=project)
    assert list(project.glob("**/offline-run-*"))
    for step in (2, 4):
        assert (project / "parts" / "checkpoints" / f"step-{step:08d}").is_dir()
    file = format.read(project / "parts" / "model.bin", verify=True)
    assert file.config.dim == 32 and not any("_orig_mod" in name or "module" in name for name in file.tensors)
    assert (project / "parts" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_is_exact(project):
    assert train.main([*SMALL, "--out_dir=whole", "--keep=9", "--no-sample", "--decay_lr=False"]) == 0
    assert train.main([*SMALL, "--out_dir=parts", "--max_iters=2", "--no-sample", "--decay_lr=False"]) == 0
    assert train.main([*SMALL, "--out_dir=parts", "--resume", "--no-sample", "--decay_lr=False"]) == 0
    assert weights_of(project / "whole", 4) == weights_of(project / "parts", 4)


def test_a_damaged_checkpoint_is_passed_over_loudly(project, capsys):
    train.main([*SMALL, "--keep=9", "--no-sample"])
    path = project / "out" / "checkpoints" / "step-00000004" / checkpoint.MODEL
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoint.find_latest("out") == Path("out/checkpoints/step-00000002")
    assert "step-00000004 is skipped" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        checkpoint.load(path.parent)


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


def test_without_data_the_commands_that_make_some_are_named(tmp_path):
    done = run(cwd=tmp_path, code=DataError.exit_code)
    assert "tinystories.py download" in done.stderr and "tinystories.py pretokenize" in done.stderr
    assert done.stderr.count("\n") == 1
