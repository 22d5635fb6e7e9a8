"""This module describes a run: from its beginning on for run.json, by command, layout, hosts and versions, and by the
parts that it had before, each of which began with a command of its own or on other ranks; at its end for summary.json,
by what it took and what was predicted."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nettorrent_mpi import __version__
from nettorrent_mpi.cli.run_folder import commit
from nettorrent_mpi.cores import processor
from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.env import given
from nettorrent_mpi.planning import PlannedRun

# What a part of a run keeps of its run.json when the next one begins.
KEPT = (
    "arguments", "folder", "job", "began", "after", "source", "lost", "ranks", "layout", "steps", "seed", "exchange",
    "pipeline", "device", "processor", "system", "python", "numpy", "mpi", "version", "commit", "environment", "ended",
    "traced",
)  # fmt: skip
# Variables that change how a run computes or communicates, and what of them Open MPI's launcher sets by itself.
_VARIABLES = (
    "OMP_", "OPENBLAS_", "MKL_", "KMP_", "NUMBA_", "OMPI_MCA_", "PRTE_MCA_", "MPIR_CVAR_", "I_MPI_", "UCX_", "FI_",
    "CUDA_", "CUPY_", "NCCL_", "MPI4PY_", "NETTORRENT_START_SECONDS",
)  # fmt: skip
_LAUNCHERS = ("OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs", "OMPI_MCA_ess")


def about_run(
    setup: Setup,
    arguments: Sequence[str],
    hosts: Sequence[str],
    mpi: str,
    *,
    after: int = 0,
    source: str | None = None,
    lost: str | None = None,
    earlier: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Describe a run that begins or goes on: what does not change before it ends. `hosts` are those of the ranks.

    after: the step after which this part of the run begins.
    source: where its state came from, if after is not 0.
    lost: a line about the ranks without which it goes on, if it began by that.
    earlier: the parts before, from `parts_before`.
    """
    topology, names = setup.topology, [facts.name for facts in setup.network.facts]
    system = os.uname()  # platform.platform() starts a process
    return {
        "arguments": list(arguments),
        "folder": os.getcwd(),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID"),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "after": after,
        "source": source,
        "lost": lost,
        "ranks": topology.size,
        "layout": setup.layout_line,
        "replicas": topology.replicas,
        "stages": [
            {"layers": names[stage.first : stage.stop], "rows": stage.rows, "cols": stage.cols}
            for stage in topology.stages
        ],
        "hosts": list(hosts),
        "steps": setup.steps,
        "steps_per_epoch": setup.sampler.steps_per_epoch,
        "evaluate_every": setup.config.train.evaluate_every * setup.sampler.steps_per_epoch,
        "seed": setup.config.seed,
        "exchange": setup.config.exchange.kind,
        "pipeline": setup.config.pipeline.kind,
        "device": setup.options.device,
        "processor": processor(),
        "system": f"{system.sysname} {system.release} {system.machine}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi": mpi,
        "version": __version__,
        "commit": commit(),
        "environment": {
            name: value
            for name, value in sorted(given(os.environ).items())
            if name.startswith(_VARIABLES) and not name.startswith(_LAUNCHERS)
        },
        "earlier": list(earlier),
    }


def about_results(planned: PlannedRun, rate: float | None, peak: int, on_gpu: int) -> dict[str, Any]:
    """Describe a run that has ended, besides its training: its rank with most memory took `peak` bytes, `on_gpu` of a
    GPU's for arrays, and it trained `rate` rows per second, if that is known."""
    more: dict[str, Any] = {
        "peak_memory_mb": round(peak / 1e6, 1),
        "memory_estimate_mb": round(max(each.total for each in planned.memory) / 1e6, 1),
        "commit": commit(),
        "version": __version__,
    }
    if rate:
        more["seconds_per_step"] = planned.config.train.batch_size / rate
        if planned.setup.machine.source and planned.setup.options.device == "cpu":
            more["seconds_per_step_predicted"] = planned.seconds_per_step
    if on_gpu:
        predicted = max(each.total - each.libraries for each in planned.gpu_memory)
        more |= {"gpu_arrays_mb": round(on_gpu / 1e6, 1), "gpu_arrays_estimate_mb": round(predicted / 1e6, 1)}
    return more


def parts_before(folder: Path, after: int) -> list[dict[str, Any]]:
    """Return the parts that the run in a folder has had, as far as they lead to step `after`, with the step `until`
    which each counts, its hosts and its complete configuration. What cannot be read is left out."""
    told: Any = None
    with suppress(OSError, ValueError):
        told = parsed((folder / "run.json").read_bytes())
    if not isinstance(told, dict):
        return []
    part = {name: told[name] for name in KEPT if name in told}
    hosts = told.get("hosts")
    part["hosts"] = list(dict.fromkeys(map(str, hosts))) if isinstance(hosts, list) else []
    with suppress(OSError, ValueError):
        part["config"] = (folder / "config.yaml").read_text(encoding="utf-8")
    earlier = told.get("earlier")
    found = [each for each in [*(earlier if isinstance(earlier, list) else []), part] if isinstance(each, dict)]
    counting = [each for each in found if isinstance(each.get("after"), int) and each["after"] < after]
    ends = [*(each["after"] for each in counting[1:]), after]
    return [each | {"until": end} for each, end in zip(counting, ends, strict=False)]  # none, if none counts
