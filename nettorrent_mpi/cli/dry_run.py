"""The report of `--dry-run`: who does what when, the predicted speed, and the memory.

Plain text of at most WIDTH columns, the same on a terminal and in a file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import TYPE_CHECKING

from nettorrent_mpi.cli.exchange_report import exchange_block, stream_block
from nettorrent_mpi.cli.layout_report import layers, layout_table
from nettorrent_mpi.cli.speed_report import copies_lines, speed_block, stored_lines
from nettorrent_mpi.cli.tables import MOST_LINES, WIDTH, aligned, wrapped
from nettorrent_mpi.device.visible import VisibleGpu
from nettorrent_mpi.engine.layout import predicted
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.actions import peak_stored, step_end
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.memory import Memory
from nettorrent_mpi.plan.schedule import STREAMS, build, passes
from nettorrent_mpi.plan.stream import window_steps
from nettorrent_mpi.plan.timeline import table
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
