"""Checks of what surrounds a rank: the launcher's and the user's variables, cores and threads, limits of the system."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nettorrent_mpi.cli.launching import as_root, find_mpirun, is_open_mpi, version_of
from nettorrent_mpi.cores import cores_of_node, own_cores, positive, ranks_on_node, time_allowed
from nettorrent_mpi.doctor.finding import Finding, fault, ok, warning
from nettorrent_mpi.env import given
from nettorrent_mpi.plan.errors import LaunchError

INSTALL = "load your site's MPI module, or pip install 'nettorrent_mpi[mpi]'"
FILES, FEW = 48, 256  # that a rank, or mpirun, has open, and 2 more for each rank: seen 22 with Open MPI, 46 with MPICH
STACK = 1 << 20  # bytes
LOCKED = 64 << 20  # bytes that InfiniBand's libraries pin at least
FABRICS = Path("/sys/class/infiniband")
# Two ranks, started as a training's are. What World says of a launcher and a library that differ is its last line.
_PAIR = """
from nettorrent_mpi import env
env.prepare()
from nettorrent_mpi.comm.world import World
world = World()
if world.rank == 0:
    print(f"{world.library}, {world.size} ranks, threads: {world.threads}", flush=True)
"""


class Surroundings(NamedTuple):
    """Surroundings tell which rank checks: its number of `size`, its `local` one among the `here` of
    its node, and whether a launcher started it at all; `output` is the folder for results."""

    output: Path
    rank: int = 0
    size: int = 1
    here: int = 1  # ranks on its node
    local: int = 0  # its number there
    launched: bool = False
    seconds: float = 30.0  # that a check may take

    @property
    def first(self) -> bool:
        """Whether it is the first rank of its node."""
        return self.local == 0

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment as the user set it."""
        return given(os.environ)


def look_at_libraries(place: Surroundings) -> Iterator[Finding]:
    """Check the variables that choose libraries."""
    lost = [each for each in place.environ.get("LD_PRELOAD", "").replace(":", " ").split() if _is_lost(each)]
    if lost:
        yield warning(f"LD_PRELOAD names {', '.join(lost)}, which is not there", "unset LD_PRELOAD, or correct it")
    library = place.environ.get("MPI4PY_LIBMPI", "")
    if library and _is_lost(library):
        yield fault(
            f"MPI4PY_LIBMPI names {library}, which is not there: MPI cannot be loaded",
            "unset MPI4PY_LIBMPI, so that mpi4py finds MPI itself, or give the path of the site's libmpi.so",
        )
    elif not lost:
        yield ok(f"MPI4PY_LIBMPI={library}" if library else "no variable replaces MPI")


def _is_lost(library: str) -> bool:
    return "/" in library and "$" not in library and not os.path.exists(library)


def look_at_launcher(place: Surroundings) -> Iterator[Finding]:
    """Start two ranks where none are, to see that launcher and library belong together."""
    if place.launched:
        yield ok(f"has started {place.size} rank{'s' if place.size > 1 else ''}")
        return
    alone = "a training has one rank, or fails under another MPI's mpirun"
    try:
        mpirun = find_mpirun()
    except LaunchError:
        yield warning("there is no mpirun beside this Python or on PATH: a training has one rank", INSTALL)
        return
    told = version_of(mpirun).strip().partition("\n")[0] or "tells no version"
    more = ["--oversubscribe"] if is_open_mpi(mpirun) else []
    command = [mpirun, *more, "-n", "2", sys.executable, "-c", _PAIR]
    try:
        done = subprocess.run(
            command, env=dict(place.environ) | as_root(), stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="replace", check=False, timeout=0.8 * place.seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield fault(f"{mpirun}, {told}, has not started two ranks within {0.8 * place.seconds:.0f} s", INSTALL)
        return
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.split("\n")[:1]
        reason = words[-1].rpartition("LaunchError: ")[2].strip() or f"exit code {done.returncode}"
        yield fault(f"{mpirun}, {told}, does not start ranks: {reason}", f"{INSTALL}; until then {alone}")
    else:
        yield ok(f"{mpirun}, {told}, starts ranks: {done.stdout.strip().splitlines()[-1]}")


def look_at_cores(place: Surroundings) -> Iterator[Finding]:
    """Check that ranks and threads have cores to run on."""
    environ = place.environ
    ranks, cores = ranks_on_node(environ), cores_of_node(environ)
    allowed, machine = time_allowed(), os.cpu_count() or 1
    reason = "it has no more"
    if allowed < own_cores():
        reason = f"a control group (of a container or a batch job) allows the processor time of {allowed:.1f}"
    elif cores < machine:
        reason = f"they may not run on others of its {machine} CPUs (taskset, a batch job), or two CPUs are one core"
    here = f"{ranks} rank{'s' if ranks > 1 else ''} on {cores} core{'s' if cores > 1 else ''} of this node"
    if ranks > cores:
        yield warning(
            f"{here}: {reason}; ranks wait for each other's turns",
            f"mpirun -n {cores}, or ask for more cores (Slurm: --cpus-per-task, a container: --cpus)",
        )
    threads = {name: text for name, text in environ.items() if name.endswith("_NUM_THREADS")}
    wrong = [f"{name}={text!r}" for name, text in threads.items() if not positive(text.partition(",")[0].strip())]
    if wrong:
        yield warning(f"{', '.join(wrong)}: no number of threads, and ignored", "give a number, or unset it")
    used = next((positive(threads[f"{name}_NUM_THREADS"].partition(",")[0].strip())
                 for name in ("OPENBLAS", "OMP", "MKL") if f"{name}_NUM_THREADS" in threads), 1)  # fmt: skip
    if used > 1 and ranks * used > cores:
        names = ", ".join(f"{name}={text}" for name, text in threads.items())
        yield warning(
            f"{names}: {ranks * used} threads of BLAS on {cores} core{'s' if cores > 1 else ''}, which slows them down",
            "unset it: the number of threads is then chosen by cores and ranks",
        )
    elif ranks <= cores:
        yield ok(here + (f" ({reason})" if cores < machine else ""))


def look_at_limits(place: Surroundings) -> Iterator[Finding]:
    """Check what the system lets a process take."""
    found = False
    files, wanted = resource.getrlimit(resource.RLIMIT_NOFILE)[0], FILES + 2 * place.size
    remedy = f"ulimit -n {max(1024, 4 * wanted)} before mpirun, in the job script"
    if 0 <= files < wanted + FEW - FILES:
        found = True
        told = f"a process may open {files} files"
        if files < wanted:
            yield fault(f"{told}, and MPI needs {wanted} for {place.size} rank{'s' * (place.size > 1)}", remedy)
        else:
            yield warning(f"{told}: few, where ranks lie on several nodes", remedy)
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if 0 <= stack < STACK:
        found = True
        yield warning(f"the stack of a process has {stack / 1e6:.1f} MB", "ulimit -s 8192 before mpirun")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if FABRICS.is_dir() and any(FABRICS.iterdir()) and 0 <= locked < LOCKED:
        found = True
        yield warning(
            f"there is InfiniBand, and a process may lock {locked / 1e6:.1f} MB of memory: MPI may fall back to TCP",
            "ulimit -l unlimited (under Slurm PropagateResourceLimitsExcept=MEMLOCK; ask your site)",
        )
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= space < 8 << 30:
        found = True
        yield warning(
            f"a process may have {space / 1e9:.1f} GB of addresses, which shared memory and libraries use up, too",
            "ulimit -v unlimited; limit memory by a control group instead",
        )
    if not found:
        shown = "unlimited" if files < 0 else f"{files:,}"
        yield ok(f"open files {shown}, stack {'unlimited' if stack < 0 else f'{stack / 1e6:.0f} MB'}")
