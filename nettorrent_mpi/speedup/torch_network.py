"""The network, loss and optimizer of a configuration in PyTorch.

Images are (row, height, width, channel) here and (row, channel, height, width) in PyTorch; weights are (in, out) and
(kh, kw, in, out) here, (out, in) and (out, in, kh, kw) in PyTorch. `to_torch` and `to_numpy` translate arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from nettorrent_mpi.nn.layers.sequence import named
from nettorrent_mpi.plan import specs

Array = npt.NDArray[Any]

_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU}
_OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class TorchNetwork(nn.Module):
    """The layers that `layers` describe in PyTorch, applied to rows of `shape` (channels first, as PyTorch has them).

    `modules_by_name` maps the names in model.h5 to the modules with parameters. Values are those that PyTorch draws
    until `load` sets them. float32; `.double()` makes it float64.
    """

    def __init__(self, layers: Sequence[specs.LayerSpec], shape: Sequence[int], prefix: str = ""):
        super().__init__()
        self.modules_by_name: dict[str, nn.Module] = {}
        self.stack = nn.ModuleList()
        probe = torch.zeros(2, *shape)
        for spec in named(layers):
            for module in self._made(spec, probe, f"{prefix}{spec.name}"):
                self.stack.append(module)
                probe = module(probe).detach()
        self.output_shape = tuple(probe.shape[1:])
        for module in self.modules():  # undo the effect of the trial pass on the statistics
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        for module in self.stack:
            x = module(x)
        return x

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Set all parameters and statistics to `arrays`, "<layer>/<name>" as in model.h5."""
        own = {key for key, _ in self._tensors()}
        assert own == set(arrays), own ^ set(arrays)
        with torch.no_grad():
            for key, tensor in self._tensors():
                value = to_torch(key.rpartition("/")[2], arrays[key])
                assert tensor.shape == value.shape, (key, tensor.shape, value.shape)
                tensor.copy_(value)

    def arrays(self) -> dict[str, Array]:
        """Return all parameters and statistics, as in model.h5."""
        return {key: to_numpy(tensor) for key, tensor in self._tensors()}

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [
            (f"{layer}/{name}", tensor)
            for layer, module in self.modules_by_name.items()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if name != "num_batches_tracked"
        ]

    def _made(self, spec: specs.LayerSpec, x: Tensor, name: str) -> list[nn.Module]:
        """Return one layer's module; `x` has the shape of its input."""
        made: nn.Module
        if isinstance(spec, specs.Linear):
            made = nn.Linear(x.shape[1], spec.units, bias=spec.bias)
        elif isinstance(spec, specs.Conv2d):
            kernel = specs.pair(spec.kernel)
            odd = all(size % 2 for size in kernel)  # an even kernel needs more padding at the end, so a string
            same: Any = tuple(size // 2 for size in kernel) if odd else "same"
            padding = same if spec.padding == "same" else 0
            made = nn.Conv2d(x.shape[1], spec.filters, kernel, spec.stride, padding, bias=spec.bias)
        elif isinstance(spec, specs.BatchNorm):
            kind = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
            made = kind(x.shape[1], eps=spec.eps, momentum=spec.momentum)
        elif isinstance(spec, specs.LayerNorm):
            made = nn.LayerNorm(x.shape[1], eps=spec.eps)
            self.modules_by_name[name] = made
            return [_ChannelsLast(), made, _ChannelsFirst()] if x.dim() == 4 else [made]
        elif isinstance(spec, specs.Residual):
            block = _TorchResidual(spec, tuple(x.shape[1:]), f"{name}/")
            self.modules_by_name |= block.body.modules_by_name | block.shortcut.modules_by_name
            return [block]
        else:
            return _without_parameters(spec)
        self.modules_by_name[name] = made
        activation = spec.activation if isinstance(spec, specs.Linear | specs.Conv2d) else None
        return [made, _ACTIVATIONS[activation]()] if activation else [made]


class _TorchResidual(nn.Module):
    def __init__(self, spec: specs.Residual, shape: Sequence[int], prefix: str):
        super().__init__()
        inner = named((*spec.layers, *spec.shortcut))  # body and shortcut are counted together
        self.body = TorchNetwork(inner[: len(spec.layers)], shape, prefix)
        self.shortcut = TorchNetwork(inner[len(spec.layers) :], shape, prefix)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class _ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def _without_parameters(spec: specs.LayerSpec) -> list[nn.Module]:
    if isinstance(spec, specs.MaxPool2d):
        return [nn.MaxPool2d(spec.size, spec.stride)]
    if isinstance(spec, specs.AvgPool2d):
        return [nn.AvgPool2d(spec.size, spec.stride)]
    if isinstance(spec, specs.GlobalAvgPool2d):
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if isinstance(spec, specs.Flatten):  # in this package's order, so that the next weights correspond
        return [_ChannelsLast(), nn.Flatten()]
    if isinstance(spec, specs.Dropout):
        return [nn.Dropout(spec.rate)]
    if isinstance(spec, specs.LeakyRelu):
        return [nn.LeakyReLU(spec.slope)]
    return [_ACTIVATIONS[spec.kind]()]


def make_optimizer(spec: specs.Spec, parameters: Sequence[Tensor]) -> Any:
    """Return PyTorch's optimizer of the same name, with the same options and its default implementation."""
    options = spec.options()
    if "initial_accumulator" in options:
        options["initial_accumulator_value"] = options.pop("initial_accumulator")
    return _OPTIMIZERS[spec.kind](parameters, **options)


def loss_of(spec: specs.Spec, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of these rows, a scalar. `targets` are from `Split.targets`."""
    if isinstance(spec, specs.CrossEntropy):
        return functional.cross_entropy(outputs, targets, label_smoothing=spec.label_smoothing)
    if targets.dim() == 1:
        classes = outputs.shape[1]
        targets = functional.one_hot(targets, classes) if classes > 1 else targets.reshape(-1, 1)
    targets = targets.to(outputs.dtype)
    if isinstance(spec, specs.BinaryCrossEntropy):
        return functional.binary_cross_entropy_with_logits(outputs, targets)
    return functional.mse_loss(outputs, targets)


def count_right(spec: specs.Spec, outputs: Tensor, targets: Tensor) -> int:
    """Return the number of correct rows, as this package counts them; targets are labels."""
    if outputs.shape[1] == 1 and isinstance(spec, specs.BinaryCrossEntropy):
        return int(((outputs.reshape(-1) > 0) == (targets > 0.5)).sum())
    return int((outputs.argmax(1) == targets).sum())


def to_torch(name: str, array: Array) -> Tensor:
    """Convert an array of model.h5 to PyTorch's layout: only weights of linear and conv2d have more than one
    dimension."""
    if name == "weight" and array.ndim > 1:
        array = array.T if array.ndim == 2 else np.transpose(array, (3, 2, 0, 1))
    return torch.tensor(np.ascontiguousarray(array))


def to_numpy(tensor: Tensor) -> Array:
    """Convert a PyTorch array to the layout of model.h5."""
    array: Array = tensor.detach().cpu().numpy()
    return array.T if array.ndim == 2 else np.transpose(array, (2, 3, 1, 0)) if array.ndim == 4 else array
