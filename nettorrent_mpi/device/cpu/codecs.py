"""Lossy codecs of flat arrays: see device.ops for the message formats."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType
from nettorrent_mpi.device.cpu.half import HalfOperations
from nettorrent_mpi.device.cpu.tuning import Tuning

PIECE = 32768  # elements processed at a time: they stay in the second-level cache for all operations
_CUT = 2.0**118  # larger values are clipped to this: sums over a block remain within float32
_SAMPLE = 16384  # elements sampled to estimate the size of the largest


class Codec(ABC):
    """A Codec encodes and decodes messages of one kind; `operations` provides scratch memory."""

    def __init__(self, operations: HalfOperations):
        self._operations = operations
        self._memory = operations.memory(np.float32)

    @abstractmethod
    def encode(self, values: Array, message: Array) -> None: ...

    @abstractmethod
    def decode_add(self, message: Array, estimate: Array) -> None: ...


def _pieces(size: int, block: int = 1) -> Iterator[slice]:
    """The whole blocks in pieces of up to PIECE elements, then the incomplete block that is left, if any."""
    whole = size - size % block
    for start in range(0, whole, PIECE):
        yield slice(start, min(start + PIECE, whole))
    if whole < size:
        yield slice(whole, size)


def _tame(values: Array) -> Array:
    """Return the values; non-finite ones are replaced by 0, and too large ones clipped, in a copy."""
    if float(np.dot(values, values)) <= _CUT * _CUT:  # False for nan; one pass without a mask
        return values
    return np.clip(np.where(np.isfinite(values), values, 0.0), -_CUT, _CUT)


class Float16Codec(Codec):
    """Rounds each value to the nearest float16, or to +-65504 beyond."""

    def encode(self, values: Array, message: Array) -> None:
        halves = message.view(np.int16)
        for piece in _pieces(values.size):
            x = self._memory.keep("x", (piece.stop - piece.start,), np.float32)
            np.clip(_tame(values[piece]), -65504.0, 65504.0, out=x, casting="same_kind")
            self._operations.to_half(x, halves[piece])

    def decode_add(self, message: Array, estimate: Array) -> None:
        halves = message.view(np.int16)
        for piece in _pieces(estimate.size):
            part = estimate[piece]
            np.add(part, self._operations.from_half(halves[piece]), out=part)


class _Scaled(Codec):
    """The base of codecs with a few bits per element and some numbers per `block` of elements: a scale at least."""

    block: int

    def encode(self, values: Array, message: Array) -> None:
        for piece in _pieces(values.size, self.block):
            rows = self._rows(_tame(values[piece]))
            work = self._rows(self._work(rows.size, values.dtype))
            self._pack(rows, np.abs(rows, out=work), self._parts(message, values.size, piece))

    def decode_add(self, message: Array, estimate: Array) -> None:
        for piece in _pieces(estimate.size, self.block):
            part = estimate[piece]
            np.add(part, self._unpack(self._parts(message, estimate.size, piece), part), out=part)

    def _blocks(self, size: int) -> int:
        return -(-size // self.block)

    def _rows(self, values: Array) -> Array:
        """Return a piece as a matrix with a block in each row."""
        return values.reshape(-1, min(values.size, self.block))

    def _work(self, size: int, dtype: DType) -> Array:
        return self._memory.keep("work", (size,), dtype)

    @abstractmethod
    def _parts(self, message: Array, size: int, piece: slice) -> tuple[Array, ...]:
        """Return the parts of the message for a piece of `size` elements."""

    @abstractmethod
    def _pack(self, rows: Array, magnitudes: Array, parts: tuple[Array, ...]) -> None:
        """Encode `rows` into `parts`. The memory of their `magnitudes` may be overwritten."""

    @abstractmethod
    def _unpack(self, parts: tuple[Array, ...], like: Array) -> Array:
        """Decode `parts`: flat, in scratch memory, of the size and type of `like`."""


class Int8Codec(_Scaled):
    """Rounds each value to the nearest of 255 multiples of its block's scale, the largest magnitude / 127."""

    block = 1024

    def _parts(self, message: Array, size: int, piece: slice) -> tuple[Array, ...]:
        scales, levels = np.split(message, [4 * self._blocks(size)])
        blocks = slice(piece.start // self.block, self._blocks(piece.stop))
        return scales.view(np.float32)[blocks], levels[piece].view(np.int8)

    def _pack(self, rows: Array, magnitudes: Array, parts: tuple[Array, ...]) -> None:
        scales, levels = parts
        np.maximum.reduce(magnitudes, axis=1, out=scales)
        np.maximum(scales, 1e-36, out=scales)  # 127 / 1e-36 is within float32
        work = np.multiply(rows, (127.0 / scales)[:, None], out=magnitudes)
        np.rint(work, out=work)
        np.copyto(levels, work.reshape(-1), casting="unsafe")
        np.divide(scales, 127.0, out=scales)

    def _unpack(self, parts: tuple[Array, ...], like: Array) -> Array:
        scales, levels = parts
        work = self._work(like.size, like.dtype)
        np.copyto(work, levels)
        np.multiply(self._rows(work), scales[:, None], out=self._rows(work))
        return work


class SignCodec(_Scaled):
    """Sends of each block the value largest in magnitude exactly, and for the others the sign times their mean
    magnitude (0 is positive)."""

    block = 128

    def __init__(self, operations: HalfOperations):
        super().__init__(operations)
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        self._signs = {dtype: (2.0 * bits - 1.0).astype(dtype) for dtype in (np.dtype("f4"), np.dtype("f8"))}

    def _parts(self, message: Array, size: int, piece: slice) -> tuple[Array, ...]:
        count = self._blocks(size)
        numbers, places, bits = np.split(message, [8 * count, 9 * count])
        blocks = slice(piece.start // self.block, self._blocks(piece.stop))
        scales, largest = numbers.view(np.float32).reshape(2, count)[:, blocks]
        return scales, largest, places[blocks], bits[piece.start // 8 : -(-piece.stop // 8)]

    def _pack(self, rows: Array, magnitudes: Array, parts: tuple[Array, ...]) -> None:
        scales, largest, places, bits = parts
        number = np.arange(len(rows))
        places[...] = np.argmax(magnitudes, axis=1)
        largest[...] = rows[number, places]
        magnitudes[number, places] = 0.0
        np.add.reduce(magnitudes, axis=1, out=scales)
        np.divide(scales, max(rows.shape[1] - 1, 1), out=scales)
        positive = self._memory.keep("positive", (rows.size,), np.bool_)
        bits[...] = np.packbits(np.greater_equal(rows.reshape(-1), 0.0, out=positive))

    def _unpack(self, parts: tuple[Array, ...], like: Array) -> Array:
        scales, largest, places, bits = parts
        whole = self._work(8 * bits.size, like.dtype)
        np.take(self._signs[like.dtype], bits, axis=0, out=whole.reshape(-1, 8), mode="clip")
        work = whole[: like.size]
        rows = self._rows(work)
        np.multiply(rows, scales[:, None], out=rows)
        rows[np.arange(len(rows)), places] = largest
        return work


class TopKCodec(Codec):
    """Sends the values largest in magnitude, as many as fit into the message. In ties the first are sent."""

    def encode(self, values: Array, message: Array) -> None:
        size, count = values.size, message.size // 8
        assert size < 1 << 32, f"{size} elements have no 32-bit indices"
        magnitudes = self._memory.keep("magnitudes", (size,), values.dtype)
        for piece in _pieces(size):
            np.abs(_tame(values[piece]), out=magnitudes[piece])
        limit = self._nth_largest(magnitudes, count)
        indices, sent = message[: 4 * count].view(np.uint32), message[4 * count :].view(np.float32)
        found = self._find(np.greater, magnitudes, limit, indices)
        self._find(np.equal, magnitudes, limit, indices[found:])
        for piece in _pieces(count):
            sent[piece] = _tame(values[indices[piece]])

    def decode_add(self, message: Array, estimate: Array) -> None:
        count = message.size // 8
        indices, sent = message[: 4 * count].view(np.uint32), message[4 * count :].view(np.float32)
        for piece in _pieces(count):
            estimate[indices[piece]] += sent[piece]

    def _nth_largest(self, magnitudes: Array, count: int) -> float:
        """Return the `count`-th largest, searched only among those that exceed a safe guess from a sample.

        With a fraction of 0.01 `encode` takes 1.9 ns per element then; partitioning everything alone takes 5.3, and
        np.argpartition 7.9 (float32, 2,000,000 elements, one core of an AMD EPYC of family 25).
        """
        size = magnitudes.size
        chosen = self._memory.keep("chosen", (size,), magnitudes.dtype)
        guess = -1.0
        if size >= 4 * _SAMPLE:
            sample = magnitudes[:: size // _SAMPLE | 1]  # an odd step does not sample only some columns of a matrix
            expected = sample.size * count / size
            rank = math.ceil(expected + 4.0 * math.sqrt(expected) + 4.0)
            if rank < sample.size:
                chosen[: sample.size] = sample
                chosen[: sample.size].partition(sample.size - rank)
                guess = float(chosen[sample.size - rank])
        found = 0
        for piece in _pieces(size):
            part = magnitudes[piece]
            mask = np.greater(part, guess, out=self._memory.keep("mask", (part.size,), np.bool_))
            more = found + int(np.count_nonzero(mask))
            np.compress(mask, part, out=chosen[found:more])
            found = more
        if found < count:  # the guess was too high
            np.copyto(chosen, magnitudes)
            found = size
        chosen[:found].partition(found - count)
        return float(chosen[found - count])

    def _find(self, compare: np.ufunc, magnitudes: Array, limit: float, indices: Array) -> int:
        """Write the indices of magnitudes that compare with the limit, the first ones until `indices` is full; return
        their number."""
        found = 0
        for piece in _pieces(magnitudes.size):
            if found == indices.size:
                break
            part = magnitudes[piece]
            mask = compare(part, limit, out=self._memory.keep("mask", (part.size,), np.bool_))
            places = np.flatnonzero(mask)[: indices.size - found]
            np.add(places, piece.start, out=indices[found : found + places.size], casting="unsafe")
            found += places.size
        return found


CODECS: dict[str, type[Codec]] = {"float16": Float16Codec, "int8": Int8Codec, "sign": SignCodec, "topk": TopKCodec}


class CodecOperations(HalfOperations):
    """Compressed messages: see device.ops.

    Scratch memory is allocated when a size is first seen. After that no allocation is proportional to the size, except
    up to some hundred KiB for a piece of an array where NumPy has no `out`.
    """

    def __init__(self, tuning: Tuning) -> None:
        super().__init__(tuning)
        self._codecs: dict[str, Codec] = {}

    def encode(self, kind: str, values: Array, message: Array) -> None:
        if values.size:
            with np.errstate(over="ignore", invalid="ignore"):  # non-finite values are searched for
                self._codec(kind).encode(values, message)

    def decode_add(self, kind: str, message: Array, estimate: Array) -> None:
        if estimate.size:
            self._codec(kind).decode_add(message, estimate)

    def _codec(self, kind: str) -> Codec:
        codec = self._codecs.get(kind)
        if codec is None:
            codec = self._codecs[kind] = CODECS[kind](self)
        return codec
