"""Layers that cannot be: one error that names the layers, the value and the remedy."""

from __future__ import annotations

import pytest

from nettorrent_mpi.nn.layer import Features
from nettorrent_mpi.nn.layers.registry import Site
from nettorrent_mpi.nn.layers.sequence import Sequence, named
from nettorrent_mpi.plan import specs as s
from nettorrent_mpi.plan.errors import ConfigError, ShapeError

IMAGE = (6, 5, 3)
SHAPES = {
    "linear on images": ([s.Conv2d(4), s.Linear(5)], IMAGE, ["conv2d1", "linear1", "(4, 3, 4)", "`flatten`"]),
    "linear on the input": ([s.Linear(5)], IMAGE, ["the input", "linear1", "`flatten`"]),
    "conv on flat rows": ([s.Linear(4), s.Conv2d(4)], (5,), ["linear1", "conv2d1", "(4,)", "images"]),
    "pool on flat rows": ([s.Linear(4), s.MaxPool2d(2)], (5,), ["linear1", "max_pool2d1", "images"]),
    "global pool after flatten": ([s.Flatten(), s.GlobalAvgPool2d()], IMAGE, ["flatten1", "global_avg_pool2d1"]),
    "kernel too large": ([s.Conv2d(4, 4), s.Conv2d(4, (3, 4))], IMAGE, ["conv2d1", "conv2d2", "3 x 4", "3 x 2"]),
    "window too large": ([s.MaxPool2d(2), s.AvgPool2d(4)], IMAGE, ["max_pool2d1", "avg_pool2d1", "4 x 4", "3 x 2"]),
    "branches of different shapes": (
        [s.Residual(layers=(s.Conv2d(4, 3, 2, "same"), s.Relu()))],
        IMAGE,
        ["residual1/relu1", "the input", "(3, 3, 4)", "(6, 5, 3)", "kernel 1"],
    ),
    "inside a residual": ([s.Linear(4), s.Residual(layers=(s.Conv2d(4),))], (5,), ["residual1/conv2d1", "linear1"]),
}
VALUES = {
    "units": ([s.Linear(0)], ["linear1", "units is 0"]),
    "filters": ([s.Conv2d(-1)], ["conv2d1", "filters"]),
    "kernel": ([s.Conv2d(4, (3, 0))], ["conv2d1", "kernel is 0"]),
    "stride": ([s.Conv2d(4, 3, 0)], ["conv2d1", "stride is 0"]),
    "window": ([s.MaxPool2d(0)], ["max_pool2d1", "size is 0"]),
    "window's stride": ([s.AvgPool2d(2, -1)], ["avg_pool2d1", "stride is -1"]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_do_not_fit(case):
    layers, shape, words = SHAPES[case]
    with pytest.raises(ShapeError) as error:
        Sequence(named(layers), Site("", Features.whole(shape)))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be(case):
    layers, words = VALUES[case]
    shape = (5,) if isinstance(layers[0], s.Linear) else IMAGE
    with pytest.raises(ConfigError) as error:
        Sequence(named(layers), Site("", Features.whole(shape)))
    for word in words:
        assert word in str(error.value)


def test_names():
    layers = named([s.Linear(3), s.Linear(3, name="middle"), s.Relu(), s.Linear(3)])
    assert [layer.name for layer in layers] == ["linear1", "middle", "relu1", "linear3"]
    with pytest.raises(ConfigError, match="'linear2'"):
        named([s.Linear(3, name="linear2"), s.Linear(3)])
    block = s.Residual(layers=(s.Linear(3), s.Linear(3)), shortcut=(s.Linear(3),))
    keys = [key for key, _ in Sequence(named([block]), Site("", Features.whole((3,)))).parameters]
    assert keys == [f"residual1/linear{i}/{name}" for i in (1, 2, 3) for name in ("weight", "bias")]
