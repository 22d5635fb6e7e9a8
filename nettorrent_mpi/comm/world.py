"""A World starts MPI for a run, and makes errors of one rank errors that all agree on."""

from __future__ import annotations

import os
import platform
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np

from nettorrent_mpi import env
from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.failures import lost, survivable
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.launcher import LAUNCHER, shared_files, unname
from nettorrent_mpi.comm.leaving import end_all
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.processes import this_process
from nettorrent_mpi.comm.script_errors import look_after_script
from nettorrent_mpi.comm.starting import StartWatch
from nettorrent_mpi.comm.watchdog import Watchdog
from nettorrent_mpi.plan.errors import LaunchError, LostRanksError, NetTorrentError, RemoteError, in_one_line
from nettorrent_mpi.plan.topology import compact

T = TypeVar("T")

look_after_script()


class World(Group):
    """A World has all ranks of a run: a duplicate of MPI_COMM_WORLD, or of another communicator, with errors as
    exceptions. A process that no launcher started is a world of its own, which uses no MPI.

    All ranks of the communicator make one, use it alike and close it. Raises LaunchError.
    """

    host = platform.node()
    library = "none (one rank without a launcher)"
    threads = "multiple"  # what MPI allows threads to do
    numbers: tuple[int, ...] = (0,)  # of its ranks in MPI.COMM_WORLD
    members = frozenset({0})  # these numbers
    watchdog: Watchdog | None = None
    started = 1  # ranks
    run = ""  # what all ranks call this world, and nobody another one

    def __init__(self, parent: MPI.Intracomm | None = None) -> None:
        alone = parent is None and not env.launched(os.environ) and not library.loaded()
        starting = None if alone or library.loaded() else StartWatch()
        try:
            self._meet(parent, alone=alone)
        except Exception as error:
            if not alone and isinstance(error, MPI.Exception) and survivable():  # and the watch ends those that wait
                raise LostRanksError("a rank has died before all had met: the run ends") from error
            if starting is not None:
                starting.stop()
            raise
        if starting is not None:
            starting.stop()

    def _meet(self, parent: MPI.Intracomm | None, *, alone: bool) -> None:
        super().__init__(None if alone else (MPI.COMM_WORLD if parent is None else parent).Dup())
        if parent is None:
            check_launch(self.size, os.environ)
        self._whole: Group | None = None  # with the ranks that `keep` has left out, until `agree`
        self.started = self.size
        self.run = self.once(lambda: secrets.token_hex(8))
        if alone:
            return
        self._count()
        self.host = MPI.Get_processor_name()
        self.library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip()
        if self.library.startswith("MPICH Version:"):
            self.library = "MPICH " + self.library.split(":")[1].strip()
        levels = {
            MPI.THREAD_SINGLE: "single",
            MPI.THREAD_FUNNELED: "funneled",
            MPI.THREAD_SERIALIZED: "serialized",
            MPI.THREAD_MULTIPLE: "multiple",
        }
        self.threads = levels[MPI.Query_thread()]
        if self.size == MPI.COMM_WORLD.Get_size():
            here = [rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.index]]
            neighbours = self.subgroup(compact(here))
            told = neighbours.gather_objects((this_process(), shared_files()))
            neighbours.free()
            LAUNCHER.siblings = [sibling for sibling, _ in told if sibling != this_process()]
            unname(files for _, files in told)

    @property
    def rank(self) -> int:
        """Return this rank's number."""
        return self.index

    @property
    def is_broken(self) -> bool:
        """Whether this rank knows of a lost member, also among those that were left out, or the world was revoked."""
        return super().is_broken or (self._whole is not None and self._whole.is_broken)

    def _count(self) -> None:
        self.numbers = tuple(self.comm.group.Translate_ranks(None, MPI.COMM_WORLD.group))
        self.members = frozenset(self.numbers)

    def shrink(self) -> list[int]:
        """Leave the lost ranks out, in place: whoever holds this world sees the survivors, renumbered in their order.
        Returns the numbers of the lost in MPI.COMM_WORLD. All survivors call, after `revoke`, and wait for each other.

        No group made from this world can be used any more; none is freed, because that could wait for the lost."""
        whole, self._whole = self._whole or self, None
        comm, nodes = whole.comm, whole.nodes
        before = tuple(comm.group.Translate_ranks(None, MPI.COMM_WORLD.group))
        self.comm = cast("MPI.Intracomm", comm.Shrink())
        self.kin.intersection_update({self})
        self._renew(before, nodes)
        return [number for number in before if number not in self.members]

    def keep(self, ranks: Sequence[int]) -> Group:
        """Go on with these ranks alone, in their order: in place, as `shrink` does, which comes before. All ranks call.
        For the others this world stays as it is. Returns the group of all; until they `agree`, `shrink` and `revoke`
        concern all."""
        if len(ranks) == self.size:
            return self
        self._whole = Group(self.comm, self.nodes, self.kin)
        comm = cast("MPI.Intracomm", self.comm.Split(0 if self.rank in ranks else MPI.UNDEFINED, self.rank))
        if self.rank in ranks:
            self.comm = comm
            self._renew(self.numbers, self.nodes)
        elif self.watchdog is not None:
            self.watchdog.close()
        return self._whole

    def _renew(self, before: Sequence[int], nodes: Sequence[int]) -> None:
        """Learn anew who the ranks are, of those that had the numbers `before` on these nodes."""
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.size, self.index = self.comm.Get_size(), self.comm.Get_rank()
        self._count()
        known = dict(zip(before, nodes, strict=True))
        firsts: dict[int, int] = {}
        self.nodes = tuple(firsts.setdefault(known[number], i) for i, number in enumerate(self.numbers))
        if self.watchdog is not None:
            self.watchdog.meet(self, self.host)

    def watch(self, report: int | None = 60, end: int | None = 600) -> Watchdog:
        """Let a watchdog look after the ranks, with these seconds; return it. All ranks call."""
        if self.watchdog is None:
            self.watchdog = Watchdog(self, self.host)
        self.watchdog.report, self.watchdog.end = report, end
        return self.watchdog

    def unwatch(self) -> None:
        """Stop watching."""
        watchdog, self.watchdog = self.watchdog, None
        if watchdog is not None:
            watchdog.close()

    def free(self) -> None:
        super().free()
        self.unwatch()

    def agree(self) -> None:
        """Wait for all ranks, where one may be lost: then an error is raised on all of them alike. Those that were left
        out (`keep`) leave afterwards."""
        whole = self._whole or self
        if whole.size > 1 and survivable():
            whole.comm.Agree(1)
        if whole is not self:
            self.kin.discard(whole)
            self._whole = None

    def _agreed(self, error: NetTorrentError, where: str = "") -> NetTorrentError:
        """Return the error as all ranks of this world raise it; one of the package's faults ends the program all the
        same."""
        error.args = (f"{error}{where}",)
        error.agreed = self.members if not isinstance(error, RemoteError) else frozenset()
        return error

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks call."""
        found = np.array([flag], np.int32)
        self.maximum(found)
        return bool(found[0])

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Turn an error of one rank inside the `with` block into an error of all ranks.

        Every rank enters and leaves; inside there is no communication in which the others would wait for a failing
        rank. The first failing rank's NetTorrentError is raised on all (`agreed`), and names the rank if others had
        none; so is what the operating system says about a file. Any other exception passes through unchanged on its
        rank; the others raise an error that tells of it.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = in_one_line(error) or error
        if problem is not None and lost(problem, self):
            raise problem  # nobody waits for this rank: all are woken
        ours = problem if problem is None or isinstance(problem, NetTorrentError) else _foreign(problem)
        if not self._any(ours is not None):
            return
        found = self.gather_objects(ours)
        if problem is not None and not isinstance(problem, NetTorrentError):
            raise problem
        for rank, each in enumerate(found):
            if each is not None:
                alike = all(str(other) == str(each) for other in found)
                own = ours if alike and ours is not None else each  # which has its traceback
                raise self._agreed(own, "" if alike else f" (on rank {rank})") from None

    def once(self, make: Callable[[], T]) -> T:
        """Return rank 0's result of `make` on all ranks (pickled: at start-up only). Its NetTorrentError is raised on
        all ranks (`agreed`)."""
        made: T | None = None
        problem: Exception | None = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as error:
                problem = in_one_line(error) or error
        ours = problem if problem is None or isinstance(problem, NetTorrentError) else _foreign(problem)
        told = ours
        if self.size > 1:
            made, told = self.comm.bcast((made, ours))
        if problem is not None and not isinstance(problem, NetTorrentError):
            raise problem
        if told is not None:
            raise self._agreed(ours or told) from None
        return cast("T", made)

    def same(self, what: str, value: str) -> None:
        """Raise a LaunchError on all ranks unless every rank holds the same value."""
        first = self.comm.bcast(value) if self.size > 1 else value
        if not self._any(value != first):
            return
        values = self.gather_objects(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise self._agreed(
                    LaunchError(
                        f"rank {rank} has another {what} ({other}) than rank 0 ({values[0]}); "
                        "all ranks have to see the same files (pass the same arrays) and the same installation"
                    )
                )

    def abort(self, code: int) -> None:
        """End every rank of the program at once, also those outside this world; earlier output can still be read."""
        sys.stdout.flush()
        sys.stderr.flush()
        if library.loaded() and MPI.COMM_WORLD.Get_size() == 1 and not env.launched(os.environ):
            os._exit(code)  # MPI_Abort would say in many lines what it does, or that it cannot find these lines
        if library.loaded():
            end_all(code)


def _foreign(error: Exception) -> RemoteError:
    """Return the error that other ranks raise where one has failed by an error that is not the package's."""
    return RemoteError(f"{type(error).__name__}: {error}")


def check_launch(size: int, environment: Any) -> None:
    """Raise a LaunchError where the launcher started more ranks than MPI sees: N silent runs of one rank each."""
    launchers = (
        ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
        ("PMI_SIZE", "MPICH's or Intel's mpirun, or srun --mpi=pmi2"),
        ("MPI_LOCALNRANKS", "MPICH's mpirun"),
    )
    for variable, launcher in launchers:
        asked = environment.get(variable, "")
        if asked.isdigit() and int(asked) > 1 and size == 1:
            raise LaunchError(
                f"{launcher} started {asked} ranks ({variable}), but MPI sees 1: this mpirun belongs to another MPI "
                "than the library that mpi4py loaded; use the same MPI's mpirun (the PyPI wheel's lies beside python)"
            )
    if "SLURM_STEP_ID" in environment and size == 1 and not any(environment.get(v) for v, _ in launchers):
        tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
        if tasks.isdigit() and int(tasks) > 1:
            raise LaunchError(
                f"srun started {tasks} tasks (SLURM_NTASKS), but MPI sees 1 rank: srun and MPI did not find "
                "each other; try srun --mpi=pmi2 or --mpi=pmix (srun --mpi=list tells), or mpirun in sbatch"
            )
