"""A network of the package as a PyTorch module, made of PyTorch's own layers, with images as (row, channel, height,
width): see engine/channels_first.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.channels_first import Placed, placed
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import specs

COUNTER = "num_batches_tracked"  # of batch norm; counts, and is read where momentum is None only
_ACTIVATIONS = {specs.Relu: nn.ReLU, specs.Sigmoid: nn.Sigmoid, specs.Tanh: nn.Tanh, specs.Gelu: nn.GELU}


class Block(nn.Module):
    """A Block has layers as its children, each under its name: `block.conv2d1`. An activation that belongs to another
    layer is `conv2d1_relu`; a name that a module cannot have gets `_` after it. `tensors` lists the arrays of all
    layers."""

    def __init__(self) -> None:
        super().__init__()
        self._children_of: list[tuple[Placed, str]] = []

    def place(self, layers: Sequence[Placed]) -> list[str]:
        """Add these layers; return the names of the children that compute them, in order."""
        names: list[str] = []
        for layer in layers:
            for ending, module in _modules(layer):
                name = layer.name.rpartition("/")[2].replace(".", "_") + ending
                while hasattr(self, name):
                    name += "_"
                self.add_module(name, module)
                names.append(name)
            self._children_of.append((layer, names[-1]))
        return names

    def run(self, names: Sequence[str], x: Tensor) -> Tensor:
        """Apply these children, one after another."""
        for name in names:
            x = getattr(self, name)(x)
        return x

    def tensors(self, prefix: str = "") -> Iterator[tuple[Placed, str, str]]:
        """Yield (layer, name of an array, its key in the state_dict)."""
        for layer, child in self._children_of:
            module = getattr(self, child)
            if isinstance(module, Block):
                yield from module.tensors(f"{prefix}{child}.")
            else:
                for name in (*dict(module.named_parameters()), *dict(module.named_buffers())):
                    if name != COUNTER:
                        yield layer, name, f"{prefix}{child}.{name}"


class TorchNetwork(Block):
    """The layers of `network` in PyTorch. Values are those that PyTorch draws until `load` sets them; float32, and
    `.double()` makes it float64. `first` is a module that comes before the layers, under the name `scaling`."""

    _order: Sequence[str] = ()  # of the children

    def __init__(self, network: Network, first: nn.Module | None = None):
        super().__init__()
        if first is not None:
            self.add_module("scaling", first)
        self._order = [*(["scaling"] if first is not None else []), *self.place(placed(network))]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self._order, x)

    def load(self, arrays: Mapping[str, Array], *, assign: bool = False) -> None:
        """Set all parameters and statistics to `arrays`, "<layer>/<name>" as in model.h5. With `assign` the module
        takes their type, and memory where it had none."""
        state = {key: torch.zeros((), dtype=torch.int64) for key in self.state_dict() if key.endswith(COUNTER)}
        wanted = {f"{layer.name}/{name}": (layer, name, key) for layer, name, key in self.tensors()}
        assert set(wanted) == set(arrays), set(wanted) ^ set(arrays)
        for own, (layer, name, key) in wanted.items():
            state[key] = torch.tensor(layer.outward(name, arrays[own]))
        self.load_state_dict(state, strict=True, assign=assign)

    def arrays(self) -> dict[str, Array]:
        """Return all parameters and statistics, as in model.h5."""
        state = self.state_dict()
        return {
            f"{layer.name}/{name}": layer.inward(name, state[key].detach().cpu().numpy())
            for layer, name, key in self.tensors()
        }


class ResidualBlock(Block):
    """A residual block computes body(x) + shortcut(x)."""

    _body: Sequence[str] = ()
    _shortcut: Sequence[str] = ()

    def __init__(self, layer: Placed):
        super().__init__()
        self._body, self._shortcut = self.place(layer.body), self.place(layer.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self._body, x) + self.run(self._shortcut, x)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each position of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class BatchNormOfLast(nn.BatchNorm1d):
    """Batch norm of rows of any shape that are no images, whose channels are their last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).reshape(x.shape)


class ChannelsLast(nn.Module):
    """Images as (row, height, width, channel), so that a flatten after it is in that order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def _modules(layer: Placed) -> list[tuple[str, nn.Module]]:
    """Return the modules of one layer, the last of which has its arrays, with what goes after its name for each."""
    spec = layer.spec
    if isinstance(spec, specs.Linear):
        return [("", nn.Linear(layer.inputs[0], spec.units, bias=spec.bias))]
    if isinstance(spec, specs.Conv2d):
        return _convolution(layer, spec)
    if isinstance(spec, specs.MaxPool2d | specs.AvgPool2d):
        kind = nn.MaxPool2d if isinstance(spec, specs.MaxPool2d) else nn.AvgPool2d
        return [("", kind(spec.size, spec.stride))]
    if isinstance(spec, specs.GlobalAvgPool2d):
        return [("", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))]
    if isinstance(spec, specs.Flatten):
        return [("", nn.Sequential(ChannelsLast(), nn.Flatten()) if layer.channels_last else nn.Flatten())]
    if isinstance(spec, specs.Dropout):
        return [("", nn.Dropout(spec.rate))]
    if isinstance(spec, specs.BatchNorm):
        norms = {1: nn.BatchNorm1d, 3: nn.BatchNorm2d}
        made = norms.get(len(layer.inputs), BatchNormOfLast)
        return [("", made(layer.inputs[-1], eps=spec.eps, momentum=spec.momentum))]
    if isinstance(spec, specs.LayerNorm):
        return [("", (LayerNorm2d if len(layer.inputs) == 3 else nn.LayerNorm)(layer.inputs[-1], eps=spec.eps))]
    if isinstance(spec, specs.Residual):
        return [("", ResidualBlock(layer))]
    if isinstance(spec, specs.LeakyRelu):
        return [("", nn.LeakyReLU(spec.slope))]
    return [("", _ACTIVATIONS[type(spec)]())]


def _convolution(layer: Placed, spec: specs.Conv2d) -> list[tuple[str, nn.Module]]:
    geometry = layer.geometry
    sides = geometry.vertical, geometry.horizontal
    padding = tuple(before for before, _ in sides)
    modules: list[tuple[str, nn.Module]] = []
    # After its last place an odd kernel may have more zeros, which it does not read; an even one needs them at the end.
    if any(size % 2 == 0 and before != after for size, (before, after) in zip(geometry.kernel, sides, strict=True)):
        (top, bottom), (left, right) = sides
        padding, modules = (0, 0), [("_padding", nn.ZeroPad2d((left, right, top, bottom)))]
    made = nn.Conv2d(layer.inputs[2], spec.filters, geometry.kernel, geometry.stride, padding, bias=spec.bias)
    return [*modules, ("", made)]


def as_tensor(values: Array, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Make a tensor of float64 numbers, rounded once."""
    return torch.tensor(np.asarray(values, np.float64), dtype=dtype, device=device)
