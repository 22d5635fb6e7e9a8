"""The checker proves that the lists of all ranks run to completion with the buffers that exist, or names what is
stuck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, cast

from nettorrent_mpi.plan.actions import ONCE, PASSES, Action, Actions, Buffers, Kind, buffers, peak_stored, splits
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.topology import Topology

Have = Sequence[Buffers]
COUPLED = frozenset({*PASSES, "R", "X", "Y", "G"})  # actions that need every rank of the swarm at once


def check(topology: Topology, lists: Sequence[Actions], have: Have | None = None) -> None:
    """Play the complete lists of all ranks (one per stage, or one per rank); return if all run to completion.

    `have` are the buffers of each stage; by default those needed to train with these lists. The check assumes the
    strictest semantics: a send is complete only when all its receives are posted; a receive needs its message from
    every rank of the neighbouring team, in the order sent; passes, R, X, Y and G need every rank of the swarm at the
    same action (batch norm and cols couple them), N all ranks. An action that can start under these rules can still
    start later, so the order of play does not matter. No buffer may be written while it is in use (see `Buffers`).

    Lists in which R and U have numbers cover several mini-batches of equally many micro-batches, from one drain to the
    next (plan/stream.py). There, too, a mini-batch's backward passes come before its R, that before its U, and the
    actions that end its step before the next mini-batch's backward passes; and stage s of S has at most S - s
    micro-batches in flight. It follows from the play that all ranks of a swarm run the forward pass of a micro-batch
    after equally many updates.

    Raises ScheduleError, which names the ranks, the actions that wait and what they wait for, or the action that is
    missing, doubled, out of order, or that writes a buffer in use.
    """
    actors = _actors(topology, lists)
    for actor in actors:
        _check_stage(actor, len(topology.stages))
    if have is None:
        own = [[a.actions for a in actors if a.stage == s] for s in range(len(topology.stages))]
        have = [buffers(s, max(1, *map(peak_stored, each)), split=any(map(splits, each))) for s, each in enumerate(own)]
    game = _Game(topology, actors, have)
    game.play()
    training = any(action.kind in ("B", "I", "W", "R", "U") for actor in actors for action in actor.actions)
    steps = _mini_batches(actors)
    optional = frozenset(a.kind for actor in actors for a in actor.actions if a.kind in ("N", "X", "Y"))
    for actor in actors:
        _check_order(actor, len(topology.stages), training, steps, optional)
        _check_buffers(actor, have[actor.stage], training)


@dataclass
class _Actor:
    """All ranks of a stage with the same list, in equivalent replicas: they move in step."""

    kind_of_replica: int
    stage: int
    actions: Actions
    ranks: Sequence[int]
    at: int = 0
    # For activations (A) and gradients (G): the micro-batches sent, and those whose receives were posted, in order;
    sent: dict[str, list[int | None]] = field(default_factory=lambda: {"A": [], "G": []})
    posted: dict[str, list[int | None]] = field(default_factory=lambda: {"A": [], "G": []})
    # and the last send from each buffer.
    last: dict[tuple[str, int], int] = field(default_factory=dict)

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
    if len(lists) == len(topology.stages):  # then all replicas are equivalent
        return [_Actor(0, s, actions, topology.swarm(s)) for s, actions in enumerate(lists)]
    known: dict[tuple[Action, ...], int] = {}
    numbers = [known.setdefault(tuple(actions), len(known)) for actions in lists]
    kinds: dict[tuple[int, ...], int] = {}
    actors: dict[tuple[int, int, int], _Actor] = {}
    members: dict[tuple[int, int, int], list[int]] = {}
    for replica in range(topology.replicas):
        team = [(s, rank, numbers[rank]) for s in range(len(topology.stages)) for rank in topology.team(replica, s)]
        kind = kinds.setdefault(tuple(number for _, _, number in team), len(kinds))
        for s, rank, number in team:
            actor = actors.setdefault((kind, s, number), _Actor(kind, s, lists[rank], []))
            members.setdefault((kind, s, number), []).append(rank)
    for key, actor in actors.items():
        actor.ranks = members[key]
    return list(actors.values())


class _Game:
    def __init__(self, topology: Topology, actors: list[_Actor], have: Have):
        self.actors, self.have = actors, have
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
            # a wait for a rank that has ended, or for a wrong message, is nearest to the cause
            stuck.sort(key=lambda entry: not entry[1].endswith(("ended", "instead")))
            lines = [f"{actor} at {actor.action} wait{'s' * (len(actor.ranks) == 1)} for {why}" for actor, why in stuck]
            more = f"\n  and {len(lines) - 12} more" if len(lines) > 12 else ""
            raise ScheduleError("deadlock, no rank can continue:\n  " + "\n  ".join(lines[:12]) + more)
        for actor in self.actors:
            for direction in ("A", "G"):
                for other in self.other_end(actor, direction, sends=True):
                    sent, posted = actor.sent[direction], other.posted[direction]
                    if len(posted) < len(sent):
                        lost = Action(actor.stage, _kind("S", direction), sent[len(posted)])
                        raise ScheduleError(f"{lost} of {actor} is never received by {other}")
                    if len(sent) < len(posted):
                        idle = Action(other.stage, _kind("P", direction), posted[len(sent)])
                        raise ScheduleError(f"{idle} of {other} gets no message from {actor}")

    def at_once(self, action: Action, actor: _Actor) -> list[_Actor]:
        """Return all actors that do this action at the same time."""
        if action.kind == "N":
            return self.actors
        return self.swarms[action.stage] if action.kind in COUPLED else [actor]

    def other_end(self, actor: _Actor, direction: str, *, sends: bool) -> list[_Actor]:
        neighbour = actor.stage + (1 if (direction == "A") == sends else -1)
        return self.teams.get((actor.kind_of_replica, neighbour), [])

    def place(self, action: Action) -> tuple[str, int]:
        """Return the buffer from which a message of this number is sent."""
        direction, have = action.kind[-1], self.have[action.stage]
        return direction, (action.micro_batch or 0) % (have.slots if direction == "A" else have.dx)

    def waits(self, actor: _Actor) -> str:
        """Return what the actor's action waits for; empty if it can start."""
        action = actor.action
        assert action is not None
        if action.kind in COUPLED or action.kind == "N":
            for other in self.at_once(action, actor):
                if (there := other.action) is None or there[1:] != action[1:]:
                    return f"{Action(other.stage, *action[1:])} of {other.where}"
        elif action.kind in ("WA", "WG"):
            return self.send_waits(actor, action)
        elif action.kind in ("RA", "RG"):
            return self.receive_waits(actor, action)
        return ""

    def send_waits(self, actor: _Actor, action: Action) -> str:
        """Wait until every receiver has posted the receive for the last send from this buffer."""
        direction, number = action.kind[-1], actor.last.get(self.place(action))
        if number is not None:
            for other in self.other_end(actor, direction, sends=True):
                if len(other.posted[direction]) <= number:
                    return (
                        f"{Action(other.stage, _kind('P', direction), actor.sent[direction][number])} of {other.where}"
                    )
        return ""

    def receive_waits(self, actor: _Actor, action: Action) -> str:
        """Wait until every sender has sent the message that this rank has posted a receive for."""
        direction, m = action.kind[-1], action.micro_batch
        if m not in actor.posted[direction]:
            return f"{Action(actor.stage, _kind('P', direction), m)} of {actor}, which did not come before it instead"
        number = actor.posted[direction].index(m)
        for other in self.other_end(actor, direction, sends=False):
            sent = other.sent[direction]
            wanted = Action(other.stage, _kind("S", direction), m)
            if len(sent) <= number:
                return f"{wanted} of {other.where}"
            if sent[number] != m:
                return f"{wanted} of {other}, which sent {wanted._replace(micro_batch=sent[number])} instead"
        return ""

    def advance(self, actor: _Actor) -> None:
        action = actor.action
        assert action is not None
        for other in self.at_once(action, actor):
            other.at += 1
        direction = action.kind[-1]
        if action.kind in ("SA", "SG"):
            actor.last[self.place(action)] = len(actor.sent[direction])
            actor.sent[direction].append(action.micro_batch)
        if action.kind in ("PA", "PG"):
            actor.posted[direction].append(action.micro_batch)


def _kind(what: Literal["P", "R", "W", "S"], direction: str) -> Kind:
    return cast("Kind", what + direction)


def _check_stage(actor: _Actor, stages: int) -> None:
    """Check that every action is possible in this stage and occurs once."""
    seen: set[Action] = set()
    absent = _absent(actor.stage, stages)
    for action in actor.actions:
        if action.stage != actor.stage:
            raise ScheduleError(f"{action} of {actor}: these ranks work on stage {actor.stage}")
        if action.kind in absent:
            raise ScheduleError(f"{action} of {actor}: there is no stage to send to or receive from")
        if action in seen:
            raise ScheduleError(f"{action} of {actor} occurs twice")
        seen.add(action)


def _absent(stage: int, stages: int) -> set[str]:
    """Return the kinds that a stage without a preceding or following stage does not have."""
    before = {"PA", "RA", "WG", "SG"} if stage == 0 else set[str]()
    return before | ({"WA", "SA", "PG", "RG"} if stage == stages - 1 else set[str]())


def _mini_batches(actors: Sequence[_Actor]) -> list[range] | None:
    """Return the micro-batches of each mini-batch where R and U have numbers; None for lists of one step."""
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
    count = 1 + max((a.micro_batch or 0 for a, _ in actions if a.kind in PASSES), default=-1)
    if count % steps:
        raise ScheduleError(f"{steps} mini-batches cannot have as many micro-batches each: there are {count}")
    each = count // steps
    return [range(n * each, (n + 1) * each) for n in range(steps)]


def _check_order(
    actor: _Actor, stages: int, training: bool, steps: list[range] | None, optional: frozenset[Kind]
) -> None:
    """Check that all actions of a micro-batch and of a step exist, in order of their dependencies. The `optional` ones
    are those that some rank has, so that all have to have them; M is a matter of each stage."""
    s, flying = actor.stage, stages - actor.stage
    passes: list[Kind] = ["I", "W"] if splits(actor.actions) else ["B"]
    index = {action: i for i, action in enumerate(actor.actions)}
    orders: list[list[Kind]] = [["PA", "RA", "F", "SA"], ["WA", "F"]]
    if training:
        orders = [["PA", "RA", "F", "SA", "RG", passes[0], "SG"], ["WA", "F"], ["PG", "RG"], ["WG", passes[0]], passes]
    absent = _absent(s, stages)
    orders = [[kind for kind in order if kind not in absent] for order in orders]
    optional |= {action.kind for action in actor.actions if action.kind == "M"}
    ends = [kind for kind in ONCE if kind in ("R", "U", "G") or kind in optional] if training else []
    here = sorted({a.micro_batch for a in actor.actions if a.kind not in (*ONCE, "L") and a.micro_batch is not None})
    chains: list[list[Action]] = []
    for n, micro_batches in [(None, here)] if steps is None else enumerate(steps):
        chains.append([Action(s, kind, n) for kind in ends])
        for m in micro_batches:
            chains += [[Action(s, kind, m) for kind in order] for order in orders]
            if training:
                chains.append([Action(s, passes[-1], m), Action(s, "R", n)])
            if n is not None and m >= flying:
                chains.append([Action(s, passes[-1], m - flying), Action(s, "F", m)])
            if n:
                chains.append([Action(s, "G", n - 1), Action(s, passes[0], m)])
        if training:  # gradients are added up in the same order by every schedule
            chains += [[Action(s, kind, m) for m in micro_batches] for kind in passes]
    for chain in chains:
        for action in chain:
            if action not in index:
                raise ScheduleError(f"{action} of {actor} is missing")
        for before, after in pairwise(chain):
            if index[before] > index[after]:
                raise ScheduleError(f"{after} of {actor} comes before {before}")
    changing = False
    for action in actor.actions:
        changing = action.kind in ("X", "U", "Y") or (changing and action.kind != "G")
        if changing and action.kind in PASSES:
            raise ScheduleError(f"{action} of {actor} comes between an update and its {s}G")
    end = Action(s, "G", None if steps is None else len(steps) - 1)
    if training and actor.actions[-1] != end:
        raise ScheduleError(f"{actor.actions[-1]} of {actor} comes after {end}")


def _check_buffers(actor: _Actor, have: Buffers, training: bool) -> None:
    """Check that no buffer is written while it is in use (see `Buffers`)."""
    first, split = actor.stage == 0, splits(actor.actions)
    last = "W" if split else "B"
    # name, how many, the kind that takes a buffer, the kind after which it is free
    turns = [("input", have.inputs, "F" if first else "PA", last if training else "F"), ("dy", have.dy, "PG", last)]
    turns += [("slot", have.slots, "F", last)] if training else []
    # name, how many, the kinds that write it, send it, and wait until it was sent
    sends = [("output", have.slots, "F", "SA", "WA"), ("dx", have.dx, "I" if split else "B", "SG", "WG")]
    kinds = {action.kind for action in actor.actions}
    sends = [entry for entry in sends if entry[3] in kinds]
    changes = {kind for entry in (*turns, *sends) for kind in entry[2:]}
    used: dict[tuple[str, int], int] = {}
    unsent: dict[tuple[str, int], Action] = {}  # the last action on the contents of each buffer
    for action in actor.actions:
        m = action.micro_batch
        if m is None or action.kind not in changes:
            continue
        for name, count, takes, frees in turns:
            place = name, m % count
            if action.kind == takes and (other := used.setdefault(place, m)) != m:
                needed = action._replace(kind=cast("Kind", frees), micro_batch=other)
                raise ScheduleError(f"{action} of {actor} takes the {name} buffer that {needed} still needs")
            if action.kind == frees and used.get(place) == m:
                del used[place]
        for name, count, writes, send, waits in sends:
            place = name, m % count
            if action.kind == waits and place in unsent and unsent[place].kind == send:
                del unsent[place]
            if action.kind == writes and place in unsent:
                wait = action._replace(kind=cast("Kind", waits))
                raise ScheduleError(
                    f"{action} of {actor} writes the {name} buffer of {unsent[place]} before {wait} has waited for it"
                )
            if action.kind in (writes, send):
                unsent[place] = action
