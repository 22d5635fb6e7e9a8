"""Convolutions by cuDNN: what its graphs say is what was wanted, and there is a plan for all that is needed."""

from __future__ import annotations

import pytest

from nettorrent_mpi.nn.convolutions import convolutions
from nettorrent_mpi.planning import load_config, plan
from tests.gpu.cuda_packages import ROOT, each_version, run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.long
@each_version
def test_the_graphs_say_what_is_wanted(version: int) -> None:
    """The graphs and their plans are cuDNN's own; the convolutions are computed from them on the CPU."""
    assert run(version, "cudnn_convolutions.py", libcuda=True).startswith("85 convolutions")


@pytest.mark.long
@each_version
def test_there_is_a_plan_for_every_convolution_of_the_configurations(version: int) -> None:
    lines = [line.split() for line in run(version, "cudnn_plans.py", *CONFIGS, libcuda=True).splitlines()]
    assert len(lines) == len(CONFIGS) * 3 * 4
    counts = {path: int(count) for path, _, _, count, _ in lines}
    assert sum(count > 0 for count in counts.values()) == 4  # digits, letters, cifar, and its ResNet
    assert all(
        0 < int(most) < 200 << 20 for path, gpu, dtype, count, most in lines if int(count) and dtype == "float32"
    )


def test_the_convolutions_of_a_network() -> None:
    network = plan(load_config(ROOT / "configs" / "cifar_resnet.yaml")).network
    found = convolutions(network.stage(0, network.weight_layers, 1, 0))
    assert all(not bias for _, _, bias, _ in found)
    # Of ResNet-20's convolutions 3 x 3: image to 16, and 16, 32 and 64 to as many; and, with stride 2, 16 to 32 and 32
    # to 64, each beside a shortcut 1 x 1. The first one's input needs no gradient.
    forward = {geometry for kind, geometry, *_ in found if kind == "forward"}
    assert len(forward) == 1 + 3 + 2 + 2
    kinds = {kind: {geometry for other, geometry, *_ in found if other == kind} for kind in ("grad_x", "grad_w")}
    assert kinds["grad_w"] == forward
    assert {geometry.image for geometry in forward - kinds["grad_x"]} == {(32, 32, 3)}
    halves = convolutions(network.stage(1, network.weight_layers, 2, 0))
    assert {geometry.output[2] for _, geometry, *_ in halves} == {8, 16, 32}
    network = plan(load_config(ROOT / "configs" / "cifar.yaml")).network
    found = convolutions(network.stage(0, network.weight_layers, 1, 0))
    # A convolution computes the ReLU that follows it, but for those before max pooling, which computes theirs.
    assert all(bias == (kind == "forward") for kind, _, bias, _ in found)
    relus = {geometry.output: relu for kind, geometry, _, relu in found if kind == "forward"}
    assert relus == {(32, 32, 32): True, (30, 30, 32): False, (15, 15, 64): True, (13, 13, 64): False}
