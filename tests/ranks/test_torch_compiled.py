"""Models that torch.compile has compiled train as they do otherwise, whether before parallelize or afterwards."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mpi4py import MPI  # noqa: E402

import nettorrent_mpi.torch as nt  # noqa: E402
from tests.torch_runs import train  # noqa: E402

pytestmark = [pytest.mark.usefixtures("double_precision"), pytest.mark.slow]  # seconds until anything is compiled
STEPS = 10
inductor = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)"),
)


class Counting:
    """A backend that counts the graphs it compiles by another one: none, if a model was not compiled at all."""

    def __init__(self, backend: str):
        self.graphs, self._compile = 0, torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self._compile(graph, inputs)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


def wrapped(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: Any, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def as_it_is(model: Any, backend: Any) -> Any:
    return model


# How the model is compiled before parallelize, and after it; the prefix of its names then.
ORDERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "wrapped before": (wrapped, as_it_is, "_orig_mod."),
    "in place before": (in_place, as_it_is, ""),
    "wrapped after": (as_it_is, wrapped, ""),
    "in place after": (as_it_is, in_place, ""),
}


@pytest.mark.parametrize("exchange", ["allreduce", "gossip"])
@pytest.mark.parametrize("backend", ["aot_eager", inductor])
@pytest.mark.parametrize("order", ORDERS)
def test_compiled_is_as_not_compiled(order: str, backend: str, exchange: str) -> None:
    model = Network()
    x, y = torch.randn(43, 6), torch.arange(43) % 5
    gossip = {"gossip": {"pairing": "complete", "overlap": False, "deadline": "none", "part": 1}}
    how: Any = exchange if exchange == "allreduce" else gossip
    before, after, prefix = ORDERS[order]
    counting = Counting(backend)
    torch._dynamo.reset()

    plain = copy.deepcopy(model)
    given = before(model, counting)
    run = nt.parallelize((x, y), given, torch.optim.Adam(given.parameters(), 0.01), batch_size=8, exchange=how)
    run.model = after(given, counting)
    train(run, STEPS)
    assert counting.graphs
    assert next(iter(given.state_dict())) == f"{prefix}layers.0.weight"

    comm = MPI.COMM_SELF if exchange == "allreduce" else None
    alone = nt.parallelize(
        (x, y), plain, torch.optim.Adam(plain.parameters(), 0.01), batch_size=8, exchange=how, comm=comm
    )
    train(alone, STEPS)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    run.close()
    alone.close()
