"""The zero-bubble pipeline: backward passes are split, so that stages have work while they would wait.

Qi et al. 2023 (Zero Bubble Pipeline Parallelism, arXiv 2401.10241). A backward pass has two halves: the gradients of
the inputs (I), for which the stage before waits, and those of the weights (W), for which nobody waits before the end of
the step. A stage does I at once, and W where it would be idle. Its lists are written from the seconds that the passes
take (`Pace`), by simulation, and shortened by a search (plan/list_search.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from nettorrent_mpi.plan.actions import Action, Actions, Kind
from nettorrent_mpi.plan.list_search import Times, Word, play, shortened
from nettorrent_mpi.plan.timeline import Timeline, simulate

UNITS = 48  # of a micro-batch's passes in the slowest stage: smaller differences of seconds do not change the lists
PATIENCE = (0.5, 0.0)  # parts of a W for which a stage waits, rather than let the next I or F wait for the whole W
KINDS: tuple[Kind, ...] = ("F", "I", "W")


class Pace(NamedTuple):
    """The time that a stage needs for a micro-batch, in units that are the same for all stages: of F, I and W, and of a
    message to the next stage or back; and the most micro-batches that it holds from F to the end of W (None: as many as
    there are stages)."""

    forward: int = 1
    inputs: int = 1
    weights: int = 1
    transfer: int = 0
    stored: int | None = None


Paces = Sequence[Pace]


def paces_of(
    forward: Sequence[float],
    inputs: Sequence[float],
    weights: Sequence[float],
    transfer: Sequence[float],
    stored: int | None = None,
) -> tuple[Pace, ...]:
    """Return the paces of stages whose passes take so many seconds; `transfer` has one number for each boundary."""
    unit = max(map(sum, zip(forward, inputs, weights, strict=True))) / UNITS or 1.0
    whole = [[max(round(seconds / unit), 1) for seconds in each] for each in (forward, inputs, weights)]
    moved = [round(seconds / unit) for seconds in (*transfer, 0.0)]
    return tuple(Pace(f, i, w, t, stored) for f, i, w, t in zip(*whole, moved, strict=True))


def zero_bubble(paces: Paces, micro_batches: int, *, quick: bool = False) -> list[Actions]:
    """Write the compute of each stage: lists whose steps follow each other as fast as a short search can find; `quick`
    leaves the search out.

    A stage holds at most as many micro-batches as there are stages, which is what the first stage of 1f1b has (ZB-H1),
    unless its pace says otherwise: with 2 * stages - 1 equal stages never wait (ZB-H2). With one stage the lists are
    those of 1f1b.
    """
    if len(paces) == 1:
        return [[Action(0, kind, m) for m in range(micro_batches) for kind in ("F", "B")]]
    return [_actions(s, word) for s, word in enumerate(_words(tuple(paces), micro_batches, quick))]


@lru_cache(maxsize=256)  # a plan asks for the same lists several times
def _words(paces: Paces, micro_batches: int, quick: bool) -> list[Word]:
    stages = len(paces)
    most = [min(pace.stored or stages, micro_batches) for pace in paces]
    written = [
        [_by_hand(s, stages, micro_batches, most[s], delay=s) for s in range(stages)],
        *(_simulated(paces, micro_batches, most, patience) for patience in PATIENCE),
        [_by_hand(s, stages, micro_batches, most[s], delay=0) for s in range(stages)],
    ]
    times = [pace[:4] for pace in paces]
    best = min(([list(map(_letter, actions)) for actions in lists] for lists in written), key=lambda w: _rank(w, times))
    if quick or len({pace[:3] for pace in paces}) == 1:  # lists of equal stages are as short as they can be
        return best
    return shortened(best, times, most, least_period(paces, micro_batches))


def least_period(paces: Paces, micro_batches: int) -> int:
    """Return a bound that no lists of these paces beat, not always reached: a stage's own work, and what it cannot fill
    of the two times when it waits for its first and its last micro-batch to come back from the stages after it."""
    found = 0
    for s, (f, i, w, _, stored) in enumerate(paces):
        most = min(stored or len(paces), micro_batches)
        after = paces[s + 1 :]
        back = f + sum(p.forward + p.inputs for p in after) + 2 * sum(p.transfer for p in paces[s:-1])
        first, last = max(back - most * f, 0), max(back - f - (most - 1) * (i + w), 0)
        waits = first + last if most < micro_batches else max(first, last)
        found = max(found, micro_batches * (f + i + w) + waits)
    return found


def _letter(action: Action) -> int:
    return KINDS.index(action.kind)


def _rank(words: Sequence[Word], times: Sequence[Times]) -> int:
    found = play(words, times)
    assert found is not None
    return found.rank[0]


def _actions(stage: int, word: Word) -> Actions:
    """Return the actions that a word's letters stand for."""
    done = [0] * len(KINDS)
    actions = []
    for letter in word:
        actions.append(Action(stage, KINDS[letter], done[letter]))
        done[letter] += 1
    return actions


def played(lists: Sequence[Actions], paces: Paces) -> Timeline:
    """Simulate lists of compute at these paces."""
    forward, inputs, weights, transfer = (list(map(float, each)) for each in list(zip(*paces, strict=True))[:4])
    backward = [i + w for i, w in zip(inputs, weights, strict=True)]
    return simulate(lists, forward, backward, transfer[:-1], weights=weights)


def _by_hand(stage: int, stages: int, micro_batches: int, most: int, *, delay: int) -> Actions:
    """Write F and I in turns as in 1f1b, each W `delay` micro-batches after its I. ZB-H1 (section 2.2) delays by as
    many as the stage has fewer under way than the first one: best where all stages are equal."""
    ahead, done = min(stages - stage, most, micro_batches), 0
    actions = [Action(stage, "F", m) for m in range(ahead)]
    for m in range(micro_batches):
        actions.append(Action(stage, "I", m))
        if done <= m - delay or (ahead < micro_batches and ahead - done == most):
            actions.append(Action(stage, "W", done))
            done += 1
        if ahead < micro_batches:
            actions.append(Action(stage, "F", ahead))
            ahead += 1
    return actions + [Action(stage, "W", m) for m in range(done, micro_batches)]


class _Stage:
    """A stage in the simulation: what it has done, and when it is free."""

    def __init__(self, pace: Pace, micro_batches: int, most: int, patience: float):
        self.pace, self._micro_batches, self._most = pace, micro_batches, most
        self._patience = patience * pace.weights
        self.now = 0.0
        self.forward: list[float] = []  # when the inputs of the next micro-batches have arrived, and
        self.backward: list[float] = []  # the gradients of their outputs
        self.done: dict[Kind, int] = {"F": 0, "I": 0, "W": 0}
        self.latest: Kind = "F"  # F or I

    def next(self) -> tuple[float, Kind] | None:
        """Return what it does next, and when; None if nothing has arrived yet."""
        f, i, w = self.done["F"], self.done["I"], self.done["W"]
        found: list[tuple[float, int, Kind]] = []
        full = f - w == self._most
        if i < len(self.backward):
            found.append((max(self.backward[i], self.now), 1, "I"))
        if f < len(self.forward) and not full:  # in turns with I, as in 1f1b
            found.append((max(self.forward[f], self.now), 0 if self.latest == "I" else 2, "F"))
        if w < i:
            waits = not full and i < self._micro_batches
            found.append((self.now + waits * self._patience, 3, "W"))
        if not found:
            return None
        start, _, kind = min(found)
        return (self.now if kind == "W" else start), kind


def _simulated(paces: Paces, micro_batches: int, most: Sequence[int], patience: float) -> list[Actions]:
    """Write lists in a simulation: a stage that is free does the I or F that has arrived, in turns, else a W (section
    3.1)."""
    stages = [_Stage(pace, micro_batches, limit, patience) for pace, limit in zip(paces, most, strict=True)]
    stages[0].forward = [0.0] * micro_batches
    lists: list[Actions] = [[] for _ in stages]
    ready: dict[int, tuple[float, Kind]] = {}  # what each stage does next
    changed = range(len(stages))
    while True:
        for s in changed:
            found = stages[s].next()
            if found:
                ready[s] = found
            else:
                ready.pop(s, None)
        if not ready:
            return lists
        s = min(ready, key=lambda each: (ready[each][0], each))
        (start, kind), stage, pace = ready[s], stages[s], paces[s]
        changed = range(max(s - 1, 0), min(s + 2, len(stages)))
        lists[s].append(Action(s, kind, stage.done[kind]))
        stage.done[kind] += 1
        if kind == "F":
            stage.latest, stage.now = kind, start + pace.forward
            if s + 1 < len(stages):
                stages[s + 1].forward.append(stage.now + pace.transfer)
            else:
                stage.backward.append(stage.now)
        elif kind == "I":
            stage.latest, stage.now = kind, start + pace.inputs
            if s:
                stages[s - 1].backward.append(stage.now + paces[s - 1].transfer)
        else:
            stage.now = start + pace.weights
