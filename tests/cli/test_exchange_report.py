"""What a dry run says of exchanges and of pipelines without flush: who sends how much to whom, and what follows."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from nettorrent_mpi.cli.exchange_report import exchange_block, stream_block
from nettorrent_mpi.cli.tables import WIDTH
from nettorrent_mpi.config import reading as config
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.pairing import possible
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

FACTS = [LayerFacts(f"linear{i + 1}", 1e6, parameters, 10, 8, 8) for i, parameters in enumerate([4000, 10_000, 999])]


def setup(topology: Topology, *changes: str, micro_batches: int = 4) -> Any:
    found = config.load(None, ["train.batch_size=128", *changes])
    itemsize = {"float64": 8, "float32": 4, "bfloat16": 2}[found.dtype]
    return SimpleNamespace(
        config=found,
        sampler=SimpleNamespace(validation_rows=range(143)),
        network=SimpleNamespace(facts=FACTS),
        topology=topology,
        options=SimpleNamespace(
            micro_batches=micro_batches, itemsize=itemsize, wide=max(itemsize, 4), device=found.device
        ),
    )


def replicas(count: int) -> Topology:
    """Of 3 stages; the second, with most parameters, has 5 cols (2 units each) x 2 rows."""
    return Topology(count, (Stage(0, 1, 1, 1), Stage(1, 2, 2, 5), Stage(2, 3, 1, 1)))


def told(count: int, *changes: str) -> str:
    text = exchange_block(setup(replicas(count), *changes))
    assert text is not None
    assert text.startswith("EXCHANGE\n")
    assert max(map(len, text.splitlines())) <= WIDTH
    return " ".join(text.split())


def test_one_replica_with_the_exact_exchange_needs_no_block() -> None:
    assert exchange_block(setup(replicas(1))) is None
    assert "1 replica: nothing is sent" in told(1, "exchange=none")


def test_allreduce_none_and_rows() -> None:
    text = told(4)
    assert "allreduce gradients are reduced over the 4 replicas, which stay equal" in text
    assert "sends a rank sends at most 24 kB a step" in text  # stage 0: 4000 parameters x 4 bytes x 2 x 3/4
    assert "at most 18 kB a step" in told(4, "dtype=bfloat16")  # gradients of float32 and weights of bfloat16
    assert "at most 12 kB a step" in told(4, "dtype=bfloat16", "device=gpu")
    assert "all replicas train on all of the training rows" in text
    text = told(4, "exchange=none", "data.partition=disjoint")
    assert "the 4 replicas train apart: nothing is sent" in text
    assert "each replica trains on its own part of the training rows" in text


def test_elite_tells_how_often_on_what_and_how_much() -> None:
    text = told(4, "data.validation=0.1", "exchange=elite")
    assert "4 replicas are compared by validation loss: all take the best one's weights" in text
    assert "every 1,000 rows of all replicas together, about every 8 steps; on 143 validation rows" in text
    assert "at most 48 kB at a comparison: parameters and optimizer states" in text
    text = told(4, "data.validation=0.1", "exchange={elite: {every_samples: 5, mode: tournament}}", "dtype=float64")
    assert "the worse of each pair takes the better one's (tournament)" in text
    assert "together, every step" in text
    assert "at most 96 kB" in text


@pytest.mark.parametrize("pairing", get_args(choices.PairingKind))
def test_every_pairing_is_told(pairing: str) -> None:
    for count in (2, 6, 8):
        if pairing in possible(count):
            text = told(count, f"exchange.gossip.pairing={pairing}")
            assert f"gossip {pairing} over {count} replicas" in text
            assert re.search(
                r"spectral gap [\d.e-]+; [\d,]+ rounds? of each part until the replicas' distance is 0.001", text
            )


def test_agreement_of_known_pairings() -> None:
    text = told(8, "exchange=gossip")
    assert "exponential over 8 replicas, repeats after 3 rounds; preserves the average" in text
    assert "spectral gap 1; 3 rounds of each part until" in text
    text = told(6, "exchange={gossip: {pairing: ring, every: 10, part: 1}}")
    assert "spectral gap 0.333" in text  # the second largest eigenvalue of (1 1 1 0 0 0)/3, circulant: (1 + 2 cos 60)/3
    rounds, steps = re.search(r"; (\d+) rounds \((\d+) steps\) until", text).groups()  # type: ignore[union-attr]
    assert int(steps) == 10 * int(rounds)
    assert "round every 10 steps" in text
    text = told(8, "exchange={gossip: {part: 0.25, every: 2}}")
    assert "3 rounds of each of 4 parts (24 steps) until" in text
    assert "3 rounds of each part until" in told(8, "exchange={gossip: {every: 2}}")
    assert "3 rounds until" in told(8, "exchange={gossip: {part: 1}}")
    assert "shuffle over 6 replicas, drawn anew each round" in told(6, "exchange.gossip.pairing=shuffle")


@pytest.mark.parametrize(
    ("options", "average"),
    [
        ("{}", "; preserves the average"),
        (
            "{mix: push_sum, pairing: random}",
            "preserves the average: every message carries a part of its sender's mass",
        ),
        ("{pairing: random}", "does not preserve the average: a replica may receive several messages or none"),
        ("{pairing: exponential, probability: 0.5}", "does not preserve the average: a replica sends"),
        ("{pairing: ring, probability: 0.5}", "; preserves the average"),
        ("{mix: clock}", "may not preserve the average"),
        ("{mix: {constant: 0.5}}", "may not preserve the average"),
        ("{divergence_threshold: 0.1}", "may not preserve the average"),
    ],
)
def test_does_the_average_stay(options: str, average: str) -> None:
    assert average in told(6, f"exchange.gossip={options}")


@pytest.mark.parametrize(
    ("changes", "sends"),
    [
        # stage 0 has most: 4000 parameters on one rank; stage 1: 10,000 over 5 cols x 2 rows
        (["{}"], "1 message of 16 kB a round: 4,000 elements of its parameters, or as many as travel"),
        (["{part: 1}"], "1 message of 16 kB a round: 4,000 elements of its parameters rows"),
        (["{part: 0.3, pairing: ring}"], "2 messages of 5.34 kB a round: 1,334 elements of its parameters, one of 3"),
        (["{part: 0.7}"], "1 message of 16 kB a round: 4,000 elements of its parameters rows"),
        (["{pairing: complete}"], "5 messages of 16 kB a round"),
        (["{}", "dtype=float64"], "1 message of 32 kB a round"),
        (["{average: [parameters, optimizer]}"], "1 message of 48 kB a round: 12,000 elements"),  # Adam has two states
        (["{average: [parameters, optimizer]}", "train.optimizer=sgd"], "1 message of 16 kB a round"),
    ],
)
def test_what_a_rank_sends(changes: list[str], sends: str) -> None:
    text = told(6, f"exchange.gossip={changes[0]}", *changes[1:])
    assert f"a rank sends at most {sends}" in text
    if "optimizer" in changes[0]:
        assert "of its parameters and optimizer states" in text


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [kind for kind in choices.COMPRESSIONS if kind != "none"])
def test_compressed_messages_are_as_long_as_the_codec_makes_them(kind: str, dtype: str) -> None:
    length = MessageFormat(choices.TopK(0.1) if kind == "topk" else choices.COMPRESSIONS[kind]()).bytes(4000)
    text = told(6, f"exchange.gossip.compress={f'{{{kind}: 0.1}}' if kind == 'topk' else kind}", f"dtype={dtype}")
    value, unit, times = re.search(r"1 message of ([\d.]+) (kB|bytes) .* makes it ([\d.]+) times", text).groups()  # type: ignore[union-attr]
    assert float(value) * {"kB": 1000, "bytes": 1}[unit] == pytest.approx(length, rel=0.01)
    assert float(times) == pytest.approx(4000 * np.dtype(dtype).itemsize / length, abs=0.06)
    assert f"{kind} makes it" in text


def test_the_largest_shard_counts_not_the_largest_stage() -> None:
    wide = Topology(2, (Stage(0, 1, 4, 1), Stage(1, 2, 1, 3), Stage(2, 3, 1, 1)))
    text = exchange_block(setup(wide, "exchange=gossip"))
    assert text is not None
    assert " 4,000 elements" in text  # 4 of stage 1's 10 units on its first col; stage 0 has 1000 a row


def test_rounds_exact_averages_and_mixes() -> None:
    text = told(4, "exchange=gossip")
    assert "mix the pairing's own weights" in text
    assert "round every step; messages travel while the next step computes; up to 50% of a replica's own step" in text
    assert "is withheld until peers know it; deadline auto" in text
    assert "withheld" not in told(4, "exchange={gossip: {withhold: 0}}")
    assert "computes; 20% of a replica's own step" in told(4, "exchange={gossip: {withhold: 0.2}}")
    assert "averaged exactly" not in text
    text = told(
        4,
        "exchange={gossip: {mix: {linear: {start: 0.7}}, overlap: false, deadline: 2.5, probability: 0.25, part: 0.5, "
        "exact_every: 5, slow_momentum: 0.3, consensus: {max: 0.1}}}",
    )
    assert "mix linear, start 0.7, end 0.1, target 1000" in text
    assert "with the pairing's own weights; with this probability more" in text
    assert "each pair with probability 0.25; each step waits for its messages; deadline 2.5 ms" in text
    assert (
        "exactly every 5 rounds, with slow momentum 0.3; and whenever the replicas' relative distance is above 0.1"
        in text
    )
    assert "with compression more" in told(4, "exchange.gossip.compress=sign")


# ---- pipelines without flush ----------------------------------------------------------------------------------------


def test_staleness_and_versions_of_every_stage() -> None:
    assert stream_block(setup(replicas(1))) is None
    text = stream_block(setup(replicas(1), "pipeline=async"))
    assert text is not None
    _, header, *rows, bubble = text.splitlines()
    assert re.split(r"  +", header) == ["stage", "parameters", "at most", "on average", "versions of the weights"]
    assert [row.split() for row in rows] == [
        ["0", "4,000", "1", "0.50", "2"],  # 2 micro-batches ahead, of 4
        ["1", "10,000", "1", "0.25", "2"],
        ["2", "999", "0", "0.00", "1"],
    ]
    assert bubble.startswith("once the pipeline is full, 0 % of the time is a bubble")
    one = stream_block(setup(replicas(1), "pipeline={async: true}", micro_batches=1))
    assert one is not None
    assert [row.split()[2:] for row in one.splitlines()[2:5]] == [
        ["2", "2.00", "3"],
        ["1", "1.00", "2"],
        ["0", "0.00", "1"],
    ]
    assert one.endswith("the learning rate of a stage is divided by 1 + its staleness on average")


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (2, 7), (60, 1), (60, 16)])
def test_any_number_of_stages_fits(stages: int, micro_batches: int) -> None:
    topology = Topology(1, tuple(Stage(s, s + 1, 1, 1) for s in range(stages)))
    made = setup(topology, "pipeline=async", micro_batches=micro_batches)
    made.network.facts = FACTS[:1] * stages
    text = stream_block(made)
    assert text is not None
    assert max(map(len, text.splitlines())) <= WIDTH
    assert len(text.splitlines()) <= 44
    assert "0 % of the time is a bubble" in text
