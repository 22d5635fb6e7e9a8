"""A diagnosis takes what ranks that do not advance tell of themselves, finds the likely culprit and makes the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nettorrent_mpi.plan.actions import Action, Kind

# The words of a schedule as people write them (after torch.distributed.pipelining): 2RA3 is 2RECV_F3.
_WORDS: dict[Kind, str] = {
    "L": "LOAD",
    "PA": "POST_F",
    "RA": "RECV_F",
    "F": "F",
    "WA": "AWAIT_F",
    "SA": "SEND_F",
    "PG": "POST_B",
    "RG": "RECV_B",
    "B": "B",
    "I": "I",
    "W": "W",
    "WG": "AWAIT_B",
    "SG": "SEND_B",
    "R": "REDUCE_GRADIENTS",
    "M": "MULTIPLY",
    "N": "NORM",
    "X": "EXCHANGE_BEFORE",
    "U": "UPDATE",
    "Y": "EXCHANGE_AFTER",
    "G": "GATHER_PARAMETERS",
}
SILENT = 4  # seconds without a sign of life after which a rank is not taken to have reported
MOST_LINES = 40
STATES = {
    "T": "is stopped (SIGSTOP)",
    "t": "is stopped by a debugger",
    "D": "waits for a disk",
    "R": "computes without a break",
    "S": "sleeps without a break",
    "gone": "has ended",
    "": "does not answer: it is stopped, swapped out or cut off",
}


def in_words(action: Action) -> str:
    """Write an action in the field's words: `2RECV_B3`."""
    return f"{action.stage}{_WORDS[action.kind]}{'' if action.micro_batch is None else action.micro_batch}"


@dataclass
class SignOfLife:
    """A sign of life of a rank: what it does, and for how long. Times are seconds that it has counted itself, so that
    those in which it was suspended do not count."""

    rank: int
    quiet: int = 0  # seconds without advance
    since: float = 0.0  # when it last advanced (time.time)
    place: str = ""  # the step or phase, and the action: ranks in the same place wait there for others
    doing: str = ""  # the same for people
    waits: list[int] | None = None  # the ranks that it waits for, as far as known; None: it computes
    where: str = ""  # the line of code where it computes
    excused: bool = False  # it may take as long as it likes
    whole: int | None = None  # the step after which its state is whole
    answer: str | None = None  # to an order to save its blocks: "" once it has, or why it has not
    silent: int = 0  # seconds since this sign, counted by who received it
    state: str = ""  # of its process, as another one on its host sees it
    sees: dict[int, str] = field(default_factory=dict)  # states of other ranks' processes

    @property
    def reports(self) -> bool:
        """Whether it has shown itself just now."""
        return self.silent < SILENT

    @property
    def stuck(self) -> int:
        """Seconds in which it has not advanced, or not been heard of."""
        return self.silent if not self.reports else self.quiet


def standstill(signs: Sequence[SignOfLife]) -> dict[int, int]:
    """Return for each rank the seconds since it has advanced, or one that it waits for, or one that this one waits for:
    waiting for what goes on is not a standstill, however long it takes."""
    still = {sign.rank: sign.stuck for sign in signs}
    places = {sign.rank: sign.place for sign in signs}
    awaits = {
        sign.rank: [other for other in sign.waits if other in places and places[other] != sign.place]
        for sign in signs
        if sign.waits and sign.reports
    }
    changed = True
    while changed:
        changed = False
        for rank, others in awaits.items():
            least = min((still[other] for other in others), default=still[rank])
            if least < still[rank]:
                still[rank], changed = least, True
    return still


def culprits(signs: Sequence[SignOfLife]) -> list[int]:
    """Return which ranks the others likely wait for: those that do not report, else those that wait for nobody; none
    where ranks wait for each other in a ring."""
    silent = [sign.rank for sign in signs if not sign.reports]
    if silent:
        return silent
    stuck = {sign.rank: sign for sign in signs if sign.quiet >= SILENT}
    free = [rank for rank, sign in stuck.items() if sign.waits is None]
    awaited = {
        other
        for sign in stuck.values()
        for other in sign.waits or ()
        if other in stuck and stuck[other].place != sign.place
    }
    return [rank for rank in free if rank in awaited] or free


def table(
    signs: Sequence[SignOfLife], hosts: Sequence[str], places: Sequence[str], guilty: Sequence[int], now: float
) -> list[str]:
    """Write the lines of the table: rank, host, swarm, what it does and since when. Where there are many ranks, those
    that do the same share a line, and only some of the lines are shown."""
    many = len(signs) > MOST_LINES
    rows: dict[tuple[str, ...], list[int]] = {}
    for sign in sorted(signs, key=lambda sign: sign.rank not in guilty) if many else signs:
        swarm = places[sign.rank] if sign.rank < len(places) else ""
        mark = "<- likely culprit" if sign.rank in guilty else ""
        row = (hosts[sign.rank], swarm, _doing(sign), _since(sign, now), mark, str(sign.rank))
        rows.setdefault(("", "", row[2], "", "") if many and not mark else row, []).append(sign.rank)
    lines: list[tuple[str, ...]] = [("rank", "host", "swarm" if places else "", "action", "since", "")]
    lines += [(_ranks(ranks).partition(" ")[2], *row[:5]) for row, ranks in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True) if width] for line in lines]
    return ["  ".join(line).rstrip() for line in cells[: MOST_LINES + 1]]


def explained(sign: SignOfLife) -> str:
    """Say what is known of a culprit."""
    if not sign.reports:
        return f"{STATES.get(sign.state, STATES[''])}, and has been silent for {sign.silent} s"
    return f"waits for nobody, and is in {_doing(sign)}"


def _doing(sign: SignOfLife) -> str:
    words = sign.doing
    if sign.waits:
        words += f" from {_ranks(sign.waits)}" if "RECV" in words else f", waiting for {_ranks(sign.waits)}"
    elif sign.waits is not None:
        words += ", waiting"
    elif sign.where:
        words += f", {sign.where}"
    return words if sign.reports else f"silent; last: {words}"


def _since(sign: SignOfLife, now: float) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(sign.since or now))
    return f"{clock} ({sign.quiet + (0 if sign.reports else sign.silent)} s)"


def _ranks(ranks: Sequence[int]) -> str:
    """Write ranks in short: `rank 5`, `ranks 0-3, 7`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    text = ", ".join("-".join(map(str, part)) for part in parts)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text}"
