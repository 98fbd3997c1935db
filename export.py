"""Write a trained model as a raw binary, and prove that the runtime computes from it what PyTorch does.

  python export.py --dtype q8               the newest best checkpoint under out/ -> out/model_v3_q8.bin (8 bits)
  python export.py                          the same -> out/model.bin (float32)
  python export.py story.bin --checkpoint out/run --version 0
  python export.py --verify out/model_q8.bin

sample.py reads all versions, llama2.c's run version 0 and its runq version 2. The tokenizer goes beside the file.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configurator import parse
from llamalet import format, shards
from llamalet.errors import CheckpointError, ConfigError, DataError, FormatError, UsageError, run
from llamalet.header import DTYPES
from training import checkpoint, weights
from training.proof import prove

VERSIONS = (0, 1, 2, 3)
DEFAULT_NAMES = {0: "model_v0.bin", 1: "model.bin", 2: "model_q8.bin"}
OUT_ROOT = Path("out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The options of export.py."""

    out: str | None = None
    """The file to write, also as the first word; when left out, a name that says the version and dtype, in the run's
    folder where --checkpoint names one, else in out/."""
    version: int | None = None
    """0 and 1 are float32, 2 is int8, 3 has a --dtype; 1 when left out, and 3 where there is a --dtype."""
    dtype: str | None = None
    """What version 3 stores: f32, bf16 (bfloat16), q8 or q4 (8 or 4 bits, in groups with a scale); q8 when left out."""
    checkpoint: str | None = None
    """A checkpoint, or a run's folder, whose best one is taken; the newest run under out/ when left out."""
    check: bool = True
    """Prove the file after writing it; --no-check skips that."""
    verify: str | None = None
    """Prove an existing .bin instead of writing one."""
    data: str | None = None
    """Prepared data for the proof; when left out, what the model was trained on or the newest that fits."""
    force: bool = False
    """Write version 0 even where it loses what llama2.c hard-codes (norm_eps)."""

    def __post_init__(self) -> None:
        """Refuse combinations that mean nothing."""
        if self.version is not None and self.version not in VERSIONS:
            raise ConfigError(f"version={self.version}: must be one of {', '.join(map(str, VERSIONS))}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype}: must be one of {', '.join(DTYPES)}")
        if self.dtype is not None and self.version not in (None, 3):
            raise ConfigError(f"dtype={self.dtype}: version {self.version} has no choice of it; leave one of them out")
        if self.verify is not None and (self.out is not None or self.checkpoint is not None):
            raise ConfigError(f"verify={self.verify}: checks an existing file, so neither OUT nor --checkpoint fit")
        if self.verify is not None and (self.dtype is not None or self.force or not self.check):
            raise ConfigError(f"verify={self.verify}: proves a file, so --dtype, --force and --no-check do not fit")
        if self.out is not None and not self.out.endswith(".bin"):
            raise ConfigError(f"out={self.out}: must end in .bin; a run or checkpoint is named with --checkpoint=PATH")

    @property
    def resolved_version(self) -> int:
        """The version to write."""
        if self.version is not None:
            return self.version
        return 1 if self.dtype is None else 3

    def path(self, source: Path) -> Path:
        """Return the file to write when the checkpoint `source` is exported."""
        if self.out is not None:
            return Path(self.out)
        run_dir = source.parent.parent if source.parent.name == checkpoint.FOLDER else source.parent
        folder = OUT_ROOT if self.checkpoint is None else run_dir
        version = self.resolved_version
        return folder / (DEFAULT_NAMES[version] if version < 3 else f"model_v3_{self.dtype or 'q8'}.bin")


def main(argv: Sequence[str]) -> int:
    """Export or verify as the command line says; return 0, or FormatError's code if the proof fails."""
    config = parse(ExportConfig, argv, program="python export.py", description=__doc__ or "", positional=("out",))
    if config.verify is not None:
        return _verify(Path(config.verify), config.data)
    return _export(config)


def _export(config: ExportConfig) -> int:
    """Write a checkpoint as a model file and prove it."""
    source = checkpoint.load(_find_checkpoint(config.checkpoint))
    path, version = config.path(source.path), config.resolved_version
    print(f"checkpoint {source.path}: step {source.state['step']}, {source.model_config.n_params:,} parameters")
    start = time.perf_counter()
    written = weights.write_bin(
        path, version, source.model_config, source.model_state, source.tokenizer_path,
        dtype=config.dtype, force=config.force,
    )  # fmt: skip
    size, duration = path.stat().st_size, time.perf_counter() - start
    kind = written.dtype if written.group_size is None else f"{written.dtype} in groups of {written.group_size}"
    print(f"wrote {path}: version {version}, {kind}, {size:,} bytes in {duration:.2f} s, read back and compared")
    if version < 3 and (lost := format.llama2c_differences(source.model_config)):
        print(f"note: llama2.c's programs will compute something else from this file: {', '.join(lost)}")
    code = 0
    if config.check:
        data = _find_data(config.data, source.state.get("data"), source.state["tokenizer_sha256"])
        code = _prove(path, data, source.model_state)
    if code == 0:
        print(f"run it: python sample.py {path}")
    return code


def _verify(path: Path, named_data: str | None) -> int:
    """Prove an existing model file."""
    file = format.read(path)
    print(f"{path}: version {file.version}, {file.dtype}, {file.config.n_params:,} parameters")
    return _prove(path, _find_data(named_data, None, file.tokenizer_sha256), None)


def _prove(path: Path, data: shards.Shards | None, state: Mapping[str, Tensor] | None) -> int:
    """Print the proof of a model file and return the exit code."""
    print("comparing PyTorch and the runtime ...", flush=True)
    proof = prove(path, checkpoint_state=state, data=data)
    print(*proof.lines(), sep="\n")
    return 0 if proof.ok else FormatError.exit_code


def _find_checkpoint(named: str | None) -> Path:
    """Return the checkpoint to export: the one named, the best of the run named, or the newest run's best."""
    path = checkpoint.newest_best(OUT_ROOT) if named is None else Path(named)
    if path is None:
        raise CheckpointError(f"no sound checkpoint under {OUT_ROOT}/; train a model first: python train.py")
    if path.suffix == ".bin":
        raise UsageError(f"{path}: is a model file already; name a checkpoint or a run's folder, or --verify it")
    if not checkpoint.list_steps(path):
        return path
    best = checkpoint.find_best(path)
    if best is None:
        raise CheckpointError(f"{path}: none of its checkpoints is sound")
    return best


def _find_data(named: str | None, trained_on: str | None, tokenizer_sha256: str | None) -> shards.Shards | None:
    """Return prepared data for the proof: what is named, else what the model was trained on, else the newest.

    Raises:
        DataError: if the data that was named is missing, damaged or made with another tokenizer; what was not named is
            passed over, and the proof says that it had no data.
    """
    if named is not None:
        data = shards.Shards.open(named)
        if tokenizer_sha256 not in (None, data.meta.tokenizer_sha256):
            raise DataError(f"{named}: was prepared with another tokenizer than the model's")
        return data
    for folder in (trained_on, shards.find_newest()):
        if folder is None:
            continue
        try:
            data = shards.Shards.open(folder)
        except DataError:
            continue
        if tokenizer_sha256 == data.meta.tokenizer_sha256:
            return data
    return None


if __name__ == "__main__":
    run(main)
