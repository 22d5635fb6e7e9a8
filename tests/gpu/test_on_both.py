"""What was trained on a GPU goes on, and is evaluated, where there is none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--set", "model.layers=[flatten, {linear: {units: 16, activation: relu}}, {linear: 10}]"]
Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
def test_resumed_and_evaluated_on_cores(mpirun: Mpirun, tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("ml_dtypes", reason="ml_dtypes, which has bfloat16, is not installed")
    train = ["train", "--output", tmp_path, *SMALL, "--set", "train.schedule=constant"]
    on_gpu = ["--set", "device=gpu", "--set", f"dtype={dtype}", "--set", "train.steps=6"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = mpirun(1, ["-m", "tests.gpu.host.main", *train, *on_gpu], env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path)["device"] == "gpu"
    assert summary(tmp_path)["gpu_arrays_mb"] == pytest.approx(summary(tmp_path)["gpu_arrays_estimate_mb"], rel=0.02)
    done = mpirun(1, ["-m", "nettorrent_mpi", "evaluate", tmp_path])
    assert done.returncode == 0, done.stderr
    assert "test: loss " in done.stdout
    on_cores = ["--set", "device=cpu", "--set", "train.steps=9", "--resume"]
    done = mpirun(2, ["-m", "nettorrent_mpi", *train, *on_cores])
    assert done.returncode == 0, done.stderr
    assert "resumes after step 6 of 9" in done.stdout
    assert (summary(tmp_path)["device"], summary(tmp_path)["steps"]) == ("cpu", 9)
    on_cores[-1:] = ["--set", "dtype=float64", "--set", "train.steps=12", "--resume"]
    done = mpirun(1, ["-m", "nettorrent_mpi", *train, *on_cores])
    assert done.returncode == 2
    assert "is not what the checkpoint" in done.stderr
