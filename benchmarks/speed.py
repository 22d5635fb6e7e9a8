"""Training speed of this package against PyTorch, and of two ranks against one, on the CPU of this machine.

    python -m benchmarks speed [--repeats 5] [--cases mlp-128 cnn-64] [--seconds 5] [--kernels]

Every side of a case runs in processes of its own, one BLAS thread each, without OPENBLAS_CORETYPE, which some machines
set to an older processor than they have. The sides of a case take turns, so that what else the machine does hits them
alike; medians over the turns are compared. All train the same network with the same optimizer from the same random
bytes of MNIST's or CIFAR-10's shape, held in memory. ShallowSpeed takes part where `--shallow` names a checkout of its
repository. Writes benchmarks/results/speed.json and speed.md; with --kernels,
which compares one rank's kernels with NumPy's alone, kernels.json and kernels.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

# isort: split
from benchmarks.rows import AUGMENTED, CIFAR, MNIST
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.writing import to_plain, to_yaml
from nettorrent_mpi.engine.usage import WARM_UP
from nettorrent_mpi.speedup import modes, runs
from nettorrent_mpi.speedup.machine import Launcher, describe_host, in_words
from nettorrent_mpi.speedup.sides import torch_is_there

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRIAL_STEPS = 20

OURS, OURS_2, NUMPY, WIDE = "1 rank", "2 ranks, rows", "1 rank, NumPy alone", "1 rank, float32"
STAGES = "2 ranks, stages"
TORCH, COMPILED, LAST = "PyTorch", "PyTorch, compiled", "PyTorch, channels_last"
DDP, DDP_LAST = "PyTorch DDP, 2 processes", "PyTorch DDP, 2 processes, channels_last"
PRODUCTS = "its products alone, bare NumPy"
SHALLOW, SHALLOW_2 = "ShallowSpeed", "ShallowSpeed, 2 processes"
PEERS = {
    TORCH: [],
    COMPILED: ["--compile"],
    LAST: ["--channels-last"],
    DDP: ["--processes", "2"],
    DDP_LAST: ["--processes", "2", "--channels-last"],
}

LEAST, LEAST_2 = 1.1, 1.25  # of the best of PyTorch, of DistributedDataParallel
DENSE = {(OURS, TORCH): LEAST, (OURS, COMPILED): LEAST, (OURS_2, DDP): LEAST_2}
IMAGES = {**DENSE, (OURS, LAST): LEAST, (OURS_2, DDP_LAST): LEAST_2}
Ratio = tuple[str, str]


@dataclass(frozen=True)
class Case:
    """A network at a batch size, and the target ratios of sides: {(side, against): at least}."""

    name: str
    config: str
    batch: int
    data: str
    aims: Mapping[Ratio, float | None]
    stages: Mapping[str, Any] | None = None  # the settings of a pipeline on two ranks, if it takes part
    dtype: str = "float32"  # PyTorch's bfloat16 is autocast

    @property
    def sides(self) -> list[str]:
        """The sides in the order of their turns."""
        return list(dict.fromkeys(side for pair in self.ratios for side in pair))

    @property
    def ratios(self) -> dict[Ratio, float | None]:
        """The reported ratios: two ranks against one, and the targets; or those of one rank alone."""
        alone = (OURS, NUMPY) in self.aims or (OURS, WIDE) in self.aims
        return dict(self.aims) if alone else {(OURS_2, OURS): None, **self.aims}

    @property
    def of_kernels(self) -> Case:
        """Return the case with NumPy's kernels alone as the only other side."""
        return replace(self, aims={(OURS, NUMPY): None})


SHORT = {(OURS, WIDE): None, (OURS, TORCH): LEAST}
TWICE = {(OURS_2, OURS): 1.85}
CASES = {
    case.name: case
    for case in (
        Case("mlp-128", "configs/mnist.yaml", 128, MNIST, {**DENSE, (OURS, PRODUCTS): 0.8}),
        Case("mlp-1024", "configs/mnist.yaml", 1024, MNIST, {(OURS, PRODUCTS): 0.8, **TWICE}),
        Case("mnist_wide-128", "configs/mnist_wide.yaml", 128, MNIST, DENSE),
        Case("mnist_wide-1024", "configs/mnist_wide.yaml", 1024, MNIST, {**DENSE, (OURS, PRODUCTS): 0.97, **TWICE}),
        Case("cnn-64", "configs/cifar.yaml", 64, CIFAR, IMAGES),
        Case("cnn-256", "configs/cifar.yaml", 256, CIFAR, {**IMAGES, **TWICE}),
        Case("resnet20-128", "configs/cifar_resnet.yaml", 128, AUGMENTED, {**IMAGES, **TWICE}),
        Case("shallow-128", "benchmarks/shallow.yaml", 128, MNIST,
             {(OURS, SHALLOW): 3.5, (OURS_2, SHALLOW_2): 4.0, (STAGES, SHALLOW): 4.0},
             {"layout": {"swarms": [{"layers": 2}, {"layers": 5}]}, "pipeline": {"zero_bubble": {"stored": 3}}}),
        Case("mnist_wide-128-bfloat16", "configs/mnist_wide.yaml", 128, MNIST, SHORT, dtype="bfloat16"),
        Case("mnist_wide-1024-bfloat16", "configs/mnist_wide.yaml", 1024, MNIST, SHORT, dtype="bfloat16"),
        Case("cnn-64-bfloat16", "configs/cifar.yaml", 64, CIFAR, {**SHORT, (OURS, LAST): LEAST}, dtype="bfloat16"),
        Case("resnet20-128-bfloat16", "configs/cifar_resnet.yaml", 128, AUGMENTED,
             {**SHORT, (OURS, LAST): LEAST}, dtype="bfloat16"),
    )
}  # fmt: skip


def settings(case: Case) -> configuration.Config:
    """Return the case's configuration for one rank; constant rate, without an end of its own."""
    changes = [f"data={case.data}", f"train.batch_size={case.batch}", "train.schedule=constant"]
    changes += [f"dtype={case.dtype}", "device=cpu"]
    if "resnet" not in case.name and "shallow" not in case.name:
        changes.append("train.micro_batches=1")  # there is no pipeline to fill
    return modes.baseline(configuration.load(str(ROOT / case.config), changes), ["rows"])


def turns(
    case: Case, seconds: float, folder: Path, launcher: Launcher, shallow: Path | None = None
) -> dict[str, Callable[[], float]]:
    """Return for each side a function that trains once and returns samples per second. `shallow` is a checkout of
    ShallowSpeed."""
    shared = settings(case)
    one, setup = modes.serial(shared)
    two = modes.plan("rows", shared, shared, setup.network.facts, 2)
    assert one.config is not None
    assert two.config is not None

    def written(name: str, config: configuration.Config) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        return path

    def ours(ranks: int, path: Path) -> float:
        return float(runs.train(path, ranks, launcher).summary["samples_per_second"])

    fast = ours(1, written("trial", modes.timed(one.config, TRIAL_STEPS + WARM_UP)))
    steps = max(10, math.ceil(seconds * fast / case.batch))
    alone = written("one", modes.timed(one.config, steps + WARM_UP))
    both = written("two", modes.timed(two.config, steps + WARM_UP))
    wide = written("wide", replace(modes.timed(one.config, steps + WARM_UP), dtype="float32"))
    plain = written("numpy", replace(modes.timed(one.config, steps + WARM_UP), kernels="numpy"))
    if case.stages is not None:
        stages = configuration.from_plain(to_plain(shared) | case.stages)
        written("stages", modes.timed(stages, steps + WARM_UP))
    program = [sys.executable, "-m", "benchmarks.products", str(alone), "--steps", str(steps)]
    found: dict[str, Callable[[], float]] = {
        OURS: partial(ours, 1, alone),
        OURS_2: partial(ours, 2, both),
        STAGES: partial(ours, 2, folder / "stages.yaml"),
        NUMPY: partial(ours, 1, plain),
        WIDE: partial(ours, 1, wide),
        PRODUCTS: partial(_told, program),
    }
    for side, options in PEERS.items():
        found[side] = partial(_torch, alone, [*options, "--steps", str(steps)])
    if shallow is not None:
        peer = [sys.executable, "-m", "benchmarks.shallow_peer", str(shallow), "--steps", str(steps)]
        for side, ranks in ((SHALLOW, 1), (SHALLOW_2, 2)):
            found[side] = partial(_told, launcher.command(ranks, peer))
    return {side: found[side] for side in case.sides if side in found}


def _told(command: list[str]) -> float:
    return float(json.loads(runs.run(command).splitlines()[-1])["samples_per_second"])


def _torch(path: Path, options: list[str]) -> float:
    return float(runs.torch_peer(path, options, 1)["samples_per_second"])


def compare(
    case: Case, repeats: int, seconds: float, launcher: Launcher, shallow: Path | None = None
) -> dict[str, Any]:
    """Run all sides of a case in turns; return their figures, and the ratios of medians."""
    with tempfile.TemporaryDirectory() as folder:
        sides = turns(case, seconds, Path(folder), launcher, shallow)
        figures: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(repeats):
            for side, measure in sides.items():
                figures[side].append(measure())
                print(f"{case.name}  turn {turn + 1}  {side}: {figures[side][-1]:,.0f} samples/s", flush=True)
    return {"name": case.name, "config": case.config, "batch": case.batch, **summarize(case, figures)}


def summarize(case: Case, figures: Mapping[str, list[float]]) -> dict[str, Any]:
    """`spread` is (largest - smallest) / median."""
    middle = {side: median(told) for side, told in figures.items()}
    rows = [
        {
            "side": side,
            "samples_per_second": told,
            "median": middle[side],
            "spread": (max(told) - min(told)) / middle[side],
        }
        for side, told in figures.items()
    ]
    ratios = [
        {"side": side, "against": against, "ratio": middle[side] / middle[against], "aim": aim}
        for (side, against), aim in case.ratios.items()
        if side in middle and against in middle
    ]
    return {"sides": rows, "ratios": ratios}


def to_markdown(report: Mapping[str, Any]) -> str:
    """Write the report as tables."""
    host = report["host"]
    lines = [
        "# Training speed",
        "",
        f"Median of {report['repeats']} alternating runs, one thread each; spread = (largest - smallest) / median.",
        in_words(host),
        f"Commit {host['commit']}, {host['date']}. Made by `{report['command']}`.",
        "",
        "| network and batch | side | against | ratio | aim |",
        "|---|---|---|---:|---:|",
    ]
    for case in report["cases"]:
        for ratio in case["ratios"]:
            aim = "" if ratio["aim"] is None else f"{ratio['aim']:.2f}"
            met = " **" if ratio["aim"] is not None and ratio["ratio"] >= ratio["aim"] else " "
            told = f"{met}{ratio['ratio']:.2f}{met.strip()}"
            lines.append(f"| {case['name']} | {ratio['side']} | {ratio['against']} |{told} | {aim} |")
    lines += [
        "",
        "Bold: the aim is reached.",
        "",
        "| network and batch | side | samples/s | spread |",
        "|---|---|---:|---:|",
    ]
    lines += [
        f"| {case['name']} | {side['side']} | {side['median']:,.0f} | {side['spread']:.0%} |"
        for case in report["cases"]
        for side in case["sides"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed against PyTorch, and of two ranks against one.")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every side")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="which networks at which batch size"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="that one rank trains in a turn")
    parser.add_argument("--kernels", action="store_true", help="one rank's kernels against NumPy's, nothing else")
    parser.add_argument("--shallow", type=Path, help="a checkout of ShallowSpeed, to run it, too (needs pandas)")
    parser.add_argument("--launcher", default=None, help="starts {ranks} ranks; default: mpirun -n {ranks}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for speed.json and speed.md")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats has to be at least 1")
    if not (options.kernels or torch_is_there()):
        parser.error(
            "PyTorch is not installed: pip install '.[compare]' --extra-index-url https://download.pytorch.org/whl/cpu"
        )
    launcher = Launcher(options.launcher)
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks speed", *sys.argv[1:]]).replace(str(options.shallow), "CHECKOUT"),
        "repeats": options.repeats,
        "host": describe_host(),
        "cases": [],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    stem = "kernels" if options.kernels else "speed"
    for name in options.cases:
        case = CASES[name].of_kernels if options.kernels else CASES[name]
        report["cases"].append(compare(case, options.repeats, options.seconds, launcher, options.shallow))
        (options.results / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.results / f"{stem}.md").write_text(to_markdown(report), encoding="utf-8")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
