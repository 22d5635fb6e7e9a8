"""What `init`, `completion` and `train --print-config` write can be used as it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from nettorrent_mpi.cli.arguments import make_parser
from nettorrent_mpi.cli.init import length
from nettorrent_mpi.config import reading
from tests.conftest import ROOT


def nettorrent(*words: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nettorrent_mpi", *map(str, words)],
        capture_output=True, text=True, cwd=folder, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip


def photos(path: Path, shape: tuple[int, ...], labels: bool) -> None:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for name, rows in (("", 60), ("_test", 20)):
            file[f"x{name}"] = random.integers(0, 255, (rows, *shape), np.uint8)
            file[f"y{name}"] = random.integers(0, 3, rows) if labels else random.normal(size=(rows, 2))


@pytest.mark.parametrize(
    ("shape", "labels", "found"),
    [((16, 12, 3), True, ["conv2d", "units: 3}", "cross_entropy"]), ((9,), False, ["units: 2}", "mean_squared_error"])],
)
def test_a_begun_configuration_trains(tmp_path: Path, shape: tuple[int, ...], labels: bool, found: list[str]) -> None:
    photos(tmp_path / "my photos.h5", shape, labels)
    done = nettorrent("init", "--output", "mine.yaml", "--root", "my photos.h5", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert all(each in text for each in found)
    done = nettorrent("train", "mine.yaml", "--set", "train.epochs=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine" / "model.h5").exists()


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"), [(5, 5, 100), (90, 8, 20), (450, 32, 20), (1294, 128, 20), (50_000, 128, 10)]
)
def test_the_length_suits_the_rows(rows: int, batch: int, epochs: int) -> None:
    assert length(rows) == (batch, epochs)


def test_mistakes_are_told(tmp_path: Path) -> None:
    for words, told in [
        (["a.yml.txt"], "ends in .yaml"),
        (["a.yaml", "--data", "mnits"], "--data mnits: there are digits, mnist"),
        (["a.yaml", "--data", "hdf5"], "hdf5 needs --root FILE.h5"),
        (["a.yaml", "--data", "digits", "--root", "data"], "digits needs no files"),
        (["a.yaml", "--root", "nowhere.h5"], "nowhere.h5"),
    ]:
        done = nettorrent("init", "--output", *words, folder=tmp_path)
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert nettorrent("init", "-o", "a.yaml", folder=tmp_path).returncode == 0
    assert "a.yaml exists" in nettorrent("init", "-o", "a.yaml", folder=tmp_path).stderr
    assert nettorrent("init", "-o", "a.yaml", "--overwrite", folder=tmp_path).returncode == 0


def test_the_printed_configuration_is_the_one_that_counts(tmp_path: Path) -> None:
    changes = ["train.epochs=3", "exchange.gossip.pairing=ring"]
    done = nettorrent("train", "configs/mnist.yaml", "--print-config", *(w for c in changes for w in ("--set", c)))
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.yaml").write_text(done.stdout, encoding="utf-8")
    assert reading.load(str(tmp_path / "printed.yaml")) == reading.load(str(ROOT / "configs" / "mnist.yaml"), changes)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell: str, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    done = nettorrent("completion", shell)
    assert done.returncode == 0, done.stderr
    commands = next(a.choices for a in make_parser()._actions if a.dest == "command")
    assert commands
    assert all(command in done.stdout for command in commands)
    if shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(done.stdout, encoding="utf-8")
        subprocess.run([shell, "-n", str(script)], check=True)


def test_bash_completes(tmp_path: Path) -> None:
    """A shell that has the script completes `nettorrent ev` and `nettorrent train --ov`."""
    pytest.importorskip("shtab")
    script = tmp_path / "script"
    script.write_text(nettorrent("completion", "bash").stdout, encoding="utf-8")
    for words, wanted in [("nettorrent ev", "evaluate"), ("nettorrent train --ov", "--overwrite")]:
        parts = words.split()
        lines = f"""
            source {script}
            COMP_WORDS=({words}); COMP_CWORD={len(parts) - 1}
            $(complete -p nettorrent | sed 's/.*-F \\([^ ]*\\).*/\\1/') nettorrent {parts[-1]} {parts[-2]}
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
        assert wanted in done.stdout.split(), (done.stdout, done.stderr)
