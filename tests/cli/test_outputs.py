"""Commands look at the place that --output names before the work, and tell at once what cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nettorrent_mpi.__main__ import main
from nettorrent_mpi.cli.arguments import parse

# Commands that write a file, and what has to be there for those that can do their work.
FILES = [
    "init", "schema", "data import table.csv --label y", "export run --format npz", "report run", "simulate --ranks 2",
    "profile --seconds 0.1",
]  # fmt: skip
FOLDERS = ["train", "tune search.yaml", "chaos", "speedup --ranks 1 --peers none", "export run --format tensorboard"]
SEARCH = """\
base: {data: {name: digits, validation: 0.1}, model: {layers: [flatten, {linear: 10}]}, train: {epochs: 1}}
parameters: {seed: [1, 2]}
sampler: grid
"""
MERGED = ("profile",)  # keeps what is in the file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("a,y\n" + "1,x\n2,z\n" * 5)
    Path("search.yaml").write_text(SEARCH)
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("")
    Path("file.yaml").write_text("as before")
    return tmp_path


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that a command ends with, having done nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capfd.readouterr()
    assert main(words) == 2
    told, errors = capfd.readouterr()
    assert (told, errors.count("\n")) == ("", 1), (told, errors)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    return errors


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_cannot_be_written(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    name = "x.npz" if words[0] == "export" else "x.yaml"
    told = refusal(capfd, *words, "--output", f"no such/place/{name}")
    assert f"no such/place/{name}: there is no folder no such/place: make it (mkdir -p 'no such/place')" in told
    assert "run is a folder: name a file with --output FILE" in refusal(capfd, *words, "-o", "run")
    assert "file.yaml is a file, not a folder; choose another" in refusal(capfd, *words, "-o", f"file.yaml/{name}")
    assert "/proc cannot be written to" in refusal(capfd, *words, "-o", f"/proc/{name}")
    told = refusal(capfd, *words, "-o", "file.yaml")
    if words[0] in MERGED:
        assert "file.yaml exists and is no profile: choose another name with --output FILE" in told
    else:
        assert "file.yaml exists: choose another name with --output FILE, or replace it with --overwrite" in told
    assert Path("file.yaml").read_text() == "as before"


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_cannot_be_written(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = command.split()
    assert "file.yaml is a file, not a folder; choose another" in refusal(capfd, *words, "-o", "file.yaml")
    told = refusal(capfd, *words, "-o", "file.yaml/below")
    assert "file.yaml is a file, not a folder; choose another" in told
    assert "/proc" in refusal(capfd, *words, "-o", "/proc/below")


def test_every_command_that_writes_what_a_user_names_has_the_same_option() -> None:
    for command in (*FILES, *FOLDERS, "evaluate run", "doctor"):
        assert parse([*command.split(), "-o", "x"]).output == "x"
        assert parse([*command.split(), "--output", "x"]).output == "x"


def test_names_that_outputs_have_by_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    os.mkdir("deep")
    os.rename("table.csv", "deep/table.csv")
    assert main(["data", "import", "deep/table.csv", "--label", "y"]) == 0
    assert main(["init", "--root", "table.h5"]) == 0
    assert main(["init"]) == 0
    told = capfd.readouterr().out
    assert [name for name in ("table.h5", "table.yaml", "digits.yaml") if not Path(name).is_file()] == [], told
