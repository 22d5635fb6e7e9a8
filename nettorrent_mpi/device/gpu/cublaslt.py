"""Matrix products by cublasLt, on addresses (https://docs.nvidia.com/cuda/cublas/#cublasltmatmul).

cublasLt's matrices stand in memory column by column, ours row by row: what is (m, n) here is its transpose there. So it
computes out' = b' a'. The same sizes get the same algorithm on all GPUs of this name with this version of the library:
what a trial has chosen is kept in a file, products-GPU.json (see choices), and of algorithms that are about as fast it
is the first that the library proposes. Parts of a sum are added in the type of the computation in a fixed order. So no
result depends on chance. (Its GELU is the approximation by tanh, which no layer has.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nettorrent_mpi import __version__
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.choices import choices_folder, open_choices, read_choices, write_choices
from nettorrent_mpi.device.gpu.runtime import Matrix

CANDIDATES = 8  # algorithms that the library's heuristic proposes and a trial compares
REPEATS = 5  # of each, timed together
MARGIN = 0.05  # of the time, by which an algorithm has to be faster than those proposed before it
ALIGNMENT = 256  # bytes; no algorithm wants more


class LtProduct:
    """A Product (see runtime): the arguments of cublasLtMatmul but the stream. `kept` is what they point to."""

    def __init__(self, arguments: tuple[int, ...], *kept: Any):
        from nvmath.bindings import cublasLt

        self._matmul, self._arguments, self._kept = cublasLt.matmul, arguments, kept

    def run(self, stream: Any) -> None:
        self._matmul(*self._arguments, stream.ptr)


class CublasLt:
    """CublasLt prepares products on the present GPU, of the name `gpu`. `address` gives an array's address."""

    def __init__(self, address: Callable[[Array], int], gpu: str):
        from nvmath.bindings import cublasLt

        self._address, self._file = address, f"products-{'-'.join(gpu.split())}.json"
        self._handle = cublasLt.create()
        self._chosen: dict[tuple[Any, ...], Array] = {}
        self._subject = f"{__version__}, cublasLt {cublasLt.get_version()}, {gpu}"
        self._kept: dict[str, str] = {}

    def product(
        self,
        a: Matrix,
        b: Matrix,
        out: Array,
        accumulate: bool,
        bias: Array | None,
        relu: bool,
        tf32: bool,
        space: Array,
    ) -> LtProduct:
        """Prepare out <- (out +) a @ b, then plus the bias, then max(., 0), with `space` to work in."""
        first, second, third = (self._address(array) for array in (b.array, a.array, out))
        tf32 = tf32 and a.array.dtype == np.float32
        description = describe(b.turned, a.turned, out, self._address(bias) if bias is not None else 0, relu, tf32)
        layouts = [layout(array) for array in (b.array, a.array, out)]
        factors = np.array([1.0, accumulate], np.float64 if out.dtype == np.float64 else np.float32)
        one, zero_or_one = (factors.ctypes.data + i * factors.itemsize for i in (0, 1))

        def arguments(algorithm: Array, result: int) -> tuple[int, ...]:
            return (
                *(self._handle, description, one, first, layouts[0], second, layouts[1]),
                *(zero_or_one, third, layouts[2], result, layouts[2]),
                *(algorithm.ctypes.data, self._address(space), space.nbytes),
            )

        alignments = [min(place & -place, ALIGNMENT) for place in (first, second, third)]
        sizes = (*map(_sizes, (b.array, a.array, out)), *alignments)
        key = sizes, a.turned, b.turned, accumulate, bias is None, relu, tf32, space.nbytes

        def trial() -> Array:
            found = candidates(self._handle, description, layouts, alignments, space.nbytes)
            reach = out.itemsize * (_sizes(out)[0] * _sizes(out)[2])
            return fastest(found, arguments, third, reach if accumulate else 0)

        if key not in self._chosen:
            self._chosen[key] = self._choose(str(key), (description, *layouts, layouts[2]), trial)
        algorithm = self._chosen[key]
        return LtProduct(arguments(algorithm, third), factors, algorithm, a, b, out, bias, space)

    def _choose(self, what: str, about: tuple[int, ...], trial: Callable[[], Array]) -> Array:
        """Return the algorithm that is kept for this, or else that of a trial, and keep it."""
        import cupy

        if what not in self._kept:
            # Before others have to wait for the file: the GPU may wait for theirs.
            cupy.cuda.runtime.deviceSynchronize()
        with open_choices(self._path) as file:
            self._kept.update(read_choices(file).get(self._subject, {}))
            kept = usable(self._handle, about, self._kept.get(what, ""))
            if kept is None:
                kept = trial()
                self._kept[what] = kept.tobytes().hex()
                write_choices(file, self._subject, self._kept)
        return kept

    def _path(self) -> Path:
        return choices_folder() / self._file


def describe(turn_first: bool, turn_second: bool, out: Array, bias: int, relu: bool, tf32: bool) -> int:
    """Return cublasLt's description of a product: the types of computation, and what follows the sum."""
    from nvmath.bindings import cublas, cublasLt

    compute = cublas.ComputeType.COMPUTE_32F
    if out.dtype == np.float64:
        compute = cublas.ComputeType.COMPUTE_64F
    elif tf32:
        compute = cublas.ComputeType.COMPUTE_32F_FAST_TF32
    description: int = cublasLt.matmul_desc_create(
        compute, _type(np.float64 if out.dtype == np.float64 else np.float32)
    )
    names, after = cublasLt.MatmulDescAttribute, cublasLt.Epilogue
    _set(cublasLt.matmul_desc_set_attribute, description, names.TRANSA, np.int32(turn_first))
    _set(cublasLt.matmul_desc_set_attribute, description, names.TRANSB, np.int32(turn_second))
    epilogue = (after.RELU_BIAS if relu else after.BIAS) if bias else (after.RELU if relu else after.DEFAULT)
    _set(cublasLt.matmul_desc_set_attribute, description, names.EPILOGUE, np.uint32(epilogue))
    if bias:
        _set(cublasLt.matmul_desc_set_attribute, description, names.BIAS_POINTER, np.uint64(bias))
    return description


def layout(array: Array) -> int:
    """Return cublasLt's layout of a matrix."""
    from nvmath.bindings import cublasLt

    high, wide, apart, name = _sizes(array)
    made: int = cublasLt.matrix_layout_create(_type(name), wide, high, apart)
    return made


def usable(handle: int, about: tuple[int, ...], text: str) -> Array | None:
    """Return the algorithm of a file, unless the library cannot use it for the product of these descriptions."""
    from nvmath.bindings import cublasLt

    result = np.zeros(1, cublasLt.matmul_heuristic_result_dtype)
    try:
        algorithm = np.frombuffer(bytes.fromhex(text), result["algo"].dtype).copy()
        if algorithm.size != 1:
            return None
        cublasLt.matmul_algo_check(handle, *about, algorithm.ctypes.data, result.ctypes.data)
    except (ValueError, cublasLt.cuBLASLtError):
        return None
    return algorithm


def candidates(handle: int, description: int, layouts: list[int], alignments: list[int], space: int) -> list[Array]:
    """Return the algorithms that the heuristic proposes, the best first. It fails inside a capture."""
    from nvmath.bindings import cublasLt

    preference, names = cublasLt.matmul_preference_create(), cublasLt.MatmulPreferenceAttribute
    wanted = {
        names.MAX_WORKSPACE_BYTES: np.uint64(space),
        names.REDUCTION_SCHEME_MASK: np.uint32(cublasLt.ReductionScheme.COMPUTE_TYPE),
        names.MIN_ALIGNMENT_A_BYTES: np.uint32(alignments[0]),
        names.MIN_ALIGNMENT_B_BYTES: np.uint32(alignments[1]),
        names.MIN_ALIGNMENT_C_BYTES: np.uint32(alignments[2]),
        names.MIN_ALIGNMENT_D_BYTES: np.uint32(alignments[2]),
    }
    for attribute, value in wanted.items():
        _set(cublasLt.matmul_preference_set_attribute, preference, attribute, value)
    results, count = np.zeros(CANDIDATES, cublasLt.matmul_heuristic_result_dtype), np.zeros(1, np.int32)
    places = results.ctypes.data, count.ctypes.data
    try:
        cublasLt.matmul_algo_get_heuristic(handle, description, *layouts, layouts[2], preference, CANDIDATES, *places)
    finally:
        cublasLt.matmul_preference_destroy(preference)
    found = [np.ascontiguousarray(result["algo"]) for result in results[: int(count[0])] if result["state"] == 0]
    assert found, "cublasLt has no algorithm for this product"
    return found


def fastest(found: list[Array], arguments: Callable[[Array, int], tuple[int, ...]], out: int, kept: int) -> Array:
    """Return the first algorithm that no other one beats by MARGIN. With `kept` bytes of `out` to keep it writes
    elsewhere."""
    import cupy
    from nvmath.bindings import cublasLt

    cuda = cupy.cuda
    cuda.runtime.deviceSynchronize()  # nothing reads what `out` held before
    stream, start, end = cuda.Stream(non_blocking=True), cuda.Event(), cuda.Event()
    result = cuda.runtime.malloc(kept) if kept else out
    times = []
    for algorithm in found:
        product = LtProduct(arguments(algorithm, result))
        try:
            product.run(stream)
        except cublasLt.cuBLASLtError:  # the heuristic proposed what the library refuses
            times.append(np.inf)
            continue
        start.record(stream)
        for _ in range(REPEATS):
            product.run(stream)
        end.record(stream)
        end.synchronize()
        times.append(cuda.get_elapsed_time(start, end))
    if kept:
        cuda.runtime.free(result)
    assert min(times) < np.inf, "cublasLt refuses all its algorithms for this product"
    return next(algorithm for algorithm, time in zip(found, times, strict=True) if time * (1 - MARGIN) <= min(times))


def _sizes(array: Array) -> tuple[int, int, int, str]:
    """Return (rows, columns, elements from row to row, type)."""
    high, wide = array.shape
    assert wide == 1 or array.strides[1] == array.itemsize, f"the columns of {array.shape} do not lie side by side"
    return high, wide, max(array.strides[0] // array.itemsize, wide) if high > 1 else wide, array.dtype.name


def _type(dtype: Any) -> int:
    from nvmath import CudaDataType

    names = {"float32": CudaDataType.CUDA_R_32F, "float64": CudaDataType.CUDA_R_64F}
    return int(names.get(np.dtype(dtype).name, CudaDataType.CUDA_R_16BF))


def _set(function: Callable[..., None], what: int, attribute: int, value: Any) -> None:
    held = np.array(value)
    function(what, attribute, held.ctypes.data, held.nbytes)
