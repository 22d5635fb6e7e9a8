"""The clock of a run counts training, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.device.cpu import Cpu
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.engine.usage import WARM_UP, Clock, faster, free_memory


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set by the test."""
    time_now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: time_now[0])
    return time_now


def test_it_counts_only_between_go_on_and_stop(now: list[float]) -> None:
    clock = Clock()
    now[0] += 5
    assert clock.seconds == 0
    clock.go_on()
    now[0] += 2
    clock.go_on()  # changes nothing while it runs
    now[0] += 1
    assert clock.seconds == 3
    clock.stop()
    now[0] += 10
    assert clock.seconds == 3
    clock.go_on()
    now[0] += 4
    assert clock.seconds == 7


@pytest.mark.parametrize(("steps", "rate"), [(1, 10.0), (WARM_UP, 10.0), (WARM_UP + 4, 20.0)])
def test_the_rate_leaves_the_first_steps_out(now: list[float], steps: int, rate: float) -> None:
    clock = Clock()
    clock.go_on()
    for step in range(steps):
        now[0] += 1.0 if step < WARM_UP else 0.5
        clock.step(10)
    clock.stop()
    now[0] += 100
    assert clock.samples_per_second == rate


@pytest.mark.parametrize("slow", [2, WARM_UP + 3])
def test_the_rate_leaves_out_what_the_exchange_measures(now: list[float], slow: int) -> None:
    clock = Clock()
    clock.go_on()
    first = max(slow, WARM_UP)
    for step in range(first + 4):
        now[0] += 1.0 if step < first else 0.5
        clock.step(10, measuring=step < slow - 1)
    assert clock.samples_per_second == 20.0


def test_steps_that_have_only_begun_are_waited_for(now: list[float]) -> None:
    """On a GPU the host counts steps that take no time, and waits for them later."""
    begun = [0]

    def settle() -> None:
        now[0] += 0.5 * begun[0]
        begun[0] = 0

    clock = Clock(settle)
    clock.go_on()
    for _ in range(WARM_UP + 4):
        begun[0] += 1
        clock.step(10)
    clock.settle()
    assert clock.samples_per_second == 20.0


def test_nothing_trained() -> None:
    assert (Clock().seconds, Clock().samples_per_second, Clock().seconds_per_step) == (0, 0, 0)


PEAK = """
from nettorrent_mpi.engine.usage import peak_memory
before = peak_memory()
held = bytearray(b"x") * 300_000_000
with_it = peak_memory()
del held
print(before, with_it, peak_memory())
"""


def test_peak_memory_is_what_was_held_at_most() -> None:
    """The test uses a process of its own: one that has held more before does not reach its peak again."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, with_it, after = map(int, done.stdout.split())
    assert with_it == pytest.approx(before + 300e6, rel=0.05)
    assert after == pytest.approx(with_it, rel=0.01)


def test_peak_memory_is_not_that_of_who_started_the_process() -> None:
    held = bytearray(b"x") * 300_000_000
    code = "from nettorrent_mpi.engine.usage import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6 < len(held)


def test_free_memory_is_the_least_that_a_control_group_leaves(tmp_path: Path) -> None:
    for folder in ("proc/self", "sys/fs/cgroup/job/step", "sys/fs/cgroup/memory"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("3:cpu:/\n0::/job/step\n")
    assert free_memory(tmp_path) == 8000 * 1024
    groups = tmp_path / "sys/fs/cgroup"
    for group, limit, used, cache in (("job", "3000000", 2500000, 700000), ("job/step", "max", 2500000, 700000)):
        (groups / group / "memory.max").write_text(f"{limit}\n")
        (groups / group / "memory.current").write_text(f"{used}\n")
        (groups / group / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    assert free_memory(tmp_path) == 1_200_000, "the job's limit, whose page cache can be given back"
    (tmp_path / "proc/self/cgroup").write_text("4:cpuset,memory:/not/visible/here\n")
    (groups / "memory/memory.limit_in_bytes").write_text("900000\n")
    (groups / "memory/memory.usage_in_bytes").write_text("600000\n")
    (groups / "memory/memory.stat").write_text("inactive_file 5\ntotal_inactive_file 100000\n")
    assert free_memory(tmp_path) == 400_000
    assert 1 << 20 < free_memory() < 1 << 50


BLOCK = "model.layers=[flatten, {linear: 12}, {linear: 10}]"
DEEP = "model.layers=[{residual: {layers: [{conv2d: {filters: 1, kernel: 3, padding: same}}]}}, flatten, {linear: 10}]"


@pytest.mark.parametrize(
    ("missing", "changes", "wanted"),
    [
        (
            ["Numba", "oneDNN"],
            [],
            "up to 1.9 times as fast with Numba and oneDNN, which are not installed: ",
        ),
        (["oneDNN"], [DEEP], "up to 1.9 times as fast with oneDNN"),
        (["Numba"], [BLOCK], "up to 1.3 times as fast with Numba"),
        ([], [], ""),
        (["Numba"], ["dtype=float64"], ""),  # never measured
        ([], ["dtype=bfloat16", "device=cpu", "kernels=numpy"], "takes longer than dtype: float32; only oneDNN has"),
        (["oneDNN"], ["dtype=bfloat16", "device=cpu", "kernels=fastest"], "pip install 'nettorrent_mpi[fast]'"),
        ([], ["dtype=bfloat16", "device=cpu", "kernels=fastest"], "this processor has no products of bfloat16"),
    ],
)
def test_what_missing_libraries_would_bring(
    missing: list[str], changes: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = set_up(configuration.load(None, changes), 1)
    device = make_device("cpu", "numpy")
    monkeypatch.setattr(Cpu, "missing", missing)
    found = faster(setup.network, setup.options, device)
    assert wanted in found
    assert bool(wanted) == bool(found)
    assert "\n" not in found
