"""Telling does not end a training: the reader may leave, the disk may be full, the stream closed or for ASCII only."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nettorrent_mpi.cli.streams import SafeStream, safe_streams


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_text_that_cannot_be_written_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with safe_streams() as output:
        print("can be")
        sys.stdout.writelines(["the", " same\n"])
        assert output.error is None
    assert sys.stdout is before
    assert capsys.readouterr() == ("can be\nthe same\n", "")
    told: list[Exception] = []
    stream = SafeStream(Full(), told.append)
    for _ in range(3):
        print("not", file=stream)  # type: ignore[call-overload]
    assert [str(error) for error in told] == ["[Errno 28] No space left on device"]
    closed = io.StringIO()
    closed.close()
    SafeStream(closed).write("not")
    SafeStream(None).write("not")


def test_letters_that_an_encoding_lacks() -> None:
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("größer\n")
    stream.flush()
    assert raw.getvalue() == b"gr\\xf6\\xdfer\n"


def ran(command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A shell's command; PYTHON is this one. One rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUN": str(tmp_path / "läufe"), "PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("shell", "warned"),
    [
        ("$PYTHON {train} | true; exit ${PIPESTATUS[0]}", False),
        pytest.param("$PYTHON {train} > /dev/full", True, marks=pytest.mark.slow),
        pytest.param("$PYTHON {train} >&- 2>&-", False, marks=pytest.mark.slow),
        pytest.param("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $PYTHON {train}", False, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on(tmp_path: Path, shell: str, warned: bool) -> None:
    """A training in a folder whose name is not ASCII goes on where its streams fail or its locale is ASCII."""
    train = "-m nettorrent_mpi.train --set train.epochs=1 --output $RUN"
    done = ran(shell.replace("{train}", train), tmp_path)
    assert done.returncode == 0, done.stderr
    told = "nettorrent: warning: standard output cannot be written (No space left on device)\n"
    assert done.stderr.count(told) == warned
    assert "Error" not in done.stderr
    assert (tmp_path / "läufe" / "summary.json").exists()
    (tmp_path / "läufe" / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_results_that_cannot_be_shown_are_an_error(tmp_path: Path) -> None:
    dry = "$PYTHON -m nettorrent_mpi.train --dry-run"
    done = ran(f"{dry} > /dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("standard output cannot be written") == 1
    done = ran(f"{dry} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 0
    assert "Error" not in done.stderr
