"""Proves that the lists of all ranks together come to their end, or names the action that waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from nettorrent_mpi.plan.actions import ONCE, Action, Actions, Kind
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.topology import Topology


def check(topology: Topology, lists: Sequence[Actions], capacity: int = 1) -> None:
    """Plays the lists of all ranks together (one list per stage, or one per rank) and returns if all come to their end.

    Assumes the strictest: F, B and R need every rank of the swarm at the same action (batch norm and cols couple
    them), N all ranks; a receive needs its message from every rank of the neighbouring team, in the order sent; a send
    needs fewer than `capacity` of its messages in that direction still to be received by any rank of that team. What
    can move under these rules can always move later, so the order of play does not matter.

    Lists in which R and U have numbers are those of several mini-batches of as many micro-batches each, from one drain
    to the next (plan/stream.py). In these, too, a mini-batch's backwards come before its R, that before its U, and U
    before the next mini-batch's backwards; stage s of S has at most S - s micro-batches in flight; and all ranks of a
    swarm do a micro-batch's forward after as many updates.

    Raises ScheduleError, which names the ranks, the actions that wait and what they wait for, or the action that is
    missing, doubled or out of order.
    """
    actors = _actors(topology, lists)
    for actor in actors:
        _check_stage(actor, len(topology.stages))
    game = _Game(topology, actors, capacity)
    game.play()
    training = any(action.kind in ("B", "R", "U") for actor in actors for action in actor.actions)
    steps = _mini_batches(actors)
    for actor in actors:
        _check_order(actor, len(topology.stages), training, steps)
    _check_versions(actors)


@dataclass
class _Actor:
    """All ranks of a stage that have the same list in replicas that are alike: they move in step."""

    kind_of_replica: int
    stage: int
    actions: Actions
    ranks: list[int]
    at: int = 0
    sent: dict[str, list[int | None]] = field(default_factory=lambda: {"A": [], "G": []})
    got: dict[str, int] = field(default_factory=lambda: {"A": 0, "G": 0})

    @property
    def action(self) -> Action | None:
        return self.actions[self.at] if self.at < len(self.actions) else None

    def __str__(self) -> str:
        few = ", ".join(map(str, self.ranks[:4]))
        more = f" and {len(self.ranks) - 4} more" if len(self.ranks) > 4 else ""
        return f"rank{'s' if len(self.ranks) > 1 else ''} {few}{more}"

    @property
    def where(self) -> str:
        be, have = ("are", "have") if len(self.ranks) > 1 else ("is", "has")
        return f"{self}, which {f'{be} at {self.action}' if self.action else f'{have} ended'}"


def _actors(topology: Topology, lists: Sequence[Actions]) -> list[_Actor]:
    if len(lists) not in (len(topology.stages), topology.size):
        raise ScheduleError(f"{len(lists)} lists for {len(topology.stages)} stages of {topology.size} ranks")
    per_rank = len(lists) == topology.size
    known: dict[tuple[Action, ...], int] = {}
    numbers = [known.setdefault(tuple(actions), len(known)) for actions in lists]
    kinds: dict[tuple[int, ...], int] = {}
    actors: dict[tuple[int, int, int], _Actor] = {}
    for replica in range(topology.replicas):
        team = [(s, rank, numbers[rank if per_rank else s]) for s in range(len(topology.stages))
                for rank in topology.team(replica, s)]  # fmt: skip
        kind = kinds.setdefault(tuple(number for _, _, number in team), len(kinds))
        for s, rank, number in team:
            actor = actors.setdefault((kind, s, number), _Actor(kind, s, lists[rank if per_rank else s], []))
            actor.ranks.append(rank)
    return list(actors.values())


class _Game:
    def __init__(self, topology: Topology, actors: list[_Actor], capacity: int):
        self.actors, self.capacity = actors, capacity
        self.swarms: list[list[_Actor]] = [[] for _ in topology.stages]
        self.teams: dict[tuple[int, int], list[_Actor]] = {}
        for actor in actors:
            self.swarms[actor.stage].append(actor)
            self.teams.setdefault((actor.kind_of_replica, actor.stage), []).append(actor)

    def play(self) -> None:
        moved = True
        while moved:
            moved = False
            for actor in self.actors:
                while actor.action and not self.waits(actor):
                    self.advance(actor)
                    moved = True
        stuck = [(actor, self.waits(actor)) for actor in self.actors if actor.action]
        if stuck:
            # what waits for a rank that has ended, or got the wrong message, is nearest to the cause
            stuck.sort(key=lambda entry: not entry[1].endswith(("ended", "instead")))
            lines = [f"{actor} at {actor.action} wait{'s' * (len(actor.ranks) == 1)} for {why}" for actor, why in stuck]
            more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
            raise ScheduleError("no rank can go on:\n  " + "\n  ".join(lines[:12]) + more)
        for actor in self.actors:
            for way, messages in actor.sent.items():
                for other in self.other_end(actor, way, sends=True):
                    if other.got[way] < len(messages):
                        lost = Action(actor.stage, "SA" if way == "A" else "SG", messages[other.got[way]])
                        raise ScheduleError(f"{lost} of {actor} is never received by {other}")

    def together(self, action: Action, actor: _Actor) -> list[_Actor]:
        """Who does this action at the same time."""
        if action.kind == "N":
            return self.actors
        return self.swarms[action.stage] if action.kind in ("F", "B", "R") else [actor]

    def other_end(self, actor: _Actor, way: str, *, sends: bool) -> list[_Actor]:
        neighbour = actor.stage + (1 if (way == "A") == sends else -1)
        return self.teams.get((actor.kind_of_replica, neighbour), [])

    def waits(self, actor: _Actor) -> str:
        """What the actor's action waits for; empty if it can start."""
        action = actor.action
        assert action is not None
        for other in self.together(action, actor):
            if other.action is None or other.action[1:] != action[1:]:
                return f"{Action(other.stage, *action[1:])} of {other.where}"
        way = action.kind[-1]
        if action.kind in ("SA", "SG"):
            for other in self.other_end(actor, way, sends=True):
                oldest = len(actor.sent[way]) - self.capacity
                if other.got[way] <= oldest:
                    wanted = Action(other.stage, "RA" if way == "A" else "RG", actor.sent[way][oldest])
                    return f"{wanted} of {other.where}"
        if action.kind in ("RA", "RG"):
            number = actor.got[way]
            for other in self.other_end(actor, way, sends=False):
                sent = other.sent[way]
                wanted = Action(other.stage, "SA" if way == "A" else "SG", action.micro_batch)
                if len(sent) <= number:
                    return f"{wanted} of {other.where}"
                if sent[number] != action.micro_batch:
                    return f"{wanted} of {other}, which sent {wanted._replace(micro_batch=sent[number])} instead"
        return ""

    def advance(self, actor: _Actor) -> None:
        action = actor.action
        assert action is not None
        for other in self.together(action, actor):
            other.at += 1
        if action.kind in ("SA", "SG"):
            actor.sent[action.kind[-1]].append(action.micro_batch)
        if action.kind in ("RA", "RG"):
            actor.got[action.kind[-1]] += 1


def _check_stage(actor: _Actor, stages: int) -> None:
    """Every action is one that this stage can do, and is there once."""
    seen: set[Action] = set()
    for action in actor.actions:
        first, last = actor.stage == 0, actor.stage == stages - 1
        if action.stage != actor.stage:
            raise ScheduleError(f"{action} of {actor}: these ranks work on stage {actor.stage}")
        if (first and action.kind in ("RA", "SG")) or (last and action.kind in ("SA", "RG")):
            raise ScheduleError(f"{action} of {actor}: there is no stage to send to or receive from")
        if action in seen:
            raise ScheduleError(f"{action} of {actor} stands there twice")
        seen.add(action)


def _mini_batches(actors: Sequence[_Actor]) -> list[range] | None:
    """The micro-batches of each mini-batch where R and U have numbers; None where the lists are those of one step."""
    actions = [(action, actor) for actor in actors for action in actor.actions]
    numbers = {action.micro_batch for action, _ in actions if action.kind in ONCE}
    if numbers <= {None}:
        return None
    for action, actor in actions:
        if action.micro_batch is None:
            raise ScheduleError(
                f"{action} of {actor} has no number, and elsewhere R or U has: of which mini-batch is it?"
            )
    steps = 1 + max(n for n in numbers if n is not None)
    count = 1 + max((a.micro_batch or 0 for a, _ in actions if a.kind not in ONCE), default=-1)
    if count % steps:
        raise ScheduleError(f"{steps} mini-batches cannot have as many micro-batches each: there are {count}")
    each = count // steps
    return [range(n * each, (n + 1) * each) for n in range(steps)]


def _check_order(actor: _Actor, stages: int, training: bool, steps: list[range] | None) -> None:
    """Everything that a micro-batch and a step need is there, and after what it needs."""
    s, last, flying = actor.stage, actor.stage == stages - 1, stages - actor.stage
    index = {action: i for i, action in enumerate(actor.actions)}
    passes: list[Kind] = ["RA", "F", "SA", "RG", "B", "SG"] if training else ["RA", "F", "SA"]
    absent = ({"RA", "SG"} if s == 0 else set()) | ({"SA", "RG"} if last else set())
    passes = [kind for kind in passes if kind not in absent]
    norm = any(action.kind == "N" for action in actor.actions)
    ends = [kind for kind in ONCE if kind != "N" or norm] if training else []
    here = sorted({a.micro_batch for a in actor.actions if a.kind not in ONCE and a.micro_batch is not None})
    chains: list[list[Action]] = []
    for n, micro_batches in [(None, here)] if steps is None else enumerate(steps):
        chains.append([Action(s, kind, n) for kind in ends])
        for m in micro_batches:
            chains.append([Action(s, kind, m) for kind in passes])
            if training:
                chains.append([Action(s, "B", m), Action(s, "R", n)])
            if n is not None and m >= flying:
                chains.append([Action(s, "B", m - flying), Action(s, "F", m)])
            if n:
                chains.append([Action(s, "U", n - 1), Action(s, "B", m)])
    for chain in chains:
        for action in chain:
            if action not in index:
                raise ScheduleError(f"{action} of {actor} is missing")
        for before, after in pairwise(chain):
            if index[before] > index[after]:
                raise ScheduleError(f"{after} of {actor} comes before {before}")
    end = Action(s, "U", None if steps is None else len(steps) - 1)
    if training and actor.actions[-1] != end:
        raise ScheduleError(f"{actor.actions[-1]} of {actor} comes after {end}")


def _check_versions(actors: Sequence[_Actor]) -> None:
    """All ranks of a swarm use the same weights for a micro-batch: as many updates come before its forward."""
    known: dict[Action, tuple[int, _Actor]] = {}
    for actor in actors:
        updates = 0
        for action in actor.actions:
            updates += action.kind == "U"
            if action.kind == "F":
                others, other = known.setdefault(action, (updates, actor))
                if others != updates:
                    raise ScheduleError(f"{action} of {actor} comes after {updates} updates, of {other} after {others}")
