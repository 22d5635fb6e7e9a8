"""Channels of all kinds carry the same values: MPI's in place, staged ones, and NCCL's (over MPI)."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm import nccl
from nettorrent_mpi.comm.channel_team import ChannelTeam
from nettorrent_mpi.comm.channels import Channel, Message, MpiChannel, NcclChannel, launch
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.link import Part
from nettorrent_mpi.comm.parcels import Parcel
from nettorrent_mpi.comm.reducers import ChannelReducer
from nettorrent_mpi.comm.staged_channel import PinnedMemory, StagedChannel
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.plan.blocks import Grid, Span, redistribute, span
from nettorrent_mpi.plan.errors import LaunchError
from tests.gpu.host.nccl import HostNccl

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SUM = SIZE * (SIZE + 1) / 2


class LazyDevice:
    """Arrays of NumPy, and one stream whose work waits until somebody waits for it."""

    handle = 7
    uuid = f"GPU-{RANK}"

    def __init__(self) -> None:
        self.queue: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        self.runtime = self.stream = self.ops = self
        self.real = make_device().ops
        self.eager = False  # as a CPU is

    def enqueue(self, stream: int, name: str, entered: Any, ready: Any, run: Any) -> None:
        assert stream == self.handle
        entered()
        self.queue.append((ready, run))

    def synchronize(self) -> None:
        while self.queue:
            ready, run = self.queue[0]
            if ready():
                run()
                self.queue.popleft()

    def memory(self, address: int, size: int) -> Any:
        return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)

    def address(self, array: Any) -> int:
        return int(array.ctypes.data)

    def pinned(self, size: int) -> Any:
        return np.empty(size, np.uint8)

    def empty(self, shape: Any, dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def add(self, a: Any, b: Any, out: Any) -> None:
        self.work(lambda: self.real.add(a, b, out))

    def copy(self, *args: Any) -> None:
        """The operation of a device, or, with a stream, that of a runtime, which copies bytes."""
        out, x = args[-2:]
        assert len(args) == 2 or (out.nbytes == x.nbytes and out.flags.c_contiguous and x.flags.c_contiguous)
        if len(args) == 3:
            out, x = out.reshape(-1).view(np.uint8), x.reshape(-1).view(np.uint8)
        self.work(lambda: self.real.copy(out, x))

    def work(self, run: Callable[[], None]) -> None:
        if self.eager:
            run()
        else:
            self.queue.append((lambda: True, run))


@pytest.fixture
def ours() -> Iterator[World]:
    made = World()
    yield made
    made.free()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = LazyDevice()
    library = HostNccl(made, patience=2.0)
    monkeypatch.setattr(nccl, "open_library", lambda: library)
    monkeypatch.delenv(nccl.SHARED_GPUS, raising=False)
    return made


@pytest.fixture(params=["mpi", "staged", "nccl"])
def connect(request: pytest.FixtureRequest, ours: World, device: Any) -> Iterator[Callable[[Group], Channel]]:
    """Makes the channel of a group; all ranks call."""
    made: list[Channel] = []
    pinned = PinnedMemory(device)

    def make(group: Group) -> Channel:
        if request.param == "mpi":
            device.eager = True
            made.append(MpiChannel(device, group))
        elif request.param == "staged":
            made.append(StagedChannel(device, group, pinned, largest=40))
        else:
            library = nccl.load()
            (identity,) = nccl.identities(ours, library, [group])
            made.append(NcclChannel(device, group, library, identity))
        return made[-1]

    yield make
    device.synchronize()
    for channel in made:
        channel.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, ml_dtypes.bfloat16])
def test_sums_and_gathers(ours: World, device: Any, connect: Callable[[Group], Channel], dtype: Any) -> None:
    channel = connect(ours)
    if isinstance(channel, MpiChannel) and dtype is ml_dtypes.bfloat16:
        pytest.skip("MPI has no bfloat16")
    values = (np.arange(7 * SIZE) % 5 * (RANK + 1)).astype(dtype)
    wanted = np.arange(7 * SIZE) % 5 * SUM
    summed, part, whole = values.copy(), np.empty(7, dtype), np.empty(7 * SIZE, dtype)
    channel.all_reduce(summed)
    channel.reduce_scatter(values, part)
    channel.all_gather(part, whole)
    told = np.full(11, RANK, dtype)
    channel.broadcast(told, SIZE - 1)
    in_place = np.full(7 * SIZE, -1, dtype)
    own = in_place[7 * RANK : 7 * RANK + 7]
    device.copy(own, part)
    channel.all_gather(own, in_place)
    device.synchronize()
    np.testing.assert_array_equal(summed.astype(float), wanted)
    np.testing.assert_array_equal(part.astype(float), wanted[7 * RANK : 7 * RANK + 7])
    np.testing.assert_array_equal(whole, summed)
    np.testing.assert_array_equal(in_place, summed)
    np.testing.assert_array_equal(told.astype(float), SIZE - 1)


def test_all_get_bitwise_the_same_sums(ours: World, device: Any, connect: Callable[[Group], Channel]) -> None:
    values = np.random.default_rng(RANK).normal(size=1001).astype(np.float32)
    connect(ours).all_reduce(values)
    device.synchronize()
    assert len(set(ours.gather_objects(values.tobytes()))) == 1


def test_reducer(ours: World, device: Any, connect: Callable[[Group], Channel]) -> None:
    count = 16
    grads = np.arange(count * SIZE) * (RANK + 1.0)
    params, sums = np.zeros(count * SIZE), np.zeros(count)
    reducer = ChannelReducer(connect(ours), params, grads, sums)
    for step in range(3):
        reducer.reduce()
        device.copy(params[count * RANK :][:count], sums)
        reducer.gather()
        device.add(grads, 1.0, grads)
        device.synchronize()
        np.testing.assert_allclose(params, np.arange(count * SIZE) * SUM + step * SIZE)


@pytest.mark.parametrize("features", [1, 2, 11, 12])
def test_cols(ours: World, device: Any, connect: Callable[[Group], Channel], features: int) -> None:
    channel = connect(ours)
    team, workspace = ChannelTeam(device, channel, channel), Workspace(np.float64)
    whole = np.arange(3 * 2 * features * 1.0).reshape(3, 2, features)
    own = slice(*span(features, SIZE, RANK))
    gathered, part = np.empty_like(whole), np.empty_like(whole[..., own])
    part = np.empty(part.shape)
    for _ in range(2):
        team.gather_cols(np.ascontiguousarray(whole[..., own]), gathered, workspace)
        team.scatter_cols(whole * (RANK + 1), part, workspace)
        values = np.full(5, RANK + 1.0)
        team.sum_over_cols(values)
        team.sum_over_rows(values)
        device.synchronize()
        np.testing.assert_array_equal(gathered, whole)
        np.testing.assert_allclose(part, whole[..., own] * SUM)
        np.testing.assert_array_equal(values, SUM * SIZE)


@pytest.mark.ranks(2, 3, 4)
def test_arrays_are_exchanged_around(ours: World, device: Any, connect: Callable[[Group], Channel]) -> None:
    channel = connect(ours)
    into = [np.empty(33), np.empty((2, 3), np.uint8), np.empty(0)]
    sent = [np.full(33, RANK + 0.5), np.full((2, 3), RANK, np.uint8), np.empty(0)]
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    channel.exchange([(array, right) for array in sent], [(array, left) for array in into])
    device.synchronize()
    assert (into[0] == left + 0.5).all()
    assert (into[1] == left).all()


@pytest.mark.ranks(2, 3, 4)
def test_one_launch_over_several_links(ours: World, device: Any, connect: Callable[[Group], Channel]) -> None:
    """A ring of links of two: everyone sends both ways and receives from both sides."""
    pairs = [sorted((i, (i + 1) % SIZE)) for i in range(SIZE if SIZE > 2 else 1)]
    links = {}
    for pair in pairs:  # all ranks make channels together; the others' are of their own
        group = ours.subgroup(pair) if RANK in pair else ours.subgroup([RANK])
        links[tuple(pair)] = connect(group)
    mine = {pair: channel for pair, channel in links.items() if RANK in pair}
    got = {pair: np.empty(9) for pair in mine}
    messages = []
    for pair, channel in mine.items():
        other = 1 - channel.group.index
        messages.append(Message(channel, True, np.full(9, RANK * 1.0), other))
        messages.append(Message(channel, False, got[pair], other))
    launch(messages[::2] + messages[1::2])
    device.synchronize()
    for pair, array in got.items():
        assert (array == sum(pair) - RANK).all()
    for channel in links.values():
        channel.close()
        channel.group.free()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (2, 1), (1, 3)])
def test_parcels_move_an_array_between_teams(
    ours: World, device: Any, connect: Callable[[Group], Channel], rows: int, cols: int
) -> None:
    """A team of rows x cols writes y; the other ranks, rows of their own, read all of it and send gradients back."""
    channel, readers = connect(ours), SIZE - rows * cols
    source, target, of, features = Grid(rows, cols), Grid(readers, 1), 5, 7
    whole = np.arange(of * 3 * features * 1.0).reshape(of, 3, features)
    writes = rows * cols > RANK
    index = RANK if writes else RANK - rows * cols
    if writes:
        own = Span(*span(of, rows, index // cols)), Span(*span(features, cols, index % cols))
    else:
        own = Span(*span(of, readers, index)), Span(0, features)
    parts = []
    for piece in redistribute(of, features, source, target):
        here, there = (piece.source, piece.target + rows * cols) if writes else (piece.target, piece.source)
        if here == index:
            parts.append(Part(there, shifted(piece.rows, own[0]), shifted(piece.cols, own[1])))
    array = np.full((own[0].size, 3, own[1].size), -1.0)
    here = slice(*own[0]), slice(None), slice(*own[1])
    parcel = Parcel(device, channel, array, parts, sending=writes)
    back = Parcel(device, channel, array, [part._replace(add=writes) for part in parts], sending=not writes)
    for step in range(3):
        if writes:
            array[...] = whole[here] + step
        parcel.pack()
        launch(parcel.messages)
        parcel.unpack()
        device.synchronize()
        np.testing.assert_array_equal(array, whole[here] + step)
        back.pack()
        launch(back.messages)
        back.unpack()
        device.synchronize()
        np.testing.assert_array_equal(array, (whole[here] + step) * (2 if writes else 1))


def shifted(part: Span, own: Span) -> Span:
    return Span(part.start - own.start, part.stop - own.start)


def test_a_rank_that_cannot_make_an_id_is_told_by_all(ours: World, device: Any) -> None:
    library = nccl.load()
    if RANK == 0:

        def fail() -> bytes:
            raise library.NcclError("no device")

        library.get_unique_id = fail
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"NCCL cannot start \(no device"):
        nccl.identities(ours, library, [ours])
    assert time.monotonic() - began < 2


@pytest.mark.ranks(2, 3, 4)
def test_a_launch_out_of_order_is_named(ours: World, device: Any) -> None:
    """Two ranks launch two operations in opposite orders."""
    library = nccl.load()
    first, second = (ours.duplicate() for _ in range(2))
    ids = nccl.identities(ours, library, [first, second])
    channels = [
        NcclChannel(device, group, library, identity) for group, identity in zip((first, second), ids, strict=True)
    ]
    for channel in channels if RANK else reversed(channels):
        channel.all_reduce(np.ones(5))
    with pytest.raises(TimeoutError, match=rf"NCCL launch 1 of rank {RANK} \(all_reduce of 5 float64 among ranks 0, 1"):
        device.synchronize()
    ours.barrier()
    for channel in channels:
        channel.abort()
        channel.group.free()
    device.synchronize()  # nothing waits any more
