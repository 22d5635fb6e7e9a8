"""This benchmark compares `nettorrent_mpi.torch` with PyTorch's DistributedDataParallel (gloo), step by step.

    python -m benchmarks.torch_speed [--ranks 2] [--segments 5] [--write]

One training each of an MLP and of a ResNet, in which segments of steps take turns: the exact exchange by hooks, DDP,
and the same model on each rank alone, without and with hooks. Prints the medians of the segments' seconds per step,
and of the ratios within a turn; `--write` puts them into benchmarks/results/torch_speed.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from nettorrent_mpi.cli.launching import as_root
from nettorrent_mpi.speedup.machine import Launcher, describe_host, in_words

RESULTS = Path(__file__).parent / "results" / "torch_speed.json"
STEPS = {"mlp": 40, "resnet": 4}  # of a segment


def networks() -> dict[str, tuple[Callable[[], Any], tuple[int, ...], int]]:
    """Return for each network how it is made, the shape of a row, and the rows of a rank."""
    import torch
    import transformers

    sizes = (784, 1024, 1024, 1024)

    def mlp() -> Any:
        layers: list[Any] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], 10))

    def resnet() -> Any:
        config = transformers.ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
        )
        return transformers.ResNetForImageClassification(config)

    return {"mlp": (mlp, (784,), 64), "resnet": (resnet, (3, 64, 64), 32)}


def measure(name: str, segments: int) -> dict[str, list[float]]:
    """Return the seconds per step of each segment of each way. All ranks call."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from mpi4py import MPI

    import nettorrent_mpi.torch as nt

    world = MPI.COMM_WORLD
    torch.set_num_threads(1)
    torch.manual_seed(1)
    make, shape, rows = networks()[name]
    x, y = torch.randn(rows, *shape), torch.randint(0, 10, (rows,))
    models = {way: make() for way in ("exact", "ddp", "alone", "hooks")}
    for model in models.values():
        model.load_state_dict(models["alone"].state_dict())
    optimizers = {way: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for way, model in models.items()}
    runs = [
        nt.parallelize(None, models["exact"], optimizers["exact"]),
        nt.parallelize(None, models["hooks"], optimizers["hooks"], comm=MPI.COMM_SELF),
    ]
    models["ddp"] = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(models["ddp"]), broadcast_buffers=False)
    optimizers["ddp"] = torch.optim.SGD(models["ddp"].parameters(), 0.01, momentum=0.9)
    took: dict[str, list[float]] = {way: [] for way in models}
    for turn in range(segments + 1):  # the first is not counted
        names = list(models)
        ways = names[turn % 4 :] + names[: turn % 4]
        for way in ways:
            model, optimizer = models[way], optimizers[way]
            world.Barrier()
            began = time.perf_counter()
            for _ in range(STEPS[name]):
                optimizer.zero_grad()
                found = model(x)
                F.cross_entropy(getattr(found, "logits", found), y).backward()
                optimizer.step()
            world.Barrier()
            if turn:
                took[way].append((time.perf_counter() - began) / STEPS[name])
    for run in runs:
        run.close()
    return took


def rank() -> None:
    """Do a rank's part."""
    import torch
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = world.bcast(free.getsockname()[1])
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size
    )
    found = {name: measure(name, int(os.environ["SEGMENTS"])) for name in STEPS}
    torch.distributed.destroy_process_group()
    if world.rank == 0:
        print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--segments", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank()
        return
    command = Launcher().command(options.ranks, [sys.executable, "-m", "benchmarks.torch_speed", "--rank"])
    environment = {**os.environ, **as_root(), "SEGMENTS": str(options.segments)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    took = json.loads(done.stdout.splitlines()[-1])
    pairs = {"exact against ddp": ("ddp", "exact"), "hooks": ("hooks", "alone")}
    report: dict[str, Any] = {"host": describe_host(), "ranks": options.ranks, "networks": {}}
    for name, ways in took.items():
        seconds = {way: median(each) for way, each in ways.items()}
        ratios = {
            what: round(median(a / b for a, b in zip(ways[one], ways[other], strict=True)), 4)
            for what, (one, other) in pairs.items()
        }
        report["networks"][name] = {"seconds": seconds, "ratios": ratios, "segments": ways}
        print(name, {way: f"{1000 * each:.2f} ms" for way, each in seconds.items()}, ratios)
    print(in_words(report["host"]))
    if options.write:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
