"""What a dry run says that ranks hold is what the engine's arrays take on the rank of each stage that has most."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.reducers import SharedReducer
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.reading import load
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.memory_estimate import Libraries, estimate
from nettorrent_mpi.engine.redundancy import Redundancy
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.exchange.gossip import GossipExchange
from nettorrent_mpi.plan.topology import Stage, Topology

SIZE = MPI.COMM_WORLD.size
LAYERS = (
    "[{conv2d: {filters: 16, padding: same, activation: relu}}, batch_norm, {max_pool2d: 2}, "
    "{conv2d: {filters: 16, activation: relu}}, {dropout: 0.3}, flatten, {linear: {units: 512, activation: relu}}, "
    "{linear: 10}]"
)
SETTINGS = (
    "data={name: synthetic, rows: 640, test_rows: 64, shape: [16, 16, 3]}",
    f"model.layers={LAYERS}",
    "train.batch_size=64",
    "train.micro_batches=4",
    "redundancy=buddy",
)


def swarms(grids: list[tuple[int, int]]) -> str:
    """A layout of four weight layers, with a stage for each grid of rows x cols."""
    cuts = [i * 4 // len(grids) for i in range(len(grids) + 1)]
    teams = [f"{{layers: {b - a}, rows: {r}, cols: {c}}}" for (a, b), (r, c) in zip(pairwise(cuts), grids, strict=True)]
    return f"layout={{swarms: [{', '.join(teams)}]}}"


CASES: dict[int, list[tuple[str, ...]]] = {
    1: [(swarms([(1, 1)]),), (swarms([(1, 1)]), "train.optimizer=sgd", "dtype=float64", "train.micro_batches=1")],
    2: [
        (swarms([(2, 1)]),),
        (swarms([(1, 2)]),),
        (swarms([(1, 1), (1, 1)]), "pipeline=async"),
        (swarms([(1, 1), (1, 1)]), "pipeline=zero_bubble"),
        ("layout={replicas: 2}", "exchange={gossip: {part: 1.0, deadline: none}}"),
        ("layout={replicas: 2}", "exchange={gossip: {part: 0.5, deadline: none, compress: int8}}"),
        ("layout={replicas: 2}", "exchange={gossip: {part: 0.5, deadline: none, compress: {topk: 0.01}}}"),
        ("layout={replicas: 2}", "exchange={gossip: {part: 1.0, deadline: none, compress: float16}}"),
        ("layout={replicas: 2}", "exchange={gossip: {part: 0.5, average: [parameters, optimizer]}}"),
    ],
    4: [
        (swarms([(1, 2), (2, 1)]),),
        (swarms([(2, 1), (1, 2)]), "pipeline=gpipe"),
        (swarms([(1, 2), (1, 1), (1, 1)]), "pipeline=zero_bubble"),
        (swarms([(1, 1)] * 4),),
        ("layout={replicas: 2, swarms: [{layers: 4, rows: 2}]}", "exchange={gossip: {part: 1.0, deadline: none}}"),
    ],
}  # fmt: skip


def held(engine: Engine) -> dict[str, int]:
    """Bytes of what this rank has allocated, and of what it reads of others' in shared memory."""
    state, wiring, pipeline = engine.state, engine.wiring, engine.pipeline
    parameters = 0
    for bucket in state.buckets:
        arrays = [bucket.params, *bucket.versions, bucket.grads]
        if bucket.group.size > 1:
            shards = bucket.reducer._shards if isinstance(bucket.reducer, SharedReducer) else []
            arrays += [bucket.reduced, *(grads for i, grads in enumerate(shards) if i != bucket.group.index)]
        parameters += sum(array.nbytes for array in arrays)
        parameters += sum(each._x.nbytes + each._dy.nbytes for each in bucket.operands.values())
    buffers = [*wiring._x, *wiring._dx, *wiring._dy]
    transfers = wiring._transfers.values()
    staged = [staging for transfer in transfers for _, staging in (*transfer._copied, *transfer._added)]
    spaces = pipeline._workspaces
    redundancy = Redundancy(engine, 1)
    redundancy.close()
    return {
        "parameters": parameters,
        "optimizer": sum(array.nbytes for bucket in state.buckets for array in bucket.optimizer.values()),
        "layers": sum(space.bytes for space in spaces) + spaces[0]._shared.bytes + engine.device.working_bytes,
        "links": sum(array.nbytes for array in (*buffers, *staged)),
        "exchange": exchange(engine),
        "copies": redundancy.bytes,
    }


def exchange(engine: Engine) -> int:
    gossip = engine.exchange
    if not isinstance(gossip, GossipExchange):
        return 0
    mail = gossip.rounds.mail
    letters = [*mail._free, *(letter for _, letter in mail._posted), *(letter for _, letter in mail._sending.values())]
    letters += [arrived.letter for arrived in mail._arrived]
    own = gossip.rounds._round.own if gossip.rounds._round is not None else None
    letters += [own] if own is not None and all(own is not letter for letter in letters) else []
    arrays = [*gossip._withheld.changes, *gossip._withheld._before]
    estimates = gossip.mixer.estimates
    if estimates is not None:
        arrays += [estimates._reference, estimates._difference, *estimates._sent.values(), *estimates._known.values()]
    shown = sum(flat.params[flat.shard].nbytes for flat in engine.state.flats)  # the copy while an average is shown
    unique = {id(letter): letter.envelope.whole.nbytes for letter in letters}
    return sum(unique.values()) + sum(array.nbytes for array in arrays) + shown


@pytest.mark.ranks(*CASES)
@pytest.mark.parametrize("number", range(max(map(len, CASES.values()))))
def test_the_terms_are_what_is_allocated(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if number >= len(CASES[SIZE]):
        pytest.skip("no such case of so many ranks")
    monkeypatch.setattr("nettorrent_mpi.engine.copy_interval.survivable", lambda: True)
    setup = set_up(load(None, [*SETTINGS, *CASES[SIZE][number]]), SIZE)
    told = estimate(setup, Libraries(0, 0))
    found = trained(setup)
    for stage, each in enumerate(told):
        ranks = [own for s, own in found if s == stage]
        for term in ranks[0]:
            most, expected = max(own[term] for own in ranks), getattr(each, term)
            # Small arrays, ends of cache lines and what is not trained are left out; where a part of the cols has
            # fewer neurons than another, roundings of several layers add up.
            assert most == pytest.approx(expected, rel=0.06, abs=12_000), (stage, term)


def trained(setup: Setup) -> list[tuple[int, dict[str, int]]]:
    """(stage, what it holds) of every rank after some steps."""
    engine = Engine(World(), setup.plan)
    engine.open_data(setup.dataset, setup.sampler)
    for n in range(6):
        engine.step(n, 0.001, 6 - n)
    found: list[tuple[int, dict[str, int]]] = MPI.COMM_WORLD.allgather((engine.place.stage, held(engine)))
    engine.close()
    return found


@pytest.mark.ranks(1)
def test_the_rows_and_what_is_gathered() -> None:
    """By hand: bytes of the images, labels, numbers of rows; parameters and two states for a checkpoint, and the
    network."""
    setup = set_up(load(None, [*SETTINGS, "train.micro_batches=1"]), 1)
    (alone,) = estimate(setup, Libraries(1000, 0))
    assert alone.rows == 16 * 16 * 3 * (640 + 64 + 64) + 8 * (640 + 64) + 3 * 8 * 640
    parameters = sum(facts.parameters for facts in setup.network.facts)
    assert alone.files == pytest.approx(15e6 + 4 * (3 + 1) * parameters, rel=1e-6)
    assert alone.libraries == 1000
    halves = Topology(1, (Stage(0, 2, 1, 1), Stage(2, 4, 1, 1)))
    first, second = estimate(replace(setup, topology=halves), Libraries(0, 0))
    assert first.rows == 16 * 16 * 3 * (640 + 64 + 64) + 3 * 8 * 640
    assert second.rows == 8 * (640 + 64) + 3 * 8 * 640
    own = sum(facts.parameters for facts in setup.network.facts[2:])
    assert second.files == pytest.approx(15e6 + 4 * 3 * own, rel=1e-6)
