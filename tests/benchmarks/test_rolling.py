import json

import numpy as np
import pytest
from toy import SMALL_MODELS, toy_model

from benchmarks import rolling
from llamalet import Model
from llamalet.errors import ConfigError, DataError
from llamalet.kv_cache import KVCache
from llamalet.kv_kinds import cache_bytes

CONFIG = SMALL_MODELS["gqa-tied"]  # vocabulary 300, context 32
WAYS = ["roll", "no-first", "cut", "grow", "recompute"]


@pytest.mark.slow
def test_a_rolling_cache_reads_on_where_plain_cutting_falls_apart(shared_data):
    """The claim on real text and a real model, past the context by one and a half."""
    model = Model.load(shared_data / "stories260K.bin", tokenizer=shared_data / "tok512.bin", backend="numpy")
    streams = rolling.read_streams(model, shared_data / "tinystories-sample.jsonl", 1280, 2)
    curves = {name: measure() for name, measure in rolling.ways(model, streams, 4).items() if name != "grow"}
    past = {name: curve.perplexity(512, 1280) for name, curve in curves.items()}
    within = curves["roll"].perplexity(0, 512)
    assert past["roll"] < 1.1 * within
    assert past["roll"] < 1.02 * past["recompute"]
    assert past["cut"] > 10 * past["roll"]
    assert curves["roll"].cache_bytes == 2 * cache_bytes(model.config, 512)
    assert (curves["roll"].nats[:512] == curves["cut"].nats[:512]).all()


def test_recomputing_scores_every_token_once_with_half_a_context_before_it(tmp_path):
    model = Model.load(toy_model(tmp_path, CONFIG), backend="numpy")
    for n in (33, 47, 48, 49, 100):
        stream = np.random.default_rng(n).integers(3, 300, n + 1)
        found = rolling._recomputed(model, stream)
        assert found.shape == (n,)
        for position in (0, 31, 32, 40, n - 1):
            if position < n:
                begin = 0 if position < 32 else (position - 16) // 16 * 16
                logits = model.logits(stream[begin : position + 1])[-1:]
                expected = rolling.losses(model.transformer, logits, stream[[position + 1]])[0]
                assert found[position] == pytest.approx(expected, abs=1e-4)


def test_cutting_moves_keys_and_does_not_turn_them():
    plain, cut = KVCache(CONFIG), rolling.CutCache(CONFIG)
    for cache in (plain, cut):
        cache.reserve(32)
        cache.length = 32
        rng = np.random.default_rng(0)
        for layer in range(CONFIG.n_layers):
            numbers = rng.standard_normal((2, CONFIG.n_kv_heads, 32, CONFIG.head_dim))
            cache.write(layer, 0, *numbers.astype(np.float32))
    before = [cut.read(layer, 0, 32)[0] for layer in range(CONFIG.n_layers)]
    plain.roll(4, 14)
    cut.roll(4, 14)
    assert cut.length == 18
    for layer, keys in enumerate(before):
        found, values = cut.read(layer, 0, 18)
        assert (found[:, :4] == keys[:, :4]).all() and (found[:, 4:] == keys[:, 18:]).all()
        assert (values == plain.read(layer, 0, 18)[1]).all()


def test_the_command_writes_a_table_a_picture_and_figures(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a band and a ban. " * 30)
    model = toy_model(tmp_path, CONFIG)
    words = [str(model), f"--text={tmp_path / 'text.txt'}", "--backend=numpy", f"--out={tmp_path / 'out'}"]
    assert rolling.main([*words, "--tokens=128", "--streams=3"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["positions", *WAYS]
    found = json.loads((tmp_path / "out" / "rolling.json").read_bytes())
    assert list(found["curves"]) == WAYS and found["context"] == 32
    assert all(len(curve["nats_by_position"]) == 128 for curve in found["curves"].values())
    assert found["curves"]["grow"]["cache_bytes"] == 2 * found["curves"]["roll"]["cache_bytes"]  # 128 positions, 64
    assert (tmp_path / "out" / "rolling.png").read_bytes().startswith(b"\x89PNG")
    for wrong, message in (("--tokens=32", "tokens=32"), ("--keep=32", "keep=32"), ("--streams=65", "streams=65")):
        with pytest.raises(ConfigError, match=message):
            rolling.main([*words, "--tokens=64", wrong])
    with pytest.raises(DataError, match=r"text.txt: has \d+ tokens"):
        rolling.main([*words, "--tokens=9999"])
