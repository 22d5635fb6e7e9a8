"""A layer of one's own, registered from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.config import reading
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.layer import Context, Features, Grads, Layer, Parameter, Params
from nettorrent_mpi.nn.layers.registry import Site, register_layer
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import span


@dataclass(frozen=True)
class Scaled(specs.LayerSpec):
    kind = "scaled"
    weighted = True
    factor: float = 2.0

    def widths(self) -> tuple[int, ...]:
        return (6,)


@pytest.fixture
def registered() -> Iterator[None]:
    @register_layer(Scaled)
    class ScaledLayer(Layer):
        """y = factor * x * weight, of features that are divided over the cols."""

        def __init__(self, spec: Scaled, site: Site):
            size, part = site.inputs.shape[-1], span(site.inputs.shape[-1], site.cols, site.col)
            weight = Parameter("weight", (size,), "ones", axis=0, part=part)
            super().__init__(site.name, site.inputs, Features.divided((size,), site.cols, site.col), (weight,))
            self.factor, self.part = spec.factor, slice(*part)

        def forward(self, params: Params, x: Array, ctx: Context) -> tuple[Array, Any]:
            y = ctx.workspace.keep("y", (len(x), *self.outputs.local))
            ctx.ops.multiply(x[:, self.part], params["weight"], y)
            ctx.ops.scale(y, self.factor)
            return y, x

        def backward(self, params: Params, grads: Grads, saved: Any, dy: Array, ctx: Context) -> Array | None:
            ctx.ops.scale(dy, self.factor)
            product = ctx.workspace.scratch("product", dy.shape)
            ctx.ops.multiply(saved[:, self.part], dy, product)
            ctx.ops.sum_rows(product, grads["weight"], ctx.accumulate)
            if not self.needs_dx:
                return None
            dx = ctx.workspace.gradient((len(dy), *self.inputs.local), dy)
            ctx.ops.fill(dx, 0)
            ctx.ops.multiply(dy, params["weight"], dx[:, self.part])
            return dx

    yield
    del specs.LAYERS["scaled"]


@pytest.mark.usefixtures("registered")
def test_a_registered_layer_is_one_like_any_other(bench: Any) -> None:
    layers = [specs.Linear(6, activation="tanh"), Scaled(3.0), specs.Relu(), specs.Linear(4)]
    network = Network(layers, (5,))
    assert network.weight_layers == 3
    assert [facts.name for facts in network.facts] == ["linear1", "scaled1", "linear2"]
    made = bench(layers, (5,))
    x, dy = made.data(7)
    whole, divided = made.run(x, dy), made.run_team(2, 2, x, dy)
    np.testing.assert_allclose(divided.y, whole.y, rtol=1e-12)
    np.testing.assert_allclose(divided.dx, whole.dx, rtol=1e-12)
    for key, grad in whole.grads.items():
        np.testing.assert_allclose(divided.grads[key], grad, rtol=1e-11, atol=1e-13)
    config = reading.load("configs/digits.yaml", ["model.layers=[flatten, {scaled: 4}, {linear: 10}]"])
    assert config.model.layers[1] == Scaled(4.0)


@pytest.mark.usefixtures("registered")
def test_a_kind_stands_for_one_layer() -> None:
    @dataclass(frozen=True)
    class Other(specs.LayerSpec):
        kind = "scaled"

    with pytest.raises(ValueError, match="there is a layer of the kind 'scaled' already"):
        register_layer(Other)
