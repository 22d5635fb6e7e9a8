"""Layouts divide ranks among stages: sized by the cost of the layers, or as a configuration gives them."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.errors import LayoutError
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology


def partition(weights: Sequence[float], groups: int) -> list[Span]:
    """Partition neighbouring items into `groups` groups of at least one: the heaviest group as light as possible, and
    of such partitions the one with the least sum of squared weights, in ties the one whose first groups are short."""
    assert 1 <= groups <= len(weights)
    total = [0.0, *accumulate(weights)]
    n = len(weights)
    limit = _lightest(total, groups) * (1 + 1e-12)

    def cost(first: int, stop: int) -> float:
        weight = total[stop] - total[first]
        return weight * weight if weight <= limit else math.inf

    # least[i]: the least sum for the items from i on in the groups so far; ends[i]: where the first of these ends.
    least = [cost(i, n) for i in range(n)]
    ends: list[list[int]] = []
    for left in range(n - 1, n - groups, -1):  # items that the first of the groups so far begins before
        found, chosen = [math.inf] * n, [0] * n
        # The end of an item's group moves on with the item (the costs are convex): halving finds all ends.
        parts = [(0, left - 1, 1, left)]
        while parts:
            low, high, nearest, furthest = parts.pop()
            i = (low + high) // 2
            sums = ((cost(i, k) + least[k], k) for k in range(max(i + 1, nearest), furthest + 1))
            found[i], chosen[i] = min(sums)
            parts += [(low, i - 1, nearest, chosen[i])] if low < i else []
            parts += [(i + 1, high, chosen[i], furthest)] if i < high else []
        least = found
        ends.insert(0, chosen)
    cuts = [0]
    for chosen in ends:
        cuts.append(chosen[cuts[-1]])
    return [Span(*cut) for cut in zip(cuts, (*cuts[1:], n), strict=True)]


def _lightest(total: Sequence[float], groups: int) -> float:
    """Return the least weight that the heaviest of `groups` groups can have; `total` has the weights' running sums."""

    def needed(limit: float) -> tuple[int, float]:
        """Return how many groups up to `limit` there are, and the weight of the heaviest."""
        count, first, heaviest = 0, 0, 0.0
        while first < len(total) - 1:
            stop = max(bisect_right(total, total[first] + limit), first + 2) - 1
            heaviest = max(heaviest, total[stop] - total[first])
            count, first = count + 1, stop
        return count, heaviest

    low, high = 0.0, total[-1]
    for _ in range(200):  # halving: exact to the last bit
        middle = (low + high) / 2
        count, heaviest = needed(middle)
        low, high = (low, middle) if count <= groups and heaviest <= middle else (middle, high)
    return max(needed(high)[1], high)


def layers_layout(facts: Sequence[LayerFacts], ranks: int, rows: int) -> Topology:
    """Return `layout: layers`: one swarm per weight layer, one replica, sizes in proportion to the layers' operations.

    `rows` is the rows of a micro-batch. Sizes are rounded by largest remainder, each at least 1; all ranks are used.
    Each size becomes the rows x cols with the least largest share of the work (in ties the one with more rows), with
    cols <= units. A size with more than `rows` rows in every factoring (a large prime) exchanges ranks with other
    stages, so that the sizes deviate least from proportion. Only ranks beyond what the network can use stay idle. With
    fewer ranks than layers, neighbouring layers are merged as evenly as possible, one rank each.
    """
    assert ranks >= 1
    assert facts
    rows = max(rows, 1)
    weights = [layer.operations for layer in facts]
    if ranks < len(facts):
        return Topology(1, tuple(Stage(part.start, part.stop, 1, 1) for part in partition(weights, ranks)))
    most = [rows * layer.units for layer in facts]
    extra = ranks - sum(most)
    if extra <= 0:
        quotas = _quotas(weights, ranks, most)
        sizes = _round(quotas, ranks)
        if any(_idles(n, rows, layer.units) for n, layer in zip(sizes, facts, strict=True)):
            sizes = _mend(quotas, ranks, [(rows, layer.units) for layer in facts])
    else:  # some ranks must idle: in the stage where they do the least harm

        def slowest(i: int) -> float:
            shares = ((m + extra * (i == k), m, facts[k]) for k, m in enumerate(most))
            return max(w.operations * (factor(n, rows, [w])[0] if n > m else 1 / m) for n, m, w in shares)

        spare = min(range(len(facts)), key=slowest)
        sizes = [m + extra * (i == spare) for i, m in enumerate(most)]
    grids = [factor(n, rows, [layer]) for n, layer in zip(sizes, facts, strict=True)]
    return Topology(1, tuple(Stage(i, i + 1, r, c) for i, (_, r, c) in enumerate(grids)))


def factor(size: int, rows: int, layers: Sequence[LayerFacts]) -> tuple[float, int, int]:
    """Return (largest share of the layers' work, rows, cols) of the best rows x cols = size; in ties more rows.

    A rank's share is a whole number of the `rows` rows times a whole number of each layer's units, so the largest
    rounds up. cols are at most the fewest units; a team has more than `rows` rows only where it cannot have fewer.
    """
    total = sum(layer.operations for layer in layers)
    best = (True, math.inf, 0, 0)
    for cols in range(1, min(size, *(layer.units for layer in layers)) + 1):
        if size % cols == 0:
            team_rows = size // cols
            work = sum(w.operations * -(-w.units // cols) / w.units for w in layers) / total if total else 1 / cols
            idle, share = team_rows > rows, work * -(-rows // team_rows) / rows
            if (idle, share) < (best[0], best[1] * (1 - 1e-12)):
                best = (idle, share, team_rows, cols)
    return best[1:]


@lru_cache(maxsize=100_000)
def _idles(size: int, rows: int, units: int) -> bool:
    """Whether every factoring of `size` with cols <= units has more than `rows` rows, so that some ranks stay idle."""
    return not any(size % cols == 0 for cols in range(-(-size // rows), min(size, units) + 1))


def _quotas(weights: Sequence[float], ranks: int, most: Sequence[int]) -> list[float]:
    """Return shares of `ranks` in proportion to the weights, but at least 1 and at most `most` each."""
    floor = max(sum(weights) * 1e-12, 1e-300)
    weights = [max(w, floor) for w in weights]

    def at(scale: float) -> list[float]:
        return [min(max(scale * w, 1.0), float(m)) for w, m in zip(weights, most, strict=True)]

    low, high = 0.0, ranks / min(weights)
    for _ in range(200):  # halving: exact to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < ranks else (low, middle)
    return at(high)


def _round(quotas: Sequence[float], ranks: int) -> list[int]:
    """Round to whole numbers with the sum `ranks`: down, then one up for each of the largest remainders."""
    sizes = [math.floor(q + 1e-9) for q in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (sizes[i] - quotas[i], i))
    for i in order[: ranks - sum(sizes)]:
        sizes[i] += 1
    assert sum(sizes) == ranks
    return sizes


def _mend(quotas: Sequence[float], ranks: int, limits: Sequence[tuple[int, int]]) -> list[int]:
    """Return the sizes nearest to the quotas in which no rank idles: least sum of (size - quota)^2 / quota.

    Dynamic programming over stages and ranks used so far, among sizes near the quotas; wider until there is a solution
    (the most a stage can use, rows * units, is always among them in the end).
    """
    width = 8
    while True:
        used: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for quota, (rows, units) in zip(quotas, limits, strict=True):
            near = range(max(1, math.floor(quota) - width), min(rows * units, math.ceil(quota) + width) + 1)
            sizes = [(n, (n - quota) ** 2 / quota) for n in near if not _idles(n, rows, units)]
            longer: dict[int, tuple[float, tuple[int, ...]]] = {}
            for before, (cost, chosen) in used.items():
                for n, more in sizes:
                    total, sum_ = cost + more, before + n
                    if sum_ <= ranks and (sum_ not in longer or total < longer[sum_][0]):
                        longer[sum_] = (total, (*chosen, n))
            used = longer
        if ranks in used:
            return list(used[ranks][1])
        if width > ranks:
            return _round(quotas, ranks)
        width *= 2


def layout_of(line: str, facts: Sequence[LayerFacts], ranks: int) -> Topology | None:
    """Return the topology that `Topology.describe` has put into a line; None if it is not one of these layers on so
    many ranks."""
    found = re.fullmatch(r"(\d+) replicas? x \[(.*)\]", line, re.ASCII)
    names = [layer.name for layer in facts]
    stages: list[Stage] = []
    for part in found[2].split(" | ") if found else ():
        name, _, grid = part.rpartition(" ")
        sizes = re.fullmatch(r"(\d+)x(\d+)", grid, re.ASCII)
        first = stages[-1].stop if stages else 0
        ends = [n for n in range(first, len(names)) if name in (names[first], f"{names[first]}..{names[n]}")]
        if sizes is None or not ends or 0 in (int(sizes[1]), int(sizes[2])):
            return None
        stages.append(Stage(first, ends[0] + 1, int(sizes[1]), int(sizes[2])))
    if found is None or int(found[1]) < 1 or not stages or stages[-1].stop != len(names):
        return None
    topology = Topology(int(found[1]), tuple(stages))
    wide = any(stage.cols > min(layer.units for layer in facts[stage.first : stage.stop]) for stage in stages)
    return None if wide or topology.size != ranks else topology


def given_layout(
    replicas: int, swarms: Sequence[tuple[int, int, int]], facts: Sequence[LayerFacts], ranks: int
) -> Topology:
    """Return `layout: {replicas, swarms}`: each swarm is (weight layers, rows, cols), in order.

    Raises LayoutError, which says what would be possible, unless the swarms hold every weight layer once, no cols
    exceed the units of a layer, and replicas x sum of rows x cols is the number of ranks.
    """
    if replicas < 1:
        raise LayoutError(f"layout.replicas: {replicas} is too few; the minimum is 1")
    if not swarms:
        raise LayoutError(f"layout.swarms is empty; one swarm for all: {_written(1, [(len(facts), 1, 1)])}")
    for i, swarm in enumerate(swarms):
        for key, value in zip(("layers", "rows", "cols"), swarm, strict=True):
            if value < 1:
                raise LayoutError(f"layout.swarms[{i}].{key}: {value} is too few; the minimum is 1")
    if len(swarms) > len(facts):
        raise LayoutError(
            f"layout.swarms: {len(swarms)} swarms for the network's {len(facts)} weight layers "
            f"({', '.join(w.name for w in facts)}); at most {len(facts)} swarms, of 1 layer each, are possible"
        )
    held = sum(layers for layers, _, _ in swarms)
    if held != len(facts):
        others = sum(layers for layers, _, _ in swarms[:-1])
        fits = f"layers: {len(facts) - others} in the last swarm would fit" if others < len(facts) else "take fewer"
        raise LayoutError(
            f"layout.swarms: the swarms hold {held} weight layers, the network has {len(facts)} "
            f"({', '.join(w.name for w in facts)}); {fits}"
        )
    stages, first = [], 0
    for i, (layers, rows, cols) in enumerate(swarms):
        stages.append(Stage(first, first + layers, rows, cols))
        narrow = min(facts[first : first + layers], key=lambda layer: layer.units)
        if cols > narrow.units:
            raise LayoutError(
                f"layout.swarms[{i}].cols: {cols} cols cannot divide the {narrow.units} units of {narrow.name}; "
                f"at most {narrow.units}, and more rows instead"
            )
        first += layers
    topology = Topology(replicas, tuple(stages))
    if topology.size != ranks:
        raise LayoutError(
            f"layout: needs {topology.size} ranks, the run has {ranks}: start it with {topology.size} ranks, "
            f"or write for example layout: {_nearest(topology, facts, ranks)}"
        )
    return topology


def _nearest(topology: Topology, facts: Sequence[LayerFacts], ranks: int) -> str:
    """Return a similar layout for this many ranks, in configuration syntax."""
    stages = [(s.layers, s.rows, s.cols) for s in topology.stages]
    each = topology.size // topology.replicas
    if ranks % each == 0:
        return _written(ranks // each, stages)
    if ranks < len(stages):
        parts = partition([layer.operations for layer in facts], ranks)
        return _written(1, [(part.size, 1, 1) for part in parts])
    replicas = topology.replicas if ranks % topology.replicas == 0 and ranks // topology.replicas >= len(stages) else 1
    share = ranks // replicas
    sizes = _round(_quotas([s.size for s in topology.stages], share, [share] * len(stages)), share)
    grids = [
        (s.layers, n, 1) if n % s.cols else (s.layers, n // s.cols, s.cols)
        for s, n in zip(topology.stages, sizes, strict=True)
    ]
    return _written(replicas, grids)


def _written(replicas: int, swarms: Sequence[tuple[int, int, int]]) -> str:
    inner = ", ".join(f"{{layers: {n}, rows: {r}, cols: {c}}}" for n, r, c in swarms)
    return f"{{replicas: {replicas}, swarms: [{inner}]}}"
