"""Layers divided over rows and cols give what they give undivided: outputs, gradients, running statistics."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.nn.layer import Features
from nettorrent_mpi.nn.layers.form import Gather
from nettorrent_mpi.nn.layers.registry import Site
from nettorrent_mpi.nn.layers.sequence import Sequence, named
from nettorrent_mpi.plan import specs as s

RESNET = s.Residual(
    layers=(
        s.Conv2d(5, 3, 2, "same", bias=False),
        s.BatchNorm(),
        s.Relu(),
        s.Conv2d(5, 3, 1, "same", bias=False),
        s.BatchNorm(),
    ),
    shortcut=(s.Conv2d(5, 1, 2, "same", bias=False), s.BatchNorm()),
)
NETWORKS = {
    "linear": ([s.Linear(5)], (4,)),
    "fewer neurons than cols": ([s.Linear(2, activation="tanh"), s.LayerNorm(), s.Linear(1)], (4,)),
    "three linear": ([s.Linear(7, activation="relu"), s.Linear(5, activation="gelu"), s.Linear(3)], (6,)),
    "norms on divided features": ([s.Linear(7), s.LayerNorm(), s.BatchNorm(), s.Relu(), s.Linear(4)], (6,)),
    "norms on whole features": ([s.BatchNorm(), s.LayerNorm(), s.Dropout(0.3), s.Linear(4), s.LeakyRelu()], (6,)),
    "whole features between weights": (
        [s.Conv2d(4, 2), s.Flatten(), s.LayerNorm(), s.Sigmoid(), s.Linear(5)],
        (5, 4, 2),
    ),
    "whole features at the end": ([s.Conv2d(4, 2), s.Relu(), s.Flatten(), s.LayerNorm(), s.Dropout(0.5)], (5, 4, 2)),
    "images": (
        [
            s.Conv2d(4, 3, 1, "same", activation="relu"),
            s.BatchNorm(),
            s.MaxPool2d(2),
            s.Dropout(0.25),
            s.Conv2d(5, 2),
            s.AvgPool2d(2),
            s.GlobalAvgPool2d(),
            s.Linear(3),
        ],
        (8, 7, 3),
    ),
    "resnet block": ([RESNET, s.Relu(), s.GlobalAvgPool2d(), s.Linear(3)], (6, 6, 3)),
    "residual with the input as shortcut": (
        [s.Conv2d(5, 3), s.Residual(layers=(s.BatchNorm(), s.Relu(), s.Conv2d(5, 3, 1, "same"))), s.Relu()],
        (6, 6, 2),
    ),
    "shortcut of whole features": (
        [s.Residual(layers=(s.Conv2d(3, 2, 2),), shortcut=(s.BatchNorm(), s.AvgPool2d(2)))],
        (6, 4, 3),
    ),
    "body of whole features": (
        [s.Residual(layers=(s.LayerNorm(), s.Tanh()), shortcut=(s.Linear(6, activation="relu"),))],
        (6,),
    ),
    "residual in a residual, dropout": (
        [
            s.Residual(
                layers=(s.Residual(layers=(s.Linear(5), s.Dropout(0.5))), s.BatchNorm(), s.Linear(5)), name="outer"
            ),
            s.LayerNorm(),
        ],
        (5,),
    ),
}


@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (1, 3), (2, 1), (3, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("network", NETWORKS)
def test_divided_equals_whole(bench, network, rows, cols):
    b = bench(*NETWORKS[network])
    x, dy = b.data(7)
    whole, divided = b.run(x, dy), b.run_team(rows, cols, x, dy)
    np.testing.assert_allclose(divided.y, whole.y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(divided.dx, whole.dx, rtol=1e-10, atol=1e-11)
    assert divided.grads.keys() == whole.grads.keys()
    for key, value in whole.grads.items():
        np.testing.assert_allclose(divided.grads[key], value, rtol=1e-9, atol=1e-11, err_msg=key)
    for key, value in whole.params.items():
        np.testing.assert_allclose(divided.params[key], value, rtol=1e-11, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("network", ["images", "resnet block", "norms on whole features"])
def test_ranks_without_rows_take_part(bench, network):
    b = bench(*NETWORKS[network])
    x, dy = b.data(2)
    whole, divided = b.run(x, dy), b.run_team(3, 2, x, dy)
    np.testing.assert_allclose(divided.y, whole.y, rtol=1e-9, atol=1e-11)
    for key, value in whole.grads.items():
        np.testing.assert_allclose(divided.grads[key], value, rtol=1e-7, atol=1e-9, err_msg=key)


def test_gathers_stand_only_where_whole_features_are_wanted():
    layers = named([s.Linear(6, activation="relu"), s.LayerNorm(), s.Linear(6), s.Tanh()])
    sequence = Sequence(layers, Site("", Features.whole((4,)), 2, 1))
    names = [layer.name for layer in sequence.layers]
    assert names == ["linear1", "linear1.relu", "layer_norm1", "linear2.gather", "linear2", "tanh1"]
    assert [layer.partial for layer in sequence.layers if isinstance(layer, Gather)] == [True]
    assert not sequence.outputs.is_whole
    assert sequence.outputs.local == (3,)
    alone = Sequence(layers, Site("", Features.whole((4,))))
    assert not any(isinstance(layer, Gather) for layer in alone.layers)
    assert alone.outputs.is_whole


def test_gradients_that_are_partial_are_marked():
    """Norms on whole features see a part of the gradient where divided weights follow, and all of it elsewhere."""
    layers = named(
        [s.BatchNorm(), s.Linear(6), s.BatchNorm(), s.Flatten(), s.LayerNorm(), s.Linear(4), s.Flatten(), s.LayerNorm()]
    )
    marked = {
        key
        for key, parameter in Sequence(layers, Site("", Features.whole((4,)), 2, 0)).parameters
        if parameter.replicated_sum
    }
    assert marked == {"batch_norm1/weight", "batch_norm1/bias", "layer_norm1/weight", "layer_norm1/bias"}
    assert not any(p.replicated_sum for _, p in Sequence(layers, Site("", Features.whole((4,)))).parameters)


def test_blocks_of_all_cols_cover_each_array_once():
    layers = named([s.Conv2d(5, 3), s.BatchNorm(), s.Flatten(), s.Linear(2)])
    covered: dict[str, np.ndarray] = {}
    for col in range(3):
        for key, p in Sequence(layers, Site("", Features.whole((5, 5, 2)), 3, col)).parameters:
            covered.setdefault(key, np.zeros(p.shape))[p.index] += 1
            assert covered[key][p.index].shape == p.local
    assert all((count == 1).all() for count in covered.values())
    assert Sequence(layers, Site("", Features.whole((5, 5, 2)))).most_cols == 2
