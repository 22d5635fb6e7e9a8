"""A Watch tells the listeners once a second what its rank does, by messages that need no MPI, and a listener's keeps
what all ranks have told."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from nettorrent_mpi.comm.activity import NOW, OUTSIDE, TRAINING
from nettorrent_mpi.comm.beats import Beats
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.launcher import LAUNCHER, depart, flush, tolerant
from nettorrent_mpi.comm.leaving import ORDERS, leave
from nettorrent_mpi.comm.spying import Spy
from nettorrent_mpi.comm.ticking import TICKING
from nettorrent_mpi.plan.diagnosis import SignOfLife, in_words

LISTENERS = 3
MOST_WAITS = 64  # ranks of which a sign tells that they are waited for
HEARING = 2  # ticks from an order to its execution: the words of who gave it come first


class Emergency(Protocol):
    """This is the interface of what makes a checkpoint of a training that stands still: by threads, without MPI."""

    def whole(self) -> int | None:
        """Return the step after which this rank's state is whole; None in the middle of an update."""

    def obstacle(self, wholes: dict[int, int | None]) -> str | None:
        """Return why the ranks that answer, with these steps, can make no checkpoint; "" if it is there already; None
        if they can."""

    def write(self, step: int, silent: Sequence[int]) -> None:
        """Write this rank's part of the checkpoint of this step; some ranks are silent. Raises what goes wrong."""

    def complete(self, step: int, ranks: Sequence[int]) -> Path:
        """Complete the checkpoint that these ranks have written; return where it is. Raises what goes wrong."""


class Watch:
    """A Watch is one rank's. All ranks of a world make it together; each may close it at any time.

    `signs` has what is known of all ranks, on listeners; `speaks` says whether this one is the first listener that
    lives, and `judge` is called on it once a second. `told` says whether the present incident has been told of, by
    whom ever. `emergency` gives what can make a checkpoint, if there is something to be saved.
    """

    def __init__(
        self,
        world: Group,
        host: str,
        judge: Callable[[Watch], None],
        emergency: Callable[[], Emergency | None] = lambda: None,
    ):
        self.size, self.rank, self.told = world.size, world.index, False
        self.beats = Beats(world, host)
        self.signs = {rank: SignOfLife(rank) for rank in range(world.size)}
        self._judge, self._emergency = judge, emergency
        firsts = [rank for rank, node in enumerate(world.nodes) if node == rank]
        near = range(min(world.size, 2 * LISTENERS))  # enough of them where there are fewer nodes than listeners
        self._listeners = list(dict.fromkeys([*firsts[:LISTENERS], *near]))[:LISTENERS]
        at = self.beats.local.index(world.index)
        self._neighbours = [*self.beats.local[at + 1 :], *self.beats.local[:at]]
        self._spy, self._count = Spy(), -1
        self._own = self.signs[world.index]
        self._left: int | None = None  # ticks until this rank ends
        self._saving: tuple[int, list[int]] | None = None  # what this rank has ordered to save: step, silent ranks
        self._saves = False  # this rank has been ordered to
        LAUNCHER.tells = self._launcher_has_gone
        TICKING.each(self._tick)
        ORDERS.append(self.abort)

    def close(self) -> None:
        """Stop watching."""
        TICKING.stop(self._tick)
        ORDERS.remove(self.abort)
        self.beats.close()

    @property
    def speaks(self) -> bool:
        """Whether this rank is the first listener that lives."""
        alive = (each for each in self._listeners if each == self.rank or self.signs[each].reports)
        return next(alive, None) == self.rank

    def kill(self, rank: int) -> None:
        """Let whoever is on its host kill this rank."""
        self._order({"kill": rank})
        self._kill(rank)

    def save(self, step: int, silent: list[int]) -> None:
        """Let all ranks but the silent ones save their blocks after this step; their signs tell when they have."""
        self._saving = step, silent

    def end(self) -> None:
        """Let all ranks end."""
        self._order({"end": True})
        self._left = HEARING + 1

    def abort(self, code: int) -> None:
        """Let all other ranks end at once with this code."""
        for _ in range(2):  # one may get lost
            self._order({"abort": code})

    def _launcher_has_gone(self, name: str) -> None:
        """Let the others end, too, where they cannot go on without this rank: their launchers may not notice."""
        if not tolerant():
            self._order({"end": True, "why": f"the launcher of rank {self.rank} ({name}) is gone"})

    def _tick(self) -> None:
        self._sample()
        for sign in self.signs.values():
            sign.silent += sign.rank != self.rank
        for source, content in self.beats.receive():
            self._hear(source, content)
        self._own.sees = self._look()
        for sign in self.signs.values():
            for rank, state in sign.sees.items() if sign.reports else ():
                self.signs[rank].state = state
        for listener in self._listeners:
            if listener != self.rank:
                self._send(listener, {"asks": not self.beats.heard(listener)})
        if self._saving is not None:
            self._order_to_save(*self._saving)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._leave()
        elif self.speaks:
            self._judge(self)

    def _sample(self) -> None:
        """Look at what this rank does."""
        own, spy, count = self._own, self._spy, NOW.count
        if count != self._count:
            self._count, own.quiet, own.since = count, 0, time.time()
            spy.forget()
        else:
            own.quiet = 0 if spy.moves() else own.quiet + 1
        spy.look(NOW.thread)
        own.waits = spy.waits and [rank for rank in spy.waits if rank != self.rank][:MOST_WAITS]
        phase = TRAINING if spy.trains and NOW.phase == OUTSIDE else NOW.phase
        action = NOW.action if spy.acts else None
        doing = phase if action is None else in_words(action)
        own.place = f"{phase} {NOW.step} {doing}"
        own.doing = doing if action is None else f"{doing} of step {NOW.step}"
        own.where, own.excused = spy.where, phase == OUTSIDE
        emergency = self._emergency()
        own.whole = None if emergency is None else emergency.whole()

    def _look(self) -> dict[int, str]:
        """Return the states of the next processes on this host, up to one that is able to look itself."""
        seen: dict[int, str] = {}
        for rank in self._neighbours:
            seen[rank] = self.beats.members[rank].process.state
            if seen[rank] in ("R", "S"):
                break
        return seen

    def _send(self, to: int, more: dict[str, Any]) -> None:
        own = self._own
        sign = (own.quiet, own.since, own.place, own.doing, own.waits, own.where, own.excused, own.whole, own.answer)
        self.beats.send(to, {"sign": sign, "sees": own.sees, "told": self.told, **more})

    def _order(self, order: dict[str, Any]) -> None:
        for to in range(self.size):
            if to != self.rank:
                self._send(to, order)

    def _hear(self, source: int, content: dict[str, Any]) -> None:
        sign = self.signs[source] = SignOfLife(source, *content["sign"])
        sign.sees = {int(rank): state for rank, state in content["sees"].items()}
        if source in self._listeners:
            mine = self._listeners.index(self.rank) if self.rank in self._listeners else LISTENERS
            if self._listeners.index(source) < mine:
                self.told = content["told"]
        if content.get("asks"):
            self._send(source, {})
        if "save" in content:
            self._save(*content["save"])
        if "why" in content and self._left is None and not LAUNCHER.gone:
            with suppress(OSError):
                os.write(2, f"nettorrent: process {os.getpid()} ends, because {content['why']}\n".encode())
        if content.get("end") and self._left is None:
            self._left = HEARING
        if "kill" in content:
            self._kill(content["kill"])
        if "abort" in content:
            flush()
            depart(content["abort"])

    def _order_to_save(self, step: int, silent: list[int]) -> None:
        self._save(step, silent)
        for sign in self.signs.values():
            if sign.answer is None and sign.rank not in silent and sign.rank != self.rank:
                self._send(sign.rank, {"save": [step, silent]})

    def _save(self, step: int, silent: list[int]) -> None:
        """Begin to save this rank's blocks, unless that was begun."""
        emergency, own = self._emergency(), self._own
        if self._saves or emergency is None:
            return
        self._saves = True

        def save() -> None:
            try:
                emergency.write(step, silent)
                own.answer = ""
            except Exception as error:  # of any kind: it is told where the run ends
                own.answer = str(error) or type(error).__name__

        threading.Thread(target=save, name="emergency checkpoint", daemon=True).start()

    def _kill(self, rank: int) -> None:
        if rank in self.beats.local:
            self.beats.members[rank].process.end(signal.SIGKILL)

    def _leave(self) -> None:
        stopped = [self.beats.members[rank].process for rank in self._own.sees if rank != self.rank]
        first = self.speaks
        threading.Thread(target=leave, args=(stopped, first), daemon=True).start()
