"""The dry run's estimate of what a GPU holds, against what the host device has allocated after a training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nettorrent_mpi.device import visible
from nettorrent_mpi.device.gpu.products import WORKSPACE
from nettorrent_mpi.device.visible import ASSUMED_GPU, Visible, VisibleGpu
from nettorrent_mpi.planning import load_config, plan

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "gpu" / "programs" / "gpu_memory.py"
Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_what_is_predicted_is_taken(mpirun: Mpirun, tmp_path: Path, ranks: int) -> None:
    done = mpirun(ranks, [PROGRAM, tmp_path / "told"], env={"PYTHONPATH": str(ROOT)}, timeout=200)
    assert done.returncode == 0, done.stderr
    told = dict(json.loads(line) for line in (tmp_path / "told").read_text().splitlines())
    assert len(told) >= (7 if ranks > 1 else 5)
    for name, stages in told.items():
        for stage, (predicted, taken) in enumerate(stages):
            # Besides what all products work in. Every array begins at a multiple of 256 bytes.
            shared = WORKSPACE if taken > WORKSPACE else 0
            arrays = taken - shared
            about = f"{name}, stage {stage}: {predicted} predicted, {taken} taken"
            if "gossip" in name or "messages" in name:  # as many messages as there may ever be on the way
                assert 0.98 * arrays < predicted - shared < 2 * arrays, about
            else:
                assert abs(predicted - taken) < 0.04 * arrays + 40_000, about


def predicted(*changes: str) -> list[int]:
    made = plan(load_config(None, "device=gpu", *changes), ranks=2)
    assert sum(each.parameters + each.layers + each.links for each in made.memory) == 0  # they are not on the host
    return [each.total for each in made.gpu_memory]


def test_types_and_rows() -> None:
    pixels = "data={name: synthetic, rows: 4000000, test_rows: 10, shape: [32, 32, 3], classes: 10}"
    flat = "model.layers=[flatten, {linear: 4000}, {linear: 4000}, {linear: 10}]"
    whole = "layout={replicas: 2}"
    float32, tf32, bfloat16, float64 = (
        max(predicted(pixels, flat, whole, f"dtype={name}")) for name in ("float32", "tf32", "bfloat16", "float64")
    )
    assert float32 == tf32
    assert bfloat16 < float32 < float64
    assert float32 > 4_000_000 * 3072  # all rows are there
    more = max(predicted(pixels.replace("4000000", "40000000"), flat, whole))
    assert more < float32  # there is no room for them


def test_the_report_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = load_config(None, "device=gpu", "model.layers=[flatten, {linear: 20000}, {linear: 20000}, {linear: 10}]")
    told = " ".join(str(plan(wide)).split())
    assert "GPU MEMORY (MB of each stage's largest rank)" in told
    assert f"GB of the {ASSUMED_GPU.memory / 1e9:.1f} GB of an H200 (there is no GPU here)" in told
    assert "TOO MUCH" not in told
    seen = Visible((VisibleGpu("a", "Large", 1 << 40), VisibleGpu("b", "Small", 5 << 30)))
    monkeypatch.setattr(visible, "look", lambda environ, rank: seen)
    told = " ".join(str(plan(wide)).split())
    assert "of the 5.4 GB of Small. THAT IS TOO MUCH: lower train.batch_size" in told
    on_cores = load_config(None, "device=cpu")
    assert "GPU" not in str(plan(on_cores))
    assert plan(on_cores).gpu_memory == []


def test_the_estimate_needs_no_library_of_gpus() -> None:
    code = (
        "import sys\nfrom nettorrent_mpi.planning import load_config, plan\n"
        "print(len(plan(load_config(None, 'device=gpu', 'dtype=bfloat16'), ranks=3).gpu_memory))"
    )
    hidden = "import sys\nfor name in ('cupy', 'cudnn', 'ml_dtypes'): sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", hidden + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3\n")
