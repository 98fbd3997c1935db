"""Convert a model to a raw binary, a Hugging Face folder or a GGUF file, and prove the result.

  python export.py --dtype q8               the newest run's best checkpoint -> out/model_v3_q8.bin (8 bits)
  python export.py                          the same -> out/model.bin (float32)
  python export.py --dtype q4 --calibrate data/synthetic/tok2048     rounded for what the model reads: costs less
  python export.py story.bin --checkpoint out/run --version 0
  python export.py Llama-3.2-1B.bin --version 2 --hf meta-llama/Llama-3.2-1B
  python export.py story.gguf --bin story.bin --dtype q8_0
  python export.py story-hf --llama2c out/ckpt.pt --tokenizer tokenizer.model
  python export.py --verify out/model_q8.bin

OUT ends in .bin or .gguf, or is a Hugging Face folder. llama2.c's run reads version 0 of a .bin, its runq version 2.
The tokenizer goes with the model. Every .bin is proved: the runtime and PyTorch compute the same from it. Other formats
are read back and compared.
"""

if __name__ == "__main__":
    import _signal

    if hasattr(_signal, "pthread_sigmask"):  # until `begin` handles Ctrl-C, it has to wait
        _signal.pthread_sigmask(_signal.SIG_BLOCK, [_signal.SIGINT])
    from llamalet import startup

    startup.begin()  # before imports that take seconds

import dataclasses
import itertools
import operator
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configurator import parse
from corpus import text_files
from llamalet import calibration, model_file, shards
from llamalet.command import nothing_to_lose, run
from llamalet.convert import formats
from llamalet.convert.imported_model import ImportedModel
from llamalet.convert.target import Target, read_back, with_tokenizer, write
from llamalet.errors import CheckpointError, ConfigError, DataError, FormatError, TokenizerError, UsageError
from llamalet.model_file import checkpoint
from llamalet.model_file.tensors import Rows
from llamalet.model_file.writer import DEFAULT_DTYPES
from llamalet.tokenizer import Tokenizer

OUT_ROOT = Path("out")
MAX_CALIBRATION_TOKENS = 1 << 20  # of a text file, from which the windows are taken


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """The options of export.py."""

    out: str | None = None
    """The file or folder to write, also as the first word; by default a .bin named after its version and dtype, in the
    run's folder with --checkpoint, else in out/."""
    format: str | None = None
    """bin, hf (a Hugging Face folder) or gguf; by default what OUT's ending says."""
    version: int | None = None
    """Of a .bin: 0 and 1 are float32, 2 is int8, 3 has a --dtype; by default 3 with a --dtype, else 1."""
    dtype: str | None = None
    """Type of the weights. Version 3: f32, bf16 (bfloat16), q8 or q4 (8 or 4 bits, in groups with a scale), by default
    q8. hf: f32 or bf16. gguf: f32, f16, q8_0 or q4_0. Both are f32 by default."""
    checkpoint: str | None = None
    """A checkpoint, or a run's folder, whose best one is taken; by default the newest run under out/."""
    hf: str | None = None
    """A Hugging Face folder, or the ID of a repository on the Hub, which is downloaded first."""
    meta_llama: str | None = None
    """Meta's folder: params.json and consolidated.*.pth."""
    llama2c: str | None = None
    """llama2.c's checkpoint (ckpt.pt), or a .bin of llama2.c or its forks."""
    gguf: str | None = None
    """A GGUF file."""
    bin: str | None = None
    """A .bin of any version."""
    tokenizer: str | None = None
    """The model's tokenizer, if it is not with the model."""
    no_tokenizer: bool = False
    """Write no tokenizer, where the model's own cannot be read or cannot be written in the format."""
    rope_theta: float | None = None
    """The rope_theta of llama2.c's files, which do not say it; Llama 3's is 500000."""
    rope_scaling: float | None = None
    """The factor of RoPE scaling of the same files: 8 for Llama 3.1 and 3.3, 32 for Llama 3.2's 1B and 3B."""
    check: bool = True
    """Prove or compare the result; --no-check skips that."""
    verify: str | None = None
    """Prove an existing .bin instead of writing one."""
    calibrate: str | None = None
    """With dtype q8 or q4 of a .bin: prepared data (its train split), or a .txt, .jsonl or .parquet file, like what the
    model will read. The weights are rounded so that its outputs there change least."""
    data: str | None = None
    """Prepared data for the proof; by default what the model was trained on, or the newest that fits."""
    force: bool = False
    """Write version 0 even if that loses the model's norm_eps."""

    def __post_init__(self) -> None:
        """Raise a ConfigError about options that contradict each other."""
        self.target  # noqa: B018
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
        if self.verify is not None and (self.dtype or self.calibrate or self.force or not self.check):
            raise ConfigError(
                f"verify={self.verify}: proves a file, so --dtype, --calibrate, --force and --no-check do not fit"
            )
        if self.calibrate is not None and self.calibrated_dtype is None:
            raise ConfigError(
                f"calibrate={self.calibrate}: chooses how a .bin's weights are rounded to q8 or q4; add --dtype q4"
            )

    @property
    def target(self) -> Target:
        """What to write."""
        return Target(
            out=self.out, named_format=self.format, named_version=self.version, dtype=self.dtype,
            without_tokenizer=self.no_tokenizer,
        )  # fmt: skip

    @property
    def calibrated_dtype(self) -> str | None:
        """The dtype that calibration rounds to; None if what is written has none of its dtypes."""
        if self.target.format != "bin" or self.target.version != 3:
            return None
        dtype = self.dtype or DEFAULT_DTYPES[3]
        return dtype if dtype in calibration.DTYPES else None

    def path(self, source: Path) -> Path:
        """Return the file or folder to write when the checkpoint `source` is exported."""
        run_dir = source.parent.parent if source.parent.name == checkpoint.FOLDER else source.parent
        return self.target.path(OUT_ROOT if self.checkpoint is None else run_dir)


def main(argv: Sequence[str]) -> int:
    """Export or verify as the command line says; return 0, or FormatError's code if the proof fails."""
    config = parse(ExportConfig, argv, program="python export.py", description=__doc__ or "", positional=("out",))
    if config.verify is not None:
        return _verify(Path(config.verify), config.data)
    config.target.check_writable()
    source, trained_on = _open(config)
    path, keep = config.path(Path(source.name)), None if config.tokenizer is None else Path(config.tokenizer)
    rounded = source
    if config.calibrate is not None and config.calibrated_dtype is not None:
        rounded = _calibrated(source, config.calibrate, config.calibrated_dtype)
    write(rounded, config.target, path, keep=keep, force=config.force)
    code = 0
    if config.check and config.target.format == "bin":
        sha256 = None if source.tokenizer is None else source.tokenizer.sha256
        data = _find_data(config.data, trained_on, sha256)
        code = _prove(path, data, source.tensors, calibrated=config.calibrate is not None)
    elif config.check and not read_back(source, config.target, path):
        code = FormatError.exit_code
    if code == 0 and config.target.format == "bin":
        print(f"run it: python sample.py {shlex.quote(str(path))}{'' if source.tokenizer else ' -z TOKENIZER'}")
    return code


def _open(config: ExportConfig) -> tuple[ImportedModel, str | None]:
    """Open the model to export; return it and the data that it was trained on, if that is known."""
    kind = next((kind for kind in formats.FORMATS if getattr(config, kind) is not None), None)
    trained_on = None
    if kind is not None:
        name = getattr(config, kind)
        source = formats.read(kind, name, rope_theta=config.rope_theta, rope_scaling=config.rope_scaling)
    elif config.rope_theta is not None or config.rope_scaling is not None:
        raise ConfigError("rope_theta, rope_scaling: a checkpoint says what they are; leave them out")
    else:
        source = formats.read("checkpoint", str(_find_checkpoint(config.checkpoint)))
        facts = checkpoint.read_facts(Path(source.name))
        print(f"checkpoint of step {facts.step}:")
        trained_on = facts.data
    source = with_tokenizer(source, config.target, None if config.tokenizer is None else Path(config.tokenizer))
    if kind is None:
        formats.tokenizer_of(source)  # a checkpoint says which one it was trained with
    return source, trained_on


def _verify(path: Path, named_data: str | None) -> int:
    """Prove an existing model file."""
    file = model_file.read(path)
    print(f"{path}: version {file.version}, {file.dtype}, {file.config.n_params:,} parameters")
    return _prove(path, _find_data(named_data, None, file.tokenizer_sha256), None)


def _calibrated(source: ImportedModel, data: str, dtype: str) -> ImportedModel:
    """Return a model with its matrices rounded to a dtype for some text, and print what was done."""
    start = time.perf_counter()
    texts = calibration_windows(source, data)
    print(f"calibrating {dtype} on {texts.size:,} tokens of {data} ...", flush=True)
    tensors = calibration.calibrate(source.config, source.tensors, dtype, texts)
    done = f"its weights were rounded to {dtype} for {texts.size:,} tokens of {data}"
    notes = (*source.notes, f"{done}, in {time.perf_counter() - start:.1f} s")
    return dataclasses.replace(source, tensors=tensors, notes=notes)


def calibration_windows(source: ImportedModel, name: str) -> NDArray[np.int64]:
    """Return windows of the text to calibrate a model on, spread evenly over it: ids (B, T).

    Args:
        source: the model.
        name: a folder of prepared data, or a file of text.

    Raises:
        DataError: if there is no text or too little, or it was prepared with another vocabulary.
        TokenizerError: if the model has no tokenizer for a file of text.
    """
    path, vocabulary = Path(name), source.tokenizer
    if path.is_dir():
        data = shards.Shards.open(path)
        theirs, ours = data.tokenizer_sha256, source.tokenizer_sha256 if vocabulary is None else vocabulary.sha256
        if ours not in (None, theirs) or data.vocab_size != source.config.vocab_size:
            raise DataError(f"{name}: was prepared with another tokenizer than the model's; name a text file instead")
        tokens: shards.TokenArray | NDArray[np.int64] = data.split("train")
    elif not path.is_file():
        raise DataError(f"{name}: no such file or folder")
    elif vocabulary is None:
        raise TokenizerError(f"{name}: the model has no tokenizer to read text with; name it with --tokenizer FILE")
    else:
        tokens = _encoded(path, vocabulary)
    length = min(calibration.WINDOW, source.config.max_seq_len)
    n = min(calibration.N_WINDOWS, len(tokens) // length)
    if n * length < calibration.MIN_TOKENS:
        raise DataError(f"{name}: {len(tokens):,} tokens; calibration needs {calibration.MIN_TOKENS:,} or more")
    starts = np.linspace(0, len(tokens) - length, n).astype(int).tolist()
    return np.stack([tokens[start : start + length] for start in starts])


def _encoded(path: Path, vocabulary: Tokenizer) -> NDArray[np.int64]:
    """Return the tokens of a file's first documents, each after what begins a text."""
    ids: list[int] = []
    for _, documents in itertools.groupby(text_files.read_texts(path, "file", "text"), key=operator.itemgetter(0)):
        text = "".join(part for _, part in documents)
        if text.strip():
            ids += vocabulary.encode_document(text)
        if len(ids) > MAX_CALIBRATION_TOKENS:
            break
    return np.array(ids, np.int64)


def _prove(
    path: Path, data: shards.Shards | None, originals: Mapping[str, Rows] | None, *, calibrated: bool = False
) -> int:
    """Print the proof of a model file and return the exit code."""
    with nothing_to_lose():
        from parity.proof import prove, second_program
    print(f"comparing {second_program()} and the runtime ...", flush=True)
    proof = prove(path, originals=originals, data=data, calibrated=calibrated)
    print(*proof.lines(), sep="\n")
    return 0 if proof.ok else FormatError.exit_code


def _find_checkpoint(named: str | None) -> Path:
    """Return the checkpoint, or the run's folder, to export: what is named, or the newest run's best checkpoint."""
    path = checkpoint.newest_best(OUT_ROOT) if named is None else Path(named)
    if path is None:
        raise CheckpointError(f"no valid checkpoint under {OUT_ROOT}/; train a model first: python train.py")
    if path.suffix == ".bin":
        raise UsageError(f"{path}: is a model file, not a checkpoint; name it with --bin, or --verify it")
    if kind := formats.other_kind("checkpoint", path):
        raise UsageError(f"{path}: is not a checkpoint; it looks like --from={kind} (export.py: --{kind})")
    return path


def _find_data(named: str | None, trained_on: str | None, tokenizer_sha256: str | None) -> shards.Shards | None:
    """Return prepared data for the proof: the named folder, else what the model was trained on, else the newest.

    Raises:
        DataError: if the named data is missing, damaged or was prepared with another tokenizer. Other data that cannot
            be used is skipped, and the proof says that it had none.
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
