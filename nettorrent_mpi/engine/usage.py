"""This module measures what a run uses: training time and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

# isort: split
from pathlib import Path, PurePosixPath

from nettorrent_mpi.comm.activity import FIRST_STEP, START
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.run_plan import Options
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.specs import Conv2d, flat

# Most times as fast as with NumPy alone, one rank on Zen 4 (benchmarks/results/zen4/kernels.md).
FASTER, FASTER_CONVOLUTIONS = 1.3, 1.9
WARM_UP = 5  # steps that samples_per_second leaves out


class Clock:
    """A Clock measures training time, without start-up and evaluation, and for the rate without the first steps.

    On a GPU the steps that the host has counted may only have begun: `settle` waits for them.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.settle = settle
        self._seconds = 0.0
        self._since: float | None = None
        self._steps = 0
        self._warm_seconds = 0.0
        self._rows = self._warm_rows = 0
        self._measuring = False

    def go_on(self) -> None:
        """Start, or continue after `stop`; does nothing while it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        self._seconds = self.seconds
        self._since = None

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def step(self, rows: int, *, measuring: bool = False) -> None:
        """Count a step of this many rows; `measuring`: the exchange still measures in the next one, so that the warm-up
        goes on."""
        assert self._since is not None
        self._steps += 1
        self._rows += rows
        START.reached(FIRST_STEP)
        over, self._measuring = self._measuring and not measuring, measuring
        if self._steps == WARM_UP or over:
            self.settle()
            self._warm_seconds = self.seconds
            self._warm_rows = self._rows

    @property
    def seconds_per_step(self) -> float:
        """Return the mean seconds per step."""
        return self.seconds / max(self._steps, 1)

    @property
    def samples_per_second(self) -> float:
        """Return the rows per second without the warm-up; over all steps if there are no others."""
        seconds, rows = self.seconds - self._warm_seconds, self._rows - self._warm_rows
        if rows <= 0:
            seconds, rows = self.seconds, self._rows
        return round(rows / seconds, 1) if seconds > 0 else 0.0


def faster(network: Network, options: Options, device: Device) -> str:
    """Return one line about what the libraries that the device misses would bring this network, or another type of
    numbers; empty if nothing, or if that was never measured."""
    missing = device.missing
    if options.device == "cpu" and options.bfloat16 and not device.multiplies_bfloat16:
        remedy = "this processor has no products of bfloat16 (AVX512-BF16, AMX): write dtype: float32"
        if options.kernels == "numpy":
            remedy = "only oneDNN has faster ones: write kernels: fastest, or dtype: float32"
        elif "oneDNN" in missing:
            remedy = "only oneDNN has faster ones: pip install 'nettorrent_mpi[fast]'"
        return f"bfloat16 is multiplied as float32 copies, which takes longer than dtype: float32; {remedy}"
    if not missing or options.device != "cpu" or str(options.dtype) != "float32":
        return ""
    times = FASTER_CONVOLUTIONS if any(isinstance(layer, Conv2d) for layer in flat(network.layers)) else FASTER
    return (
        f"the network would train up to {times} times as fast with {' and '.join(missing)}, which are not installed: "
        "pip install 'nettorrent_mpi[fast]'"
    )


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes.

    Shared pages count from when the process first touches them: those of libraries, and of the training rows and
    weights that the ranks of a node share. So the sum over ranks exceeds the memory that the node needs.
    """
    try:  # VmHWM is this process's own; getrusage inherits the peak of the program that started it
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(system: Path = Path("/")) -> int:
    """Return the bytes of memory that processes like this one can still take on this node: what is available, or less
    where a control group (a container's, a batch job's) limits it."""
    try:
        lines = (system / "proc/meminfo").read_text().splitlines()
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        groups = [
            line.split(":", 2)
            for line in (system / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        ]
    except (OSError, ValueError):  # not Linux
        return sys.maxsize
    for _, controllers, path in groups:
        if controllers == "":
            folder, limit, usage = "", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for each in (group, *group.parents):
            here = system / "sys/fs/cgroup" / folder / each
            try:
                statistics = dict(line.split() for line in (here / "memory.stat").read_text().splitlines())
                cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
                found.append(int((here / limit).read_text()) - int((here / usage).read_text()) + cache)
            except (OSError, ValueError):  # no such group is visible from here, or it has no limit ("max")
                continue
    return max(min(found, default=sys.maxsize), 0)
