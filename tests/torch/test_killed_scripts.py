"""All ranks of a PyTorch script are killed while it writes checkpoints: it goes on from the newest, on other ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nettorrent_mpi.engine.checkpoint import read_manifest
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in, name_of
from nettorrent_mpi.engine.checkpoint_shards import read_blocks
from nettorrent_mpi.plan.moves import Holding, whole
from tests.conftest import ROOT, kill_session
from tests.standstill import Run

pytest.importorskip("torch")
SCRIPT = """
import sys, time
import numpy as np
import torch
import nettorrent_mpi.torch as nt
exchange, folder, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(96, 6)
y = (x @ torch.randn(6, 3)).argmax(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
optimizer = torch.optim.Adam(model.parameters(), 0.01)
run = nt.parallelize((x, y), model, optimizer, batch_size=8, exchange=exchange)
def whole():
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()
if run.resume(folder + "/checkpoints"):
    np.save(f"{folder}/resumed.{run.rank}.npy", whole())
    print("resumed after", run.step, flush=True)
for epoch in run.epochs(5):
    for a, b in run.batches():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(a), b).backward()
        optimizer.step()
        time.sleep(pause)
        if pause and run.step % 3 == 0:
            run.checkpoint(folder + "/checkpoints")
run.average()
np.save(f"{folder}/end.{run.rank}.npy", whole())
"""


def saved(checkpoints: Path, prefix: str) -> np.ndarray:
    """The model's parameters in the newest checkpoint, of one replica or of all."""
    path = checkpoints_in(checkpoints)[-1]
    manifest = read_manifest(path)
    names = [f"parameters/{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
    arrays = {name: np.zeros(manifest.arrays[prefix + name].shape) for name in names}
    read_blocks(path, manifest, prefix, {Holding(name, whole(array.shape)): array for name, array in arrays.items()})
    return np.concatenate([array.reshape(-1) for array in arrays.values()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "mpi", "ranks", "later"),
    [("allreduce", "openmpi", 3, 2), ("allreduce", "mpich", 2, 3), ("gossip", "openmpi", 3, 2)],
)
def test_a_killed_script_goes_on(
    mpirun: Callable[..., Run],
    installed_mpi: Callable[[str], tuple[list[str], dict[str, str]]],
    tmp_path: Path,
    exchange: str,
    mpi: str,
    ranks: int,
    later: int,
) -> None:
    launcher, settings = installed_mpi(mpi)
    checkpoints = tmp_path / "checkpoints"
    words = ["-c", SCRIPT, exchange, str(tmp_path)]
    with (tmp_path / "told").open("w") as told:
        started = subprocess.Popen(
            [*launcher, "-n", str(ranks), sys.executable, *words, "0.05"],
            cwd=ROOT, env={**os.environ, **settings}, stdout=told, stderr=told, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + 90
            while not any(each.name >= name_of(9) for each in checkpoints_in(checkpoints)):
                assert started.poll() is None, (tmp_path / "told").read_text()
                assert time.monotonic() < until, (tmp_path / "told").read_text()
                time.sleep(0.02)
        finally:
            kill_session(started.pid)
            started.wait()
    assert checkpoints_in(checkpoints)
    done = mpirun(later, [*words, "0"], mpi=mpi, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed after") == later
    resumed = [np.load(tmp_path / f"resumed.{rank}.npy") for rank in range(later)]
    assert all(np.array_equal(each, resumed[0]) for each in resumed)
    replicas = [saved(checkpoints, f"replicas/{r}/" if exchange == "gossip" else "") for r in range(ranks)]
    np.testing.assert_allclose(resumed[0], np.mean(replicas, axis=0), rtol=1e-12, atol=1e-14)
    assert (np.ptp(replicas, axis=0).max() > 0) == (exchange == "gossip")
    ends = [np.load(tmp_path / f"end.{rank}.npy") for rank in range(later)]
    assert all(np.array_equal(each, ends[0]) for each in ends)
    assert not np.array_equal(ends[0], resumed[0])
    if exchange == "allreduce":
        alone = tmp_path / "alone"
        alone.mkdir()
        serial = mpirun(1, ["-c", SCRIPT, exchange, str(alone), "0"], mpi=mpi)
        assert serial.returncode == 0, serial.stderr
        expected = np.load(alone / "end.0.npy")
        assert np.linalg.norm(ends[0] - expected) <= 1e-10 * np.linalg.norm(expected)
