"""Groups, transfers and agreement between ranks, over real MPI."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm import group as mpi
from nettorrent_mpi.comm import shared, world
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.link import Part, Transfer
from nettorrent_mpi.comm.requests import Requests
from nettorrent_mpi.comm.shared import Ask, SharedMemory, share
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.plan.blocks import Grid, Span, redistribute, span
from nettorrent_mpi.plan.errors import ConfigError, DataError, LaunchError

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank


@pytest.fixture
def ours() -> Iterator[World]:
    made = World()
    yield made
    made.free()


def test_sums_and_gathers(ours: World) -> None:
    values = np.arange(101.0) * (RANK + 1)
    factor = SIZE * (SIZE + 1) / 2
    summed = values.copy()
    ours.all_reduce(summed)
    np.testing.assert_allclose(summed, np.arange(101.0) * factor)
    counts = [span(101, SIZE, i).size for i in range(SIZE)]
    part = np.empty(counts[RANK])
    ours.reduce_scatter(values, part, counts)
    np.testing.assert_allclose(part, (np.arange(101.0) * factor)[slice(*span(101, SIZE, RANK))])
    whole = np.empty(101)
    ours.all_gather(part, whole, counts)
    np.testing.assert_allclose(whole, np.arange(101.0) * factor)
    in_place = np.zeros(101)
    own = in_place[slice(*span(101, SIZE, RANK))]
    own[...] = part
    ours.all_gather(own, in_place, counts)
    np.testing.assert_array_equal(in_place, whole)


def test_groups_are_ordered_as_asked(ours: World) -> None:
    ranks = list(reversed(range(RANK % 2, SIZE, 2)))
    group = ours.subgroup(ranks)
    assert (group.size, ranks[group.index]) == (len(ranks), RANK)
    assert group.nodes == tuple(ours.nodes[rank] for rank in ranks)
    group.free()
    alone = ours.subgroup([RANK])
    assert alone.size == 1
    alone.free()


def test_every_rank_knows_who_shares_its_node(ours: World) -> None:
    assert ours.on_one_node
    turned = Group(ours.comm, [rank % 2 for rank in range(SIZE)])
    assert turned.on_one_node == (SIZE == 1)
    assert turned.by_nodes == [*range(0, SIZE, 2), *range(1, SIZE, 2)]


def test_arrays_are_traded_in_order(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "LARGEST_MESSAGE", 24)
    to, source = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    sends = [(np.full(length, 10.0 * RANK + length), to) for length in (7, 0, 2)]
    receives = [(np.empty(length), source) for length in (7, 0, 2)]
    ours.trade(sends, receives, 3)
    for array, _ in receives:
        np.testing.assert_array_equal(array, 10 * source + array.size)


@pytest.mark.parametrize("largest", [mpi.LARGEST_MESSAGE, 24])
@pytest.mark.parametrize("cols", [1, 2, 3])
def test_what_travels_between_grids_arrives_and_comes_back_summed(
    ours: World, monkeypatch: pytest.MonkeyPatch, largest: int, cols: int
) -> None:
    """All ranks hold a part of a 13 x 4 x 7 array as writers, and all columns of some rows as readers."""
    monkeypatch.setattr(mpi, "LARGEST_MESSAGE", largest)  # short messages stand for those over 2 GiB
    if SIZE % cols:
        pytest.skip(f"{SIZE} ranks do not make {cols} cols")
    writers, readers = Grid(SIZE, 1), Grid(SIZE // cols, cols)
    pieces = redistribute(13, 7, writers, readers)
    whole = np.arange(13 * 4 * 7.0).reshape(13, 4, 7)
    mine, here = span(13, SIZE, RANK), span(13, SIZE // cols, RANK // cols)
    y, x = whole[slice(*mine)].copy(), np.full((here.size, 4, 7), -1.0)
    out = [Part(p.target, shifted(p.rows, mine), p.cols) for p in pieces if p.source == RANK]
    into = [Part(p.source, shifted(p.rows, here), p.cols) for p in pieces if p.target == RANK]
    receive, send = Transfer(ours, x, into, 0, sending=False), Transfer(ours, y, out, 0, sending=True)
    back = [part._replace(add=part.peer % cols > 0) for part in out]
    dy, dx = np.full_like(y, -1.0), x
    receive_back = Transfer(ours, dy, back, 1, sending=False)
    send_back = Transfer(ours, dx, into, 1, sending=True)
    for step in range(3):  # persistent: the same transfers again and again
        y[...] = whole[slice(*mine)] + step
        receive.start()
        send.start()
        receive.finish()
        send.finish()
        np.testing.assert_array_equal(x, whole[slice(*here)] + step)
        receive_back.start()
        send_back.start()
        receive_back.finish()
        send_back.finish()
        np.testing.assert_array_equal(dy, cols * (whole[slice(*mine)] + step))
    for transfer in (receive, send, receive_back, send_back):
        transfer.free()


def shifted(part: Span, own: Span) -> Span:
    return Span(part.start - own.start, part.stop - own.start)


@pytest.mark.parametrize("wait", [True, False])
def test_the_error_of_one_of_several_requests_is_told(ours: World, wait: bool) -> None:
    """MPI's own waits say only that there is an error in a status."""
    whole, short = np.zeros(8), np.zeros(4)
    for _ in (whole, short):
        ours.comm.Isend(np.ones(8), RANK, 5).Free()
    requests = Requests([ours.comm.Irecv(whole, RANK, 5), ours.comm.Irecv(short, RANK, 5)])

    def come() -> None:
        while not requests.test():
            pass

    with pytest.raises(MPI.Exception) as told:
        (requests.wait if wait else come)()
    assert told.value.Get_error_class() == MPI.ERR_TRUNCATE
    assert (whole == 1).all()


def test_long_arrays_are_cut() -> None:
    array = np.arange(10, dtype=np.int32)
    cut = mpi.chunks(array, 12)
    assert [c.nbytes for c in cut] == [12, 12, 12, 4]
    cut[1][...] = 0
    np.testing.assert_array_equal(array, [0, 1, 2, 0, 0, 0, 6, 7, 8, 9])


def test_shared_memory_of_all_is_seen_by_all(ours: World) -> None:
    memory = SharedMemory(ours, 2000, 5 * SIZE, np.float32)
    first, second, common = memory.take_own(1984), memory.take_own(16), memory.take_common(5 * SIZE)
    assert [len(first), len(second), common.shape] == [SIZE, SIZE, (5 * SIZE,)]
    for turn in range(3):
        first[RANK][...] = second[RANK][...] = common[5 * RANK : 5 * RANK + 5] = RANK + turn
        memory.fence()
        for rank in range(SIZE):
            for part in (first[rank], second[rank], common[5 * rank : 5 * rank + 5]):
                np.testing.assert_array_equal(part, rank + turn)
            assert first[rank].ctypes.data % 64 == second[rank].ctypes.data % 64 == 0
        memory.fence()
    memory.free()
    memory = SharedMemory(ours, 0, 24, np.uint8)
    array = memory.take_common(24)
    memory.fill(lambda: array.__setitem__(slice(None), np.arange(24)))
    np.testing.assert_array_equal(array, np.arange(24))
    memory.free()


def test_what_filling_raises_is_raised_by_all(ours: World) -> None:
    def fill() -> None:
        raise DataError("broken", file="x", offset=3)

    memory = SharedMemory(ours, 0, 24, np.uint8)
    with pytest.raises(DataError, match="x at byte 3: broken"):
        memory.fill(fill)
    memory.free()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("lacks", [0, SIZE - 1])
def test_what_one_rank_of_a_node_lacks_no_rank_of_it_shares(
    ours: World, hosts: Callable[..., None], shared_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    """Two nodes, the second of which has the last rank alone; on the first, each rank has memory of its own besides."""
    monkeypatch.setattr(shared, "BACKING", str(shared_path))
    if SIZE > 1:
        hosts(SIZE - 1, 1)
    world = World()
    node = world.subgroup([rank for rank in range(SIZE) if world.nodes[rank] == world.nodes[RANK]])
    alone = world.subgroup([RANK])
    asks = [Ask(node, 5000, 10_000, np.float32, 0), Ask(alone, 0, 77, np.float64, 0)]
    memories, lack = share(world, asks)
    assert (len(memories), lack) == (2, None)
    part = memories[0].take_own(5000)[node.index]
    part[...] = RANK
    for memory in memories:
        memory.free()
    with files_of_at_most(3000 if lacks == RANK else 1 << 30):
        memories, lack = share(world, asks)
    if world.nodes[RANK] == world.nodes[lacks]:
        assert memories == []
        assert "File too large" in str(lack)
    else:
        assert (len(memories), lack) == (2, None)
        for memory in memories:
            memory.free()
    assert (part == RANK).all() or not part.any()  # given back, but no error
    assert list(shared_path.iterdir()) == []
    for group in (node, alone, world):
        group.free()


def test_the_sum_of_what_is_asked_for_has_to_fit(ours: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ours.subgroup([RANK])
    monkeypatch.setattr(shared, "room", lambda: 1000 * SIZE)
    memories, lack = share(ours, [Ask(alone, 125, 0, np.float64, 0)])
    assert (len(memories), lack) == (1, None)
    memories[0].free()
    assert share(ours, [Ask(alone, 126, 0, np.float64, 0)]) == ([], f"{SIZE / 1000:.1f} MB are free")
    alone.free()


def test_one_ranks_mistake_becomes_everyones(ours: World) -> None:
    def alone() -> None:
        with ours.agreement():
            if RANK == SIZE - 1:
                raise DataError("only here")

    with pytest.raises(DataError, match="only here") as caught:
        alone()
    assert (caught.value.exit_code, caught.value.agreed) == (2, frozenset(range(SIZE)))
    assert ("(on rank" in str(caught.value)) == (SIZE > 1)
    with ours.agreement():
        pass


def test_all_ranks_must_hold_the_same(ours: World) -> None:
    ours.same("thing", "a")
    if SIZE > 1:
        with pytest.raises(LaunchError, match=f"rank {SIZE - 1} has another thing"):
            ours.same("thing", "b" if RANK == SIZE - 1 else "a")


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "same MPI's mpirun"),
        ({"PMI_SIZE": "4"}, "same MPI's mpirun"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, "--mpi=pmi2"),
    ],
)
def test_many_runs_of_one_rank_are_noticed(environment: dict[str, str], remedy: str) -> None:
    with pytest.raises(LaunchError, match=remedy):
        world.check_launch(1, environment)
    world.check_launch(4, environment)
    world.check_launch(1, {"SLURM_NTASKS": "4"})  # the batch shell itself: no step of srun
    assert "mpi4py" in sys.modules


def test_what_one_makes_all_have(ours: World) -> None:
    made: list[int] = []
    assert ours.once(lambda: made.append(RANK) or {"of": RANK}) == {"of": 0}  # type: ignore[func-returns-value]
    assert made == [0] * (RANK == 0)

    def fail() -> int:
        raise ConfigError("a mistake", key="seed")

    with pytest.raises(ConfigError, match="a mistake") as caught:
        ours.once(fail)
    assert (caught.value.exit_code, "on rank" in str(caught.value)) == (2, False)
