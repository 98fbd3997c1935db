"""GGUF files split into parts, as llama.cpp's gguf-split and converters write them."""

import dataclasses
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from other_programs import gguf_name, write_gguf
from toy import SMALL_MODELS, random_tensors

from llamalet import Model
from llamalet.convert import formats, gguf_file, target
from llamalet.convert.imported_model import difference
from llamalet.errors import ConfigError, FormatError, TokenizerError

CONFIG = SMALL_MODELS["gqa-untied"]
TENSORS = random_tensors(CONFIG, seed=2)
N_PARTS = 3
NOTHING = dict.fromkeys(
    f"llama.{key}"
    for key in (
        "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
        "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
    )
) | dict.fromkeys(
    f"tokenizer.ggml.{key}"
    for key in ("model", "pre", "tokens", "scores", "token_type", "bos_token_id", "eos_token_id")
)  # fmt: skip


def split(folder: Path, name: str = "m") -> list[Path]:
    parts = write_gguf(folder / f"{name}.gguf", CONFIG, TENSORS, tensors_per_part=-(-len(TENSORS) // N_PARTS))
    assert [part.name for part in parts] == [f"{name}-0000{i}-of-0000{N_PARTS}.gguf" for i in range(1, N_PARTS + 1)]
    return parts


def write_part(path: Path, number: int, tensors: dict[str, np.ndarray], **keys: object) -> None:
    """Write part 1 or 2 of 2 by hand: the second has no metadata but its own, and what `keys` say."""
    own = {"split.no": number, "split.count": 2, "split.tensors.count": len(TENSORS)}
    others = {key.replace("__", "."): value for key, value in keys.items()}
    write_gguf(path, CONFIG, tensors, keys=({} if number == 0 else NOTHING) | own | others)


def halves(folder: Path, first: dict[str, object] | None = None, second: dict[str, object] | None = None) -> list[Path]:
    names = list(TENSORS)
    paths = [folder / f"h-0000{i}-of-00002.gguf" for i in (1, 2)]
    write_part(paths[0], 0, {name: TENSORS[name] for name in names[:8]}, **(first or {}))
    write_part(paths[1], 1, {name: TENSORS[name] for name in names[8:]}, **(second or {}))
    return paths


@pytest.mark.parametrize(
    "name", ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf", "m", "m.gguf"]
)
def test_a_split_file_is_opened_whole_by_any_of_its_names(tmp_path, name):
    parts = split(tmp_path)
    assert formats.kind_of(tmp_path / name) == "gguf"
    found = formats.read("gguf", str(tmp_path / name))
    assert found.config == CONFIG and difference(TENSORS, found.tensors) == 0
    assert found.name == str(parts[0]) and found.files == tuple(parts)
    write_gguf(tmp_path / "whole.gguf", CONFIG, TENSORS)
    ids = np.arange(3, 20)
    models = [Model.load(tmp_path / one, backend="numpy") for one in (name, "whole.gguf")]
    np.testing.assert_array_equal(*(model.logits(ids) for model in models))
    assert models[0].tokenizer.pieces() == models[1].tokenizer.pieces()


def test_a_name_may_hold_any_character(tmp_path):
    parts = split(tmp_path, "m[1]*")
    assert difference(TENSORS, gguf_file.read(str(tmp_path / "m[1]*")).tensors) == 0
    assert difference(TENSORS, gguf_file.read(str(parts[2])).tensors) == 0


def test_the_first_part_may_hold_metadata_alone(tmp_path):
    paths = [tmp_path / f"h-0000{i}-of-00002.gguf" for i in (1, 2)]
    write_part(paths[0], 0, {})
    write_part(paths[1], 1, TENSORS)
    assert difference(TENSORS, gguf_file.read(str(paths[1])).tensors) == 0


def test_metadata_of_later_parts_is_not_used(tmp_path):
    paths = halves(tmp_path, second={"general__name": "b", "tokenizer__ggml__eos_token_id": 7})
    found = gguf_file.read(str(paths[1]))
    assert difference(TENSORS, found.tensors) == 0 and found.stop_tokens == (2,)


@pytest.mark.parametrize("opened", [0, 2])
def test_a_missing_part_is_named(tmp_path, opened):
    parts = split(tmp_path)
    parts[1].unlink()
    words = f"{parts[opened].name}: is part {opened + 1} of 3; missing beside it: m-00002-of-00003.gguf$"
    with pytest.raises(FormatError, match=words):
        gguf_file.read(str(parts[opened]))
    parts[0].unlink()
    with pytest.raises(FormatError, match="missing beside it: m-00001-of-00003.gguf, m-00002-of-00003.gguf$"):
        formats.read(formats.kind_of(tmp_path / "m"), str(tmp_path / "m"))


def test_a_renamed_part_says_its_name(tmp_path):
    parts = split(tmp_path)
    renamed = parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="other.gguf: is part 2 of 3, .* must end in -00002-of-00003.gguf"):
        gguf_file.read(str(renamed))


def test_a_prefix_of_two_files_is_ambiguous(tmp_path):
    split(tmp_path)
    (tmp_path / "m-00001-of-00007.gguf").write_bytes(b"GGUF")
    for name in ("m", "m.gguf"):
        with pytest.raises(FormatError, match="m-00001-of-00003.gguf, m-00003-of-00003.gguf|m-00001-of-00007.gguf"):
            formats.kind_of(tmp_path / name)
    assert formats.kind_of(tmp_path / "m-00001-of-00003.gguf") == "gguf"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"split__no": 0}, "h-00002-of-00002.gguf: split.no is 0, not 1: another file's part"),
        ({}, {"split__count": 3}, "h-00002-of-00002.gguf: split.count is 3, not 2"),
        ({}, {"split__count": None}, "h-00002-of-00002.gguf: split.count is None, not 2"),
        ({}, {"llama__embedding_length": 96}, "00002.gguf: llama.embedding_length is 96, and 64 in h-00001-of-00002"),
        ({}, {"llama__rope__scale_linear": 4.0}, "00002.gguf: llama.rope.scale_linear is 4.0, and None in h-00001"),
        (
            {"split__tensors__count": 99},
            {},
            "h-00001-of-00002.gguf: split.tensors.count is 99, and its 2 parts have 21",
        ),
        ({"split__no": 5}, {}, "split.no is 5 and split.count is 2: damaged"),
        ({"split__no": None}, {}, "split.no is None and split.count is 2: damaged"),
        ({"split__count": "2"}, {}, "split.count='2': must be a whole number"),
        ({"split__count": 1 << 31}, {}, "split.count is 2147483648: damaged"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, first, second, words):
    paths = halves(tmp_path, first, second)
    with pytest.raises(FormatError, match=words) as error:
        gguf_file.read(str(paths[0]))
    assert "\n" not in str(error.value)


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    paths = [tmp_path / f"h-0000{i}-of-00002.gguf" for i in (1, 2)]
    write_part(paths[0], 0, TENSORS)
    write_part(paths[1], 1, {"norm": TENSORS["norm"] * 2})
    with pytest.raises(FormatError, match="00002.gguf: output_norm.weight is in an earlier part too"):
        gguf_file.read(str(paths[0]))


def test_a_part_without_its_tensors_lacks_them(tmp_path):
    paths = halves(tmp_path, {"split__tensors__count": None})
    write_part(paths[1], 1, {"output": TENSORS["output"]}, split__tensors__count=None)
    with pytest.raises(FormatError, match="h-00001-of-00002.gguf: .* is missing; .* and [0-9]+ more"):
        gguf_file.read(str(paths[0]))


def test_a_truncated_part_is_named(tmp_path):
    parts = split(tmp_path)
    data = parts[2].read_bytes()
    for length in (0, 3, 40, 200, len(data) - 100):
        parts[2].write_bytes(data[:length])
        with pytest.raises(FormatError, match="m-00003-of-00003.gguf: .*"):
            gguf_file.read(str(parts[0]))


@pytest.mark.parametrize("count", [0, 1])
def test_one_part_is_a_whole_file(tmp_path, count):
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, keys={"split.no": 0, "split.count": count})
    assert difference(TENSORS, gguf_file.read(str(tmp_path / "m.gguf")).tensors) == 0


@pytest.mark.parametrize("out", [0, 1, 2])
def test_no_part_is_overwritten_by_its_export(tmp_path, out):
    parts = split(tmp_path)
    before = parts[out].read_bytes()
    source = gguf_file.read(str(parts[0]))
    with pytest.raises(ConfigError, match=f"{parts[out].name}: is the model to export, which would be lost"):
        target.write(source, target.Target(out=str(parts[out])), parts[out])
    assert parts[out].read_bytes() == before


# -- sizes that differ by layer or head -------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_sizes_by_layer_are_read_if_they_are_equal(tmp_path, key):
    size = {"attention.head_count": 4, "attention.head_count_kv": 2, "feed_forward_length": 96}[key]
    for value, words in (
        ([size] * 2, ""),
        ([size, size + 2], f"llama.{key} is .{size}, {size + 2}.: must be the same in all layers"),
        ([size] * 3, f"llama.{key} has 3 values for 2 layers"),
    ):
        write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, keys={f"llama.{key}": value})
        if not words:
            assert gguf_file.read(str(tmp_path / "m.gguf")).config == CONFIG
        else:
            with pytest.raises(FormatError, match=words):
                gguf_file.read(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"attention.value_length": 8}, "attention.value_length is 8: must be the width of a head, 16"),
        ({"attention.key_length": 16, "attention.value_length": 32}, "attention.value_length is 32"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8: must be the width of a head, 16"),
        ({"attention.key_length": 15}, "llama.attention.key_length=15: must be even, because RoPE rotates pairs"),
        ({"attention.key_length": 32, "rope.dimension_count": 32}, "attn_q.weight has shape"),
        ({"attention.head_count": 0}, "llama.attention.head_count=0"),
        ({"attention.head_count_kv": ["2", "2"]}, "llama.attention.head_count_kv=.2.: must be a whole number"),
        ({"embedding_length": 64.0}, "llama.embedding_length=64.0: must be a whole number"),
        ({"block_count": True}, "llama.block_count=True: must be a whole number"),
        ({"block_count": "2"}, "llama.block_count='2': must be a whole number"),
        (
            {"attention.layer_norm_rms_epsilon": "1e-5"},
            "layer_norm_rms_epsilon='1e-5': must be a number",
        ),
        ({"rope.freq_base": True}, "llama.rope.freq_base=True: must be a number"),
        ({"rope.dimension_count": 16.0}, "llama.rope.dimension_count=16.0: must be a whole number"),
        ({"attention.causal": 0}, "llama.attention.causal=0: must be true or false"),
        ({"expert_count": [8, 8]}, r"llama.expert_count=\[8, 8\]: must be a whole number"),
        ({"attention.sliding_window": 16}, "attention.sliding_window is 16, below the context 32"),
    ],
)
def test_other_heads_are_refused_by_name(tmp_path, keys, words):
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, keys={f"llama.{key}": value for key, value in keys.items()})
    with pytest.raises(FormatError, match=words) as error:
        gguf_file.read(str(tmp_path / "m.gguf"))
    assert "\n" not in str(error.value)


def test_heads_of_any_width_are_read(tmp_path):
    config = dataclasses.replace(CONFIG, head_dim=6)
    keys = {"llama.attention.key_length": 6, "llama.attention.value_length": 6, "llama.attention.sliding_window": 32}
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config), keys=keys)
    assert gguf_file.read(str(tmp_path / "m.gguf")).config == config


def test_biases_are_refused_by_name(tmp_path):
    bias = np.zeros(64, np.float32)
    for name in ("blk.0.attn_q.bias", "blk.1.ffn_down.bias", "blk.0.attn_norm.bias"):
        write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, more={name: bias})
        with pytest.raises(FormatError, match=f"{name} is not part of a Llama model"):
            gguf_file.read(str(tmp_path / "m.gguf"))


def test_the_builder_s_names_are_the_package_s():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.n_layers)
    assert {gguf_name(name) for name in TENSORS} <= {f"{theirs}.weight" for _, theirs in names.mapping.values()}


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (4 + 16 + 4, struct.pack("<Q", 0), "blk.0.attn_q.weight begins at byte .*, not "),  # another tensor's place
        (4 + 16 + 4, struct.pack("<Q", 2**64 - 1), "blk.0.attn_q.weight begins at byte .*, not "),
        (4 + 16, struct.pack("<I", 2), "begins at byte .*, not "),  # a smaller type
    ],
)
def test_a_tensor_out_of_its_place_is_refused(tmp_path, at, value, words):
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, TENSORS)
    data = path.read_bytes()
    at += data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    with pytest.raises(FormatError, match=words):
        gguf_file.read(str(path))


def test_the_other_order_of_bytes_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    with pytest.raises(FormatError, match="big-endian"):
        gguf_file.read(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer.ggml.pre", ["a"], "must be a text"),
        ("tokenizer.ggml.bos_token_id", True, "must be a whole number"),
        ("tokenizer.ggml.add_bos_token", 1, "must be true or false"),
        ("tokenizer.ggml.add_space_prefix", "no", "must be true or false"),
        ("tokenizer.ggml.scores", [True] * CONFIG.vocab_size, "must be a list of numbers"),
        ("tokenizer.ggml.token_type", "x", "must be a list of whole numbers"),
        ("llamalet.token_type", [1.0], "must be a list of whole numbers"),
        ("llamalet.token_type", [1], "has 1 kinds for 300 tokens"),
        ("tokenizer.chat_template", ["a"], "must be a text"),
    ],
)
def test_values_of_another_type_are_not_passed_over(tmp_path, key, value, words):
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, keys={key: value})
    try:
        problem = gguf_file.read(str(tmp_path / "m.gguf")).tokenizer_problem
    except (FormatError, TokenizerError) as error:
        problem = str(error)
    assert key in problem and words in problem
