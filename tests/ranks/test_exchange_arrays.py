"""An exchange of arrays that belong to no network: several flat arrays on each rank, of sizes that nothing divides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.exchange import Exchange, Shards, make_exchange
from nettorrent_mpi.plan.exchange_specs import (
    Consensus,
    Elite,
    Gossip,
    LossMix,
    Nothing,
    PushSumMix,
    TopK,
)
from nettorrent_mpi.plan.scores import Scores
from nettorrent_mpi.plan.specs import Adam, Sgd, Spec

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SIZES = (1, 7, 0, 1003, 129)
REPEATABLE: dict[str, Any] = {"deadline": "none", "part": 1.0}  # nothing depends on how fast this machine is

several = pytest.mark.skipif(SIZE == 1, reason="one rank has nobody to exchange with")


def arrays(seed: int = 0, dtype: Any = np.float64) -> list[np.ndarray]:
    """Other numbers on each rank."""
    generator = np.random.default_rng([seed, RANK])
    return [generator.normal(size=size).astype(dtype) for size in SIZES]


def same(value: float) -> list[np.ndarray]:
    return [np.full(size, value) for size in SIZES]


@contextmanager
def exchanging(world: MPI.Intracomm, spec: Spec, shards: Shards, **more: Any) -> Iterator[Exchange]:
    """An exchange over a communicator of its own, which its caller makes and frees."""
    peers = Group(world.Dup())
    exchange = make_exchange(spec, shards, peers, make_device("cpu", "numpy"), **more)
    yield exchange
    exchange.settle()
    exchange.close()
    peers.comm.Free()


def steps(exchange: Exchange, first: int, count: int) -> None:
    """Steps without an update: nothing but the exchange changes the arrays."""
    for step in range(first, first + count):
        exchange.before_update(step)
        exchange.after_update(0.0, step)


def everyones(world: MPI.Intracomm, own: list[np.ndarray]) -> np.ndarray:
    """(rank, element)."""
    return np.array(world.allgather(np.concatenate(own)))


def spread(values: np.ndarray) -> float:
    return float(np.abs(values - values.mean(axis=0)).max())


# -- gossip ------------------------------------------------------------------------------------------------------------

# A ring over the values 0, 3, 6, ... of the ranks: each takes a third of both neighbours; of two, a half of the other.
ONE_ROUND = {2: [1.5, 1.5], 3: [3, 3, 3], 4: [4, 3, 6, 5], 5: [5, 3, 6, 9, 7]}


@pytest.mark.ranks(*ONE_ROUND)
@pytest.mark.parametrize("overlap", [False, True])
def test_one_round_by_hand(world: MPI.Intracomm, overlap: bool) -> None:
    own = same(3.0 * RANK)
    with exchanging(world, Gossip("ring", overlap=overlap, withhold=0, **REPEATABLE), Shards(own)) as exchange:
        steps(exchange, 1, 1)
        if overlap:  # the messages travel while the next step computes
            np.testing.assert_array_equal(np.concatenate(own), 3.0 * RANK)
            exchange.settle()
        np.testing.assert_allclose(np.concatenate(own), ONE_ROUND[SIZE][RANK], rtol=1e-15)


@pytest.mark.ranks(*ONE_ROUND)
def test_what_is_withheld_is_known_to_peers_first(world: MPI.Intracomm) -> None:
    """An update of 8 is made by hand; a quarter of it waits until the round that tells peers of it is merged."""
    own = same(3.0 * RANK)
    with exchanging(world, Gossip("ring", withhold=0.25, **REPEATABLE), Shards(own)) as exchange:
        exchange.before_update(1)
        for array in own:
            np.add(array, 8, out=array)
        exchange.after_update(0.1, 1)
        np.testing.assert_array_equal(np.concatenate(own), 3.0 * RANK + 6)
        exchange.before_update(2)  # merges what was sent after the first step: the whole values
        np.testing.assert_allclose(np.concatenate(own), ONE_ROUND[SIZE][RANK] + 8, rtol=1e-15)
        exchange.after_update(0.1, 2)


@several
@pytest.mark.parametrize("overlap", [False, True])
def test_a_ring_converges_to_the_mean_and_keeps_the_sum(world: MPI.Intracomm, overlap: bool) -> None:
    own = arrays()
    values = everyones(world, own)
    mean, before = values.mean(axis=0), spread(values)
    with exchanging(world, Gossip("ring", overlap=overlap, **REPEATABLE), Shards(own)) as exchange:
        for n in range(6):
            steps(exchange, 20 * n + 1, 20)
            exchange.settle()
            np.testing.assert_allclose(everyones(world, own).mean(axis=0), mean, rtol=0, atol=1e-14)
        assert spread(everyones(world, own)) < 1e-6 * before
        told = exchange.figures(exchange.peers)
        assert (told["rounds"], told["skipped"], told["late"]) == (120, 0, 0)
        exchange.become()
        np.testing.assert_allclose(np.concatenate(own), mean, rtol=0, atol=1e-14)
        assert len(set(world.allgather(np.concatenate(own).tobytes()))) == 1


@several
def test_float32_in_parts(world: MPI.Intracomm) -> None:
    own = arrays(dtype=np.float32)
    mean = everyones(world, own).mean(axis=0, dtype=np.float64)
    with exchanging(world, Gossip("finite", part=0.3, deadline="none", overlap=False), Shards(own)) as exchange:
        steps(exchange, 1, 3 * 2 * SIZE)
        np.testing.assert_allclose(np.concatenate(own), mean, rtol=0, atol=1e-6)


@several
def test_push_sum_keeps_the_mean_by_mass(world: MPI.Intracomm) -> None:
    """Everyone draws a target: some receive from several, some from nobody."""
    own = arrays()
    mean, before = everyones(world, own).mean(axis=0), spread(everyones(world, own))
    spec = Gossip("random", mix=PushSumMix(), **REPEATABLE)
    with exchanging(world, spec, Shards(own), seed=3) as exchange:
        steps(exchange, 1, 60)
        exchange.settle()
        masses = np.array(world.allgather(float(exchange.memories()["mass"][-1][0])))
        np.testing.assert_allclose(masses.sum(), SIZE, rtol=1e-12)
        values = everyones(world, own)
        np.testing.assert_allclose(masses @ values / SIZE, mean, rtol=0, atol=1e-13)
        assert spread(values) < 1e-3 * before
        exchange.recall(60)
        with exchange.shown():
            np.testing.assert_allclose(np.concatenate(own), mean, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(np.concatenate(own), values[RANK])


@several
def test_the_largest_differences_are_enough(world: MPI.Intracomm) -> None:
    """A message has a tenth of a difference's elements; the rest follows in later ones (error feedback)."""
    own = same(1.0)  # as they have to begin
    with exchanging(world, Gossip("ring", compress=TopK(0.1), **REPEATABLE), Shards(own)) as exchange:
        for array, other in zip(own, arrays(), strict=True):
            array[...] = other
        values = everyones(world, own)
        mean, before = values.mean(axis=0), spread(values)
        steps(exchange, 1, 300)
        exchange.settle()
        values = everyones(world, own)
        np.testing.assert_allclose(values.mean(axis=0), mean, rtol=0, atol=1e-12)
        assert spread(values) < 0.05 * before
        messages = len({(RANK - 1) % SIZE, (RANK + 1) % SIZE})
        assert exchange.figures(exchange.peers)["bytes_per_step"] == messages * (64 + 8 * sum(SIZES) // 10)


@several
def test_what_the_optimizer_remembers_travels_with_the_parameters(world: MPI.Intracomm) -> None:
    own, m, statistics = arrays(0), arrays(1), [np.full(3, float(RANK))]
    means = [everyones(world, each).mean(axis=0) for each in (own, m)]
    spec = Gossip("complete", average=("parameters", "optimizer"), overlap=False, **REPEATABLE)
    with exchanging(world, spec, Shards(own, {"m": m}, statistics)) as exchange:
        steps(exchange, 1, 1)
        for each, mean in zip((own, m), means, strict=True):
            np.testing.assert_allclose(np.concatenate(each), mean, rtol=0, atol=1e-14)
        np.testing.assert_array_equal(statistics[0], RANK)  # averaged when people look
        with exchange.shown():
            np.testing.assert_allclose(statistics[0], (SIZE - 1) / 2)
        np.testing.assert_array_equal(statistics[0], RANK)


@several
def test_a_loss_is_told(world: MPI.Intracomm) -> None:
    """The worse of two takes more: l / (l + pl), of each neighbour its part."""
    own = same(float(RANK))
    with exchanging(world, Gossip("finite", mix=LossMix(), overlap=False, **REPEATABLE), Shards(own)) as exchange:
        assert exchange.wants_loss
        exchange.tell_loss(1.0 + RANK)
        partner, _ = exchange.pairing.sends(0, RANK)[0] if exchange.pairing.sends(0, RANK) else (RANK, 0)  # type: ignore[attr-defined]
        steps(exchange, 1, 1)
        f = (1 + RANK) / (2 + RANK + partner)
        np.testing.assert_allclose(np.concatenate(own), f * partner + (1 - f) * RANK, rtol=1e-14)


@several
def test_replicas_that_are_far_apart_are_averaged(world: MPI.Intracomm) -> None:
    own = arrays()
    mean = everyones(world, own).mean(axis=0)
    spec = Gossip("ring", consensus=Consensus(0.1), **REPEATABLE)

    def compare() -> list[Scores] | None:
        raise AssertionError("nobody has to be evaluated")

    with exchanging(world, spec, Shards(own), report_every=10) as exchange:
        assert [exchange.next_rest(step) for step in (0, 9, 10)] == [10, 10, 20]
        before = np.concatenate(own)
        assert exchange.at_rest(10, compare, 0.09) is exchange.at_rest(10, compare, None) is None
        np.testing.assert_array_equal(np.concatenate(own), before)
        assert exchange.at_rest(10, compare, 0.11) is None
        np.testing.assert_allclose(np.concatenate(own), mean, rtol=0, atol=1e-14)


def test_the_rate_is_scaled_for_optimizers_that_normalize(world: MPI.Intracomm) -> None:
    for optimizer, expected in ((Adam(), np.sqrt(SIZE)), (Sgd(), 1.0), (None, 1.0)):
        with exchanging(world, Gossip("ring", **REPEATABLE), Shards(arrays()), optimizer=optimizer) as exchange:
            assert exchange.rate_scale(0.0, 1.0) == 1
            assert exchange.rate_scale(1.0, 1.0) == pytest.approx(expected)


# -- elite -------------------------------------------------------------------------------------------------------------


@several
def test_all_take_the_best_ranks_arrays(world: MPI.Intracomm) -> None:
    own, m = arrays(0), arrays(1)
    values, memories = everyones(world, own), everyones(world, m)
    best = SIZE - 2
    scores = [Scores(1.0 + abs(r - best), 0.5) for r in range(SIZE)]
    with exchanging(world, Elite(every_samples=100), Shards(own, {"m": m}), batch_size=40) as exchange:
        assert [exchange.next_rest(step) for step in (0, 2, 3)] == [3, 3, 6]
        steps(exchange, 1, 2)
        assert exchange.at_rest(2, lambda: scores) is None
        np.testing.assert_array_equal(np.concatenate(own), values[RANK])
        steps(exchange, 3, 1)
        assert exchange.at_rest(3, lambda: scores) == scores[best]
        np.testing.assert_array_equal(np.concatenate(own), values[best])
        np.testing.assert_array_equal(np.concatenate(m), memories[best])


@several
def test_of_random_pairs_the_loser_takes_the_winners_arrays(world: MPI.Intracomm) -> None:
    own = arrays()
    values = everyones(world, own)
    scores = [Scores(float(r), None) for r in range(SIZE)]
    with exchanging(world, Elite(mode="tournament", every_samples=1), Shards(own), batch_size=1) as exchange:
        assert exchange.at_rest(1, lambda: scores) == scores[0]
    sources = [int(np.flatnonzero((values == each).all(axis=1))[0]) for each in everyones(world, own)]
    assert all(source <= r and sources[source] == source for r, source in enumerate(sources))
    assert len(set(sources)) == (SIZE + 1) // 2


# -- apart, and beside each other --------------------------------------------------------------------------------------


def test_replicas_apart_change_nothing(world: MPI.Intracomm) -> None:
    own = arrays()
    values = everyones(world, own)
    with exchanging(world, Nothing(), Shards(own)) as exchange:
        steps(exchange, 1, 5)
        assert exchange.next_rest(5) is exchange.at_rest(5, lambda: None, 1.0) is exchange.progress is None
        assert (exchange.rate_scale(1.0, 0.1), exchange.memories(), exchange.count) == (1.0, {}, SIZE)
        np.testing.assert_array_equal(np.concatenate(own), values[RANK])
        with exchange.shown():
            np.testing.assert_allclose(np.concatenate(own), values.mean(axis=0), rtol=0, atol=1e-14)
        with exchange.shown(SIZE - 1):
            np.testing.assert_array_equal(np.concatenate(own), values[SIZE - 1])
        np.testing.assert_array_equal(np.concatenate(own), values[RANK])


@pytest.mark.parametrize("spec", [Gossip(), Elite()], ids=lambda spec: spec.kind)
def test_one_replica_has_nobody_to_exchange_with(spec: Spec) -> None:
    own = arrays()
    before = np.concatenate(own)
    with exchanging(MPI.COMM_SELF, spec, Shards(own)) as exchange:
        assert type(exchange) is Exchange
        steps(exchange, 1, 3)
        exchange.become()
        np.testing.assert_array_equal(np.concatenate(own), before)


@several
def test_exchanges_of_the_same_ranks_live_beside_each_other(world: MPI.Intracomm) -> None:
    """Step by step in turn, the messages of both under way: each does what it does alone."""
    ring = Gossip("ring", **REPEATABLE)
    specs = (ring, Gossip("exponential", part=0.5, deadline="none"), ring)
    alone = []
    for seed, spec in enumerate(specs):
        own = arrays(seed)
        with exchanging(world, spec, Shards(own)) as exchange:
            steps(exchange, 1, 12)
        alone.append(np.concatenate(own))
    groups = [Group(world.Dup()) for _ in specs]
    both = [arrays(seed) for seed in range(len(specs))]
    device = make_device("cpu", "numpy")
    given = zip(specs, both, groups, strict=True)
    made = [make_exchange(spec, Shards(own), group, device) for spec, own, group in given]
    for step in range(1, 13):
        for exchange in made:
            steps(exchange, step, 1)
        if step == 6:  # one ends early
            made[0].settle()
            made.pop(0).close()
            groups.pop(0).comm.Free()
    for exchange, group in reversed(list(zip(made, groups, strict=True))):
        exchange.settle()
        exchange.close()
        group.comm.Free()
    for own, expected in zip(both[1:], alone[1:], strict=True):
        np.testing.assert_array_equal(np.concatenate(own), expected)
