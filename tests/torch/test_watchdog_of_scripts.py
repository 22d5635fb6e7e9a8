"""A script's ranks are watched: one that stops answering is named and ends the run; a script's own code has time."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

LOOP = """
import os, signal, time
import torch
from nettorrent_mpi.comm import ticking
ticking.SECOND = 0.5  # the watchdog's seconds
import nettorrent_mpi.torch as nt

def train(exchange, act, watchdog):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = nt.parallelize(torch.rand(96, 3), model, optimizer, batch_size=8, exchange=exchange, watchdog=watchdog)
    for epoch in run.epochs(1):
        for x in run.batches():
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            if run.step == 3:
                act(run.rank)
            optimizer.step()
        run.report(loss)
    run.close()
"""
STOPPED = """
train("EXCHANGE", lambda rank: os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else None, {"report": 3, "end": 8})
"""
# Rank 0 takes twice as long as a run may stand still, where the others wait for its gradients, its message and
# its loss.
LONG = """
patient = {"gossip": {"deadline": "none", "part": 1}}
for exchange in ("allreduce", patient, "none"):
    train(exchange, lambda rank: time.sleep(8) if rank == 0 else None, {"report": 6, "end": 8})
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["allreduce", "gossip"])
def test_a_rank_that_stops_answering_ends_the_run(mpirun: Callable[..., Any], exchange: str) -> None:
    """With gossip the others do their own steps, and wait for it at the end of the epoch."""
    done = mpirun(3, ["-c", LOOP + STOPPED.replace("EXCHANGE", exchange)], timeout=100)
    assert done.returncode == 1, done.stderr
    stopped = r"rank 1 \(process \d+ on \S+\) is stopped \(SIGSTOP\)"
    assert re.search(stopped, done.stderr), done.stderr
    assert "likely culprit: rank 1" in done.stderr
    waiting = "the average of gradients" if exchange == "allreduce" else "the exchange between replicas"
    assert re.search(rf"0 .*{waiting}, waiting for ranks 1-2", done.stderr), done.stderr
    assert re.search(rf"the run ends, because a rank has not advanced for \d+ s: {stopped}", done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_the_scripts_own_code_has_time(mpirun: Callable[..., Any], mpi: str) -> None:
    done = mpirun(3, ["-c", LOOP + LONG], mpi=mpi, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 3
    assert done.stderr.count("a rank has not advanced for") == 3, done.stderr
    assert done.stderr.count("likely culprit: rank 0") == 3, done.stderr
    assert done.stderr.count("a script's own code may take as long as it likes") == 3, done.stderr
