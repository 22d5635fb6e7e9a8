"""Slots are the places of tensors in one flat array: views of it with the tensors' shapes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.buckets import divisible, round_up


def length(tensors: Sequence[torch.Tensor], parts: int = 1) -> int:
    """Return the number of elements of a flat array for the tensors, which can be divided into `parts` equal ones of
    whole lines."""
    return divisible(sum(round_up(tensor.numel()) for tensor in tensors), parts)


def slots(array: Array, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return for each tensor its view of `array`, of the array's type. A tensor whose elements lie in memory in another
    order, as with channels_last, has a view in that order: copying from one to the other is a plain copy."""
    flat, start, made = torch.from_numpy(array), 0, []
    for tensor in tensors:
        part = flat[start : start + tensor.numel()]
        strides = tensor.stride() if _dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
        made.append(part.as_strided(tensor.shape, strides))
        start += round_up(tensor.numel())
    return made


def carrier(dtype: Any) -> str | None:
    """Return the type in which numbers of a tensor's type are added up: that of float64 and float32 tensors, float32
    for shorter ones; None for whole and complex numbers."""
    if not dtype.is_floating_point:
        return None
    return "float64" if dtype == torch.float64 else "float32"


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill their memory, in any order."""
    size = 1
    for stride, length_ in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length_ != 1:
            if stride != size:
                return False
            size *= length_
    return True
