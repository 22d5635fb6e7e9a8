"""The words of a schedule: one action of one stage.

    F forward                 SA, RA  send, receive activations         R  sum the gradients over the swarm
    B backward                SG, RG  send, receive gradients           N  global norm, for clipping, over all ranks
    L load: gather the rows of a micro-batch ahead of its F             U  optimizer update

An action prints and parses as stage, kind, number: `2F0`, `2SA0`, `2R` (notation after torch.distributed.pipelining).
The number is the micro-batch's. R, N and U are done once per step and have none in the list of one step; in lists of
several mini-batches it is the mini-batch's: `2R0`, `2U1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple, cast

from nettorrent_mpi.plan.errors import ScheduleError

Kind = Literal["F", "B", "L", "SA", "RA", "SG", "RG", "R", "N", "U"]
ONCE: tuple[Kind, ...] = ("R", "N", "U")  # once per step, in this order

_FORM = re.compile(r"(\d+)(?:(F|B|L|SA|RA|SG|RG)(\d+)|(R|N|U)(\d*))")


class Action(NamedTuple):
    """One thing that a rank of `stage` does. `micro_batch` is the number: of R, N and U None, or their mini-batch's."""

    stage: int
    kind: Kind
    micro_batch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.micro_batch is None else self.micro_batch}"


Actions = list[Action]


def parse(text: str) -> Action:
    """The action that prints as `text`. Raises ScheduleError for any other text."""
    match = _FORM.fullmatch(text)
    if not match:
        raise ScheduleError(f"{text!r} is no action; actions look like 2F0, 2SA0, 2R or 2R0")
    stage, kind, micro_batch, once, step = match.groups()
    number = micro_batch or step
    return Action(int(stage), cast("Kind", kind or once), int(number) if number else None)


def with_transfers(actions: Iterable[Action], stages: int) -> Actions:
    """One stage's actions with its transfers: received right before use, sent as soon as there is a result."""
    full: Actions = []
    for action in actions:
        s, kind, m = action
        if (kind == "F" and s > 0) or (kind == "B" and s < stages - 1):
            full.append(Action(s, "RA" if kind == "F" else "RG", m))
        full.append(action)
        if (kind == "F" and s < stages - 1) or (kind == "B" and s > 0):
            full.append(Action(s, "SA" if kind == "F" else "SG", m))
    return full


def with_loads(actions: Iterable[Action]) -> Actions:
    """The first stage's actions of a training step, with the rows of the next micro-batch gathered before each wait,
    for gradients (RG) or for the swarm (R): there it costs no time. The last one is the next mini-batch's first.

    Nobody else has to do with it: an F whose rows are not there yet gathers them.
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
