"""The same networks in plain PyTorch, and how fast it trains them on a CPU: the figures to compare with.

    python benchmarks/torch_models.py --model mlp --batch 128 --steps 100 --warmup 10 --threads 1

prints one line of JSON. A step is all that training needs: gathering the rows of a shuffled mini-batch from a data set
of bytes in memory, scaling them to 0..1, forward, loss, backward, and the optimizer. The data are random, of the shape
and number of MNIST's or CIFAR-10's training images.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn


def mlp() -> nn.Sequential:
    """784 - 256 x 6 - 10 with sigmoids: configs/mnist.yaml."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, *[256] * 5):
        layers += [nn.Linear(inputs, 256), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def mnist_wide() -> nn.Sequential:
    """784 - 1024 x 3 - 10 with relus: configs/mnist_wide.yaml."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, 1024, 1024):
        layers += [nn.Linear(inputs, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def cnn() -> nn.Sequential:
    """Four convolutions and two linear layers for 32 x 32 colour images: configs/cifar.yaml."""
    layers: list[nn.Module] = []
    for inputs, filters in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, filters, 3, padding=1), nn.ReLU(), nn.Conv2d(filters, filters, 3), nn.ReLU()]
        layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
    layers += [nn.Flatten(), nn.Linear(64 * 6 * 6, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.001)


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=0.001)


@dataclass(frozen=True)
class Peer:
    """A network with its optimizer, and its data: rows of `shape`, channels first."""

    build: Callable[[], nn.Sequential]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    rows: int
    shape: tuple[int, ...]


PEERS = {
    "mlp": Peer(mlp, adam, 60_000, (1, 28, 28)),
    "mnist_wide": Peer(mnist_wide, adam, 60_000, (1, 28, 28)),
    "cnn": Peer(cnn, rmsprop, 50_000, (3, 32, 32)),
}


class Batches:
    """Shuffled mini-batches of a data set of bytes; process `rank` of `size` gathers its share of each one's rows."""

    def __init__(self, peer: Peer, batch: int, rank: int, size: int, memory_format: torch.memory_format):
        generator = torch.Generator().manual_seed(1)  # the same data and order in all processes
        self._images = torch.randint(0, 256, (peer.rows, *peer.shape), dtype=torch.uint8, generator=generator)
        self._labels = torch.randint(0, 10, (peer.rows,), generator=generator)
        self._batch, self._share, self._format = (
            batch,
            slice(rank * batch // size, (rank + 1) * batch // size),
            memory_format,
        )
        self._generator, self._next = generator, peer.rows

    def __call__(self) -> tuple[Tensor, Tensor]:
        if self._next + self._batch > len(self._labels):
            self._order, self._next = torch.randperm(len(self._labels), generator=self._generator), 0
        rows = self._order[self._next : self._next + self._batch][self._share]
        self._next += self._batch
        images = self._images.index_select(0, rows).to(torch.float32, memory_format=self._format).mul_(1 / 255)
        return images, self._labels.index_select(0, rows)


def train(options: argparse.Namespace, rank: int) -> dict[str, object]:
    """Train for warmup + steps steps; what was measured in the last `steps`, in samples of all processes per second."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(1 + rank)
    peer = PEERS[options.model]
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    network: nn.Sequential = peer.build().to(memory_format=memory_format)  # type: ignore[call-overload]
    batches = Batches(peer, options.batch, rank, options.processes, memory_format)
    model: nn.Module = network
    if options.processes > 1:
        model = nn.parallel.DistributedDataParallel(network)
    if options.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    optimizer, loss_function = peer.optimizer(network), nn.CrossEntropyLoss()

    begin = 0.0
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            if options.processes > 1:
                dist.barrier()
            begin = time.perf_counter()
        images, labels = batches()
        optimizer.zero_grad()
        loss = loss_function(model(images), labels)
        loss.backward()
        optimizer.step()
    if options.processes > 1:
        dist.barrier()
    seconds = time.perf_counter() - begin
    return {
        "model": options.model,
        "batch": options.batch,
        "steps": options.steps,
        "threads": options.threads,
        "processes": options.processes,
        "channels_last": options.channels_last,
        "compile": options.compile,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": seconds,
        "samples_per_second": options.batch * options.steps / seconds,
        "final_loss": loss.item(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def train_one_of_many(rank: int, options: argparse.Namespace, meeting_point: str) -> None:
    """One process of DistributedDataParallel over gloo; process 0 prints. The meeting point is a URL of PyTorch's."""
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=options.processes)
    try:
        measured = train(options, rank)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(measured))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed of the benchmark networks in PyTorch on a CPU.")
    parser.add_argument("--model", choices=PEERS, required=True)
    parser.add_argument("--batch", type=int, default=128, help="rows for one update, over all processes")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--processes", type=int, default=1, help="above 1: DistributedDataParallel over gloo")
    parser.add_argument("--channels-last", action="store_true", help="images with the channels as the last dimension")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    options = parser.parse_args(arguments)
    for name, least in (("batch", 1), ("steps", 1), ("warmup", 0), ("threads", 1), ("processes", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} has to be at least {least}")
    if options.batch > PEERS[options.model].rows:
        parser.error(f"--batch is larger than the data set of {PEERS[options.model].rows} rows")
    if options.processes > options.batch:
        parser.error("--processes is larger than --batch: some would have no rows")
    return options


def main() -> None:
    options = parse()
    if options.processes == 1:
        print(json.dumps(train(options, 0)))
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = f"file://{folder}/meeting_point"
        spawn(train_one_of_many, (options, meeting_point), nprocs=options.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
