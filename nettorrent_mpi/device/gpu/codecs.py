"""Lossy codecs of flat arrays: see device.ops for the message formats. Messages are the CPU's, bit for bit."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.operations import BLOCK, MOST_BLOCKS, KernelOperations

INT8_BLOCK, SIGN_BLOCK, TOP_CHUNK = 1024, 128, 2048  # values, as in kernels.cu
COUNTING_BLOCKS = 512  # of find_byte: each adds its counts to the sum


class GpuCodecOperations(KernelOperations):
    """Compressed messages: see device.ops. The host reads nothing: which values topk takes is found on the GPU."""

    def encode(self, kind: str, values: Array, message: Array) -> None:
        n, real = values.size, values.dtype
        if not n:
            return
        parts = _parts(kind, message, n)
        if kind == "float16":
            self.each("encode_float16", real, n, values, *parts, n)
        elif kind == "int8":
            blocks = -(-n // INT8_BLOCK)
            self.launch("encode_int8", real, min(blocks, MOST_BLOCKS), BLOCK, values, *parts, n, blocks)
        elif kind == "sign":
            blocks = -(-n // SIGN_BLOCK)
            self.launch("encode_sign", real, min(blocks, 4 * MOST_BLOCKS), SIGN_BLOCK, values, *parts, n, blocks)
        else:
            self._encode_top(values, *parts)

    def decode_add(self, kind: str, message: Array, estimate: Array) -> None:
        n = estimate.size
        if n:
            parts = _parts(kind, message, n)
            if kind == "topk":
                self.each("decode_top", estimate.dtype, parts[0].size, *parts, estimate, n, parts[0].size)
            else:
                self.each(f"decode_{kind}", estimate.dtype, n, *parts, estimate, n)

    def _encode_top(self, values: Array, indices: Array, sent: Array) -> None:
        n, count, real = values.size, indices.size, values.dtype
        assert n < 1 << 32, f"{n} elements have no 32-bit indices"
        state = self.scratch("topk", (2,), np.uint64)
        counts, done = self.counters(256, "topk counts"), self.counters(1, "topk")
        first = 8 * real.itemsize - 8
        for shift in range(first, -1, -8):
            grid = min(-(-n // (8 * BLOCK)), COUNTING_BLOCKS)
            self.launch("find_byte", real, grid, BLOCK, values, counts, state, done, n, count, shift, shift == first)
        blocks = -(-n // TOP_CHUNK)
        chunks = self.scratch("topk chunks", (2 * blocks + 2,), np.uint32)
        self.launch("count_top", real, blocks, BLOCK, values, state, chunks, done, n)
        self.launch("encode_top", real, blocks, BLOCK, values, state, chunks, indices, sent, n, count)


def _parts(kind: str, message: Array, n: int) -> tuple[Array, ...]:
    """Return the parts of a message about n values, in the order of the kernels' arguments."""
    if kind == "float16":
        return (message[: 2 * n].view(np.uint16),)
    if kind == "int8":
        scales = 4 * -(-n // INT8_BLOCK)
        return message[:scales].view(np.float32), message[scales : scales + n]
    if kind == "sign":
        blocks = -(-n // SIGN_BLOCK)
        numbers = message[: 8 * blocks].view(np.float32)
        return numbers[:blocks], numbers[blocks:], message[8 * blocks : 9 * blocks], message[9 * blocks :]
    assert kind == "topk", kind
    count = message.size // 8
    return message[: 4 * count].view(np.uint32), message[4 * count : 8 * count].view(np.float32)
