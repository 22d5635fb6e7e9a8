"""A GPU's steady state: the host launches graphs and reads nothing back; nothing is allocated, prepared or captured."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import pytest
from mpi4py import MPI

from nettorrent_mpi.device.gpu import Gpu
from nettorrent_mpi.engine.device_pipeline import DevicePipeline
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.gpu.host.main import install
from tests.gpu.host.runtime import HostRuntime
from tests.gpu.host.streams import HostEvent, HostStream
from tests.ranks.test_steady_state import LAYERS, SHAPE, engine

SIZE = MPI.COMM_WORLD.size
NETWORK = Network(LAYERS, SHAPE)
WHOLE = Stage(0, NETWORK.weight_layers, 1, 1)

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host device needs g++"),
    pytest.mark.ranks(1, 2, 3, 4),
    *([] if SIZE == 3 else [pytest.mark.long]),
]


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        pytest.param(layers_layout(NETWORK.facts, SIZE, 64), {}, id="layers"),
        pytest.param(
            Topology(1, (Stage(0, WHOLE.stop, SIZE, 1),)), {"clip_norm": 1.0}, id="rows", marks=pytest.mark.slow
        ),
        pytest.param(
            layers_layout(NETWORK.facts, SIZE, 64), {"pipeline": choices.Async()}, id="async", marks=pytest.mark.slow
        ),
        pytest.param(
            layers_layout(NETWORK.facts, SIZE, 64),
            {"pipeline": choices.ZeroBubble()},
            id="split",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_nothing_but_launches(topology: Topology, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    install(3)
    made = engine(topology, NETWORK, device="gpu", **options)
    assert isinstance(made.pipeline, DevicePipeline)
    count, warm, watched, rest = 0, 60, 6, 20
    calls: Counter[str] = Counter()

    def watch(owner: type, *names: str) -> None:
        for name in names:
            original = getattr(owner, name)

            def counted(self: Any, *args: Any, original: Any = original, name: str = name, **more: Any) -> Any:
                calls[f"{owner.__name__}.{name}"] += 1
                return original(self, *args, **more)

            monkeypatch.setattr(owner, name, counted)

    def run(some: int) -> None:
        nonlocal count
        for _ in range(some):
            made.step(count, 0.01, left=warm + watched + rest - count)
            count += 1

    run(warm)
    watch(HostRuntime, "allocate", "pinned", "product", "convolution", "capture", "launch")
    watch(HostStream, "synchronize")
    watch(HostEvent, "synchronize")
    watch(Gpu, "synchronize", "download", "on_host")
    run(watched)
    # Numbers wait for their copy of 32 steps ago, so that the host is not further ahead of the device.
    assert calls.pop("HostEvent.synchronize", 0) <= 4 * watched
    packed = calls.pop("HostRuntime.launch", 0)  # what packs and unpacks the messages of links, outside of graphs
    assert calls == {}, calls
    assert packed <= 4 * made.options.micro_batches * watched, packed
    monkeypatch.undo()
    run(rest)
    made.close()
