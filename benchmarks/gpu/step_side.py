"""One side of a comparison of steps, in a process of its own: `python -m benchmarks.gpu.step_side CASE SIDE [--host]`.

It warms up, prints "ready", and then does what it reads, a line each: "go SECONDS" trains for about so long
and prints the seconds of a step; "busy" prints the part of the time in which the GPU works. Others wait meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Protocol

from benchmarks.gpu.step_cases import CASES, COMPILED, OURS, SIDES, StepCase
from nettorrent_mpi import env

WARM_UP = 12  # steps: what is captured is captured, and what is compiled is compiled
PROFILED = 30  # steps


class Side(Protocol):
    """A Side trains."""

    def train(self, steps: int) -> None:
        """Train so many steps, to their end."""


class Ours:
    """This package, as a script uses it."""

    def __init__(self, case: StepCase, host: bool):
        import nettorrent_mpi as nt

        self._trainer = nt.Trainer(case.load("gpu", host))

    def train(self, steps: int) -> None:
        for _ in self._trainer.train(steps=steps):
            pass


class Theirs:
    """PyTorch, as `nettorrent speedup` runs it: rows on the GPU, gathered and augmented there."""

    def __init__(self, case: StepCase, host: bool, compiled: bool):
        import torch

        from nettorrent_mpi.engine.setup import set_up
        from nettorrent_mpi.speedup import torch_peer

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
        torch.backends.cudnn.benchmark = True
        words = ["none", "--device", "cpu" if host else "cuda"]
        options = torch_peer.parse(words + (["--compile"] if compiled else []))
        setup = set_up(case.load("gpu", host), 1, device="gpu")
        self._rate = setup.config.train.optimizer.options()["lr"]
        self._peer, self._done = torch_peer.Peer(setup, options, 0), 0

    def train(self, steps: int) -> None:
        for n in range(self._done, self._done + steps):
            self._peer.step(n, self._rate)
        self._done += steps
        self._peer.meet()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.step_side")
    parser.add_argument("case", choices=[case.name for case in CASES])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    case = next(case for case in CASES if case.name == options.case)
    env.prepare()
    if options.host:
        from tests.gpu.host.main import install

        install(0)
    began = time.perf_counter()
    side: Side = (
        Ours(case, options.host) if options.side == OURS else Theirs(case, options.host, options.side == COMPILED)
    )
    side.train(WARM_UP)
    each = timed(side, 3) / 3
    tell({"ready": time.perf_counter() - began})
    for line in sys.stdin:
        word, *given = line.split()
        if word == "go":
            steps = max(3, round(float(given[0]) / each))
            each = timed(side, steps) / steps
            tell({"seconds": each, "steps": steps})
        elif word == "busy":
            tell({"busy": busy(side)})
    return 0


def timed(side: Side, steps: int) -> float:
    """Return the seconds of so many steps."""
    began = time.perf_counter()
    side.train(steps)
    return time.perf_counter() - began


def busy(side: Side) -> float:
    """Return the part of the time, from the first kernel of some steps to the end of the last, in which one runs, as
    CUDA's profiler (through PyTorch's) tells."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as told:
        side.train(PROFILED)
    spans = sorted((e.time_range.start, e.time_range.end) for e in told.events() if on_gpu(e))
    return covered(spans)


def on_gpu(event: Any) -> bool:
    """Whether an event of the profiler is work of the GPU."""
    return "cuda" in str(event.device_type).lower()


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the part of the time from the first begin to the last end that these spans, sorted, cover."""
    total, reached = 0.0, spans[0][0]
    for begin, end in spans:
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total / max(reached - spans[0][0], 1e-12)


def tell(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
