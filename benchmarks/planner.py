"""Predicted against measured seconds per step: every mode on one and two ranks, and over slow links.

    python -m benchmarks planner [--networks digits mnist wide] [--seconds 1.5] [--repeats 3] [--links 1gbit 50mbit]

Each network is profiled once (`nettorrent profile`, on two ranks), which is all that the predictions know. Then the
modes take turns, and the median of each counts. Over links two ranks are on two hosts, network namespaces of this
machine (benchmarks/hosts), which needs root; `--links` alone leaves them out. Trains on random rows of MNIST's shape
and on the digits. Writes benchmarks/results/planner.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.rows import MNIST
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.sections import Config, Layout, Swarm
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.engine.layout import lay_out, predicted
from nettorrent_mpi.engine.profiles import Profiles, read_profiles
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.performance import Link
from nettorrent_mpi.speedup import modes, runs
from nettorrent_mpi.speedup.machine import Launcher, describe_host

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "planner.json"
NETWORKS = {
    "digits": ("configs/digits.yaml", []),
    "mnist": ("configs/mnist.yaml", [f"data={MNIST}"]),
    "wide": ("configs/mnist_wide.yaml", [f"data={MNIST}"]),
}
MODES = ("rows", "cols", "gpipe", "1f1b", "async", "gossip", "elite")
EXACT = ("rows", "cols", "gpipe", "1f1b", "layers", "auto")
OVER_LINKS = ("rows", "1f1b", "gossip")
BURST = 256e3  # bytes of the token buckets of benchmarks/hosts
LATENCY = 1e-4  # seconds of a message between namespaces, which share the cores of this machine
STEPS = (20, 4000)  # timed steps, at least and at most


def measure(config: Config, ranks: int, seconds: float, guess: float, launcher: Launcher) -> float:
    """Return the seconds per step of a training that takes about so many seconds."""
    steps = min(max(round(seconds / guess), STEPS[0]), STEPS[1])
    with tempfile.TemporaryDirectory(prefix="nettorrent-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(modes.timed(config, steps)), encoding="utf-8")
        summary = runs.train(path, ranks, launcher).summary
    return float(config.train.batch_size / summary["samples_per_second"])


def prediction(setup: Setup, known: Profiles, link: Link | None = None) -> float:
    """Return the predicted seconds of a step; with `link`, of ranks that each have a node of their own, though these
    nodes share the memory of this machine."""
    machine = known.machine(setup.config, setup.network)
    if link is not None:
        machine = replace(machine, alone=None, node=1, link=link)
    return predicted(setup.config, setup.network, setup.topology, machine).seconds


def profiled(config: Config, folder: Path, launcher: Launcher) -> Profiles:
    """Profile a network on two ranks."""
    path, to = folder / "network.yaml", folder / "profile.json"
    path.write_text(to_yaml(config), encoding="utf-8")
    runs.run(launcher.command(2, [*runs.PROGRAM, "profile", str(path), "--output", str(to)]))
    return read_profiles(str(to))


def hosts(rate: str) -> Launcher:
    """Return the launcher of two hosts that a link of this rate joins."""
    mpirun = Launcher().command(2, [])[0]
    return Launcher(f"{ROOT / 'benchmarks' / 'hosts'} -n {{ranks}} -r {rate} -m {mpirun} --", cores=2)


def rate_of(text: str) -> float:
    """Return the bytes per second of a rate in tc's words."""
    number, unit = re.fullmatch(r"([\d.]+)([mg])bit", text).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 1e6, "g": 1e9}[unit] / 8


def chosen(layout: Literal["layers", "auto"], shared: Config, network: Network, known: Profiles) -> modes.Candidate:
    """Return what `layout: layers` or `auto` is on two ranks by a profile."""
    config = replace(shared, layout=layout)
    topology = lay_out(config, network, 2, known.machine(config, network))
    swarms = tuple(Swarm(layers=stage.layers, rows=stage.rows, cols=stage.cols) for stage in topology.stages)
    config = replace(shared, layout=Layout(replicas=topology.replicas, swarms=swarms))
    return modes.Candidate(layout, 2, config, topology.describe([facts.name for facts in network.facts]))


def of_network(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and predict all modes of a network."""
    path, changes = NETWORKS[name]
    config = configuration.load(str(ROOT / path), [*changes, "data.validation=0.1", "device=cpu"])
    shared, launcher = modes.baseline(config, MODES), Launcher(cores=2)
    with tempfile.TemporaryDirectory(prefix="nettorrent-") as folder:
        known = profiled(shared, Path(folder), launcher)
    one, setup = modes.serial(shared)
    facts = setup.network.facts
    cases: list[tuple[modes.Candidate, str | None]] = [(one, None)]
    cases += [(each, None) for each in modes.plans(MODES, config, shared, facts, 2)]
    cases += [
        (chosen("layers", shared, setup.network, known), None),
        (chosen("auto", shared, setup.network, known), None),
    ]
    cases += [(modes.plan(mode, config, shared, facts, 2), rate) for rate in options.links for mode in OVER_LINKS]
    found: list[dict[str, Any]] = []
    started: list[tuple[Config, Launcher]] = []
    for candidate, rate in cases:
        if candidate.config is None:
            continue
        made = set_up(candidate.config, candidate.ranks)
        link = None if rate is None else Link(LATENCY, rate_of(rate), BURST)
        case: dict[str, Any] = {"network": name, "mode": candidate.mode, "ranks": candidate.ranks, "link": rate}
        case |= {"layout": candidate.layout, "measured": []}
        case |= {"predicted": prediction(made, known, link), "by_constants": prediction(made, Profiles(), link)}
        found.append(case)
        started.append((candidate.config, launcher if rate is None else hosts(rate)))
    for _ in range(options.repeats):
        for each, (settings, starter) in zip(found, started, strict=True):
            took = measure(settings, each["ranks"], options.seconds, each["predicted"], starter)
            each["measured"].append(took)
    for each in found:
        took = median(each["measured"])
        each["error"], old = each["predicted"] / took - 1, each["by_constants"] / took - 1
        sys.stdout.write(
            f"{name:7} {each['mode']:8} {each['ranks']} {each['link'] or '':8} {1e3 * took:8.3f} ms measured, "
            f"{1e3 * each['predicted']:8.3f} ms predicted, {each['error']:+.0%} (by constants {old:+.0%})\n"
        )
        sys.stdout.flush()
    return found


def summary(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the errors together: inside a node, and over links."""
    found: dict[str, Any] = {}
    for name, some in (
        ("node", [abs(each["error"]) for each in cases if each["link"] is None]),
        ("links", [abs(each["error"]) for each in cases if each["link"] is not None]),
    ):
        if some:
            found[name] = {"median": median(some), "worst": max(some), "cases": len(some)}
    for network in dict.fromkeys(each["network"] for each in cases):
        times = {
            each["mode"]: median(each["measured"])
            for each in cases
            if each["network"] == network and each["link"] is None and each["mode"] in EXACT
        }
        best = min(times, key=lambda mode: times[mode])
        found.setdefault("auto", {})[network] = {"best": best, "auto_over_best": times["auto"] / times[best]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=1.5, help="of each training (default: 1.5)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--links", nargs="*", default=["1gbit", "200mbit", "50mbit"], help="rates, as tc writes them")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    command = " ".join(["python -m benchmarks planner", *sys.argv[1:]])
    report: dict[str, Any] = {"command": command, "host": describe_host()}
    cases: list[dict[str, Any]] = []
    for name in options.networks:  # minutes each: what is there is kept
        cases += of_network(name, options)
        report |= {"summary": summary(cases), "cases": cases}
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report["summary"]) + "\n")
