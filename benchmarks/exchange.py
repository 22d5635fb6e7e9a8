"""The benefit and cost of exchanges other than the exact one, and of the pipeline without flush.

    python -m benchmarks.exchange --root DIR --letters-upright [--only accuracy network progress fast trace]

    accuracy   exact, gossip, elite and async on real data: MNIST, letters, CIFAR-10
    network    step rates over slow links between hosts, against the exact exchange and PyTorch's DDP, and the accuracy
               of gossip there; needs root (see benchmarks/hosts) and PyTorch
    progress   step rates of gossip over slow links by who lets messages move: the rank itself, or a thread; needs root
    fast       step rates of gossip and the exact exchange on one machine
    trace      the bubble of the pipelines 1f1b and async

DIR holds mnist/, letters/ and cifar-10-batches-bin/ as `nettorrent data fetch` lays them out. Sides whose speed is
compared take turns, one BLAS thread each, without OPENBLAS_CORETYPE. Writes exchange.json, exchange.md and pictures
into benchmarks/results. What is measured anew takes the place of the same part (of the same configuration and side,
where there are several) in exchange.json, and the rest stays; `--only` without a name writes text and pictures anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import exchange_accuracy, exchange_network, exchange_progress, exchange_trace
from benchmarks.speed import RESULTS
from nettorrent_mpi.cli.launching import find_mpirun
from nettorrent_mpi.speedup.machine import describe_host

PARTS = ("accuracy", "network", "progress", "fast", "trace")
TITLES = {  # of the sections of the report
    "accuracy": "Accuracy on real data",
    "network": "Over slow links",
    "network_accuracy": "Accuracy over slow links",
    "progress": "Who lets messages move",
    "fast": "On one machine",
    "trace": "The bubble of the pipelines",
}
Report = dict[str, dict[str, Any]]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="which parts")
    parser.add_argument("--root", type=Path, help="folder that holds the data (accuracy, network)")
    parser.add_argument("--letters-upright", action="store_true", help="this copy of the letters is not transposed")
    parser.add_argument(
        "--epochs", nargs="+", type=_epochs, default=[], metavar="[CASE=]N", help="of all, or of a configuration (10)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="accuracy: a run with each")
    cases, sides = exchange_accuracy.CASES, exchange_accuracy.SIDES
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), help="accuracy: configurations")
    parser.add_argument("--sides", nargs="+", choices=sides, default=list(sides), help="accuracy: ways of training")
    parser.add_argument("--rate", default="200mbit", help="network, progress: of each host's link")
    parser.add_argument("--hosts", type=int, default=4, help="network: how many")
    fast = exchange_network.FAST
    parser.add_argument("--fast-cases", nargs="+", choices=fast, default=list(fast), help="fast: networks and replicas")
    parser.add_argument("--ranks", type=int, default=2, help="trace: stages of the pipelines")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every side, where speed is measured")
    parser.add_argument(
        "--factor", type=float, default=1.0, help="times the steps of each run, where speed is measured"
    )
    parser.add_argument("--mpirun", default=None, help="the launcher")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for exchange.json, .md and the pictures")
    options = parser.parse_args(arguments)
    for name, least in (("repeats", 1), ("hosts", 2), ("ranks", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name} has to be at least {least}")
    if options.root is None and {"accuracy", "network"} & set(options.only):
        parser.error("accuracy and network train on real data: name its folder with --root")
    for part in ("network", "progress"):
        if part in options.only and os.geteuid() != 0:
            parser.error(
                f"{part} makes hosts of network namespaces, which only root may: run it as root, or without {part}"
            )
    unknown = {case for case, _ in options.epochs} - {None, "network", *cases}
    if unknown:
        parser.error(f"--epochs {unknown.pop()}=...: there are {', '.join(cases)} and network")
    return options


def _epochs(text: str) -> tuple[str | None, int]:
    """Parse `10`, for all, or `cifar=10`."""
    case, equals, number = text.rpartition("=")
    if not number.isdecimal() or int(number) < 1 or (equals and not case):
        raise argparse.ArgumentTypeError(f"{text!r}: wants a number of epochs, or CASE=NUMBER")
    return case or None, int(number)


def epochs_of(case: str, wishes: Sequence[tuple[str | None, int]]) -> int:
    """Return the number of epochs for the case, or else for all, or else 10."""
    said = dict(wishes)
    return said.get(case, said.get(None, 10))


def measure(options: argparse.Namespace, mpirun: str) -> Iterator[Report]:
    """Yield pieces of the report, each as soon as it is measured."""
    if "accuracy" in options.only:
        root = options.root.resolve()
        for case in options.cases:
            for side in options.sides:
                for seed in options.seeds:
                    epochs = epochs_of(case, options.epochs)
                    run = exchange_accuracy.measure(case, side, epochs, seed, root, options.letters_upright, mpirun)
                    print(f"{case}  {side}  seed {seed}: {run['test_accuracy']:.4f}", flush=True)
                    yield {"accuracy": {"runs": [run], "data": exchange_accuracy.digest(root, [case])}}
    if "network" in options.only:
        rate, hosts, root = options.rate, options.hosts, options.root.resolve()
        yield {"network": exchange_network.measure(rate, hosts, options.repeats, options.factor, mpirun)}
        epochs = epochs_of("network", options.epochs)
        trained = exchange_network.measure_accuracy(rate, hosts, epochs, root, mpirun)
        yield {"network_accuracy": {**trained, "data": exchange_accuracy.digest(root, ["mnist"])}}
    if "progress" in options.only:
        yield {"progress": exchange_progress.measure(options.rate, options.repeats, options.factor, mpirun)}
    if "fast" in options.only:
        for case in options.fast_cases:
            yield {
                "fast": {"cases": {case: exchange_network.measure_fast(case, options.repeats, options.factor, mpirun)}}
            }
    if "trace" in options.only:
        yield {"trace": exchange_trace.measure(options.ranks, options.repeats, options.factor, mpirun)}


def merge(report: Report, piece: Report, about: dict[str, Any]) -> Report:
    """Return the report with a piece in its place.

    `about` (host, command) belongs to the new figures: single runs and cases keep theirs, the commit and the date, when
    others are measured later.
    """
    merged = dict(report)
    stamp = {"commit": about["host"]["commit"], "date": about["host"]["date"]}
    for name, section in piece.items():
        old, new = report.get(name, {}), {**section, **about}
        if name == "accuracy":
            runs = [{**run, **stamp} for run in section["runs"]]
            new["runs"] = exchange_accuracy.merge(old.get("runs", []), runs)
            new["data"] = {**old.get("data", {}), **section["data"]}
        if name == "fast":
            cases = {**old.get("cases", {}), **{case: {**told, **stamp} for case, told in section["cases"].items()}}
            new["cases"] = {case: cases[case] for case in exchange_network.FAST if case in cases}
        merged[name] = new
    return {name: merged[name] for name in TITLES if name in merged}


def to_markdown(report: Report) -> str:
    """Write the report as text."""
    rates = report.get("network")
    texts: dict[str, Callable[[dict[str, Any]], list[str]]] = {
        "accuracy": exchange_accuracy.to_markdown,
        "network": exchange_network.to_markdown,
        "network_accuracy": lambda section: exchange_network.accuracy_to_markdown(section, rates),
        "progress": exchange_progress.to_markdown,
        "fast": exchange_network.fast_to_markdown,
        "trace": exchange_trace.to_markdown,
    }
    lines = ["# Exchanges and pipelines compared", ""]
    for name, section in report.items():
        lines += [f"## {TITLES[name]}", "", *texts[name](section), "", *where(name, section), ""]
    return "\n".join(lines)


def where(name: str, section: dict[str, Any]) -> list[str]:
    """Describe the machine, the code and the command that a section's figures belong to."""
    host = section["host"]
    blas = ", ".join(f"{b['internal_api']} {b['version']} ({b['architecture']})" for b in host["blas"])
    packages = ", ".join(f"{package} {number}" for package, number in host["packages"].items() if number)
    pieces = {"accuracy": section.get("runs"), "fast": [*section.get("cases", {}).values()]}.get(name) or [host]
    commits = dict.fromkeys(str(piece["commit"]) for piece in pieces)
    return [
        f"{host['cpu']}, {host['cores']} cores; Python {host['python']}, {packages}; BLAS {blas}, one thread a rank.",
        f"Commit {', '.join(commits)}, {host['date']}. Made by `{section['command']}`.",
    ]


def command_line(arguments: Sequence[str]) -> str:
    """Return the command, without folders of the machine that it ran on."""
    words, hide = [], False
    for word in arguments:
        name, equals, _ = word.partition("=")
        folder = name in ("--root", "--results", "--mpirun")
        words.append("DIR" if hide else f"{name}=DIR" if folder and equals else word)
        hide = folder and not equals
    return " ".join(["python -m benchmarks.exchange", *words])


def write(report: Report, folder: Path, *, whole: bool) -> None:
    """Write exchange.json; with `whole`, exchange.md and the pictures, too."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "exchange.json.new"
    beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    beside.replace(folder / "exchange.json")  # it has hours of measurements: never write half a file
    if not whole:
        return
    (folder / "exchange.md").write_text(to_markdown(report), encoding="utf-8")
    try:
        from benchmarks.exchange_plots import draw
    except ImportError as error:
        print(f"no pictures: {error} (pip install '.[plots]')", file=sys.stderr)
        return
    draw(report, folder)


def main() -> None:
    options = parse()
    path = options.results / "exchange.json"
    report: Report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if options.only:
        about = {"host": describe_host(), "command": command_line(sys.argv[1:])}
        for piece in measure(options, options.mpirun or find_mpirun()):
            report = merge(report, piece, about)
            write(report, options.results, whole=False)
    write(report, options.results, whole=True)
    print(to_markdown(report))


if __name__ == "__main__":
    main()
