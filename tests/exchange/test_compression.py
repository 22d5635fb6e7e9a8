"""Codecs: what messages say, error feedback, and gossip that goes by estimates."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.codecs import PIECE
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.exchange_specs import Float16, Int8, Sign, TopK
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.specs import Spec


class Codec(MessageFormat):
    """A format of messages, with a device of its own that encodes and decodes them."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self._ops = make_device("cpu", "numpy").ops

    def encode(self, values: Array, message: Array) -> None:
        self._ops.encode(self.kind, values, message)

    def decode_add(self, message: Array, estimate: Array) -> None:
        self._ops.decode_add(self.kind, message, estimate)


CODECS: dict[str, Callable[[], Codec]] = {
    "float16": lambda: Codec(Float16()),
    "int8": lambda: Codec(Int8()),
    "sign": lambda: Codec(Sign()),
    "topk": lambda: Codec(TopK(0.25)),
}
SIZES = [0, 1, 2, 7, 8, 9, 127, 128, 129, 1000, 1024, 1031, PIECE, PIECE + 1, 2 * PIECE + 1025]

every_codec = pytest.mark.parametrize("make", CODECS.values(), ids=CODECS.keys())
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """The caller need not silence NumPy: overflow and nan are seen to inside."""
    with np.errstate(all="raise", under="ignore"):
        yield


def message_of(codec: Codec, values: Array) -> Array:
    message = np.full(codec.bytes(values.size), 0xAA, np.uint8)
    codec.encode(values, message)
    return message


def said(codec: Codec, values: Array) -> Array:
    """C(values)."""
    result = np.zeros_like(values)
    codec.decode_add(message_of(codec, values), result)
    return result


def random(size: int, dtype: Any = np.float64, seed: int = 0, outliers: bool = False) -> Array:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(size)
    return (values * np.exp(2.0 * generator.standard_normal(size)) if outliers else values).astype(dtype)


# -- messages ---------------------------------------------------------------------------------------------------------


@every_codec
@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_both_ends_stay_equal(make: Callable[[], Codec], dtype: Any, size: int) -> None:
    """The receiver has a codec of its own, which has seen other messages before."""
    sender, receiver = make(), make()
    said(receiver, random(3000, dtype))
    here = random(size, dtype, seed=1)
    there = here.copy()
    for round_ in range(4):
        x = random(size, dtype, seed=2 + round_, outliers=True)
        difference = x - here
        kept = difference.copy()
        message = np.full(sender.bytes(size), 0x55 * round_, np.uint8)
        sender.encode(difference, message)
        assert np.array_equal(difference, kept)
        assert np.array_equal(message, message_of(make(), difference)), "depends on what was before"
        sender.decode_add(message, here)
        receiver.decode_add(message, there)
        assert here.tobytes() == there.tobytes()
    assert here.dtype == dtype


@pytest.mark.parametrize(
    ("make", "size", "expected"),
    [
        (lambda: Codec(Float16()), 1000, 2000),
        (lambda: Codec(Int8()), 1024, 1028),
        (lambda: Codec(Int8()), 1025, 1033),
        (lambda: Codec(Sign()), 128, 25),
        (lambda: Codec(Sign()), 137, 36),
        (lambda: Codec(TopK(0.01)), 1000, 80),
        (lambda: Codec(TopK(0.01)), 1001, 88),
        (lambda: Codec(TopK(0.07)), 100, 56),
        (lambda: Codec(TopK(1e-9)), 1000, 8),
        (lambda: Codec(TopK(1.0)), 5, 40),
    ],
)
def test_length_of_messages(make: Callable[[], Codec], size: int, expected: int) -> None:
    assert make().bytes(size) == expected
    assert make().bytes(0) == 0


def test_float16_rounds_like_numpy() -> None:
    """All numbers that float16 has, what is halfway between them, and the float32 numbers next to both."""
    exact = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact = np.sort(exact[np.isfinite(exact)].astype(np.float32))
    halfway = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    both = np.concatenate([exact, halfway])
    for values in (both, np.nextafter(both, np.float32(math.inf)), np.nextafter(both, np.float32(-math.inf))):
        with np.errstate(over="ignore"):
            expected = np.clip(values, -65504, 65504).astype(np.float16)
        codec = Codec(Float16())
        assert np.array_equal(message_of(codec, values).view(np.uint16), expected.view(np.uint16))
        assert np.array_equal(said(codec, values), expected.astype(np.float32))


@every_dtype
def test_int8_by_hand(dtype: Any) -> None:
    values = np.zeros(1026, dtype)
    values[[0, 3, 4, 5, 1024, 1025]] = [127.0, -1.0, 0.6, -2.4, -12.7, 0.1]
    message = message_of(Codec(Int8()), values)
    assert message[:8].view(np.float32) == pytest.approx([1.0, 0.1])
    levels = message[8:].view(np.int8)
    assert levels[[0, 3, 4, 5, 1024, 1025]].tolist() == [127, -1, 1, -2, -127, 1]
    assert said(Codec(Int8()), values)[[0, 3, 4, 5, 1024, 1025, 1]] == pytest.approx([127, -1, 1, -2, -12.7, 0.1, 0])


@every_dtype
def test_sign_by_hand(dtype: Any) -> None:
    values = np.zeros(131, dtype)
    values[[5, 7, 9]] = [-254.0, 127.0, -381.0]
    values[[128, 129, 130]] = [-1.0, 3.0, -5.0]
    result = said(Codec(Sign()), values)
    mean = (254 + 127) / 127
    assert result[[5, 7, 9, 0, 127]] == pytest.approx([-mean, mean, -381, mean, mean])
    assert result[[128, 129, 130]] == pytest.approx([-2, 2, -5])
    assert said(Codec(Sign()), values[:1])[0] == 0
    assert said(Codec(Sign()), values[9:10])[0] == -381


@every_dtype
def test_topk_takes_the_largest(dtype: Any) -> None:
    values = np.array([1, -5, 0.5, 3, -3, 3, 0, 4], dtype)
    assert said(Codec(TopK(0.5)), values).tolist() == [0, -5, 0, 3, -3, 0, 0, 4]  # of the threes the first two
    assert said(Codec(TopK(1e-6)), values).tolist() == [0, -5, 0, 0, 0, 0, 0, 0]
    assert said(Codec(TopK(1.0)), values).tolist() == values.tolist()
    assert said(Codec(TopK(0.5)), np.zeros(8, dtype)).tolist() == [0] * 8


@pytest.mark.parametrize("fraction", [1e-5, 0.01, 0.2, 0.9])
@pytest.mark.parametrize("case", ["normal", "ties", "sample too high", "sample too low", "mostly zero"])
def test_topk_of_many(fraction: float, case: str) -> None:
    """So many that the limit is guessed from a sample, which may deceive."""
    size = 100_000
    values = random(size, np.float32, outliers=True)
    if case == "ties":
        np.round(values, 1, out=values)
    elif case == "sample too high":
        values[::7] *= 1e6  # every 7th is looked at
    elif case == "sample too low":
        values[::7] = 0
    elif case == "mostly zero":
        values[np.arange(size) % 1000 > 3] = 0
    count = Codec(TopK(fraction)).count(size)
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    expected = np.zeros_like(values)
    expected[order] = values[order]
    message = message_of(Codec(TopK(fraction)), values)
    assert np.array_equal(np.sort(message[: 4 * count].view(np.uint32)), np.sort(order))
    assert np.array_equal(said(Codec(TopK(fraction)), values), expected)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_impossible_fractions_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError) as caught:
        MessageFormat(TopK(fraction))
    assert caught.value.key == "exchange.gossip.compress.topk.fraction"
    assert str(fraction) in str(caught.value)


# -- errors -----------------------------------------------------------------------------------------------------------


def left(codec: Codec, values: Array) -> Array:
    return values - said(codec, values)


@every_codec
@every_dtype
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("size", [1, 100, 5000])
def test_contraction(make: Callable[[], Codec], dtype: Any, outliers: bool, size: int) -> None:
    """||x - C(x)||^2 <= (1 - delta) ||x||^2 with the delta that each codec promises."""
    codec, x = make(), random(size, dtype, outliers=outliers)
    error, largest = left(codec, x), np.abs(x).max()
    part = float(error @ error) / float(x @ x)
    rounding = 1 + 1e-6
    if codec.kind == "float16":
        assert (np.abs(error) <= np.maximum(2.0**-11 * np.abs(x), 2.0**-25) * rounding).all()
    elif codec.kind == "int8":
        assert (np.abs(error) <= np.minimum(np.abs(x), largest / 254) * rounding + 1e-6 * np.abs(x)).all()
    elif codec.kind == "sign":
        assert part <= 1 - 2 / (math.sqrt(min(size, 128)) + 1) + 1e-6
        assert size < 5000 or outliers or part == pytest.approx(1 - 2 / math.pi, abs=0.06)
    else:
        assert codec.kind == "topk"
        assert part <= 1 - codec.count(size) / size + 1e-6


@given(arrays(np.float32, st.integers(1, 300), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)))
@settings(max_examples=100, deadline=None)
def test_the_worst_of_sign(x: Array) -> None:
    error = left(Codec(Sign()), x).astype(np.float64)
    square = float(np.sum(x.astype(np.float64) ** 2))
    assert error @ error <= (1 - 2 / (math.sqrt(128) + 1)) * square * (1 + 1e-5) + 1e-60


@every_codec
@every_dtype
def test_error_feedback_recovers_what_one_message_does_not(make: Callable[[], Codec], dtype: Any) -> None:
    codec, x = make(), random(3001, dtype, outliers=True)
    scale = float(np.linalg.norm(x))
    estimate = np.zeros_like(x)
    for _ in range(250):
        codec.decode_add(message_of(codec, x - estimate), estimate)
    assert np.linalg.norm(x - estimate) < 1e-6 * scale
    average = np.zeros_like(x)
    for _ in range(250):
        codec.decode_add(message_of(codec, x), average)
    assert np.linalg.norm(x - average / 250) > 1e-5 * scale


@every_codec
@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_zero(make: Callable[[], Codec], dtype: Any, bad: float) -> None:
    places = [0, 700, 1500, 2999]
    x = random(3000, dtype)
    x[places] = 0
    expected = message_of(make(), x)
    x[places] = bad
    assert np.array_equal(message_of(make(), x), expected)
    x[...] = bad
    assert not said(make(), x).any()


@every_codec
@every_dtype
def test_extreme_values(make: Callable[[], Codec], dtype: Any) -> None:
    """The largest and the smallest numbers neither become infinite nor nan; more messages bring what one cannot say."""
    limits = np.finfo(dtype)
    x = np.tile(np.array([limits.max, -limits.max, limits.tiny, -limits.smallest_subnormal, 1.0], dtype), 500)
    result = said(make(), x)
    assert np.isfinite(result).all()
    assert result[0] > 6e4
    assert result[1] < -6e4
    assert np.abs(left(make(), x)).max() <= limits.max
    assert np.abs(said(make(), x[2:4].copy())).max() <= 1e-36


@every_codec
def test_large_values_arrive_in_the_end(make: Callable[[], Codec]) -> None:
    codec, x = make(), np.array([1e6, -3e5, 20.0])
    estimate = np.zeros_like(x)
    for _ in range(100):
        codec.decode_add(message_of(codec, x - estimate), estimate)
    assert estimate == pytest.approx(x)


# -- gossip -----------------------------------------------------------------------------------------------------------


class Gossip:
    """Replicas of one vector; both ends of every edge of the pairing hold an estimate of what its source has."""

    def __init__(self, kind: str, replicas: int, make: Callable[[], Codec], dtype: Any, size: int = 300):
        self.pairing, self.codec = make_pairing(kind, replicas, 0), make()
        self.first = random(size, dtype, seed=1)
        noise = random(replicas * size, dtype, seed=2).reshape(replicas, size)
        self.x = self.first + noise * np.exp(random(size, dtype, seed=3))
        self.ends: dict[tuple[int, int], tuple[Array, Array]] = {}

    def round(self, number: int, gamma: float) -> None:
        moves = np.zeros_like(self.x)
        for a, b, weight in self.pairing.edges(number):
            at_a, at_b = self.ends.setdefault((a, b), (self.first.copy(), self.first.copy()))
            message = message_of(self.codec, self.x[a] - at_a)
            self.codec.decode_add(message, at_a)
            self.codec.decode_add(message, at_b)
            assert at_a.tobytes() == at_b.tobytes()
            moves[b] += gamma * weight * at_b
            moves[a] -= gamma * weight * at_a
        self.x += moves

    def apart(self) -> float:
        return float(np.linalg.norm(self.x - self.x.mean(axis=0)))


@every_codec
@pytest.mark.parametrize(("kind", "replicas"), [("ring", 5), ("hypercube", 4), ("exponential", 6)])
def test_gossip_settles_on_the_average(make: Callable[[], Codec], kind: str, replicas: int) -> None:
    gossip = Gossip(kind, replicas, make, np.float64)
    average, apart = gossip.x.mean(axis=0), [gossip.apart()]
    for number in range(160):
        gossip.round(number, gossip.codec.gamma)
        if number % 40 == 39:
            assert np.abs(gossip.x.mean(axis=0) - average).max() < 1e-12
            apart.append(gossip.apart())
    assert apart[-1] < 1e-4 * apart[0], apart
    assert all(later < 0.4 * earlier or later < 1e-6 * apart[0] for earlier, later in pairwise(apart)), apart
    assert np.abs(gossip.x - average).max() < 1e-2


@every_codec
def test_gossip_in_float32(make: Callable[[], Codec]) -> None:
    gossip = Gossip("exponential", 6, make, np.float32)
    average, apart = gossip.x.mean(axis=0, dtype=np.float64), gossip.apart()
    for number in range(80):
        gossip.round(number, gossip.codec.gamma)
    assert np.abs(gossip.x.mean(axis=0, dtype=np.float64) - average).max() < 1e-4
    assert gossip.apart() < 0.05 * apart


def test_too_long_steps_swing_up() -> None:
    """Why topk's gamma follows its fraction."""
    gossip = Gossip("complete", 5, lambda: Codec(TopK(0.05)), np.float64, size=100)
    apart = gossip.apart()
    for number in range(100):
        gossip.round(number, 1.0)
    assert gossip.apart() > apart


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [*list(CODECS.values())[:3], lambda: Codec(TopK(0.01)), lambda: Codec(TopK(0.6))],
    ids=[*list(CODECS)[:3], "1%", "60%"],
)
def test_the_steady_state_allocates_nothing_large(make: Callable[[], Codec]) -> None:
    codec, x = make(), random(1_000_003, np.float32)
    message, estimate = np.empty(codec.bytes(x.size), np.uint8), np.zeros_like(x)
    codec.encode(x, message)
    codec.decode_add(message, estimate)
    tracemalloc.start()
    for _ in range(2):
        codec.encode(x, message)
        codec.decode_add(message, estimate)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 20_000
    assert peak < 800_000
