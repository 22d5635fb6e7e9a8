"""Networks as planning sees them, with facts computed by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nettorrent_mpi.plan.topology import LayerFacts


def linear(name: str, inputs: int, units: int) -> LayerFacts:
    # y = x W + b costs 2 I O operations, and so do dx and dW
    return LayerFacts(name, 6 * inputs * units, inputs * units + units, units, inputs, units)


def conv(name: str, side: int, channels: int, filters: int, pool: int = 1) -> LayerFacts:
    # a 3x3 kernel, padding: same
    pixels, weights = side * side, 9 * channels * filters
    pooled = pixels // pool**2 * filters
    return LayerFacts(name, 6 * weights * pixels, weights + filters, filters, pixels * channels, pooled)


@pytest.fixture(scope="session")
def networks() -> dict[str, list[LayerFacts]]:
    """Weight layers of three networks; all take mini-batches of 128 rows."""
    sizes = [784, *[256] * 6, 10]
    mlp = [linear(f"linear{i + 1}", a, b) for i, (a, b) in enumerate(pairwise(sizes))]
    cnn = [
        conv("conv2d1", 32, 3, 32),
        conv("conv2d2", 32, 32, 32, pool=2),
        conv("conv2d3", 16, 32, 64),
        conv("conv2d4", 16, 64, 64, pool=2),
        linear("linear1", 8 * 8 * 64, 512),
        linear("linear2", 512, 10),
    ]
    resnet = [conv("conv2d1", 32, 3, 16)]
    for i, (side, channels) in enumerate([(32, 16)] * 3 + [(16, 32)] * 3 + [(8, 64)] * 3):
        half = conv("", side, channels, channels)
        resnet.append(
            LayerFacts(
                f"residual{i + 1}",
                2 * half.operations,
                2 * half.parameters,
                half.units,
                half.inputs,
                half.outputs,
            )
        )
    resnet.append(linear("linear1", 64, 10))
    return {"mlp": mlp, "cnn": cnn, "resnet": resnet}
