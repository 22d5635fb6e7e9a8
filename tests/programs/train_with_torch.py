"""train_with_torch.py FOLDER...: what PyTorch makes of the configurations in these folders.

A folder holds config.json (a configuration, whose data set is the HDF5 file that data.root names, trained on in one
batch) and initial/model.h5, the weights to begin with; it gets torch.npz: the arrays after train.steps steps, as
model.h5 would have them, and `losses` and `rates`, the loss and the learning rate of each step.

Network, loss and optimizer are those that `nettorrent speedup` compares with, so that this proves them, too; the
learning rates are those of PyTorch's own schedulers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.engine.class_weights import class_weights
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.specs import Spec
from nettorrent_mpi.speedup.torch_training import loss_of, make_optimizer
from nettorrent_mpi.torch.networks import TorchNetwork


def one(spec: Any) -> tuple[str, Any]:
    return next(iter(spec.items())) if isinstance(spec, dict) else (spec, {})


def optimizer_of(written: Any, spec: Spec, parameters: list[Any]) -> Any:
    """The optimizer of the parsed `spec`; what is not written in the configuration has to be PyTorch's default."""
    made = make_optimizer(spec, parameters)
    _, options = one(written)
    other = {"initial_accumulator": "initial_accumulator_value"}
    plain = type(made)(parameters, **{other.get(name, name): value for name, value in options.items()})
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in made.defaults.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in plain.defaults.items()
    }
    return made


def schedule_of(spec: Any, optimizer: Any, lr: float, steps: int) -> Any:
    kind, options = one(spec)
    options = options if isinstance(options, dict) else {"factor_per_epoch": options}
    rates = torch.optim.lr_scheduler
    warmup = options.get("warmup_steps", 0)
    proper: Any
    if kind == "step":
        proper = rates.StepLR(optimizer, options["every_steps"], options.get("factor", 0.1))
    elif kind == "exponential":  # an epoch is one step of the full batch
        proper = rates.ExponentialLR(optimizer, options["factor_per_epoch"])
    elif kind == "cosine":
        proper = rates.CosineAnnealingLR(optimizer, steps - warmup - 1, options.get("final", 0.0) * lr)
    else:
        proper = rates.ConstantLR(optimizer, 1.0)
    if not warmup:
        return proper
    rising = rates.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    return rates.SequentialLR(optimizer, [rising, proper], [warmup])


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a model.h5, "<layer>/<name>"."""
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file["parameters"].visititems(
            lambda key, item: arrays.update({key: item[...]}) if isinstance(item, h5py.Dataset) else None
        )
    return arrays


def train(path: Path, initial: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything for torch.npz."""
    config, parsed = json.loads(path.read_text()), configuration.load(str(path))
    with h5py.File(config["data"]["root"]) as file:
        x, y = file["x"][...], file["y"][...]
    if x.dtype == np.uint8:
        x = (x / 255 - np.array(config["data"]["mean"])) / np.array(config["data"]["std"])
    inputs = torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    targets = torch.tensor(y)
    net = TorchNetwork(Network(parsed.model.layers, x.shape[1:])).double()
    net.load(initial)
    told = config["train"]
    optimizer = optimizer_of(told["optimizer"], parsed.train.optimizer, list(net.parameters()))
    schedule = schedule_of(told.get("schedule", "constant"), optimizer, one(told["optimizer"])[1]["lr"], told["steps"])
    losses, rates = [], []
    found = class_weights(parsed.model.loss, y, parsed.model.layers[-1].units)  # type: ignore[attr-defined]
    weights = None if found is None else torch.from_numpy(found)
    for _ in range(told["steps"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = loss_of(parsed.model.loss, net(inputs), targets, weights)
        loss.backward()
        if told.get("clip_norm"):
            nn.utils.clip_grad_norm_(net.parameters(), told["clip_norm"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return net.arrays() | {"losses": losses, "rates": rates}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        np.savez(folder / "torch.npz", **train(folder / "config.json", read(folder / "initial" / "model.h5")))
