"""The report: results.json as tables, with an analysis in words from the figures."""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.speedup import machine
from nettorrent_mpi.speedup.analysis import analysis
from nettorrent_mpi.speedup.figures import UNITS, WIDE, Figure, Results, figures, limit, modes_device, shown_shares
from nettorrent_mpi.speedup.modes import GPU, MODES, SERIAL
from nettorrent_mpi.speedup.shares import PARTS
from nettorrent_mpi.speedup.sides import DDP, OURS, PEERS, in_words

PICTURES = ("speedup", "efficiency", "accuracy", "shares")
SHARES = """\
Parts of each rank's time in a separate run with `trace: true`. Compute includes the collective operations inside layers
(divided neurons, batch norm), which the trace does not show separately. Communication: sending, receiving, reducing
gradients and gathering parameters once all required ranks were there, and exchanging with other replicas. Waiting: for
the last rank to arrive at a reduction or a gathering. Bubble: for a message that had not been sent. Other: between the
actions."""


def to_markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """Return the whole report; `plots` are the names of the pictures beside it, without their suffixes."""
    lines = [f"# Speedup of {results['config']}", "", *_head(results), ""]
    if not results["complete"]:
        lines += [f"**Incomplete: {failure_in_words(results)}. The report has the results so far.**", ""]
    lines += ["## What the figures say", "", *(line for text in analysis(results) for line in (text, ""))]
    lines += ["## Samples per second", "", *_table(results), ""]
    lines += [f"![{name}]({name}.svg)\n" for name in plots if name in ("speedup", "efficiency")]
    impossible = [side for side in results["sides"] if side["impossible"]]
    if impossible:
        lines += ["## Not possible here", "", "| side | why |", "|---|---|"]
        lines += [f"| {in_words(side)} | {_cell(side['impossible'])} |" for side in impossible]
        lines += [""]
    if results["traces"]:
        lines += ["## Where the time went", "", *_shares(results), ""]
        lines += [f"![{name}]({name}.svg)\n" for name in plots if name == "shares"]
    if results["accuracy"] is not None and results["accuracy"]["runs"]:
        lines += ["## Time to accuracy", "", *_accuracy(results), ""]
        lines += [f"![{name}]({name}.svg)\n" for name in plots if name == "accuracy"]
    lines += ["## What was equal, and what was not", "", *(f"- {text}" for text in equality(results))]
    return "\n".join(lines).rstrip() + "\n"


def failure_in_words(results: Results) -> str:
    """Explain why the comparison is incomplete."""
    failure = results["failure"]
    if failure is None:
        return "it is still running, or was killed"
    if "command" not in failure:
        return "it was interrupted"
    return f"`{failure['command']}` failed with {failure['exit_code']}"


def _head(results: Results) -> list[str]:
    host, network = results["host"], results["network"]
    done = sorted({len(side["samples_per_second"]) for side in results["sides"] if side["samples_per_second"]})
    turns = " to ".join(str(n) for n in dict.fromkeys((done[0], done[-1]))) if done else "0"
    each = "one GPU a rank" if modes_device(results) == "gpu" else "one BLAS thread a rank"
    what = "Figures of one turn" if done == [1] else f"Medians of {turns} alternating turns"
    told = (
        f"{network['weight_layers']} weight layers, {network['parameters']:,} parameters, "
        f"{network['operations'] / 1e6:,.2f} million operations per row; {results['batch_size']} rows a step, "
        f"{results['dtype']}, {results['optimizer']}."
    )
    how = (
        f"{what} of {results['steps']} steps each, {each}; spread = "
        "(largest - smallest) / median. "
        f"{machine.in_words(host)} {results['mpi'] or 'MPI unknown'}; "
        f"kernels of {', '.join(results['kernels'] or ['unknown'])}. Commit {host['commit']}, {host['date']}. "
        f"Made by `{results['command']}`."
    )
    return [told, "", how]


def _table(results: Results) -> list[str]:
    found, device = figures(results), modes_device(results)
    more = [name for name, there in (("of one GPU", device == "cpu"), ("of PyTorch on one GPU", True)) if there]
    more = [name for name in more if any(_against(figure, name) for figure in found)]
    names = ["side", f"{UNITS[device]}s used", "samples/s", "spread", "speedup", "efficiency", *more]
    lines = [
        f"| {' | '.join(names)} | layout | micro-batches |",
        f"|---|{'---:|' * (len(names) - 1)}---|---:|",
    ]
    lines += [_line(figure, results, more) for figure in found]
    for unit in dict.fromkeys(figure.device for figure in found):
        most = limit(results, unit)
        if any(figure.cpus > most for figure in found if figure.device == unit):
            lines += ["", f"\\* more than the {most} {UNITS[unit]}{'s' if most > 1 else ''} of this machine"]
    return lines


def _against(figure: Figure, name: str) -> float | None:
    return figure.of_gpu if name == "of one GPU" else figure.of_torch


def _line(figure: Figure, results: Results, more: Sequence[str]) -> str:
    side, alike = figure.side, figure.device == modes_device(results)
    star = r"\*" if figure.cpus > limit(results, figure.device) else ""
    if figure.mode in (SERIAL, GPU):
        name = in_words(side)
    elif figure.ours:
        name = f"{figure.name}: {MODES[figure.mode].title}"
    else:
        name = PEERS[figure.mode] + (", on a GPU" if figure.device == "gpu" else "")
    spread = f"{figure.spread:.0%}"
    theirs = "one GPU" if figure.device == "gpu" else "processes" if figure.mode == DDP else "threads"
    cells = [
        name,
        f"{figure.cpus}{star}" if alike else "a GPU",
        f"{figure.median:,.0f}",
        "?" if figure.turns == 1 else f"**{spread}**" if figure.spread > WIDE else spread,
        f"{figure.speedup:.2f}",
        f"{figure.efficiency:.0%}" if alike else "",
        *(f"{_against(figure, name) or 0:.2f}" for name in more),
        side["layout"] or theirs,
        "" if side["micro_batches"] is None else str(side["micro_batches"]),
    ]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Escape the text of a table cell: layouts have bars between their stages."""
    return text.replace("\n", " ").replace("|", r"\|")


def _shares(results: Results) -> list[str]:
    lines = [
        SHARES,
        "",
        f"| side | of | {' | '.join(PARTS)} |",
        f"|---|---|{'---:|' * len(PARTS)}",
    ]
    sides = {side["name"]: side for side in results["sides"]}
    for trace in results["traces"]:
        for whose, share in shown_shares(trace):
            parts = " | ".join(f"{share[part]:.0%}" for part in PARTS)
            lines.append(f"| {in_words(sides[trace['side']])} | {whose} | {parts} |")
    return lines


def _accuracy(results: Results) -> list[str]:
    told = results["accuracy"]
    how = (
        f"One training each until {told['wanted']:.2%} of the {told['of']} rows were right, judged after every epoch. "
        "Seconds are wall time since training began: evaluations count, start-up does not; torch.compile compiles "
        "within them."
    )
    lines = [
        how,
        "",
        f"| side | {UNITS[modes_device(results)]}s used | seconds | epochs | accuracy reached |",
        "|---|---:|---:|---:|---:|",
    ]
    sides = {side["name"]: side for side in results["sides"]}
    for run in told["runs"]:
        side = sides[run["side"]]
        seconds = f"{run['seconds']:.1f}" if run["seconds"] is not None else "not reached"
        last = run["curve"][-1] if run["curve"] else None
        epochs, top = (f"{last[1]:g}", f"{max(p[2] for p in run['curve']):.2%}") if last else ("", "")
        used = side["cpus"] if side["device"] == modes_device(results) else "a GPU"
        lines.append(f"| {in_words(side)} | {used} | {seconds} | {epochs} | {top} |")
    return lines


def equality(results: Results) -> list[str]:
    """Describe what all sides have in common, where they differ, and what the figures do not include."""
    alike = (
        "All sides train the same network from the same initial weights with the same optimizer, learning rates, data "
        f"type and mini-batches of {results['batch_size']} rows, which are the same rows in the same order."
    )
    left_out = (
        f"samples/s leaves out start-up, evaluation and the first steps: {results['warm_up']['ours']} of this package, "
        f"{results['warm_up']['torch']} of PyTorch (torch.compile compiles in them)."
    )
    told = [alike, left_out, *results["notes"]]
    if any(side["also"] for side in results["sides"]):
        told.append(
            "Modes joined by = have the same layout, schedule and exchange on that number of ranks: they are one side."
        )
    modes = {side["mode"] for side in results["sides"] if not side["impossible"]}
    if any(side["kind"] != OURS for side in results["sides"]):
        where = "a GPU's memory, to which it brings them once" if results["baseline"] == "gpu" else "memory"
        told.append(
            f"PyTorch gathers rows of the same data from {where}, scales them in every step, and sends the mini-batch "
            + (
                "through in the same micro-batches as one rank of ours, since batch norm takes its statistics over one"
                if results["network"]["batch_norm"]
                else "through as a whole; ours goes through in the micro-batches that the table states"
            )
            + ". Its optimizers are used with their default implementations. Dropout draws other numbers."
        )
    if results["baseline"] == "gpu":
        told.append(
            "PyTorch on the GPU has cuDNN choose algorithms by trial (`cudnn.benchmark`); torch.compile has the mode "
            "`max-autotune`, with CUDA graphs. float32 is true float32 on both sides, tf32 may round products on both, "
            "and with bfloat16 PyTorch's weights are float32, too (autocast)."
        )
        told.append("Where a GPU's time went is not shown: its work is not done when the launch of it returns.")
    if modes & {"gossip", "elite"}:
        told.append(
            "Replicas that gossip, or of which the best one wins, train on their part of each mini-batch with weights "
            "of their own: their results differ from the others', so compare their accuracy, too (`--accuracy`)."
        )
    if "elite" in modes:
        told.append("elite: evaluating the replicas and copying weights is not in samples/s, but in wall time.")
    if "async" in modes:
        told.append(
            "async: gradients are stale by a bounded number of updates, so its weights differ from the others'."
        )
    return told
