"""Few frames lie between the command line and a layer's forward, so that a step can be read as a whole."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

MOST = 7

PROGRAM = """
import sys
from nettorrent_mpi.__main__ import main
from nettorrent_mpi.nn.layers import linear
kind = next(value for name, value in vars(linear).items() if name in ("Linear", "LinearLayer"))
original = kind.forward
def forward(self, *args):
    frame, names = sys._getframe(1), [f"{type(self).__module__}.forward"]
    while frame is not None:
        names.append(f"{frame.f_globals['__name__']}.{frame.f_code.co_name}")
        if frame.f_code is main.__code__:
            break
        frame = frame.f_back
    else:
        return original(self, *args)
    if self.name == "linear1" and not any("nn.footprint" in name for name in names):
        print("FRAMES", *reversed(names), flush=True)
        kind.forward = original
    return original(self, *args)
kind.forward = forward
sys.exit(main(["train", "--output", sys.argv[1], "--set", "train.steps=2"]))
"""


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_from_main_to_a_layer(
    mpirun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, ranks: int
) -> None:
    done = mpirun(ranks, ["-c", PROGRAM, tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    (frames,) = {line for line in done.stdout.splitlines() if line.startswith("FRAMES")}
    names = frames.split()[1:]
    assert names[0] == "nettorrent_mpi.__main__.main"
    assert len(names) <= MOST, "\n".join(names)
