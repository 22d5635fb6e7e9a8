"""Pictures of the figures in exchange.json, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks import exchange_accuracy, exchange_network
from nettorrent_mpi.plan.actions import parse
from nettorrent_mpi.speedup.plots import STYLE, tidy

# Okabe and Ito's colours, which colour-blind people can distinguish.
COLOURS = {
    "serial": "#000000",
    "exact": "#0072B2",
    "gossip": "#D55E00",
    "elite": "#009E73",
    "async": "#CC79A7",
    "ddp": "#999999",
}
LINES: dict[str, dict[str, Any]] = {"serial": {"linestyle": "--", "zorder": 3.0}}  # it should lie on the exact one
FORWARD, BACKWARD, UPDATE = ("#56B4E9", "#B9DFF5"), ("#E69F00", "#F6D698"), "#777777"  # of even and odd steps


def draw(report: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Draw exchange-NAME.svg for every section of the report that has a picture."""
    with mpl.rc_context(STYLE):
        for name, picture in PICTURES.items():
            if name in report:
                figure = picture(report[name])
                FigureCanvasSVG(figure)
                figure.savefig(folder / f"exchange-{name}.svg", metadata={"Date": None, "Creator": None})


def accuracy(section: Mapping[str, Any]) -> Figure:
    """Draw test accuracy by epoch, a panel for each configuration; means over the seeds."""
    cases = [case for case in exchange_accuracy.CASES if any(run["case"] == case for run in section["runs"])]
    figure = Figure(figsize=(4.2 * len(cases), 3.4), layout="constrained")
    for number, case in enumerate(cases):
        axes = figure.add_subplot(1, len(cases), number + 1)
        for side, told in exchange_accuracy.SIDES.items():
            runs = [run["by_epoch"] for run in section["runs"] if (run["case"], run["side"]) == (case, side)]
            if runs:
                epochs = [epoch for epoch, _ in runs[0]]
                heights = [100 * mean(height for _, height in at) for at in zip(*runs, strict=False)]
                line: dict[str, Any] = {"color": COLOURS[side], "linewidth": 1.3, "marker": "o", "markersize": 2.5}
                axes.plot(epochs[: len(heights)], heights, label=told.title, **line, **LINES.get(side, {}))
        axes.set(title=case, xlabel="epoch", ylabel="test accuracy, %" if number == 0 else "")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    figure.axes[-1].legend(fontsize=7, loc="lower right")
    return figure


def network(section: Mapping[str, Any]) -> Figure:
    """Draw step rates as bars."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    rows = section["sides"]
    links = {exchange_network.LIMITED: section["rate"], exchange_network.UNLIMITED: exchange_network.UNLIMITED}
    names = [f"{exchange_network.SIDES[row['side']].title}, {links[row['link']]}" for row in rows]
    bars = axes.barh(names, [row["median"] for row in rows], color=[COLOURS[row["side"]] for row in rows], height=0.7)
    axes.bar_label(bars, labels=[f"{row['median']:.2f}" for row in rows], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="steps per second")
    tidy(axes)
    return figure


def trace(section: Mapping[str, Any]) -> Figure:
    """Draw the actions of each rank over a few steps, measured above and simulated below, for each pipeline."""
    panels = [
        (f"{name}, {kind}", told[f"{kind}_spans"])
        for name, told in section["pipelines"].items()
        for kind in ("measured", "simulated")
    ]
    width = max(end for _, spans in panels for *_, end in spans)
    figure = Figure(figsize=(9, 0.5 + len(panels) * (0.55 + 0.22 * section["ranks"])), layout="constrained")
    for number, (title, spans) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        bars: dict[tuple[int, str], list[tuple[float, float]]] = {}  # many in one: the file stays small
        for rank, name, step, begin, end in spans:
            kind = parse(name).kind
            colour = {"F": FORWARD[step % 2], "B": BACKWARD[step % 2]}.get(kind, UPDATE)
            bars.setdefault((rank, colour), []).append((begin, end - begin))
            if kind in ("F", "B") and end - begin > width / 60:
                label = name.lstrip("0123456789")
                axes.text((begin + end) / 2, rank, label, fontsize=6, ha="center", va="center")
        for (rank, colour), ranges in bars.items():
            axes.broken_barh(ranges, (rank - 0.4, 0.8), facecolors=colour, linewidth=0, clip_on=False)
        axes.set(ylim=(section["ranks"] - 0.5, -0.5), xlim=(0, width), yticks=range(section["ranks"]))
        axes.set_yticklabels([f"rank {rank}" for rank in range(section["ranks"])], fontsize=7)
        axes.set_title(title, fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[-1].set_xlabel("milliseconds; the shade of a colour changes with the step; grey: update", fontsize=8)
    return figure


PICTURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {"accuracy": accuracy, "network": network, "trace": trace}
