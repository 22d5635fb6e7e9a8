"""All ranks killed at any moment of a checkpoint: an undamaged one is always there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nettorrent_mpi.engine.checkpoint import read_manifest
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in
from tests.conftest import kill_session

HERE = Path(__file__).resolve().parent
Installed = Callable[[str], tuple[list[str], dict[str, str]]]
CONFIG = """\
data: {name: synthetic, rows: 512, test_rows: 0, shape: [100], classes: 10}
model: {layers: [{linear: {units: 300, activation: relu}}, {linear: 10}]}
train: {steps: 100000, batch_size: 16, optimizer: adam}
checkpoint: {every_steps: 2, every_epochs: null, keep: 2}
kernels: numpy
"""


@pytest.mark.parametrize(
    ("mpi", "times"),
    [
        pytest.param("openmpi", 5, marks=pytest.mark.long),
        pytest.param("openmpi", 25, marks=pytest.mark.long),
        pytest.param("mpich", 25, marks=pytest.mark.long),
    ],
)
def test_an_undamaged_checkpoint_is_always_there(
    installed_mpi: Installed, tmp_path: Path, mpi: str, times: int
) -> None:
    """Each run goes on from what the one before has left."""
    launcher, env = installed_mpi(mpi)
    (tmp_path / "config.yaml").write_text(CONFIG)
    run, dice, reached, states = tmp_path / "run", random.Random(times), 0, set()
    program = [*launcher, "-n", "2", sys.executable, "-u", str(HERE / "programs" / "saving.py")]
    for _ in range(times):
        with (tmp_path / "told").open("w+") as told:
            started = subprocess.Popen(
                [*program, tmp_path / "config.yaml", "--output", run, "--resume", "auto"],
                cwd=HERE.parent, env={**os.environ, **env}, stdout=told, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                began = wait_for_checkpoints(started, tmp_path / "told", 4 + 2 * dice.randrange(4))
                time.sleep(dice.random() * 2 * began)
                assert started.poll() is None, (tmp_path / "told").read_text()
            finally:
                kill_session(started.pid)
                started.wait()
        text = (tmp_path / "told").read_text()
        assert "going on with step" not in text, text
        assert not reached or f"resumes after step {reached} of " in text, text
        states |= {path.suffix for path in (run / "checkpoints").iterdir()}
        found = checkpoints_in(run / "checkpoints")
        assert found
        for each in found:
            manifest = read_manifest(each)
            manifest.verify(each, list(manifest.files))
        before, reached = reached, int(str(manifest.attributes["step"]))
        assert reached > before
    assert times < 20 or ".tmp" in states, "none was killed while it wrote"


def wait_for_checkpoints(started: subprocess.Popen[bytes], told: Path, lines: int) -> float:
    """Wait until the ranks have told of so many beginnings; return the seconds between two of them."""
    until, since = time.monotonic() + 120, 0.0
    while True:
        count = told.read_text().count("BEGUN")
        since = since or (time.monotonic() if count else 0.0)
        if count >= lines:
            return (time.monotonic() - since) / (lines / 2)
        assert started.poll() is None, told.read_text()
        assert time.monotonic() < until, told.read_text()
        time.sleep(0.005)
