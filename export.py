"""Write a trained model as a raw binary, and prove that the runtime computes from it what PyTorch does.

  python export.py --version 2              the newest best checkpoint under out/ -> out/model_q8.bin (int8)
  python export.py                          the same -> out/model.bin (float32)
  python export.py story.bin --checkpoint out/run --version 0
  python export.py --verify out/model_q8.bin

llama2.c's run reads version 0 and its runq version 2, sample.py all of them. The tokenizer goes beside the file.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configurator import parse
from llamalet import format, shards
from llamalet.errors import CheckpointError, ConfigError, DataError, FormatError, UsageError, run
from training import checkpoint, weights
from training.proof import prove

DEFAULT_NAMES = {0: "model_v0.bin", 1: "model.bin", 2: "model_q8.bin"}
OUT_ROOT = Path("out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The options of export.py."""

    out: str | None = None
    """The file to write, also as the first word; out/model.bin, out/model_q8.bin or out/model_v0.bin when left out."""
    version: int = 1
    """0 and 1 are float32, 2 is int8: a quarter of the size, and faster."""
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
        if self.version not in DEFAULT_NAMES:
            raise ConfigError(f"version={self.version}: must be one of {', '.join(map(str, DEFAULT_NAMES))}")
        if self.verify is not None and (self.out is not None or self.checkpoint is not None):
            raise ConfigError(f"verify={self.verify}: checks an existing file, so neither OUT nor --checkpoint fit")
        if self.out is not None and not self.out.endswith(".bin"):
            raise ConfigError(f"out={self.out}: must end in .bin; the tokenizer's name beside it is made from it")


def main(argv: Sequence[str]) -> int:
    """Export or verify as the command line says; return 0, or FormatError's code if the proof fails."""
    config = parse(ExportConfig, argv, program="python export.py", description=__doc__ or "", positional=("out",))
    if config.verify is not None:
        return _verify(Path(config.verify), config.data)
    return _export(config)


def _export(config: ExportConfig) -> int:
    """Write a checkpoint as a model file and prove it."""
    source = checkpoint.load(_find_checkpoint(config.checkpoint))
    path = Path(config.out) if config.out is not None else OUT_ROOT / DEFAULT_NAMES[config.version]
    print(f"checkpoint {source.path}: step {source.state['step']}, {source.model_config.n_params:,} parameters")
    start = time.perf_counter()
    written = weights.write_bin(
        path, config.version, source.model_config, source.model_state, source.tokenizer_path, force=config.force
    )
    size, duration = path.stat().st_size, time.perf_counter() - start
    kind = "float32" if written.group_size is None else f"int8 in groups of {written.group_size}"
    print(f"wrote {path}: version {config.version}, {kind}, {size:,} bytes in {duration:.2f} s, read back and compared")
    if lost := format.llama2c_differences(source.model_config):
        print(f"note: llama2.c's programs will compute something else from this file: {', '.join(lost)}")
    code = 0
    if config.check:
        data = _find_data(config.data, source.state.get("data"), source.state["tokenizer_sha256"])
        code = _prove(path, data, source.model_state)
    print(f"run it: python sample.py {path}")
    return code


def _verify(path: Path, named_data: str | None) -> int:
    """Prove an existing model file."""
    file = format.read(path)
    print(f"{path}: version {file.version}, {file.config.n_params:,} parameters")
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
        raise CheckpointError(f"no checkpoint under {OUT_ROOT}/; train a model first: python train.py")
    if path.suffix == ".bin":
        raise UsageError(f"{path}: is a model file already; name a checkpoint or a run's folder, or --verify it")
    return checkpoint.find_best(path) or path


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
