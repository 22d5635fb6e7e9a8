"""Dropout masks are a hash of (key, step, global row, index in the whole row), as on the CPU."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.device.gpu.operations import BLOCK, KernelOperations
from nettorrent_mpi.device.gpu.tiles import tiles
from nettorrent_mpi.device.random import place_codes
from nettorrent_mpi.plan.blocks import Span

TILE_BLOCKS = 2048


class GpuMaskOperations(KernelOperations):
    """Masks for dropout: see device.ops."""

    def place_codes(self, shape: Shape, part: Span) -> Array:
        codes = place_codes(shape, part)
        out = self.device.empty(codes.shape, codes.dtype)
        self.device.upload(out, codes)
        return out

    def keep_mask(self, keep: Array, codes: Array, rate: float, key: int, step: Array, rows: Span) -> None:
        assert keep.shape == (rows.size, codes.size)
        assert keep.flags.c_contiguous
        wide, grid = tiles(rows.size, codes.size, BLOCK, TILE_BLOCKS)
        threshold = round(rate * 2**32)
        assert threshold < 1 << 32, rate
        if rows.size:
            self.launch(
                "keep_mask", None, grid, BLOCK, keep, codes, step, key, rows.start, rows.size, codes.size, wide,
                threshold,
            )  # fmt: skip

    def drop(self, y: Array, keep: Array, scale: float) -> None:
        assert y.size == keep.size
        assert y.flags.c_contiguous
        self.each_pack("drop", y.dtype, y.size, y, keep, scale, y.size)
