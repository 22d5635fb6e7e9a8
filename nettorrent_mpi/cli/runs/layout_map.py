"""The layout of a run as a map: a column for each stage's swarm, a grid of rows x cols for each replica."""

from __future__ import annotations

from html import escape

from nettorrent_mpi.cli.runs.run_data import RunData
from nettorrent_mpi.plan.topology import Topology

MOST_CELLS = 4096  # ranks that are drawn one by one
MOST_HOSTS = 16  # in the legend
LABELLED = 512  # ranks whose numbers are written


def layout_map(run: RunData, slowest: int | None) -> str:
    """Draw the ranks where they stand, coloured by host; empty if the layout is not known."""
    topology = run.topology
    if topology is None:
        return ""
    hosts = list(dict.fromkeys(run.host(rank) for rank in range(topology.size)))
    shown = min(topology.replicas, max(1, MOST_CELLS // (topology.size // topology.replicas)))
    cell = 34 if topology.size <= LABELLED else 14
    cols = [stage.cols * cell for stage in topology.stages]
    width = sum(max(each, 110) + 46 for each in cols) - 46 + 20
    tall = max(stage.rows for stage in topology.stages) * cell
    band = tall + 26
    parts, x = [], 10.0
    for number, stage in enumerate(topology.stages):
        room = max(cols[number], 110)
        middle = x + room / 2
        grid = f"stage {number}, {stage.rows} x {stage.cols}"
        parts.append(f'<text class="name middle" x="{middle}" y="14">{escape(run.stage_names[number])}</text>')
        parts.append(f'<text class="tick middle" x="{middle}" y="30">{grid}</text>')
        for replica in range(shown):
            top = 44 + replica * band + (tall - stage.rows * cell) / 2
            for rank in topology.team(replica, number):
                at = topology.place(rank)
                colour = f"host{hosts.index(run.host(rank)) % MOST_HOSTS}"
                left, up = middle - cols[number] / 2 + at.col * cell, top + at.row * cell
                mark = " slowest" if rank == slowest else ""
                tip = escape(f"{run.place(rank)}, row {at.row}, col {at.col}")
                parts.append(
                    f'<rect class="cell {colour}{mark}" x="{left + 1}" y="{up + 1}" width="{cell - 2}" '
                    f'height="{cell - 2}" rx="4"><title>{tip}</title></rect>'
                )
                if cell > 20:
                    parts.append(
                        f'<text class="label middle" x="{left + cell / 2}" y="{up + cell / 2 + 4}">{rank}</text>'
                    )
            if number + 1 < len(topology.stages):
                y = 44 + replica * band + tall / 2
                parts.append(f'<path class="arrow" d="M{x + room + 9} {y}h26m-6 -5l6 5l-6 5"/>')
        x += room + 46
    height = 44 + shown * band
    names = [escape(host or "host unknown") for host in hosts]
    keys = "".join(f'<span class="key host{i}">{name}</span>' for i, name in enumerate(names[:MOST_HOSTS]))
    if len(hosts) > MOST_HOSTS:
        keys += f"<span>and {len(hosts) - MOST_HOSTS:,} hosts more, whose colours repeat</span>"
    note = _note(topology, shown)
    size = f'style="width:{min(width, 1160)}px"'
    return (
        f'<svg class="map" viewBox="0 0 {width} {height}" {size} role="img">{"".join(parts)}</svg>'
        f'<p class="keys">{keys}</p>{note}'
    )


def _note(topology: Topology, shown: int) -> str:
    told = []
    if topology.replicas > 1:
        told.append(f"{topology.replicas:,} replicas, below each other")
    if shown < topology.replicas:
        told.append(f"the first {shown:,} are drawn")
    return f"<p>{'; '.join(told)}.</p>" if told else ""
