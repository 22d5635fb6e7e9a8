"""Layers that are divided over the ranks of a group by their outputs or inputs, with true gradients.

Every rank calls the model with the same inputs and gets the same whole outputs; each holds its span of the weights and
computes its part. B rows, I inputs, O outputs; a small letter is this rank's part:

    out   y_BO = all-gather(x_BI @ W_oI.T + b_o)           dx_BI = all-reduce(dy_Bo @ W_oI)
    in    y_BO = all-reduce(x_Bi @ W_Oi.T) + b_O           dx_BI = all-gather(dy_BO @ W_Oi)

The gradient of a part is that part of the serial gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nettorrent_mpi import env
from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.torch.split_tensors import Division, SplitRanks

WAYS = ("out", "in")

_everyone: SplitRanks | None = None


def ranks_of(comm: Any) -> SplitRanks:
    """Return the ranks of a communicator; None: all of the program, the same ones for all layers."""
    global _everyone  # noqa: PLW0603
    if isinstance(comm, SplitRanks):
        return comm
    if comm is not None:
        return SplitRanks(comm)
    if _everyone is None or _everyone.closed:
        env.prepare()
        _everyone = SplitRanks()
    return _everyone


class SplitLayer(nn.Module):
    """A SplitLayer is a layer of PyTorch of which each rank computes a part; on one rank it is that layer.

    `weight` and `bias` are this rank's parts (with "in", `bias` is whole). state_dict() has whole arrays under the
    names of the undivided layer, and is therefore collective: all ranks call it, also where only one of them writes the
    file. load_state_dict takes whole arrays and keeps the part; each rank calls it with the same arrays.
    """

    axis = -1  # the dimension of an input and an output that has the features

    split: str
    ranks: SplitRanks
    label: str
    is_whole: bool

    def divide(self, split: str, ranks: SplitRanks, label: str) -> None:
        """Divide this layer, which is whole: take rank 0's values and keep this rank's part. All ranks call."""
        self.split, self.ranks, self.label, self.is_whole = split, ranks, label, True
        # For inference TransformerEncoderLayer computes with the weights itself, unless a module in it has hooks.
        self.register_forward_pre_hook(_no_shortcut)
        self._keep()

    def sizes(self) -> tuple[int, int]:
        """Return how many inputs and outputs the whole layer has."""
        raise NotImplementedError

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the layer with these parts."""
        raise NotImplementedError

    def divisions(self) -> dict[str, Division]:
        """Return by its name how each divided parameter is divided; none while the layer is whole."""
        inputs, outputs = self.sizes()
        if self.is_whole:
            return {}
        if self.split == "in":
            return {"weight": Division(self.ranks, 1, inputs)}
        rows = Division(self.ranks, 0, outputs)
        return {"weight": rows} if self.bias is None else {"weight": rows, "bias": rows}

    def forward(self, x: Tensor) -> Tensor:
        """Return the whole outputs for whole inputs."""
        ranks, trained = self.ranks, self.weight.requires_grad
        inputs, outputs = self.sizes()
        if self.is_whole:
            return self.compute(x, self.weight, self.bias)
        if self.split == "out":
            part = self.compute(ranks.copied(x, self.label, trained), self.weight, self.bias)
            return ranks.gathered(part, self.axis, outputs, self.label)
        part = ranks.scattered(x, self.axis, inputs, self.label, trained)
        y: Tensor = ranks.reduced(self.compute(part, self.weight, None), self.label)
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, *[1] * (-1 - self.axis))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let every rank hold the whole layer inside the `with` block, to set or to read its values; afterwards ranks
        keep their parts of rank 0's values. All ranks enter and leave."""
        if self.is_whole:
            yield
            return
        self.ranks.meet(f"gathering of {self.label}")
        for name, division in self.divisions().items():
            parameter = getattr(self, name)
            parameter.data = division.whole(parameter.data)
        self.is_whole = True
        try:
            yield
        except BaseException:
            self._keep(agreed=False)
            raise
        self.ranks.meet(f"division of {self.label}")
        self._keep()

    def _keep(self, agreed: bool = True) -> None:
        """Keep this rank's part of the whole layer, of rank 0's if `agreed`."""
        if self.ranks.size == 1:
            return
        for parameter in self.parameters(recurse=False) if agreed else ():
            self.ranks.broadcast(parameter.data)
        self.is_whole = False
        for name, division in self.divisions().items():
            parameter = getattr(self, name)
            parameter.data = division.part(parameter.data)

    def reset_parameters(self) -> None:
        """Draw new initial values, those of the undivided layer. All ranks call."""
        with self.whole() if hasattr(self, "ranks") else ExitStack():
            super().reset_parameters()

    def extra_repr(self) -> str:
        told: str = super().extra_repr()
        if not hasattr(self, "ranks"):
            return told
        told = f"{told}, split={self.split!r}"
        return told if self.is_whole else f"{told} over {self.ranks.size} ranks"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, division in self.divisions().items():
            self.ranks.meet(f"state_dict of {self.label}")
            destination[prefix + name] = division.whole(getattr(self, name).detach())

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: Any, missing: Any, unexpected: Any, mistakes: Any
    ) -> None:
        for name, division in self.divisions().items():
            key, parameter = prefix + name, getattr(self, name)
            given = state_dict.get(key)
            if not isinstance(given, Tensor):
                continue  # PyTorch says that it is missing, or no tensor
            shape = division.shape(parameter)
            if given.shape == shape:
                state_dict[key] = division.part(given)
            else:
                mistakes.append(
                    f"size mismatch for {key}: copying a param with shape {given.shape} from checkpoint, the shape in "
                    f"current model is {shape}: of the whole parameter, which is split over {self.ranks.size} ranks."
                )
                state_dict[key] = parameter.detach()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, mistakes)


class SplitLinear(SplitLayer, nn.Linear):
    """A SplitLinear is a torch.nn.Linear whose outputs (split="out") or inputs ("in") are divided over ranks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        split: str = "out",
        comm: Any = None,
    ):
        """Make one on all ranks of the program, or on those of `comm`, with rank 0's initial values. They all call."""
        super().__init__(in_features, out_features, bias, device, dtype)
        _begin(self, split, comm, f"Linear({in_features}, {out_features})")

    def sizes(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = nn.functional.linear(x, weight, bias)
        return y


class SplitConv2d(SplitLayer, nn.Conv2d):
    """A SplitConv2d is a torch.nn.Conv2d whose filters (split="out") or input channels ("in") are divided over ranks.
    It has one group."""

    axis = -3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        split: str = "out",
        comm: Any = None,
    ):
        """Make one on all ranks of the program, or on those of `comm`, with rank 0's initial values. They all call."""
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        _begin(self, split, comm, f"Conv2d({in_channels}, {out_channels}, {self.kernel_size})")

    def sizes(self) -> tuple[int, int]:
        return self.in_channels, self.out_channels

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        filters, channels = weight.shape[:2]
        if filters == 0:  # no convolution of PyTorch has none: compute one of zeros, and drop it
            weight = torch.cat([weight, weight.new_zeros(1, *weight.shape[1:])])
            bias = bias if bias is None else torch.cat([bias, bias.new_zeros(1)])
        elif channels == 0:
            one = [*x.shape]
            one[self.axis] = 1
            x, weight = (
                torch.cat([x, x.new_zeros(one)], self.axis),
                torch.cat([weight, weight.new_zeros(filters, 1, *weight.shape[2:])], 1),
            )
        y: Tensor = self._conv_forward(x, weight, bias)
        return y.narrow(self.axis, 0, filters)


SPLIT_CLASSES = {nn.Linear: SplitLinear, nn.Conv2d: SplitConv2d}


def refusal(module: Any, split: object) -> str | None:
    """Return why this layer cannot be divided so, None if it can."""
    if split not in WAYS:
        return f'is to be split by {split!r}: choose "out" or "in"'
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"has {module.groups} groups, whose outputs read some inputs only: leave grouped convolutions whole"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.device.type != "cpu":
            return f"has its {name} on {parameter.device}: layers are split in the host's memory only; use the CPU"
        if not parameter.dtype.is_floating_point:
            return f"has a {name} of {parameter.dtype}: only floating-point layers are split"
    return None


def _begin(layer: SplitLayer, split: str, comm: Any, label: str) -> None:
    ranks = ranks_of(comm)
    with ranks.world.agreement():
        reason = refusal(layer, split)
        if reason is not None:
            raise UserError(f"{label} {reason}")
    ranks.meet(f"making of {layer!r}, {split!r}, {layer.weight.dtype}")
    layer.divide(split, ranks, label)


def _no_shortcut(module: object, inputs: object) -> None:
    pass


def split_layers(model: nn.Module) -> list[SplitLayer]:
    """Return the layers of a model that can be divided."""
    return [module for module in model.modules() if isinstance(module, SplitLayer)]


def split_parameters(model: nn.Module) -> dict[str, Division]:
    """Return by its name how each divided parameter of a model is divided."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, SplitLayer):
            for name, division in module.divisions().items():
                found[f"{prefix}.{name}" if prefix else name] = division
    return found


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Let every rank hold the whole model inside the `with` block, to set or to read its values, or to compute without
    the other ranks; afterwards ranks keep their parts of rank 0's values. All ranks enter and leave."""
    with ExitStack() as stack:
        for layer in split_layers(model):
            stack.enter_context(layer.whole())
        yield


def close(model: nn.Module) -> None:
    """Free the communicators of a model's split layers, and with them of all layers on the same ranks; none can be used
    any more. At the program's end this is not needed. All ranks call."""
    for layer in split_layers(model):
        layer.ranks.close()
