import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from llamalet.convert import safetensors_file
from llamalet.errors import FormatError

CHECKPOINT = Path(__file__).parents[2] / "golden" / "checkpoint-1"
ARRAYS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.array([[1.5, -2.25]], np.float16),
    "step": np.array(7, np.int64),
    "loss": np.array([0.1], np.float64),
    "half": np.array([0x3F80, 0xC000], np.uint16),  # 1 and -2 in bfloat16
    "empty": np.zeros((0, 3), np.float32),
}
TYPES = {np.dtype(numpys): theirs for theirs, numpys in safetensors_file.DTYPES.items()}


def encoded(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    layout = {name: (TYPES[array.dtype], array.shape) for name, array in sorted(arrays.items())}
    return b"".join(safetensors_file.encode(layout, lambda name: [arrays[name]], metadata))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_s_file_is_written_as_it_was(name):
    arrays = safetensors_file.read_arrays(CHECKPOINT / name)
    assert encoded(arrays) == (CHECKPOINT / name).read_bytes()


def test_the_library_reads_what_is_written(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(encoded(ARRAYS, {"format": "pt"}))
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert found.keys() == ARRAYS.keys()
    assert found["half"].dtype == torch.bfloat16 and found["half"].tolist() == [1.0, -2.0]
    for name in ARRAYS.keys() - {"half"}:
        np.testing.assert_array_equal(found[name].numpy(), ARRAYS[name])
        assert found[name].numpy().dtype == ARRAYS[name].dtype
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read_whole(tmp_path):
    tensors = {name: torch.tensor(array) for name, array in ARRAYS.items() if array.dtype != np.uint16}
    safetensors.torch.save_file(tensors | {"half": torch.tensor([1.0, -2.0]).bfloat16()}, tmp_path / "x.safetensors")
    found = safetensors_file.read_arrays(tmp_path / "x.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.writeable and found[name].flags.aligned


def test_pieces_follow_each_other():
    layout = {"a": ("F32", (4, 2))}
    whole = np.arange(8, dtype=np.float32).reshape(4, 2)
    pieces = b"".join(safetensors_file.encode(layout, lambda name: [whole[:1], whole[1:]]))
    assert pieces == encoded({"a": whole})


def test_another_type_is_refused_by_name(tmp_path):
    safetensors.torch.save_file({"flags": torch.tensor([True])}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="flags is BOOL: only F64, I64, F32, F16, BF16 can be read"):
        safetensors_file.read_arrays(tmp_path / "x.safetensors")


@pytest.mark.parametrize("changes", [{"data_offsets": [-16, -8]}, {"data_offsets": [0, 400]}, {"shape": [-1, -2]}])
def test_a_tensor_outside_of_the_data_is_refused(tmp_path, changes):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(FormatError, match="a, .* does not fit bytes|=-1.?: must be a whole number from 0 up"):
        safetensors_file.read_arrays(tmp_path / "x.safetensors")
