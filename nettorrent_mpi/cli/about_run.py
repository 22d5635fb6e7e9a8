"""This module describes a run: from its beginning on for run.json, by command, layout, hosts and versions; at its end
for summary.json, by what it took and what was predicted."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nettorrent_mpi import __version__
from nettorrent_mpi.cli.run_folder import commit
from nettorrent_mpi.cores import processor
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.planning import PlannedRun


def about_run(setup: Setup, arguments: Sequence[str], hosts: Sequence[str], mpi: str) -> dict[str, Any]:
    """Describe a run that begins or goes on: what does not change before it ends. `hosts` are those of the ranks."""
    topology, names = setup.topology, [facts.name for facts in setup.network.facts]
    system = os.uname()  # platform.platform() starts a process
    return {
        "arguments": list(arguments),
        "folder": os.getcwd(),
        "job": os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID"),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
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
        "exchange": setup.config.exchange.kind,
        "pipeline": setup.config.pipeline.kind,
        "device": setup.options.device,
        "processor": processor(),
        "system": f"{system.sysname} {system.release} {system.machine}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "mpi": mpi,
        "version": __version__,
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
