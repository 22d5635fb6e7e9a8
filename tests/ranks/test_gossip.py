"""What gossip promises: the average is kept, replicas come together, nobody's rows fall apart, nobody is waited for.

Most tests do without the steps themselves: replicas begin with values that differ, and only exchange.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.mail import Mail
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.exchange.gossip import GossipExchange
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.pairing import possible
from nettorrent_mpi.plan.topology import Stage, Topology

SIZE = MPI.COMM_WORLD.size
LAYERS = (
    specs.Linear(7, activation="tanh"),
    specs.BatchNorm(),
    specs.Linear(5, activation="relu"),
    specs.Linear(3),
)
PATIENT: dict[str, Any] = {"deadline": "none"}  # nothing depends on how fast this machine is


def alone(replicas: int = SIZE) -> Topology:
    return Topology(replicas, (Stage(0, 3, 1, 1),))


def make(
    topology: Topology, dtype: str = "float64", optimizer: Any = None, **gossip: Any
) -> tuple[Engine, GossipExchange]:
    """An engine whose replicas gossip."""
    dataset = open_dataset("synthetic", None, options=DataOptions(rows=96, test_rows=8, shape=(6,), classes=3))
    engine = Engine(
        World(),
        Plan(
            Network(LAYERS, (6,)),
            topology,
            Options(
                loss=specs.CrossEntropy(),
                optimizer=optimizer or specs.Sgd(),
                batch_size=37,
                micro_batches=2,
                exchange=choices.Gossip(**gossip),
                dtype=dtype,
            ),
        ),
    )
    engine.open_data(dataset, Sampler(96, 1, 0.0, 37))
    assert isinstance(engine.exchange, GossipExchange)
    return engine, engine.exchange


def own(engine: Engine) -> np.ndarray:
    """What this rank owns, parameters only."""
    return np.concatenate([s.params[s.shard] for s in engine.state.buckets])


def scatter(engine: Engine, seed: int = 0, *, gaps: bool = True) -> np.ndarray:
    """Give every replica other parameters, and other numbers in the gaps between their blocks, which are zero in
    trainings; gives its peers' mean."""
    for bucket in engine.state.buckets:
        part = bucket.params[bucket.shard]
        generator = np.random.default_rng([seed, engine.world.rank])
        part[...] = generator.normal(size=part.size) + 0.1 * engine.place.replica
        if not gaps:
            bucket.clear_gaps(part)
    engine.state.gather_all()
    return of_peers(engine).mean(axis=0)


def of_peers(engine: Engine) -> np.ndarray:
    """(replica, element) of what its peers own."""
    return np.array(engine.wiring.peers.comm.allgather(own(engine)))


def spread(engine: Engine) -> float:
    """The largest distance from the mean."""
    values = of_peers(engine)
    return float(np.abs(values - values.mean(axis=0)).max())


def steps(engine: Engine, first: int, count: int, rate: float = 0.0) -> None:
    """Steps, or at rate 0 only what happens at their ends."""
    for n in range(first, first + count):
        if rate:
            engine.step(n, rate)
        else:
            engine.exchange.before_update(n + 1)
            engine.exchange.after_update(rate, n + 1)


several = pytest.mark.skipif(SIZE == 1, reason="one rank has nobody to exchange with")


@several
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("pairing", [kind for kind in possible(SIZE) if kind != "random"] if SIZE > 1 else [])
def test_the_average_is_kept_and_the_replicas_come_together(pairing: str, overlap: bool) -> None:
    engine, gossip = make(alone(), pairing=pairing, overlap=overlap, part=0.4, **PATIENT)
    mean, before = scatter(engine), spread(engine)
    steps(engine, 0, 60)
    engine.exchange.settle()
    np.testing.assert_allclose(of_peers(engine).mean(axis=0), mean, rtol=0, atol=1e-14)
    assert gossip.mixer.parts == 2
    assert spread(engine) < 0.2 * before
    assert gossip.rounds.counts.late == gossip.rounds.counts.skipped == 0
    engine.close()


@several
@pytest.mark.parametrize(
    "options",
    [{}, {"part": 0.4}, {"mix": choices.PushSumMix()}, {"compress": choices.Int8()}, {"overlap": False, "part": 0.4}],
    ids=str,
)
def test_exchanging_late_loses_no_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The average moves by the average of all updates, also of those done while messages travelled, and of what a
    replica did not compute with yet."""
    engine, gossip = make(alone(), **{"part": 1.0, **options}, **PATIENT)
    mean = scatter(engine)
    updates = np.zeros_like(mean)
    before = np.zeros_like(mean)
    withheld = 0.0
    before_update, after_update = gossip.before_update, gossip.after_update

    def values() -> np.ndarray:
        vector = gossip.mixer.vector
        vector.read(Span(0, vector.size), out := np.empty(vector.size))
        return out

    def before_first(step: int) -> None:
        nonlocal before
        before_update(step)
        before = values()

    def then_after(rate: float, step: int) -> None:
        nonlocal updates, withheld
        updates += values() - before
        after_update(rate, step)
        withheld = max(withheld, np.abs(values() - own(engine)).max())

    monkeypatch.setattr(gossip, "before_update", before_first)
    monkeypatch.setattr(gossip, "after_update", then_after)
    for n in range(20):
        engine.step(n, 0.1)
    assert withheld > 1e-4
    engine.exchange.settle()
    np.testing.assert_array_equal(values(), own(engine))
    total = np.array(engine.wiring.peers.comm.allgather(updates)).mean(axis=0)
    assert np.abs(total).max() > 1e-3
    np.testing.assert_allclose(of_peers(engine).mean(axis=0), mean + total, rtol=0, atol=1e-13)
    engine.close()


@several
def test_finite_is_the_exact_average_after_a_period() -> None:
    engine, gossip = make(alone(), pairing="finite", overlap=False, part=0.5, **PATIENT)
    mean = scatter(engine)
    assert gossip.pairing.period is not None
    steps(engine, 0, gossip.pairing.period * gossip.mixer.parts)
    np.testing.assert_allclose(own(engine), mean, rtol=0, atol=1e-14)
    engine.close()


@several
def test_parts_take_turns() -> None:
    """Every round moves another part, and after as many rounds as there are parts each was moved once."""
    engine, gossip = make(alone(), pairing="complete", overlap=False, part=0.25, **PATIENT)
    mean = scatter(engine)
    assert gossip.mixer.parts == 4
    done = np.zeros(mean.size, bool)
    for n in range(4):
        before = own(engine)
        steps(engine, n, 1)
        moved = own(engine) != before
        assert moved.any()
        assert not (moved & done).any()
        done |= moved
    np.testing.assert_allclose(own(engine), mean, rtol=0, atol=1e-14)
    engine.close()


@several
def test_every_and_probability() -> None:
    engine, gossip = make(alone(), pairing="complete", every=3, overlap=False, part=1.0, **PATIENT)
    scatter(engine)
    before = own(engine)
    steps(engine, 0, 2)
    np.testing.assert_array_equal(own(engine), before)
    steps(engine, 2, 1)
    assert (own(engine) != before).any()
    engine.close()
    engine, gossip = make(alone(), pairing="ring", probability=0.3, overlap=False, part=1.0, **PATIENT)
    mean = scatter(engine)
    steps(engine, 0, 100)
    np.testing.assert_allclose(of_peers(engine).mean(axis=0), mean, rtol=0, atol=1e-14)
    sent = sum(gossip.rounds.mail.sent) / (100 * len(gossip.pairing.sends(0, engine.place.replica)))
    assert 0.1 < sent < 0.55
    engine.close()


# -- merge formulas against numbers by hand: of two replicas the second has all values 1 higher -----------------------

HAND = [  # mix, divergence_threshold, (loss, clock) of replica 0 and of replica 1, f of replica 0
    (choices.ConstantMix(0.25), 0.0, (1.0, 5.0), (1.0, 5.0), 0.25),
    (choices.ConstantMix(), 0.0, (1.0, 5.0), (1.0, 5.0), 0.5),
    (choices.ClockMix(), 0.0, (1.0, 3.0), (1.0, 9.0), 0.75),
    (choices.LossMix(), 0.0, (3.0, 5.0), (1.0, 5.0), 0.75),
    (choices.LinearMix(0.6, 0.2, 10), 0.0, (1.0, 5.0), (1.0, 5.0), 0.4),
    (choices.LossDivergenceMix(4.0), 0.0, (2.0, 5.0), (1.0, 5.0), 0.8 * 0.5),
    (choices.LossMix(), 6.0, (3.0, 5.0), (1.0, 5.0), 0.75 * 0.5),
]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("mix", "threshold", "first", "second", "f"), HAND)
def test_merge_formulas(mix: Any, threshold: float, first: Any, second: Any, f: float, overlap: bool) -> None:
    engine, gossip = make(
        alone(), pairing="hypercube", mix=mix, divergence_threshold=threshold, overlap=overlap, part=1.0, **PATIENT
    )
    scatter(engine)
    for bucket in engine.state.buckets:
        bucket.params[...] = engine.place.replica
    loss, clock = (first, second)[engine.place.replica]
    gossip.mixer.loss, gossip.mixer.clock = loss, clock - 1  # a step adds one
    steps(engine, 0, 1)
    engine.exchange.settle()
    if engine.place.replica == 0:
        np.testing.assert_allclose(own(engine), f, rtol=1e-12)
        assert gossip.mixer.clock == pytest.approx(f * second[1] + (1 - f) * first[1])
    engine.close()


@pytest.mark.ranks(2)
def test_the_loss_of_the_step_before_is_what_counts() -> None:
    """Each replica's own, also where only its last stage knows it."""
    engine, gossip = make(alone(), pairing="hypercube", mix=choices.LossMix(), part=1.0, **PATIENT)
    scatter(engine)
    steps(engine, 0, 1, 0.01)
    told = engine.metrics.take()
    steps(engine, 1, 1, 0.01)
    assert gossip.mixer.loss == pytest.approx(told[0] / told[2])
    engine.close()


# -- push-sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(3, 4, 5, 8)
@pytest.mark.parametrize("pairing", ["random", "exponential", "ring"])
@pytest.mark.parametrize("overlap", [True, False])
def test_push_sum_is_unbiased_when_messages_are_dropped(
    pairing: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 % of the messages are not sent, those of replica 0 more often: what the values weigh stays what it was."""
    draws = np.random.default_rng([7, MPI.COMM_WORLD.rank])
    drop = 0.6 if MPI.COMM_WORLD.rank == 0 else 0.3
    original = Mail.can_send
    monkeypatch.setattr(Mail, "can_send", lambda mail, to: original(mail, to) and draws.random() >= drop)
    off = {}
    for mix in (choices.PushSumMix(), choices.ConstantMix()):
        engine, _ = make(alone(), pairing=pairing, mix=mix, overlap=overlap, part=0.5, deadline=0.5)
        mean, before = scatter(engine), spread(engine)
        for n in range(150):
            steps(engine, n, 1)
            engine.world.barrier()  # or one rank could be done before another begins
        engine.exchange.settle()
        assert np.abs(own(engine) - mean).max() < (0.2 if mix.kind == "push_sum" else 2) * before
        with engine.exchange.shown():
            off[mix.kind] = np.abs(own(engine) - mean).max()
        engine.close()
    worst = {kind: max(MPI.COMM_WORLD.allgather(value)) for kind, value in off.items()}
    assert worst["push_sum"] < 1e-12
    assert worst["constant"] > 1e-3


@several
def test_push_sum_keeps_the_weighted_mean_at_every_time() -> None:
    engine, _ = make(alone(), pairing="exponential", mix=choices.PushSumMix(), part=0.3, deadline=0.01)
    mean = scatter(engine)
    for n in range(30):
        if engine.place.replica == 0 and n % 7 == 3:
            time.sleep(0.02)  # late for everybody
        steps(engine, n, 1)
    with engine.exchange.shown():
        np.testing.assert_allclose(own(engine), mean, rtol=0, atol=1e-13)
    engine.close()


# -- compression -------------------------------------------------------------------------------------------------------


@several
@pytest.mark.parametrize(
    ("compress", "pairing"),
    [
        pytest.param(
            compress, pairing, id=f"{pairing}-{compress.kind}", marks=() if pairing == quick else pytest.mark.slow
        )
        for compress, quick in {
            choices.Float16(): "",
            choices.Int8(): "exponential",
            choices.Sign(): "",
            choices.TopK(0.1): "ring",
        }.items()
        for pairing in ("ring", "exponential", "finite")
    ],
)
def test_error_feedback_recovers_what_compression_loses(compress: Any, pairing: str) -> None:
    engine, gossip = make(alone(), pairing=pairing, compress=compress, part=0.5, overlap=False, **PATIENT)
    mean, before = scatter(engine, gaps=False), spread(engine)
    steps(engine, 0, 300)
    np.testing.assert_allclose(of_peers(engine).mean(axis=0), mean, rtol=0, atol=1e-12)
    assert spread(engine) < 0.1 * before
    sent = gossip.rounds.mail.bytes / sum(gossip.rounds.mail.sent)
    assert sent < 64 + 8 * own(engine).size * 0.4
    engine.close()


# -- all together ------------------------------------------------------------------------------------------------------


@several
def test_exact_every() -> None:
    slowly = choices.ConstantMix(0.1)
    engine, _ = make(alone(), pairing="ring", mix=slowly, exact_every=4, part=0.5, **PATIENT)
    mean = scatter(engine)
    steps(engine, 0, 3)
    assert spread(engine) > 1e-3
    steps(engine, 3, 1)
    np.testing.assert_allclose(own(engine), mean, rtol=0, atol=1e-14)
    engine.close()


@several
def test_slow_momentum() -> None:
    """u = beta u + (x0 - x) / rate; x = x0 - rate u, on averages (Wang et al. 2020)."""
    beta, rate = 0.6, 0.05
    engine, gossip = make(alone(), pairing="ring", exact_every=2, slow_momentum=beta, part=1.0, **PATIENT)
    x0, u = own(engine), 0.0
    original = gossip.mixer.average
    seen: list[np.ndarray] = []

    def average(*peers: Any) -> None:
        original(*peers)
        seen.append(own(engine))

    gossip.mixer.average = average  # type: ignore[method-assign]
    for n in range(0, 8, 2):
        steps(engine, n, 2, rate)
        u = beta * u + (x0 - seen[-1]) / rate
        x0 = x0 - rate * u
        np.testing.assert_allclose(own(engine), x0, rtol=0, atol=1e-12)
        assert (of_peers(engine) == own(engine)).all()
    engine.close()


@several
def test_the_optimizers_state_is_averaged_where_asked_for() -> None:
    for average, alike in ((("parameters",), False), (("parameters", "optimizer"), True)):
        engine, _ = make(
            alone(), optimizer=specs.Adam(), pairing="complete", average=average, overlap=False, part=1.0, **PATIENT
        )
        scatter(engine)
        steps(engine, 0, 3, 0.01)
        for bucket in engine.state.buckets:
            values = np.array(engine.wiring.peers.comm.allgather(bucket.optimizer["m"]))
            assert (np.abs(values - values[0]).max() < 1e-14) == alike
        engine.close()


@several
@pytest.mark.parametrize("mix", [choices.ConstantMix(), choices.PushSumMix()])
def test_an_element_and_what_the_optimizer_remembers_of_it_travel_together(mix: Any) -> None:
    engine, _ = make(
        alone(),
        optimizer=specs.Adam(),
        mix=mix,
        pairing="complete",
        average=("parameters", "optimizer"),
        overlap=False,
        part=0.5,
        **PATIENT,
    )
    scatter(engine)
    steps(engine, 0, 1, 0.01)  # a round over half of the elements
    alike = {}
    for name in ("params", "m", "v"):
        arrays = [s.params[s.shard] if name == "params" else s.optimizer[name] for s in engine.state.buckets]
        values = np.array(engine.wiring.peers.comm.allgather(np.concatenate(arrays)))
        alike[name] = np.ptp(values, axis=0) < 1e-14
    assert 0.4 < alike["params"].mean() < 0.6
    for name in ("m", "v"):
        assert alike[name][alike["params"]].all()
        assert not alike[name][~alike["params"]].all()
    engine.close()


@several
@pytest.mark.parametrize("overlap", [True, False])
def test_merges_leave_squares_positive(overlap: bool) -> None:
    """Taking everything of others, rounds late: differences of old values would make v negative."""
    engine, gossip = make(
        alone(),
        optimizer=specs.Adam(betas=(0.9, 0.5)),
        mix=choices.ConstantMix(1.0),
        average=("parameters", "optimizer"),
        every=3,
        overlap=overlap,
        part=0.5,
        **PATIENT,
    )
    scatter(engine)
    for n in range(30):
        engine.step(n, 0.01 if n % 7 else 0.3)
        assert all((bucket.optimizer["v"] >= 0).all() for bucket in engine.state.buckets)
    assert gossip.rounds.counts.merged > 0
    engine.close()


@several
def test_batch_norm_statistics_are_averaged() -> None:
    engine, _ = make(alone(), pairing="complete", overlap=False, part=1.0, **PATIENT)
    steps(engine, 0, 2, 0.01)
    with engine.exchange.shown():
        for flat in engine.state.statistics:
            values = np.array(engine.wiring.peers.comm.allgather(flat.params))
            assert np.abs(values).max() > 0
            assert np.abs(values - values[0]).max() < 1e-14
    engine.close()


# -- teams, time -------------------------------------------------------------------------------------------------------


@pytest.mark.ranks(4, 8)
@pytest.mark.parametrize("stages", [(Stage(0, 3, 2, 1),), (Stage(0, 1, 1, 1), Stage(1, 3, 1, 1)), (Stage(0, 3, 1, 2),)])
def test_rows_stay_bitwise_alike_whatever_arrives_when(stages: tuple[Stage, ...]) -> None:
    """Ranks are late at random; deadlines pass; what arrives differs from rank to rank."""
    engine, _ = make(Topology(SIZE // 2, stages), dtype="float32", part=0.5, deadline=0.05)
    generator = np.random.default_rng(engine.world.rank)
    scatter(engine)
    for n in range(25):
        time.sleep(float(generator.random()) * 0.002)
        steps(engine, n, 1, 0.05)
        for flat in engine.state.flats:
            held = np.array(flat.group.comm.allgather(flat.params.tobytes()))
            assert (held == held[0]).all()
    engine.close()


@several
def test_a_late_partner_is_not_waited_for() -> None:
    """Replica 0 sleeps; the others go on, what they sent it waits, what it sent is merged late."""
    engine, gossip = make(alone(), pairing="ring", part=1.0, deadline=1.0)
    mean, before = scatter(engine), spread(engine)
    slowest = 0.0
    for n in range(60):
        if engine.place.replica == 0 and n == 30:
            time.sleep(0.6)
        began = time.perf_counter()
        steps(engine, n, 1)
        if n >= 5 and engine.place.replica != 0:
            slowest = max(slowest, time.perf_counter() - began)
    engine.exchange.settle()
    assert slowest < 0.4
    skipped = engine.world.comm.allgather(gossip.rounds.counts.skipped)
    late = engine.world.comm.allgather(gossip.rounds.counts.late)
    assert sum(skipped) > 0
    assert sum(late) > 0
    assert np.abs(own(engine) - mean).max() < before  # the mean is not exact any more, but nobody went astray
    engine.close()


@pytest.mark.ranks(2, 3)
def test_who_is_ahead_is_not_waited_for() -> None:
    """A replica that has fallen behind merges what it finds and catches up."""
    engine, gossip = make(alone(), pairing="ring", part=1.0, deadline=60000.0)
    rounds = gossip.rounds
    behind = engine.world.rank == 1
    scatter(engine)
    if not behind:
        rounds.open(7)
        while not all(rounds.mail.can_send(to) for to in range(SIZE)):
            time.sleep(0.001)  # until those messages are taken
    else:
        while len(rounds.mail.received) - rounds.mail.received.count(0) < SIZE - 1:
            rounds.mail.progress()
        began = time.perf_counter()
        for number in range(2, 6):
            rounds.open(number)
            rounds.close(wait=True)
            assert not rounds.is_open
        assert time.perf_counter() - began < 30
        assert (rounds.counts.merged, rounds.counts.skipped) == (SIZE - 1, 0)
    engine.exchange.settle()
    engine.close()


@several
def test_the_part_is_chosen_by_measurement() -> None:
    engine, gossip = make(alone(), part="auto", **PATIENT)
    scatter(engine)
    steps(engine, 0, 12, 0.01)
    assert len(set(engine.world.comm.allgather(gossip.mixer.parts))) == 1
    assert gossip.rounds.counts.rounds == 12
    engine.close()
