"""A training that goes on elsewhere with the same layout, from what it remembers, gives bit for bit what it would have
given, wherever it came to rest; and a rest changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.ranks.test_attach import NETWORK, plan, start

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
STEPS = 13
COUNT = NETWORK.weight_layers


class Found(NamedTuple):
    """What a training has come to on this rank."""

    arrays: dict[Any, np.ndarray]
    sums: list[float]
    scores: list[Any]


def stages(replicas: int, *grids: tuple[int, int]) -> Topology:
    cuts = [i * COUNT // len(grids) for i in range(len(grids) + 1)]
    return Topology(replicas, tuple(Stage(cuts[i], cuts[i + 1], *grid) for i, grid in enumerate(grids)))


ONE = (1, 1)
ASYNC: dict[int, list[tuple[Topology, int]]] = {  # and micro-batches
    1: [],
    2: [(stages(1, ONE, ONE), 1), (stages(1, ONE, ONE), 3)],
    3: [(stages(1, ONE, ONE, ONE), 1), (stages(1, (2, 1), ONE), 2)],
    4: [(stages(1, ONE, ONE, ONE, ONE), 1), (stages(1, (2, 1), (1, 2)), 2), (stages(2, ONE, ONE), 1)],
}


def train(rests: list[int], *, again: bool, **options: Any) -> Found:
    """Train with rests after these steps; `again`: in an engine that is made anew from the blocks of the one before."""
    world = World()
    made = plan(options.pop("topology"), **{"clip_norm": None, "dtype": "float32", "kernels": "numpy", **options})
    engine = start(world, made)
    for n in range(STEPS):
        rest = next(rest for rest in [*rests, STEPS] if rest > n)
        engine.step(n, 0.003, rest - n)
        if n + 1 in rests and again:
            engine.attach(world, made, engine.detach())
        elif n + 1 in rests:
            Evaluator(engine).test()
    arrays = {holding: np.array(array) for holding, array in engine.blocks().items()}
    sums = engine.metrics.sums()
    scores = [Evaluator(engine).test()]
    engine.close()
    world.free()
    return Found(arrays, sums, scores)


def differences(found: Found, expected: Found) -> list[str]:
    """The names of what is not bit for bit the same."""
    different = [each.name for each in found.arrays.keys() ^ expected.arrays.keys()]
    both = found.arrays.keys() & expected.arrays.keys()
    different += [each.name for each in both if not np.array_equal(found.arrays[each], expected.arrays[each])]
    different += ["sums"] if found.sums != expected.sums else []
    return different + (["scores"] if found.scores != expected.scores else [])


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for topology, pieces in ASYNC.get(SIZE, []):
        yield f"async {topology} {pieces}", {
            "topology": topology, "micro_batches": pieces, "pipeline": choices.Async()
        }  # fmt: skip


def test_going_on(between_nodes: Any) -> None:
    wrong = {}
    for name, options in cases():
        expected = train([], again=False, **options)
        for again in (False, True):
            found = train([1, 4, 5, 9], again=again, **options)
            wrong[f"{name} {'again' if again else ''}"] = differences(found, expected)
    wrong = {name: different for name, different in wrong.items() if different}
    assert not wrong, "\n".join(f"{name}: {different}" for name, different in wrong.items())
