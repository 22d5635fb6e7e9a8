"""A training that goes on elsewhere with the same layout, from what it remembers, gives bit for bit what it would have
given, wherever it came to rest; and a rest changes nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.exchange import gossip
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.ranks.test_attach import NETWORK, plan, start

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
STEPS, RESTS = 13, (1, 4, 5, 9)
COUNT = NETWORK.weight_layers


class Found(NamedTuple):
    """What a training has come to on this rank."""

    arrays: dict[Any, np.ndarray]
    scores: Any


def stages(replicas: int, *grids: tuple[int, int]) -> Topology:
    cuts = [i * COUNT // len(grids) for i in range(len(grids) + 1)]
    return Topology(replicas, tuple(Stage(cuts[i], cuts[i + 1], *grid) for i, grid in enumerate(grids)))


def train(rests: tuple[int, ...], *, again: bool, **options: Any) -> Found:
    """Train with rests after these steps; `again`: in an engine that is made anew from the blocks of the one before."""
    world = World()
    made = plan(options.pop("topology"), **{"clip_norm": None, "dtype": "float32", "kernels": "numpy", **options})
    engine = start(world, made)
    for n in range(STEPS):
        rest = next(rest for rest in (*rests, STEPS) if rest > n)
        engine.step(n, 0.003, rest - n)
        if n + 1 in rests and again:
            engine.attach(world, made, engine.detach())
        elif n + 1 in rests:
            Evaluator(engine).test()
    arrays = {holding: np.array(array) for holding, array in engine.blocks.held().items()}
    with engine.exchange.shown():
        scores = Evaluator(engine).test()
    engine.close()
    world.free()
    return Found(arrays, scores)


def differences(found: Found, expected: Found) -> list[str]:
    """The names of what is not bit for bit the same."""
    different = [each.name for each in found.arrays.keys() ^ expected.arrays.keys()]
    both = found.arrays.keys() & expected.arrays.keys()
    equal = {each: np.array_equal(found.arrays[each], expected.arrays[each], equal_nan=True) for each in both}
    different += [each.name for each, same in equal.items() if not same]
    return different + (["scores"] if found.scores != expected.scores else [])


ONE = (1, 1)
APART = stages(SIZE, ONE)
ASYNC: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "async": {"topology": stages(1, ONE, ONE), "micro_batches": 1},
        "async, 3": {"topology": stages(1, ONE, ONE), "micro_batches": 3},
    },
    3: {
        "async": {"topology": stages(1, ONE, ONE, ONE), "micro_batches": 1},
        "async, rows": {"topology": stages(1, (2, 1), ONE), "micro_batches": 2},
    },
    4: {
        "async": {"topology": stages(1, ONE, ONE, ONE, ONE), "micro_batches": 1},
        "async, cols": {"topology": stages(1, (2, 1), (1, 2)), "micro_batches": 2},
        "async, replicas": {"topology": stages(2, ONE, ONE), "micro_batches": 1},
    },
}
GOSSIP: dict[str, dict[str, Any]] = {
    "loss": {"mix": choices.LossMix()},
    "every": {"every": 3},
    "int8": {"compress": choices.Int8()},
    "all": {"part": 1.0},
    "clock": {"mix": choices.ClockMix(), "every": 2},
    "linear": {"mix": choices.LinearMix(target=5), "pairing": "complete"},
    "divergence": {"mix": choices.LossDivergenceMix(), "divergence_threshold": 2.0},
    "push_sum": {"mix": choices.PushSumMix(), "pairing": "random", "probability": 0.7},
    "push_sum, every": {"mix": choices.PushSumMix(), "pairing": "random", "every": 2},
    "optimizer": {"average": ("parameters", "optimizer"), "every": 2},
    "auto": {"part": "auto"},
    "auto, push_sum": {"part": "auto", "mix": choices.PushSumMix(), "every": 2},
    "topk": {"compress": choices.TopK(0.1), "pairing": "random", "probability": 0.6},
    "float16": {"compress": choices.Float16(), "every": 2, "part": 1.0},
    "sign": {"compress": choices.Sign(), "pairing": "ring"},
    "momentum": {"exact_every": 2, "slow_momentum": 0.5, "every": 2},
    "at once": {"overlap": False, "withhold": 0.3},
}
QUICK = ("async", "loss", "every", "int8")
MORE = ("auto", "push_sum", "topk", "sign", "momentum")


def cases() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        name: {"pipeline": choices.Async(), **options} for name, options in ASYNC.get(SIZE, {}).items()
    }
    for name, options in GOSSIP.items() if SIZE > 1 else ():
        exchange = choices.Gossip(**{"deadline": "none", "part": 0.4, **options})
        found[name] = {"topology": APART, "exchange": exchange}
        if SIZE == 4 and name in ("loss", "every", "topk", "all", "auto, push_sum"):
            found[f"{name}, rows"] = {"topology": stages(2, (2, 1)), "exchange": exchange}
            found[f"{name}, async"] = {
                "topology": stages(2, ONE, ONE), "exchange": exchange, "pipeline": choices.Async()
            }  # fmt: skip
    return found


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in cases() if name in QUICK], id="quick"),
        pytest.param([name for name in cases() if name in MORE], id="more", marks=pytest.mark.slow),
        pytest.param([name for name in cases() if name not in QUICK + MORE], id="rest", marks=pytest.mark.long),
    ],
)
def test_going_on_changes_no_bit(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(peers: Group, *_: Any) -> int:
        peers.barrier()
        return 3

    monkeypatch.setattr(gossip, "parts_that_hide", measured)
    monkeypatch.setattr(gossip, "SMALL", 300)
    wrong = []
    for name in names:
        options = cases()[name]
        expected = train((), again=False, **options)
        for again in (False, True):
            different = differences(train(RESTS, again=again, **options), expected)
            wrong += [f"{name} {'again' if again else 'rest'}: {different}"] if different else []
    assert not wrong, "\n".join(wrong)
