"""A sample of the campaign, and what it must notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import campaign
from fuzz.formats import FORMATS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}

# Every way to fail, as a format whose mutants say what to do.
PROBE = """
import json, os, sys, time
from fuzz import campaign
from fuzz.formats import FORMATS, Format, Seed
from llamalet.errors import FormatError

campaign.SECONDS = 0.5
ACTS = [b"load", b"refuse", b"raise", b"hang", b"die", b"fill", b"exit", b"chatter"]

def use(folder):
    what = (folder / "x").read_bytes()
    if what == b"refuse":
        raise FormatError("no")
    if what == b"chatter":
        raise KeyError("x" * 9000)
    if what == b"raise":
        raise KeyError("y")
    if what == b"hang":
        while True:
            pass
    if what == b"die":
        os.abort()
    if what == b"fill":
        [bytes(100_000_000) for _ in range(20)] and kept.append([b"x" * 100_000_000 for _ in range(20)])
    if what == b"exit":
        sys.exit(3)

kept = []
FORMATS["probe"] = Format(
    lambda: [Seed(str(i), {"x": b"load"}, "x", lambda data, rng, act=act: act) for i, act in enumerate(ACTS)],
    use, (), 16,
)
result = campaign.run("probe", seed=1)
print(json.dumps([result.mutants, result.truncations, result.loaded, result.refused, result.faults]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_sample_of_every_format_has_no_faults(tmp_path):
    log = tmp_path / "fuzz.log"
    done = run("-m", "fuzz.campaign", "--cases=20", "--cuts=8", f"--log={log}")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {line.split()[0]: line.split() for line in log.read_text().splitlines()[4:]}
    assert rows.keys() == FORMATS.keys()
    for name, row in rows.items():
        mutants, cuts, loaded, refused, faults = int(row[1]), int(row[2]), int(row[3]), int(row[4]), int(row[6])
        assert (mutants, faults) == (20, 0) and loaded + refused == mutants + cuts, name
        assert loaded or not FORMATS[name].may_load, name


def test_a_run_keeps_the_lines_of_other_formats(tmp_path):
    log = tmp_path / "fuzz.log"
    log.write_text(campaign.log_text(log, [campaign.Result("toml", mutants=3), campaign.Result("hf", mutants=1)], 14))
    text = campaign.log_text(log, [campaign.Result("tokenizer-bin", faults=[(1, "x")]), campaign.Result("hf")], 15)
    rows = [line.split() for line in text.splitlines()[4:]]
    assert [row[0] for row in rows] == ["tokenizer-bin", "hf", "toml"]
    assert rows[0][6] == "1" and rows[1][1] == "0" and rows[2][1] == "3" and "seed 14," in text and "seed 15," in text


def test_every_kind_of_fault_is_noticed():
    done = run("-c", PROBE)
    assert done.returncode == 0, done.stderr
    mutants, cuts, loaded, refused, faults = json.loads(done.stdout.splitlines()[-1])
    found = {number: what for number, what in faults}
    assert (mutants, cuts, loaded, refused) == (16, 4, 6, 2), faults
    for number, words in (
        (2, "KeyError"),
        (3, "more than 0.5 s"),
        (4, "SIGABRT"),
        (5, "more than 1024 MB"),
        (6, "SystemExit"),
    ):
        assert words in found[number] and words in found[number + 8]
    assert found.keys() == {n + 8 * k for n in range(2, 8) for k in (0, 1)}


def test_a_mutant_is_the_same_each_time():
    numbers, form = (*range(50), 20_001, 20_002, 24_000), FORMATS["bin-v1"]
    first, second = (
        [campaign.mutant(seeds, "bin-v1", number, form.cases, 14)[1]["m.bin"] for number in numbers]
        for seeds in (form.seeds(), form.seeds())
    )
    assert first == second and len(set(first)) > 45
    assert len(first[-3]) == 1 and campaign.mutant(form.seeds(), "bin-v1", 0, form.cases, 15)[1]["m.bin"] != first[0]
