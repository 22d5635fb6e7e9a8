"""Twenty thousand steps of each exchange, with reports, evaluations and checkpoints among them, take no more memory,
descriptors, threads and files of /dev/shm than the first few thousand."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.growth import Usage, growth

STEPS = 20_000
MOST = 64  # KiB from one quarter to the next: 13 bytes a step
Run = subprocess.CompletedProcess[str]


def gossip(**options: Any) -> dict[str, Any]:
    return {"exchange": {"gossip": options}}


CASES: dict[str, dict[str, Any]] = {
    "allreduce": {"exchange": "allreduce"},
    "stages": {"layout": "layers"},
    "async": {"layout": "layers", "pipeline": "async"},
    "gossip": gossip(),
    "average": gossip(deadline="none", average=["parameters", "optimizer"], part=1.0),
    "loss": gossip(mix="loss", pairing="shuffle", every=3),
    "push_sum": gossip(mix="push_sum", pairing="random", probability=0.7),
    "slow_momentum": gossip(exact_every=8, slow_momentum=0.5),
    "int8": gossip(compress="int8", pairing="ring"),
    "topk": gossip(compress={"topk": {"fraction": 0.1}}, deadline="none"),
    "consensus": gossip(consensus={"max": 0.01}, part=0.5),
    "elite": {"exchange": {"elite": 800}},
    "none": {"exchange": "none"},
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("mpi", "name"), [*(("openmpi", name) for name in CASES), ("mpich", "async"), ("mpich", "push_sum")]
)
def test_twenty_thousand_steps_do_not_grow(mpirun: Callable[..., Run], tmp_path: Path, mpi: str, name: str) -> None:
    words = [STEPS, tmp_path / "run", json.dumps(CASES[name])]
    done = mpirun(3, ["-m", "tests.programs.growing", *words], mpi=mpi, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout.splitlines()[-1])
    for rank, seen in enumerate(told):
        windows = [Usage(*each) for each in seen]
        print(name, rank, *map(tuple, windows))  # for `pytest -s`
        grown = growth(windows)
        assert max(grown.private, grown.files) <= MOST, (rank, windows)
        assert max(grown[2:]) <= 0, (rank, windows)
