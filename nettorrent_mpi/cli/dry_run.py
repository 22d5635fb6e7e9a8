"""The report of `--dry-run`: who does what when, the predicted speed, and the memory.

Plain text of at most WIDTH columns, the same on a terminal and in a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import TYPE_CHECKING

from nettorrent_mpi.cli.exchange_report import exchange_block, stream_block
from nettorrent_mpi.cli.speed_report import copies_lines, speed_block, stored_lines
from nettorrent_mpi.cli.tables import MOST_LINES, WIDTH, aligned, shortened, wrapped
from nettorrent_mpi.device.visible import VisibleGpu
from nettorrent_mpi.engine.layout import predicted
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.actions import peak_stored, step_end
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.memory import Memory
from nettorrent_mpi.plan.schedule import STREAMS, build, passes
from nettorrent_mpi.plan.stream import window_steps
from nettorrent_mpi.plan.timeline import table
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology
from nettorrent_mpi.plan.zero_bubble import Paces

if TYPE_CHECKING:  # the report needs neither engine nor MPI
    from nettorrent_mpi.engine.setup import Setup


def dry_run(
    setup: Setup,
    memory: Sequence[Memory],
    hosts: Sequence[str] | None = None,
    gpu_memory: Sequence[Memory] = (),
    gpu: VisibleGpu | None = None,
) -> str:
    """Describe a run before it starts; `memory` is that of each stage's largest rank, `gpu_memory` that of its GPU,
    `hosts` names each rank's node if known.

    Raises ScheduleError if the schedule could deadlock, which would be an error of this package.
    """
    config, topology, facts = setup.config, setup.topology, setup.network.facts
    train = config.train
    micro_batches = setup.options.micro_batches
    end = step_end(clip=train.clip_norm is not None, exact=config.exact)
    paces = setup.plan.paces
    lists = build(config.pipeline.kind, len(topology.stages), micro_batches, end=end, paces=paces)
    check(topology, lists)
    parameters = sum(layer.parameters for layer in facts)
    rows, epoch = setup.dataset.train.rows, setup.sampler.steps_per_epoch
    millions, total = sum(layer.operations for layer in facts) / 1e6, setup.steps
    name = config.data.name + (" (not here; as published)" if setup.dataset.missing else "")
    head = [
        f"data      {name}: {rows:,} training rows, {epoch:,} steps per epoch, {total:,} steps in all",
        f"network   {len(facts)} weight layers, {parameters:,} parameters, {millions:,.1f} million operations per row",
        f"step      {train.batch_size} rows in {micro_batches} micro-batch{'es' if micro_batches > 1 else ''}",
        *wrapped("rate      ", setup.rates_line),
        *_device(setup),
        *wrapped("layout    ", f"{setup.layout_line} = {topology.size} ranks"),
        *copies_lines(setup, memory),
        *(
            ["clipping  brings a bubble back: all stages wait for the norm of all gradients before they update"]
            if setup.plan.split and train.clip_norm is not None
            else []
        ),
        *stored_lines(setup),
    ]
    letters = "F forward, B backward"
    if setup.plan.split:
        letters = "F forward, I gradients of inputs, W of weights"
    if config.pipeline.kind in STREAMS:
        whole = window_steps(len(topology.stages), micro_batches)
        letters += f", U update; {whole} mini-batches up to a drain" if whole > 1 else ", U update"
    proof = f"{config.pipeline.kind}: {letters}; checked for all {topology.size} ranks: no deadlock"
    blocks = [
        "\n".join(head),
        "NETWORK\n" + network_table(setup.network),
        "LAYOUT\n" + layout_table(topology, facts, train.batch_size, micro_batches, hosts),
        f"SCHEDULE ({proof})\n" + schedule_table(config.pipeline.kind, len(topology.stages), micro_batches, paces),
        "STAGES\n" + stages_table(setup),
        "SPEED (predicted)\n" + speed_block(setup),
        *([] if gpu is None else [gpu_block(gpu_memory, gpu)]),
        "MEMORY (MB of each stage's largest rank)\n" + memory_table(memory),
        stream_block(setup),
        exchange_block(setup),
    ]
    return "\n\n".join(block for block in blocks if block is not None) + "\n"


def _device(setup: Setup) -> list[str]:
    """Say where the ranks compute, if not on CPU cores."""
    options = setup.options
    if options.device == "cpu":
        return []
    return [f"device    gpu, one for each rank where there are enough; arrays and products in {setup.config.dtype}"]


def network_table(network: Network) -> str:
    """Write a line for the input and for each layer; an activation is its layer's."""
    total = network.whole.operations or 1.0
    rows = [["input", _sizes(network.input_shape), "", ""]]
    parameters, operations = 0, 0.0
    for layer, after in zip_longest(network.whole.layers, network.whole.layers[1:]):
        parameters += sum(math.prod(p.shape) for p in layer.parameters if p.trainable)
        operations += layer.operations
        if after is None or not after.name.startswith(f"{layer.name}."):
            name = layer.name.replace(".", ", ")
            rows.append([name, _sizes(layer.outputs.shape), f"{parameters:,}", f"{100 * operations / total:.1f} %"])
            parameters, operations = 0, 0.0
    lines = [aligned(["layer", "outputs", "parameters", "cost"], rows[:MOST_LINES], left=("layer", "outputs"))]
    if len(rows) > MOST_LINES:
        lines.append(f"... and {len(rows) - MOST_LINES} more layers")
    return "\n".join(lines)


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


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


def schedule_table(pipeline: str, stages: int, micro_batches: int, paces: Paces = ()) -> str:
    """Return the table of plan/timeline.py, cut into pieces that fit the width; of a very long one only the
    beginning."""
    lines = table(build(pipeline, stages, micro_batches, paces=paces)).splitlines()
    label = len(f"stage {stages - 1}")
    steps = len(lines[0][label:].split())
    cell = (len(lines[0]) - label) // steps
    fitting = (WIDTH - label) // cell
    shown = lines[: MOST_LINES + 1]
    pieces = []
    for first in range(0, min(steps, 4 * fitting), fitting):
        cut = slice(label + first * cell, label + (first + fitting) * cell)
        pieces.append("\n".join((line[:label] + line[cut]).rstrip() for line in shown))
    more = []
    if steps > 4 * fitting:
        more.append(f"{steps - 4 * fitting} more time steps")
    if len(lines) > len(shown):
        more.append(f"{len(lines) - len(shown)} more stages")
    return "\n\n".join(pieces) + (f"\n... and {', '.join(more)}" if more else "")


def stages_table(setup: Setup) -> str:
    """Write the cost of each stage: predicted seconds of a step, micro-batches stored at once."""
    config, topology, facts = setup.config, setup.topology, setup.network.facts
    micro_batches = setup.options.micro_batches
    step = predicted(config, setup.network, topology, setup.machine)
    header = [
        "stage", "layers", "ranks", "replicas", "rows", "cols", "parameters", "cost", "stored", "compute", "messages",
    ]  # fmt: skip
    total = sum(layer.operations for layer in facts) or 1.0
    rows = []
    lists = passes(config.pipeline.kind, len(topology.stages), micro_batches, setup.plan.paces)
    for s, stage in enumerate(topology.stages[:MOST_LINES]):
        held = facts[stage.first : stage.stop]
        rows.append([
            str(s),
            layers(stage, facts),
            str(stage.size * topology.replicas),
            str(topology.replicas),
            str(stage.rows),
            str(stage.cols),
            f"{sum(layer.parameters for layer in held):,}",
            f"{100 * sum(layer.operations for layer in held) / total:.1f} %",
            str(peak_stored(lists[s])),
            f"{1e3 * step.compute[s]:.3g} ms",
            f"{1e3 * step.communication[s]:.3g} ms",
        ])  # fmt: skip
    lines = [aligned(header, rows, left=("layers",))]
    if len(topology.stages) > MOST_LINES:
        lines.append(f"... and {len(topology.stages) - MOST_LINES} more stages")
    lines.append("stored: micro-batches held at the same time for backward; compute, messages: predicted, in one step")
    return "\n".join(lines)


def gpu_block(memory: Sequence[Memory], gpu: VisibleGpu) -> str:
    """Write the table of what lies on GPUs, and whether it fits."""
    most = max(each.total for each in memory)
    stage = [each.total for each in memory].index(most)
    fits = f"stage {stage} needs most: {most / 1e9:,.1f} GB of the {gpu.memory / 1e9:,.1f} GB of {gpu.name}"
    if most > gpu.memory:
        fits += (
            ". THAT IS TOO MUCH: lower train.batch_size, raise train.micro_batches, or divide the network over more "
            "ranks (layout)"
        )
    text = (
        "layers: saved for backward, and what kernels, products and convolutions work in. rows: of the data set, all "
        "where twice as much is free, else those that come next. libraries: assumed, as nothing was measured on a GPU. "
        f"Ranks that share a GPU need as much each. {fits}"
    )
    return "\n".join(["GPU MEMORY (MB of each stage's largest rank)", _table(memory), *wrapped("", text)])


def memory_table(memory: Sequence[Memory]) -> str:
    """Write a line for each stage, and what the columns are."""
    copies = "copies: of weights and optimizer, for when ranks are lost. " if any(m.copies for m in memory) else ""
    text = (
        "layers: saved for backward, and workspaces. rows: of the data set; the ranks of a node share them, and each "
        f"counts those it has touched. {copies}files: a copy from which checkpoints are written; rank 0 gathers the "
        "network. libraries: Python, NumPy, MPI"
    )
    lines = [_table(memory), *wrapped("", text)]
    return "\n".join(lines)


def _table(memory: Sequence[Memory]) -> str:
    """Write a line for each stage; columns that would be 0 are omitted."""
    names = [field.name for field in fields(Memory) if any(getattr(each, field.name) for each in memory)]
    rows = [
        [str(s), *(_megabytes(getattr(each, name)) for name in names), _megabytes(each.total)]
        for s, each in enumerate(memory[:MOST_LINES])
    ]
    lines = [aligned(["stage", *names, "total"], rows)]
    if len(memory) > MOST_LINES:
        lines.append(f"... and {len(memory) - MOST_LINES} more stages")
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size < 99.95e6 else f"{size / 1e6:,.0f}"


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
