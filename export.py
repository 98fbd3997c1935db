"""Write a model for others to run: a raw binary, a Hugging Face folder or a GGUF file, from any of these or Meta's.

  python export.py --dtype q8               the newest best checkpoint under out/ -> out/model_v3_q8.bin (8 bits)
  python export.py                          the same -> out/model.bin (float32)
  python export.py story.bin --checkpoint out/run --version 0
  python export.py Llama-3.2-1B.bin --version 2 --hf meta-llama/Llama-3.2-1B
  python export.py story.gguf --bin story.bin --dtype q8_0
  python export.py story-hf --llama2c out/ckpt.pt --tokenizer tokenizer.model
  python export.py --verify out/model_q8.bin

OUT ends in .bin or .gguf, or else is a Hugging Face folder. sample.py reads all versions of .bin, llama2.c's run
version 0 and its runq version 2; the tokenizer goes beside the file. Every .bin is proved: the runtime computes from it
what PyTorch does. The others are read back and compared.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configurator import parse
from llamalet import model_file, shards, tokenizer
from llamalet.config import ModelConfig
from llamalet.convert import bin_file, formats, gguf_file, huggingface
from llamalet.convert.imported_model import ImportedModel, Reported, compact, difference
from llamalet.errors import CheckpointError, ConfigError, DataError, FormatError, UsageError, run
from llamalet.model_file.header import DTYPES
from llamalet.model_file.tensors import Rows

VERSIONS = (0, 1, 2, 3)
DEFAULT_NAMES = {0: "model_v0.bin", 1: "model.bin", 2: "model_q8.bin"}
OUT_ROOT = Path("out")
CHECKPOINTS = "checkpoints"  # of a run's folder

# What OUT can become, the dtypes of each, and how far rounding to them may move a matrix, as a share of its root mean
# square: a bit less than the type's last bit; for blocks of 32 with a scale about three times what was seen.
SUFFIXES = {".bin": "bin", ".gguf": "gguf"}
FORMAT_DTYPES = {"bin": DTYPES, "hf": tuple(huggingface.DTYPE_NAMES), "gguf": tuple(gguf_file.DTYPES)}
ROUNDING = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-10, "q8_0": 0.02, "q4_0": 0.3}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The options of export.py."""

    out: str | None = None
    """The file or folder to write, also as the first word; when left out, a .bin whose name says the version and dtype,
    in the run's folder where --checkpoint names one, else in out/."""
    format: str | None = None
    """bin, hf (a Hugging Face folder) or gguf; when left out, what OUT's ending says."""
    version: int | None = None
    """Of a .bin: 0 and 1 are float32, 2 is int8, 3 has a --dtype; 1 when left out, and 3 where there is a --dtype."""
    dtype: str | None = None
    """What the weights become. Version 3: f32, bf16 (bfloat16), q8 or q4 (8 or 4 bits, in groups with a scale); q8 when
    left out. hf: f32 or bf16. gguf: f32, f16, q8_0 or q4_0. Both are f32 when left out."""
    checkpoint: str | None = None
    """A checkpoint, or a run's folder, whose best one is taken; the newest run under out/ when no model is named."""
    hf: str | None = None
    """A Hugging Face folder, or the ID of a repository on the Hub, which is fetched first."""
    meta_llama: str | None = None
    """A folder of Meta's: params.json and consolidated.*.pth."""
    llama2c: str | None = None
    """A checkpoint of llama2.c's (ckpt.pt), or a .bin of it or its descendants."""
    gguf: str | None = None
    """A GGUF file."""
    bin: str | None = None
    """A .bin of any version."""
    tokenizer: str | None = None
    """The model's tokenizer, where it does not lie beside the model."""
    rope_theta: float | None = None
    """What the model was trained with, for llama2.c's files, which do not say; Llama 3's is 500000."""
    rope_scaling: float | None = None
    """The factor of its RoPE scaling, for the same files: 8 for Llama 3.1 and 3.3, 32 for the 1B and 3B of 3.2."""
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
        if self.format is not None and self.format not in FORMAT_DTYPES:
            raise ConfigError(f"format={self.format}: must be one of {', '.join(FORMAT_DTYPES)}")
        if self.out == "":
            raise ConfigError("out='': names no file or folder")
        ending = "" if self.out is None else Path(self.out).suffix
        if self.format is None and ending not in SUFFIXES and ending[1:].isalpha():
            raise ConfigError(f"out={self.out}: must end in .bin or .gguf; for a folder of this name add --format=hf")
        suffix = None if self.out is None else SUFFIXES.get(ending, "hf")
        if self.format is not None and suffix not in (None, "hf", self.format):
            raise ConfigError(f"format={self.format}: OUT is {self.out}; leave one of them out")
        if self.format == "bin" and suffix == "hf":
            raise ConfigError(f"out={self.out}: must end in .bin")
        if self.format == "gguf" and suffix == "hf":
            raise ConfigError(f"out={self.out}: must end in .gguf")
        kinds = FORMAT_DTYPES[self.resolved_format]
        if self.dtype is not None and self.dtype not in kinds:
            raise ConfigError(f"dtype={self.dtype}: must be one of {', '.join(kinds)} in a {self.resolved_format}")
        if self.version is not None and self.resolved_format != "bin":
            raise ConfigError(f"version={self.version}: only a .bin has versions, and OUT is {self.out}")
        if self.dtype is not None and self.version not in (None, 3):
            raise ConfigError(f"dtype={self.dtype}: version {self.version} has no choice of it; leave one of them out")
        named = [name for name in ("checkpoint", *formats.FORMATS) if getattr(self, name) is not None]
        if len(named) > 1:
            raise ConfigError(f"{', '.join(named)}: only one model can be exported at a time")
        if self.verify is not None and (self.out is not None or named):
            raise ConfigError(
                f"verify={self.verify}: checks an existing file, so neither OUT nor a model to export fit"
            )
        if named and named != ["checkpoint"] and self.out is None:
            raise ConfigError(
                f"{named[0]}={getattr(self, named[0])}: name the file or folder to write as the first word"
            )
        if self.verify is not None and (self.dtype is not None or self.force or not self.check):
            raise ConfigError(f"verify={self.verify}: proves a file, so --dtype, --force and --no-check do not fit")

    @property
    def resolved_format(self) -> str:
        """The format to write."""
        if self.format is not None:
            return self.format
        return "bin" if self.out is None else SUFFIXES.get(Path(self.out).suffix, "hf")

    @property
    def resolved_version(self) -> int:
        """The version to write."""
        if self.version is not None:
            return self.version
        return 1 if self.dtype is None else 3

    def path(self, source: Path) -> Path:
        """Return the file or folder to write when the checkpoint `source` is exported."""
        if self.out is not None:
            return Path(self.out)
        run_dir = source.parent.parent if source.parent.name == CHECKPOINTS else source.parent
        folder = OUT_ROOT if self.checkpoint is None else run_dir
        if self.resolved_format != "bin":
            return folder / {"hf": "model_hf", "gguf": "model.gguf"}[self.resolved_format]
        version = self.resolved_version
        return folder / (DEFAULT_NAMES[version] if version < 3 else f"model_v3_{self.dtype or 'q8'}.bin")


def main(argv: Sequence[str]) -> int:
    """Export or verify as the command line says; return 0, or FormatError's code if the proof fails."""
    config = parse(ExportConfig, argv, program="python export.py", description=__doc__ or "", positional=("out",))
    if config.verify is not None:
        return _verify(Path(config.verify), config.data)
    source, trained_on = _open(config)
    path = config.path(Path(source.name))
    if path.is_dir() and config.resolved_format != "hf":
        raise ConfigError(f"{path}: is a folder; a {config.resolved_format} is a file")
    if path.exists() and path.samefile(source.name):
        raise ConfigError(f"{path}: is the model to export, which would be lost; name another file or folder")
    print(f"{source.name}: {_describe(source.config)}")
    for note in source.notes:
        print(f"note: {note}")
    if config.resolved_format != "bin":
        return _export_elsewhere(config, source, path)
    return _export(config, source, path, trained_on)


def _open(config: ExportConfig) -> tuple[ImportedModel, str | None]:
    """Open the model to export; return it and the data that it was trained on, where that is known."""
    kind = next((kind for kind in formats.FORMATS if getattr(config, kind) is not None), None)
    trained_on = None
    if kind is not None:
        name = getattr(config, kind)
        source = formats.read(kind, name, rope_theta=config.rope_theta, rope_scaling=config.rope_scaling)
    elif config.rope_theta is not None or config.rope_scaling is not None:
        raise ConfigError("rope_theta, rope_scaling: a checkpoint says what they are; leave them out")
    else:
        source, trained_on = _open_checkpoint(config.checkpoint)
    if config.tokenizer is not None:
        path = Path(config.tokenizer)
        vocabulary, data = compact(tokenizer.load(path, source.config.vocab_size), path.read_bytes())
        source = dataclasses.replace(source, tokenizer=vocabulary, tokenizer_data=data, notes=())
    return source, trained_on


def _named_tokenizer(config: ExportConfig) -> Path | None:
    """Return the tokenizer that was named, which the export must not remove."""
    return None if config.tokenizer is None else Path(config.tokenizer)


def _open_checkpoint(named: str | None) -> tuple[ImportedModel, str | None]:
    """Open a checkpoint of train.py's; return it and the data that it was trained on."""
    from training.run import checkpoint

    found = checkpoint.load(_find_checkpoint(named))
    print(f"checkpoint of step {found.state.step}:")
    source = ImportedModel(
        name=str(found.path),
        config=found.model_config,
        tensors=found.tensors,
        tokenizer=tokenizer.load(found.tokenizer_path, found.model_config.vocab_size),
        tokenizer_data=found.tokenizer_path.read_bytes(),
    )
    return source, found.state.data


def _describe(c: ModelConfig) -> str:
    """Return a model's shape as a line."""
    scaling = "" if c.rope_scaling is None else f", llama3's scaling by {c.rope_scaling.factor:g}"
    return (
        f"{c.n_params:,} parameters, dim {c.dim}, {c.n_layers} layers, {c.n_heads} heads of {c.head_dim}, "
        f"{c.n_kv_heads} kv heads, vocabulary {c.vocab_size}, context {c.max_seq_len}, rope_theta {c.rope_theta:g}"
        f"{scaling}"
    )


def _export(config: ExportConfig, source: ImportedModel, path: Path, trained_on: str | None) -> int:
    """Write a .bin and prove it."""
    start, version = time.perf_counter(), config.resolved_version
    written = bin_file.write(
        path, version, source.config, Reported(source.tensors, source.config), source.tokenizer, source.tokenizer_data,
        chat_template=source.chat_template, keep=_named_tokenizer(config), dtype=config.dtype, force=config.force,
    )  # fmt: skip
    size, duration = path.stat().st_size, time.perf_counter() - start
    kind = written.dtype if written.group_size is None else f"{written.dtype} in groups of {written.group_size}"
    print(f"wrote {path}: version {version}, {kind}, {size:,} bytes in {duration:.2f} s, read back and compared")
    if version < 3 and (lost := model_file.llama2c_differences(source.config)):
        print(f"note: llama2.c's programs will compute something else from this file: {', '.join(lost)}")
    code = 0
    if config.check:
        sha256 = None if source.tokenizer is None else source.tokenizer.sha256
        code = _prove(path, _find_data(config.data, trained_on, sha256), source.tensors)
    if code == 0:
        print(f"run it: python sample.py {path}{'' if source.tokenizer else ' -z TOKENIZER'}")
    return code


def _export_elsewhere(config: ExportConfig, source: ImportedModel, path: Path) -> int:
    """Write a Hugging Face folder or a GGUF file, read it back and compare."""
    start, dtype, kind = time.perf_counter(), config.dtype or "f32", config.resolved_format
    watched = dataclasses.replace(source, tensors=Reported(source.tensors, source.config))
    others: Sequence[str] = ()
    if kind == "hf":
        huggingface.write(path, watched, dtype, keep=_named_tokenizer(config))
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    else:
        others = gguf_file.write(path, watched, dtype)
        size = path.stat().st_size
    print(f"wrote {path}: {kind}, {dtype}, {size:,} bytes in {time.perf_counter() - start:.2f} s")
    if others:
        print(f"note: {len(others)} matrices are f16, their rows are no multiple of {gguf_file.BLOCK}: {others[0]} ...")
    if source.tokenizer is None:
        print("note: without a tokenizer, which is not known; name it with --tokenizer")
    if not config.check:
        return 0
    found = formats.read(kind, str(path))
    off = difference(source.tensors, found.tensors)
    same = found.config == source.config and off <= ROUNDING[dtype]
    words = "every weight is equal" if not off else f"off by at most {off:.2%} of a matrix's root mean square"
    print(f"read back: {words}{'' if same else ', NOT what was meant'}")
    return 0 if same else FormatError.exit_code


def _verify(path: Path, named_data: str | None) -> int:
    """Prove an existing model file."""
    file = model_file.read(path)
    print(f"{path}: version {file.version}, {file.dtype}, {file.config.n_params:,} parameters")
    return _prove(path, _find_data(named_data, None, file.tokenizer_sha256), None)


def _prove(path: Path, data: shards.Shards | None, originals: Mapping[str, Rows] | None) -> int:
    """Print the proof of a model file and return the exit code."""
    try:
        from parity.proof import prove
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print(f"not proved: comparing it with PyTorch needs torch ({error}); the bytes were read back and compared")
        return 0
    print("comparing PyTorch and the runtime ...", flush=True)
    proof = prove(path, originals=originals, data=data)
    print(*proof.lines(), sep="\n")
    return 0 if proof.ok else FormatError.exit_code


def _find_checkpoint(named: str | None) -> Path:
    """Return the checkpoint to export: the one named, the best of the run named, or the newest run's best."""
    from training.run import checkpoint

    path = checkpoint.newest_best(OUT_ROOT) if named is None else Path(named)
    if path is None:
        raise CheckpointError(f"no sound checkpoint under {OUT_ROOT}/; train a model first: python train.py")
    if path.suffix == ".bin":
        raise UsageError(f"{path}: is a model file, not a checkpoint; name it with --bin, or --verify it")
    if not checkpoint.list_steps(path):
        if not (path / checkpoint.MANIFEST).is_file() and (kind := formats.other_kind("checkpoint", path)):
            raise UsageError(f"{path}: is not a checkpoint; it looks as if it were for --{kind}")
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
