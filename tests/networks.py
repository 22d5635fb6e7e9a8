"""Networks with arrays, rows and the outputs of this package, for tests of what other programs make of them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.data.rows import Split
from nettorrent_mpi.data.scaling import UNIT, Scaling
from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.saved_network import SavedArrays, SavedNetwork
from nettorrent_mpi.engine.trained_on import TrainedOn
from nettorrent_mpi.nn.layer import Context
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import specs as s
from nettorrent_mpi.plan.errors import ConfigError, ShapeError

# Each layer with each of its options, and what is said of flatten: (shape of a row, layers).
EVERY: dict[str, tuple[tuple[int, ...], list[s.LayerSpec]]] = {
    "linear": ((7,), [s.Linear(5), s.Linear(3, bias=False)]),
    "conv2d": ((9, 7, 3), [s.Conv2d(4), s.Conv2d(5, (1, 2), bias=False)]),
    "conv2d stride": ((9, 8, 2), [s.Conv2d(4, 3, (2, 1)), s.Conv2d(3, (2, 3), 2)]),
    "conv2d same": ((7, 6, 2), [s.Conv2d(4, 3, padding="same"), s.Conv2d(3, (5, 1), padding="same")]),
    "conv2d same, even": ((7, 6, 2), [s.Conv2d(4, 2, padding="same"), s.Conv2d(3, (4, 3), padding="same")]),
    "conv2d same, strides": ((9, 8, 2), [s.Conv2d(4, 3, 2, "same"), s.Conv2d(3, (5, 3), (3, 2), "same")]),
    "conv2d same, even, strides": ((9, 8, 2), [s.Conv2d(4, 4, 2, "same"), s.Conv2d(3, (2, 3), (2, 3), "same")]),
    "conv2d same, larger than the image": ((2, 3, 2), [s.Conv2d(4, 5, 2, "same"), s.Conv2d(3, 4, 2, "same")]),
    "max_pool2d": ((9, 8, 2), [s.Conv2d(3, 1), s.MaxPool2d(), s.MaxPool2d((2, 3), 1)]),
    "avg_pool2d": ((9, 8, 2), [s.Conv2d(3, 1), s.AvgPool2d(), s.AvgPool2d((2, 3), (1, 2))]),
    "global_avg_pool2d": ((5, 4, 2), [s.Conv2d(3, 2), s.GlobalAvgPool2d(), s.Linear(2)]),
    "flatten": ((4, 3, 2), [s.Flatten(), s.Linear(3), s.Linear(2)]),
    "flatten after conv2d": ((4, 5, 2), [s.Conv2d(3, 2), s.Flatten(), s.Relu(), s.Dropout(), s.Linear(3)]),
    "flatten, norms": ((4, 3, 2), [s.Flatten(), s.BatchNorm(), s.LayerNorm(), s.Linear(3), s.BatchNorm()]),
    "flatten at the end": ((4, 5, 2), [s.Conv2d(3, 2), s.Flatten(), s.LayerNorm()]),
    "flatten before residual": ((3, 2, 2), [s.Flatten(), s.Residual((s.Linear(12, "tanh"),)), s.Linear(3)]),
    "flatten in residual": (
        (3, 2, 2),
        [s.Residual((s.Flatten(), s.Linear(12)), (s.Conv2d(2, 1), s.Flatten())), s.Linear(2)],
    ),
    "flatten of rows": ((3, 4), [s.Flatten(), s.Linear(3)]),
    "flatten of pixels": ((1, 1, 4), [s.Flatten(), s.LayerNorm(), s.Linear(3)]),
    "dropout": ((7,), [s.Linear(5), s.Dropout(0.3)]),
    "batch_norm": ((7,), [s.Linear(5), s.BatchNorm(eps=1e-3)]),
    "batch_norm of images": ((5, 4, 3), [s.BatchNorm(0.2), s.Conv2d(4), s.BatchNorm()]),
    "batch_norm of other rows": ((3, 4), [s.BatchNorm(), s.Flatten(), s.Linear(2)]),
    "layer_norm": ((7,), [s.Linear(5), s.LayerNorm(eps=1e-2)]),
    "layer_norm of images": ((5, 4, 3), [s.LayerNorm(), s.Conv2d(4), s.LayerNorm()]),
    "layer_norm of other rows": ((3, 4), [s.LayerNorm(), s.Flatten(), s.Linear(2)]),
    "relu": ((7,), [s.Linear(9, "relu"), s.Linear(9), s.Relu()]),
    "leaky_relu": ((7,), [s.Linear(9, "leaky_relu"), s.Linear(9), s.LeakyRelu(0.3)]),
    "sigmoid": ((7,), [s.Linear(9, "sigmoid"), s.Linear(9), s.Sigmoid()]),
    "tanh": ((7,), [s.Linear(9, "tanh"), s.Linear(9), s.Tanh()]),
    "gelu": ((7,), [s.Linear(9, "gelu"), s.Linear(9), s.Gelu()]),
    "residual": (
        (6, 5, 3),
        [
            s.Residual((s.Conv2d(3, 3, 1, "same", "relu"), s.BatchNorm(), s.Conv2d(3, 3, padding="same"))),
            s.Relu(),
            s.Residual((s.Conv2d(4, 3, 2, "same"), s.Gelu()), (s.Conv2d(4, 1, 2), s.BatchNorm())),
            s.Residual((s.Residual((s.Conv2d(4, 1),)), s.LayerNorm())),
        ],
    ),
    "names": (
        (4, 3, 2),
        [
            s.Conv2d(3, 2, activation="relu", name="forward"),
            s.Residual((s.Conv2d(3, 1, name="conv-1"), s.Relu(name="_body")), name="scaling"),
            s.Flatten(name="input"),
            s.Linear(3, "tanh", name="class_names"),
            s.Linear(3, name="class_names_tanh"),
            s.Linear(2, name="output"),
        ],
    ),
}
OURS = {spec for spec in s.LAYERS.values() if spec.__module__ == s.__name__}
assert {type(layer) for _, layers in EVERY.values() for layer in s.flat(layers)} == OURS


class Case(NamedTuple):
    """A network, rows as they are stored, and what this package gives for them."""

    saved: SavedNetwork
    x: Array
    y: Array

    @property
    def x_first(self) -> Array:
        """The rows, images as (row, channel, height, width)."""
        return np.ascontiguousarray(np.moveaxis(self.x, -1, 1) if self.x.ndim == 4 else self.x)

    def off(self, y: Any) -> float:
        """Return how far other outputs, images among them with the channels first, are off, in parts of the largest."""
        other = np.asarray(y)
        other = np.moveaxis(other, 1, -1) if other.ndim == 4 else other
        assert other.shape == self.y.shape
        return float(np.abs(other - self.y).max() / np.abs(self.y).max())


def case(
    shape: tuple[int, ...], layers: list[s.LayerSpec], dtype: Any = np.float64, seed: int = 0, *, stored: bool = False
) -> Case:
    """A network with random arrays. `stored`: its rows are bytes, with a mean and a deviation for each channel."""
    random = np.random.default_rng(seed)
    network = Network(layers, shape)
    arrays = {}
    for key, parameter in network.whole.parameters:
        spread = 1 / np.sqrt(parameter.fans[0])
        arrays[key] = (random.normal(size=parameter.shape) * spread + ("norm" in key)).astype(dtype)
        if key.endswith("running_var"):
            arrays[key] = random.uniform(0.5, 2, parameter.shape).astype(dtype)
    x = random.integers(0, 256, (5, *shape), np.uint8) if stored else random.normal(size=(5, *shape)).astype(dtype)
    channels = shape[-1]
    means, stds = random.uniform(0.1, 0.9, channels), random.uniform(0.2, 1, channels)
    scaling = Scaling(shape, UNIT, tuple(means), tuple(stds)) if stored else Scaling(shape)
    unit = UNIT if stored else None
    data = TrainedOn("arrays", 10, 3, ("a", "b", "c"), scaling.mean, scaling.std, False, shape, unit)
    model = {"layers": [s.to_plain(layer) for layer in layers], "loss": {"mean_squared_error": {}}}
    saved = SavedNetwork.of(SavedArrays("test", arrays, data, json.loads(json.dumps(model))))
    scaled = np.empty((len(x), *shape), dtype)
    Split.of_array(x, scaling, None).inputs().batch(np.arange(len(x)), scaled)
    return Case(saved, x, forward(network, arrays, scaled))


def forward(network: Network, arrays: dict[str, Array], scaled: Array) -> Array:
    """The outputs of this package, on one rank, in evaluation."""
    ctx = Context(make_device("cpu", "numpy").ops, Workspace(scaled.dtype), training=False, count=len(scaled))
    return network.whole.forward(arrays, scaled.copy(), ctx)[0].copy()


def random_layers(seed: int) -> tuple[tuple[int, ...], list[s.LayerSpec]]:
    """A network of layers of all kinds: (shape of a row, layers)."""
    random = np.random.default_rng(seed)
    while True:
        shape = (*random.integers(3, 9, 2).tolist(), random.integers(1, 4).item())
        layers: list[s.LayerSpec] = _images(random, int(random.integers(0, 6)), shape[2])
        layers.append([s.Flatten(), s.GlobalAvgPool2d()][int(random.integers(2))])
        layers += _vectors(random, int(random.integers(0, 4)))
        if random.random() < 0.7:
            layers.append(s.Linear(4))
        try:
            Network(layers, shape)
        except (ShapeError, ConfigError):
            continue
        return shape, layers


def _images(random: np.random.Generator, count: int, channels: int) -> list[s.LayerSpec]:
    def one(n: int) -> Any:
        both = tuple(random.integers(1, n + 1, 2).tolist())
        return both if random.random() < 0.5 else both[0]

    layers: list[s.LayerSpec] = []
    for _ in range(count):
        kind = int(random.integers(8))
        if kind < 3:
            channels, padding = int(random.integers(1, 5)), ("same", "valid")[int(random.integers(2))]
            layers.append(s.Conv2d(channels, one(4), one(3), padding, _activation(random), bool(random.integers(2))))
        elif kind == 3:
            layers.append((s.MaxPool2d, s.AvgPool2d)[int(random.integers(2))](one(3), one(2)))
        elif kind == 4:
            body = (s.Conv2d(channels, one(3), 1, "same"), _plain(random), s.Conv2d(channels, 1))
            layers.append(s.Residual(body, (s.Conv2d(channels, 1),) if random.random() < 0.3 else ()))
        else:
            layers.append(_plain(random))
    return layers


def _vectors(random: np.random.Generator, count: int) -> list[s.LayerSpec]:
    layers: list[s.LayerSpec] = []
    for _ in range(count):
        kind = int(random.integers(3))
        if kind == 0:
            layers.append(s.Linear(int(random.integers(1, 9)), _activation(random), bool(random.integers(2))))
        elif kind == 1:
            layers.append(s.Residual((s.Linear(6), _plain(random)), (s.Linear(6),)))
        else:
            layers.append(_plain(random))
    return layers


def _plain(random: np.random.Generator) -> s.LayerSpec:
    kinds = (s.BatchNorm, s.LayerNorm, s.Dropout, s.Relu, s.LeakyRelu, s.Sigmoid, s.Tanh, s.Gelu)
    return kinds[int(random.integers(len(kinds)))]()


def _activation(random: np.random.Generator) -> Any:
    return (None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu")[int(random.integers(6))]
