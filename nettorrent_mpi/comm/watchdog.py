"""The watchdog lets no run hang without a word, and none for ever.

Once a second a thread of each rank looks whether the rank has advanced, and tells a few others, the listeners (watch).
A rank that is stopped is named at once. When one has not advanced for `report` seconds, one table shows what every rank
does, and the likely culprit; after `end` seconds a checkpoint is made, if one can be (last_checkpoint), and the run
ends with exit code 1, or, where MPI lets the others go on without a rank (failures), the culprit is killed.

The first listener speaks; if it is silent itself, the next one does. All times are a rank's own ticks: those in which
it, or all ranks, were suspended do not count. A rank advances if an action or a phase begins, a layer ends, or bytes
are read, written, sent or received.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from nettorrent_mpi.comm.failures import survivable
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.last_checkpoint import LIMIT, last_checkpoint
from nettorrent_mpi.comm.watch import Emergency, Watch
from nettorrent_mpi.plan.diagnosis import SILENT, STATES, SignOfLife, culprits, explained, standstill, table

UNKNOWN = 15  # seconds of silence after which a rank is named of whose process nothing is known
AGAIN = 30  # seconds after a culprit was killed until the next one may be
FAREWELL = 20.0  # seconds for the last words
MOST = 8  # ranks that are named


def print_error(text: str) -> None:
    """Write a line to standard error, if it can be written to."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"nettorrent: {text}\n")
        sys.stderr.flush()


class Watchdog:
    """A Watchdog looks after a world. All ranks make it together; from then on it needs no MPI.

    `report` and `end` are in seconds; None: never. `say` shows a line (default: on standard error), `places` describes
    the ranks' positions, `emergency` makes a checkpoint when the run ends, and `farewell` returns what is to be said
    then.
    """

    report: int | None = 60
    end: int | None = 600

    def __init__(self, world: Group, host: str):
        self.say: Callable[[str], None] = print_error
        self.places: Sequence[str] = ()
        self.emergency: Emergency | None = None
        self.farewell: Callable[[], str] = lambda: ""
        self._watch: Watch | None = None
        self.meet(world, host)

    def meet(self, world: Group, host: str) -> None:
        """Watch the ranks of this world, instead of those before. All its ranks call; one alone needs no watch."""
        self.close()
        judge = Judge(self).judge
        self._watch = Watch(world, host, judge, lambda: self.emergency) if world.size > 1 else None

    def close(self) -> None:
        """Stop watching. Each rank may call at any time."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()


class Judge:
    """A Judge decides about what the ranks of a world tell, on the one that speaks."""

    def __init__(self, watchdog: Watchdog):
        self._dog = watchdog
        self._named: set[int] = set()
        self._shown = False  # the present incident, by this rank
        self._pause = 0  # seconds until another one may be killed

    def judge(self, watch: Watch) -> None:
        """Judge the ranks' present signs."""
        dog, signs = self._dog, list(watch.signs.values())
        if dog.report is not None:
            self._name(watch, signs)
        still = standstill(signs)
        stuck = max((still[sign.rank] for sign in signs if not sign.excused), default=0)
        if dog.report is not None and stuck >= dog.report and not watch.told:
            watch.told = self._shown = True
            self._show(watch, signs, stuck)
        elif watch.told and stuck < SILENT:
            if self._shown:
                dog.say("all ranks advance again")
            watch.told = self._shown = False
        self._pause -= self._pause > 0
        if dog.end is not None and stuck >= dog.end and not self._pause:
            self._finish(watch, signs, stuck)

    def _name(self, watch: Watch, signs: list[SignOfLife]) -> None:
        """Name ranks that are stopped, and those of which nothing is heard, in one line each time."""
        for sign in signs:
            if sign.reports and sign.rank in self._named:
                self._named.discard(sign.rank)
                self._dog.say(f"rank {sign.rank} goes on")
        new = [sign for sign in signs if not sign.reports and sign.rank not in self._named]
        stopped = [sign for sign in new if sign.state in ("T", "t")]
        unknown = [sign for sign in new if sign.silent >= UNKNOWN and not sign.state]
        for found, text in ((stopped, STATES["T"]), (unknown, STATES[""])):
            if found:
                self._named |= {sign.rank for sign in found}
                self._dog.say(f"{self._who(watch, [sign.rank for sign in found])} {text}")

    def _show(self, watch: Watch, signs: list[SignOfLife], stuck: int) -> None:
        dog, guilty = self._dog, culprits(signs)
        lines = [f"a rank has not advanced for {stuck} s. All ranks:"]
        lines += table(signs, [member.host for member in watch.beats.members], dog.places, guilty, time.time())
        lines += [f"likely culprit: {each}" for each in self._accused(watch, guilty)]
        if not guilty:
            lines.append("no culprit is seen: ranks wait for each other")
        if self._own_code(watch, guilty):
            lines.append("the others wait for it: a script's own code may take as long as it likes")
        elif dog.end is not None:
            what = "the culprit is killed" if survivable() and self._reached(watch, guilty) else "the run ends"
            after = f"{what} in {max(dog.end - stuck, 0)} s, unless it advances"
            lines.append(f"{after} (watchdog: {{report: {dog.report}, end: {dog.end}}})")
        dog.say("\n".join(lines))

    def _finish(self, watch: Watch, signs: list[SignOfLife], stuck: int) -> None:
        """Kill the culprits, where the others can go on without them; else end the run."""
        guilty = culprits(signs)
        if self._own_code(watch, guilty):
            return
        accused = "; ".join(self._accused(watch, guilty))
        if survivable() and self._reached(watch, guilty):
            self._pause = AGAIN
            self._dog.say(f"killed after {stuck} s without advance, so that the others go on: {accused}")
            for rank in guilty:
                watch.kill(rank)
            return
        words = f"error: the run ends, because a rank has not advanced for {stuck} s"
        words += f": {accused}" if accused else ", and ranks wait for each other"
        self._pause = 10**9
        threading.Thread(target=self._end, args=(watch, words), daemon=True).start()

    def _own_code(self, watch: Watch, guilty: list[int]) -> bool:
        """Whether the culprits are ranks in a script's own code, which answer."""
        return bool(guilty) and all(watch.signs[rank].excused and watch.signs[rank].reports for rank in guilty)

    def _end(self, watch: Watch, words: str) -> None:
        """Say the last words, and let all ranks end. A file system may be what is stuck: it has a limited time."""
        dog, told = self._dog, list[str]()

        def ask() -> None:
            with suppress(Exception):  # the run ends all the same
                told.append(last_checkpoint(watch, dog.emergency))
            with suppress(Exception):
                told.append(dog.farewell())

        asked = threading.Thread(target=ask, daemon=True)
        asked.start()
        asked.join(FAREWELL + LIMIT)
        self._dog.say(words + "".join(told))
        watch.end()

    def _reached(self, watch: Watch, guilty: list[int]) -> bool:
        """Whether these are not all ranks, and on each one's host somebody reports, who can kill it."""
        members = watch.beats.members
        hosts = {members[sign.rank].host for sign in watch.signs.values() if sign.reports}
        return 0 < len(guilty) < watch.size and all(members[rank].host in hosts for rank in guilty)

    def _accused(self, watch: Watch, guilty: list[int]) -> list[str]:
        return [f"{self._who(watch, [rank])} {explained(watch.signs[rank])}" for rank in guilty[:MOST]]

    def _who(self, watch: Watch, ranks: list[int]) -> str:
        members = watch.beats.members
        told = [f"rank {rank} (process {members[rank].process.pid} on {members[rank].host})" for rank in ranks[:MOST]]
        return ", ".join(told) + (f" and {len(ranks) - MOST} more, each" if len(ranks) > MOST else "")
