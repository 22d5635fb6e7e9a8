"""The vector that is exchanged: elements in the order of the arrays, memories beside their parameters."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.plan.blocks import Span

BLOCK = 1 << 15
SIZES = (5, 0, BLOCK + 3, 7)
DEVICE = make_device()


@pytest.fixture
def layers() -> list[list[np.ndarray]]:
    generator = np.random.default_rng(0)
    return [[generator.random(size) for size in SIZES] for _ in range(3)]


def flat(layer: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(layer)


def test_an_elements_values_are_read_together(layers: list[list[np.ndarray]]) -> None:
    vector = Vector(DEVICE, layers[0], layers[1:])
    assert (vector.size, vector.bytes_per_element) == (sum(SIZES), 3 * 8)
    for where in (Span(0, vector.size), Span(3, 9), Span(BLOCK, BLOCK + 12)):
        out = np.empty(3 * where.size)
        vector.read(where, out)
        np.testing.assert_array_equal(out.reshape(3, -1), [flat(layer)[slice(*where)] for layer in layers])


def test_parameters_move_by_differences_and_memories_towards_what_came(layers: list[list[np.ndarray]]) -> None:
    vector, where = Vector(DEVICE, layers[0], layers[1:]), Span(4, BLOCK + 9)
    before = [flat(layer).copy() for layer in layers]
    towards, origin = np.random.default_rng(1).random((2, 3 * where.size))
    vector.move(where, 0.75, towards, origin)
    expected = before[0].copy()
    expected[slice(*where)] += 0.75 * (towards[: where.size] - origin[: where.size])
    np.testing.assert_allclose(flat(layers[0]), expected, rtol=1e-14)
    for layer in (1, 2):
        np.testing.assert_array_equal(flat(layers[layer]), before[layer])
    vector.mix(where, 0.75, towards)
    np.testing.assert_allclose(flat(layers[0]), expected, rtol=1e-14)
    for layer in (1, 2):
        expected = before[layer].copy()
        expected[slice(*where)] *= 0.25
        expected[slice(*where)] += 0.75 * towards.reshape(3, -1)[layer]
        np.testing.assert_allclose(flat(layers[layer]), expected, rtol=1e-14)


def test_without_memories_there_is_nothing_to_mix(layers: list[list[np.ndarray]]) -> None:
    vector = Vector(DEVICE, layers[0])
    before = flat(layers[0]).copy()
    vector.mix(Span(0, vector.size), 1.0, np.zeros(vector.size))
    np.testing.assert_array_equal(flat(layers[0]), before)


def test_what_is_withheld_belongs_to_the_vector_until_it_is_released(layers: list[list[np.ndarray]]) -> None:
    vector = Vector(DEVICE, layers[0], layers[1:2])
    vector.withhold(layers[2])
    parameters, withheld = flat(layers[0]).copy(), flat(layers[2]).copy()
    whole, where = Span(0, vector.size), Span(4, BLOCK + 9)
    assert vector.bytes_per_element == 2 * 8

    def read() -> np.ndarray:
        vector.read(whole, out := np.empty(2 * vector.size))
        np.testing.assert_array_equal(out[vector.size :], flat(layers[1]))
        return out[: vector.size]

    def difference() -> np.ndarray:
        vector.difference(where, np.ones(where.size), out := np.empty(where.size))
        return out

    np.testing.assert_array_equal(read(), parameters + withheld)
    np.testing.assert_allclose(difference(), (parameters + withheld)[slice(*where)] - 1, rtol=0, atol=1e-15)
    vector.release(where)
    np.testing.assert_array_equal(read(), parameters + withheld)
    np.testing.assert_allclose(difference(), (parameters + withheld)[slice(*where)] - 1, rtol=0, atol=1e-15)
    parameters[slice(*where)] += withheld[slice(*where)]
    withheld[slice(*where)] = 0
    np.testing.assert_array_equal(flat(layers[0]), parameters)
    np.testing.assert_array_equal(flat(layers[2]), withheld)
