"""The environment of BLAS and MPI, chosen before NumPy and mpi4py load (they read it once, when they do).

Every rank calls `prepare` first. Only the standard library is imported here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

# OpenBLAS and MKL read their own variable first, then OpenMP's.
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Threads of BLAS and of OpenMP (oneDNN's) that have nothing to do sleep at once, instead of keeping the others from
# their cores: both spin otherwise, for milliseconds. Measured with one rank of two threads (OpenBLAS 0.3.31, GNU
# OpenMP): the MLP of configs/mnist.yaml 15,700 samples/s instead of 6,000 (one thread: 9,900); NumPy alone loses 1 %.
_SLEEP = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
_YIELD = ("OMPI_MCA_mpi_yield_when_idle", "MPIR_CVAR_ENABLE_HEAVY_YIELD")  # of Open MPI and of MPICH
# Open MPI 5.0.11 prints an error of its UCX component whenever shared memory is made, which another component does.
_QUIET = {"OMPI_MCA_osc": "^ucx"}
# Open MPI's component for one-sided messages between nodes looks for networks while MPI starts, and where it finds none
# that takes a second (measured with 5.0.11: 1.4 s instead of 0.4 s). Ranks of one node have no use for it.
_ONE_NODE = {"OMPI_MCA_btl": "^ofi"}
# What an earlier call chose, as NAME=VALUE words: a process that this one starts must not take it for the user's wish.
_CHOSEN = "NETTORRENT_MPI_CHOSEN"


def prepare() -> str:
    """Set BLAS threads and ways of waiting for this rank; tell in one line what was chosen and what was kept.

    BLAS threads = cores of the node / ranks on the node, at most the cores that this process may run on, at least 1.
    Ranks that outnumber the cores yield while they wait. Measured with 8 ranks on 2 cores, a small product and an
    Allreduce per step: 1 ms instead of 94 ms where Open MPI did not know that it was oversubscribed; with MPICH, while
    other programs kept the cores busy as well, 5 ms instead of 19 ms.

    A variable that the user set is never changed. OMP_NUM_THREADS rules every BLAS, so where the user set it, no other
    number of threads is set.
    """
    for name in os.environ.keys() - given(os.environ).keys():
        del os.environ[name]
    ranks = ranks_on_node(os.environ)
    cores = cores_of_node(os.environ)
    threads = max(1, min(cores // ranks, _count_cores(_allowed(0))))

    wanted = dict(_QUIET)
    if "OMP_NUM_THREADS" not in os.environ:
        wanted.update({name: str(threads) for name in _THREADS})
    if os.environ.get("OMP_NUM_THREADS", str(threads)) != "1":
        wanted.update(_SLEEP)
    if on_one_node(os.environ):
        wanted.update(_ONE_NODE)
    if ranks > cores:
        wanted.update(dict.fromkeys(_YIELD, "1"))
    chosen = {name: value for name, value in wanted.items() if name not in os.environ}
    kept = [name for name in (*_THREADS, *_YIELD) if name in os.environ]
    os.environ.update(chosen)
    os.environ[_CHOSEN] = " ".join(f"{name}={value}" for name, value in chosen.items())

    words = [f"{_several(ranks, 'rank')} on {_several(cores, 'core')} of this node"]
    if any(name in chosen for name in _THREADS):
        words.append(f"{_several(threads, 'BLAS thread')} each")
        if "numpy" in sys.modules:
            words.append("too late for NumPy, which is loaded already")
    if any(name in chosen for name in _YIELD):
        words.append("waiting ranks yield")
    if kept:
        words.append("kept from the environment: " + " ".join(f"{name}={os.environ[name]}" for name in kept))
    return "; ".join(words)


def given(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what `prepare` chose: as the user has it."""
    ours = set(environ.get(_CHOSEN, "").split())
    return {name: value for name, value in environ.items() if name != _CHOSEN and f"{name}={value}" not in ours}


def ranks_on_node(environ: Mapping[str, str]) -> int:
    """How many ranks the launcher put on this node: told by Open MPI, MPICH and Intel MPI, or Slurm's srun; else 1."""
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"):
        count = _positive(environ.get(name))
        if count:
            return count
    # Slurm sets SLURM_TASKS_PER_NODE in the batch shell too, where a program started without srun is alone: only a step
    # of srun has SLURM_STEP_TASKS_PER_NODE.
    if "SLURM_STEP_TASKS_PER_NODE" in environ:
        node = environ.get("SLURM_NODEID", "0")
        counts = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        if node.isdecimal() and int(node) < len(counts):
            return max(1, counts[int(node)])
    return 1


def on_one_node(environ: Mapping[str, str]) -> bool:
    """Are all ranks of the run on this node, as far as the launcher tells? False where that cannot be known."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return environ["OMPI_COMM_WORLD_SIZE"] == environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if "SLURM_STEP_ID" in environ:
        return environ.get("SLURM_STEP_NUM_NODES") == "1"
    return not any(name in environ for name in ("PMIX_RANK", "PMI_RANK"))


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of tasks on each node: "4(x2),3" is [4, 4, 3]. Anything else gives an empty list."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def cores_of_node(environ: Mapping[str, str]) -> int:
    """Cores of this node that the ranks of the run share.

    mpirun binds a rank to its own core, so a rank's own affinity may be one core of many; its parent, the launcher's
    daemon, is not bound, but shares the limits (taskset, a container) that hold for all. A core with several hardware
    threads counts once. A Slurm job counts no more CPUs than it was given.
    """
    cores = _count_cores(_allowed(0) | (_allowed(os.getppid()) if ranks_on_node(environ) > 1 else set()))
    given = _positive(environ.get("SLURM_CPUS_ON_NODE"))
    return min(cores, given) if given else cores


def _allowed(process: int) -> set[int]:
    """The CPUs that a process (0: this one) may run on; empty where that cannot be known."""
    try:
        return os.sched_getaffinity(process)
    except (AttributeError, OSError):  # not Linux; the process is gone or hidden
        return set()


def _count_cores(cpus: set[int]) -> int:
    """How many cores the CPUs (hardware threads) belong to; of the whole machine if the set is empty."""
    cores = {_siblings(cpu) for cpu in cpus}
    return len(cores) or os.cpu_count() or 1


def _siblings(cpu: int) -> str:
    """The CPUs of the same core, as Linux writes them: the same text for each of them."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _positive(text: str | None) -> int:
    """The number in `text`, 0 if there is none."""
    return int(text) if text is not None and text.isdecimal() else 0


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
