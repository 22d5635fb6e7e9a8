"""Launches: what the host of a GPU launches for a list of actions, in which order, and which of it waits for what.

A GPU has two streams: one computes, one moves activations and gradients over links. A stream runs its launches in
order; between the streams an event makes a launch of one wait for a launch of the other. `launches` writes them for one
rank:

- `Compute` is a maximal run of actions between which the host has nothing to do, so that it can be captured as a graph.
  Loads (L) belong to it; whether they can be captured is the device's matter.
- `Transfers` are neighbouring sends and receives, whatever stands between two computes, as one grouped launch. A
  receive is posted by its launch, so PA and PG become the launch's wait for the compute that read the buffer last, and
  WA and WG the compute's wait for the launch that sent from the buffer that it writes.
- `OnHost` is an exchange with peers (X, Y), in which the host decides.

NCCL may run one launch at a time on each GPU, in the order in which the host launches over all communicators, and a
launch ends when all its members have launched theirs. So one launch for each transfer deadlocks where two stages send
to each other: each waits in its send for the other's receive, which would be the other's next launch. In one group both
go on. `check_launches` plays all ranks' launches under this rule. There is one communicator for each link, in both
directions; a group over two links is taken for two launches, in the order in which the group names them, since NCCL
launches one kernel for each communicator. A pipeline that never flushes has no such order with a norm of all stages
(N) in it: there the check raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nettorrent_mpi.plan.actions import Action, Actions, Buffers, Kind, splits
from nettorrent_mpi.plan.checker import COUPLED
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.topology import Topology

BEFORE = -1  # stands for the other stream's last launch of the lists before


class Compute(NamedTuple):
    """A run of actions on the compute stream, which does not begin before the transfers number `after` of the list are
    complete: BEFORE for those of the lists before, None if an earlier compute has waited for them or there are none."""

    actions: tuple[Action, ...]
    after: int | None = None


class Transfers(NamedTuple):
    """A group of SA, RA, SG, RG on the stream of links, which does not begin before the compute number `after` of the
    list is complete; BEFORE and None as for a `Compute`."""

    actions: tuple[Action, ...]
    after: int | None = None


class OnHost(NamedTuple):
    """An action of the host, X or Y, which launches what it decides on the compute stream."""

    actions: tuple[Action, ...]


Item = Compute | Transfers | OnHost

_TRANSFERS = frozenset({"SA", "RA", "SG", "RG"})


def launches(actions: Sequence[Action], have: Buffers) -> list[Item]:
    """Return the launches of a rank whose stage has the buffers `have`, for a list of actions that `check` accepts.

    Loads are launched after the transfers that they stand between. Waits that an earlier one implies are left out: both
    streams run in order.
    """
    items = _cut(actions)
    waits = _waits(actions, items, have)
    return [
        item if isinstance(item, OnHost) else item._replace(after=after)
        for item, after in zip(items, waits, strict=True)
    ]


def awaited(items: Sequence[Item]) -> frozenset[int]:
    """Return the numbers of the launches whose completion is to be recorded as an event: those that another one waits
    for, and the last of each stream, for which the first ones of the next list may wait."""
    named = {item.after for item in items if not isinstance(item, OnHost)}
    last = {isinstance(item, Transfers): number for number, item in enumerate(items)}  # a host's action computes
    return frozenset({number for number in named if number is not None and number >= 0} | set(last.values()))


def _cut(actions: Sequence[Action]) -> list[Item]:
    """Cut a list into runs."""
    items: list[Item] = []
    run: list[Action] = []
    moves: list[Action] = []
    loads: list[Action] = []

    def close() -> None:
        """Close what is open: a run of compute and the transfers that follow it."""
        if run:
            items.append(Compute(tuple(run)))
        if moves:
            items.append(Transfers(tuple(moves)))
        run[:], moves[:], loads[:] = loads, [], []

    for action in actions:
        if action.kind in _TRANSFERS:
            moves.append(action)
        elif action.kind in ("X", "Y"):
            close()
            close()  # the loads
            items.append(OnHost((action,)))
        elif action.kind == "L":
            (loads if moves else run).append(action)
        elif action.kind not in ("PA", "PG", "WA", "WG"):
            if moves:
                close()
            run.append(action)
    close()
    close()
    return items


def _waits(actions: Sequence[Action], items: Sequence[Item], have: Buffers) -> list[int | None]:
    """Return for each item the item of the other stream that it waits for."""
    backward: Kind = "I" if splits(actions) else "B"  # reads dy, and writes dx
    writes: dict[Kind, Kind] = {"SA": "F", "SG": backward}
    place = {action: number for number, item in enumerate(items) for action in item.actions}
    # a receive waits for all compute before its post; what was posted in an earlier list, for that list's
    freed: dict[Action, int] = {}
    sent: dict[tuple[Kind, int], int] = {}  # the last send from each buffer
    needs: list[set[int]] = [set() for _ in items]
    computed = BEFORE
    for action in actions:
        stage, kind, m = action
        number = place.get(action, BEFORE)
        if kind in ("PA", "PG"):
            freed[Action(stage, "RA" if kind == "PA" else "RG", m)] = computed
        elif kind in ("WA", "WG"):
            send: Kind = "SA" if kind == "WA" else "SG"
            writer = Action(stage, writes[send], m)
            if writer in place:
                needs[place[writer]].add(sent.get((send, _turn(send, m, have)), BEFORE))
        elif kind in ("SA", "SG"):
            needs[number].add(place.get(Action(stage, writes[kind], m), BEFORE))
            sent[kind, _turn(kind, m, have)] = number
        elif kind in ("RA", "RG"):
            needs[number].add(freed.get(action, BEFORE))
            reader = Action(stage, "F" if kind == "RA" else backward, m)
            if reader in place:
                needs[place[reader]].add(number)
        elif kind not in ("L", "X", "Y"):
            computed = number
    return _new(items, needs)


def _turn(send: Kind, m: int | None, have: Buffers) -> int:
    return (m or 0) % (have.slots if send == "SA" else have.dx)


def _new(items: Sequence[Item], needs: Sequence[set[int]]) -> list[int | None]:
    """Leave out waits that a stream's earlier ones imply. A launch waits for the latest of its needs."""
    waited = {True: BEFORE - 1, False: BEFORE - 1}
    found: list[int | None] = []
    for item, need in zip(items, needs, strict=True):
        stream, latest = isinstance(item, Transfers), max(need, default=BEFORE - 1)
        found.append(latest if latest > waited[stream] else None)
        waited[stream] = max(waited[stream], latest)
    return found


# -- the proof --------------------------------------------------------------------------------------------------------


def check_launches(topology: Topology, lists: Sequence[Sequence[Item]]) -> None:
    """Play the launches of all ranks (one list per stage, or one per rank); return if all run to completion.

    The rule is the strictest: a rank runs one launch at a time, in order. Passes, R, X, Y and G need every rank of the
    swarm at the same action, since they contain collectives of its teams, columns and holders; N all ranks. A
    launch over a link needs, for each of its sends and receives, every rank of the neighbouring team in the launch that
    has the other half. Fewer ranks take part where spans are empty or replicas are not exact, and real streams run side
    by side: then there is less to wait for. Nothing is chosen, so the order of play does not matter.

    Raises ScheduleError, which names the launches that wait for ever, or two halves of a transfer that do not belong
    together.
    """
    per_rank = len(lists) == topology.size > len(topology.stages)
    places = [topology.place(rank)[:2] for rank in range(topology.size)] if per_rank else []
    nodes = [_Node(*place) for place in places or ((0, stage) for stage in range(len(topology.stages)))]
    if len(lists) != len(nodes):
        raise ScheduleError(f"{len(lists)} lists for {len(topology.stages)} stages of {topology.size} ranks")
    for number, (node, items) in enumerate(zip(nodes, lists, strict=True)):
        node.name = f"rank {number}" if per_rank else f"stage {number}"
        node.todo = [launch for item in items for launch in _launched(item)]
    teams: dict[tuple[int, int], list[_Node]] = {}
    swarms: dict[int, list[_Node]] = {}
    for node in nodes:
        teams.setdefault((node.replica, node.stage), []).append(node)
        swarms.setdefault(node.stage, []).append(node)
    moved = True
    while moved:
        moved = False
        for node in nodes:
            while (launch := node.now) and _runs(node, launch, nodes, swarms, teams):
                moved = True
    stuck = [node for node in nodes if node.now]
    if stuck:
        lines = [f"{node.name} in {_text(node.now)}, which waits for {node.waits}" for node in stuck[:12]]
        more = f"\n  and {len(stuck) - 12} more" if len(stuck) > 12 else ""
        raise ScheduleError("deadlock, no launch can complete:\n  " + "\n  ".join(lines) + more)


_Launch = tuple[Action, ...]  # one collective, or what a group does over one link


@dataclass
class _Node:
    """A rank, or all ranks of a stage, which have the same list and so move in step."""

    replica: int
    stage: int

    def __post_init__(self) -> None:
        self.name, self.waits = "", ""
        self.todo: list[_Launch] = []
        self.at = 0
        self.done: set[tuple[Action, int]] = set()  # halves of the present launch: the action and the other node

    @property
    def now(self) -> _Launch | None:
        return self.todo[self.at] if self.at < len(self.todo) else None

    def advance(self) -> None:
        self.at += 1
        self.done.clear()


def _launched(item: Item) -> Iterable[_Launch]:
    """Return the launches of an item that other ranks take part in."""
    if isinstance(item, Transfers):
        links: dict[int, list[Action]] = {}
        for action in item.actions:
            links.setdefault(_link(action), []).append(action)
        return [tuple(actions) for actions in links.values()]
    return [(action,) for action in item.actions if action.kind in COUPLED or action.kind == "N"]


def _link(action: Action) -> int:
    """Return the number of the stage before the link."""
    return action.stage - (action.kind in ("RA", "SG"))


def _runs(
    node: _Node,
    launch: _Launch,
    nodes: Sequence[_Node],
    swarms: dict[int, list[_Node]],
    teams: dict[tuple[int, int], list[_Node]],
) -> bool:
    """Run a node's present launch as far as it goes; return whether it is complete."""
    kind = launch[0].kind
    if kind not in _TRANSFERS:
        members = nodes if kind == "N" else swarms[node.stage]
        for other in members:
            if (there := other.now) is None or there[0][1:] != launch[0][1:]:
                node.waits = _where(other)
                return False
        for other in members:
            other.advance()
        return True
    node.waits = ""
    for action in launch:
        other_stage = action.stage + (1 if _link(action) == action.stage else -1)
        half = _other_half(action, other_stage)
        for other in teams.get((node.replica, other_stage), []):
            if (action, id(other)) in node.done:
                continue
            halves = [a for a in other.now or () if a[:2] == half[:2] and (a, id(node)) not in other.done]
            if not halves:
                node.waits = node.waits or f"{half} of {_where(other)}"
            elif halves[0] != half:
                raise ScheduleError(f"{action} of {node.name} meets {halves[0]} of {other.name} instead of {half}")
            else:
                node.done.add((action, id(other)))
                other.done.add((half, id(node)))
    if not node.waits:
        node.advance()
    return not node.waits


_HALVES: dict[Kind, Kind] = {"SA": "RA", "RA": "SA", "SG": "RG", "RG": "SG"}


def _other_half(action: Action, stage: int) -> Action:
    return Action(stage, _HALVES[action.kind], action.micro_batch)


def _where(node: _Node) -> str:
    return f"{node.name}, which {f'is in {_text(node.now)}' if node.now else 'has ended'}"


def _text(launch: Iterable[Action] | None) -> str:
    return "[" + " ".join(map(str, launch or ())) + "]"


def proved(topology: Topology, lists: Sequence[Actions], have: Sequence[Buffers]) -> None:
    """Prove that the launches of these lists of actions, one per stage, run to completion. Raises ScheduleError."""
    check_launches(topology, [launches(actions, have[stage]) for stage, actions in enumerate(lists)])
