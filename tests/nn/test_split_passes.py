"""The halves of a split backward pass write the gradients of a whole one, bit for bit, also where other micro-batches'
passes come between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.nn.layers.sequence import Held, Sequence, named
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import Span

ROWS, PIECES = 5, 3


@dataclass(frozen=True)
class Halving(specs.LayerSpec):
    kind = "halving"


@pytest.fixture
def registered() -> Iterator[None]:
    @register_layer(Halving)
    class HalvingLayer(Layer):
        """y = x / 2, with a dx in scratch memory, which is valid until another layer runs."""

        def __init__(self, spec: Halving, site: Site):
            super().__init__(site.name, site.inputs, site.inputs)

        def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
            y = ctx.workspace.keep("y", x.shape)
            ctx.ops.copy(y, x)
            ctx.ops.scale(y, 0.5)
            return y, None

        def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array:
            dx = ctx.workspace.scratch("halves", dy.shape)
            ctx.ops.copy(dx, dy)
            ctx.ops.scale(dx, 0.5)
            return dx

    yield
    del specs.LAYERS["halving"]


NETWORKS: dict[str, tuple[specs.LayerSpec, ...]] = {
    "linear": (
        specs.Flatten(),
        specs.Linear(7, activation="relu"),
        specs.LayerNorm(),
        specs.Dropout(0.3),
        specs.Linear(7, bias=False, activation="gelu"),
        specs.Linear(7, activation="tanh"),
        specs.Linear(3),
        specs.Sigmoid(),
        specs.LeakyRelu(),
    ),
    "images": (
        specs.Relu(),
        specs.Conv2d(4, padding="same", activation="relu"),
        specs.MaxPool2d(2),
        specs.BatchNorm(),
        specs.Conv2d(4, padding="same", bias=False),
        specs.AvgPool2d(2, stride=1),
        specs.GlobalAvgPool2d(),
        specs.Linear(3),
    ),
    "blocks": (
        specs.Conv2d(4, padding="same"),
        specs.Residual((specs.Conv2d(4, padding="same", activation="relu"), specs.Conv2d(4, padding="same"))),
        specs.Residual((specs.Relu(), specs.Conv2d(6, padding="same")), (specs.Conv2d(6, kernel=1),)),
        specs.Residual((specs.BatchNorm(),), (specs.Conv2d(6, kernel=1), specs.Relu())),
        specs.Relu(),
        specs.Flatten(),
        specs.Linear(3),
    ),
    "foreign": (
        specs.Flatten(),
        specs.Linear(7),
        Halving(),
        specs.Linear(7),
        Halving(),
        specs.Relu(),
        specs.Linear(7),
        Halving(),
        Halving(),
        specs.Linear(7),
    ),
}


def gradients(layers: Sequence, *, split: bool) -> tuple[dict[str, Array], list[Array], list[int]]:
    """The gradients of some micro-batches together, each one's dx, and what `complete` was told in the last one."""
    device, draw = make_device("cpu", "numpy"), np.random.default_rng(3)
    shared = device.workspace("float64")
    shared.keeps_gradients = split
    params = {key: draw.normal(size=p.local) for key, p in layers.parameters}
    grads = {key: np.full(p.local, np.nan) for key, p in layers.parameters if p.trainable}
    x = [draw.normal(size=(ROWS, *layers.inputs.local)) for _ in range(PIECES)]
    dy = [draw.normal(size=(ROWS, *layers.outputs.local)) for _ in range(PIECES)]
    spaces = [device.workspace("float64", shared) for _ in range(PIECES)]
    ctx = Context(device.ops, shared, step=device.numbers(1).array, rows=Span(0, ROWS), count=ROWS)
    told: list[int] = []

    def enter(m: int) -> None:
        ctx.workspace, ctx.accumulate = spaces[m], m > 0

    saved: list[list[Any]] = []
    for m in range(PIECES):
        enter(m)
        saved.append(layers.forward(params, x[m], ctx)[1])
    held: list[Held] = [[] for _ in range(PIECES)]
    dxs = []
    for m in range(PIECES):
        enter(m)
        last = None if split or m < PIECES - 1 else told.append
        dx = layers.backward(params, grads, saved[m], dy[m], ctx, last, held=held[m] if split else None)
        dxs.append(np.zeros(0) if dx is None else np.array(dx))
    if split:
        for m in range(PIECES):
            enter(m)
            layers.backward_weights(grads, saved[m], held[m], ctx, told.append if m == PIECES - 1 else None)
    return grads, dxs, told


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_halves_are_the_whole(name: str, needs_dx: bool) -> None:
    site = Site("", Features.whole((6, 6, 2)))
    layers = Sequence(named(NETWORKS[name]), site)
    layers.needs_dx = needs_dx
    whole, dxs, told = gradients(layers, split=False)
    halves, same_dxs, also_told = gradients(layers, split=True)
    for key, gradient in whole.items():
        assert np.isfinite(gradient).all(), key
        assert np.array_equal(gradient, halves[key]), key
    for dx, other in zip(dxs, same_dxs, strict=True):
        assert dx.size > 0 if needs_dx else dx.size == 0
        assert np.array_equal(dx, other)
    assert also_told[-1] == told[-1] == 0
    assert also_told == sorted(also_told, reverse=True)


def test_a_derived_layer_is_not_split() -> None:
    """Its backward may be another one."""
    from nettorrent_mpi.nn.layers.linear import LinearLayer

    class Own(LinearLayer):
        def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array | None:
            dx = super().backward(params, grads, saved, dy, ctx)
            grads["weight"][...] = 7
            return dx

    layers = Sequence(named([specs.Linear(3)]), Site("", Features.whole((4,))))
    layers.append(Own(specs.Linear(2, name="own"), Site("own", layers.outputs)), "own")
    assert (gradients(layers, split=True)[0]["own/weight"] == 7).all()
