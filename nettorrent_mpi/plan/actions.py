"""The words of a schedule: one action of one stage, and what a stage's compute needs around it.

    L       loads the rows of a micro-batch ahead of its F
    PA, PG  post the receive of activations (A), of gradients (G)
    RA, RG  wait until they have arrived
    F, B    forward, backward
    I, W    the two halves of B, where a schedule splits it: the gradients of the inputs, those of the weights
    WA, WG  wait until the buffer that F m, B m (I m) writes for a neighbour may be overwritten: its last send is
            complete
    SA, SG  begin to send activations, gradients
    R       reduces the gradients: waits until this rank has its shard of their sum
    M       multiplies: this rank's shard of weight gradients from the rows of all holders, where they are not summed
    N       takes part in the global norm over all ranks, for clipping
    X       exchanges with peers before the update: merges what they have sent
    U       updates the own shard
    Y       exchanges with peers after the update
    G       gathers the parameters: waits until the holders' shards have come

An action prints and parses as stage, kind, number: `2F0`, `2SA0`, `2R` (notation after torch.distributed.pipelining).
The number is the micro-batch's. What is done once per step (ONCE) has none in the list of one step; in lists of
several mini-batches it is the mini-batch's: `2R0`, `2U1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

from nettorrent_mpi.plan.errors import ScheduleError

Kind = Literal[
    "L", "PA", "RA", "F", "WA", "SA", "PG", "RG", "B", "I", "W", "WG", "SG", "R", "M", "N", "X", "U", "Y", "G"
]
PASSES: frozenset[Kind] = frozenset({"F", "B", "I", "W"})  # the compute of a micro-batch
ONCE: tuple[Kind, ...] = ("R", "M", "N", "X", "U", "Y", "G")  # once per step, in this order

_FORM = re.compile(rf"(\d+)(?:(L|F|B|I|W|[PRWS][AG])(\d+)|([{''.join(ONCE)}])(\d*))")


class Action(NamedTuple):
    """An action is one thing that a rank of `stage` does. `micro_batch` is its number; for ONCE it is None, or the
    mini-batch's number."""

    stage: int
    kind: Kind
    micro_batch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.micro_batch is None else self.micro_batch}"


Actions = list[Action]


def parse(text: str) -> Action:
    """Return the action that prints as `text`. Raises ScheduleError for any other text."""
    match = _FORM.fullmatch(text)
    if not match:
        raise ScheduleError(f"{text!r} is not an action; actions look like 2F0, 2SA0, 2R or 2R0")
    stage, kind, micro_batch, once, step = match.groups()
    number = micro_batch or step
    return Action(int(stage), cast("Kind", kind or once), int(number) if number else None)


def step_end(*, clip: bool = False, exact: bool = True, parts: bool = False) -> tuple[Kind, ...]:
    """Return the kinds of actions that follow the last backward pass of a step.

    `clip`: gradients are clipped by their norm; without `exact`, replicas exchange weights; `parts`: this rank computes
    weight gradients in parts.
    """
    without = {"M": not parts, "N": not clip, "X": exact, "Y": exact}
    return tuple(kind for kind in ONCE if not without.get(kind))


class Buffers(NamedTuple):
    """The number of buffers of each kind in a stage. Micro-batches take turns: number m uses buffer m modulo the count.

    An input is in use from its PA (on the first stage: F) until its B (in evaluation: F) has ended; a slot, which holds
    what F saves for B, from F to the end of B; a slot's output and `dx` until the send from there is complete; `dy`
    from PG to the end of B. Where B is split, it ends with W.
    """

    inputs: int
    slots: int
    dy: int = 2
    dx: int = 2


def splits(actions: Iterable[Action]) -> bool:
    """Whether backward passes are split into I and W."""
    return any(action.kind == "W" for action in actions)


def buffers(stage: int, slots: int, *, split: bool = False) -> Buffers:
    """Return the buffers of a stage that holds `slots` micro-batches between F and B. One input more than that lets the
    next micro-batch arrive while all slots are in use. Where B is `split`, a slot's W needs its dy."""
    return Buffers(slots + 1 if stage else slots, slots, slots if split else 2)


def buffers_for(stage: int, actions: Sequence[Action]) -> Buffers:
    """Return the buffers that a stage needs to train with these actions."""
    return buffers(stage, max(peak_stored(actions), 1), split=splits(actions))


def peak_stored(actions: Sequence[Action]) -> int:
    """Return the largest number of micro-batches between their F and the end of their B (W), whose saved values are
    held."""
    last = "W" if splits(actions) else "B"
    backward = {a.micro_batch for a in actions if a.kind == last}
    held = peak = 0
    for action in actions:
        held += action.kind == "F" and action.micro_batch in backward
        peak = max(peak, held)
        held -= action.kind == last
    return peak


def complete(
    compute: Iterable[Action],
    stage: int,
    stages: int,
    slots: int,
    until: int,
    *,
    first: bool = True,
    end: Sequence[Kind] = (),
) -> Actions:
    """Complete the compute of one stage with everything else that its ranks do or wait for, followed by the step's
    `end`.

    Receives are posted as soon as their buffers are free, for micro-batches below `until`, the number of those before
    the pipeline is next empty; `first` says that it was empty before, so that none are posted yet. A message is waited
    for right before its use and sent as soon as the result exists; its buffer is waited for right before it is written
    again.
    """
    compute = list(compute)
    split = splits(compute)
    have = buffers(stage, slots, split=split)
    training = split or any(kind == "B" for _, kind, _ in compute)
    last = "W" if split else "B" if training else "F"  # of what reads a micro-batch's input
    reads, writes = stage > 0, stage < stages - 1
    full: Actions = []

    def add(kind: Kind, m: int, present: bool) -> None:
        if present:
            full.append(Action(stage, kind, m))

    for m in range(min(have.inputs, until) if first else 0):
        add("PA", m, reads)
    for m in range(min(have.dy, until) if first and training else 0):
        add("PG", m, writes)
    for action in compute:
        _, kind, number = action
        m = number or 0
        if kind == "F":
            add("RA", m, reads)
            add("WA", m, writes)
        elif kind != "W":
            add("RG", m, writes)
            add("WG", m, reads)
        full.append(action)
        if kind == "I":  # others wait for it, and for nothing that follows
            add("SG", m, reads)
        if kind == last:
            add("PA", m + have.inputs, reads and m + have.inputs < until)
            add("PG", m + have.dy, training and writes and m + have.dy < until)
        if kind == "B":
            add("SG", m, reads)
        if kind == "F":
            add("SA", m, writes)
    full += [Action(stage, kind) for kind in end]
    return full if reads else _with_loads(full)


def _with_loads(actions: Actions) -> Actions:
    """Insert loads into the first stage's actions: the rows of the next micro-batch are gathered before each wait, for
    gradients (RG) or for the swarm (R), where that costs no time. The last load is for the next mini-batch.

    Other ranks are not involved: an F whose rows were not loaded gathers them itself.
    """
    full: Actions = []
    following: int | None = None
    for action in actions:
        if action.kind in ("RG", "R") and following is not None:
            full.append(Action(action.stage, "L", following))
            following = None
        if action.kind == "F" and action.micro_batch is not None:
            following = action.micro_batch + 1
        full.append(action)
    return full
