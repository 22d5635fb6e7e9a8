"""This module describes a run from its beginning on, for run.json: the command, the layout, the hosts, the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nettorrent_mpi import __version__
from nettorrent_mpi.cores import processor
from nettorrent_mpi.engine.setup import Setup


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
