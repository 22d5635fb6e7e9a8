"""Step rates of the exchanges, over slow links between hosts and in the memory of one machine."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.exchange_runs import Here, Hosts, in_turns, layout, program, train
from benchmarks.exchange_text import megabytes, paragraph, percent, points, table
from benchmarks.rows import MNIST
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.engine.usage import WARM_UP

WIDE, WIDE_LAYERS = "configs/mnist_wide.yaml", 4
ROWS = 128  # of a replica in a step
NEVER = "1000000"
AT_THE_END = "{every_seconds: null, every_epochs: null}"
LIMITED, UNLIMITED = "limited", "unlimited"


def settings_of(exchange: str, replicas: int, layers: int, steps: int) -> dict[str, str]:
    """Return the settings of a training for step rates: random rows in memory, and nothing in between."""
    return {
        "data": MNIST,
        "train.steps": str(steps),
        "train.batch_size": str(ROWS * replicas),
        "train.micro_batches": "1",  # there is no pipeline to fill
        "train.schedule": "constant",
        "train.report_every": NEVER,
        "train.evaluate_every": NEVER,
        "checkpoint": AT_THE_END,
        "layout": layout(replicas, layers),
        "exchange": exchange,
    }


# -- between hosts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """A side of the comparison, and the steps of a run over limited and over unlimited links: some seconds each."""

    title: str
    exchange: str | None  # None: PyTorch
    slow: int
    fast: int


SIDES = {
    "gossip": Side("gossip", "gossip", 300, 300),
    "exact": Side("exact (allreduce)", "allreduce", 30, 100),
    "ddp": Side("PyTorch DDP, gloo", None, 30, 100),
}
RATIOS = (
    ("gossip", LIMITED, "ddp", LIMITED),
    ("gossip", LIMITED, "exact", LIMITED),
    ("gossip", LIMITED, "gossip", UNLIMITED),
    ("gossip", UNLIMITED, "exact", UNLIMITED),
    ("exact", LIMITED, "exact", UNLIMITED),
    ("ddp", LIMITED, "ddp", UNLIMITED),
)


def train_side(side: Side, steps: int, hosts: int, launcher: Hosts) -> tuple[float, list[int], dict[str, Any] | None]:
    """Return (steps per second, bytes that each host sent in the whole run, the summary's figures of the exchange)."""
    if side.exchange is None:
        from nettorrent_mpi.speedup import modes

        settings = settings_of("allreduce", 1, WIDE_LAYERS, steps) | {"train.batch_size": str(ROWS * hosts)}
        config = configuration.load(WIDE, [f"{key}={value}" for key, value in settings.items()])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "ddp.yaml")
            path.write_text(to_yaml(modes.baseline(config, [])), encoding="utf-8")
            words = [sys.executable, "-m", "benchmarks.ddp_slow", str(path), "--steps", str(steps)]
            output, sent = program(words, hosts, launcher)
        return json.loads(output.splitlines()[-1])["samples_per_second"] / (ROWS * hosts), sent, None
    settings = settings_of(side.exchange, hosts, WIDE_LAYERS, steps + WARM_UP)
    done = train(WIDE, settings, hosts, launcher)
    return done.summary["samples_per_second"] / (ROWS * hosts), done.sent, done.summary.get("exchange")


def bytes_per_step(long: list[int], short: list[int], steps: int) -> float:
    """Return the bytes that a host sends in a step, mean over the hosts: the difference of two runs divided by their
    `steps` more steps. Start, first weights, evaluation and checkpoint are the same in both runs."""
    return mean(b - a for a, b in zip(short, long, strict=True)) / steps


def measure(rate: str, hosts: int, repeats: int, factor: float, mpirun: str) -> dict[str, Any]:
    """Measure the sides at `rate` and without a limit, in turns."""
    launchers = {LIMITED: Hosts(mpirun, rate), UNLIMITED: Hosts(mpirun, None)}
    steps = {
        (name, link): max(5, round((side.slow if link == LIMITED else side.fast) * factor))
        for link, (name, side) in product(launchers, SIDES.items())
    }
    sent: dict[tuple[str, str], list[list[int]]] = {key: [] for key in steps}
    told: dict[tuple[str, str], dict[str, Any] | None] = {}

    def once(name: str, link: str) -> float:
        key = name, link
        per_second, bytes_sent, told[key] = train_side(SIDES[name], steps[key], hosts, launchers[link])
        sent[key].append(bytes_sent)
        return per_second

    figures = in_turns({", ".join(key): partial(once, *key) for key in steps}, repeats, "steps/s")
    rows = []
    for (name, link), long in sent.items():
        _, short, _ = train_side(SIDES[name], 1, hosts, launchers[link])
        more = steps[name, link] - 1
        rows.append(
            {
                "side": name,
                "link": link,
                "steps": steps[name, link],
                **figures[f"{name}, {link}"],
                "bytes_per_step": median(bytes_per_step(each, short, more) for each in long),
                "exchange": told[name, link],
            }
        )
    return {"rate": rate, "hosts": hosts, "rows_per_replica": ROWS, "repeats": repeats, "sides": rows}


def ratios(section: dict[str, Any]) -> list[tuple[str, float]]:
    """Return (numerator and denominator, ratio of the medians) for each of RATIOS."""
    medians = {(row["side"], row["link"]): row["median"] for row in section["sides"]}
    links = {LIMITED: section["rate"], UNLIMITED: UNLIMITED}
    return [
        (f"{SIDES[a].title}, {links[on]} / {SIDES[b].title}, {links[under]}", medians[a, on] / medians[b, under])
        for a, on, b, under in RATIOS
    ]


def to_markdown(section: dict[str, Any]) -> list[str]:
    text = (
        f"{section['hosts']} hosts of one rank each on this machine, joined by `benchmarks/hosts` (network namespaces, "
        "veth, tc's token bucket); 784-1024x3-10 with 2.9 million weights (`configs/mnist_wide.yaml`), "
        f"{section['rows_per_replica']} rows a replica, random rows in memory. Medians of {section['repeats']} "
        "alternating runs. Bytes are those of the interfaces' counters, all protocols, sent by each host: what a long "
        "run sends more than a short one."
    )
    cells = [
        [
            SIDES[row["side"]].title,
            section["rate"] if row["link"] == LIMITED else UNLIMITED,
            f"{row['median']:,.2f}",
            f"{row['spread']:.0%}",
            f"{1000 / row['median']:,.1f}",
            megabytes(row["bytes_per_step"]),
        ]
        for row in section["sides"]
    ]
    lines = [
        *paragraph(text),
        "",
        *table(["side", "link", "steps/s", "spread", "ms a step", "MB a step and host"], cells, texts=2),
    ]
    lines += ["", *table(["ratio of step rates", "times"], [[what, f"{r:.2f}"] for what, r in ratios(section)])]
    return [*lines, "", "![Step rates](exchange-network.svg)"]


def measure_accuracy(rate: str, hosts: int, epochs: int, root: Path, mpirun: str) -> dict[str, Any]:
    """Train with gossip over the slow links, and with the exact exchange where it is fastest: its arithmetic does not
    depend on links."""
    runs = {}
    for name, launcher in (("gossip", Hosts(mpirun, rate)), ("exact", Here(mpirun))):
        settings = {
            "data.root": str(root),
            "train.epochs": str(epochs),
            "train.batch_size": str(ROWS * hosts),
            "train.micro_batches": "1",
            "checkpoint": AT_THE_END,  # weights of all replicas over slow links
            "layout": layout(hosts, WIDE_LAYERS),
            "exchange": str(SIDES[name].exchange),
        }
        done = train(WIDE, settings, hosts, launcher)
        keys = ("test_accuracy", "average", "best_replica", "steps", "train_seconds", "exchange")
        runs[name] = {**{key: done.summary.get(key) for key in keys}, "by_epoch": done.by_epoch}
        print(f"{name}: {percent(done.summary['test_accuracy'])} in {done.summary['train_seconds']:.0f} s", flush=True)
    return {"rate": rate, "hosts": hosts, "epochs": epochs, "runs": runs}


def accuracy_to_markdown(section: dict[str, Any], rates: dict[str, Any] | None) -> list[str]:
    """Write the section; with `rates`, the result of `measure`, also the time of the exact exchange over slow links."""
    gossip, exact = section["runs"]["gossip"], section["runs"]["exact"]
    seconds = None
    if rates is not None and (rates["rate"], rates["hosts"]) == (section["rate"], section["hosts"]):
        per_second = {(row["side"], row["link"]): row["median"] for row in rates["sides"]}
        seconds = exact["steps"] / per_second["exact", LIMITED]
    text = (
        f"MNIST, the same network and {section['hosts']} replicas, {section['epochs']} epochs. Gossip ran over links "
        f"of {section['rate']}; the exact exchange, whose arithmetic does not depend on the links, in the memory of "
        "one machine: its seconds over the links are its steps divided by the rate above."
    )
    difference = gossip["test_accuracy"] - exact["test_accuracy"]
    best = gossip["best_replica"]["test_accuracy"] if gossip.get("best_replica") else None
    cells = [
        [
            "gossip",
            percent(gossip["test_accuracy"]),
            points(difference),
            percent(best),
            f"{gossip['train_seconds']:,.0f}",
        ],
        ["exact", percent(exact["test_accuracy"]), "", "", "" if seconds is None else f"{seconds:,.0f}"],
    ]
    head = ["side", "test accuracy", "to exact, points", "best replica", f"training at {section['rate']}, s"]
    return [*paragraph(text), "", *table(head, cells)]


# -- one machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    config: str
    weight_layers: int
    replicas: int
    steps: int


FAST = {
    "mnist_wide-2": Case(WIDE, WIDE_LAYERS, 2, 300),
    "mnist_wide-4": Case(WIDE, WIDE_LAYERS, 4, 150),
    "mnist-2": Case("configs/mnist.yaml", 7, 2, 1500),
    "mnist-4": Case("configs/mnist.yaml", 7, 4, 800),
}
FAST_SIDES = ("gossip", "allreduce", "none")


def measure_fast(name: str, repeats: int, factor: float, mpirun: str) -> dict[str, Any]:
    """Measure the exchanges of replicas on one machine, in turns."""
    case = FAST[name]
    steps = max(5, round(case.steps * factor))

    def once(exchange: str) -> float:
        settings = settings_of(exchange, case.replicas, case.weight_layers, steps + WARM_UP)
        done = train(case.config, settings, case.replicas, Here(mpirun))
        return float(done.summary["samples_per_second"]) / (ROWS * case.replicas)

    figures = in_turns({side: partial(once, side) for side in FAST_SIDES}, repeats, f"steps/s ({name})")
    return {"replicas": case.replicas, "steps": steps, "repeats": repeats, "sides": figures}


def fast_to_markdown(section: dict[str, Any]) -> list[str]:
    text = (
        f"Replicas on one machine of {section['host']['cores']} cores, {ROWS} rows each in a step, random rows in "
        "memory; medians of alternating runs. `none` leaves the replicas apart: what there is without any exchange."
    )
    head = ["network", "replicas", *(f"{side}, steps/s" for side in FAST_SIDES), "gossip / allreduce", "most spread"]
    cells = []
    for name, case in section["cases"].items():
        medians = [case["sides"][side]["median"] for side in FAST_SIDES]
        spread = max(case["sides"][side]["spread"] for side in FAST_SIDES)
        cell = [name.rpartition("-")[0], str(case["replicas"]), *(f"{m:,.1f}" for m in medians)]
        cells.append([*cell, f"{medians[0] / medians[1]:.2f}", f"{spread:.0%}"])
    return [*paragraph(text), "", *table(head, cells)]
