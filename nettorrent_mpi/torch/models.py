"""A model and its optimizer: checks of them, and values that all ranks of a group get from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.torch.slots import carrier


def check_model(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    exchanged: bool,
) -> None:
    """Raise a UserError for a model or an optimizer that cannot be parallelized."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if parameter.device.type != "cpu":
            raise UserError(
                f"{name} is on {parameter.device}: parallelize exchanges parameters in the host's memory only; keep "
                "the model on the CPU"
            )
        if carrier(parameter.dtype) is None:
            raise UserError(f"{name} is {parameter.dtype}, which has no average: use floating-point parameters")
        if exchanged and parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{name} is {parameter.dtype}: replicas exchange float32 and float64; use autocast with float32 "
                "parameters"
            )
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("the model has no parameters to train: set requires_grad on some")
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                raise UserError(
                    f"parameter {index} of the optimizer's group {number}, of shape {tuple(parameter.shape)}, is not "
                    "the model's: make the optimizer from model.parameters() after the model is complete"
                )


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer that makes the steps, without what Accelerate or Lightning have put around it. Raises a
    UserError for no optimizer."""
    found = optimizer
    while "_optimizer_step_pre_hooks" not in (own := getattr(found, "__dict__", {})):
        found = own.get("optimizer", own.get("_optimizer"))
        if not isinstance(found, torch.optim.Optimizer):
            raise UserError(f"the optimizer is a {type(optimizer).__name__}: give one of torch.optim.Optimizer's kind")
    made: torch.optim.Optimizer = found
    return made


def broadcast(group: Group, tensor: torch.Tensor, source: int) -> None:
    """Set a tensor to that of one member, whatever its type and strides."""
    if group.size == 1 or not tensor.numel():
        return
    whole = tensor.detach().contiguous()
    group.broadcast(whole.reshape(-1).view(torch.uint8).numpy(), source)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(whole)


def number_of(value: Any) -> float:
    """Return the number that a tensor of one element, or anything else that is a number, has."""
    return float(value.detach() if isinstance(value, torch.Tensor) else value)
