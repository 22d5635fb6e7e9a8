"""A run in the terminal: one frame of `nettorrent watch`, made with rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nettorrent_mpi.cli.progress import clock
from nettorrent_mpi.cli.runs.charts import thinned
from nettorrent_mpi.cli.runs.rank_bars import rows_of, verdict
from nettorrent_mpi.cli.runs.run_data import DONE, RUNNING, STOPPED, RunData
from nettorrent_mpi.engine.rank_seconds import PARTS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

LATEST = 3  # records that the bars of the ranks are about
MOST_ROWS = 16  # ranks that are shown one by one
PLOT = 7  # lines of a plot
STYLES = {RUNNING: "bold blue", DONE: "bold green", STOPPED: "bold yellow"}
COLOURS = {"compute": "blue", "communication": "yellow", "waiting": "bright_black"}
LETTERS = {"compute": "#", "communication": "+", "waiting": "."}  # where there are no colours
# The dots of a braille character, from its top left one down, and then those of its right half.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def frame(run: RunData, width: int, *, plain: bool = False, coloured: bool = True) -> RenderableType:
    """Return what the terminal shows of a run, `width` columns wide: `plain`, in ASCII; where it is not `coloured`,
    letters tell the parts of a bar from each other."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [_head(run), _bar(run, width, plain)]
    if len(run.parts) > 1:
        before, now = run.parts[-2:]
        parts.append(Text(f"since step {now.first:,} on {now.where}; before on {before.where}", style="dim"))
    plots = Table.grid(padding=(0, 2), expand=True)
    shown = [_plot(run, name, figures, colour, width // 2 - 2, plain) for name, figures, colour in _PLOTS]
    shown = [plot for plot in shown if plot is not None]
    if shown:
        for _ in shown:
            plots.add_column(ratio=1)
        plots.add_row(*shown)
        parts += [Text(""), plots]
    elif run.state == RUNNING:
        parts.append(Text("no record yet: the first comes after train.report_every steps", style="dim"))
    parts += _ranks(run, width, letters=plain or not coloured)
    parts += [Text(f"warning: {line}", style="red") for line in run.damage]
    return Group(*parts)


_PLOTS = (
    ("loss", (("training", "train_loss"),), "cyan"),
    ("accuracy", (("test", "test_accuracy"), ("validation", "validation_accuracy")), "green"),
)


def _head(run: RunData) -> Text:
    from rich.text import Text

    told = Text(run.name, style="bold", no_wrap=True, overflow="ellipsis")
    told.append(f"  {run.state}", style=STYLES.get(run.state, "bold red"))
    if run.ranks is not None:
        told.append(f"  {run.ranks:,} rank{'s' * (run.ranks > 1)}", style="")
    last = run.points[-1] if run.points else None
    if last is not None:
        of = f"/{run.steps:,}" if run.steps is not None else ""
        told.append(f"  step {last.step:,}{of}  epoch {last.figures.get('epoch', 0):.4g}", style="")
        speed, passed = run.last("samples_per_second"), run.last("time")
        told.append(f"  {speed:,.0f} samples/s" if speed is not None else "", style="")
        left = run.seconds_left if run.state == RUNNING else None
        after = f"{clock(left)} left" if left else f"{clock(passed)}" if passed is not None else ""
        told.append(f"  {after}", style="")
    return told


def _bar(run: RunData, width: int, plain: bool) -> Text:
    from rich.text import Text

    if run.steps is None:
        return Text("")
    part = min((run.points[-1].step if run.points else 0) / run.steps, 1.0)
    room = width - 6
    done = round(part * room)
    full, empty = ("=", "-") if plain else ("━", "━")
    told = Text(full * done, style="blue")
    told.append(empty * (room - done), style="bright_black")
    told.append(f" {100 * part:3.0f} %", style="")
    return told


def _plot(
    run: RunData, name: str, figures: Sequence[tuple[str, str]], colour: str, width: int, plain: bool
) -> RenderableType | None:
    """Draw the first of the figures that there is, under a line with its latest value."""
    from rich.text import Text

    for kind, figure in figures:
        points = run.curve(figure)
        if not points:
            continue
        latest = points[-1][1]
        if figure.endswith("accuracy"):
            best = max(value for _, value in points)
            head = f"{kind} {name} {100 * latest:.2f} %, best {100 * best:.2f} %"
            low, high = (f"{100 * f(value for _, value in points):.4g} %" for f in (min, max))
        else:
            head = f"{kind} {name} {latest:.4g}"
            low, high = (f"{f(value for _, value in points):.3g}" for f in (min, max))
        margin = max(len(low), len(high)) + 1
        drawn = plot(points, max(width - margin, 8), PLOT, plain=plain)
        told = Text(f"{head}\n", style="bold")
        for number, line in enumerate(drawn):
            label = high if number == 0 else low if number == PLOT - 1 else ""
            told.append(f"{label:>{margin - 1}} ", style="not bold bright_black")
            told.append(line + "\n", style=f"not bold {colour}")
        told.rstrip()
        return told
    return None


def plot(points: Sequence[tuple[float, float]], width: int, height: int, *, plain: bool = False) -> list[str]:
    """Draw a curve in `height` lines of `width` characters, from its lowest value to its highest: in dots of braille
    or, `plain`, in stars."""
    across, down = (1, 1) if plain else (2, 4)
    columns, rows = width * across, height * down
    points = thinned(points, 2 * columns)
    first, last = points[0][0], points[-1][0]
    low, high = min(y for _, y in points), max(y for _, y in points)
    cells = [[0] * width for _ in range(height)]

    def place(x: float, y: float) -> tuple[int, int]:
        along = (x - first) / (last - first) if last > first else 0.0
        up = (y / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
        return round(along * (columns - 1)), round((1 - up) * (rows - 1))

    before = place(*points[0])
    for point in points:
        at = place(*point)
        steps = max(abs(at[0] - before[0]), abs(at[1] - before[1]), 1)
        for n in range(steps + 1):
            column, row = (round(a + (b - a) * n / steps) for a, b in zip(before, at, strict=True))
            cells[row // down][column // across] |= 1 if plain else _DOTS[column % 2][row % 4]
        before = at
    return ["".join(("*" if plain else chr(0x2800 + dots)) if dots else " " for dots in line) for line in cells]


def _ranks(run: RunData, width: int, *, letters: bool) -> list[RenderableType]:
    """Draw a bar for each rank, and name the slowest."""
    from rich.text import Text

    seconds = run.rank_seconds(LATEST)
    if seconds is None:
        return []
    rows = rows_of(run, seconds, MOST_ROWS)
    margin = max(len(name) for name, _, _ in rows) + 2
    room = max(width - margin - 22, 10)
    keys = Text("")
    for part in PARTS:
        keys.append(f"{LETTERS[part] if letters else '█'} ", style=COLOURS[part])
        keys.append(f"{part}   ", style="dim")
    found: list[RenderableType] = [Text(""), keys]
    for name, parts, rank in rows:
        whole = parts.sum() or 1.0
        edges = [round(room * each / whole) for each in parts.cumsum()]
        line = Text(name.ljust(margin), style="bold magenta" if rank == seconds.slowest else "", no_wrap=True)
        for part, begin, end in zip(PARTS, [0, *edges], edges, strict=False):
            line.append((LETTERS[part] if letters else "█") * (end - begin), style=COLOURS[part])
        line.append(f"  {100 * parts[-1] / whole:3.0f} % waiting", style="not bold dim")
        found.append(line)
    return [*found, Text(verdict(run, seconds), style="bold")]
