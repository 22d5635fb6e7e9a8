"""The optimizer and the loss of a configuration in PyTorch; the network is torch/networks.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nettorrent_mpi.plan import specs

_OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(spec: specs.Spec, parameters: Sequence[Tensor]) -> Any:
    """Return PyTorch's optimizer of the same name, with the same options and its default implementation."""
    options = spec.options()
    if "initial_accumulator" in options:
        options["initial_accumulator_value"] = options.pop("initial_accumulator")
    return _OPTIMIZERS[spec.kind](parameters, **options)


def loss_of(spec: specs.Spec, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean loss of these rows, a scalar; with weights of the classes, the weighted one. `targets` are from
    `Split.targets`."""
    if isinstance(spec, specs.CrossEntropy):
        return functional.cross_entropy(outputs, targets, weights, label_smoothing=spec.label_smoothing)
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
