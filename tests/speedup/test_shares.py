"""What a rank's time went to, from spans made by hand: every microsecond is counted once, and rightly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nettorrent_mpi.engine.traced_run import read_traced
from nettorrent_mpi.speedup.shares import PARTS, SKIPPED, shares

Event = tuple[int, str, int, float, float]  # rank, action, step, begin, end


def trace(places: list[tuple[int, int, int, int]], events: list[Event]) -> str:
    told: list[dict[str, Any]] = [
        {
            "ph": "M", "pid": rank, "name": "process_name",
            "args": {"name": f"rank {rank}: replica {r}, stage {s} (conv2d1 linear1), row {row}, col {col}"},
        }
        for rank, (r, s, row, col) in enumerate(places)
    ]  # fmt: skip
    told += [
        {
            "ph": "X", "pid": rank, "tid": 0, "name": name, "cat": name.strip("0123456789"), "ts": begin,
            "dur": end - begin, "args": {"step": step},
        }
        for rank, name, step, begin, end in events
    ]  # fmt: skip
    return json.dumps({"traceEvents": told})


def told(places: list[tuple[int, int, int, int]], events: list[Event], steps: int = 1) -> list[dict[str, float]]:
    found = shares(read_traced(trace(places, events)), steps, micro_batches=1)
    for share in found:
        assert set(share) == set(PARTS)
        assert sum(share.values()) == pytest.approx(1)
    return found


def test_rows_wait_for_the_last_one() -> None:
    """Rank 1 comes to the reduction 30 us after rank 0; then both reduce for 10 us. Both gather for 5 us."""
    first, second = told(
        [(0, 0, 0, 0), (0, 0, 1, 0)],
        [
            (0, "0F0", 0, 0, 20), (0, "0B0", 0, 20, 40), (0, "0R", 0, 40, 80), (0, "0U", 0, 80, 95),
            (0, "0G", 0, 95, 100),
            (1, "0F0", 0, 0, 40), (1, "0B0", 0, 40, 70), (1, "0R", 0, 70, 80), (1, "0U", 0, 80, 95),
            (1, "0G", 0, 95, 100),
        ],
    )  # fmt: skip
    assert first == pytest.approx({"compute": 0.55, "communication": 0.15, "waiting": 0.3, "bubble": 0, "other": 0})
    assert second == pytest.approx({"compute": 0.85, "communication": 0.15, "waiting": 0, "bubble": 0, "other": 0})


def test_parameters_wait_for_the_last_one() -> None:
    """Rank 1 updates for 30 us longer; then both gather for 10 us. They exchange for 20 us."""
    first, second = told(
        [(0, 0, 0, 0), (0, 0, 1, 0)],
        [
            (0, "0F0", 0, 0, 20), (0, "0X", 0, 20, 30), (0, "0U", 0, 30, 50), (0, "0Y", 0, 50, 60),
            (0, "0G", 0, 60, 100),
            (1, "0F0", 0, 0, 20), (1, "0X", 0, 20, 30), (1, "0U", 0, 30, 80), (1, "0Y", 0, 80, 90),
            (1, "0G", 0, 90, 100),
        ],
    )  # fmt: skip
    assert first == pytest.approx({"compute": 0.4, "communication": 0.3, "waiting": 0.3, "bubble": 0, "other": 0})
    assert second == pytest.approx({"compute": 0.7, "communication": 0.3, "waiting": 0, "bubble": 0, "other": 0})


def test_gradients_in_parts_are_computed() -> None:
    """Rank 1 comes 20 us later; for 5 us both see that the other is there, then each computes."""
    first, second = told(
        [(0, 0, 0, 0), (0, 0, 1, 0)],
        [
            (0, "0F0", 0, 0, 20), (0, "0R", 0, 20, 45), (0, "0M", 0, 45, 80), (0, "0U", 0, 80, 100),
            (1, "0F0", 0, 0, 40), (1, "0R", 0, 40, 45), (1, "0M", 0, 45, 80), (1, "0U", 0, 80, 100),
        ],
    )  # fmt: skip
    assert first == pytest.approx({"compute": 0.75, "communication": 0.05, "waiting": 0.2, "bubble": 0, "other": 0})
    assert second == pytest.approx({"compute": 0.95, "communication": 0.05, "waiting": 0, "bubble": 0, "other": 0})


def test_a_stage_waits_for_what_is_not_sent_yet() -> None:
    """Stage 1 begins to receive at 0, stage 0 sends from 30 on, and it has arrived at 40: a bubble of 30 us."""
    first, second = told(
        [(0, 0, 0, 0), (0, 1, 0, 0)],
        [
            (0, "0F0", 0, 0, 30), (0, "0SA0", 0, 30, 35), (0, "0RG0", 0, 35, 70), (0, "0B0", 0, 70, 90),
            (0, "0R", 0, 90, 90), (0, "0U", 0, 90, 100),
            (1, "1RA0", 0, 0, 40), (1, "1F0", 0, 40, 50), (1, "1B0", 0, 50, 60), (1, "1SG0", 0, 60, 65),
            (1, "1R", 0, 65, 65), (1, "1U", 0, 65, 80),
        ],
    )  # fmt: skip
    assert first == pytest.approx({"compute": 0.6, "communication": 0.15, "waiting": 0, "bubble": 0.25, "other": 0})
    assert second["bubble"] == pytest.approx(30 / 80)
    assert second["communication"] == pytest.approx((10 + 5) / 80)


def test_only_rows_in_common_are_waited_for() -> None:
    """Two rows each: the lower half of the receiving team waits for the lower half of the sending one alone."""
    found = told(
        [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0)],
        [
            (0, "0SA0", 0, 10, 20), (0, "0U", 0, 20, 100), (1, "0SA0", 0, 60, 70), (1, "0U", 0, 70, 100),
            (2, "1RA0", 0, 0, 20), (2, "1U", 0, 20, 100), (3, "1RA0", 0, 0, 80), (3, "1U", 0, 80, 100),
        ],
    )  # fmt: skip
    assert [share["bubble"] for share in found[2:]] == pytest.approx([0.1, 0.6])


def test_micro_batches_of_the_next_step_are_found() -> None:
    """Without flush stage 0 sends step 1's micro-batch within its step 0: there it is number 1."""
    (_, second) = told(
        [(0, 0, 0, 0), (0, 1, 0, 0)],
        [
            (0, "0SA0", 0, 0, 10), (0, "0SA1", 0, 50, 60), (0, "0U", 0, 60, 100), (0, "0U", 1, 100, 110),
            (1, "1RA0", 0, 0, 10), (1, "1U", 0, 10, 20), (1, "1RA0", 1, 20, 80), (1, "1U", 1, 80, 100),
        ],
        steps=2,
    )  # fmt: skip
    assert second["bubble"] == pytest.approx(0.3)


def test_evaluations_and_first_steps_are_left_out() -> None:
    events: list[Event] = []
    for step in range(SKIPPED + 2):
        begin = 1000.0 * step
        events += [(0, "0F0", step, begin, begin + 60), (0, "0B0", step, begin + 60, begin + 80)]
        events += [(0, "0U", step, begin + 80, begin + 90), (0, "0G", step, begin + 90, begin + 100)]
        events += [(0, "0F0", step, begin + 100, begin + 1000)]
    (share,) = told([(0, 0, 0, 0)], events, steps=SKIPPED + 2)
    assert share["compute"] == pytest.approx(0.9)
    assert share["communication"] == pytest.approx(0.1)
