"""Channels of all kinds carry the same values: MPI's in place, and on the host device staged ones and NCCL's."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm import nccl, placing
from nettorrent_mpi.comm.channel_team import ChannelTeam
from nettorrent_mpi.comm.channels import Channel, Message, launch
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.link import Part
from nettorrent_mpi.comm.parcels import Parcel
from nettorrent_mpi.comm.placing import Connector
from nettorrent_mpi.comm.reducers import ChannelReducer
from nettorrent_mpi.comm.staged_channel import StagedChannel
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array, as_dtype
from nettorrent_mpi.device.device import Device, make_device
from nettorrent_mpi.device.gpu import Gpu
from nettorrent_mpi.plan.blocks import Grid, Span, redistribute, span
from nettorrent_mpi.plan.errors import CommunicationError, LaunchError, NetTorrentWarning
from tests.gpu.host.nccl import HostNccl
from tests.gpu.host.runtime import HostRuntime

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SUM = SIZE * (SIZE + 1) / 2
PATIENCE, SHORT = 30.0, 1.0  # seconds, of NCCL's double
FAULTS = (RuntimeError, TimeoutError, CommunicationError)  # of the double, or as the connector tells of them
KINDS = ["mpi", "staged", "nccl"]


class StreamOps:
    """Copies and sums by NumPy, as work of a host device's present stream: channels need no more, and no compiler."""

    working_bytes = 0

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def copy(self, out: Array, x: Array) -> None:
        self._enqueue(lambda to, origin: np.copyto(to, origin, casting="unsafe"), out, x)

    def add(self, a: Array, b: Array, out: Array) -> None:
        self._enqueue(lambda to, first, second: np.add(first, second, out=to), out, a, b)

    def _enqueue(self, run: Callable[..., Any], *arrays: Array) -> None:
        within = [self.gpu.runtime.within(array) for array in arrays if array.size]
        if len(within) == len(arrays):
            self.gpu.stream.enqueue("operation", lambda: run(*within))


@pytest.fixture
def ours() -> Iterator[World]:
    made = World()
    yield made
    made.free()


def host_device(
    monkeypatch: pytest.MonkeyPatch,
    *,
    seed: int = 0,
    gpu: int = RANK,
    version: int = 23200,
    patience: float = PATIENCE,
) -> Gpu:
    """A GPU of the host device, whose NCCL is the double."""
    runtime = HostRuntime(seed * 100 + RANK, memory=1 << 24, background=True, uuid=f"GPU {gpu}")
    made = Gpu(runtime)
    made.ops = StreamOps(made)
    library = HostNccl(runtime.exchanges, patience=patience, version=version)
    monkeypatch.setattr(nccl, "open_library", lambda: library)
    for name in (nccl.SHARED_GPUS, nccl.IN_HOST_ORDER):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    return made


class Bench:
    """A rank's device, and what makes channels; arrays go to the device and come back."""

    def __init__(self, device: Device, connector: Connector):
        self.device, self.connector = device, connector

    def channel(self, group: Group) -> Channel:
        return self.connector.connect([group])[group]

    def connected(self, group: Group) -> Channel:
        """A channel that has been used."""
        channel = self.channel(group)
        channel.all_reduce(self.put(np.ones(1)))
        self.device.synchronize()
        return channel

    def put(self, values: Array) -> Array:
        made = self.device.empty(values.shape, values.dtype)
        self.device.upload(made, values)
        return made

    def get(self, array: Array) -> Array:
        return np.array(self.device.on_host(array))


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, ours: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A rank's device and connector, of each kind."""
    kind = request.param
    device: Any = make_device() if kind == "mpi" else host_device(monkeypatch)
    monkeypatch.setattr(StagedChannel, "largest", 40)
    connector = Connector(ours, device)
    if kind == "staged":
        connector.by = kind
    assert connector.by == kind
    yield Bench(device, connector)
    device.synchronize()
    connector.close()
    if kind != "mpi":
        device.runtime.order.stop()
    device.close()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bfloat16"])
def test_sums_and_gathers(bench: Bench, ours: World, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy comes from ml_dtypes")
    channel, kind = bench.channel(ours), as_dtype(dtype)
    values = (np.arange(7 * SIZE) % 5 * (RANK + 1)).astype(kind)
    wanted = np.arange(7 * SIZE) % 5 * SUM
    summed, part, whole = bench.put(values), bench.put(values[:7]), bench.put(values)
    channel.all_reduce(summed)
    channel.reduce_scatter(bench.put(values), part)
    channel.all_gather(part, whole)
    told = bench.put(np.full(11, RANK, kind))
    channel.broadcast(told, SIZE - 1)
    in_place = bench.put(np.where(np.arange(7 * SIZE) // 7 == RANK, wanted, -1).astype(kind))
    channel.all_gather(in_place[7 * RANK :][:7], in_place)
    np.testing.assert_array_equal(bench.get(summed).astype(float), wanted)
    np.testing.assert_array_equal(bench.get(part).astype(float), wanted[7 * RANK :][:7])
    np.testing.assert_array_equal(bench.get(whole).astype(float), wanted)
    np.testing.assert_array_equal(bench.get(in_place).astype(float), wanted)
    np.testing.assert_array_equal(bench.get(told).astype(float), SIZE - 1)
    if channel.equal_parts and dtype != "uint8":  # whose largest sums do not fit
        own = whole[7 * RANK :][:7]
        channel.reduce_scatter(whole, own)  # in place
        np.testing.assert_array_equal(bench.get(own).astype(float), wanted[7 * RANK :][:7] * SIZE)


def test_all_get_bitwise_the_same_sums(bench: Bench, ours: World) -> None:
    channel = bench.channel(ours)
    values = bench.put(np.random.default_rng(RANK).normal(size=1001).astype(np.float32))
    channel.all_reduce(values)
    assert len(set(ours.gather_objects(bench.get(values).tobytes()))) == 1


def test_reducer(bench: Bench, ours: World) -> None:
    channel, ops, count = bench.channel(ours), bench.device.ops, 16
    grads, one = bench.put(np.arange(count * SIZE) * (RANK + 1.0)), bench.put(np.ones(count * SIZE))
    params, sums = bench.put(np.zeros(count * SIZE)), bench.put(np.zeros(count))
    reducer = ChannelReducer(channel, params, grads, sums)
    for step in range(3):
        reducer.reduce()
        ops.copy(params[count * RANK :][:count], sums)
        reducer.gather()
        ops.add(grads, one, grads)
        np.testing.assert_allclose(bench.get(params), np.arange(count * SIZE) * SUM + step * SIZE)


def test_cols(bench: Bench, ours: World) -> None:
    channel = bench.channel(ours)
    team, workspace = ChannelTeam(bench.device, channel, channel), bench.device.workspace(np.float64)
    for features in (1, 2, 11, 12) * 2:
        whole = np.arange(3 * 2 * features * 1.0).reshape(3, 2, features)
        own = slice(*span(features, SIZE, RANK))
        source, gathered = bench.put(whole[..., own]), bench.put(np.zeros_like(whole))
        part, values = bench.put(np.zeros(source.shape)), bench.put(np.full(5, RANK + 1.0))
        team.gather_cols(source, gathered, workspace)
        team.scatter_cols(bench.put(whole * (RANK + 1)), part, workspace)
        team.sum_over_cols(values)
        team.sum_over_rows(values)
        np.testing.assert_array_equal(bench.get(gathered), whole)
        np.testing.assert_allclose(bench.get(part), whole[..., own] * SUM)
        np.testing.assert_array_equal(bench.get(values), SUM * SIZE)
        parts = np.zeros((SIZE, features))
        parts[RANK] = RANK + 1 + np.arange(features)
        everyones = bench.put(parts)
        team.gather_over_rows(everyones)
        np.testing.assert_array_equal(bench.get(everyones), np.arange(features) + np.arange(1.0, SIZE + 1)[:, None])


@pytest.mark.ranks(2, 3, 4)
def test_arrays_are_exchanged_around(bench: Bench, ours: World) -> None:
    channel = bench.channel(ours)
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    sent = [np.full(33, RANK + 0.5), np.full((2, 3), RANK, np.uint8), np.empty(0), np.full(5, -1.0)]
    into = [bench.put(np.zeros_like(array)) for array in sent]
    channel.exchange([(bench.put(array), right) for array in sent], [(array, left) for array in into])
    for array, its in zip(into, [left + 0.5, left, 0, -1.0], strict=True):
        assert (bench.get(array) == its).all()


@pytest.mark.ranks(2, 3, 4)
def test_messages_over_several_links(bench: Bench, ours: World) -> None:
    """A ring of links of two: everyone sends both ways and receives from both sides."""
    pairs = [tuple(sorted((i, (i + 1) % SIZE))) for i in range(SIZE if SIZE > 2 else 1)]
    groups = {pair: ours.subgroup(pair) for pair in pairs if RANK in pair}
    channels = bench.connector.connect(list(groups.values()))
    links = {pair: channels[group] for pair, group in groups.items()}
    got = {pair: bench.put(np.zeros(9)) for pair in links}
    mine = bench.put(np.full(9, RANK * 1.0))
    messages = [Message(channel, True, mine, 1 - channel.group.index) for channel in links.values()]
    for pair, channel in links.items():
        messages.append(Message(channel, False, got[pair], 1 - channel.group.index))
    launch(messages)
    for pair, array in got.items():
        assert (bench.get(array) == sum(pair) - RANK).all()
    for group in groups.values():
        group.free()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (2, 1), (1, 3)])
def test_parcels_move_an_array_between_teams(bench: Bench, ours: World, rows: int, cols: int) -> None:
    """A team of rows x cols writes y; the other ranks, rows of their own, read all of it and send gradients back."""
    channel, readers = bench.channel(ours), SIZE - rows * cols
    source, target, of, features = Grid(rows, cols), Grid(readers, 1), 5, 7
    whole = np.arange(of * 3 * features * 1.0).reshape(of, 3, features)
    writes = rows * cols > RANK
    index = RANK if writes else RANK - rows * cols
    own = span(of, readers, index), Span(0, features)
    if writes:
        own = span(of, rows, index // cols), span(features, cols, index % cols)
    parts = []
    for piece in redistribute(of, features, source, target):
        here, there = (piece.source, piece.target + rows * cols) if writes else (piece.target, piece.source)
        if here == index:
            parts.append(Part(there, shifted(piece.rows, own[0]), shifted(piece.cols, own[1])))
    part = whole[slice(*own[0]), :, slice(*own[1])]
    array = bench.put(np.full(part.shape, -1.0))
    parcel = Parcel(bench.device, channel, array, parts, sending=writes)
    back = Parcel(bench.device, channel, array, [part._replace(add=writes) for part in parts], sending=not writes)
    for step in range(3):
        if writes:
            bench.device.upload(array, part + step)
        carry(parcel)
        np.testing.assert_array_equal(bench.get(array), part + step)
        carry(back)
        np.testing.assert_array_equal(bench.get(array), (part + step) * (2 if writes else 1))


def carry(parcel: Parcel) -> None:
    parcel.pack()
    launch(parcel.messages)
    parcel.unpack()


def shifted(part: Span, own: Span) -> Span:
    return Span(part.start - own.start, part.stop - own.start)


@pytest.mark.parametrize("seed", range(4))
def test_launches_are_captured_and_replayed(ours: World, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """On two streams, one of them captured, with events between them."""
    gpu = host_device(monkeypatch, seed=seed)
    connector = Connector(ours, gpu)
    bench = Bench(gpu, connector)
    first, second = bench.channel(ours), bench.channel(ours)
    values, copies = bench.put(np.full(5, RANK + 1.0)), [bench.put(np.zeros(5)) for _ in range(6)]

    def work() -> None:
        gpu.ops.copy(values, values)
        first.all_reduce(values)

    run, wanted = gpu.capture(work), RANK + 1.0
    for copy in copies:
        run()
        with gpu.on(gpu.copies):
            gpu.copies.wait(gpu.compute.record())
            gpu.ops.copy(copy, values)
            second.all_reduce(copy)
        gpu.compute.wait(gpu.copies.record())
    connector.wait([gpu.compute, gpu.copies])
    for copy in copies:
        wanted = SUM if wanted == RANK + 1.0 else wanted * SIZE
        np.testing.assert_array_equal(bench.get(copy), wanted * SIZE)
    if SIZE > 1:
        with pytest.raises(AssertionError, match=r"NCCL would wait for ever for the end of \['all_reduce"):
            connector.close()  # of the graph
    del run
    finish(connector, gpu)


def finish(connector: Connector, gpu: Gpu) -> None:
    connector.close()
    gpu.runtime.order.stop()


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_rank_that_cannot_make_an_id_is_told_by_all(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = host_device(monkeypatch)
    connector, library = Connector(ours, gpu), nccl.load()

    def fail() -> bytes:
        raise library.NcclError("no device")

    if RANK == 0:
        library.get_unique_id = fail
    began = time.monotonic()
    if SIZE > 1:
        with pytest.raises(LaunchError, match=r"NCCL cannot start \(no device") as error:
            connector.connect([ours])
        assert error.value.agreed == frozenset(range(SIZE))
    assert time.monotonic() - began < 2
    finish(connector, gpu)


@pytest.mark.ranks(2, 3)
def test_a_communicator_that_nobody_closes_is_not_destroyed(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an error: CuPy would destroy it, and NCCL wait."""
    gpu = host_device(monkeypatch)
    library = nccl.load()
    (identity,) = nccl.identities(ours, library, [ours])
    communicator = nccl.Communicator(library, ours, identity, gpu.runtime.address)
    held = weakref.ref(communicator._nccl)
    del communicator
    gc.collect()
    kept = held()
    assert kept is not None
    kept.destroy()
    gpu.runtime.order.stop()


@pytest.mark.ranks(2, 3)
def test_hosts_that_connect_in_another_order_are_named(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = host_device(monkeypatch, patience=SHORT)
    connector = Connector(ours, gpu)
    bench = Bench(gpu, connector)
    channels, values = [bench.channel(ours), bench.channel(ours)], bench.put(np.ones(5))
    with pytest.raises(TimeoutError, match=f"host of rank {RANK} waits for others' to launch all_reduce of 5 float64"):
        channels[RANK > 0].all_reduce(values)
    ours.barrier()
    connector.abort()
    finish(connector, gpu)


@pytest.mark.ranks(2, 3, 4)
def test_launches_in_another_order_are_named(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 launches two operations in the opposite order."""
    gpu = host_device(monkeypatch, patience=SHORT)
    connector = Connector(ours, gpu)
    bench = Bench(gpu, connector)
    channels, values = [bench.connected(ours), bench.connected(ours)], bench.put(np.ones(5))
    for channel in channels if RANK else reversed(channels):
        channel.all_reduce(values)
    with pytest.raises(
        (TimeoutError, CommunicationError),
        match=rf"NCCL launch 3 of rank {RANK} \(all_reduce of 5 float64 among ranks 0, 1",
    ):
        gpu.synchronize()
    ours.barrier()
    connector.abort()
    finish(connector, gpu)


@pytest.mark.ranks(2, 3)
def test_events_against_the_order_of_launches_are_named(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch waits for an event behind the second one."""
    gpu = host_device(monkeypatch, patience=SHORT)
    connector = Connector(ours, gpu)
    bench = Bench(gpu, connector)
    channel, values = bench.connected(ours), bench.put(np.ones(5))
    order = gpu.runtime.order
    with order.lock:  # nothing runs meanwhile
        before = gpu.copies.launched
        gpu.compute.enqueue("gate", lambda: None, lambda: gpu.copies.complete > before, remote=True)
        channel.all_reduce(values)
        with gpu.on(gpu.copies):
            channel.all_reduce(values)
    with pytest.raises(
        (TimeoutError, CommunicationError), match=rf"launch 3 of rank {RANK} .* has waited 1 s for NCCL launch 2"
    ):
        gpu.synchronize()
    ours.barrier()
    connector.abort()
    finish(connector, gpu)


@pytest.mark.ranks(2, 3)
def test_different_operations_are_told(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = host_device(monkeypatch)
    connector = Connector(ours, gpu)
    bench = Bench(gpu, connector)
    channel, values = bench.connected(ours), bench.put(np.ones(5))

    def launch_and_wait() -> None:
        channel.all_reduce(values[RANK:])
        gpu.synchronize()

    with pytest.raises(FAULTS, match=r"the members' operations differ: \['all_reduce of [345] float64', "):
        launch_and_wait()
    connector.abort()
    finish(connector, gpu)


@pytest.mark.ranks(2, 3)
def test_a_rank_that_does_not_come_is_waited_for_until_the_deadline(
    ours: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = host_device(monkeypatch)
    connector = Connector(ours, gpu)
    bench = Bench(gpu, connector)
    channel, values = bench.connected(ours), bench.put(np.ones(5))
    if RANK:
        channel.all_reduce(values)
        with pytest.raises(CommunicationError, match=f"the GPU of rank {RANK} waits in vain for those of other ranks"):
            connector.wait([gpu.compute], patience=0.5)
        gpu.compute.synchronize()  # what waited has ended
    ours.barrier()
    finish(connector, gpu)


# -- where ranks lie --------------------------------------------------------------------------------------------------


def check_that_it_sums(ours: World, connector: Connector, gpu: Gpu) -> None:
    bench = Bench(gpu, connector)
    channel = bench.channel(ours)
    values = bench.put(np.full(5, RANK + 1.0))
    channel.all_reduce(values)
    np.testing.assert_array_equal(bench.get(values), SUM)
    finish(connector, gpu)


@pytest.mark.ranks(1)
def test_a_process_that_is_alone_needs_no_nccl(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = host_device(monkeypatch)
    monkeypatch.setattr(nccl, "open_library", missing)
    connector = Connector(ours, gpu)
    assert connector.connect([ours])[ours].capturable
    check_that_it_sums(ours, connector, gpu)


def missing() -> Any:
    raise ImportError("no libnccl here")


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("case", ["old", "new", "refuses", "missing", "unavailable"])
def test_ranks_of_one_gpu(ours: World, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    gpu = host_device(monkeypatch, gpu=RANK // 2, version=22907 if case == "old" else 23004)
    if case == "missing":
        monkeypatch.setattr(nccl, "open_library", missing)
    if case == "unavailable":
        monkeypatch.setattr(HostNccl, "available", False)
    if case == "refuses":
        library = nccl.open_library()

        def refuse(size: int, identity: bytes, index: int) -> Any:
            raise library.NcclError("not on this GPU")

        library.NcclCommunicator = refuse
    told = {
        "old": "ranks share a GPU, and NCCL 2.29.7 does not connect them .2.30 can.: GPUs exchange arrays through",
        "refuses": "ranks share a GPU, and NCCL does not connect them .NCCL cannot connect 2 GPUs .not on this GPU",
        "unavailable": "NCCL, by which GPUs exchange arrays, cannot be loaded .CuPy finds no libnccl.so.2.: .*: GPUs",
        "missing": "NCCL, by which GPUs exchange arrays, cannot be loaded .no libnccl here.: .*: GPUs exchange arrays",
    }
    if case in told and RANK == 0:
        with pytest.warns(NetTorrentWarning, match=told[case]):
            connector = Connector(ours, gpu)
    else:
        connector = Connector(ours, gpu)
    assert connector.by == ("nccl" if case == "new" else "staged")
    check_that_it_sums(ours, connector, gpu)


@pytest.mark.ranks(2, 3)
def test_parts_of_a_gpu_are_connected_if_nccl_can(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    found = placing.PlacedRank("here", "gpu", f"part {RANK}", "0000:01:00.0")
    monkeypatch.setattr(placing, "_place", lambda world, device: found)
    for version, by in ((22907, "staged"), (23004, "nccl")):
        gpu = host_device(monkeypatch, version=version)
        with pytest.warns(NetTorrentWarning) if RANK == 0 and by == "staged" else nullcontext():
            connector = Connector(ours, gpu)
        assert connector.by == by
        check_that_it_sums(ours, connector, gpu)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("case", ["kind", "version", "missing"])
def test_ranks_that_differ_are_told_by_all(ours: World, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    gpu = host_device(monkeypatch, version=23004 - (case == "version" and RANK == 1))
    device: Any = make_device() if case == "kind" and RANK == 1 else gpu
    if case == "missing" and RANK == 1:
        monkeypatch.setattr(nccl, "open_library", missing)
    told = {
        "kind": r"rank 0 on .* computes on a GPU, rank 1 on .* on a CPU: all ranks need the same `device`",
        "version": r"rank 1 has NCCL 2\.30\.3, rank 0 2\.30\.4: all ranks need the same version",
        "missing": r"cannot be loaded \(no libnccl here\).* \(on rank 1\)",
    }
    began = time.monotonic()
    with pytest.raises(LaunchError, match=told[case]) as error:
        Connector(ours, device)
    assert error.value.agreed == frozenset(range(SIZE))
    assert time.monotonic() - began < 2
    gpu.runtime.order.stop()


@pytest.mark.ranks(1)
def test_nccl_keeps_the_order_of_the_host_unless_the_user_wants_another(monkeypatch: pytest.MonkeyPatch) -> None:
    host_device(monkeypatch).runtime.order.stop()
    nccl.load(shared_gpus=True)
    assert (os.environ[nccl.IN_HOST_ORDER], os.environ[nccl.SHARED_GPUS]) == ("1", "1")
    monkeypatch.setenv(nccl.IN_HOST_ORDER, "0")
    nccl.load()
    assert os.environ[nccl.IN_HOST_ORDER] == "0"
