"""DataLoader's worker processes, however they are started: they give the rows of no workers, start no MPI, and end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

SCRIPT = """
import json, os, sys
import torch
from torch.utils.data import DataLoader, Dataset
import nettorrent_mpi.torch as nt

class Rows(Dataset):
    def __len__(self):
        return 41

    def __getitem__(self, index):
        return torch.full((3,), float(index)), os.getpid(), "mpi4py.MPI" in sys.modules

def epochs(workers, method, own):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = dict(num_workers=workers, multiprocessing_context=method)
    if own:
        run = nt.parallelize(None, model, optimizer)
        sampler = nt.RankSampler(41, 8, run.place)
        loader = DataLoader(Rows(), batch_sampler=sampler, persistent_workers=bool(workers), **options)
    else:
        run, loader = nt.parallelize(Rows(), model, optimizer, batch_size=8, **options), None
    rows, processes, mpi = [], set(), set()
    for epoch in run.epochs(2):
        for x, process, started in run.batches(loader):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            rows.append(x[:, 0].tolist())
            processes |= set(process.tolist())
            mpi |= set(started.tolist())
    return run.rank, rows, sorted(processes), sorted(mpi)

MAIN
    method = sys.argv[1]
    wanted = epochs(0, None, False)[1]
    for own in (False, True):
        rank, rows, processes, mpi = epochs(2, method, own)
        assert rows == wanted, (rows, wanted)
        assert os.getpid() not in processes and len(processes) == (2 if own else 4), processes
        assert mpi == [method == "fork"], mpi
        with open(f"{sys.argv[2]}/{rank}.{own}", "w") as file:
            json.dump(processes, file)
"""


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("method", "mpi"),
    [
        pytest.param(method, mpi, marks=() if (method, mpi) == ("fork", "openmpi") else pytest.mark.slow)
        for method in ("fork", "forkserver", "spawn")
        for mpi in ("openmpi", "mpich")
    ],
)
def test_workers_give_the_same_rows_without_mpi_and_end(
    mpirun: Callable[..., Any], tmp_path: Path, method: str, mpi: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("MAIN", 'if __name__ == "__main__":'))
    done = mpirun(2, [script, method, tmp_path], mpi=mpi, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for rank in range(2):
        for own in (False, True):
            workers = json.loads((tmp_path / f"{rank}.{own}").read_text())
            assert all(ended(process) for process in workers), workers


@pytest.mark.slow
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_script_that_workers_would_run_again_is_told(
    mpirun: Callable[..., Any], tmp_path: Path, method: str, mpi: str
) -> None:
    """Without `if __name__ == "__main__"` a worker would start MPI as the rank that has started it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("MAIN", "if True:"))
    done = mpirun(2, [script, method, tmp_path], mpi=mpi, timeout=100)
    assert done.returncode not in (0, None)
    assert 'put the training under if __name__ == "__main__":' in done.stderr, done.stderr
    assert "MPI_Init" not in done.stderr
    assert not os.path.exists(tmp_path / "0.False")
