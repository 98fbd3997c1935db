import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamalet.errors import DataError, DiskError, UsageError
from training.run import plot

ROOT = Path(__file__).parents[3]
PNG = b"\x89PNG"


def write_run(
    folder: Path, *, steps: int = 200, floor: float | None = 1.0, times: bool = True, end: float = 1.5
) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(steps)
    lines = []
    for step in range(1, steps + 1):
        loss = end + 5 * np.exp(-step / 30)
        time = {"elapsed_s": 2.0 * step} if times else {}
        lines.append({"step": step, "tokens": 100 * step, "loss": loss + 0.1 * rng.standard_normal()} | time)
        if step % 50 == 0:
            lines.append({"step": step, "tokens": 100 * step, "val_loss": loss, "entropy": floor} | time)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_picture_of_one_run_lies_in_its_folder(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert plot.main([str(folder)]) == 0
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    assert capsys.readouterr().out == f"{folder / 'loss.png'}\n"


def test_several_runs_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(write_run(tmp_path / f"run{n}", steps=100 + 50 * n, floor=1.0 + n // 2)) for n in range(6)]
    assert plot.main(folders) == 0
    assert Path("compare.png").read_bytes().startswith(PNG)
    assert plot.main([*folders, "--out=picture.svg", "--log-y"]) == 0
    drawn = Path("picture.svg").read_text()
    assert drawn.lstrip().startswith("<?xml")
    for n in range(6):
        assert f"<!-- run{n}: validation" in drawn
    for n in range(3):
        assert f"<!-- corpus entropy {1 + n:.4f}" in drawn
    assert "<!-- time (minutes)" in drawn and "<!-- tokens" in drawn


def drawn(folder: Path, *words: str) -> str:
    """Draw a run and return the picture as text, in which matplotlib names what it writes."""
    assert plot.main([str(folder), f"--out={folder / 'drawn.svg'}", *words]) == 0
    return (folder / "drawn.svg").read_text()


@pytest.mark.parametrize("log_y", [[], ["--log-y"]], ids=str)
@pytest.mark.parametrize(
    ("options", "label", "points", "floor", "unit"),
    [
        ({"steps": 1}, "run", (1, 0), False, "seconds"),
        ({"steps": 3}, "run", (3, 0), False, "seconds"),
        ({"times": False}, "run: validation 1.5064", (200, 4), True, "seconds"),
        ({"floor": None}, "run: validation 1.5064", (200, 4), False, "minutes"),
        ({"end": 1.0, "steps": 4000}, "run: validation 1.0000", (4000, 80), True, "hours"),
    ],
    ids=str,
)
def test_runs_of_every_kind_are_drawn_with_all_that_they_have(
    tmp_path, monkeypatch, options, label, points, floor, unit, log_y
):
    lines, plot_ = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **look: (lines.append(len(x)), plot_(axes, x, y, **look))[1])
    picture = drawn(write_run(tmp_path / "run", **options), *log_y)
    assert f"<!-- {label} -->" in picture and f"<!-- time ({unit}) -->" in picture
    assert ("<!-- corpus entropy 1.0000 -->" in picture) == floor
    losses, validations = points
    by_time = [losses, losses, validations] if options.get("times", True) else [0, 0, 0]
    assert lines == [losses, losses, validations, *by_time]


def test_a_run_of_validation_losses_alone_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "tokens": 50, "elapsed_s": 1.0, "val_loss": 2.0}\n')
    assert f"<!-- {tmp_path.name}: validation 2.0000 -->" in drawn(tmp_path)


BEGINS = {"png": PNG, "svg": b"<?xml", "pdf": b"%PDF", "PNG": PNG, "": PNG}


@pytest.mark.parametrize("ending", BEGINS)
def test_the_ending_says_of_which_kind_a_picture_is_and_its_path_is_printed(tmp_path, capsys, ending):
    folder, out = write_run(tmp_path / "run"), tmp_path / "pictures" / f"pic.{ending}".rstrip(".")
    assert plot.main([str(folder), f"--out={out}"]) == 0
    printed = Path(capsys.readouterr().out.rstrip("\n"))
    assert printed == (out if ending else out.with_name("pic.png"))
    assert printed.read_bytes().startswith(BEGINS[ending])
    assert list(out.parent.iterdir()) == [printed]


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    plot.draw([folder], folder / "loss.png")
    old = (folder / "loss.png").read_bytes()

    def half(figure, file, **options):
        with open(file, "wb") if isinstance(file, Path) else contextlib.nullcontext(file) as picture:
            picture.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(DiskError, match=r"loss\.png: cannot be written: No space left on device"):
        plot.draw([folder], folder / "loss.png")
    assert (folder / "loss.png").read_bytes() == old
    assert sorted(path.name for path in folder.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_smoothing_keeps_the_mean_and_comes_no_later():
    line = np.linspace(5.0, 1.0, 301)
    np.testing.assert_allclose(plot.smooth(line), line)  # a trend is not shifted
    noise = np.random.default_rng(0).standard_normal(1000)
    assert plot.smooth(noise).std() < 0.25
    assert len(plot.smooth(np.array([]))) == 0


def test_the_first_steps_do_not_squeeze_the_rest(tmp_path):
    (run,) = plot.open_runs([write_run(tmp_path / "run", steps=1000)])
    low, high = plot._limits([run], {1.0}, log_y=False)
    assert low < 1.0 and 2.0 < high < 4.0
    low, high = plot._limits([run], {1.0}, log_y=True)
    assert low < 1.0 and high > 6.0


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / "a" / "out"), write_run(tmp_path / "b" / "out"), write_run(tmp_path / "c")]
    assert [run.name for run in plot.open_runs(folders)] == [str(folders[0]), str(folders[1]), "c"]


def test_mistakes_are_told(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="missing: not a run"):
        plot.main([str(tmp_path / "missing")])
    folder = write_run(tmp_path / "run")
    for name in ("picture.wav", "v1.5"):
        with pytest.raises(UsageError, match=rf"{name}: the suffix must be one of png, svg, pdf"):
            plot.main([str(folder), "--out=" + str(tmp_path / name)])
    with pytest.raises(UsageError, match="the suffix must be"):
        plot.main([str(folder), "--out="])
    with pytest.raises(DiskError, match="cannot be written"):
        plot.main([str(folder), "--out=" + str(folder / "metrics.jsonl" / "picture.png")])
    for words in ([], [str(folder), "--frob"]):
        with pytest.raises(UsageError, match="--help"):
            plot.main(words)
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(DataError, match="line 1 is damaged"):
        plot.main([str(folder)])
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": "abc"}\n')
    with pytest.raises(DataError, match='line 2 is damaged: "loss": "abc" is not a number'):
        plot.main([str(folder)])
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no losses yet"):
        plot.main([str(folder)])


def test_a_picture_that_fails_stops_no_run(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.draw_or_warn(folder) is None
    assert capsys.readouterr().err.startswith(f"warning: no {folder / 'loss.png'}: matplotlib is not installed")


def test_no_torch_is_needed(tmp_path):
    folder = write_run(tmp_path / "run")
    code = "import sys; from training.run import plot; plot.main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
