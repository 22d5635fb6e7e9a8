"""Messages that a GPU encodes are the CPU's, bit for bit, and so is what it decodes."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.codecs import GpuCodecOperations
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.exchange_specs import Float16, Int8, Sign, TopK
from tests.gpu.compared import CPU
from tests.gpu.host import build
from tests.gpu.kernel_cases import OTHERS, Bench, planted

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

FORMATS = {
    "float16": MessageFormat(Float16()),
    "int8": MessageFormat(Int8()),
    "sign": MessageFormat(Sign()),
    "topk": MessageFormat(TopK(0.01)),
    "topk of many": MessageFormat(TopK(0.7)),
    "topk of all": MessageFormat(TopK(1.0)),
}
SIZES = [1, 7, 9, 127, 128, 130, 1023, 1025, 5003]
formats = pytest.mark.parametrize("form", FORMATS)
typed = pytest.mark.parametrize("name", ["float32", OTHERS[0]])


def cases(name: str, size: int) -> dict[str, Array]:
    rng = np.random.default_rng(size)
    plain = rng.standard_normal(size)
    small = np.array([0.0, -0.0, 1e-9, -6e-8, 2.9e-8, 6e-5, -6.2e-5, 1e-38, -1e-42, 1e-45, 65504, 65520, -7e4, 1.0])
    odd = plain * 10.0 ** rng.integers(-12, 6, size)
    wild = plain.copy()
    some = wild[:: max(size // 9, 1)]
    some[:] = np.resize([np.nan, np.inf, -np.inf, 3e38, -3.3e35, 1e300, -0.0], some.size)
    with np.errstate(over="ignore"):
        return {
            key: value.astype(name)
            for key, value in {
                "plain": plain,
                "zeros": np.zeros(size),
                "ties": rng.integers(-2, 3, size).astype(float),
                "negative zeros": -np.zeros(size),
                "special": np.resize(small, size),
                "odd": odd,
                "not finite": wild,
            }.items()
        }


def message_of(form: MessageFormat, values: Array) -> Array:
    return np.full(form.bytes(values.size), 170, np.uint8)


@formats
@typed
@pytest.mark.parametrize("size", SIZES)
def test_messages(form: str, name: str, size: int) -> None:
    bench, kind = Bench(GpuCodecOperations, seed=size % 5), FORMATS[form].kind
    for case, values in cases(name, size).items():
        wanted = message_of(FORMATS[form], values)
        CPU.encode(kind, values, wanted)
        given, message = bench.up(values), bench.up(message_of(FORMATS[form], values))
        bench.ops.encode(kind, given, message)
        np.testing.assert_array_equal(bench.down(message), wanted, err_msg=case)
        np.testing.assert_array_equal(bench.down(given), values)
        start = np.random.default_rng(1).standard_normal(size).astype(name)
        estimate, expected = bench.up(start), start.copy()
        bench.ops.decode_add(kind, message, estimate)
        CPU.decode_add(kind, wanted, expected)
        np.testing.assert_array_equal(bench.down(estimate), expected, err_msg=case)


@formats
def test_nothing_is_encoded_into_nothing(form: str) -> None:
    bench = Bench(GpuCodecOperations)
    nothing, message = bench.up(np.zeros(0, "f4")), bench.up(np.zeros(0, np.uint8))
    bench.ops.encode(FORMATS[form].kind, nothing, message)
    bench.ops.decode_add(FORMATS[form].kind, message, nothing)
    bench.device.synchronize()


@typed
def test_every_float16_is_decoded(name: str) -> None:
    halves = np.arange(1 << 16).astype(np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    bench, estimate = Bench(GpuCodecOperations), np.zeros(halves.size, name)
    out = bench.up(estimate)
    bench.ops.decode_add("float16", bench.up(halves.view(np.uint8)), out)
    np.testing.assert_array_equal(bench.down(out), halves.view(np.float16).astype(name))


def test_halfway_numbers_go_to_the_even_float16() -> None:
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float64)
    after = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    values = ((halves + after) / 2).astype(np.float32)
    bench = Bench(GpuCodecOperations)
    message = bench.up(np.zeros(2 * values.size, np.uint8))
    bench.ops.encode("float16", bench.up(-values), message)
    np.testing.assert_array_equal(bench.down(message).view(np.float16), (-values).astype(np.float16))


def test_many_chunks_and_ties_over_all_of_them() -> None:
    values = np.random.default_rng(1).integers(-40, 41, 300_000).astype(np.float32)
    wanted = np.zeros(8 * 10_000, np.uint8)
    CPU.encode("topk", values, wanted)
    for seed in (0, 3):
        bench = Bench(GpuCodecOperations, seed)
        for _ in range(2):  # counters are left as they were found
            message = bench.up(np.zeros_like(wanted))
            bench.ops.encode("topk", bench.up(values), message)
            np.testing.assert_array_equal(bench.down(message), wanted)


def test_a_captured_encoding_can_be_repeated() -> None:
    """What the selection needs of one message is found and left in the device's memory."""
    bench, rng = Bench(GpuCodecOperations, seed=1), np.random.default_rng(1)
    given, message, wanted = bench.up(np.zeros(9000, "f4")), bench.up(np.zeros(8 * 700, "u1")), np.zeros(8 * 700, "u1")
    encode = bench.device.capture(lambda: bench.ops.encode("topk", given, message))
    for _ in range(5):
        values = rng.integers(-rng.integers(2, 90), 90, 9000).astype(np.float32)
        bench.device.upload(given, values)
        encode()
        CPU.encode("topk", values, wanted)
        np.testing.assert_array_equal(bench.down(message), wanted)


SYNC = "        __syncthreads();\n"
FAULTS = {
    "int8: a barrier left out": ("most[threadIdx.x] = scale;\n" + SYNC, "most[threadIdx.x] = scale;\n"),
    "int8: memory used again too early": ("        __syncthreads();  // most is written again\n", ""),
    "sign: the last of the largest": ("where[other] < where[k]", "where[other] > where[k]"),
    "sign: another order": ("(best[0] + best[1]) + (best[2] + best[3])", "best[0] + best[1] + best[2] + best[3]"),
    "sign: memory used again too early": ("        __syncthreads();  // the arrays are written again\n", ""),
    "topk: a barrier left out": ("sums[k - d] : 0;\n" + SYNC, "sums[k - d] : 0;\n"),
    "topk: counts that stay": ("    counts[k] = 0;\n", ""),
    "topk: the wrong ones of those that are equal": ("equal = (i64)chunks", "equal = 1 + (i64)chunks"),
    "topk: what comes before is counted twice": ("u32 before = sums[k] - v;", "u32 before = sums[k];"),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_in_codecs_are_found(fault: str | None) -> None:
    text = planted("Messages", *FAULTS[fault]) if fault else None
    kind = fault.split(":")[0] if fault else "topk"
    rng = np.random.default_rng(1)
    values = rng.integers(-9, 10, 20_001) if kind == "topk" else rng.standard_normal(20_001)
    values = values.astype(np.float32)
    if kind == "sign":
        values[3::7] = values[5::7][: values[3::7].size].max()
    wanted = np.zeros({"int8": 80 + values.size, "sign": 9 * 157 + 2501, "topk": 8 * 5000}[kind], np.uint8)
    CPU.encode(kind, values, wanted)
    found = []
    for seed in range(4):
        bench = Bench(GpuCodecOperations, seed, text)
        given, message = bench.up(values), bench.up(np.zeros_like(wanted))
        for _ in range(2):
            if kind == "int8":  # so few blocks that each encodes several
                parts = message[:80].view(np.float32), message[80:]
                bench.ops.launch("encode_int8", np.float32, 3, 256, given, *parts, values.size, 20)
            elif kind == "sign":
                parts = message[: 4 * 157], message[4 * 157 : 8 * 157]
                numbers = tuple(part.view(np.float32) for part in parts)
                rest = message[8 * 157 : 9 * 157], message[9 * 157 :]
                bench.ops.launch("encode_sign", np.float32, 5, 128, given, *numbers, *rest, values.size, 157)
            else:
                bench.ops.encode(kind, given, message)
        found.append(np.array_equal(bench.down(message), wanted))
    assert all(found) == (fault is None)
