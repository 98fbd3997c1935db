"""The metadata of GGUF files, through the `gguf` package: of one file, or of all parts of a split one."""

import glob
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llamalet.checks import checked
from llamalet.errors import ConfigError, FormatError, UsageError

if TYPE_CHECKING:
    import gguf

ARCHITECTURE = "llama"
# What each part of a split file says of itself, and of the model again.
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_PARTS = (1 << 16) - 1
SHAPE_KEYS = ("general.architecture", f"{ARCHITECTURE}.")
# The package makes several objects of each value of an array; no vocabulary or list of merges has as many.
ARRAY, MAX_ARRAY = 9, 1 << 21


def package() -> Any:
    """Return the gguf package.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise UsageError("GGUF files need the gguf package: pip install gguf") from None
    return gguf


class Metadata:
    """A file, or a part of a split one: its metadata by key, and what it says of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.errstate(over="ignore"):  # damaged offsets
                self._reader = _strict_reader(path)
            self.tensors = list(self._reader.tensors)
            self._check_places()
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, RecursionError) as error:
            raise FormatError(f"{path}: not a GGUF file, damaged or truncated: {error}") from None

    def _check_places(self) -> None:
        """Raise a ValueError unless tensors follow each other, as llama.cpp demands: one could be read as another."""
        if self._reader.byte_order == "S":
            raise ValueError("its bytes are in the other order (big-endian)")
        end = int(self._reader.data_offset)
        for tensor in self.tensors:
            if tensor.data_offset != end:
                raise ValueError(f"{tensor.name} begins at byte {tensor.data_offset}, not {end}")
            end += -(-int(tensor.n_bytes) // self._reader.alignment) * self._reader.alignment

    def keys(self) -> Collection[str]:
        """Return the keys of all values."""
        return self._reader.fields.keys()

    def get(self, key: str) -> Any:
        """Return a value as a Python object; None if there is none."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError, TypeError) as error:
            raise FormatError(f"{self.path}: {key} is damaged: {error}") from None

    def typed(self, key: str, kind: type) -> Any:
        """Return a value of one of checks.KINDS; None if there is none.

        Raises:
            FormatError: if it is of another type.
        """
        try:
            return None if (value := self.get(key)) is None else checked(f"{self.path}: {key}", value, kind)
        except ConfigError as error:
            raise FormatError(str(error)) from None

    def needed(self, key: str) -> Any:
        """Return a value that every file must have."""
        value = self.get(key)
        if value is None:
            raise FormatError(f"{self.path}: has no {key}")
        return value

    def of_layers(self, key: str, n_layers: Any) -> Any:
        """Return a value that may be given for each layer; None if there is none.

        Raises:
            FormatError: if the layers differ, or it is not given for each.
        """
        value = self.get(key)
        if not isinstance(value, list):
            return value
        if not value or len(value) != n_layers:
            raise FormatError(f"{self.path}: {key} has {len(value)} values for {n_layers} layers")
        if any(other != value[0] for other in value):
            raise FormatError(f"{self.path}: {key} is {reprlib.repr(value)}: must be the same in all layers")
        return value[0]

    def number(self, key: str, default: float) -> float:
        """Return a number.

        Raises:
            FormatError: if it is of another type.
        """
        value = self.typed(key, float)
        return default if value is None else float(shortest(value))


def shortest(value: Any) -> Any:
    """Return the shortest number that rounds to a float32: 1e-5, not 9.999999747378752e-06; other types unchanged."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def first_part(path: Path) -> Path | None:
    """Return the first part of a split file of which `path` is NAME, also with .gguf; None if there is none.

    Raises:
        FormatError: if several files are split under that name.
    """
    if path.exists():
        return None
    stem, digits = glob.escape(path.name.removesuffix(".gguf")), "[0-9]" * 5
    found = sorted(path.parent.glob(f"{stem}-{digits}-of-{digits}.gguf"))
    if len({part.name.rpartition("-of-")[2] for part in found}) > 1:
        raise FormatError(f"{path}: no such file, but parts of several: name one of {found[0].name}, {found[-1].name}")
    return found[0] if found else None


def read_parts(path: Path) -> list[Metadata]:
    """Return the metadata of a file, or of all parts of the split file to which it belongs.

    Raises:
        FormatError: if one is damaged or missing, or they do not belong together.
    """
    part = Metadata(path)
    count, number = part.typed(SPLIT_COUNT, int), part.typed(SPLIT_NUMBER, int)
    if count in (None, 0, 1):
        return [part]
    if number is None or not 0 <= number < count <= MAX_PARTS:
        said = f"{SPLIT_NUMBER} is {reprlib.repr(number)} and {SPLIT_COUNT} is {reprlib.repr(count)}"
        raise FormatError(f"{path}: {said}: damaged")
    ending = "-{:05d}-of-{:05d}.gguf".format
    if not path.name.endswith(ending(number + 1, count)):
        raise FormatError(
            f"{path}: is part {number + 1} of {count}, so its name must end in {ending(number + 1, count)}"
        )
    stem = path.name.removesuffix(ending(number + 1, count))
    paths = [path.with_name(stem + ending(i + 1, count)) for i in range(count)]
    if missing := [part.name for part in paths if not part.is_file()]:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FormatError(f"{path}: is part {number + 1} of {count}; missing beside it: {names}")
    parts = [part if part.path == path else Metadata(path) for path in paths]
    _check_parts(parts)
    return parts


def _check_parts(parts: Sequence[Metadata]) -> None:
    """Raise a FormatError unless these are all parts of one split file, in their order."""
    first, names = parts[0], set[str]()
    for number, part in enumerate(parts):
        for key, expected in ((SPLIT_NUMBER, number), (SPLIT_COUNT, len(parts))):
            if part.typed(key, int) != expected:
                found = reprlib.repr(part.get(key))
                raise FormatError(f"{part.path}: {key} is {found}, not {expected}: another file's part")
        for key in part.keys():
            if key.startswith(SHAPE_KEYS) and part.get(key) != first.get(key):
                found, wanted = reprlib.repr(part.get(key)), reprlib.repr(first.get(key))
                raise FormatError(f"{part.path}: {key} is {found}, and {wanted} in {first.path.name}")
        if twice := names.intersection(tensor.name for tensor in part.tensors):
            raise FormatError(f"{part.path}: {min(twice)} is in an earlier part too")
        names.update(tensor.name for tensor in part.tensors)
    total = first.typed(SPLIT_TENSORS, int)
    if total not in (None, len(names)):
        found = reprlib.repr(total)
        raise FormatError(f"{first.path}: {SPLIT_TENSORS} is {found}, and its {len(parts)} parts have {len(names)}")


def _strict_reader(path: Path) -> "gguf.GGUFReader":
    """Return the package's reader, stopped at the end of a damaged file: it would read on until memory runs out.

    Raises:
        ValueError: if the file ends within its metadata; or another of the package's errors.
    """

    class Reader(package().GGUFReader):  # type: ignore[misc]
        data: NDArray[np.uint8]

        def _get(self, offset: Any, *args: Any, **options: Any) -> Any:
            if offset >= len(self.data):
                raise ValueError("ends within its metadata")
            self.data = np.asarray(self.data)  # a memmap takes twice as long for each of the many small views
            return super()._get(offset, *args, **options)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if kind == ARRAY and self._get(offset + 4, np.uint64)[0] > MAX_ARRAY:
                raise ValueError(f"an array of more than {MAX_ARRAY} values")
            return super()._get_field_parts(offset, kind)

    return Reader(path)
