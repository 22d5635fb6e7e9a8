"""This benchmark compares the exchanges of `nettorrent_mpi.torch` with DistributedDataParallel between hosts.

    python -m benchmarks.torch_hosts [--hosts 4] [--rate 200mbit] [--repeats 5] [--epochs 10 --data DIR] [--write]

Hosts of one rank each on this machine, joined by `benchmarks/hosts` (as root): a training in PyTorch of 784-1024x3-10
on random rows, with links of `--rate` and without a limit. With `--data`, the folder that holds mnist/, it also trains
this network on MNIST: gossip over the slow links, and the exact exchange, whose arithmetic does not depend on links, in
the memory of this machine. `--write` puts all into benchmarks/results/torch_hosts.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.exchange_network import LIMITED, UNLIMITED
from benchmarks.exchange_runs import Here, Hosts, Launcher, in_turns, program
from nettorrent_mpi.cli.launching import as_root, find_mpirun
from nettorrent_mpi.speedup.machine import describe_host, in_words

RESULTS = Path(__file__).parent / "results" / "torch_hosts.json"
WIDTHS = (784, 1024, 1024, 1024)
ROWS = 128  # of a rank in a step
WARM_UP = 10
STEPS = {"gossip": {LIMITED: 120, UNLIMITED: 120}, "exact": {LIMITED: 15, UNLIMITED: 50}}
STEPS["ddp"] = STEPS["exact"]
EXCHANGES = {"gossip": "gossip", "exact": "allreduce"}


# -- a rank ------------------------------------------------------------------------------------------------------------


def network() -> Any:
    """Return the model; all ranks make the same."""
    import torch

    torch.manual_seed(1)
    layers: list[Any] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTHS[-1], 10))


def time_steps(way: str, steps: int) -> float:
    """Return the seconds of `steps` training steps on random rows, with all ranks. All ranks call."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from mpi4py import MPI

    import nettorrent_mpi.torch as nt

    world, model = MPI.COMM_WORLD, network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    torch.manual_seed(world.rank)
    x, y = torch.randn(ROWS, WIDTHS[0]), torch.randint(0, 10, (ROWS,))
    run = None
    if way == "ddp":
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://{os.environ['MASTER_ADDR']}:29500", rank=world.rank, world_size=world.size
        )
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        run = nt.parallelize(None, model, optimizer, exchange=EXCHANGES[way])
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            world.Barrier()
            began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    world.Barrier()
    took = time.perf_counter() - began
    if run is not None:
        run.close()
    else:
        torch.distributed.destroy_process_group()
    return took


def train_mnist(way: str, root: str, epochs: int) -> dict[str, float]:
    """Train on MNIST; return the accuracy of the replicas' average on the test rows. All ranks call."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from mpi4py import MPI

    import nettorrent_mpi.torch as nt
    from nettorrent_mpi.config import reading as configuration
    from nettorrent_mpi.engine.setup import set_up
    from nettorrent_mpi.speedup.torch_rows import Rows

    dataset = set_up(configuration.load("configs/mnist_wide.yaml", [f"data.root={root}"]), 1).dataset
    rows = [Rows(split, torch.float32, None, False) for split in (dataset.train, dataset.test)]
    (x, y), (x_test, y_test) = (
        each.batch(torch.arange(split.rows), training=False)
        for each, split in zip(rows, (dataset.train, dataset.test), strict=True)
    )
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.001)
    data = (x.reshape(len(x), -1), y)
    run = nt.parallelize(data, model, optimizer, batch_size=ROWS * MPI.COMM_WORLD.size, exchange=EXCHANGES[way])
    steps = epochs * -(-len(x) // (ROWS * run.size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began = time.perf_counter()
    for _ in run.epochs(epochs):
        for a, b in run.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - began
    with run.averaged(), torch.no_grad():
        right = model(x_test.reshape(len(x_test), -1)).argmax(1) == y_test
    return {"test_accuracy": float(right.double().mean()), "seconds": seconds}


def rank(words: list[str]) -> None:
    """Do a rank's part; rank 0 prints the result."""
    from nettorrent_mpi import env

    env.prepare()  # before MPI loads, as `parallelize` does in a script that has not loaded it
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    way, number, *root = words
    found: Any = train_mnist(way, root[0], int(number)) if root else time_steps(way, int(number))
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(found), flush=True)


# -- the comparison ----------------------------------------------------------------------------------------------------


def on(launcher: Launcher, hosts: int, *words: str) -> Any:
    """Run this module's rank on hosts; return its result."""
    output, _ = program([sys.executable, "-m", "benchmarks.torch_hosts", "--rank", *words], hosts, launcher)
    return json.loads(output.splitlines()[-1])


def compare_rates(rate: str, hosts: int, repeats: int, mpirun: str) -> dict[str, Any]:
    """Measure steps per second of each way, over slow and over unlimited links, in turns."""
    launchers = {LIMITED: Hosts(mpirun, rate), UNLIMITED: Hosts(mpirun, None)}

    def once(way: str, link: str) -> float:
        steps = STEPS[way][link]
        return steps / float(on(launchers[link], hosts, way, str(steps)))

    sides = {f"{way}, {link}": partial(once, way, link) for way, link in itertools.product(STEPS, launchers)}
    figures = in_turns(sides, repeats, "steps/s")
    medians = {name: each["median"] for name, each in figures.items()}
    ratios = {
        f"{one} / {other}": round(medians[one] / medians[other], 3)
        for one, other in (
            (f"gossip, {LIMITED}", f"ddp, {LIMITED}"),
            (f"gossip, {LIMITED}", f"gossip, {UNLIMITED}"),
            (f"exact, {LIMITED}", f"ddp, {LIMITED}"),
            (f"gossip, {UNLIMITED}", f"ddp, {UNLIMITED}"),
        )
    }
    return {"rate": rate, "hosts": hosts, "rows_of_a_rank": ROWS, "sides": figures, "ratios": ratios}


def compare_accuracy(rate: str, hosts: int, epochs: int, root: Path, mpirun: str) -> dict[str, Any]:
    """Train on MNIST by gossip over slow links, and exactly."""
    where: dict[str, Launcher] = {"gossip": Hosts(mpirun, rate), "exact": Here(mpirun)}
    runs = {}
    for way, launcher in where.items():
        runs[way] = on(launcher, hosts, way, str(epochs), str(root.resolve()))
        print(f"MNIST, {way}: {runs[way]['test_accuracy']:.2%} in {runs[way]['seconds']:.0f} s", flush=True)
    points = 100 * (runs["gossip"]["test_accuracy"] - runs["exact"]["test_accuracy"])
    return {"rate": rate, "hosts": hosts, "epochs": epochs, "runs": runs, "gossip_minus_exact_points": round(points, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="200mbit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", type=Path, help="the folder that holds mnist/; without it no accuracy is measured")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.rank)
        return
    os.environ.update(as_root())
    mpirun = find_mpirun()
    report: dict[str, Any] = {"host": describe_host()}
    report["rates"] = compare_rates(options.rate, options.hosts, options.repeats, mpirun)
    print(json.dumps(report["rates"]["ratios"], indent=1))
    if options.data:
        report["mnist"] = compare_accuracy(options.rate, options.hosts, options.epochs, options.data, mpirun)
    print(in_words(report["host"]))
    if options.write:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
