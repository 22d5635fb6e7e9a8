"""Prepares products by device/gpu/cublaslt.py without a GPU, and computes them on the CPU from what cublasLt's own
descriptors then say: it stores matrices column by column, and reads and writes at their addresses."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cupy
import ml_dtypes
import numpy as np
from nvmath import CudaDataType
from nvmath.bindings import cublas, cublasLt

from nettorrent_mpi.device.gpu import cublaslt
from nettorrent_mpi.device.gpu.cublaslt import REPEATS, CublasLt
from nettorrent_mpi.device.gpu.runtime import Matrix
from tests.gpu.host.products import product

TYPES = {
    CudaDataType.CUDA_R_32F: np.dtype(np.float32),
    CudaDataType.CUDA_R_64F: np.dtype(np.float64),
    CudaDataType.CUDA_R_16BF: np.dtype(ml_dtypes.bfloat16),
}
STREAM, TRIAL, SPACE = 77, 78, 1 << 16
FOREIGN = 99  # an algorithm that another version of the library had
PROPOSED, REFUSED, FASTEST = 5, 1, 3  # algorithms: the heuristic's first is not possible, the next one is refused
TIMES = {2: 7, 3: 5, 4: 6}
now = 0  # the time on the stream of trials
trials: list[tuple[int, bool]] = []  # (algorithm, whether it writes to the product's own matrix)
given: set[int] = set()  # memory for results of trials that is not freed
asked: list[dict[str, int]] = []  # the alignments and the workspace of each question to the heuristic


def read(function: Any, what: int, attribute: int, dtype: Any) -> int:
    value, written = np.zeros(1, dtype), np.zeros(1, np.uint64)
    function(what, attribute, value.ctypes.data, value.nbytes, written.ctypes.data)
    assert written[0] == value.nbytes
    return int(value[0])


def description(what: int, name: str) -> int:
    attribute = cublasLt.MatmulDescAttribute[name]
    dtype = cublasLt.get_matmul_desc_attribute_dtype(attribute)
    return read(cublasLt.matmul_desc_get_attribute, what, attribute, dtype)


def matrix(address: int, layout: int) -> np.ndarray:
    """The matrix at an address, of cublasLt's sizes."""

    def value(name: str) -> int:
        attribute = cublasLt.MatrixLayoutAttribute[name]
        dtype = cublasLt.get_matrix_layout_attribute_dtype(attribute)
        return read(cublasLt.matrix_layout_get_attribute, layout, attribute, dtype)

    assert value("ORDER") == cublasLt.Order.COL
    dtype, rows, columns, apart = TYPES[CudaDataType(value("TYPE"))], value("ROWS"), value("COLS"), value("LD")
    assert apart >= rows
    memory = (ctypes.c_uint8 * (((columns - 1) * apart + rows) * dtype.itemsize)).from_address(address)
    return np.ndarray((rows, columns), dtype, memory, strides=(dtype.itemsize, apart * dtype.itemsize))


def heuristic(
    handle: int, what: int, a: int, b: int, c: int, d: int, preference: int, most: int, results: int, count: int
) -> None:
    values = {}
    for name in (
        *(f"MIN_ALIGNMENT_{letter}_BYTES" for letter in "ABCD"),
        "MAX_WORKSPACE_BYTES",
        "REDUCTION_SCHEME_MASK",
    ):
        attribute = cublasLt.MatmulPreferenceAttribute[name]
        dtype = cublasLt.get_matmul_preference_attribute_dtype(attribute)
        values[name] = read(cublasLt.matmul_preference_get_attribute, preference, attribute, dtype)
    asked.append(values)
    dtype = cublasLt.matmul_heuristic_result_dtype
    memory = (ctypes.c_uint8 * (most * dtype.itemsize)).from_address(results)
    found = np.ndarray(most, dtype, memory)
    found["state"][0] = 15  # not possible
    for number in range(1, PROPOSED):
        found["algo"]["data_"][number] = number
    ctypes.c_int32.from_address(count).value = PROPOSED


def matmul(
    handle: int, what: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int, beta: int, c: int, c_layout: int,
    d: int, d_layout: int, algorithm: int, space: int, size: int, stream: int,
) -> None:  # fmt: skip
    global now
    assert (handle, size) == (5, SPACE)
    assert space
    number = ctypes.c_uint64.from_address(algorithm).value
    if stream == TRIAL:
        trials.append((number, d == c))
        if number == REFUSED:
            raise cublasLt.cuBLASLtError(15)
        now += TIMES[number]
    else:
        assert stream == STREAM
        assert number == FASTEST
    result = matrix(d, d_layout)
    wide = result.dtype == np.float64
    compute = cublas.ComputeType(description(what, "COMPUTE_TYPE"))
    kinds = {True: {"COMPUTE_64F"}, False: {"COMPUTE_32F", "COMPUTE_32F_FAST_TF32"}}
    assert compute.name in kinds[wide]
    assert description(what, "SCALE_TYPE") == (CudaDataType.CUDA_R_64F if wide else CudaDataType.CUDA_R_32F)
    number = ctypes.c_double if wide else ctypes.c_float
    assert number.from_address(alpha).value == 1
    first, second, before = matrix(a, a_layout), matrix(b, b_layout), matrix(c, c_layout)
    total = np.zeros(result.shape, np.float64 if wide else np.float32)
    tf32 = compute == cublas.ComputeType.COMPUTE_32F_FAST_TF32
    product(
        first.T if description(what, "TRANSA") else first, second.T if description(what, "TRANSB") else second, total,
        tf32=tf32,
    )  # fmt: skip
    total += number.from_address(beta).value * before.astype(total.dtype)
    epilogue = cublasLt.Epilogue(description(what, "EPILOGUE")).name
    if "BIAS" in epilogue:
        memory = (ctypes.c_uint8 * (len(total) * result.itemsize)).from_address(description(what, "BIAS_POINTER"))
        total += np.ndarray((len(total), 1), result.dtype, memory)
    if "RELU" in epilogue:
        total = np.maximum(total, 0)
    result[...] = total


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def check(
    dtype: np.dtype,
    result: np.dtype,
    turned: tuple[bool, bool],
    accumulate: bool,
    biased: bool,
    relu: bool,
    columns: int,
) -> None:
    """`columns`: the matrices are some columns of wider ones, whose addresses are aligned to little."""
    rng = np.random.default_rng(3)
    tf32 = dtype == np.float32 and relu

    def random(high: int, wide: int) -> np.ndarray:
        numbers = rng.standard_normal((high, wide + columns)).astype(dtype)
        return numbers[:, columns // 2 : wide + columns // 2]

    m, k, n = 13, 7, 5
    a, b = random(*((k, m) if turned[0] else (m, k))), random(*((n, k) if turned[1] else (k, n)))
    bias = random(1, n)[0].astype(result) if biased else None
    out = random(m, n).astype(result) if result != dtype else random(m, n)
    wanted, space = out.copy(), np.empty(SPACE, np.uint8)
    prepared = library.product(Matrix(a, turned[0]), Matrix(b, turned[1]), out, accumulate, bias, relu, tf32, space)
    if accumulate:
        np.testing.assert_array_equal(out, wanted)  # not yet
    assert {own for _, own in trials} <= {not accumulate}
    assert not given
    trials.clear()
    product(a.T if turned[0] else a, b.T if turned[1] else b, wanted, accumulate, bias, relu, tf32)
    prepared.run(SimpleNamespace(ptr=STREAM))
    rounding = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 1e-2}[result.name]
    error = np.abs(out.astype(np.float64) - wanted.astype(np.float64)).max()
    assert error <= rounding * np.abs(wanted.astype(np.float64)).max(), (dtype, turned, accumulate, biased, relu, error)


class Event:
    def record(self, stream: Any) -> None:
        self.time = now

    def synchronize(self) -> None:
        pass


def malloc(size: int) -> int:
    buffers.append(np.empty(size, np.uint8))
    given.add(buffers[-1].ctypes.data)
    return buffers[-1].ctypes.data


buffers: list[np.ndarray] = []
cupy.cuda = SimpleNamespace(
    runtime=SimpleNamespace(deviceSynchronize=lambda: None, malloc=malloc, free=given.remove),
    Stream=lambda non_blocking: SimpleNamespace(ptr=TRIAL),
    Event=Event,
    get_elapsed_time=lambda start, end: end.time - start.time,
)
cublasLt.create = lambda: 5
cublasLt.matmul_algo_get_heuristic = heuristic
cublasLt.matmul = matmul
checked_algorithms: list[int] = []


def check_algorithm(handle: int, what: int, a: int, b: int, c: int, d: int, algorithm: int, result: int) -> None:
    assert handle == 5
    checked_algorithms.append(ctypes.c_uint64.from_address(algorithm).value)
    if checked_algorithms[-1] == FOREIGN:
        raise cublasLt.cuBLASLtError(7)


cublasLt.matmul_algo_check = check_algorithm
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
library = CublasLt(address, "NVIDIA H200")
checked = 0
FLOAT32, _, BFLOAT16 = TYPES.values()
for dtype, result in [*zip(TYPES.values(), TYPES.values(), strict=True), (BFLOAT16, FLOAT32)]:
    for bits in range(32):
        one, two, accumulate, biased, relu = (bool(bits >> place & 1) for place in range(5))
        for columns in (0, 6):
            check(dtype, result, (one, two), accumulate, biased, relu, columns)
            checked += 1
questions = len(asked)
assert {"MAX_WORKSPACE_BYTES": SPACE, "REDUCTION_SCHEME_MASK": 2}.items() <= asked[0].items()
assert {question["MIN_ALIGNMENT_A_BYTES"] for question in asked} >= {2, 4, 8}

# The same sizes get the same algorithm, without another question: a product can then be prepared inside a capture.
a, b = np.zeros((300, 8), np.float32), np.zeros((8, 300), np.float32)
out, space = np.zeros((300, 300), np.float32), np.empty(SPACE, np.uint8)


def aligned(array: np.ndarray) -> np.ndarray:
    memory = np.zeros(array.nbytes + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)


trials.clear()
for _ in range(3):
    library.product(Matrix(aligned(a)), Matrix(aligned(b)), aligned(out), False, None, False, False, space)
assert len(asked) == questions + 1
assert trials == [(REFUSED, True)] + [(number, True) for number in (2, 3, 4) for _ in range(1 + REPEATS)]
assert asked[-1]["MIN_ALIGNMENT_A_BYTES"] == asked[-1]["MIN_ALIGNMENT_D_BYTES"] == 256

# Another process chooses alike, from the file; it asks again where the library cannot use what it finds there.
file = Path(os.environ["XDG_CACHE_HOME"], "nettorrent_mpi", "products-NVIDIA-H200.json")
((subject, kept),) = json.loads(file.read_text()).items()
assert subject.endswith(f"cublasLt {cublasLt.get_version()}, NVIDIA H200")
assert len(kept) == len(asked)
questions = len(asked)
matrices = Matrix(aligned(a)), Matrix(aligned(b)), aligned(out)


def again(gpu: str = "NVIDIA H200") -> int:
    """The algorithm that another process chooses."""
    trials.clear()
    made = CublasLt(address, gpu).product(*matrices, False, None, False, False, space)
    return ctypes.c_uint64.from_address(made._arguments[12]).value


assert again() == FASTEST
assert (len(asked), trials, checked_algorithms[-1]) == (questions, [], FASTEST)
wrong = np.zeros(1, cublasLt.matmul_heuristic_result_dtype)["algo"]
wrong["data_"][0, 0] = FOREIGN
for text in (wrong.tobytes().hex(), "00ff", "no number", ""):
    file.write_text(json.dumps({subject: dict.fromkeys(kept, text)}))
    assert again() == FASTEST
    assert trials
    assert again() == FASTEST
    assert not trials
assert again("NVIDIA A100") == FASTEST
assert trials

# An algorithm that is faster by less than the margin is not chosen before one that was proposed earlier.
TIMES = {2: 5.2, 3: 5, 4: 6}
file.unlink()
assert again() == 2
TIMES = {2: 5.3, 3: 5, 4: 4.9}
file.unlink()
assert again() == 3
TIMES = {2: 5.3, 3: 5.2, 4: 4.9}
file.unlink()
assert again() == 4
file.parent.rename(file.parent.with_name("elsewhere"))
file.parent.write_text("a file where the folder would be")
assert again() == 4
assert trials
assert 0 < cublaslt.MARGIN < 0.06
print(f"{checked} products, {len(asked)} questions")
