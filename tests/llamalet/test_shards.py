import dataclasses
import errno
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalet import shards
from llamalet.errors import DataError, DiskError
from llamalet.shards import Entropy, Meta, Shards, Split, TokenBlock

BOS = 1


def block(*documents):
    return TokenBlock(np.array([i for ids in documents for i in ids]), len(documents), 3 * len(documents))


def prepare(folder, train, val, vocab_size=512, **changes):
    """Write shards, one for each list of blocks in `train` and `val`, and their meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        name: Split(
            tuple(
                shards.write_shard(folder / f"{name}_{i:05}.bin", blocks, vocab_size) for i, blocks in enumerate(parts)
            )
        )
        for name, parts in (("train", train), ("val", val))
    }
    meta = Meta(
        source="unit test",
        recipe={"document": "line", "val_fraction": 0.05},
        bos_id=BOS,
        eos_id=2,
        vocab_size=vocab_size,
        tokenizer="tokenizer.model",
        tokenizer_sha256="ab" * 32,
        splits=splits,
    )
    meta = dataclasses.replace(meta, **changes)
    shards.write_meta(folder / "meta.json", meta)
    return meta


TRAIN = [[block([BOS, 5, 6], [BOS, 7]), block([BOS, 511])], [block([BOS, 8, 9, 10, 11])]]
VAL = [[block([BOS, 3, 4])]]
TRAIN_IDS = [BOS, 5, 6, BOS, 7, BOS, 511, BOS, 8, 9, 10, 11]


def test_round_trip(tmp_path):
    entropy = Entropy(stories=1, nats_per_token=2.5, bits_per_byte=0.5, bits_per_story=9.0)
    meta = prepare(tmp_path, TRAIN, VAL, entropy=entropy)
    data = Shards.open(tmp_path, verify=True)
    assert data.meta == meta and data.vocab_size == 512 and data.tokenizer_sha256 == "ab" * 32
    train = data.split("train")
    assert train[:].dtype == np.int64 and train[:].tolist() == TRAIN_IDS and len(train) == len(TRAIN_IDS)
    assert data.split("val")[0:3].tolist() == [BOS, 3, 4]
    assert data.document_starts("train").tolist() == [0, 3, 5, 7]
    assert (tmp_path / "val_00000.bin").read_bytes() == bytes([1, 0, 3, 0, 4, 0])
    table = json.loads((tmp_path / "meta.json").read_text())
    assert table["dtype"] == "uint16" and table["splits"]["train"]["tokens"] == 12
    assert table["splits"]["train"]["documents"] == 4 and table["splits"]["train"]["text_bytes"] == 12


@pytest.mark.parametrize("start", range(len(TRAIN_IDS) + 2))
def test_a_range_reads_across_shards(tmp_path, start):
    prepare(tmp_path, TRAIN, VAL)
    train = Shards.open(tmp_path).split("train")
    for stop in range(len(TRAIN_IDS) + 2):
        assert train[start:stop].tolist() == TRAIN_IDS[start:stop]
    with pytest.raises(IndexError):
        train[::2]


@settings(deadline=None)  # it writes files
@given(st.lists(st.lists(st.integers(0, 99_999), min_size=1), min_size=1, max_size=5), st.data())
def test_ids_above_65535_and_any_cut(tmp_path_factory, parts, data):
    folder = tmp_path_factory.mktemp("wide")
    prepare(folder, [[TokenBlock(np.array(part), 1, 1)] for part in parts], VAL, vocab_size=100_000)
    flat = sum(parts, [])
    tokens = Shards.open(folder).split("train")
    a, b = data.draw(st.integers(0, len(flat))), data.draw(st.integers(0, len(flat)))
    assert tokens[a:b].tolist() == flat[a:b]
    assert (folder / "train_00000.bin").stat().st_size == 4 * len(parts[0])


def test_dtype_boundary():
    assert shards.id_dtype(65536) == np.uint16 and shards.id_dtype(65537) == np.uint32


@pytest.mark.parametrize("ids", [[BOS, 512], [BOS, -1]])
def test_an_id_outside_the_vocabulary_is_refused_and_leaves_nothing(tmp_path, ids):
    with pytest.raises(DataError, match="train_00000.bin.*512 tokens"):
        shards.write_shard(tmp_path / "train_00000.bin", [block([BOS, 4]), block(ids)], 512)
    assert not list(tmp_path.iterdir())


def test_an_empty_shard_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokens"):
        shards.write_shard(tmp_path / "train_00000.bin", [], 512)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


@pytest.mark.parametrize("damage", [cut, lengthen, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_shard_of_the_wrong_size_is_named(tmp_path, damage):
    prepare(tmp_path, TRAIN, VAL)
    damage(tmp_path / "train_00001.bin")
    with pytest.raises(DataError, match="train_00001.bin"):
        Shards.open(tmp_path)


def test_verify_finds_one_flipped_bit(tmp_path):
    prepare(tmp_path, TRAIN, VAL)
    path = tmp_path / "val_00000.bin"
    data = bytearray(path.read_bytes())
    data[4] ^= 1
    path.write_bytes(data)
    Shards.open(tmp_path)
    with pytest.raises(DataError, match="val_00000.bin: sha256"):
        Shards.open(tmp_path, verify=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"version": 2}, "version 2"),
        ({"dtype": "uint32"}, "dtype='uint32': the other fields make it 'uint16'"),
        ({"vocab_size": 70000}, "dtype='uint16': the other"),
        ({"vocab_size": "512"}, "vocab_size='512': must be a whole number from 0 up"),
        ({"vocab_size": -5}, "vocab_size=-5: must be a whole number from 0 up"),
        ({"vocab_size": 512.0}, "vocab_size=512.0: must be a whole number"),
        ({"vocab_size": 2**31}, r"vocab_size=2147483648: must be in 1\.\."),
        ({"bos_id": []}, r"bos_id=\[\]: must be a whole number"),
        ({"eos_id": 512}, "eos_id=512: must be below vocab_size=512"),
        ({"tokenizer": "../tokenizer.model"}, "tokenizer='../tokenizer.model': must be the name of a file"),
        ({"recipe": 5}, "recipe=5: must be an object"),
        ({"splits": {"train": {"shards": []}}}, r"splits\.val is missing"),
        ({"entropy": {"stories": 1}}, r"entropy\.nats_per_token is missing; .*entropy\.bits_per_story is missing"),
        ({"entropy": math.inf}, "entropy=inf: must be a finite number"),
        ({"splits": []}, r"splits=\[\]: must be an object"),
        ({"tokenizer": ...}, "tokenizer is missing"),
        ({"dtype": ...}, "dtype is missing"),
        ({"entropy": ...}, "entropy is missing"),
    ],
)
def test_a_meta_file_that_contradicts_itself(tmp_path, change, words):
    prepare(tmp_path, TRAIN, VAL)
    path = tmp_path / "meta.json"
    table = {key: value for key, value in (json.loads(path.read_text()) | change).items() if value is not ...}
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=words) as caught:
        Shards.open(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_meta_file_that_is_no_json_object(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="meta.json"):
        Shards.open(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    meta = prepare(tmp_path / "a", TRAIN, VAL)
    (tmp_path / "val_00000.bin").write_bytes((tmp_path / "a" / "val_00000.bin").read_bytes())
    outside = dataclasses.replace(meta.splits["val"].shards[0], file="../val_00000.bin")
    prepare(tmp_path / "a", TRAIN, VAL, splits={"train": meta.splits["train"], "val": Split((outside,))})
    with pytest.raises(DataError, match="not found"):
        Shards.open(tmp_path / "a")


def test_missing_folder_and_split(tmp_path):
    with pytest.raises(DataError, match="tinystories.py"):
        Shards.open(tmp_path / "gone")
    prepare(tmp_path, TRAIN, [])
    with pytest.raises(DataError, match="'val'"):
        Shards.open(tmp_path).split("val")


def test_find_newest(tmp_path):
    assert shards.find_newest(tmp_path / "gone") is None
    for age, name in ((30, "a/tok8"), (10, "b/tok8"), (20, "b/tok9")):
        prepare(tmp_path / name, TRAIN, VAL)
        os.utime(tmp_path / name / "meta.json", (1_700_000_000 - age,) * 2)
    assert shards.find_newest(tmp_path) == tmp_path / "b" / "tok8"


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "train_00000.bin"
    shards.write_shard(path, [block([BOS, 4])], 512)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="train_00000.bin: cannot be written: No space left"):
        shards.write_shard(path, [block([BOS, 5])], 512)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
