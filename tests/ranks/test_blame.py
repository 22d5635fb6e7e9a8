"""A value that is not finite in the data is told from a training that diverged: by data set, row and place."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import nettorrent_mpi as nt
from tests.gpu.host.main import install

pytestmark = pytest.mark.ranks(1, 3)

X = np.random.default_rng(0).normal(size=(24, 6))
Y = np.arange(24) % 2
LAYERS = [nt.Linear(8, activation="relu"), nt.Linear(6), nt.Linear(2)]
HOW = {"batch_size": 8, "micro_batches": 2, "dtype": "float64", "kernels": "numpy", "optimizer": nt.Sgd(0.1)}


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "gpu",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="the host device needs g++"),
            ],
        ),
    ],
    autouse=True,
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On GPUs, where no value is read back in a step, the same is told."""
    kind: str = request.param
    if kind == "gpu":
        install(1)
    monkeypatch.setitem(HOW, "device", kind)
    return kind


def harmed(value: float = np.nan) -> np.ndarray:
    x = X.copy()
    x[7, 3] = value
    return x


@pytest.mark.parametrize(
    ("data", "settings", "told", "steps"),
    [
        ((X, Y, harmed(), Y), {}, r"x_test: feature 3 of row 7 is nan, which the evaluation after step 3 needs", 3),
        ((harmed(), Y, X, Y), {}, r"x: feature 3 of row 7 is nan, which step [123] trained on", 0),
        (
            (harmed(-np.inf), Y),
            {"validation": 0.9},
            r"x: feature 3 of row 7 is -inf, which the evaluation after step 1",
            1,
        ),
        ((X, Y, harmed(1e300), Y), {"dtype": "float32"}, r"is 1e\+300, too large to be trained on, which the eval", 3),
    ],
    ids=["test row", "training row", "validation row", "too large"],
)
def test_the_data_are_to_blame(world: MPI.Intracomm, shared_path: Path, data, settings, told: str, steps: int) -> None:  # type: ignore[no-untyped-def]
    """The steps before the evaluation that finds it are in a checkpoint."""
    with (
        pytest.raises(nt.DataError, match=told) as caught,
        nt.Trainer(LAYERS, data, comm=world, output=shared_path, **(HOW | settings)) as trainer,
    ):
        list(trainer.train(epochs=2))
    assert len(set(world.allgather(str(caught.value)))) == 1
    assert [path.name for path in shared_path.rglob("step-*")] == ([f"step-{steps:010d}"] if steps else [])


def test_a_replica_that_meets_a_wrong_row_spoils_its_peers_and_not_the_message(world: MPI.Intracomm) -> None:
    if world.size == 1:
        return
    how = HOW | {"layout": {"replicas": world.size}, "exchange": {"gossip": {"overlap": False}}, "batch_size": 16}
    with (
        pytest.raises(nt.DataError, match=r"x: feature 3 of row 7 is nan, which step [12] trained on"),
        nt.Trainer(LAYERS, (harmed(), Y), comm=world, report_every=100, evaluate_every=100, **how) as trainer,
    ):
        list(trainer.train(epochs=20))


def test_the_training_is_to_blame(world: MPI.Intracomm, shared_path: Path) -> None:
    """Weights that are not finite after the last update of an epoch are no checkpoint."""
    how = HOW | {"optimizer": nt.Sgd(1e308), "batch_size": 24}
    with (
        pytest.raises(nt.NonFiniteError, match=r"^step 1: the output of layer .* The data are, so the training"),
        nt.Trainer(LAYERS, (100 * X, Y), comm=world, output=shared_path, **how) as trainer,
    ):
        list(trainer.train(epochs=1))
    assert not list(shared_path.rglob("*.h5"))


def test_rows_to_predict_and_targets(world: MPI.Intracomm) -> None:
    with nt.Trainer(LAYERS, (X, Y), comm=world, **HOW) as trainer:
        with pytest.raises(nt.DataError, match=r"^x: feature 3 of row 7 is nan; correct it"):
            trainer.predict(harmed())
        assert np.isfinite(trainer.predict(X)).all()
    targets = harmed()[:, 2:4]
    with pytest.raises(
        nt.DataError, match=r"^y: the target of row 7 is \[.* nan\], but mean_squared_error needs finite"
    ):
        nt.Trainer(LAYERS, (X, targets), comm=world, loss="mean_squared_error", **HOW)
