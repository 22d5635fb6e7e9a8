"""Throughput on a GPU counts the steps that it has done, not those that the host has begun."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.device import gpu, visible
from tests.gpu.host.build import compiler
from tests.gpu.host.runtime import HostRuntime

SECONDS, ROWS = 0.02, 8


class SlowRuntime(HostRuntime):
    """A SlowRuntime takes time for each step's update."""

    def launch(self, stream: Any, kernel: str, *more: Any) -> None:
        super().launch(stream, kernel, *more)
        if kernel == "sgd":
            stream.enqueue("time passes", lambda: time.sleep(SECONDS))


def look(environ: MutableMapping[str, str], rank: int | None) -> visible.Visible:
    return visible.Visible((visible.VisibleGpu("host device", "host device", 1 << 30),))


@pytest.mark.skipif(compiler() is None, reason="g++ is not installed")
def test_the_rate_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible, "look", look)
    seed = next(seed for seed in range(99) if HostRuntime(seed, memory=4096).order.haste == 0)
    monkeypatch.setattr(gpu, "open_runtime", lambda index: SlowRuntime(seed))
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((96, 5)).astype(np.float32), rng.integers(0, 3, 96)
    with nt.Trainer(
        [nt.Linear(3)], (x, y), optimizer=nt.Sgd(0.1), batch_size=ROWS, report_every=4, device="gpu"
    ) as made:
        records = list(made.train(steps=24))
    assert [record.step for record in records] == [4, 8, 12, 16, 20, 24]
    for record in records:
        assert 0.3 * ROWS / SECONDS / 10 < record.samples_per_second <= ROWS / SECONDS
        assert record.time >= record.step * SECONDS
