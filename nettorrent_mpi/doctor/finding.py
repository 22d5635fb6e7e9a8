"""Findings about the environment, and the report of those of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from nettorrent_mpi.cli.tables import wrapped
from nettorrent_mpi.plan.errors import readable

State = Literal["ok", "warning", "fault"]


class Finding(NamedTuple):
    """A Finding is what one check found: a fault keeps a training from running, or from giving its results; with a
    warning it runs, but slower or with less than it could have. Both have a remedy."""

    state: State
    text: str
    remedy: str = ""
    check: str = ""  # whose it is


def ok(text: str) -> Finding:
    return Finding("ok", text)


def warning(text: str, remedy: str) -> Finding:
    return Finding("warning", text, remedy)


def fault(text: str, remedy: str) -> Finding:
    return Finding("fault", text, remedy)


class Findings:
    """Findings of all ranks that have told theirs, in the order of the checks `names`; what several have found alike
    stands among them once."""

    def __init__(self, names: Sequence[str], told: Mapping[int, Sequence[Finding]], size: int, hosts: Sequence[str]):
        self._size, self._hosts = size, hosts
        self._ranks: dict[Finding, list[int]] = {}
        for rank in sorted(told):
            for each in told[rank]:
                self._ranks.setdefault(each, []).append(rank)
        order = {name: i for i, name in enumerate(names)}
        self._findings = sorted(self._ranks, key=lambda each: order.get(each.check, len(order)))

    def count(self, state: State) -> int:
        return sum(each.state == state for each in self._findings)

    def plain(self) -> dict[str, Any]:
        """Return the report as values of JSON."""
        return {
            "ranks": self._size,
            "hosts": list(self._hosts),
            "faults": self.count("fault"),
            "warnings": self.count("warning"),
            "findings": [{**each._asdict(), "ranks": self._ranks[each]} for each in self._findings],
        }

    def text(self) -> str:
        """Return the report as lines for people."""
        hosts = readable(", ".join(self._hosts[:8])) + (", ..." if len(self._hosts) > 8 else "")
        lines = [f"{self._size} rank{'s' if self._size > 1 else ''} on {hosts}"]
        tellers = {rank for ranks in self._ranks.values() for rank in ranks}
        by_check: dict[str, set[int]] = {}
        for each, ranks in self._ranks.items():
            by_check.setdefault(each.check, set()).update(ranks)
        for each in self._findings:
            ranks = self._ranks[each]
            some = len(tellers) > 1 and (set(ranks) != by_check[each.check] or len(ranks) not in (1, len(tellers)))
            who = f" ({_several(ranks)})" if some else ""
            lines += wrapped(f"{each.state:<8} {each.check:<14} ", readable(each.text) + who)
            if each.remedy:
                lines += wrapped(f"{'':<24}-> ", readable(each.remedy))
        faults, warnings = self.count("fault"), self.count("warning")
        lines.append(
            f"{faults or 'no'} fault{'s' * (faults != 1)}, {warnings or 'no'} warning{'s' * (warnings != 1)}"
            + ("" if faults else ": a training runs here")
        )
        return "\n".join(lines) + "\n"


def _several(ranks: Sequence[int]) -> str:
    """Write numbers of ranks, ascending, as 0-3, 5."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1][1:] = [rank]
        else:
            parts.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join("-".join(map(str, part)) for part in parts)
