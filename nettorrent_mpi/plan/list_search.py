"""The lists of a pipeline with split backward passes are shortened: passes on the critical path change places.

A list is a word of letters F, I and W, since a stage does each kind for all micro-batches in turn. A step of the search
moves one pass of the critical path (of the stage that takes longest from its first to its last pass), keeps what is not
slower, and sometimes what is a little slower, ever less so (simulated annealing). It draws from a seeded generator and
counts in whole units, so that all ranks find the same lists.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

F, I, W = range(3)  # noqa: E741
Word = list[int]
Times = tuple[int, int, int, int]  # of F, I, W and of a message to the next stage or back
Place = tuple[int, int]  # (stage, position in its word)

SIMULATED = 60_000  # passes in one search, about 10 ms; of long words at least FEWEST are tried
FEWEST = 24
HEAT = 0.02  # part of the period by which a change may be slower at first
FARTHEST = 6  # places that a pass is moved at most


class Play(NamedTuple):
    """A Play is a step in time: how long each stage takes from its first to its last pass, and what each pass waited
    for: one of a neighbour's, or (None) its stage's own before it."""

    spans: list[int]
    waited: list[list[Place | None]]

    @property
    def rank(self) -> tuple[int, int]:
        """The period, and, of equal ones, what all stages take."""
        return max(self.spans), sum(self.spans)


def play(words: Sequence[Word], times: Sequence[Times]) -> Play | None:
    """Simulate a step; None if the words deadlock."""
    stages, count = len(words), len(words[0]) // 3
    arrived: list[tuple[list[int], list[int]]] = [([], []) for _ in words]  # when what each F and I needs is there,
    source: list[tuple[list[Place | None], list[Place | None]]] = [([], []) for _ in words]  # and from which pass
    arrived[0][F].extend([0] * count)
    source[0][F].extend([None] * count)
    waited: list[list[Place | None]] = [[] for _ in words]
    first, now, done = [-1] * stages, [0] * stages, [[0, 0] for _ in words]
    left = stages * len(words[0])
    while left:
        before = left
        for s, word in enumerate(words):
            clock, waits, took = now[s], waited[s], times[s]
            for k in range(len(waits), len(word)):
                kind = word[k]
                cause = None
                if kind != W:
                    m = done[s][kind]
                    if m == len(arrived[s][kind]):
                        break
                    if arrived[s][kind][m] > clock:
                        clock, cause = arrived[s][kind][m], source[s][kind][m]
                    done[s][kind] += 1
                    if first[s] < 0:
                        first[s] = clock
                clock += took[kind]
                if kind == F:
                    to, way, travels = (s, I, 0) if s + 1 == stages else (s + 1, F, took[3])
                    arrived[to][way].append(clock + travels)
                    source[to][way].append((s, k) if to > s else None)
                elif kind == I and s:
                    arrived[s - 1][I].append(clock + times[s - 1][3])
                    source[s - 1][I].append((s, k))
                waits.append(cause)
                left -= 1
            now[s] = clock
        if left == before:
            return None
    return Play([end - begin for end, begin in zip(now, first, strict=True)], waited)


def shortened(words: Sequence[Word], times: Sequence[Times], most: Sequence[int], least: int) -> list[Word]:
    """Return words of which none holds more than `most` micro-batches, and whose period is at most that of `words`;
    the search ends at a period of `least`."""
    now, dice = list(words), random.Random(1)
    played = play(now, times)
    assert played is not None
    found, best, rank = now, played.rank, played.rank
    tries = max(SIMULATED // (len(now) * len(now[0])), FEWEST)
    heat, path = HEAT * best[0], _movable(now, played)
    for n in range(tries):
        if best[0] <= least or not path:
            break
        s, k = path[int(dice.random() * len(path))]
        word = _moved(now[s], k, dice)
        if not _fits(word, most[s]):
            continue
        changed = [*now[:s], word, *now[s + 1 :]]
        played = play(changed, times)
        if played is None:
            continue
        if played.rank <= rank or played.rank[0] - rank[0] <= heat * (1 - n / tries) * dice.random():
            now, rank, path = changed, played.rank, _movable(changed, played)
            if rank < best:
                found, best = now, rank
    return found


def _movable(words: Sequence[Word], played: Play) -> list[Place]:
    """Return the passes of the critical path that waited for another kind of their own stage's."""
    s = played.spans.index(max(played.spans))
    k, found = len(words[s]) - 1, []
    while k >= 0:
        cause = played.waited[s][k]
        if cause is not None:
            s, k = cause
            continue
        if k and words[s][k] != words[s][k - 1]:
            found.append((s, k))
        k -= 1
    return found


def _moved(word: Word, k: int, dice: random.Random) -> Word:
    """Return a word in which pass k comes earlier, or the one before it later."""
    word, way, far = list(word), dice.random(), int(dice.random() * FARTHEST)
    if way < 0.5:
        word.insert(max(k - 1 - far, 0), word.pop(k))
    else:
        word.insert(min(k + far, len(word) - 1), word.pop(k - 1))
    return word


def _fits(word: Word, most: int) -> bool:
    """Whether each I comes after its F, each W after its I, and no more micro-batches are held."""
    done = [0, 0, 0]
    for kind in word:
        done[kind] += 1
        if done[I] > done[F] or done[W] > done[I] or done[F] - done[W] > most:
            return False
    return True
