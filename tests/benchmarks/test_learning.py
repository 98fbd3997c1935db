"""The comparison of two trainers, apart from the training itself."""

import math

import numpy as np
import pytest
import torch
from toy import toy_data

from benchmarks import learning, llama2c
from benchmarks.harness import save_chart
from benchmarks.learning import OURS, PEER, LearningRun, RunsFile
from llamalet.config import ModelConfig
from llamalet.errors import ConfigError, DataError
from llamalet.shards import Shards
from model import Llama
from training.batches import Windows

VOCAB = 300
SETTING = "--optimizer=muon"


def run_of(side: str, options: str, loss: float, seed: int = 0, tokens: int = 1000) -> LearningRun:
    curve = [[0, 9.0], [500, loss + 0.2], [tokens, loss]]
    return LearningRun(
        side=side, options=options, seed=seed, tokens=tokens, seconds=1.0, loss=loss, chunked_loss=loss + 0.1,
        curve=curve,
    )  # fmt: skip


def peer_of(rate: float, batch: int, loss: float, seed: int = 0) -> LearningRun:
    return run_of(PEER, f"--learning_rate={rate:g} --gradient_accumulation_steps={batch}", loss, seed)


def test_a_copy_of_llama2c_gets_the_tokens_and_another_seed(tmp_path):
    source = tmp_path / "llama2.c"
    source.mkdir()
    (source / "train.py").write_text("torch.manual_seed(1337 + seed_offset)\n")
    (source / "tinystories.py").write_text("        seed = 42 + worker_id + 1337 * rank\n")
    splits = {"train": np.arange(40), "val": np.arange(7)}
    llama2c.copy_home(source, tmp_path / "same", splits, VOCAB)
    llama2c.copy_home(source, tmp_path / "other", splits, VOCAB, seed=2)
    assert (tmp_path / "same" / "train.py").read_text() == (source / "train.py").read_text()
    assert (tmp_path / "other" / "train.py").read_text() == "torch.manual_seed(1339 + seed_offset)\n"
    assert "seed = 44 + worker_id" in (tmp_path / "other" / "tinystories.py").read_text()
    shards = [np.fromfile(path, "<u2") for path in sorted((tmp_path / "same" / "data" / "tok300").iterdir())]
    assert [len(shard) for shard in shards] == [7, 40]  # its first shard is the one it validates on
    (source / "train.py").write_text("torch.manual_seed(seed)\n")
    with pytest.raises(DataError, match="another version"):
        llama2c.copy_home(source, tmp_path / "third", splits, VOCAB, seed=1)


def test_its_checkpoint_is_read_as_a_model_of_ours_and_measured_whole(tmp_path):
    toy_data(tmp_path / "toy", VOCAB)
    data = Shards.open(tmp_path / "toy")
    config = ModelConfig.create(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=4, multiple_of=32, vocab_size=VOCAB, max_seq_len=32
    )
    torch.manual_seed(3)
    model = Llama(config)
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    state["_orig_mod.output.weight"] = model.tok_embeddings.weight
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    arguments = {name: getattr(config, name) for name in names} | {"multiple_of": 32}
    (tmp_path / "out").mkdir()
    torch.save({"model": state, "model_args": arguments}, tmp_path / "out" / "ckpt.pt")
    read = learning.load_model("llama2c", tmp_path / "out" / "ckpt.pt")
    windows = Windows(data.split("val"), 32)
    loss = learning.whole_loss(read, windows, batch_size=3)
    tokens = torch.from_numpy(data.split("val")[: 32 * len(windows) + 1])
    with torch.no_grad():
        inputs, targets = tokens[:-1].view(-1, 32), tokens[1:].view(-1, 32)
        assert loss == pytest.approx(model(inputs, targets).item(), rel=1e-5)


def test_finished_runs_are_not_repeated_and_the_best_setting_is_the_one_with_more_seeds(tmp_path, monkeypatch):
    toy_data(tmp_path / "toy", VOCAB)
    data = Shards.open(tmp_path / "toy")
    results = RunsFile.open(tmp_path / "out" / "results.json", {"dim": 8})
    made = []

    def train_peer(config, data, results, rate, accumulation, seed):
        run = peer_of(rate, accumulation, loss=abs(rate - 4e-3) + 0.1 * accumulation, seed=seed)
        if not results.has(*run.setting[:2], seed, run.tokens):
            made.append((rate, accumulation, seed))
            results.add(run)

    monkeypatch.setattr(learning, "train_peer", train_peer)
    config = learning.LearnConfig(seeds=2, peer_rates=(2e-3, 4e-3, 8e-3), peer_batches=(1, 4))
    learning.train_peers(config, data, results)
    assert len(made) == 3 * 2 + 1
    assert made[-1] == (4e-3, 1, 1)
    learning.train_peers(config, data, RunsFile.open(results.path, {"dim": 8}))
    assert len(made) == 7
    with pytest.raises(ConfigError, match="another file"):
        RunsFile.open(results.path, {"dim": 16})


def test_the_table_has_all_runs_and_what_it_takes_to_reach_the_peers_loss(tmp_path):
    toy_data(tmp_path / "toy", VOCAB)
    data = Shards.open(tmp_path / "toy")
    ours = [run_of(OURS, SETTING, loss, seed, tokens=2000) for seed, loss in enumerate((0.7, 0.9, 1.2))]
    tried = run_of(OURS, "--optimizer=adamw", 3.0)
    theirs = [peer_of(2e-3, 1, 1.5), *(peer_of(4e-3, 1, 1.0, seed) for seed in range(3))]
    results = RunsFile(tmp_path / "r.json", {}, [*theirs, tried, *ours], {PEER: 100.0, OURS: 400.0})
    lines = "\n".join(learning.table(results, data, SETTING)).splitlines()
    assert sum(line.startswith((f"| {PEER} |", f"| {OURS} |")) for line in lines) == len(results.runs)
    assert "| llama2.c, 3 seeds | 1,000 (1) | 1.0000 | 1.1000 | 1,000 | 10 s at 100 tok/s |" in lines
    assert "| ours, 3 seeds | 2,000 (2) | 0.9000 | 1.0000 | 2,000 | 5 s at 400 tok/s |" in lines
    assert learning.reached(ours, 0.5) == "never" and learning.reached(ours, 1.1) == "500"
    picture = tmp_path / "new" / "loss.png"
    save_chart(picture, lambda figure: learning.draw_losses(figure, results, data, SETTING))
    assert picture.read_bytes().startswith(b"\x89PNG")
    results.save()
    assert RunsFile.open(results.path, {}) == results


def test_bad_options_are_refused_together():
    with pytest.raises(ConfigError, match="shares=2.0") as caught:
        learning.LearnConfig(shares=(2.0,), time=True, tokens=0, peer_rates=(1e-3, 0.0), peer_batches=(0,))
    for problem in ("peer_train", "tokens=0", "peer_rates=0.0", "peer_batches=0"):
        assert problem in str(caught.value)


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_a_start_that_copies_passes_on_what_it_attends_to_and_attends_to_its_like(n_kv_heads):
    config = ModelConfig.create(
        dim=128, n_layers=1, n_heads=4, n_kv_heads=n_kv_heads, vocab_size=VOCAB, max_seq_len=200
    )
    torch.manual_seed(0)
    model = Llama(config)
    model.start_by_copying()
    attention, tokens = model.layers[0].attention, torch.randn(500, config.dim)
    q, k, v = (layer(tokens).view(500, -1, config.head_dim) for layer in (attention.wq, attention.wk, attention.wv))
    k, v = (heads.repeat_interleave(4 // n_kv_heads, dim=1) for heads in (k, v))
    own = (q * k).sum(-1) / math.sqrt(config.head_dim)
    assert own.mean().item() == pytest.approx(math.log(200), rel=0.1)
    assert (q * k.roll(1, dims=0)).mean().abs() < 0.1 * (q * k).mean()  # other tokens weigh nothing special
    passed_on = attention.wo(v.flatten(1))
    assert (passed_on * tokens).mean().item() == pytest.approx(1.0, rel=0.1)
