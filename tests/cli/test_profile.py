"""`nettorrent profile` measures for real, on two ranks, and predictions use what it keeps."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]
NETTORRENT = ["-m", "nettorrent_mpi"]


def test_a_profile_serves_predictions(mpirun: Mpirun, tmp_path: Path) -> None:
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = mpirun(2, [*NETTORRENT, "profile", "--seconds", "0.5"], env=home, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("digits, ")
    (file,) = (tmp_path / "cache" / "nettorrent_mpi" / "profiles").iterdir()
    assert f"\nkept in {file}\n" in done.stdout
    ((_, told),) = json.loads(file.read_text())["networks"].items()
    assert told["about"]["ranks"] == 2
    assert all(0 < layer["forward"]["call"] + layer["forward"]["product"] < 1 for layer in told["layers"].values())
    # A second of measuring, on a busy machine, tells no more than the order of magnitude.
    assert 0 <= told["step"] + told["call"] + told["row"] < 1e-1
    assert told["alone"]["layers"].keys() == told["layers"].keys()
    train = [*NETTORRENT, "train", "--set", "layout=auto", "--set", "train.steps=N", "--output", str(tmp_path / "run")]
    assert mpirun(2, [word.replace("=N", "=8") for word in train], env=home).returncode == 0
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["seconds_per_step"] == 32 / first["samples_per_second"]
    assert 0 < first["seconds_per_step_predicted"] < 1  # three steps on a busy machine prove no more
    # Other measurements, by which auto chooses otherwise: a run that goes on stays in its layout.
    dear = "collective" if "1x2" in first["layout"] else "fence" if "2x1" in first["layout"] else "latency"
    file.write_text(re.sub(rf'"{dear}": [^n,]*,', f'"{dear}": 1.0,', file.read_text()))
    dry_run = [*NETTORRENT, "train", "--dry-run", "--ranks", "2"]
    other = mpirun(1, [*dry_run, "--set", "layout=auto"], env=home).stdout
    assert f"layout    {first['layout']}" not in other
    assert "are predicted from a profile of this network (measured on" in " ".join(other.split())
    assert mpirun(2, [*(word.replace("=N", "=16") for word in train), "--resume"], env=home).returncode == 0
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (again["steps"], again["layout"]) == (16, first["layout"])
    constants = mpirun(1, [*dry_run, "--profile", "none"], env=home).stdout
    assert "The times are of a machine with one core of 100 GFLOP/s" in constants


def test_what_cannot_be_measured_is_refused(mpirun: Mpirun, tmp_path: Path) -> None:
    done = mpirun(1, [*NETTORRENT, "profile", "--set", "device=gpu"], timeout=60)
    assert done.returncode == 2
    assert "device: profiles are of CPU cores: add --set device=cpu" in done.stderr
    done = mpirun(3, [*NETTORRENT, "profile"], timeout=60)
    assert done.returncode == 2
    assert "nettorrent: error: a profile is measured on 1 or 2 ranks, not on 3: mpirun -n 2\n" in done.stderr


def test_a_home_that_cannot_be_written_is_told_in_a_line(mpirun: Mpirun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    home = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    done = mpirun(1, [*NETTORRENT, "profile", "--seconds", "0.2"], env=home, timeout=60)
    assert done.returncode == 0
    assert "nettorrent: warning: the profile could not be kept (Not a directory): give --output FILE" in done.stderr
