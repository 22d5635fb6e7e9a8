"""What layers take is what their workspaces hold, and grows with the rows."""

from __future__ import annotations

import resource

import pytest

from nettorrent_mpi.nn.footprint import Footprint, footprint
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import specs

IMAGES = Network(
    (
        specs.Conv2d(8, padding="same", activation="relu"),
        specs.BatchNorm(),
        specs.MaxPool2d(2),
        specs.Residual((specs.Conv2d(8, padding="same"), specs.BatchNorm(), specs.Relu())),
        specs.Dropout(0.3),
        specs.Flatten(),
        specs.Linear(40, activation="gelu"),
        specs.Linear(10),
    ),
    (16, 16, 3),
)
VECTORS = Network((specs.Linear(30, activation="relu"), specs.LayerNorm(), specs.Linear(5)), (20,))


def test_by_hand() -> None:
    # Both outputs, over the first of which its activation is written; its gradient, and where that is cut off.
    layers = Network((specs.Linear(30, activation="relu", bias=False), specs.Linear(5, bias=False)), (20,))
    assert footprint(layers.stage(0, 2, 1, 0), 7, "float64") == Footprint(8 * 7 * (30 + 5), (8 + 1) * 7 * 30)
    # Several micro-batches: the gradients of the largest weights are made apart, and then added.
    assert footprint(layers.stage(0, 2, 1, 0), 7, "float64", accumulate=True).shared == (8 + 1) * 7 * 30 + 8 * 20 * 30


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_of_large_weights_are_not_computed_and_count_alike(
    accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = Network((specs.Linear(60, activation="relu"), specs.Linear(50), specs.Linear(5)), (40,)).stage(0, 3, 1, 0)
    whole = footprint(layers, 30, "float32", accumulate=accumulate)
    monkeypatch.setattr("nettorrent_mpi.nn.footprint.LARGE", 4 * 100)
    monkeypatch.setattr("nettorrent_mpi.nn.footprint._Elsewhere.put", lambda *_: computed.append(1))
    computed: list[int] = []
    assert footprint(layers, 30, "float32", accumulate=accumulate) == whole
    assert computed


def test_the_weights_take_no_memory() -> None:
    layers = Network((specs.Linear(10_000), specs.Linear(5)), (15_000,)).stage(0, 2, 1, 0)  # 600 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    footprint(layers, 1, "float32")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("network", [IMAGES, VECTORS], ids=["images", "vectors"])
@pytest.mark.parametrize("cols", [1, 3])
@pytest.mark.parametrize("rows", [20, 300])
def test_rows_beyond_the_trials_are_foreseen(
    network: Network, cols: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> Footprint:
        layers = network.stage(0, network.weight_layers, cols, 0)
        return footprint(layers, rows, "float32", cols=cols, accumulate=True, loss=make_loss(specs.CrossEntropy()))

    foreseen = found()
    monkeypatch.setattr("nettorrent_mpi.nn.footprint.ROWS", rows)  # as many rows as there are
    tried = found()
    assert foreseen.kept == pytest.approx(tried.kept, rel=0.02)
    assert foreseen.shared == pytest.approx(tried.shared, rel=0.1)


def test_no_rows_and_targets_that_are_no_labels() -> None:
    layers = VECTORS.stage(1, 2, 1, 0)
    assert footprint(layers, 0, "float32").kept == 0
    assert footprint(layers, 8, "float32", loss=make_loss(specs.MeanSquaredError()), labels=False).kept > 0
