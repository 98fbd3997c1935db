"""Nobody waits: not the step for its data, and not the host for a GPU."""

import threading

import numpy as np
import pytest
import torch
from toy import SMALL_MODELS, toy_data

from model import Llama
from training.batches import Prefetcher
from training.config import TrainConfig
from training.machine.distributed import Processes
from training.optimizer import Optimizer, step_unless
from training.run.interrupts import Interrupts
from training.step_torch import TorchBackend
from training.trainer import Trainer

SHAPE = dict(dim=32, n_layers=2, n_heads=2, max_seq_len=32, batch_size=2, warmup_iters=1, threads=1, log_interval=1)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def numbered(made: list[int]):
    """Batches that are the number of their place."""

    def make(place: int):
        if place == 13:
            raise OSError("the disk is gone")
        made.append(place)
        return np.array([place]), np.array([-place])

    return make


def test_what_is_asked_for_comes_whatever_was_guessed():
    made: list[int] = []
    prefetcher = Prefetcher(numbered(made), stride=2)
    places = [0, 2, 4, 9, 11, 3, 3]
    assert [int(prefetcher.batch(place)[0][0]) for place in places] == places
    prefetcher.close()
    assert made[:6] == [0, 2, 4, 6, 9, 11]  # each once, but for the wrong guesses; 6 was one
    assert not threads()


def test_a_mistake_in_the_background_is_raised_where_its_batch_is_wanted():
    prefetcher = Prefetcher(numbered([]), stride=1)
    prefetcher.batch(12)
    with pytest.raises(OSError, match="the disk is gone"):
        prefetcher.batch(13)
    assert int(prefetcher.batch(14)[0][0]) == 14
    prefetcher.close()


def trainer(folder, *, device="cpu", **options) -> Trainer:
    toy_data(folder / "data", 300)
    config = TrainConfig(data=str(folder / "data"), out_dir=str(folder / "out"), **SHAPE | options)
    group, signals = Processes(0, 1, 1, torch.device(device)), Interrupts()
    return Trainer(config, group, lambda *settled: TorchBackend(settled[0], settled[1], group, settled[2], signals))


def test_a_run_takes_its_batches_in_order_and_leaves_no_thread(tmp_path):
    run = trainer(tmp_path, compile=False, max_iters=3, total_batch_tokens=128)
    wanted, seen = [run.training_batch(place)[0] for place in range(6)], []
    run.backend.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].numpy()))
    for _ in range(3):
        run.optimizer_step()
    run.batches.close()
    np.testing.assert_array_equal(seen, wanted)
    run.step = 0
    run.train()
    assert not threads()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_is_refused_without_looking(kind):
    results = []
    for refuse in (False, True):
        torch.manual_seed(0)
        model = Llama(SMALL_MODELS["gqa-tied"])
        optimizer = Optimizer(model, kind=kind, rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, dtype=torch.float32)
        tokens = torch.randint(0, 300, (1, 17))
        for number in range(3):
            if refuse:  # at the first step, before there are moments, and later
                model(tokens[:, :-1], tokens[:, 1:]).backward()
                for parameter in model.parameters():
                    parameter.grad.fill_(float("nan"))
                for part in optimizer._parts:
                    step_unless(torch.tensor(True), part)
                    part.zero_grad()
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            for part in optimizer._parts:
                for group in part.param_groups:
                    group["lr"] = 1e-2 / (number + 1)
                step_unless(torch.tensor(False), part)
                part.zero_grad()
        results.append(optimizer.state_dict() | dict(model.state_dict()))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("compile", [False, True])
def test_no_step_waits_for_the_gpu(tmp_path, compile, optimizer):
    run = trainer(tmp_path, device="cuda", compile=compile, optimizer=optimizer, dropout=0.1, total_batch_tokens=128)
    for _ in range(2):  # what is allocated or compiled at its first use may wait
        run.optimizer_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            run.optimizer_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.batches.close()
