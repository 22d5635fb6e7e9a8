"""NCCL's double on the host device: exchanges are work of streams, in any order that events allow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm import nccl
from nettorrent_mpi.comm.channels import NcclChannel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.gpu import Gpu
from tests.gpu.host.nccl import HostNccl
from tests.gpu.host.runtime import HostRuntime

STEPS = 4
SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank


@pytest.fixture
def ours() -> Iterator[World]:
    made = World()
    yield made
    made.free()


def connect(ours: World, monkeypatch: pytest.MonkeyPatch, seed: int) -> tuple[Gpu, HostRuntime, NcclChannel]:
    runtime = HostRuntime(100 * seed + RANK, memory=1 << 27, background=True, uuid=f"rank {RANK}")
    device, library = Gpu(runtime), HostNccl(runtime.exchanges)
    monkeypatch.setattr(nccl, "open_library", lambda: library)
    group = Group(ours.comm)
    (identity,) = nccl.identities(ours, library, [group])
    return device, runtime, NcclChannel(device, group, library, identity)


def sums(device: Gpu, runtime: HostRuntime, channel: NcclChannel, *, waits: bool) -> list[float]:
    """Each step brings a number, which all ranks add up on a stream of their own; the sum is read by another."""
    exchange, given, found = device.make_stream(), device.numbers(3), list[float]()
    total = runtime.within(given.array)
    for step in range(STEPS):
        given.set((step, RANK, step * RANK))
        brought = device.compute.record()
        if waits:
            exchange.wait(brought)
        with device.on(exchange):
            channel.all_reduce(given.array)
        if waits:
            device.compute.wait(exchange.record())
        runtime.order.stream_of(device.compute.handle).enqueue("read", lambda: found.append(float(total.sum())))
    device.synchronize()
    return found


@pytest.mark.ranks(2, 3)
def test_exchanges_wait_for_events(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [step * SIZE + (1 + step) * SIZE * (SIZE - 1) / 2 for step in range(STEPS)]
    wrong = 0
    for seed in range(6):
        for waits in (True, False):
            device, runtime, channel = connect(ours, monkeypatch, seed)
            found = sums(device, runtime, channel, waits=waits)
            assert found == wanted or not waits
            wrong += ours.comm.allreduce(found != wanted) > 0
            channel.close()
            device.close()
    assert wrong >= 4


@pytest.mark.ranks(2, 3)
def test_captured_exchanges_are_replayed(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    device, runtime, channel = connect(ours, monkeypatch, 3)
    given, found = device.numbers(1), list[float]()
    data = runtime.within(given.array)

    def run() -> None:
        channel.all_reduce(given.array)
        runtime.order.stream_of(device.stream.handle).enqueue("read", lambda: found.append(float(data[0])))

    step = device.capture(run)
    for number in range(STEPS):
        given.set((number + RANK,))
        step()
    device.synchronize()
    assert found == [number * SIZE + SIZE * (SIZE - 1) / 2 for number in range(STEPS)]
    del step  # NCCL frees no communicator that a graph uses
    channel.close()
    device.close()


@pytest.mark.ranks(2)
def test_a_device_goes_on_while_its_host_waits_for_another_host(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _, channel = connect(ours, monkeypatch, 5)
    values = device.zeros((3,), np.float64)
    channel.all_reduce(values)
    if RANK == 0:
        device.synchronize()  # which needs rank 1's device, whose host has launched its part and waits below
    ours.comm.Barrier()
    device.synchronize()
    channel.close()
    device.close()
