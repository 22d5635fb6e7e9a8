"""Gossip and elite on the host device equal those on the CPU, whatever the order of the device's streams."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.device import Device, make_device
from nettorrent_mpi.device.gpu import Gpu
from nettorrent_mpi.exchange import Shards, make_exchange
from nettorrent_mpi.plan.exchange_specs import (
    Elite,
    Float16,
    Gossip,
    Int8,
    LossMix,
    PushSumMix,
    Sign,
    TopK,
)
from nettorrent_mpi.plan.scores import Scores
from nettorrent_mpi.plan.specs import Spec
from tests.gpu.host.runtime import HostRuntime

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SIZES = (1, 7, 0, 1003, 129)
STEPS = 9

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host device's kernels are compiled by g++")


class Case(NamedTuple):
    """An exchange, and how the arrays begin."""

    spec: Spec
    dtype: Any = np.float64
    equal: bool = False  # all replicas begin alike


def gossip(pairing: str = "ring", **more: Any) -> Gossip:
    return Gossip(pairing, **{"deadline": "none", "part": 1.0, **more})


QUICK = {
    "ring": Case(gossip(), np.float32),
    "push-sum": Case(gossip("random", mix=PushSumMix())),
    "int8": Case(gossip(compress=Int8()), np.float32, equal=True),
    "average, slow": Case(gossip("complete", average=("parameters", "optimizer"), exact_every=4, slow_momentum=0.5)),
    "tournament": Case(Elite(mode="tournament", every_samples=4)),
}
MORE = {
    "at once": Case(gossip(overlap=False)),
    "in parts": Case(gossip("exponential", part=0.3), np.float32),
    "withheld": Case(gossip(withhold=0.25)),
    "withheld in parts": Case(gossip("shuffle", withhold=0.25, part=0.5), np.float32),
    "optimizer": Case(gossip("shuffle", average=("parameters", "optimizer"), part=0.5)),
    "seldom": Case(gossip(every=2, probability=0.6)),
    "random, float32": Case(gossip("random", mix=PushSumMix()), np.float32),
    "loss": Case(gossip(mix=LossMix())),
    "slow": Case(gossip(exact_every=3, slow_momentum=0.5), np.float32),
    "float16": Case(gossip(compress=Float16()), np.float32, equal=True),
    "int8, shuffle": Case(gossip("shuffle", compress=Int8())),
    "topk": Case(gossip("shuffle", compress=TopK(0.1)), np.float32, equal=True),
    "topk, random": Case(gossip("random", compress=TopK(0.3)), equal=True),
    "sign": Case(gossip(compress=Sign()), np.float32, equal=True),
    "best": Case(Elite(every_samples=4), np.float32),
}


def run(world: MPI.Intracomm, case: Case, device: Device) -> dict[str, Any]:
    """Steps with changes of this rank's own in between, a look at the average, a rest, and what is there at the end."""
    generator = np.random.default_rng([1, 0 if case.equal else RANK])

    def arrays() -> list[Any]:
        made = []
        for size in SIZES:
            made.append(device.empty((size,), case.dtype))
            device.upload(made[-1], generator.normal(size=size).astype(case.dtype))
        return made

    parameters, memories, statistics, pull = arrays(), arrays(), arrays(), arrays()
    own = np.random.default_rng([2, RANK])
    for array in pull:
        device.upload(array, own.normal(size=array.size).astype(case.dtype))
    peers = Group(world.Dup())
    shards = Shards(parameters, {"m": memories}, statistics)
    exchange = make_exchange(case.spec, shards, peers, device, seed=3, batch_size=2)
    found: dict[str, Any] = {}

    def note(name: str) -> None:
        found[name] = np.concatenate([device.on_host(array).copy() for array in (*parameters, *memories, *statistics)])

    for step in range(1, STEPS + 1):
        if exchange.wants_loss:
            exchange.tell_loss(1.0 + RANK / step)
        exchange.before_update(step)
        for array, m, towards in zip(parameters, memories, pull, strict=True):
            device.ops.move(m, 0.25, towards)
            device.ops.move(array, 0.125, m)
        exchange.after_update(0.1, step)
        for _ in range(3):
            if exchange.progress is not None:
                exchange.progress()
        if exchange.next_rest(step - 1) == step:
            exchange.at_rest(step, lambda: [Scores(float((r * 7 + 3) % SIZE), None) for r in range(SIZE)])
        if step == 5:
            with exchange.shown():
                note("shown")
            with exchange.paused():
                note("paused")
    exchange.settle()
    note("settled")
    for name, more in exchange.memories().items():
        found[name] = np.concatenate([device.on_host(array).copy() for array in more])
    exchange.recall(STEPS)
    exchange.settle()
    exchange.become()
    note("average")
    found["figures"] = {name: value for name, value in exchange.figures(peers).items() if name != "waited_seconds"}
    exchange.close()
    peers.free()
    return found


def compare(world: MPI.Intracomm, case: Case, seeds: Iterable[int]) -> None:
    expected = run(world, case, make_device("cpu", "numpy"))
    for seed in seeds:
        device = gpu(seed)
        found = run(world, case, device)
        device.close()
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            if isinstance(values, dict):
                assert found[name] == values
            else:
                np.testing.assert_array_equal(found[name], values, err_msg=f"{name}, {seed}")


def gpu(seed: int) -> Gpu:
    return Gpu(HostRuntime(100 * seed + RANK, memory=1 << 28, uuid=f"rank {RANK}"))


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("name", QUICK)
def test_the_host_device_exchanges_as_the_cpu_does(world: MPI.Intracomm, name: str) -> None:
    compare(world, QUICK[name], range(2))


@pytest.mark.long
@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("name", MORE)
def test_so_do_many_more(world: MPI.Intracomm, name: str) -> None:
    compare(world, MORE[name], range(2, 6))


@pytest.mark.long
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", QUICK | MORE)
def test_over_many_orders(world: MPI.Intracomm, name: str) -> None:
    compare(world, (QUICK | MORE)[name], range(10, 30))


@pytest.mark.ranks(2, 4)
def test_with_a_deadline_and_measured_parts_no_mass_is_lost(world: MPI.Intracomm) -> None:
    device, own = gpu(1), np.random.default_rng([1, RANK]).normal(size=40000)
    parameters = [device.empty(own.shape, own.dtype)]
    device.upload(parameters[0], own)
    mean = np.array(world.allgather(own)).mean(axis=0)
    peers = Group(world.Dup())
    spec = Gossip("random", part="auto", mix=PushSumMix())
    exchange = make_exchange(spec, Shards(parameters), peers, device)
    for step in range(1, 25):
        exchange.before_update(step)
        exchange.after_update(0.0, step)
    exchange.settle()
    assert exchange.figures(peers)["rounds"] == 24
    exchange.become()
    np.testing.assert_allclose(device.on_host(parameters[0]), mean, rtol=0, atol=1e-12)
    exchange.close()
    peers.free()
