"""NCCL on one rank, and on two ranks that share the GPU where NCCL can (2.30 and later); staged where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.record import Record, Skipped
from nettorrent_mpi.cli.launching import as_root, find_mpirun
from nettorrent_mpi.plan.errors import LaunchError
from nettorrent_mpi.speedup.machine import Launcher

ROOT = Path(__file__).resolve().parents[2]
REFUSED = "skipped: "  # how a line of the ranks' begins where NCCL cannot


class RanksFailed(Exception):  # noqa: N818
    """Raised with the end of what the ranks printed."""


def run(record: Record) -> None:
    for ranks in (1, 2):
        lines: list[str] = []
        with record.case(f"{ranks} rank{'s' if ranks > 1 else ''}") as figures:
            if ranks > 1:
                require_mpirun()
            lines = launched(ranks, record)
            refusals = [line.removeprefix(REFUSED) for line in lines if line.startswith(REFUSED)]
            if refusals:
                raise Skipped(refusals[0])
            figures.update(json.loads(lines[0]))
        for told in map(json.loads, (line for line in lines[1:] if line.startswith("{"))):
            with record.case(f"{ranks}: {told.pop('case')}") as figures:
                figures.update(told)


def launched(ranks: int, record: Record) -> list[str]:
    """Return the lines that rank 0 of `nccl_ranks` prints."""
    program = [sys.executable, "-m", "benchmarks.gpu.nccl_ranks", *(["--host"] if record.host else [])]
    command = Launcher().command(ranks, program) if ranks > 1 else program
    half = record.left if ranks > 1 else record.left / 2
    return output_of(command, half)


def output_of(command: list[str], seconds: float) -> list[str]:
    """Return the lines that a program prints. Raises RanksFailed with the end of its output if it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=max(seconds, 1),
        check=False,
    )
    if done.returncode:
        raise RanksFailed(f"exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return [line for line in done.stdout.splitlines() if line.strip()]


def environment() -> dict[str, str]:
    """Return the environment of ranks."""
    return {**os.environ, **as_root(), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def require_mpirun() -> None:
    """Raise Skipped where there is no mpirun."""
    try:
        find_mpirun()
    except LaunchError as error:
        raise Skipped(str(error)) from None
