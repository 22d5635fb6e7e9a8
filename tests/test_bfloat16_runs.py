"""Runs in bfloat16 on CPU cores, through the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy comes from ml_dtypes")

ROOT = Path(__file__).resolve().parent.parent
Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_digits_are_learned_and_the_run_goes_on_in_float32(tmp_path: Path, mpirun: Mpirun) -> None:
    """Checkpoints have float32 weights, for any type and number of ranks."""
    command = ["-m", "nettorrent_mpi", "train", ROOT / "configs" / "digits.yaml", "--output", tmp_path]
    changes = [
        "--set",
        "device=cpu",
        "--set",
        "train.schedule=constant",
        "--set",
        "train.epochs={}",
        "--set",
        "dtype={}",
    ]
    done = mpirun(3, [*command, *(each.format(8 if "epochs" in each else "bfloat16") for each in changes)])
    assert done.returncode == 0, done.stderr
    first = summary(tmp_path)
    assert first["test_accuracy"] > 0.94
    done = mpirun(1, [*command, *(each.format(9 if "epochs" in each else "float32") for each in changes), "--resume"])
    assert done.returncode == 0, done.stderr
    last = summary(tmp_path)
    assert last["steps"] == first["steps"] * 9 // 8
    assert last["test_accuracy"] > 0.94
    done = mpirun(1, ["-m", "nettorrent_mpi", "evaluate", tmp_path])
    assert done.returncode == 0, done.stderr
    assert "test: loss " in done.stdout


def test_numpy_alone_says_that_it_is_slower(tmp_path: Path, mpirun: Mpirun) -> None:
    command = ["-m", "nettorrent_mpi", "train", ROOT / "configs" / "digits.yaml", "--output", tmp_path]
    changes = ["--set", "device=cpu", "--set", "train.epochs=1", "--set", "dtype=bfloat16", "--set", "kernels=numpy"]
    done = mpirun(1, [*command, *changes])
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "takes longer than dtype: float32" in line]
    assert len(told) == 1
    assert summary(tmp_path)["memory_estimate_mb"] > 0
