"""Convolution with 3 x 3 kernels by Winograd's F(2 x 2, 3 x 3): 16 products instead of 36.

Lavin, Gray: Fast Algorithms for Convolutional Neural Networks (arXiv:1509.09308), section 4.1. The image is cut into
tiles of 4 x 4 pixels that overlap by two; each gives 2 x 2 outputs y = A^T [(G g G^T) * (B^T d B)] A, where the product
in the middle, taken over all channels and tiles, is one matrix product for each of the 16 places. The gradients are the
adjoints: dg = G^T [(B^T d B) * (A dy A^T)] G, and dx is a convolution of dy.

k is the place in the tile, t the tile, c a channel, i an input channel and o an output channel.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu.algorithm import Algorithm, adjoint_padding, turned
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.geometry import Geometry

BLOCK_BYTES = 1 << 20  # bytes of transformed tiles processed at a time: they stay in the second-level cache
LEAST_TILES = 96  # least tiles of a block: products of fewer rows are slow


@Loop
def transform_weight(weight: Array, u_kio: Array) -> None:
    """u <- G g G^T; weight (3, 3, i, o)."""
    half = weight.dtype.type(0.5)
    for i in range(weight.shape[2]):
        for o in range(weight.shape[3]):
            for q in range(3):  # rows first: kept in u's places, column by column
                g0, g1, g2 = weight[0, q, i, o], weight[1, q, i, o], weight[2, q, i, o]
                u_kio[q, i, o] = g0
                u_kio[4 + q, i, o] = (g0 + g1 + g2) * half
                u_kio[8 + q, i, o] = (g0 - g1 + g2) * half
                u_kio[12 + q, i, o] = g2
            for p in range(4):
                g0, g1, g2 = u_kio[4 * p, i, o], u_kio[4 * p + 1, i, o], u_kio[4 * p + 2, i, o]
                u_kio[4 * p + 1, i, o] = (g0 + g1 + g2) * half
                u_kio[4 * p + 2, i, o] = (g0 - g1 + g2) * half
                u_kio[4 * p + 3, i, o] = g2


@Loop
def transform_weight_back(u_kio: Array, dw: Array) -> None:
    """dw += G^T u G; u is overwritten."""
    half = dw.dtype.type(0.5)
    for i in range(dw.shape[2]):
        for o in range(dw.shape[3]):
            for p in range(4):
                u0, u3 = u_kio[4 * p, i, o], u_kio[4 * p + 3, i, o]
                more = (u_kio[4 * p + 1, i, o] + u_kio[4 * p + 2, i, o]) * half
                less = (u_kio[4 * p + 1, i, o] - u_kio[4 * p + 2, i, o]) * half
                u_kio[4 * p, i, o] = u0 + more
                u_kio[4 * p + 1, i, o] = less
                u_kio[4 * p + 2, i, o] = more + u3
            for q in range(3):
                more = (u_kio[4 + q, i, o] + u_kio[8 + q, i, o]) * half
                dw[0, q, i, o] += u_kio[q, i, o] + more
                dw[1, q, i, o] += (u_kio[4 + q, i, o] - u_kio[8 + q, i, o]) * half
                dw[2, q, i, o] += more + u_kio[12 + q, i, o]


@Loop
def transform_input(x: Array, top: int, left: int, high: int, wide: int, v_tkc: Array) -> None:
    """v <- B^T d B for high x wide tiles of each image; x (b, height, width, c), padded by zeros."""
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    d = np.empty((16, channels), x.dtype)
    t = 0
    for b in range(x.shape[0]):
        for h in range(high):
            for w in range(wide):
                for k in range(16):
                    row, column = 2 * h - top + k // 4, 2 * w - left + k % 4
                    if 0 <= row < height and 0 <= column < width:
                        for c in range(channels):
                            d[k, c] = x[b, row, column, c]
                    else:
                        for c in range(channels):
                            d[k, c] = 0
                for c in range(channels):
                    r00, r01, r02, r03 = d[0, c] - d[8, c], d[1, c] - d[9, c], d[2, c] - d[10, c], d[3, c] - d[11, c]
                    r10, r11, r12, r13 = d[4, c] + d[8, c], d[5, c] + d[9, c], d[6, c] + d[10, c], d[7, c] + d[11, c]
                    r20, r21, r22, r23 = d[8, c] - d[4, c], d[9, c] - d[5, c], d[10, c] - d[6, c], d[11, c] - d[7, c]
                    r30, r31, r32, r33 = d[4, c] - d[12, c], d[5, c] - d[13, c], d[6, c] - d[14, c], d[7, c] - d[15, c]
                    v_tkc[t, 0, c] = r00 - r02
                    v_tkc[t, 1, c] = r01 + r02
                    v_tkc[t, 2, c] = r02 - r01
                    v_tkc[t, 3, c] = r01 - r03
                    v_tkc[t, 4, c] = r10 - r12
                    v_tkc[t, 5, c] = r11 + r12
                    v_tkc[t, 6, c] = r12 - r11
                    v_tkc[t, 7, c] = r11 - r13
                    v_tkc[t, 8, c] = r20 - r22
                    v_tkc[t, 9, c] = r21 + r22
                    v_tkc[t, 10, c] = r22 - r21
                    v_tkc[t, 11, c] = r21 - r23
                    v_tkc[t, 12, c] = r30 - r32
                    v_tkc[t, 13, c] = r31 + r32
                    v_tkc[t, 14, c] = r32 - r31
                    v_tkc[t, 15, c] = r31 - r33
                t += 1


@Loop
def transform_output(m_tkc: Array, bias_c: Array, high: int, wide: int, y: Array) -> None:
    """y <- A^T m A + bias for high x wide tiles of each image; y (b, height, width, c), whose ends may cut tiles."""
    height, width, channels = y.shape[1], y.shape[2], y.shape[3]
    outs = np.empty((4, channels), y.dtype)
    t = 0
    for b in range(y.shape[0]):
        for h in range(high):
            for w in range(wide):
                for c in range(channels):
                    s0 = m_tkc[t, 0, c] + m_tkc[t, 4, c] + m_tkc[t, 8, c]
                    s1 = m_tkc[t, 1, c] + m_tkc[t, 5, c] + m_tkc[t, 9, c]
                    s2 = m_tkc[t, 2, c] + m_tkc[t, 6, c] + m_tkc[t, 10, c]
                    s3 = m_tkc[t, 3, c] + m_tkc[t, 7, c] + m_tkc[t, 11, c]
                    d0 = m_tkc[t, 4, c] - m_tkc[t, 8, c] - m_tkc[t, 12, c]
                    d1 = m_tkc[t, 5, c] - m_tkc[t, 9, c] - m_tkc[t, 13, c]
                    d2 = m_tkc[t, 6, c] - m_tkc[t, 10, c] - m_tkc[t, 14, c]
                    d3 = m_tkc[t, 7, c] - m_tkc[t, 11, c] - m_tkc[t, 15, c]
                    outs[0, c] = s0 + s1 + s2 + bias_c[c]
                    outs[1, c] = s1 - s2 - s3 + bias_c[c]
                    outs[2, c] = d0 + d1 + d2 + bias_c[c]
                    outs[3, c] = d1 - d2 - d3 + bias_c[c]
                for k in range(4):
                    row, column = 2 * h + k // 2, 2 * w + k % 2
                    if row < height and column < width:
                        for c in range(channels):
                            y[b, row, column, c] = outs[k, c]
                t += 1


@Loop
def transform_output_back(dy: Array, high: int, wide: int, m_tkc: Array) -> None:
    """m <- A dy A^T for high x wide tiles of each image; dy (b, height, width, c), beyond whose ends are zeros."""
    height, width, channels = dy.shape[1], dy.shape[2], dy.shape[3]
    d = np.empty((4, channels), dy.dtype)
    t = 0
    for b in range(dy.shape[0]):
        for h in range(high):
            for w in range(wide):
                for k in range(4):
                    row, column = 2 * h + k // 2, 2 * w + k % 2
                    if row < height and column < width:
                        for c in range(channels):
                            d[k, c] = dy[b, row, column, c]
                    else:
                        for c in range(channels):
                            d[k, c] = 0
                for c in range(channels):
                    a0, a1, b0, b1 = d[0, c], d[1, c], d[2, c], d[3, c]
                    m_tkc[t, 0, c] = a0
                    m_tkc[t, 1, c] = a0 + a1
                    m_tkc[t, 2, c] = a0 - a1
                    m_tkc[t, 3, c] = -a1
                    m_tkc[t, 4, c] = a0 + b0
                    m_tkc[t, 5, c] = a0 + b0 + a1 + b1
                    m_tkc[t, 6, c] = a0 + b0 - a1 - b1
                    m_tkc[t, 7, c] = -a1 - b1
                    m_tkc[t, 8, c] = a0 - b0
                    m_tkc[t, 9, c] = a0 - b0 + a1 - b1
                    m_tkc[t, 10, c] = a0 - b0 - a1 + b1
                    m_tkc[t, 11, c] = b1 - a1
                    m_tkc[t, 12, c] = -b0
                    m_tkc[t, 13, c] = -b0 - b1
                    m_tkc[t, 14, c] = b1 - b0
                    m_tkc[t, 15, c] = b1
                t += 1


class WinogradProducts(Algorithm):
    """The algorithm for kernels of 3 x 3 and stride 1."""

    name = "winograd"

    def __init__(self, geometry: Geometry):
        super().__init__(geometry)
        assert geometry.kernel == (3, 3)
        assert geometry.stride == (1, 1)

    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        self._convolve(x, weight, bias, self.geometry.vertical[0], self.geometry.horizontal[0], y, workspace)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        (top, _), (left, _) = adjoint_padding(self.geometry)
        self._convolve(dy, turned(weight, workspace), None, top, left, dx, workspace)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        high, wide = _tiles(dy)
        channels, filters = dw.shape[2:]
        total = workspace.scratch("winograd weight", (16, channels, filters))
        more = workspace.scratch("winograd more", (16, channels, filters))
        total[...] = 0
        for images, v, m in _blocks(x, high * wide, channels, filters, workspace):
            transform_input(x[images], self.geometry.vertical[0], self.geometry.horizontal[0], high, wide, v)
            transform_output_back(dy[images], high, wide, m)
            np.matmul(v.transpose(1, 2, 0), m.transpose(1, 0, 2), out=more)
            np.add(total, more, out=total)
        if not accumulate:
            dw[...] = 0
        transform_weight_back(total, dw)

    def _convolve(
        self, x: Array, weight: Array, bias: Array | None, top: int, left: int, y: Array, workspace: Workspace
    ) -> None:
        """Compute y <- the convolution of x, padded by `top` and `left` zeros before and as needed after, plus the
        bias."""
        high, wide = _tiles(y)
        channels, filters = weight.shape[2:]
        u = workspace.scratch("winograd weight", (16, channels, filters))
        transform_weight(weight, u)
        if bias is None:
            bias = workspace.scratch("no bias", (filters,))
            bias[...] = 0
        for images, v, m in _blocks(x, high * wide, channels, filters, workspace):
            transform_input(x[images], top, left, high, wide, v)
            np.matmul(v.transpose(1, 0, 2), u, out=m.transpose(1, 0, 2))
            transform_output(m, bias, high, wide, y[images])


def _tiles(y: Array) -> tuple[int, int]:
    """Return the number of tiles down and across an image of outputs."""
    return -(-y.shape[1] // 2), -(-y.shape[2] // 2)


def _blocks(
    x: Array, tiles: int, channels: int, filters: int, workspace: Workspace
) -> Iterator[tuple[slice, Array, Array]]:
    """Yield (images, memory for their tiles of inputs, and of outputs).

    The 16 places of a tile are adjacent: if the tiles of a place were adjacent, places would often be a power of two
    apart, which causes conflicts in the first-level cache.
    """
    wanted = max(LEAST_TILES, BLOCK_BYTES // (16 * (channels + filters) * x.itemsize))
    each = max(1, wanted // tiles)
    for first in range(0, len(x), each):
        images = slice(first, min(first + each, len(x)))
        count = (images.stop - first) * tiles
        v = workspace.scratch("winograd input", (count, 16, channels))
        yield images, v, workspace.scratch("winograd output", (count, 16, filters))
