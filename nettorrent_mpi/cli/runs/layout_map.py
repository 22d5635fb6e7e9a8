"""The layout of a run as a map: a column for each stage's swarm, a grid of rows x cols for each replica."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from nettorrent_mpi.cli.runs.run_data import RunData
from nettorrent_mpi.plan.topology import Stage, Topology

MOST_CELLS = 4096  # ranks that are drawn one by one
MOST_HOSTS = 16  # in the legend
LABELLED = 512  # ranks whose numbers are written
WIDTH, GAP, HEAD, SPACE = 1160, 46, 44, 26  # of the map; between stages; above the teams; below each


def layout_map(run: RunData, slowest: int | None) -> str:
    """Draw the ranks where they stand, coloured by host; empty if the layout is not known."""
    topology = run.topology
    if topology is None:
        return ""
    hosts = list(dict.fromkeys(run.host(rank) for rank in range(topology.size)))
    colours = {host: f"host{number % MOST_HOSTS}" for number, host in enumerate(hosts)}
    shown = min(topology.replicas, max(1, MOST_CELLS // (topology.size // topology.replicas)))
    cell = 34 if topology.size <= LABELLED else 14
    rooms = [max(stage.cols * cell, 110) for stage in topology.stages]
    wide = sum(rooms) + GAP * len(rooms)  # of a replica, the space to the next one included
    across = max(1, min(shown, WIDTH // wide))
    tall = max(stage.rows for stage in topology.stages) * cell
    parts = []
    for column in range(across):
        x = column * wide
        for number, stage in enumerate(topology.stages):
            middle = x + rooms[number] / 2
            name, grid = escape(run.stage_names[number]), f"stage {number}, {stage.rows} x {stage.cols}"
            parts.append(f'<text class="name middle" x="{middle}" y="14">{name}</text>')
            parts.append(f'<text class="tick middle" x="{middle}" y="30">{grid}</text>')
            x += rooms[number] + GAP
    for replica in range(shown):
        x, top = replica % across * wide, HEAD + replica // across * (tall + SPACE)
        for number in range(len(topology.stages)):
            at = x + rooms[number] / 2, top + tall / 2
            parts += _team(run, topology.team(replica, number), topology.stages[number], at, cell, colours, slowest)
            x += rooms[number] + GAP
            if number + 1 < len(topology.stages):
                parts.append(f'<path class="arrow" d="M{x - GAP + 9} {at[1]}h26m-6 -5l6 5l-6 5"/>')
    width, height = across * wide - GAP, HEAD + -(-shown // across) * (tall + SPACE)
    names = [escape(host or "host unknown") for host in hosts]
    keys = "".join(f'<span class="key host{i}">{name}</span>' for i, name in enumerate(names[:MOST_HOSTS]))
    if len(hosts) > MOST_HOSTS:
        keys += f"<span>and {len(hosts) - MOST_HOSTS:,} hosts more, whose colours repeat</span>"
    size = f'style="width:{min(width, WIDTH)}px"'
    return (
        f'<svg class="map" viewBox="0 0 {width} {height}" {size} role="img">{"".join(parts)}</svg>'
        f'<p class="keys">{keys}</p>{_note(topology, shown)}'
    )


def _team(
    run: RunData,
    ranks: Sequence[int],
    stage: Stage,
    middle: tuple[float, float],
    cell: int,
    colours: Mapping[str, str],
    slowest: int | None,
) -> Iterator[str]:
    """Yield the cells of a team's grid, around `middle`."""
    for number, rank in enumerate(ranks):
        row, col = divmod(number, stage.cols)
        left, up = middle[0] + (col - stage.cols / 2) * cell, middle[1] + (row - stage.rows / 2) * cell
        mark = " slowest" if rank == slowest else ""
        tip = escape(f"{run.place(rank)}, row {row}, col {col}")
        yield (
            f'<rect class="cell {colours[run.host(rank)]}{mark}" x="{left + 1}" y="{up + 1}" width="{cell - 2}" '
            f'height="{cell - 2}" rx="4"><title>{tip}</title></rect>'
        )
        if cell > 20:
            yield f'<text class="label middle" x="{left + cell / 2}" y="{up + cell / 2 + 4}">{rank}</text>'


def _note(topology: Topology, shown: int) -> str:
    told = [f"{topology.replicas:,} replicas, in the order of their ranks"] if topology.replicas > 1 else []
    told += [f"the first {shown:,} are drawn"] if shown < topology.replicas else []
    return f"<p>{'; '.join(told)}.</p>" if told else ""
