"""Layers from outside the package may compute with values of the host: no graph keeps those of one step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Grads, Layer, Params
from nettorrent_mpi.plan import specs
from tests.gpu.host.main import install

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host device needs g++"),
    pytest.mark.ranks(1, 2),
]


@dataclass(frozen=True)
class Fading(specs.LayerSpec):
    kind = "fading"


@pytest.fixture
def registered() -> Iterator[None]:
    install(1)

    @nt.register_layer(Fading)
    class FadingLayer(Layer):
        """y = x / the number of forward passes so far."""

        def __init__(self, spec: Fading, site: Any):
            super().__init__(site.name, site.inputs, site.inputs)
            self.passes = 0

        def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
            self.passes += 1
            y = ctx.workspace.keep("y", x.shape)
            ctx.ops.copy(y, x)
            ctx.ops.scale(y, 1 / self.passes)
            return y, 1 / self.passes

        def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array:
            ctx.ops.scale(dy, saved)
            return dy

    yield
    del specs.LAYERS["fading"]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("inside", [False, True])
def test_each_step_computes_with_the_present_values_of_the_host(inside: bool) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((24, 5)), rng.standard_normal((24, 2))
    layers = [nt.Linear(5), nt.Residual([nt.Linear(5), Fading()]) if inside else Fading(), nt.Linear(2)]
    found: list[list[float]] = []
    options: dict[str, Any] = {"loss": "mean_squared_error", "batch_size": 8, "dtype": "float64"}
    for device in ("cpu", "gpu"):
        with nt.Trainer(layers, (x, y), device=device, **options) as trainer:
            found.append([record.train_loss for record in trainer.train(steps=10)] + [trainer.predict(x).sum()])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10)
