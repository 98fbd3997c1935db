import json
import os
import sys
import types

import pytest

from llamalet.errors import DataError
from training.run import metrics
from training.run.metrics import Metrics, read


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to go."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in for wandb that notes what is asked of it."""
    fake = types.ModuleType("wandb")
    fake.inits, fake.rows, fake.problem, fake.finished, fake.teardown = [], [], None, [], lambda: None

    def init(**arguments):
        fake.inits.append(arguments)
        if fake.problem and arguments.get("mode") != "offline":
            raise fake.problem
        return types.SimpleNamespace(log=lambda row, step: fake.rows.append((step, row)), finish=finish)

    def finish(exit_code):
        fake.finished.append(exit_code)

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("INIT_TIMEOUT", "FINISH_TIMEOUT", "CONSOLE", "QUIET"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that what the code sets is taken back
    return fake


def rows(path):
    return [{key: row[key] for key in row if key != "elapsed_s"} for row in read(path / "metrics.jsonl")]


def test_rows_after_the_checkpoint_are_dropped_and_time_goes_on(tmp_path, clock):
    with Metrics(tmp_path) as record:
        for step in (10, 20, 30):
            clock.now += 5
            record.log({"step": step, "loss": float("nan") if step == 10 else 1.0})
    clock.now += 1000  # nothing runs
    with Metrics(tmp_path, resumed_at=(20, True)) as record:
        clock.now += 2
        record.log({"step": 30, "loss": 2.0})
    lines = read(tmp_path / "metrics.jsonl")
    assert rows(tmp_path) == [{"step": 10, "loss": None}, {"step": 20, "loss": 1.0}, {"step": 30, "loss": 2.0}]
    assert [line["elapsed_s"] for line in lines] == [5, 10, 17]  # the 5 s of the step that is done again were spent
    with Metrics(tmp_path):
        pass
    assert rows(tmp_path) == []


def test_damaged_lines_are_set_aside_and_the_rest_goes_on(tmp_path, capsys):
    text = '{"step": 1}\n{"ste\xff\n[2]\n{"step": 3}\n{"step": 4'
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="line 2 is damaged"):
        read(tmp_path / "metrics.jsonl")
    with Metrics(tmp_path, resumed_at=(3, True)) as record:
        record.log({"step": 4})
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == text.encode("latin-1")
    assert "2 lines damaged" in capsys.readouterr().err


NO_NUMBERS = ['"abc"', "[1]", "true", "{}", "NaN", "-Infinity", "1e999", "1" + 400 * "0", '"5"', 20000 * "["]


@pytest.mark.parametrize("key", ["step", "loss", "entropy", "elapsed_s"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: value[:10])
def test_what_is_no_number_is_damage_and_stops_no_run(key, value, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    bad = json.dumps({"step": 2, key: "HERE"}).replace('"HERE"', value)
    path.write_text(f'{{"step": 1, "loss": null, "elapsed_s": null}}\n{bad}\n')
    named = "not JSON" if value.startswith("[[") else f'"{key}": {"Infinity" if value == "1e999" else value[:50]}'
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: line 2 is damaged: {named}") and "\n" not in str(error.value)
    with Metrics(tmp_path, resumed_at=(3, True)) as record:
        record.log({"step": 4})
    assert rows(tmp_path) == [{"step": 1, "loss": None}, {"step": 4}]
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {path}: line 2 damaged: {named}") and err.count("\n") == 1
    assert bad in (tmp_path / "metrics.damaged.jsonl").read_text()


@pytest.mark.parametrize("step", ["null", "1.5"])
def test_a_step_is_a_whole_number(step, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    with pytest.raises(DataError, match=f'line 1 is damaged: "step": {step} is not a number'):
        read(tmp_path / "metrics.jsonl")


def test_a_line_that_was_cut_off_is_no_damage(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    Metrics(tmp_path, resumed_at=(2, True))
    assert rows(tmp_path) == [{"step": 1}]
    assert not (tmp_path / "metrics.damaged.jsonl").exists() and not capsys.readouterr().err


def test_a_disk_that_takes_nothing_costs_one_line_and_gets_the_rows_later(tmp_path, capsys):
    folder = tmp_path / "run"
    record = Metrics(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    record.log({"step": 1})
    record.log({"step": 2})
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "training continues" in err
    (folder / "metrics.jsonl").rmdir()
    record.log({"step": 3})
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]


def test_a_row_that_a_full_disk_cut_in_two_is_made_whole(tmp_path, monkeypatch):
    """As a disk with a few bytes left does it: a part is written, then nothing."""
    record, real = Metrics(tmp_path), metrics.Path.open
    room = [7, 0]

    def small(path, *words, **options):
        file = real(path, *words, **options)
        if not room:
            return file

        class Full:
            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *error: file.close()  # noqa: E731

            def write(self, data):
                if not (left := room.pop(0)):
                    raise OSError(28, os.strerror(28))
                return file.write(data[:left])

        return Full()

    monkeypatch.setattr(metrics.Path, "open", small)
    record.log({"step": 1})
    record.log({"step": 2})
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_folder_that_cannot_be_had_stops_nothing(tmp_path, capsys, wandb):
    (tmp_path / "file").write_text("")
    with Metrics(tmp_path / "file", resumed_at=(3, True), wandb={}) as record:
        record.log({"step": 4})
    err = capsys.readouterr().err
    assert "is incomplete" in err and "no wandb" in err and err.count("\n") == 2


def test_wandb_goes_on_with_the_run_by_its_id(tmp_path, wandb):
    for resumed_at in (None, (2, True), None):
        with Metrics(tmp_path, resumed_at=resumed_at, wandb={"project": "p"}) as record:
            record.log({"step": 3, "loss": 1.0})
            record.log_story(3, "Once")
    first, second, third = (arguments["id"] for arguments in wandb.inits)
    assert first == second != third  # a run that starts afresh is another
    assert all(arguments["resume"] == "allow" for arguments in wandb.inits)
    assert wandb.rows[0][0] == 3 and wandb.rows[0][1]["loss"] == 1.0
    assert wandb.rows[1] == (3, {"story": "Once"})
    assert wandb.finished == [0, 0, 0]


def test_wandb_without_a_server_works_offline(tmp_path, wandb, capsys):
    wandb.problem = RuntimeError("no\nnetwork.")
    with Metrics(tmp_path, wandb={}) as record:
        record.log({"step": 1})
    assert [arguments.get("mode") for arguments in wandb.inits] == [None, "offline"]
    assert "warning: wandb is offline: no network; " in capsys.readouterr().err
    assert len(wandb.rows) == 1


def test_wandb_that_breaks_is_left_alone(tmp_path, wandb, monkeypatch, capsys):
    record = Metrics(tmp_path, wandb={})
    monkeypatch.setattr(record._wandb, "log", lambda row, step: 1 / 0)
    record.log({"step": 1})
    record.log({"step": 2})
    assert capsys.readouterr().err == "warning: wandb stopped: division by zero\n"
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    with Metrics(tmp_path, wandb={}) as record:
        monkeypatch.setattr(record._wandb, "finish", lambda exit_code: 1 / 0)
    assert capsys.readouterr().err == "warning: wandb: division by zero\n"


def test_without_wandb_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Metrics(tmp_path, wandb={}) as record:
        record.log({"step": 1})
    assert "warning: no wandb: import of wandb halted" in capsys.readouterr().err


def test_the_real_wandb_asks_nobody_and_resumes(tmp_path, monkeypatch, capsys):
    """Without a key, on a terminal: it must neither ask nor wait, but record offline."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in (("HOME", str(tmp_path)), ("NETRC", str(tmp_path / "none")), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    for name in ("INIT_TIMEOUT", "FINISH_TIMEOUT", "CONSOLE", "QUIET"):
        monkeypatch.setenv(f"WANDB_{name}", {"CONSOLE": "off", "QUIET": "true"}.get(name, "10"))

    class Terminal:
        isatty = staticmethod(lambda: True)

        def readline(self, *words):
            raise AssertionError("a question was asked")

        read = readline

    monkeypatch.setattr(sys, "stdin", Terminal())
    for resumed_at in (None, (1, True)):
        with Metrics(tmp_path / "run", resumed_at=resumed_at, wandb={"project": "p"}) as record:
            record.log({"step": 2 if resumed_at else 1, "loss": 2.0})
    names = {path.name.split("-")[3] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert names == {(tmp_path / "run" / "wandb" / "id").read_text()}
    assert "wandb is offline: No API key" in capsys.readouterr().err


def test_rows_are_lines_of_json(tmp_path):
    with Metrics(tmp_path) as record:
        record.log({"step": 1, "loss": 0.5, "mfu": None})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(line)) == {"step", "loss", "mfu", "elapsed_s"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_in_the_place_of_the_record_is_not_waited_for(tmp_path, capsys, wandb):
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "wandb").mkdir()
    os.mkfifo(tmp_path / "wandb" / "id")
    with Metrics(tmp_path, resumed_at=(1, True), wandb={}) as record:
        record.log({"step": 2, "loss": 1.0})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: ") and "is incomplete: " in first and "not a regular file" in first
    assert second.startswith("warning: no wandb: ") and "not a regular file" in second


def test_without_a_stderr_a_warning_goes_nowhere(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").mkdir()
    monkeypatch.setattr(sys, "stderr", None)
    with Metrics(tmp_path) as record:
        record.log({"step": 1})
    assert capsys.readouterr().out == ""
