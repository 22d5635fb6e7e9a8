"""20 steps on a GPU give the weights that one rank gives on the CPU, on 1, 2 and 4 ranks (which share the GPU)."""

from __future__ import annotations

import json
import sys

from benchmarks.gpu.collectives import output_of, require_mpirun
from benchmarks.gpu.on_device import check
from benchmarks.gpu.record import Record
from nettorrent_mpi.speedup.machine import Launcher

RANKS = (1, 2, 4)
LIMITS = {"float32": 1e-4, "float64": 1e-10}  # of the largest difference, relative to the largest weight of an array


def run(record: Record) -> None:
    for number, ranks in enumerate(RANKS):
        lines: list[str] = []
        with record.case(f"{ranks} rank{'s' if ranks > 1 else ''}") as figures:
            program = [sys.executable, "-m", "benchmarks.gpu.parity_ranks", *(["--host"] if record.host else [])]
            if ranks > 1:
                require_mpirun()
                program = Launcher().command(ranks, program)
            lines = output_of(program, record.left / (len(RANKS) - number))
            figures["trainings"] = len(lines)
        for told in map(json.loads, (line for line in lines if line.startswith("{"))):
            with record.case(f"{ranks}: {told.pop('case')}") as figures:
                figures.update(told)
                check(told["difference"], LIMITS[told["dtype"]])
