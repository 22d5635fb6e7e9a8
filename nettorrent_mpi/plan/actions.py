"""The words of a schedule: one action of one stage.

    F forward                 SA, RA  send, receive activations         R  sum the gradients over the swarm
    B backward                SG, RG  send, receive gradients           N  global norm, for clipping, over all ranks
                                                                        U  optimizer update
An action prints and parses as stage, kind, micro-batch: `2F0`, `2SA0`, `2R` (notation after
torch.distributed.pipelining). R, N and U are done once per step.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast

from nettorrent_mpi.plan.errors import ScheduleError

Kind = Literal["F", "B", "SA", "RA", "SG", "RG", "R", "N", "U"]

_FORM = re.compile(r"(\d+)(?:(F|B|SA|RA|SG|RG)(\d+)|(R|N|U))")


class Action(NamedTuple):
    """One thing that a rank of `stage` does; `micro_batch` is None for what is done once per step."""

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
        raise ScheduleError(f"{text!r} is no action; actions look like 2F0, 2SA0 or 2R")
    stage, kind, micro_batch, once = match.groups()
    return Action(int(stage), cast("Kind", kind or once), int(micro_batch) if micro_batch else None)
