"""The world: starting MPI, failing together, and groups of ranks."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, cast

import mpi4py
import numpy as np

mpi4py.rc.thread_level = "multiple"

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi.comm.group import Group  # noqa: E402
from nettorrent_mpi.comm.shared import free_all  # noqa: E402
from nettorrent_mpi.plan.errors import LaunchError, NetTorrentError, UserError  # noqa: E402

T = TypeVar("T")
INTERRUPTED = 130  # exit code, as shells count: 128 + SIGINT


class AgreedError(UserError):
    """An error that every rank knows of and raises; rank 0 tells it."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.exit_code = code


class World(Group):
    """All ranks of the run: a duplicate of MPI_COMM_WORLD (or of another communicator), whose errors are exceptions."""

    def __init__(self, parent: MPI.Intracomm | None = None) -> None:
        comm = (MPI.COMM_WORLD if parent is None else parent).Dup()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        super().__init__(comm)
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
        self.threads = levels[MPI.Query_thread()]  # what MPI allows threads to do
        self._groups: dict[tuple[int, ...], Group] = {}

    @property
    def rank(self) -> int:
        return self.index

    def group(self, ranks: Sequence[int]) -> Group:
        """The group of these ranks, in this order. Its members, and nobody else, call this, in the same order.

        Asking again for the same ranks gives the same group.
        """
        key = tuple(ranks)
        assert self.rank in key
        if key not in self._groups:
            if len(key) == self.size and key == tuple(range(self.size)):
                self._groups[key] = self
            else:
                members = self.comm.group.Incl(key)
                comm = self.comm.Create_group(members, tag=_group_tag(key))
                comm.Set_errhandler(MPI.ERRORS_RETURN)
                members.Free()
                self._groups[key] = Group(comm)
        return self._groups[key]

    def free_groups(self) -> None:
        """Throw away every group that was made."""
        for group in self._groups.values():
            if group is not self:
                group.comm.Free()
        self._groups.clear()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every rank does by itself, and may fail at: an error of one becomes an error of all.

        Every rank enters and leaves; inside there is no communication that a failing rank would leave waiting. The
        first failing rank's error is raised on all, as an AgreedError with its exit code; what is not a NetTorrentError
        passes through as it is (and ends the run).
        """
        problem: tuple[str, int] | None = None
        try:
            yield
        except NetTorrentError as error:
            problem = (str(error), error.exit_code)
        found = self.comm.allgather(problem)
        for rank, each in enumerate(found):
            if each is not None:
                some = "" if all(f == each for f in found) else f" (on rank {rank})"
                raise AgreedError(each[0] + some, each[1])

    def once(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, for all (pickled: at start-up). Its NetTorrentError is raised on all (AgreedError)."""
        made: T | None = None
        problem: tuple[str, int] | None = None
        if self.rank == 0:
            try:
                made = make()
            except NetTorrentError as error:
                problem = (str(error), error.exit_code)
        made, problem = self.comm.bcast((made, problem))
        if problem is not None:
            raise AgreedError(*problem)
        return cast("T", made)

    def same(self, what: str, value: str) -> None:
        """LaunchError on all ranks unless every rank holds the same value."""
        values = self.comm.allgather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise AgreedError(
                    f"rank {rank} has another {what} ({other}) than rank 0 ({values[0]}); "
                    "all ranks have to see the same files and the same installation",
                    LaunchError.exit_code,
                )

    def sum_numbers(self, *values: float) -> list[float]:
        """The sums over all ranks of a few float64 numbers."""
        array = np.array(values, np.float64)
        self.sum(array)
        return [float(value) for value in array]

    def abort(self, code: int) -> None:
        """End every rank of the run at once, with what was written before still to be read."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.3)  # MPICH's mpirun drops what it has not passed on yet when the ranks end (seen)
        MPI.COMM_WORLD.Abort(code)


def _group_tag(ranks: tuple[int, ...]) -> int:
    """A tag for making this group, so that groups that share ranks are not mistaken for one another."""
    return sum((i + 1) * (rank + 7) for i, rank in enumerate(ranks)) % 30000


def start() -> World:
    """Initialise MPI, check the launch, and arrange that no rank outlives another's failure."""
    world = World()
    _install_abort_hooks(world)
    check_launch(world.size, os.environ)
    return world


def check_launch(size: int, environment: Any) -> None:
    """LaunchError where the launcher started more ranks than MPI sees: N silent runs of one rank each."""
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


def _install_abort_hooks(world: World) -> None:
    """An exception that nobody catches, in any thread, shows its traceback and ends all ranks."""

    def fail(kind: type[BaseException], value: BaseException | None, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, value, trace))
        sys.stderr.write(f"rank {world.rank} of {world.size} on {world.host} failed:\n{text}")
        world.abort(getattr(value, "exit_code", 1))

    def fail_in_thread(info: threading.ExceptHookArgs) -> None:
        fail(info.exc_type, info.exc_value, info.exc_traceback)

    sys.excepthook = fail
    threading.excepthook = fail_in_thread


def run_main(world: World, body: Callable[[], int]) -> int:
    """Run a program's body; give its exit code. Nobody hangs when one rank fails.

    An AgreedError is known to all ranks: rank 0 tells it in one line and every rank ends with its code. A user's
    mistake or a divergence seen by one rank alone is told by that rank in one line; anything else with its traceback;
    both end all ranks at once.
    """
    try:
        code = body()
    except AgreedError as error:
        if world.rank == 0:
            sys.stderr.write(f"nettorrent: error: {error}\n")
        code = error.exit_code
    except NetTorrentError as error:
        sys.stderr.write(f"nettorrent: error: {error}\n")
        world.abort(error.exit_code)
        return error.exit_code
    except SystemExit as error:  # one rank leaves in the middle of what all do together: the others would wait for it
        code = error.code if isinstance(error.code, int) else 1
        world.abort(code)
        return code
    except KeyboardInterrupt:
        if world.rank == 0:
            sys.stderr.write("nettorrent: interrupted\n")
        world.abort(INTERRUPTED)
        return INTERRUPTED
    free_all()
    return code
