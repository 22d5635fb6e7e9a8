"""The part of a dry run's report on the layout: what each rank holds and does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from nettorrent_mpi.cli.tables import MOST_LINES, aligned, shortened
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology


def layout_table(
    topology: Topology,
    facts: Sequence[LayerFacts],
    batch_size: int,
    micro_batches: int,
    hosts: Sequence[str] | None = None,
) -> str:
    """Write one line per rank; if these are too many, one per row of a team, per team, or per stage."""
    share = _Shares(topology, facts, batch_size, micro_batches)
    ranks = range(topology.size)
    place = topology.place
    foldings: list[Callable[[int], tuple[int, ...]]] = [
        lambda rank: (rank,),
        lambda rank: (place(rank).replica, place(rank).stage, place(rank).row),
        lambda rank: (place(rank).replica, place(rank).stage),
        lambda rank: (place(rank).stage,),
    ]
    groups: list[list[int]] = []
    for fold in foldings:
        folded: dict[tuple[int, ...], list[int]] = {}
        for rank in ranks:
            folded.setdefault(fold(rank), []).append(rank)
        groups = list(folded.values())
        if len(groups) <= MOST_LINES:
            break
    header = ["rank", "node", "replica", "stage", "layers", "row", "col", "parameters", "share of cost"]
    rows = []
    for group in groups[:MOST_LINES]:
        places = [place(rank) for rank in group]
        stage = topology.stages[places[0].stage]
        rows.append([
            _ranges(group),
            _nodes(hosts, group),
            _ranges(p.replica for p in places),
            str(places[0].stage),
            layers(stage, facts),
            _ranges(p.row for p in places),
            _ranges(p.col for p in places),
            _spread([share.parameters(stage, p.col) for p in places]),
            _percents([share.cost(rank) for rank in group]),
        ])  # fmt: skip
    if hosts is None:
        header.pop(1)
        rows = [[row[0], *row[2:]] for row in rows]
    text = aligned(header, rows, left=("node", "layers"))
    if len(groups) > MOST_LINES:
        text += f"\n... and {len(groups) - MOST_LINES} more stages"
    idle = sum(share.cost(rank) == 0 for rank in ranks)
    if idle:
        text += f"\n{idle} of the {topology.size} ranks stay idle: a micro-batch has too few rows for them"
    return text


class _Shares:
    """Computes each rank's part of the parameters and of the operations of a step."""

    def __init__(self, topology: Topology, facts: Sequence[LayerFacts], batch_size: int, micro_batches: int):
        self._topology, self._facts = topology, facts
        self._batch_size, self._micro_batches = batch_size, micro_batches
        self._total = sum(layer.operations for layer in facts) or 1.0
        self._known: dict[tuple[int, int, int], float] = {}

    def parameters(self, stage: Stage, col: int) -> int:
        return round(sum(w.parameters * self._part(w, stage, col) for w in self._facts[stage.first : stage.stop]))

    def cost(self, rank: int) -> float:
        """Return a rank's fraction of the operations; all ranks together have 1."""
        place = self._topology.place(rank)
        stage = self._topology.stages[place.stage]
        key = place[:3]
        if key not in self._known:
            cuts = range(self._micro_batches)
            args = (place, self._batch_size, self._micro_batches)
            self._known[key] = sum(self._topology.batch_rows(*args, m).size for m in cuts) / self._batch_size
        work = sum(w.operations * self._part(w, stage, place.col) for w in self._facts[stage.first : stage.stop])
        return self._known[key] * work / self._total

    def _part(self, layer: LayerFacts, stage: Stage, col: int) -> float:
        return span(layer.units, stage.cols, col).size / layer.units


def layers(stage: Stage, facts: Sequence[LayerFacts]) -> str:
    """Name the weight layers of a stage, shortened."""
    first, last = facts[stage.first].name, facts[stage.stop - 1].name
    name = first if stage.layers == 1 else f"{first}..{last}"
    return shortened(name)


def _ranges(numbers: Iterable[int]) -> str:
    """Write neighbours as 12-31; for many separate ranges the first ones and the number of the others."""
    ordered = sorted(set(numbers))
    found: list[list[int]] = []
    for n in ordered:
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in found]
    return ",".join(texts[:2]) + (f" +{len(texts) - 2} more" if len(texts) > 2 else "")


def _nodes(hosts: Sequence[str] | None, ranks: Sequence[int]) -> str:
    if hosts is None:
        return ""
    names = list(dict.fromkeys(hosts[rank].split(".")[0][:16] for rank in ranks))
    return names[0] + (f" +{len(names) - 1} more" if len(names) > 1 else "")


def _spread(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _percents(shares: Sequence[float]) -> str:
    """Write one rank's part, or the smallest and the largest of several."""
    low, high = f"{100 * min(shares):.2f}", f"{100 * max(shares):.2f}"
    if len(shares) == 1:
        return f"{low} %"
    return f"{len(shares)} x {low if low == high else f'{low}-{high}'} %"
