"""The cores of this node that the ranks of a run share.

Only the standard library is imported here, because threads are set before NumPy loads.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")  # of Open MPI, of MPICH and Intel MPI
# This rank's number on its node: of Open MPI, of MPICH and Intel MPI, of MVAPICH, of HPE's PALS, of Flux.
_LOCAL_NUMBERS = (
    "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "PALS_LOCAL_RANKID",
    "FLUX_TASK_LOCAL_ID",
)  # fmt: skip
_STEP = "SLURM_STEP_TASKS_PER_NODE"


def cores_of_node(environ: Mapping[str, str]) -> int:
    """Return the number of cores of this node that the ranks of the run share: those on which any of them may run, and
    no more than the processor time that control groups allow, or the CPUs that Slurm has allocated.

    A core with several hardware threads counts once. A part of a core counts for nothing, unless there is no other:
    with time for 1.5 cores two threads of BLAS made a third of the products that one made (OpenBLAS 0.3.31, on a busy
    machine), because the system stops one of them while the other waits for it.
    """
    cores = count_cores(_cpus_of_ranks(environ))
    given = positive(environ.get("SLURM_CPUS_ON_NODE"))
    return max(1, int(min(cores, given or cores, time_allowed())))


def own_cores() -> int:
    """Return the number of cores on which this process may run."""
    return count_cores(_allowed(0))


def ranks_on_node(environ: Mapping[str, str]) -> int:
    """Return the number of ranks on this node, as reported by Open MPI, MPICH, Intel MPI or Slurm's srun; else 1."""
    for name in _LOCAL_RANKS:
        count = positive(environ.get(name))
        if count:
            return count
    # Slurm sets SLURM_TASKS_PER_NODE in the batch shell too, where a program started without srun is alone: only a step
    # of srun has SLURM_STEP_TASKS_PER_NODE.
    if _STEP in environ:
        node = environ.get("SLURM_NODEID", "0")
        counts = tasks_per_node(environ.get(_STEP, ""))
        if node.isdecimal() and int(node) < len(counts):
            return max(1, counts[int(node)])
    return 1


def local_rank(environ: Mapping[str, str]) -> int | None:
    """Return this rank's number among those on its node, from 0 on, as its launcher gives it; None if unknown."""
    # Slurm's own is set in the batch shell too, where it says nothing of the ranks that mpirun starts from there.
    names = (*_LOCAL_NUMBERS, "SLURM_LOCALID") if _STEP in environ else _LOCAL_NUMBERS
    return next((int(environ[name]) for name in names if environ.get(name, "").isdecimal()), None)


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's short form of tasks per node: "4(x2),3" -> [4, 4, 3]. Any other text gives an empty list."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def positive(text: str | None) -> int:
    """Return the number in `text`, or 0."""
    return int(text) if text is not None and text.isdecimal() else 0


# -- affinity ----------------------------------------------------------------------------------------------------------


def _cpus_of_ranks(environ: Mapping[str, str]) -> set[int]:
    """Return the CPUs on which the ranks of this node may run.

    Launchers bind each rank to cores of its own, and programs between launcher and rank (taskset, numactl, a script)
    bind it as they like, so one rank's affinity says little. All descend from the launcher's daemon, the first ancestor
    without the launcher's variable; as long as not all can be seen, the daemon's CPUs count: limits of the whole run
    are its limits, too. A rank that may run on every CPU looks at no other: each would read what the system tells of
    all, which took 64 ranks of 2 cores 0.3 s.
    """
    cpus, ranks = _allowed(0), ranks_on_node(environ)
    if ranks == 1 or len(cpus) == os.cpu_count():
        return cpus
    variable = next(name for name in (*_LOCAL_RANKS, _STEP) if name in environ)
    daemon = os.getppid()
    while daemon > 1 and _has(daemon, variable):
        daemon = _parent(daemon)
    seen = _ranks_below(daemon, variable)
    return cpus.union(*(_allowed(rank) for rank in seen), _allowed(daemon) if len(seen) < ranks else set())


def _ranks_below(process: int, variable: str) -> list[int]:
    """Return the last descendants of a process that have the launcher's variable."""
    found = []
    for child in _children(process):
        if _has(child, variable):
            found += _ranks_below(child, variable) or [child]
    return found


def _has(process: int, variable: str) -> bool:
    """Whether a process was started with this variable; False if unknown."""
    try:
        return f"\0{variable}=".encode() in b"\0" + (PROC / str(process) / "environ").read_bytes()
    except OSError:
        return False


def _parent(process: int) -> int:
    try:
        return int(_text(PROC / str(process) / "stat").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _children(process: int) -> list[int]:
    try:
        lists = [_text(task) for task in (PROC / str(process) / "task").glob("*/children")]
    except OSError:
        return []
    return [int(word) for text in lists for word in text.split()]


def _allowed(process: int) -> set[int]:
    """Return the CPUs that a process (0: this one) may run on; empty if unknown."""
    try:
        return os.sched_getaffinity(process)
    except (AttributeError, OSError):  # not Linux; the process is gone or hidden
        return set()


def count_cores(cpus: set[int]) -> int:
    """Return the number of cores of these CPUs (hardware threads), or of the whole machine if there are none."""
    cores = {_siblings(cpu) for cpu in cpus}
    return len(cores) or os.cpu_count() or 1


def _siblings(cpu: int) -> str:
    """Return the CPUs of the same core in Linux's notation: the same text for each of them."""
    try:
        return _text(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    except OSError:
        return str(cpu)


# -- control groups ----------------------------------------------------------------------------------------------------


def time_allowed(proc: Path = PROC) -> float:
    """Return the processor time that Linux's control groups, of version 1 or 2, allow this process and all others of
    its group: seconds per second, infinite without a limit."""
    allowed = math.inf
    for folder, limit in _folders(proc):
        try:
            numbers = " ".join(_text(folder / name) for name in limit).split()
            if numbers[0] not in ("max", "-1"):
                allowed = min(allowed, int(numbers[0]) / int(numbers[1]))
        except (OSError, ValueError, IndexError, ZeroDivisionError):  # the topmost group has no limit
            continue
    return allowed


_LIMITS = {"cgroup2": ("cpu.max",), "cgroup": ("cpu.cfs_quota_us", "cpu.cfs_period_us")}


def _folders(proc: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """Return this process's group and those around it, with the names of the files that have their limits.

    A container sees its own group where others see the topmost one, with or without the path to it.
    """
    try:
        groups = [line.partition(":")[2].partition(":") for line in _text(proc / "self" / "cgroup").splitlines()]
        mounts = [line.split(" - ") for line in _text(proc / "self" / "mountinfo").splitlines()]
    except OSError:  # not Linux
        return []
    found = []
    for where, what in (mount for mount in mounts if len(mount) == 2):
        kind, options = what.split()[0], what.split()[-1].split(",")
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options):
            controller = "" if kind == "cgroup2" else "cpu"
            group = next((path for names, _, path in groups if controller in names.split(",")), "/")
            root, place = where.split()[3:5]
            inside = PurePosixPath(group)
            below = inside.relative_to(root).parts if inside.is_relative_to(root) and ".." not in inside.parts else ()
            found += [(Path(place, *below[:depth]), _LIMITS[kind]) for depth in range(len(below) + 1)]
    return found


def _text(path: Path) -> str:
    """Read a file whose text, as the names of programs and folders, may be in any encoding."""
    return path.read_text(encoding="utf-8", errors="replace")


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in told:
        return platform.machine()
    # Virtual machines often omit the number from the name: AMD EPYC can be any of five generations.
    numbers = ", ".join(
        f"{word} {told[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in told
    )
    return f"{told['model name']} ({numbers})" if numbers else told["model name"]
