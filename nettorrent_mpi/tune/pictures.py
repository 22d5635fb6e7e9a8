"""Pictures of a study, as SVG. Only this module of the folder loads matplotlib (the extra `plots`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from nettorrent_mpi.config.search_space import Choice, Parameter
from nettorrent_mpi.speedup.plots import STYLE, save_svg
from nettorrent_mpi.tune.trials import COMPLETE, Trial, short, value_in_words

TICKS = 5  # of a range
SPREAD = 0.08  # of an axis: the lines through one value of a choice


def draw(
    folder: Path, parameters: Mapping[str, Parameter], trials: Sequence[Trial], per_hour: Mapping[int, float]
) -> list[str]:
    """Write the pictures that have something to show; return their names."""
    complete = [trial for trial in trials if trial.state == COMPLETE]
    pictures: dict[str, Picture] = {}
    with mpl.rc_context(STYLE):
        if complete:
            pictures["parallel.svg"] = _parallel(parameters, complete)
        if len(per_hour) > 1:
            pictures["speedup.svg"] = _speedup(per_hour)
        for name, picture in pictures.items():
            save_svg(picture, folder / name)
    return list(pictures)


def _parallel(parameters: Mapping[str, Parameter], trials: Sequence[Trial]) -> Picture:
    """Draw each trial as a line over one axis for each parameter and one for the accuracy, which also colours it."""
    picture = Picture(figsize=(1.8 * len(parameters) + 2.6, 4.4), layout="constrained")
    axes = picture.add_subplot()
    accuracies = [trial.accuracy or 0.0 for trial in trials]
    low, high = min(accuracies), max(accuracies)
    wide = high - low or 1.0
    order = sorted(range(len(trials)), key=lambda index: accuracies[index])  # the best ones lie on top
    lines = []
    for index in order:
        aside = SPREAD * (
            (accuracies[index] - low) / wide - 0.5
        )  # lines through the same values do not hide each other
        heights = [
            _height(parameter, trials[index].point[name]) + aside * isinstance(parameter, Choice)
            for name, parameter in parameters.items()
        ]
        lines.append(list(enumerate([*heights, (accuracies[index] - low) / wide])))
    drawn = LineCollection(lines, cmap="viridis", linewidths=1.2, alpha=0.8)
    drawn.set_array([100 * accuracies[index] for index in order])
    axes.add_collection(drawn)
    for place, (_name, parameter) in enumerate(parameters.items()):
        _axis(axes, place, [(_height(parameter, label), value_in_words(label)) for label in _ticks(parameter)])
    _axis(axes, len(parameters), [(part / 4, f"{100 * (low + part / 4 * wide):.2f} %") for part in range(5)])
    names = [*(short(name, parameters) for name in parameters), "validation accuracy"]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlim=(-0.3, len(parameters) + 0.6), ylim=(-0.07, 1.07), yticks=[])
    axes.spines[:].set_visible(False)
    picture.colorbar(drawn, label="validation accuracy (%)")
    return picture


def _axis(axes: Any, place: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(place, color="#000000", linewidth=0.8)
    for height, text in ticks:
        axes.plot([place, place + 0.03], [height, height], color="#000000", linewidth=0.8)
        behind = {"facecolor": "#FFFFFF", "alpha": 0.7, "edgecolor": "none", "pad": 1}
        told = text if len(text) <= 16 else f"{text[:13]}..."
        axes.text(place + 0.05, height, told, fontsize=8, va="center", bbox=behind)


def _height(parameter: Parameter, label: Any) -> float:
    """Return where a value lies on its axis, from 0 to 1."""
    if isinstance(parameter, Choice):
        index = [(type(each), each) for each in parameter.labels].index((type(label), label))
        return index / (len(parameter.labels) - 1) if len(parameter.labels) > 1 else 0.5
    low, high, value = parameter.low, parameter.top, float(label)
    if parameter.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _ticks(parameter: Parameter) -> list[Any]:
    if isinstance(parameter, Choice):
        return list(parameter.labels)
    low, high = parameter.low, parameter.top
    parts = [part / (TICKS - 1) for part in range(TICKS)]
    found = [low * (high / low) ** part if parameter.log else low + part * (high - low) for part in parts]
    return sorted({round(each) for each in found}) if parameter.whole else found


def _speedup(per_hour: Mapping[int, float]) -> Picture:
    """Draw the trials an hour over the number of groups, beside what as many times the fewest would make."""
    counts = sorted(per_hour)
    picture = Picture(figsize=(5.2, 4.0), layout="constrained")
    axes = picture.add_subplot()
    ideal = [per_hour[counts[0]] * count / counts[0] for count in counts]
    axes.plot(counts, ideal, color="#777777", linestyle="--", linewidth=0.8, label="linear")
    axes.plot(counts, [per_hour[count] for count in counts], color="#0072B2", marker="o", label="measured")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="groups of ranks", ylabel="trials an hour", ylim=(0, None))
    axes.legend(frameon=False)
    return picture
