"""The rows of a data set in PyTorch: gathered, augmented and scaled in every step, in the memory of a CPU or a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nettorrent_mpi.data.augment import PADDING, Augment
from nettorrent_mpi.data.rows import Split, private, unlimited

_GOLDEN, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


class Rows:
    """A split's rows in memory as stored in the file (bytes, or floats), and mini-batches of them. On a GPU the rows
    lie there, and are augmented there, too."""

    def __init__(
        self,
        split: Split,
        dtype: torch.dtype,
        augment: Augment | None,
        channels_last: bool,
        device: torch.device | str = "cpu",
    ):
        raw = np.empty((split.rows, int(np.prod(split.shape)) * split.dtype.itemsize), np.uint8)
        split.open_rows(private, unlimited)(np.arange(split.rows, dtype=np.intp), raw)
        rows = raw.view(split.dtype).reshape(split.rows, *split.shape)
        rows = rows.astype(split.dtype.newbyteorder("="), copy=False)
        self._device = torch.device(device)
        self._images = len(split.shape) == 3
        self._last = self._images and (channels_last or augment is not None)  # memory layout of rows
        self._format = torch.channels_last if channels_last and self._images else torch.contiguous_format
        first = self._images and not self._last
        self._rows = torch.from_numpy(np.ascontiguousarray(np.moveaxis(rows, -1, 1)) if first else rows).to(device)
        self.targets = torch.from_numpy(np.ascontiguousarray(split.targets())).to(device)
        self._dtype, self._augment = dtype, augment
        channels = (1, -1, 1, 1) if self._images else (1, *[1] * (len(split.shape) - 1), -1)
        factor, offset = (
            torch.tensor(values, dtype=dtype, device=device).reshape(channels)
            for values in (split.scaling.factor, split.scaling.offset)
        )
        self._factor = None if bool((factor == 1).all()) else factor
        self._offset = None if bool((offset == 0).all()) else offset

    def batch(
        self, rows: np.ndarray[Any, Any] | Tensor, key: int = 0, *, training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets) of these rows; `key` seeds the augmentation, in training only."""
        chosen = rows if isinstance(rows, Tensor) else torch.tensor(rows, device=self._device)
        if self._augment is None or not training:
            x = self._rows.index_select(0, chosen)
        elif self._device.type == "cpu":
            x = augmented_on_host(self._rows, chosen, key, self._augment)
        else:
            x = augmented(self._rows, chosen, key, self._augment)
        if self._last:
            x = x.permute(0, 3, 1, 2)
        x = x.to(self._dtype, memory_format=self._format)
        if self._factor is not None:
            x = x.mul_(self._factor)
        if self._offset is not None:
            x = x.sub_(self._offset)
        return x, self.targets.index_select(0, chosen)


def augmented_on_host(rows: Tensor, chosen: Tensor, key: int, augment: Augment) -> Tensor:
    """Gather and augment rows (row, height, width, channel) by this package's own loops."""
    x = rows.index_select(0, chosen)
    raw = x.numpy().reshape(len(chosen), -1).view(np.uint8)
    out = np.empty_like(raw)
    augment.apply(chosen.numpy(), key, raw, out)
    return torch.from_numpy(out.view(x.numpy().dtype).reshape(x.shape))


def augmented(rows: Tensor, chosen: Tensor, key: int, augment: Augment) -> Tensor:
    """Gather and augment rows in the same way by PyTorch's operations: one reads each pixel from its place."""
    _, height, width, _ = rows.shape
    bits = _random_bits(chosen, key)
    ys, xs = torch.arange(height, device=rows.device), torch.arange(width, device=rows.device)
    y_bH, x_bW = ys.expand(len(chosen), height), xs.expand(len(chosen), width)
    if augment.crop:
        dy, dx = (((bits >> shift & 0xFFFF) * (2 * PADDING + 1) >> 16) - PADDING for shift in (8, 24))
        y_bH, x_bW = y_bH + dy[:, None], x_bW + dx[:, None]
    y_inside, x_inside = (y_bH >= 0) & (y_bH < height), (x_bW >= 0) & (x_bW < width)
    y_bH, x_bW = y_bH.clamp(0, height - 1), x_bW.clamp(0, width - 1)
    if augment.flip:
        x_bW = torch.where((bits & 1).bool()[:, None], width - 1 - x_bW, x_bW)
    found = rows[chosen[:, None, None], y_bH[:, :, None], x_bW[:, None, :]]
    if augment.crop:
        found *= (y_inside[:, :, None] & x_inside[:, None, :])[..., None]
    return found


def _random_bits(chosen: Tensor, key: int) -> Tensor:
    """Return Augment's 64 random bits for each row, in signed numbers, as PyTorch has no unsigned arithmetic."""
    bits = chosen * _signed(_GOLDEN) + _signed(key & (1 << 64) - 1)
    for shift, factor in _MIX:
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return bits


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
