"""Mutations damage the bytes of a file in the ways in which disks, networks and attackers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

# Numbers that headers do not expect: limits of the integer types, sizes of terabytes, none and all bits.
_NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 1 << 24, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
_MOST = 1 << 20  # bytes that a mutation adds


class Mutation(NamedTuple):
    """A Mutation is one change: its name, where it begins and reaches to (fractions of the length), and a number."""

    name: str
    at: float
    to: float
    number: int

    def apply(self, data: bytes, others: Sequence[bytes]) -> bytes:
        """Return the changed bytes."""
        first = int(self.at * len(data))
        return _KINDS[self.name](data, first, int(self.to * len(data)), self.number, others) if data else data


def _flip(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    return data[:first] + bytes([data[first] ^ (1 << number % 8)]) + data[first + 1 :]


def _write(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    size = 1 << number % 4
    value = _NUMBERS[number // 8 % len(_NUMBERS)] & ((1 << 8 * size) - 1)
    return data[:first] + value.to_bytes(size, ("little", "big")[number // 4 % 2]) + data[first + size :]


def _cut(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    return data[:first]


def _drop(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    return data[:first] + data[max(first, stop) :]


def _repeat(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    block = data[first : max(first + 1, stop)]
    return data[:first] + block * min(2 + number % 50, 1 + _MOST // len(block)) + data[first:]


def _zero(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    size = min(1 + number % 512, len(data) - first)
    return data[:first] + (b"\0" if number % 3 else b"\xff") * size + data[first + size :]


def _splice(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    other = others[number % len(others)] if others else data
    return data[:first] + other[int(len(other) * stop / len(data)) :]


def _move(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    block = data[stop : stop + 1 + number % 64]
    return data[:first] + block + data[first + len(block) :]


def _append(data: bytes, first: int, stop: int, number: int, others: Sequence[bytes]) -> bytes:
    return data + data[first : first + 1 + number % 4096]


_KINDS: dict[str, Callable[[bytes, int, int, int, Sequence[bytes]], bytes]] = {
    "flip": _flip, "write": _write, "cut": _cut, "drop": _drop, "repeat": _repeat, "zero": _zero, "splice": _splice,
    "move": _move, "append": _append,
}  # fmt: skip


_NAMES = ("flip", "write", "flip", "write", *_KINDS)  # the smaller changes get further into a reader


def mutations(random: Random, most: int = 4) -> list[Mutation]:
    """Choose one or several mutations."""
    return [_mutation(random) for _ in range(random.randint(1, most))]


def _mutation(random: Random) -> Mutation:
    # Near the beginning are headers; anywhere else a place is as good as another.
    first, stop = (random.random() ** random.choice((1, 2)) for _ in range(2))
    return Mutation(random.choice(_NAMES), first, stop, random.randrange(1 << 16))


def mutated(data: bytes, changes: Sequence[Mutation], others: Sequence[bytes] = ()) -> bytes:
    """Return the bytes after all changes."""
    for change in changes:
        data = change.apply(data, others)
    return data
