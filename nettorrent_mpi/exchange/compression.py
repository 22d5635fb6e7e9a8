"""Lossy codecs that make the messages between replicas smaller, for use with error feedback.

CHOCO-SGD (Koloskova, Stich, Jaggi 2019, arXiv 1902.00340): along an edge a -> b both ends hold the same estimate x_hat
of what a has. In a round a sends q = C(x_a - x_hat), both ends add q to x_hat, and both move by gamma times the
pairing's weight times x_hat, b up and a down. What a message leaves out stays in x_a - x_hat and goes with a later one,
so nothing is lost for good, however coarse C is; and because the two ends move by the same numbers, the sum over the
replicas stays what it was.

All codecs are deterministic and, for finite values within their range, contractions:
||x - C(x)||^2 <= (1 - delta) ||x||^2 with delta > 0.

Values that are not finite count as 0: nothing is said about them and no other value suffers, so the neighbours of a
replica that diverged see it stand still. Larger values than a codec can say are cut (float16: to 65504, the others: to
3e35), and the rest follows in later messages. float16 sends 0 below 3e-8, int8 below 1e-38.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.plan.errors import ConfigError

PIECE = 32768  # elements that are worked on together: they stay in the second-level cache for all operations
_CUT = 2.0**118  # larger values are cut to this: sums over a block remain within float32


class Codec(ABC):
    """Compresses flat float32 or float64 arrays of any size, 0 included, into messages of a known length.

    `gamma` is CHOCO's step that suits the codec where the user gives none (see below).

    A codec owns scratch memory, made when a size is first used and then used again: let no two threads share one. After
    that nothing proportional to the size is allocated, but up to some hundred KiB for a piece of an array where NumPy
    has no `out`.
    """

    gamma: float

    # Tried out by gossip as above of 2 to 16 replicas of 1000 elements on rings, grids, hypercubes, complete, finite,
    # exponential and shuffled graphs, from differences that are normally distributed, or that times exp(2 normal):
    # float16, int8: 1 is quickest, as without codec; 1.4 settles, too.
    # sign: quick from 0.25 to 1; under constant noise the replicas stay nearest to each other from 0.5 to 0.85.
    # topk: an element waits for up to 1 / fraction messages, and who goes by older news must go slower: quickest from 1
    #   to 1.6 times the fraction; settles everywhere up to 1.8 times, on dense graphs not any more from 2.5 to 3 times.

    def __init__(self) -> None:
        self._memory = Workspace(np.float32)

    @abstractmethod
    def bytes(self, size: int, dtype: DType) -> int:
        """The length of the message for `size` elements of `dtype`."""

    def encode(self, values: Array, out: Array) -> None:
        """out <- the message that says `values`, which stay unchanged.

        `values` is flat and contiguous, `out` uint8 of bytes(values.size, values.dtype), beginning on 4 bytes.
        """
        assert out.dtype == np.uint8
        assert out.size == self.bytes(values.size, values.dtype), (out.size, values.size)
        if values.size:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for
                self._encode(values, out)

    def decode_add(self, message: Array, estimate: Array) -> None:
        """estimate += what the message says, in place; bit for bit the same wherever it is done.

        `estimate` is flat, contiguous and of the size and type of the values that were encoded.
        """
        assert message.dtype == np.uint8
        assert message.size == self.bytes(estimate.size, estimate.dtype), (message.size, estimate.size)
        if estimate.size:
            self._decode_add(message, estimate)

    @abstractmethod
    def _encode(self, values: Array, out: Array) -> None: ...

    @abstractmethod
    def _decode_add(self, message: Array, estimate: Array) -> None: ...


def make_codec(kind: str, fraction: float | None = None) -> Codec:
    """The codec of that name: float16, int8, sign, or topk, which alone takes the `fraction` of elements to send.

    Raises ConfigError for a fraction out of range.
    """
    if kind == "topk":
        assert fraction is not None
        return TopKCodec(fraction)
    assert fraction is None, kind
    codecs: dict[str, Callable[[], Codec]] = {"float16": Float16Codec, "int8": Int8Codec, "sign": SignCodec}
    return codecs[kind]()


def _pieces(size: int, block: int = 1) -> Iterator[slice]:
    """The whole blocks in pieces of up to PIECE elements, then the incomplete block that is left, if any."""
    whole = size - size % block
    for start in range(0, whole, PIECE):
        yield slice(start, min(start + PIECE, whole))
    if whole < size:
        yield slice(whole, size)


def _tame(values: Array) -> Array:
    """The values, or where some are not finite or too large, a copy with 0 for the former, the latter cut."""
    if float(np.dot(values, values)) <= _CUT * _CUT:  # not if it is nan; one pass without a mask
        return values
    return np.clip(np.where(np.isfinite(values), values, 0.0), -_CUT, _CUT)


# -- float16 ----------------------------------------------------------------------------------------------------------


class Float16Codec(Codec):
    """Each value rounded to the nearest float16, or to +-65504 beyond."""

    gamma = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._ops = make_device("cpu", "numpy").ops

    def bytes(self, size: int, dtype: DType) -> int:
        return 2 * size

    def _encode(self, values: Array, out: Array) -> None:
        halves = out.view(np.int16)
        for piece in _pieces(values.size):
            x = self._memory.keep("x", (piece.stop - piece.start,), np.float32)
            np.clip(_tame(values[piece]), -65504.0, 65504.0, out=x, casting="same_kind")
            self._ops.to_half(x, halves[piece])

    def _decode_add(self, message: Array, estimate: Array) -> None:
        halves = message.view(np.int16)
        for piece in _pieces(estimate.size):
            part = estimate[piece]
            np.add(part, self._ops.from_half(halves[piece]), out=part)


# -- blocks with a scale ----------------------------------------------------------------------------------------------


class _Scaled(Codec):
    """Messages of a few bits for each element, and of some numbers for each `block` of them: a scale at least."""

    block: int

    def _encode(self, values: Array, out: Array) -> None:
        for piece in _pieces(values.size, self.block):
            rows = self._rows(_tame(values[piece]))
            work = self._rows(self._work(rows.size, values.dtype))
            self._pack(rows, np.abs(rows, out=work), self._parts(out, values.size, piece))

    def _decode_add(self, message: Array, estimate: Array) -> None:
        for piece in _pieces(estimate.size, self.block):
            part = estimate[piece]
            np.add(part, self._unpack(self._parts(message, estimate.size, piece), part), out=part)

    def _blocks(self, size: int) -> int:
        return -(-size // self.block)

    def _rows(self, values: Array) -> Array:
        """A piece as a matrix with a block in each row."""
        return values.reshape(-1, min(values.size, self.block))

    def _work(self, size: int, dtype: DType) -> Array:
        return self._memory.keep("work", (size,), dtype)

    @abstractmethod
    def _parts(self, message: Array, size: int, piece: slice) -> tuple[Array, ...]:
        """Where a piece of `size` elements lies in the message."""

    @abstractmethod
    def _pack(self, rows: Array, magnitudes: Array, parts: tuple[Array, ...]) -> None:
        """parts <- what says `rows`. The memory of their `magnitudes` is free to be used."""

    @abstractmethod
    def _unpack(self, parts: tuple[Array, ...], like: Array) -> Array:
        """What `_pack` packed: flat, in scratch memory, of the size and type of `like`."""


class Int8Codec(_Scaled):
    """Each value rounded to the nearest of 255 multiples of its block's scale, the largest magnitude / 127."""

    block = 1024
    gamma = 1.0

    def bytes(self, size: int, dtype: DType) -> int:
        return 4 * self._blocks(size) + size

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
    """Of each block the value that is largest in magnitude, as it is, and of the others the sign times their mean
    magnitude (0 is positive): 1.56 bits per element.

    Signs times a mean alone (Karimireddy et al. 2019, arXiv 1901.09847) have delta = ||x||_1^2 / (n ||x||_2^2) for a
    block of n: 2/pi where values are normally distributed, but down to 1/n with outliers. An outlier then takes about n
    messages to arrive; gossip, going by old estimates for so long, swings up (on the exponential graph of 16 already at
    a gamma of 0.03). With the largest value apart delta is at least 2 / (sqrt(n) + 1).
    """

    block = 128
    gamma = 0.5

    def __init__(self) -> None:
        super().__init__()
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        self._signs = {dtype: (2.0 * bits - 1.0).astype(dtype) for dtype in (np.dtype("f4"), np.dtype("f8"))}

    def bytes(self, size: int, dtype: DType) -> int:
        return 9 * self._blocks(size) + -(-size // 8)

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


# -- top k ------------------------------------------------------------------------------------------------------------

_SAMPLE = 16384  # elements that tell about how large the largest ones are


class TopKCodec(Codec):
    """The ceil(fraction * n) values that are largest in magnitude, at least one, as float32, and their indices.

    Of equal magnitudes the first ones go. A message is all indices (uint32, below n), then all values.
    """

    def __init__(self, fraction: float):
        if not 0.0 < fraction <= 1.0:
            key = "exchange.gossip.compress.topk.fraction"
            raise ConfigError(f"{fraction} is not a part of all elements: above 0, at most 1", key=key)
        super().__init__()
        self._fraction = fraction
        self.gamma = min(1.2 * fraction, 1.0)

    def count(self, size: int) -> int:
        """How many of `size` elements are sent."""
        exact = self._fraction * size
        return min(size, max(1, math.ceil(exact - 1e-12 * exact)))  # 0.07 * 100 is a little more than 7

    def bytes(self, size: int, dtype: DType) -> int:
        return 8 * self.count(size)

    def _encode(self, values: Array, out: Array) -> None:
        size, count = values.size, self.count(values.size)
        assert size < 1 << 32, f"{size} elements have no 32-bit indices"
        magnitudes = self._memory.keep("magnitudes", (size,), values.dtype)
        for piece in _pieces(size):
            np.abs(_tame(values[piece]), out=magnitudes[piece])
        limit = self._nth_largest(magnitudes, count)
        indices, sent = out[: 4 * count].view(np.uint32), out[4 * count :].view(np.float32)
        found = self._find(np.greater, magnitudes, limit, indices)
        self._find(np.equal, magnitudes, limit, indices[found:])
        for piece in _pieces(count):
            sent[piece] = _tame(values[indices[piece]])

    def _decode_add(self, message: Array, estimate: Array) -> None:
        count = self.count(estimate.size)
        indices, sent = message[: 4 * count].view(np.uint32), message[4 * count :].view(np.float32)
        for piece in _pieces(count):
            estimate[indices[piece]] += sent[piece]

    def _nth_largest(self, magnitudes: Array, count: int) -> float:
        """The `count`-th largest, looked for among those only that exceed what a sample makes a safe guess.

        With a fraction of 0.01 `encode` takes 1.9 ns per element then; partitioning all alone takes 5.3, and
        np.argpartition 7.9 (float32, 2,000,000 elements, one core of an AMD EPYC of family 25).
        """
        size = magnitudes.size
        chosen = self._memory.keep("chosen", (size,), magnitudes.dtype)
        guess = -1.0
        if size >= 4 * _SAMPLE:
            sample = magnitudes[:: size // _SAMPLE | 1]  # an odd step does not stay in the columns of a matrix
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
        if found < count:  # the sample deceived
            np.copyto(chosen, magnitudes)
            found = size
        chosen[:found].partition(found - count)
        return float(chosen[found - count])

    def _find(self, compare: np.ufunc, magnitudes: Array, limit: float, indices: Array) -> int:
        """indices <- where magnitudes compare with the limit, the first ones until `indices` is full. How many."""
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
