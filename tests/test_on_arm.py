"""What tests/on_arm.py does before it runs tests; `make test-arm` does the rest."""

import on_arm
import pytest


@pytest.mark.parametrize(
    "there, message",
    [
        (
            {"apt-get"},
            "error: dpkg-deb: not found; this needs Debian or a relative of it\n",
        ),
        (
            {"apt-get", "dpkg-deb"},
            "error: qemu-aarch64-static: not found; install it with: sudo apt-get install qemu-user-static\n",
        ),
    ],
)
def test_says_what_is_missing(monkeypatch, capsys, there, message):
    monkeypatch.setattr("sys.argv", ["on_arm.py"])
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    assert on_arm.main() == 2
    assert capsys.readouterr().err == message


def test_a_folder_that_was_not_finished_is_begun_anew(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    def fill(folder):
        (folder / "whole").touch()

    with pytest.raises(KeyboardInterrupt):
        on_arm.once(tmp_path / "root", fail)
    assert not (tmp_path / "root").exists()
    on_arm.once(tmp_path / "root", fill)
    on_arm.once(tmp_path / "root", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["whole"]


def test_what_is_left_out_exists():
    assert all((on_arm.ROOT / path).exists() for path in on_arm.LEFT_OUT)
