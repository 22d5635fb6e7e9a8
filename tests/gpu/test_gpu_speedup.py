"""`nettorrent speedup --baseline gpu` on the host device: whole comparisons, of ranks on GPUs and beside one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Installed = Callable[[str], tuple[list[str], dict[str, str]]]
FEW = "data={name: synthetic, rows: 200, test_rows: 40, shape: [5, 5, 1], classes: 4}"
SMALL = [FEW, "model.layers=[flatten, {linear: 9}, relu, {linear: 4}]", "train.batch_size=20", "train.epochs=1"]


def compare(folder: Path, installed_mpi: Installed, *words: str) -> tuple[dict[str, Any], str]:
    launcher, variables = installed_mpi("openmpi")
    command = [sys.executable, "-m", "tests.gpu.programs.speedup", *words, "--output", str(folder)]
    command += ["--baseline", "gpu", "--launcher", f"{' '.join(launcher)} -n {{ranks}}", "--steps", "4"]
    command += [word for change in SMALL for word in ("--set", change)]
    variables = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert results["complete"]
    assert results["baseline"] == "gpu"
    assert results["host"]["gpus"] == ["host device"]
    assert "1 x host device" in done.stdout
    return results, done.stdout


@pytest.mark.slow
def test_ranks_on_gpus(tmp_path: Path, installed_mpi: Installed) -> None:
    pytest.importorskip("torch", reason="PyTorch, to compare with, is not installed (the extra `compare`)")
    few = ["--ranks", "1,2", "--modes", "rows", "--repeats", "1", "--peers", "torch,torch_compile"]
    results, report = compare(tmp_path / "out", installed_mpi, *few)
    sides = {side["name"]: side for side in results["sides"]}
    assert list(sides) == ["serial-1", "rows-2", "torch-gpu", "torch_compile-gpu"]
    assert all(side["device"] == "gpu" for side in sides.values())
    assert [len(side["samples_per_second"]) for side in sides.values()] == [1, 1, 0, 0]  # this PyTorch has no GPU
    assert sides["torch-gpu"]["impossible"] == "this PyTorch finds no GPU: is it one for CPUs only?"
    assert "| one GPU | 1 |" in report
    assert "`rows`: the rows of a batch divided | 2" in report
    assert "torch, one GPU | this PyTorch finds no GPU" in report
    assert results["traces"] == []
    assert "device: gpu" in (tmp_path / "out" / "trainings" / "rows-2.yaml").read_text()


@pytest.mark.long
def test_ranks_on_cores_beside_a_gpu(tmp_path: Path, installed_mpi: Installed) -> None:
    few = ["--ranks", "2", "--modes", "replicas", "--repeats", "1", "--peers", "none", "--set", "device=cpu"]
    results, report = compare(tmp_path / "out", installed_mpi, *few, "--accuracy", "0.99")
    assert [(side["name"], side["device"]) for side in results["sides"]] == [
        ("serial-1", "cpu"),
        ("gpu-1", "gpu"),
        ("replicas-2", "cpu"),
    ]
    assert "| side | cores used | samples/s | spread | speedup | efficiency | of one GPU |" in report
    assert "times one rank on a core; the fastest on cores" in report
    assert {trace["side"] for trace in results["traces"]} == {"serial-1", "replicas-2"}
    curves = {run["side"]: run["curve"] for run in results["accuracy"]["runs"]}
    assert set(curves) == {"serial-1", "gpu-1", "replicas-2"}
    assert curves["gpu-1"][-1][2] == pytest.approx(curves["serial-1"][-1][2], abs=0.06)
