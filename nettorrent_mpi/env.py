"""The environment of BLAS and MPI, chosen before NumPy and mpi4py load (they read it only once).

Every rank calls `prepare` first. Only the standard library is imported here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

from nettorrent_mpi.cores import cores_of_node, own_cores, positive, ranks_on_node

# OpenBLAS and MKL read their own variable first, then OpenMP's.
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Idle threads of BLAS and of OpenMP (oneDNN's) sleep at once; otherwise both spin for milliseconds and keep other
# ranks from their cores. Measured with one rank of two threads (OpenBLAS 0.3.31, GNU
# OpenMP): the MLP of configs/mnist.yaml 15,700 samples/s instead of 6,000 (one thread: 9,900); NumPy alone loses 1 %.
_SLEEP = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
_YIELD = ("OMPI_MCA_mpi_yield_when_idle", "MPIR_CVAR_ENABLE_HEAVY_YIELD")  # of Open MPI and of MPICH
# Open MPI's component for one-sided messages between nodes looks for networks while MPI starts, and where it finds none
# that takes a second (measured with 5.0.11: 1.4 s instead of 0.4 s). Ranks of one node have no use for it.
_ONE_NODE = {"OMPI_MCA_btl": "^ofi"}
# Between nodes Open MPI asks a receiver, over TCP, whether it is ready for a message of more than 64 KB, and on a busy
# link the answer waits behind what is under way. Pieces of gradients, of up to half a megabyte (comm/reducers.py), are
# received in any case. Measured on 4 hosts with links of 200 Mbit/s: a step of configs/mnist_wide.yaml takes 804 ms
# instead of 826 ms (means of four runs; PyTorch's DistributedDataParallel beside them: 807 ms).
_SEVERAL_NODES = {"OMPI_MCA_btl_tcp_eager_limit": str(520 << 10)}
_RANK = re.compile(r"RANK(_?ID)?$")  # OMPI_COMM_WORLD_RANK, PMI_RANK, PMIX_RANK, PALS_RANKID, ...
# What an earlier call chose, as NAME=VALUE words, so that child processes do not mistake it for the user's setting.
_CHOSEN = "NETTORRENT_MPI_CHOSEN"


def prepare() -> str:
    """Set the number of BLAS threads and the waiting mode for this rank; return one line that describes what was chosen
    and what was kept.

    BLAS threads = cores of the node / ranks on the node, at most the cores that this process may run on, at least 1. If
    ranks outnumber cores, waiting ranks yield. Measured with 8 ranks on 2 cores, a small product and an Allreduce per
    step: 1 ms instead of 94 ms where Open MPI did not know that it was oversubscribed; with MPICH, while other programs
    kept the cores busy as well, 5 ms instead of 19 ms.

    A variable that the user set is never changed, unless it is no number of threads: OpenBLAS would start a thread for
    every CPU. OMP_NUM_THREADS controls every BLAS, so if the user set it, no other thread count is set.
    """
    for name in os.environ.keys() - given(os.environ).keys():
        del os.environ[name]
    ignored = {name: os.environ.pop(name) for name in _THREADS if name in os.environ and not _threads(os.environ[name])}
    ranks = ranks_on_node(os.environ)
    cores = cores_of_node(os.environ)
    threads = max(1, min(cores // ranks, own_cores()))

    wanted: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in os.environ:
        wanted.update({name: str(threads) for name in _THREADS})
    used = _threads(os.environ.get("OMP_NUM_THREADS", str(threads)))
    if used != 1:
        wanted.update(_SLEEP)
    wanted.update(_ONE_NODE if on_one_node(os.environ) else _SEVERAL_NODES)
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
        if used > threads:
            words.append(f"{_several(ranks * used, 'thread')} on {_several(cores, 'core')}, which slows them down")
    if ignored:
        words.append("no number of threads: " + " ".join(f"{name}={value!r}" for name, value in ignored.items()))
    return "; ".join(words)


def given(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment as the user set it, without what `prepare` chose."""
    ours = set(environ.get(_CHOSEN, "").split())
    return {name: value for name, value in environ.items() if name != _CHOSEN and f"{name}={value}" not in ours}


def launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process, perhaps as one rank of many. Every launcher has a variable of its
    own for the rank's number; a step of srun without MPI's help has only Slurm's."""
    return positive(environ.get("SLURM_STEP_NUM_TASKS")) > 1 or any(_RANK.search(name) for name in environ)


def outnumber_cores(environ: Mapping[str, str]) -> bool:
    """Whether ranks outnumber cores, so that waiting ranks yield: as `prepare` found, or as the user says."""
    return any(environ.get(name) == "1" for name in _YIELD)


def on_one_node(environ: Mapping[str, str]) -> bool:
    """Whether all ranks of the run are on this node according to the launcher; False if unknown."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return environ["OMPI_COMM_WORLD_SIZE"] == environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if "SLURM_STEP_ID" in environ:
        return environ.get("SLURM_STEP_NUM_NODES") == "1"
    return not any(name in environ for name in ("PMIX_RANK", "PMI_RANK"))


def _threads(text: str) -> int:
    """Return the number of threads in a thread variable, 0 if there is none; OMP_NUM_THREADS may list one for each
    level of nested loops, outermost first: "4,2"."""
    return positive(text.partition(",")[0].strip())


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
