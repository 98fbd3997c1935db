import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from configurator import read_toml
from corpus.record import Record
from llamalet import Model, strict
from llamalet.config import Llama3Scaling, ModelConfig
from llamalet.convert import checkpoint_file, huggingface, meta_llama, safetensors_file
from llamalet.errors import CheckpointError, ConfigError, DataError, FormatError, UsageError
from llamalet.files import read_file
from llamalet.hf_names import MODEL_SAFETENSORS
from llamalet.model_file import checkpoint
from llamalet.options import _options as option_list
from llamalet.shards import read_meta
from training.config import TrainConfig, with_defaults
from training.run import metrics
from training.run.run_state import RunState

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint-1"
BOM = b"\xef\xbb\xbf"
DEEP = b"[" * 20_000

# ---- JSON and TOML ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": [1, 2.5, "x", null, true]}', None),
        (BOM + b'{"a": 1}', None),
        (b'{"a": 1, "a": 1}', None),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'{"a": ' + DEEP, "not valid JSON: it is nested more than 64 deep"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "is nested more than 64 deep"),
        (b'{"a": ' + b'{"a":' * 20_000, "nested more than 64 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is a number of 5000 digits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "is a number of 5001 digits"),
        (b'{"a": NaN}', "x.json: a=nan: must be a finite number"),
        (b'{"a": {"b": [0, -Infinity]}}', r"x.json: a\.b\[1\]=-inf: must be a finite number"),
        (b'{"a": 1e999}', "x.json: a=inf: must be a finite number"),
        (b'{"a": 1, "a": 2}', "'a' is there twice, with different values"),
        (b'{"b": {"a": {"c": 1}, "a": {"c": []}}}', "'a' is there twice"),
        (b'{"a": "\\ud800"}', "holds half of a surrogate pair"),
        (b'{"\\udfff": 1}', "holds half of a surrogate pair"),
    ],
    ids=lambda value: repr(value[:12] if isinstance(value, bytes) else value),
)
def test_json_that_is_read_and_json_that_is_refused(text, words):
    if words is None:
        assert "a" in strict.parse_json(text, "x.json", DataError)
        return
    with pytest.raises(DataError, match=words) as error:
        strict.parse_json(text, "x.json", DataError)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_file_must_hold_an_object_be_a_file_and_not_be_huge(tmp_path):
    with pytest.raises(DataError, match="gone.json: not here"):
        strict.read_json(tmp_path / "gone.json", DataError, "not here")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        strict.read_json(tmp_path, DataError)
    with pytest.raises(DataError, match="cannot be read: not a regular file"):
        strict.read_json(Path("/dev/zero"), DataError)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="list.json: must hold a JSON object, not .1."):
        strict.read_json(tmp_path / "list.json", DataError)
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="huge.json: has more than 16 MB"):
        strict.read_json(tmp_path / "huge.json", DataError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOM + b"seed = 5", None),
        (b"seed = ", "not valid TOML"),
        (b"\xff", "not valid TOML"),
        (b"x = " + DEEP, "not valid TOML: it is nested more than 64 deep"),
        (b"seed = " + b"9" * 5000, "not valid TOML"),
        (b"seed = 0x" + b"f" * 5000, "seed is a number of 20000 bits"),
        (b"learning_rate = inf", "learning_rate=inf: must be a finite number"),
        (b"learning_rate = nan", "learning_rate=nan: must be a finite number"),
    ],
    ids=lambda value: repr(value[:12] if isinstance(value, bytes) else value),
)
def test_toml_that_is_read_and_toml_that_is_refused(tmp_path, text, words):
    path = tmp_path / "x.toml"
    path.write_bytes(text)
    options = {option.name: option for option in option_list(TrainConfig)}
    if words is None:
        assert read_toml(path, options) == {"seed": 5}
        return
    with pytest.raises(ConfigError, match=words):
        read_toml(path, options)


@pytest.mark.parametrize("number", ["9" * 30, "-" + "9" * 30, "9" * 5000])
def test_a_whole_number_that_no_machine_word_holds_is_refused(number):
    with pytest.raises(UsageError, match=r"seed=.{0,110}: must be a whole number"):
        next(option for option in option_list(TrainConfig) if option.name == "seed").convert(number, "seed")


# ---- records ----


class Inner(NamedTuple):
    n: int
    x: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    some: tuple[Inner, ...] = ()
    numbers: list[float] | None = None
    table: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ConfigError("name=bad: is bad")


def test_a_record_is_built_from_an_object():
    fields = {"name": "x", "inner": {"n": 1}, "flag": True, "some": [{"n": 2, "x": 3}], "numbers": [1, 2.5]}
    built = strict.build(Outer, fields | {"table": {"y": None}}, "f", DataError)
    assert built == Outer("x", Inner(1), True, "a", (Inner(2, 3.0),), [1.0, 2.5], {"y": None})
    assert isinstance(built.numbers[0], float)
    assert strict.build(Outer, fields | {"new": 1}, "f", DataError, ignore_unknown=True).name == "x"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ...}, "f: name is missing"),
        ({"name": 5}, "f: name=5: must be a text"),
        ({"name": None}, "name=None: must be a text"),
        ({"name": "bad"}, "f: name=bad: is bad"),
        ({"inner": []}, r"inner=\[\]: must be an object"),
        ({"inner": {}}, r"inner\.n is missing"),
        ({"inner": {"n": 16.0}}, r"inner\.n=16.0: must be a whole number from 0 up"),
        ({"inner": {"n": -5}}, r"inner\.n=-5: must be a whole number from 0 up"),
        ({"inner": {"n": True}}, r"inner\.n=True: must be a whole number"),
        ({"inner": {"n": 2**63}}, r"inner\.n=9223372036854775808: must be a whole number"),
        ({"inner": {"n": 1, "x": 10**400}}, r"inner\.x=1000.*\.\.\..*: must be a number"),
        ({"inner": {"n": 1, "m": 1}}, r"inner\.m is unknown"),
        ({"flag": 1}, "flag=1: must be true or false"),
        ({"kind": "c"}, "kind='c': must be one of a, b"),
        ({"kind": []}, "must be one of a, b"),
        ({"some": {"n": 1}}, r"some=.*: must be a list"),
        ({"some": [{"n": 1}, 5]}, r"some\[1\]=5: must be an object"),
        ({"numbers": ["1"]}, r"numbers\[0\]='1': must be a number"),
        ({"table": 1}, "table=1: must be an object"),
        ({"name": 1, "flag": 2, "kind": 3}, "name=1: .*; flag=2: .*; kind=3: "),
        ({f"x{i}": 0 for i in range(9)}, "x0 is unknown; .*; and 4 more"),
    ],
)
def test_a_record_with_a_wrong_field_is_refused_by_its_name(change, words):
    fields = {"name": "x", "inner": {"n": 1}} | change
    with pytest.raises(DataError, match=words):
        strict.build(Outer, {key: value for key, value in fields.items() if value is not ...}, "f", DataError)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layers": 2**31}, "n_layers=2147483648: must be at most 1024"),
        ({"dim": 8.0}, r"dim=8.0: must be a whole number"),
        ({"vocab_size": -5}, "vocab_size=-5: must be a whole number from 0 up"),
        ({"vocab_size": 0}, "vocab_size=0: must be positive"),
        ({"tied": "yes"}, "tied='yes': must be true or false"),
        ({"rope_scaling": []}, r"rope_scaling=\[\]: must be an object"),
        ({"rope_scaling": {"low": 8}}, "rope_scaling=.*: must be an object of a known kind"),
        ({"new": 1}, "new is unknown"),
    ],
)
def test_a_model_config_is_checked(change, words):
    fields = ModelConfig.create(dim=8, n_layers=1, n_heads=2, vocab_size=276, max_seq_len=32).to_dict()
    assert ModelConfig.from_dict(fields).to_dict() == fields
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict(fields | change)


# ---- every file of ours and of others ----


def edited(path: Path, **changes: Any) -> Path:
    """Change fields of a JSON file; ... removes one."""
    fields = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    return path


def test_the_oldest_checkpoint_still_loads():
    state = RunState.read(GOLDEN)
    assert state.step == 2 and state.guard is None and state.machine == {}
    assert with_defaults(state.train_config | {"data": state.data})().schedule == "cosine"
    assert checkpoint.read_facts(GOLDEN).model_config == state.model_config
    checkpoint.verify(GOLDEN)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_config": {"n_layers": 2**31}}, "n_layers=2147483648: must be at most 1024"),
        ({"model_config": {"dim": 16.0}}, r"model_config\.dim=16.0: must be a whole number"),
        ({"model_config": ...}, "model_config is missing"),
        ({"model_config": []}, "model_config=.*: must be an object"),
        ({"step": -1}, "step=-1: must be a whole number"),
        ({"step": ...}, "step is missing"),
        ({"val_loss": []}, r"val_loss=\[\]: must be a number"),
        ({"val_loss": float("inf")}, "val_loss=inf: must be a finite number"),
        ({"tokenizer": 5}, "tokenizer=5: must be a text"),
        ({"tokenizer_sha256": 5}, "tokenizer_sha256=5: must be a text"),
    ],
)
def test_a_wrong_field_of_state_json_is_named(tmp_path, changes, words):
    shutil.copytree(GOLDEN, tmp_path / "step-00000002")
    path = tmp_path / "step-00000002" / "state.json"
    if isinstance(shape := changes.get("model_config"), dict):
        changes = {"model_config": json.loads(path.read_bytes())["model_config"] | shape}
    edited(path, **changes)
    for read in (checkpoint_file.read, RunState.read, lambda path: Model.load(path, backend="numpy")):
        with pytest.raises(CheckpointError, match=f"state.json: .*{words}"):
            read(path.parent)


@pytest.mark.parametrize("content", [DEEP, BOM + b"[]", b"9" * 5000, b'{"a": NaN}'])
def test_state_json_and_manifest_json_that_cannot_be_parsed_are_refused(tmp_path, content):
    shutil.copytree(GOLDEN, tmp_path / "step-00000002")
    for name in ("state.json", "manifest.json"):
        (tmp_path / "step-00000002" / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            (checkpoint.verify if name == "manifest.json" else checkpoint_file.read)(tmp_path / "step-00000002")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": []}, r"files=\[\]: must be an object"),
        ({"files": {"a": 1}}, "files.a=1: must be an object"),
        ({"files": {"state.json": {"bytes": -1, "sha256": ""}}}, "bytes=-1: must be a whole number"),
        ({"files": {name: {"bytes": 0, "sha256": ""} for name in MODEL_SAFETENSORS.split()}}, "must list"),
        ({"version": float("nan")}, "version=nan: must be a finite number"),
        ({"version": ...}, "version is None"),
        ({"step": None}, "step=None: must be a whole number"),
    ],
)
def test_a_wrong_field_of_manifest_json_is_named(tmp_path, changes, words):
    shutil.copytree(GOLDEN, tmp_path / "step-00000002")
    edited(tmp_path / "step-00000002" / "manifest.json", **changes)
    with pytest.raises(CheckpointError, match=f"manifest.json: .*{words}"):
        checkpoint.verify(tmp_path / "step-00000002")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": "8"}, "dim='8': must be a whole number"),
        ({"dropout": None}, "dropout=None: must be a number"),
        ({"tied": 1}, "tied=1: must be true or false"),
        ({"optimizer": "sgd"}, "optimizer='sgd': must be one of adamw, muon"),
        ({"learning_rate": -1}, "learning_rate=-1.0: must be positive"),
        ({"save_every": True}, "save_every=True: must be a text"),
        ({"save_every": ...}, "lack save_every"),
        ({"optimizer": ..., "seed": ...}, "lack optimizer, seed"),
    ],
)
def test_settings_of_a_saved_run_are_checked(changes, words):
    saved = dataclasses.asdict(TrainConfig()) | changes
    with pytest.raises(CheckpointError, match=f"the settings of the saved run:? .*{words}"):
        with_defaults({key: value for key, value in saved.items() if value is not ...})


def test_a_guard_of_another_length_is_refused(tmp_path):
    shutil.copy(GOLDEN / "state.json", tmp_path)
    edited(tmp_path / "state.json", guard=[1, 2, 3])
    with pytest.raises(CheckpointError, match="guard has 3 numbers, must have 4"):
        RunState.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": {"train": [{"file": "a", "bytes": -1, "sha256": ""}]}}, r"files\.train\[0\]\.bytes=-1: must be"),
        ({"files": {"train": [{"file": "../a", "bytes": 1, "sha256": ""}]}}, "file='../a': must be inside"),
        ({"files": {"val": []}}, "files has no training files"),
        ({"entropy": {"stories": 1}}, "entropy.nats is missing"),
        ({"entropy": {"nats": "x"}}, r"entropy\.nats='x': must be a number"),
        ({"source": 5}, "source=5: must be a text"),
        ({"format": []}, "of another format or version"),
    ],
)
def test_a_wrong_field_of_source_json_is_named(tmp_path, changes, words):
    (tmp_path / "a.txt").write_text("a")
    fields = {"format": "llamalet source", "version": 1, "source": "x", "files": {"train": []}}
    fields["files"]["train"].append({"file": "a.txt", "bytes": 1, "sha256": ""})
    (tmp_path / "source.json").write_text(json.dumps(fields))
    assert Record.read(tmp_path).files["train"][0].bytes == 1
    edited(tmp_path / "source.json", **changes)
    with pytest.raises(DataError, match=f"source.json: .*{words}.*; delete it and make the source again"):
        Record.read(tmp_path)


@pytest.mark.parametrize("content", [DEEP, b"9" * 5000, b'{"a": NaN}'])
def test_files_of_others_that_cannot_be_parsed_are_refused(tmp_path, content):
    for name, read, error in (
        ("config.json", huggingface.read, FormatError),
        ("params.json", meta_llama.read, FormatError),
        ("meta.json", lambda folder: read_meta(Path(folder) / "meta.json"), DataError),
        ("source.json", lambda folder: Record.read(Path(folder)), DataError),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=name):
            read(str(tmp_path))
    header = len(content).to_bytes(8, "little") + content
    (tmp_path / "m.safetensors").write_bytes(header)
    with pytest.raises(FormatError, match="its header is damaged"):
        safetensors_file.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": "64"}, "dim='64': must be a whole number"),
        ({"n_layers": 2.0}, "n_layers=2.0: must be a whole number"),
        ({"use_scaled_rope": 1}, "use_scaled_rope=1: must be true or false"),
        ({"rope_theta": []}, r"rope_theta=\[\]: must be a number"),
        ({"norm_eps": None}, "norm_eps=None: must be a number"),
    ],
)
def test_a_wrong_field_of_params_json_is_named(tmp_path, changes, words):
    (tmp_path / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 2} | changes))
    with pytest.raises(FormatError, match=f"params.json: {words}"):
        meta_llama.read(str(tmp_path))


def test_a_record_of_metrics_that_is_huge_is_refused_and_stops_no_run(tmp_path, capsys):
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match="metrics.jsonl: has more than 64 MB"):
        metrics.read(tmp_path / "metrics.jsonl")
    metrics.Metrics(tmp_path, resumed_at=(1, False))
    assert "has more than 64 MB: too large to be such a file; training continues" in capsys.readouterr().err


def test_rope_scaling_takes_whole_numbers():
    fields = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq_len": 8192}
    assert strict.build(Llama3Scaling, fields, "x", FormatError).factor == 8.0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_what_is_no_file_is_named_in_the_words_of_every_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=f"{path}: cannot be read: {why}$"):
            strict.read_bytes(path, DataError, "no such file")
        with pytest.raises(OSError, match=why):
            read_file(path)
