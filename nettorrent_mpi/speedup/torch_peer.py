"""The same training in PyTorch: the same network, rows, initial weights, optimizer and learning rates.

    python -m nettorrent_mpi.speedup.torch_peer CONFIG.yaml --steps 100 [--threads 2] [--processes 2] ...

prints one line of JSON. A step includes all that training needs: gathering the rows of the mini-batch from the stored
values in memory, augmenting and scaling them, forward, loss, backward, optimizer. The mini-batch is processed as a
whole, unless batch norm takes its statistics over a micro-batch. Needs PyTorch, the extra `compare`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

# isort: split
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.engine.class_weights import class_weights
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.rates import make_rate
from nettorrent_mpi.plan.blocks import micro_batch, span
from nettorrent_mpi.plan.errors import DeviceError, NetTorrentError
from nettorrent_mpi.speedup.torch_rows import Rows
from nettorrent_mpi.speedup.torch_training import count_right, loss_of, make_optimizer
from nettorrent_mpi.torch.networks import TorchNetwork

WARM_UP = 10  # steps before the timed ones


class Peer:
    """One process's part of the training."""

    def __init__(self, setup: Setup, options: argparse.Namespace, rank: int):
        config, network = setup.config, setup.network
        self._setup, self._rank, self._size = setup, rank, options.processes
        self._loss, self._clip = config.model.loss, config.train.clip_norm
        # A process's rows are processed as a whole, or batch norm would see another mini-batch.
        self._pieces = setup.options.micro_batches if network.has_batch_norm else 1
        self._dtype = torch.float64 if config.dtype == "float64" else torch.float32
        self._half = config.dtype == "bfloat16"
        self._channels_last = options.channels_last
        self._device = torch.device(options.device)
        augment = Augment(config.data.augment, setup.dataset.shape) if config.data.augment else None
        self._train_rows = Rows(setup.dataset.train, self._dtype, augment, options.channels_last, self._device)
        self._row_weights, self._classes = None, None
        labels = self._train_rows.targets.cpu().numpy()
        weights = class_weights(self._loss, labels[setup.sampler.training_rows], network.output_shape[-1])
        if weights is not None:
            self._row_weights = torch.from_numpy(weights[labels]).to(self._device)
            self._classes = torch.from_numpy(weights).to(self._device, self._dtype)
        self.network = TorchNetwork(network).to(self._dtype)
        self.network.load(initial_weights(setup))
        self.network = self.network.to(self._device)
        if options.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        self._model: Any = self.network
        if options.processes > 1:
            self._model = nn.parallel.DistributedDataParallel(self.network)
        if options.compile:  # the size of the last, shorter mini-batch of an epoch
            # On a GPU its choice of kernels by trial, and CUDA graphs.
            how = {"mode": "max-autotune"} if self._device.type == "cuda" else {}
            self._model = torch.compile(self._model, dynamic=False, **how)
        self._optimizer = make_optimizer(config.train.optimizer, list(self.network.parameters()))
        self._judged: tuple[Rows, np.ndarray[Any, Any]] | None = None
        self._epoch, self._order = -1, torch.empty(0)  # the rows of an epoch, on the GPU

    def step(self, n: int, rate: float) -> None:
        """Run training step n, counted from 0."""
        sampler = self._setup.sampler
        rows, key = self._rows(n), sampler.augment_key(n)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        for piece in range(self._pieces):
            whole = rows[slice(*micro_batch(len(rows), sampler.batch_size, self._pieces, piece))]
            mine = whole[slice(*span(len(whole), self._size, self._rank))]
            if not len(whole):
                continue
            self.network.train(len(mine) != 1)  # PyTorch refuses batch statistics of a single row
            x, targets = self._train_rows.batch(mine, key)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
                outputs = self._model(x)
                # DistributedDataParallel averages over the processes; the fraction of the rows makes it the mean.
                share = self._weight(mine) * self._size / (self._weight(rows) or 1.0)
                loss = loss_of(self._loss, outputs, targets, self._classes) * share if share else outputs.sum() * 0
            loss.backward()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
        self._optimizer.step()

    def _weight(self, rows: np.ndarray[Any, Any] | Tensor) -> float:
        """Return the weight of these rows in the loss: their number, unless classes have weights."""
        if self._row_weights is None:
            return len(rows)
        chosen = rows if isinstance(rows, Tensor) else torch.tensor(rows)
        return float(self._row_weights[chosen].sum())

    def _rows(self, n: int) -> np.ndarray[Any, Any] | Tensor:
        """Return the rows of a step. Their numbers are brought to a GPU once for an epoch."""
        sampler = self._setup.sampler
        if self._device.type == "cpu":
            return sampler.rows(n)
        epoch, step = divmod(n, sampler.steps_per_epoch)
        if epoch != self._epoch:
            order = torch.tensor(sampler.order(epoch), dtype=torch.int64)
            self._epoch, self._order = epoch, order.to(self._device)
        return self._order[step * sampler.batch_size :][: sampler.batch_size]

    def read_judged(self) -> None:
        """Read the rows that stop_at evaluates: validation rows if some are held back, otherwise the test set."""
        sampler, test = self._setup.sampler, self._setup.dataset.test
        if len(sampler.validation_rows):
            self._judged = self._train_rows, sampler.validation_rows
        elif test is not None:
            self._judged = Rows(test, self._dtype, None, self._channels_last, self._device), np.arange(test.rows)

    def accuracy(self) -> float | None:
        """Return the accuracy on these rows over all processes; None if there are none."""
        if self._judged is None:
            return None
        rows, chosen = self._judged
        mine = chosen[slice(*span(len(chosen), self._size, self._rank))]
        size, right = self._setup.sampler.batch_size, 0
        self._model.eval()
        with torch.no_grad():
            for first in range(0, len(mine), size):
                x, targets = rows.batch(mine[first : first + size], training=False)
                right += count_right(self._loss, self.network(x), targets)
        self._model.train()
        counted = torch.tensor(right)
        if self._size > 1:
            dist.all_reduce(counted)
        return int(counted) / len(chosen)

    def meet(self) -> None:
        """Wait until all work is done, of all processes."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        if self._size > 1:
            dist.barrier()


def initial_weights(setup: Setup) -> dict[str, np.ndarray[Any, Any]]:
    """Return the initial arrays of this package, "<layer>/<name>"."""
    whole = setup.network.stage(0, setup.network.weight_layers, 1, 0)
    return {key: initial_value(p, setup.config.seed, key.rpartition("/")[0]) for key, p in whole.parameters}


def measure_speed(peer: Peer, setup: Setup, steps: int) -> dict[str, Any]:
    """Return the samples of all processes per second in `steps` steps, after WARM_UP others."""
    sampler, train = setup.sampler, setup.config.train
    rate = make_rate(train.schedule, train.optimizer.options()["lr"], steps, sampler.steps_per_epoch)
    for n in range(WARM_UP):
        peer.step(n, rate(n))
    peer.step(sampler.steps_per_epoch - 1, rate(0))  # the shorter mini-batch at the end of an epoch, for torch.compile
    peer.meet()
    begin = time.perf_counter()
    samples = 0
    for n in range(steps):
        peer.step(n, rate(n))
        samples += sampler.size(n)
    peer.meet()
    seconds = time.perf_counter() - begin
    return {"samples_per_second": samples / seconds, "seconds": seconds, "steps": steps, "warm_up": WARM_UP + 1}


def train_until(peer: Peer, setup: Setup, accuracy: float) -> dict[str, Any]:
    """Train until the accuracy is reached or the configuration ends; `curve` has (seconds, epoch, accuracy)."""
    sampler, train = setup.sampler, setup.config.train
    steps = train.steps if train.steps is not None else (train.epochs or 1) * sampler.steps_per_epoch
    rate = make_rate(train.schedule, train.optimizer.options()["lr"], steps, sampler.steps_per_epoch)
    curve: list[tuple[float, float, float]] = []
    peer.read_judged()
    peer.meet()
    begin = time.perf_counter()
    for n in range(steps):
        peer.step(n, rate(n))
        if (n + 1) % sampler.steps_per_epoch and n + 1 < steps:
            continue
        found = peer.accuracy()
        if found is not None:
            curve.append((time.perf_counter() - begin, (n + 1) / sampler.steps_per_epoch, found))
            if found >= accuracy:
                break
    return {"curve": curve}


def train(options: argparse.Namespace, rank: int) -> dict[str, Any]:
    """Return the measurements of this process."""
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"PyTorch {torch.__version__} finds no GPU: is it one for CPUs only?")
    setup = set_up(configuration.load(options.config), 1)
    tf32 = setup.options.tf32  # without it float32 is true float32, of convolutions, too
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # cuDNN's algorithms by trial
    torch.manual_seed(setup.config.seed + rank)  # of dropout
    peer = Peer(setup, options, rank)
    if options.accuracy is None:
        told = measure_speed(peer, setup, options.steps)
    else:
        told = train_until(peer, setup, options.accuracy)
    return told | {
        "parameters": sum(p.numel() for p in peer.network.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
    }


def train_one_of_many(rank: int, options: argparse.Namespace, meeting_point: str) -> None:
    """Run one process of DistributedDataParallel over gloo; process 0 prints. The meeting point is a URL of
    PyTorch's."""
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=options.processes)
    measured = train(options, rank)
    dist.barrier()
    if rank == 0:
        sys.stdout.write(json.dumps(measured) + "\n")
    sys.stdout.flush()
    # A gloo thread that still waits for the interpreter while it shuts down ends the process by SIGABRT (seen
    # sometimes with PyTorch 2.13, process group destroyed or not). Nothing remains to be shut down.
    os._exit(0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torch_peer", description="A configuration's training in PyTorch.")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as `nettorrent train` takes it")
    parser.add_argument("--steps", type=int, default=100, help=f"timed steps, after {WARM_UP} others")
    parser.add_argument(
        "--accuracy", type=float, help="train until this accuracy instead, and report when it was reached"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="above 1: DistributedDataParallel over gloo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU")
    parser.add_argument("--channels-last", action="store_true", help="images lie with the channels last")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    options = parser.parse_args(arguments)
    for name in ("steps", "threads", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} has to be at least 1")
    return options


def main() -> int:
    options = parse()
    try:
        if options.processes == 1:
            sys.stdout.write(json.dumps(train(options, 0)) + "\n")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            meeting_point = f"file://{folder}/meeting_point"
            spawn(train_one_of_many, (options, meeting_point), nprocs=options.processes)
    except NetTorrentError as error:
        sys.stderr.write(f"torch_peer: error: {error}\n")
        return error.exit_code
    except Exception as error:
        if not options.compile:
            raise
        # torch.compile has no compiler here, or cannot do this network: its reason is the first line of many.
        reason = str(error).strip().splitlines() or ["no reason given"]
        sys.stderr.write(f"{type(error).__name__}: {reason[0]}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
