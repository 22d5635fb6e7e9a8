"""A script with the stand-in for dpwa ends by one clear error on all ranks, at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

SCRIPT = """
import sys
import torch
import nettorrent_mpi.torch as nt
model = torch.nn.Linear(3, 2)
dpwa = nt.Dpwa(model, sys.argv[1])
for step in range(20):
    loss = -1.0 if dpwa.rank == 1 and step == 7 else 1.0
    dpwa.update_send(loss)
    dpwa.update_wait(loss)
"""


@pytest.mark.parametrize("mpi", ["openmpi", pytest.param("mpich", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["file", pytest.param("loss", marks=pytest.mark.slow)])
def test_a_mistake_ends_all_ranks(mpirun: Callable[..., Any], tmp_path: Path, mpi: str, kind: str) -> None:
    """One of the file, found by all ranks, and a loss that one rank alone has."""
    method = "clok" if kind == "file" else "clock"
    path = tmp_path / "dpwa.yaml"
    path.write_text(f"- fetch_probability: 1\n- interpolation: {method}\n- timeout_ms: 5000\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    started = time.monotonic()
    done = mpirun(2, [tmp_path / "script.py", path], mpi=mpi, timeout=100)
    assert time.monotonic() - started < 60
    assert done.returncode == 2, done.stderr
    wanted = f"{path}:2: interpolation: unknown method 'clok'; did you mean clock?"
    wanted = wanted if kind == "file" else "the loss is -1, and replicas compare losses of at least 0"
    told = [line for line in done.stderr.splitlines() if line.startswith("nettorrent: error:")]
    (line,) = told
    assert line.startswith(f"nettorrent: error: {tmp_path / 'script.py'}:{6 if kind == 'file' else 9}: {wanted}")
    assert line.endswith("(on rank 1)") == (kind == "loss")
    assert "Traceback" not in done.stderr
