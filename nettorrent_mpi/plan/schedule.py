"""Schedules: what each rank does in a step, as lists of actions, written and completed.

A schedule function writes the compute only; `complete` (plan/actions.py) adds all other actions, and `check`
(plan/checker.py) proves the result. All ranks of a stage have the same list. The pipeline without flush is in
plan/stream.py, the one that splits backward passes in plan/zero_bubble.py, the simulation of a schedule in
plan/timeline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nettorrent_mpi.plan.actions import Action, Actions, Kind, complete, peak_stored, step_end
from nettorrent_mpi.plan.stream import stream, window, window_steps
from nettorrent_mpi.plan.zero_bubble import Pace, Paces, zero_bubble


def gpipe(stages: int, micro_batches: int) -> list[Actions]:
    """Write the compute of each stage: all forward passes, then all backward passes (Huang et al. 2019, arXiv
    1811.06965).

    Backward passes go in ascending order, as in 1f1b, so that both add up the gradients in the same order.
    """
    return [_compute(s, micro_batches, micro_batches) for s in range(stages)]


def one_f_one_b(stages: int, micro_batches: int) -> list[Actions]:
    """Write the compute of each stage: backward passes begin as early as possible, then alternate with forward passes
    (PipeDream-flush, Narayanan et al. 2021, arXiv 2006.09503). As long as gpipe, but stage s stores min(micro_batches,
    stages - s)."""
    return [_compute(s, micro_batches, min(micro_batches, stages - s)) for s in range(stages)]


def forward_only(stages: int, micro_batches: int) -> list[Actions]:
    """Write the compute of each stage in evaluation."""
    return [[Action(s, "F", m) for m in range(micro_batches)] for s in range(stages)]


# (stages, micro-batches of a mini-batch) -> compute of each stage from one drain to the next: a step where the pipeline
# flushes, and of STREAMS, which do not, a window of several
PIPELINES: dict[str, Callable[[int, int], list[Actions]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zero_bubble": lambda stages, micro_batches: zero_bubble([Pace()] * stages, micro_batches),
    "async": window,
}
STREAMS = frozenset({"async"})
PACED = frozenset({"zero_bubble"})  # those whose lists follow from the stages' paces


def passes(pipeline: str, stages: int, micro_batches: int, paces: Paces = (), *, quick: bool = False) -> list[Actions]:
    """Write the compute of each stage, from one drain to the next; of PACED at these `paces`, by default those of equal
    stages, and without a search where it has to be `quick`."""
    if pipeline in PACED and paces:
        return zero_bubble(paces, micro_batches, quick=quick)
    return PIPELINES[pipeline](stages, micro_batches)


def _compute(stage: int, micro_batches: int, ahead: int) -> Actions:
    """Write compute in which forward passes run `ahead` micro-batches before backward passes."""
    actions = [Action(stage, "F", m) for m in range(ahead)]
    for m in range(micro_batches):
        actions.append(Action(stage, "B", m))
        if m + ahead < micro_batches:
            actions.append(Action(stage, "F", m + ahead))
    return actions


def build(
    pipeline: str, stages: int, micro_batches: int, *, end: Sequence[Kind] = step_end(), paces: Paces = ()
) -> list[Actions]:
    """Return the complete training step of each stage; of PACED at these `paces`.

    For STREAMS it is the whole window of several mini-batches, for proofs and tables; their single steps are
    `stream_step`'s.
    """
    if pipeline in STREAMS:
        return stream(stages, micro_batches, window_steps(stages, micro_batches), end=end)
    lists = passes(pipeline, stages, micro_batches, paces)
    return [complete(a, s, stages, peak_stored(a), micro_batches, end=end) for s, a in enumerate(lists)]


def evaluation(slots: Sequence[int], micro_batches: int) -> list[Actions]:
    """Return the complete evaluation of each stage, in the buffers of training; `slots` has one number for each
    stage."""
    stages = len(slots)
    lists = forward_only(stages, micro_batches)
    return [complete(a, s, stages, slots[s], micro_batches) for s, a in enumerate(lists)]
