"""Who exchanges with whom, against matrices computed by NumPy from the messages alone."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nettorrent_mpi.plan import mixing
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.mixing import rounds_to_consensus, spectral_gap
from nettorrent_mpi.plan.pairing import KINDS, Edge, Pairing, draw_target, make_pairing, possible

DRAWN = ("shuffle", "random")
PERIODIC = tuple(kind for kind in KINDS if kind not in DRAWN)


@st.composite
def pairings(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, most: int = 40) -> Pairing:
    # hypercube wants powers of two: let them come often
    replicas = draw(st.one_of(st.integers(1, most), st.sampled_from([1, 2, 4, 8, 16, 32])))
    kind = draw(st.sampled_from([kind for kind in kinds if kind in possible(replicas)]))
    return make_pairing(kind, replicas, draw(st.integers(0, 1000)))


def weights(pairing: Pairing, number: int) -> NDArray[np.float64]:
    """[target, source]: what a target takes of each, and of itself."""
    taken = np.zeros((pairing.replicas, pairing.replicas))
    for source, target, weight in pairing.edges(number):
        taken[target, source] = weight
    return taken + np.diag(1 - taken.sum(axis=1))


def whole_period(pairing: Pairing) -> NDArray[np.float64]:
    result = np.eye(pairing.replicas)
    for number in range(pairing.period or 0):
        result = weights(pairing, number) @ result
    return result


def matrix(pairing: Pairing, number: int) -> list[list[float]]:
    """W of round `number`, replicas x replicas."""
    everybody = range(pairing.replicas)
    whole = [[float(i == j) for j in everybody] for i in everybody]
    for source, target, weight in pairing.edges(number):
        whole[target][source] += weight
        whole[source][source] -= weight
    return whole


def mean_matrix(replicas: int) -> NDArray[np.float64]:
    return np.full((replicas, replicas), 1 / replicas)


# -- messages ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(pairings(), st.integers(0, 50))
def test_sends_and_receives_are_the_edges(pairing: Pairing, number: int) -> None:
    edges = pairing.edges(number)
    everybody = range(pairing.replicas)
    assert list(edges) == sorted(edges)
    assert len({(e.source, e.target) for e in edges}) == len(edges)
    assert all(e.source != e.target and 0 < e.weight < 1 for e in edges)
    assert set(edges) == {Edge(i, to, w) for i in everybody for to, w in pairing.sends(number, i)}
    assert set(edges) == {Edge(of, i, w) for i in everybody for of, w in pairing.receives(number, i)}
    assert all(len(pairing.sends(number, i)) == sum(e.source == i for e in edges) for i in everybody)
    assert all(len(pairing.receives(number, i)) == sum(e.target == i for e in edges) for i in everybody)


@settings(max_examples=200, deadline=None)
@given(pairings(), st.integers(0, 50))
def test_rounds_are_doubly_stochastic_and_symmetric_where_they_claim_it(pairing: Pairing, number: int) -> None:
    W = weights(pairing, number)
    if pairing.doubly_stochastic:
        assert W.min() >= 0
        np.testing.assert_allclose(W.sum(axis=0), 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(W.sum(axis=1), 1, rtol=0, atol=1e-12)
    if pairing.symmetric:
        np.testing.assert_array_equal(W - np.diag(np.diag(W)), (W - np.diag(np.diag(W))).T)


@pytest.mark.parametrize("replicas", [3, 4, 8, 12])
def test_which_kinds_claim_what(replicas: int) -> None:
    made = [make_pairing(kind, replicas, 0) for kind in possible(replicas)]
    assert {p.kind for p in made if not p.doubly_stochastic} == {"random"}
    assert {p.kind for p in made if not p.symmetric} == {"exponential", "random"}
    assert {p.kind for p in made if p.period is None} == set(DRAWN)
    for p in made:  # what is not claimed is not so, either
        assert p.symmetric or any((a, b, w) not in p.edges(0) for b, a, w in p.edges(0)), p.kind


@settings(max_examples=100, deadline=None)
@given(pairings(PERIODIC), st.integers(0, 20))
def test_periodic_pairings_repeat(pairing: Pairing, number: int) -> None:
    assert pairing.period is not None
    assert pairing.edges(number) is pairing.edges(number + pairing.period), "remembered"


@pytest.mark.parametrize("kind", KINDS)
def test_one_replica_has_nobody(kind: str) -> None:
    alone = make_pairing(kind, 1, 0)
    for number in range(3):
        assert alone.edges(number) == ()
        assert alone.sends(number, 0) == alone.receives(number, 0) == []
    assert spectral_gap(alone) == 1
    assert rounds_to_consensus(alone) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grid"])
def test_two_replicas_average(kind: str) -> None:
    two = make_pairing(kind, 2, 0)
    assert two.edges(0) == two.edges(5) == (Edge(0, 1, 0.5), Edge(1, 0, 0.5))
    assert two.symmetric
    assert two.doubly_stochastic


def test_drawn_rounds_are_not_kept_for_ever() -> None:
    shuffle = make_pairing("shuffle", 5, 0)
    first = [shuffle.edges(number) for number in range(100)]
    assert len(shuffle._edges) < 20
    assert [shuffle.edges(number) for number in range(100)] == first


# -- the kinds one by one ----------------------------------------------------------------------------------------------


def test_a_ring_by_hand() -> None:
    ring = make_pairing("ring", 5, 0)
    assert sorted(ring.receives(7, 0)) == [(1, 1 / 3), (4, 1 / 3)]
    assert sorted(ring.sends(7, 3)) == [(2, 1 / 3), (4, 1 / 3)]


def test_exponential_by_hand() -> None:
    exponential = make_pairing("exponential", 6, 0)
    assert exponential.period == 3
    assert [exponential.sends(number, 5) for number in range(4)] == [[(to, 0.5)] for to in (0, 1, 3, 0)]
    assert [exponential.receives(number, 0) for number in range(3)] == [[(of, 0.5)] for of in (5, 4, 2)]


@pytest.mark.parametrize("kind", ["exponential", "hypercube"])
@pytest.mark.parametrize("bits", range(1, 7))
def test_powers_of_two_average_exactly(kind: str, bits: int) -> None:
    pairing = make_pairing(kind, 2**bits, 0)
    assert pairing.period == bits
    np.testing.assert_allclose(whole_period(pairing), mean_matrix(2**bits), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("replicas", "neighbours"),
    [
        (4, {1, 2}),  # 2 x 2
        (6, {1, 2, 3}),  # 2 x 3
        (12, {1, 3, 4, 8}),  # 3 x 4
        (10, {1, 4, 5}),  # 2 x 5
    ],
)
def test_grids_by_hand(replicas: int, neighbours: set[int]) -> None:
    shares = make_pairing("grid", replicas, 0).sends(0, 0)
    assert {to for to, _ in shares} == neighbours
    assert {weight for _, weight in shares} == {1 / (len(neighbours) + 1)}


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**63), st.integers(0, 10**6))
def test_a_shuffle_is_a_matching(replicas: int, seed: int, number: int) -> None:
    edges = make_pairing("shuffle", replicas, seed).edges(number)
    assert len(edges) == replicas - replicas % 2
    assert len({e.source for e in edges}) == len(edges)
    assert {(e.target, e.source) for e in edges} == {(e.source, e.target) for e in edges}
    assert edges == make_pairing("shuffle", replicas, seed).edges(number)


def test_shuffles_differ_between_rounds_and_seeds_and_leave_nobody_out() -> None:
    shuffle = make_pairing("shuffle", 9, 4)
    rounds = [shuffle.edges(number) for number in range(30)]
    assert len(set(rounds)) > 25
    assert rounds != [make_pairing("shuffle", 9, 5).edges(number) for number in range(30)]
    assert {i for i in range(9) if any(not shuffle.sends(number, i) for number in range(100))} == set(range(9))


@pytest.mark.parametrize("replicas", range(1, 65))
def test_finite_is_the_exact_average_after_its_period(replicas: int) -> None:
    finite = make_pairing("finite", replicas, 0)
    np.testing.assert_allclose(whole_period(finite), mean_matrix(replicas), rtol=0, atol=1e-12)
    for number in range(finite.period or 0):
        assert all(len(finite.sends(number, replica)) <= 1 for replica in range(replicas))
    odd = replicas // (replicas & -replicas)
    rounds = int(math.log2(replicas // odd)) + (2 * int(math.log2(odd)) + 1 if odd > 1 else 0)
    assert finite.period == max(1, rounds)
    assert rounds <= 2 * math.log2(replicas) + 2, "the paper's theorem 1"
    assert rounds == (rounds_to_consensus(finite) or 0)


def test_finite_of_three_by_hand() -> None:
    finite = make_pairing("finite", 3, 0)
    pairs = [{(e.source, e.target): e.weight for e in finite.edges(t) if e.source < e.target} for t in range(3)]
    assert pairs == [{(0, 1): 1 / 2}, {(0, 2): 2 / 3}, {(0, 1): 1 / 2}]


def test_finite_of_a_thousand() -> None:
    finite = make_pairing("finite", 1000, 0)
    values = [float(i) for i in range(1000)]
    for number in range(finite.period or 0):
        values = mixing.mixed(finite, number, values)
    assert values == pytest.approx([499.5] * 1000, rel=1e-12)


# -- random targets ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 10**6), st.integers(2, 50), st.data())
def test_nobody_draws_itself_and_equal_scores_are_no_scores(
    seed: int, number: int, replicas: int, data: st.DataObject
) -> None:
    replica = data.draw(st.integers(0, replicas - 1))
    target = draw_target(seed, number, replica, replicas)
    assert target != replica
    assert 0 <= target < replicas
    scores = [700.0] * replicas
    scores[replica] = 10  # its own is not looked at
    assert draw_target(seed, number, replica, replicas, scores) == target
    lower = data.draw(st.lists(st.floats(10, 1000), min_size=replicas, max_size=replicas))
    lower[target] = 1000
    assert draw_target(seed, number, replica, replicas, lower) == target, "the favourite's chance did not fall"
    assert draw_target(seed, number, replica, replicas, [10, *[1000] * (replicas - 1)][::-1]) != replica


def test_the_rounds_of_random_are_what_each_draws() -> None:
    pairing = make_pairing("random", 7, 11)
    for number in range(5):
        assert pairing.edges(number) == tuple(Edge(i, draw_target(11, number, i, 7), 0.5) for i in range(7))


def test_all_peers_are_drawn_equally_often() -> None:
    drawn = Counter(draw_target(1, number, 2, 6) for number in range(5000))
    assert set(drawn) == {0, 1, 3, 4, 5}
    assert all(abs(count - 1000) < 5 * math.sqrt(1000 * 0.8) for count in drawn.values())


def test_scores_steer_the_draw() -> None:
    scores = [1000, 10, 500, 1000, 1000]
    drawn = Counter(draw_target(1, number, 0, 5, scores) for number in range(4000))
    assert drawn[1] < 4  # its sum is 1010 at most, the others' 1010 at least
    # against the same choice simulated plainly
    generator = np.random.default_rng(0)
    plain = Counter((np.array(scores[1:]) + generator.uniform(10, 1000, (40000, 4))).argmax(axis=1) + 1)
    for peer in (2, 3, 4):
        assert drawn[peer] / 4000 == pytest.approx(plain[peer] / 40000, abs=0.04)


def test_push_sum_over_random_finds_the_mean_and_merging_without_mass_does_not() -> None:
    values = [float(i * i) for i in range(12)]
    mean = sum(values) / 12
    errors = []
    for seed in range(8):
        pairing = make_pairing("random", 12, seed)
        sums, mass, merged = values, [1.0] * 12, list(values)
        for number in range(80):
            sums, mass = mixing.mixed(pairing, number, sums), mixing.mixed(pairing, number, mass)
            arrived = [(target, weight, merged[source]) for source, target, weight in pairing.edges(number)]
            for target, weight, value in arrived:
                merged[target] += weight * (value - merged[target])
        assert [s / m for s, m in zip(sums, mass, strict=True)] == pytest.approx([mean] * 12, rel=1e-6)
        assert np.ptp(merged) < 1e-3, "they agree"
        errors.append(abs(merged[0] - mean))
    assert np.mean(errors) > 2, "on something else"


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "replicas"), [("hypercube", 6), ("hypercube", 63), ("grid", 2), ("grid", 3), ("grid", 7), ("grid", 997)]
)
def test_what_cannot_be_is_told_with_what_can(kind: str, replicas: int) -> None:
    with pytest.raises(ConfigError) as told:
        make_pairing(kind, replicas, 0)
    assert told.value.key == "exchange.gossip.pairing"
    can = str(told.value).partition("can have ")[2].split(", ")
    assert can == possible(replicas)
    assert kind not in can
    assert str(replicas) in str(told.value)
    for other in can:
        make_pairing(other, replicas, 0)


def test_unknown_kinds_are_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"exchange\.gossip\.pairing: unknown pairing 'rnig'; there are ring, expo"):
        make_pairing("rnig", 4, 0)


def test_what_is_possible() -> None:
    assert possible(1) == list(KINDS)
    assert possible(16) == list(KINDS)
    assert set(KINDS) - set(possible(12)) == {"hypercube"}
    assert set(KINDS) - set(possible(2)) == {"grid"}
    assert set(KINDS) - set(possible(13)) == {"hypercube", "grid"}


# -- mixing ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(pairings(most=12), st.integers(0, 20))
def test_matrix_and_mixed_are_the_same_round(pairing: Pairing, number: int) -> None:
    W = np.array(matrix(pairing, number))
    values = np.arange(pairing.replicas) ** 2.0
    np.testing.assert_allclose(W.sum(axis=0), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(mixing.mixed(pairing, number, list(values)), W @ values, rtol=0, atol=1e-9)
    if pairing.doubly_stochastic:
        np.testing.assert_allclose(W, weights(pairing, number), rtol=0, atol=1e-12)


@pytest.mark.parametrize("replicas", [2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 35, 64])
def test_the_spectral_gap_of_periodic_pairings_against_the_svd(replicas: int) -> None:
    for kind in possible(replicas):
        pairing = make_pairing(kind, replicas, 0)
        if pairing.period is None:
            continue
        s = float(np.linalg.svd(whole_period(pairing) - mean_matrix(replicas), compute_uv=False)[0])
        gap = spectral_gap(pairing)
        if s < 1e-12:
            assert gap == 1, (kind, "the exact average")
        else:
            assert gap == pytest.approx(1 - s ** (1 / pairing.period), abs=1e-9), kind


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("replicas", [3, 4, 7, 10])
def test_the_spectral_gap_of_drawn_pairings_against_many_rounds(kind: str, replicas: int) -> None:
    pairing = make_pairing(kind, replicas, 5)
    rounds = 3000
    squared = np.zeros((replicas, replicas))
    for number in range(rounds):
        W = np.array(matrix(pairing, number))
        squared += W.T @ W / rounds
    center = np.eye(replicas) - mean_matrix(replicas)
    kept = np.linalg.eigvalsh(center @ squared @ center)[1:]  # the first is the mean's, 0
    assert kept == pytest.approx([(1 - spectral_gap(pairing)) ** 2] * (replicas - 1), abs=0.04)


@pytest.mark.parametrize("replicas", [5, 6, 9, 16, 25, 48])
@pytest.mark.parametrize("to", [1e-2, 1e-3, 1e-6])
def test_rounds_to_consensus_against_the_expected_distance(replicas: int, to: float) -> None:
    """Starting anywhere, the root mean square of the distance that is left is the matrices' Frobenius norm."""
    for kind in possible(replicas):
        pairing = make_pairing(kind, replicas, 1)
        if pairing.period is None or spectral_gap(pairing) == 1:
            continue
        rounds = rounds_to_consensus(pairing, to)
        assert rounds is not None
        distances, left = [], np.eye(replicas) - mean_matrix(replicas)
        for number in range(rounds):
            left = weights(pairing, number) @ left
            distances.append(np.linalg.norm(left) / math.sqrt(replicas - 1))
        assert distances[-1] < 2 * to, kind
        assert distances[-2] > to / 4, kind


def test_rounds_to_consensus_of_what_is_exact_or_never_done() -> None:
    for kind in ("exponential", "hypercube", "finite"):
        assert rounds_to_consensus(make_pairing(kind, 64, 0)) == 6
    assert rounds_to_consensus(make_pairing("complete", 1000, 0)) == 1
    assert rounds_to_consensus(make_pairing("ring", 1000, 0)) is None
    assert rounds_to_consensus(make_pairing("ring", 1000, 0), to=0.5) is not None


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_pairings_agree_as_fast_as_their_gap_says(kind: str) -> None:
    pairing = make_pairing(kind, 200, 0)
    expected = math.log(1e-3) / math.log(1 - spectral_gap(pairing))
    assert rounds_to_consensus(pairing) == pytest.approx(expected, rel=0.35)
