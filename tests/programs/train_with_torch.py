"""train_with_torch.py FOLDER...: what PyTorch makes of the configurations in these folders.

A folder holds config.json (a configuration, whose data set is the HDF5 file that data.root names, trained on in one
batch) and initial/model.h5, the weights to begin with; it gets torch.npz: the arrays after train.steps steps, as
model.h5 would have them, and `losses` and `rates`, the loss and the learning rate of each step.

Images are (row, height, width, channel) in the files and (row, channel, height, width) in PyTorch; weights are
(in, out) and (kh, kw, in, out) in the files, (out, in) and (out, in, kh, kw) in PyTorch.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    """The network of a list of layers as they stand in a configuration. `named` has the modules with parameters."""

    def __init__(self, layers: list[Any], shape: tuple[int, ...], counts: Counter[str] | None = None, prefix: str = ""):
        super().__init__()
        self.named: dict[str, Any] = {}
        self.stack = nn.ModuleList()
        counts = Counter() if counts is None else counts
        probe = torch.zeros(2, *shape, dtype=torch.float64)
        for layer in layers:
            kind, options = next(iter(layer.items())) if isinstance(layer, dict) else (layer, None)
            counts[kind] += 1
            own = options.get("name") if isinstance(options, dict) else None
            name = prefix + (own or f"{kind}{counts[kind]}")
            options = options if isinstance(options, dict) else {} if options is None else {"alone": options}
            for module in self._made(kind, options, probe, name):
                self.stack.append(module.double())
                probe = module(probe).detach()
            self.outputs = tuple(probe.shape[1:])

    def forward(self, x: Any) -> Any:
        for module in self.stack:
            x = module(x)
        return x

    def _made(self, kind: str, o: dict[str, Any], x: Any, name: str) -> list[Any]:
        module: Any
        if kind == "linear":
            module = nn.Linear(x.shape[1], o["units"] if "units" in o else o["alone"], bias=o.get("bias", True))
        elif kind == "conv2d":
            kernel, stride = o.get("kernel", 3), o.get("stride", 1)
            high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
            even = not (high % 2 and wide % 2)
            same: Any = "same" if even else (high // 2, wide // 2)
            padding = same if o.get("padding") == "same" else 0
            module = nn.Conv2d(x.shape[1], o["filters"], (high, wide), stride, padding, bias=o.get("bias", True))
        elif kind in ("max_pool2d", "avg_pool2d"):
            size = o.get("size", o.get("alone", 2))
            return [{"max_pool2d": nn.MaxPool2d, "avg_pool2d": nn.AvgPool2d}[kind](size, o.get("stride"))]
        elif kind == "global_avg_pool2d":
            return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        elif kind == "flatten":
            return [ChannelsLast(), nn.Flatten()]
        elif kind == "dropout":
            return [nn.Dropout(o["alone"])]
        elif kind == "batch_norm":
            norm = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
            module = norm(x.shape[1], eps=o.get("eps", 1e-5), momentum=o.get("momentum", 0.1))
        elif kind == "layer_norm":
            module = nn.LayerNorm(x.shape[1], eps=o.get("eps", o.get("alone", 1e-5)))
            self.named[name] = module
            return [ChannelsLast(), module, ChannelsFirst()] if x.dim() == 4 else [module]
        elif kind == "residual":
            return [Residual(self, o, x, name)]
        else:
            return [activation(kind, o.get("alone", 0.01))]
        self.named[name] = module
        return [module, activation(o["activation"])] if o.get("activation") else [module]


class Residual(nn.Module):
    def __init__(self, net: Net, options: dict[str, Any], x: Any, name: str):
        super().__init__()
        counts: Counter[str] = Counter()
        shape = tuple(x.shape[1:])
        self.body = Net(options["layers"], shape, counts, f"{name}/")
        self.shortcut = Net(options.get("shortcut", []), shape, counts, f"{name}/")
        net.named.update(self.body.named | self.shortcut.named)

    def forward(self, x: Any) -> Any:
        return self.body(x) + self.shortcut(x)


class ChannelsLast(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


class ChannelsFirst(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.permute(0, 3, 1, 2)


def activation(kind: str, slope: float = 0.01) -> Any:
    plain = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU}
    return nn.LeakyReLU(slope) if kind == "leaky_relu" else plain[kind]()


def one(spec: Any) -> tuple[str, Any]:
    return next(iter(spec.items())) if isinstance(spec, dict) else (spec, {})


def optimizer_of(spec: Any, parameters: list[Any]) -> Any:
    kind, options = one(spec)
    other = {"initial_accumulator": "initial_accumulator_value"}
    options = {other.get(name, name): value for name, value in options.items()}
    kinds = {"sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adam": "Adam", "adamw": "AdamW"}
    return getattr(torch.optim, kinds[kind])(parameters, **options)


def schedule_of(spec: Any, optimizer: Any, lr: float, steps: int) -> Any:
    kind, options = one(spec)
    options = options if isinstance(options, dict) else {"factor": options}
    rates = torch.optim.lr_scheduler
    warmup = options.get("warmup_steps", 0)
    proper: Any
    if kind == "step":
        proper = rates.StepLR(optimizer, options["every"], options.get("factor", 0.1))
    elif kind == "exponential":  # an epoch is one step of the full batch
        proper = rates.ExponentialLR(optimizer, options["factor"])
    elif kind == "cosine":
        proper = rates.CosineAnnealingLR(optimizer, steps - warmup - 1, options.get("final", 0.0) * lr)
    else:
        proper = rates.ConstantLR(optimizer, 1.0)
    if not warmup:
        return proper
    rising = rates.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    return rates.SequentialLR(optimizer, [rising, proper], [warmup])


def loss_of(spec: Any, outputs: Any, targets: Any) -> Any:
    kind, options = one(spec)
    if kind == "cross_entropy":
        smoothing = options if isinstance(options, float) else 0.0
        return functional.cross_entropy(outputs, targets, label_smoothing=smoothing)
    if targets.dim() == 1:
        classes = outputs.shape[1]
        targets = functional.one_hot(targets, classes) if classes > 1 else targets.reshape(-1, 1)
    function = {"binary_cross_entropy": functional.binary_cross_entropy_with_logits}.get(kind, functional.mse_loss)
    return function(outputs, targets.double())


def to_torch(name: str, array: np.ndarray) -> Any:
    """An array of model.h5 as PyTorch has it: only weights of linear and conv2d have more than one dimension."""
    return torch.tensor(np.ascontiguousarray(array.T if array.ndim == 2 else np.transpose(array, (3, 2, 0, 1)))
                        if name == "weight" and array.ndim > 1 else array)  # fmt: skip


def to_numpy(tensor: Any) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy()
    return array.T if array.ndim == 2 else np.transpose(array, (2, 3, 1, 0)) if array.ndim == 4 else array


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a model.h5, "<layer>/<name>"."""
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file["parameters"].visititems(
            lambda key, item: arrays.update({key: item[...]}) if isinstance(item, h5py.Dataset) else None
        )
    return arrays


def train(config: dict[str, Any], initial: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything for torch.npz."""
    with h5py.File(config["data"]["root"]) as file:
        x, y = file["x"][...], file["y"][...]
    if x.dtype == np.uint8:
        x = (x / 255 - np.array(config["data"]["mean"])) / np.array(config["data"]["std"])
    inputs = torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    targets = torch.tensor(y)
    net = Net(config["model"]["layers"], tuple(inputs.shape[1:]))
    with torch.no_grad():
        for key, array in initial.items():
            layer, _, name = key.rpartition("/")
            tensor = getattr(net.named[layer], name)
            value = to_torch(name, array)
            assert tensor.shape == value.shape, key
            tensor.copy_(value)
    told = config["train"]
    optimizer = optimizer_of(told["optimizer"], list(net.parameters()))
    schedule = schedule_of(told.get("schedule", "constant"), optimizer, one(told["optimizer"])[1]["lr"], told["steps"])
    losses, rates = [], []
    for _ in range(told["steps"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = loss_of(config["model"]["loss"], net(inputs), targets)
        loss.backward()
        if told.get("clip_norm"):
            nn.utils.clip_grad_norm_(net.parameters(), told["clip_norm"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    arrays = {
        f"{layer}/{name}": to_numpy(tensor)
        for layer, module in net.named.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if name != "num_batches_tracked"
    }
    return arrays | {"losses": losses, "rates": rates}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        config = json.loads((folder / "config.json").read_text())
        np.savez(folder / "torch.npz", **train(config, read(folder / "initial" / "model.h5")))
