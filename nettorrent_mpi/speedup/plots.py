"""Pictures of the figures, as PNG and SVG. Only this module loads matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter, ScalarFormatter

from nettorrent_mpi.speedup.figures import UNITS, Figure, Results, figures, limit, modes_device, shown_shares
from nettorrent_mpi.speedup.modes import GPU, MODES, SERIAL
from nettorrent_mpi.speedup.report import PICTURES
from nettorrent_mpi.speedup.shares import PARTS
from nettorrent_mpi.speedup.sides import PEERS, in_words, names

# Okabe and Ito's colours, which colour-blind people can distinguish; where they do not suffice, marks differ.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
_PEER_LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_PART_COLOURS = dict(zip(PARTS, ("#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#BBBBBB"), strict=True))

# Text stays text in one font, so that files are small; the same figures give the same bytes.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "nettorrent", "font.family": "DejaVu Sans"}


def draw(results: Results, folder: Path) -> list[str]:
    """Write NAME.png and NAME.svg into `folder` for every picture that has figures; return the names."""
    drawn = []
    with mpl.rc_context(STYLE):
        for name, make in _MAKERS.items():
            picture = make(results)
            if picture is None:
                continue
            save_svg(picture, folder / f"{name}.svg")
            picture.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
            drawn.append(name)
    return drawn


def save_svg(picture: Picture, path: Path) -> None:
    """Write a picture as SVG, inside a context with STYLE."""
    FigureCanvasAgg(picture)
    picture.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _lines(found: list[Figure], value: Callable[[float, Figure], float], axes: Axes) -> None:
    """Draw a line for every mode and peer over its cores, with bars from the smallest to the largest figure."""
    serial = next(figure for figure in found if figure.mode == SERIAL)
    lines: dict[tuple[str, ...], tuple[list[str], list[Figure]]] = {}  # modes that are the same everywhere are one line
    for mode in dict.fromkeys(mode for figure in found for mode in figure.modes if mode != SERIAL):
        own = [figure for figure in found if mode in figure.modes]
        lines.setdefault(tuple(figure.side["name"] for figure in own), ([], own))[0].append(mode)
    for (mode, *others), own in lines.values():
        if own[0].ours and mode != GPU:  # every mode is the same on one rank
            own.insert(0, serial)
        xs = [figure.cpus for figure in own]
        ys = [value(figure.median, figure) for figure in own]
        ends = [figure.side["samples_per_second"] for figure in own]
        down = [y - value(min(e), f) for y, e, f in zip(ys, ends, own, strict=True)]
        up = [value(max(e), f) - y for y, e, f in zip(ys, ends, own, strict=True)]
        style = {"capsize": 2, "elinewidth": 0.8, **_style(mode)}
        label = _label((mode, *others), own[0])
        if mode == GPU or (not own[0].ours and own[0].device == "gpu"):  # one GPU, beside any number of ranks
            axes.axhline(ys[0], color=style["color"], linestyle=style["linestyle"], linewidth=0.8, zorder=0)
        axes.errorbar(xs, ys, yerr=[down, up], label=label, **style)


def _label(modes: tuple[str, ...], figure: Figure) -> str:
    if figure.mode == GPU:
        return "one GPU"
    if figure.ours:
        return " = ".join(modes)
    return PEERS[figure.mode] + (", one GPU" if figure.device == "gpu" else "")


def _style(mode: str) -> dict[str, Any]:
    """Return the style of a mode or a peer, the same in every picture."""
    style: dict[str, Any] = {"linewidth": 1.2, "markersize": 4}
    if mode == SERIAL:
        return style | {"color": "#000000", "marker": ".", "linestyle": (0, (1, 1))}
    if mode == GPU:
        return style | {"color": "#000000", "marker": "h", "linestyle": (0, (4, 1, 1, 1))}
    if mode in PEERS:
        number = list(PEERS).index(mode)
        return style | {"color": "#777777", "linestyle": _PEER_LINES[number], "marker": _MARKS[number]}
    number = list(MODES).index(mode)
    line: Any = "-" if number < len(_COLOURS) else (0, (6, 1))
    return style | {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKS[number], "linestyle": line}


def _over_ranks(
    results: Results, value: Callable[[float, Figure], float], title: str, *, alike: bool = False
) -> tuple[Picture, Axes] | None:
    """Draw a value over the ranks; `alike`: of sides on the modes' device only."""
    found = [figure for figure in figures(results) if not alike or figure.device == modes_device(results)]
    counts = sorted({figure.cpus for figure in found})
    if len(counts) < 2:
        return None
    picture = Picture(figsize=(7.2, 4.4), layout="constrained")
    axes = picture.add_subplot()
    _lines(found, value, axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    theirs = "one GPU" if results["baseline"] == "gpu" else "threads, processes"
    axes.set(xlabel=f"ranks (of PyTorch: {theirs})", ylabel=title, title=results["config"])
    device = modes_device(results)
    cores = limit(results, device)
    if counts[-1] > cores:
        axes.axvspan(max(cores, counts[0]) * 1.03, counts[-1] * 1.1, color="#000000", alpha=0.06, linewidth=0)
        axes.text(
            counts[-1] * 1.08, 0.99, f"more than the {cores} {UNITS[device]}s", transform=axes.get_xaxis_transform(),
            fontsize=7, ha="right", va="top",
        )  # fmt: skip
    tidy(axes)
    return picture, axes


def speedup(results: Results) -> Picture | None:
    """Draw the speedup relative to one rank of ours over the ranks, with the ideal line."""
    one = "one GPU" if modes_device(results) == "gpu" else "one rank"
    drawn = _over_ranks(results, lambda speed, of: speed * of.speedup / of.median, f"speedup against {one}")
    if drawn is None:
        return None
    picture, axes = drawn
    counts = sorted({figure.cpus for figure in figures(results)})
    axes.plot(counts, counts, color="#000000", linewidth=0.8, linestyle=(0, (2, 2)), label="ideal", zorder=0)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    picture.legend(loc="outside right upper", fontsize=7)
    return picture


def efficiency(results: Results) -> Picture | None:
    """Draw speedup divided by the number of ranks."""
    drawn = _over_ranks(results, lambda speed, of: speed * of.efficiency / of.median, "efficiency", alike=True)
    if drawn is None:
        return None
    picture, axes = drawn
    axes.axhline(1.0, color="#000000", linewidth=0.8, linestyle=(0, (2, 2)), label="ideal", zorder=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    picture.legend(loc="outside right upper", fontsize=7)
    return picture


def accuracy(results: Results) -> Picture | None:
    """Draw the seconds until each side reached the accuracy, the fastest first, and the way there.

    Many sides learn alike, and only the time of an epoch differs: over the logarithm of time their curves are the same,
    shifted. The bars name the lines and tell them apart where they are close together.
    """
    told = results["accuracy"]
    runs = [run for run in told["runs"] if run["curve"]] if told else []
    if not runs:
        return None
    sides = {side["name"]: side for side in results["sides"]}
    last = max(run["curve"][-1][0] for run in runs)
    runs.sort(key=lambda run: (run["seconds"] is None, run["seconds"] or run["curve"][-1][0]))
    picture = Picture(figsize=(9.6, 3.0 + 0.16 * len(runs)), layout="constrained")
    curves, bars = picture.subplots(1, 2, width_ratios=(1.1, 1))
    for place, run in enumerate(runs):
        style = _style(sides[run["side"]]["mode"])
        xs, ys = [point[0] for point in run["curve"]], [point[2] for point in run["curve"]]
        curves.plot(xs, ys, **style | {"markersize": 3})
        seconds, reached = (run["seconds"], 1.0) if run["seconds"] is not None else (xs[-1], 0.5)
        bars.plot((0, seconds), (place, place), **style | {"linewidth": 2, "markevery": [1], "alpha": reached})
        end = f"{seconds:.1f} s" if reached == 1 else f"not reached: {max(ys):.2%} in {seconds:.1f} s"
        bars.text(seconds + 0.03 * last, place, end, fontsize=7, va="center")
    curves.axhline(told["wanted"], color="#000000", linewidth=0.8, linestyle=(0, (2, 2)))
    curves.set_xscale("log")
    curves.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    curves.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    curves.xaxis.set_minor_locator(NullLocator())
    curves.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    curves.set(xlabel="seconds since training began", ylabel=f"accuracy on the {told['of']} rows")
    bars.set_yticks(range(len(runs)), [in_words(sides[run["side"]]) for run in runs])
    bars.set_ylim(len(runs) - 0.4, -0.6)
    bars.set(xlim=(0, last * 1.3), xlabel=f"seconds to {told['wanted']:.2%}")
    picture.suptitle(results["config"])
    tidy(curves)
    tidy(bars)
    bars.grid(visible=False, axis="y")
    return picture


def shares(results: Results) -> Picture | None:
    """Draw how every rank spent its time, a group of bars for each mode."""
    traces = results["traces"]
    if not traces:
        return None
    sides = {side["name"]: side for side in results["sides"]}
    labels, told, places, place = [], [], [], 0.0
    for trace in traces:
        for whose, share in shown_shares(trace):
            labels.append(f"{names(sides[trace['side']])}, {whose}")
            told.append(share)
            places.append(place)
            place += 1.0
        place += 0.6  # between sides
    picture = Picture(figsize=(7.2, 1.0 + 0.19 * place), layout="constrained")
    axes = picture.add_subplot()
    left = [0.0] * len(told)
    for part in PARTS:
        widths = [share[part] for share in told]
        axes.barh(places, widths, left=left, height=0.85, color=_PART_COLOURS[part], label=part, linewidth=0)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="part of the rank's time", title=results["config"])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    tidy(axes)
    picture.legend(loc="outside lower center", ncols=len(PARTS), fontsize=7)
    return picture


def tidy(axes: Axes) -> None:
    """Draw a grid behind the data, and no frame at the top and right."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


_MAKERS: dict[str, Callable[[Results], Picture | None]] = dict(
    zip(PICTURES, (speedup, efficiency, accuracy, shares), strict=True)
)
