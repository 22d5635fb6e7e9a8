"""The analysis in words: which mode was fastest where, what limited the others, and what the figures do not show."""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.speedup.figures import (
    UNITS,
    WIDE,
    Figure,
    Results,
    best,
    figures,
    limit,
    losses,
    modes_device,
    ranked,
)
from nettorrent_mpi.speedup.modes import APART, GPU, SERIAL
from nettorrent_mpi.speedup.sides import in_words

_LOSSES = {
    "compute": "dearer compute",
    "communication": "communication",
    "waiting": "waiting for the slowest rank",
    "bubble": "the pipeline's bubble",
    "other": "between the actions",
}
_NOTABLE = 0.02  # part of ranks x time: less is no reason to be shown


def analysis(results: Results) -> list[str]:
    """Return paragraphs and a table that are written from the figures alone."""
    found = figures(results)
    if not found:
        return ["There are no figures yet."]
    paragraphs = [doubtful(found), overloaded(results), winners(results, found)]
    paragraphs += [against_gpu(found), against_torch(results, found), bounds(results), to_accuracy(results)]
    return [text for text in paragraphs if text]


def doubtful(found: list[Figure]) -> str:
    """Warn of figures that are not worth much: of widely spread ones, and of those without a spread."""
    told = []
    wide = sorted((figure for figure in found if figure.spread > WIDE), key=lambda figure: -figure.spread)
    if wide:
        names = _listed([f"{in_words(figure.side)} ({figure.spread:.0%})" for figure in wide])
        told.append(
            f"**The figures of {len(wide)} of {len(found)} sides spread by more than {WIDE:.0%}:** {names}. Something "
            "disturbed them, such as other programs on this machine; a difference smaller than the spread is chance. "
            "Repeat on an idle machine, or with more and longer turns (`--repeats`, `--steps`)."
        )
    once = [in_words(figure.side) for figure in found if figure.turns == 1]
    if once:
        what = "Every side" if len(once) == len(found) else f"{_listed(once)}"
        told.append(f"**{what} was measured once,** so how far chance changes the figures is unknown: use `--repeats`.")
    return " ".join(told)


def overloaded(results: Results) -> str:
    """Explain that there were more ranks than cores, or GPUs; empty if there were not."""
    device = modes_device(results)
    most, unit = limit(results, device), UNITS[device]
    sides = [side for side in results["sides"] if side["device"] == device and not side["impossible"]]
    beyond = sorted({side["cpus"] for side in sides if side["cpus"] > most})
    if not beyond:
        return ""
    text = f"**{_listed(beyond)} ranks exceed the {_units(most, unit)} of this machine.** "
    if device == "gpu":
        return text + (
            "There they share a GPU: their work takes turns, and they exchange through the host's memory where NCCL "
            "cannot. Such figures say nothing about a machine with as many GPUs as ranks."
        )
    return text + (
        f"There they take turns on a core, so no speedup beyond {most} is possible, and time that a rank spends "
        "without a core is counted as whatever it was doing. Such figures show how the modes cope with overload; they "
        "say nothing about a machine with as many cores as ranks."
    )


def winners(results: Results, found: list[Figure]) -> str:
    """Say which mode was fastest on each number of ranks."""
    device, told = modes_device(results), []
    most, unit = limit(results, device), UNITS[device]
    serial = next((figure for figure in found if figure.mode == SERIAL), None)
    one = "one rank" if serial is None else in_words(serial.side)
    for ranks in sorted({figure.cpus for figure in found if figure.ours and figure.cpus > 1}):
        first, *others = best(found, ranks, ours=True, device=device)
        text = (
            f"On {ranks} ranks{f' (more than {unit}s)' if ranks > most else ''} {first.name} was the fastest with "
            f"{first.median:,.0f} samples/s, {first.speedup:.2f} times {one} ({first.efficiency:.0%} efficiency)"
        )
        if others:
            text += f"; {_listed([f.name for f in others])} is not distinguishable from it within the spread"
        alike = next((f for f in ranked(found, ranks, ours=True, device=device) if f.mode not in APART), None)
        if first.mode in APART and alike is not None:
            text += (
                f"; of the modes with the weights of one rank {alike.name} was, with {alike.median:,.0f} "
                f"({alike.speedup:.2f} times)"
            )
        if first.speedup <= 1:
            text += f"; nothing was faster than {one}"
        told.append(text + ".")
    if serial is not None:
        told.insert(0, f"{one.capitalize() if device == 'cpu' else 'One GPU'} made {serial.median:,.0f} samples/s.")
    return " ".join(told)


def against_gpu(found: list[Figure]) -> str:
    """Compare modes on CPU cores with one GPU, where that is the baseline."""
    gpu = next((figure for figure in found if figure.mode == GPU), None)
    ours = [figure for figure in found if figure.ours and figure.device == "cpu"]
    if gpu is None or not ours:
        return ""
    first = max(ours, key=lambda figure: figure.median)
    return (
        f"One GPU made {gpu.median:,.0f} samples/s, {gpu.speedup:.2f} times one rank on a core; the fastest on cores, "
        f"{in_words(first.side)}, made {first.of_gpu or 0:.2f} times as many as the GPU."
    )


def against_torch(results: Results, found: list[Figure]) -> str:
    """Compare our modes with PyTorch's best on the same number of cores, or on one GPU."""
    told = []
    device = "gpu" if results["baseline"] == "gpu" else "cpu"
    for count in sorted({figure.cpus for figure in found if not figure.ours}):
        mine, theirs = (best(found, count, ours=ours, device=device) for ours in (True, False))
        if not mine or not theirs:
            continue
        ratio = mine[0].median / theirs[0].median
        own = in_words(mine[0].side) if count == 1 else f"{mine[0].name} on {count} ranks"
        told.append(
            f"{ratio:.2f} times PyTorch's best ({in_words(theirs[0].side)}, {theirs[0].median:,.0f} samples/s) "
            f"with {own}"
        )
    where = "on the same GPU" if device == "gpu" else "on as many cores"
    return f"Beside PyTorch {where} this package made {_listed(told)}." if told else ""


def bounds(results: Results) -> str:
    """Return a table of what each traced side lost its efficiency to, the most efficient first."""
    found = [told for trace in results["traces"] if (told := losses(results, trace["side"])) is not None]
    if not found:
        return ""
    text = (
        "What bounded them, in parts of ranks x time beyond what one rank needs: efficiency and losses add up to 100%. "
        "The largest loss of each is bold; a negative one is a gain, as from parts that fit into caches. Compute is "
        "dearer in smaller pieces, and beside processes that use the same memory or cores."
    )
    lines = [
        text,
        "",
        f"| side | efficiency | {' | '.join(_LOSSES.values())} |",
        f"|---|---:|{'---:|' * len(_LOSSES)}",
    ]
    for figure, lost in sorted(found, key=lambda told: -told[0].efficiency):
        most = max(lost, key=lambda part: lost[part])
        cells = [
            f"**{lost[part]:.0%}**" if part == most and lost[part] >= _NOTABLE else f"{lost[part]:.0%}"
            for part in _LOSSES
        ]
        lines.append(f"| {in_words(figure.side)} | {figure.efficiency:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("-0%", "0%")


def to_accuracy(results: Results) -> str:
    """Say which side first reached the requested accuracy."""
    told = results["accuracy"]
    if told is None or not told["runs"]:
        return ""
    sides = {side["name"]: side for side in results["sides"]}
    reached = sorted((run for run in told["runs"] if run["seconds"] is not None), key=lambda run: run["seconds"])
    missed = [in_words(sides[run["side"]]) for run in told["runs"] if run["seconds"] is None]
    if not reached:
        return f"No side reached {told['wanted']:.2%}."
    text = f"The first at {told['wanted']:.2%} was {in_words(sides[reached[0]['side']])}, after "
    text += f"{reached[0]['seconds']:.1f} s"
    alone = next((run for run in reached if sides[run["side"]]["mode"] == SERIAL), None)
    if alone is not None and alone is not reached[0]:
        times = alone["seconds"] / max(reached[0]["seconds"], 1e-9)
        text += f", {times:.2f} times as fast as {in_words(sides[alone['side']])}"
    text += ". Each training was done once, so small differences are chance."
    return text + (f" {_listed(missed)} did not reach it." if missed else "")


def _units(count: int, unit: str) -> str:
    return f"{count} {unit}{'s' if count != 1 else ''}"


def _listed(items: Sequence[object]) -> str:
    """Join texts like "a, b and c"."""
    texts = [str(item) for item in items]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
