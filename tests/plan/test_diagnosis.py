"""The likely culprit is found, and the table tells what every rank does."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.plan.actions import parse
from nettorrent_mpi.plan.diagnosis import MOST_LINES, SignOfLife, culprits, explained, in_words, standstill, table


def test_actions_are_written_as_people_do() -> None:
    texts = [in_words(parse(text)) for text in ("2RG3", "0F1", "1SA0", "2R", "1G")]
    assert texts == ["2RECV_B3", "0F1", "1SEND_F0", "2REDUCE_GRADIENTS", "1GATHER_PARAMETERS"]


def test_who_computes_is_the_culprit_of_those_that_wait() -> None:
    signs = [
        SignOfLife(0, 61, place="5 0RG0", waits=[1]),
        SignOfLife(1, 61, place="5 1F0"),
        SignOfLife(2, 61, place="5 2RA0", waits=[1]),
        SignOfLife(3, 0, place="9 0F0"),
    ]
    assert culprits(signs) == [1]


def test_who_is_silent_is_the_culprit() -> None:
    signs = [SignOfLife(0, 61, place="5 0RG0", waits=[1]), SignOfLife(1, 61, silent=63, state="T"), SignOfLife(2, 61)]
    assert culprits(signs) == [1]
    assert explained(signs[1]) == "is stopped (SIGSTOP), and has been silent for 63 s"


def test_ranks_in_the_same_collective_wait_for_the_one_that_is_not_in_it() -> None:
    signs = [SignOfLife(i, 61, place="5 0R", waits=[j for j in range(4) if j != i]) for i in range(3)]
    signs.append(SignOfLife(3, 61, place="5 0B1", waits=None))
    assert culprits(signs) == [3]


def test_who_waits_for_what_advances_does_not_stand_still() -> None:
    signs = [
        SignOfLife(0, 90, place="a", waits=[1]),
        SignOfLife(1, 70, place="b", waits=[2, 3]),
        SignOfLife(2, 5, place="c"),
        SignOfLife(3, 80, place="b", waits=[1, 2]),
        SignOfLife(4, 60, place="d"),
    ]
    assert standstill(signs) == {0: 5, 1: 5, 2: 5, 3: 5, 4: 60}
    signs[2].silent = 65
    assert standstill(signs) == {0: 65, 1: 65, 2: 65, 3: 65, 4: 60}
    ring = [SignOfLife(0, 61, place="a", waits=[1]), SignOfLife(1, 62, place="b", waits=[0])]
    assert min(standstill(ring).values()) == 61


def test_a_ring_has_no_culprit() -> None:
    assert culprits([SignOfLife(0, 61, place="a", waits=[1]), SignOfLife(1, 61, place="b", waits=[0])]) == []


@given(st.integers(2, 9), st.data())
def test_the_end_of_a_chain_is_the_culprit(ranks: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(ranks)))
    signs = [SignOfLife(0)] * ranks
    for at, rank in enumerate(order):
        ahead = st.sampled_from(order[at + 1 :]) if at + 1 < ranks else None
        waits = None if ahead is None else sorted(data.draw(st.sets(ahead, min_size=1, max_size=3)))
        signs[rank] = SignOfLife(rank, 60 + at, place=str(at), waits=waits)
    assert culprits(signs) == [order[-1]]


def test_the_table() -> None:
    signs = [
        SignOfLife(0, 61, 1.0, "", "2RECV_B3 of step 17", [5]),
        SignOfLife(1, 3, 1.0, "", "evaluation", [], "", silent=60),
        SignOfLife(2, 61, 1.0, "", "0F1 of step 17", None, "layer conv2, conv.py:12 forward"),
        SignOfLife(3, 61, 1.0, "", "1REDUCE_GRADIENTS of step 17", [0, 1, 2, 7]),
    ]
    found = [re.split(r"  +", line) for line in table(signs, ["n1", "n1", "n2", "n2"], ["a", "b", "c", "d"], [2], 70)]
    clock = found[1][4].split(" ")[0]
    assert found == [
        ["rank", "host", "swarm", "action", "since"],
        ["0", "n1", "a", "2RECV_B3 of step 17 from rank 5", f"{clock} (61 s)"],
        ["1", "n1", "b", "silent; last: evaluation, waiting", f"{clock} (63 s)"],
        ["2", "n2", "c", "0F1 of step 17, layer conv2, conv.py:12 forward", f"{clock} (61 s)", "<- likely culprit"],
        ["3", "n2", "d", "1REDUCE_GRADIENTS of step 17, waiting for ranks 0-2, 7", f"{clock} (61 s)"],
    ]


def test_a_table_of_many_ranks_is_short() -> None:
    signs = [SignOfLife(i, 61, doing="0B0 of step 3" if i % 2 else "0F0 of step 3", waits=[77]) for i in range(1000)]
    signs[77].waits = None
    lines = table(signs, ["n"] * 1000, [], [77], 0.0)
    assert len(lines) < MOST_LINES
    assert "77" in lines[1]
    assert "likely culprit" in lines[1]
