"""A rank that raises in the middle of a training ends those that wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

SPLIT = """
import torch
from torch import nn
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.torch import split
model = split(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"0": "out", "1": "in"})
loss = model(torch.rand(5, 3)).sum()
if World().rank == 1:
    raise RuntimeError("one rank fails")
loss.backward()
"""
PARALLEL = """
import torch
import nettorrent_mpi.torch as nt
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
run = nt.parallelize(torch.rand(40, 3), model, optimizer, batch_size=8, exchange="EXCHANGE")
for epoch in run.epochs(3):
    for x in run.batches():
        optimizer.zero_grad()
        model(x).sum().backward()
        if run.rank == 1 and run.step == 7:
            raise RuntimeError("one rank fails")
        optimizer.step()
"""
SCRIPTS = {"split": SPLIT} | {name: PARALLEL.replace("EXCHANGE", name) for name in ("allreduce", "gossip", "none")}


@pytest.mark.slow
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_rank_that_fails_ends_those_that_wait_for_it(mpirun: Callable[..., Any], kind: str, mpi: str) -> None:
    started = time.monotonic()
    done = mpirun(2, ["-c", SCRIPTS[kind]], mpi=mpi, timeout=200)
    assert done.returncode != 0
    assert "one rank fails" in done.stderr
    assert "rank 1 of 2 has failed, which ends all ranks" in done.stderr
    assert time.monotonic() - started < 120
