"""Which GPUs this process sees, and which of them a rank takes.

The driver is asked by ctypes: that takes milliseconds, creates no context on any GPU, and tells a missing driver from a
missing GPU. CUDA_VISIBLE_DEVICES, Slurm's control groups and a part of a GPU (MIG) are the driver's to respect.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

LIBRARY = "libcuda.so.1"  # of the driver, not of CUDA's toolkit
DRIVERS = {12: "525", 13: "580"}  # the oldest driver of each CUDA (https://docs.nvidia.com/deploy/cuda-compatibility/)
_LIST = "CUDA_VISIBLE_DEVICES"
_DONE, _NO_DEVICE = 0, 100  # CUDA_SUCCESS, CUDA_ERROR_NO_DEVICE of the driver's interface


class VisibleGpu(NamedTuple):
    """A GPU, or a part of one (MIG), that this process can use."""

    uuid: str
    name: str
    memory: int  # bytes in all


# What a plan for GPUs takes for one where there is none, with the memory that its driver reports.
ASSUMED_GPU = VisibleGpu("", "an H200 (there is no GPU here)", 150_754_820_096)


class Visible(NamedTuple):
    """The GPUs that this process sees, in CUDA's order. Where it can use none, `missing` says why, and how to get
    one; `likely`: part of what is needed is there, so that one may be expected."""

    gpus: tuple[VisibleGpu, ...] = ()
    missing: str = ""
    likely: bool = True


def look(environ: MutableMapping[str, str], rank: int | None) -> Visible:
    """Find the GPUs that this process can use; `rank` is its number on this node, if known. Of several parts of GPUs
    (MIG) that CUDA_VISIBLE_DEVICES lists, this leaves the rank's own in `environ`."""
    own = own_instance(environ.get(_LIST, ""), rank)
    if own is not None:
        environ[_LIST] = own
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        library = None
    if find_spec("cupy") is None:
        return Visible(missing=_without_cupy(library), likely=library is not None)
    if library is None:
        return Visible(
            missing=f"this node has no NVIDIA driver ({LIBRARY} is not found): use a node with GPUs; a container "
            "needs --nv (Apptainer) or --gpus all (Docker)"
        )
    code = library.cuInit(0)
    if code == _NO_DEVICE:
        return Visible(missing=_hidden(environ))
    if code != _DONE:
        return Visible(missing=f"the NVIDIA driver does not start ({_error(library, code)}): nvidia-smi may tell more")
    old = _too_old(_number(library.cuDriverGetVersion), cupy_cuda())
    if old:
        return Visible(missing=old)
    gpus = tuple(_gpu(library, index) for index in range(_number(library.cuDeviceGetCount)))
    return Visible(gpus, "" if gpus else _hidden(environ))


def own_instance(visible: str, rank: int | None) -> str | None:
    """Return the part of a GPU (MIG) that this rank of a node takes of those that CUDA_VISIBLE_DEVICES lists: CUDA
    shows a process the first one only. None where it lists anything else, or the rank is unknown."""
    entries = [entry.strip() for entry in visible.split(",")]
    if rank is None or len(entries) < 2 or not all(entry.startswith("MIG-") for entry in entries):
        return None
    return entries[rank % len(entries)]


def choose(ranks: Sequence[tuple[str, int | None, Sequence[str]]]) -> list[int]:
    """Choose a GPU for each rank: its index among those that the rank sees.

    A rank is (node, its number there if known, UUIDs that it sees). It takes a GPU that as few ranks as possible have
    taken, beginning with the one of its number: modulo the number of GPUs where all see the same ones. So ranks that
    see one GPU each take that, and those that see the GPUs of their own socket divide them, in whichever order the
    launcher has numbered them.
    """
    taken: Counter[tuple[str, str]] = Counter()
    on_node: Counter[str] = Counter()
    chosen = []
    for node, number, uuids in ranks:
        first = on_node[node] if number is None else number
        order = [(first + i) % len(uuids) for i in range(len(uuids))]
        index = min(order, key=lambda i: taken[node, uuids[i]])
        taken[node, uuids[index]] += 1
        on_node[node] += 1
        chosen.append(index)
    return chosen


def cupy_cuda() -> int:
    """Return the major version of CUDA that the installed CuPy is made for, 0 if unknown."""
    from importlib.metadata import PackageNotFoundError, version  # a hundredth of a second, on every rank

    for major in DRIVERS:
        try:
            version(f"cupy-cuda{major}x")
        except PackageNotFoundError:
            continue
        return major
    return 0


# -- what is missing ---------------------------------------------------------------------------------------------------


def _without_cupy(library: ctypes.CDLL | None) -> str:
    """Say which of the extras to install, by what the driver can run."""
    driver = 0 if library is None else _number(library.cuDriverGetVersion) // 1000
    extras = [major for major in DRIVERS if major <= driver][-1:] or list(DRIVERS)
    wanted = " or ".join(f"pip install 'nettorrent_mpi[cuda{major}]'" for major in extras)
    choice = "" if len(extras) == 1 else f" (for drivers from {' or '.join(DRIVERS.values())} on)"
    none = f", and there is no NVIDIA driver on this node ({LIBRARY} is not found)" if library is None else ""
    return f"CuPy is not installed{none}: {wanted}{choice}"


def _too_old(driver: int, cuda: int) -> str:
    """Return what is wrong if CuPy is made for a later CUDA than a driver (13000: of CUDA 13.0) runs."""
    if driver // 1000 >= cuda:
        return ""
    remedy = f"; or pip install 'nettorrent_mpi[cuda{driver // 1000}]'" if driver // 1000 in DRIVERS else ""
    return (
        f"the NVIDIA driver is too old: it runs CUDA {driver // 1000}.{driver % 1000 // 10}, and CuPy is made for "
        f"CUDA {cuda}; it needs driver {DRIVERS[cuda]} or newer{remedy}"
    )


def _hidden(environ: Mapping[str, str]) -> str:
    """Say why there is a driver, but no GPU."""
    if _LIST in environ:
        value = environ[_LIST]
        if not value.strip():
            return f"{_LIST} is empty, which hides all GPUs: unset it, or name one in it"
        return f"{_LIST}={value} names no GPU that this process sees: nvidia-smi -L lists them"
    if "SLURM_JOB_ID" in environ:
        return "Slurm has given this rank no GPU: ask for one, with --gpus-per-task=1 (see jobs/)"
    return "the NVIDIA driver finds no GPU on this node: nvidia-smi -L lists them"


# -- the driver --------------------------------------------------------------------------------------------------------


def _gpu(library: ctypes.CDLL, index: int) -> VisibleGpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name, uuid = ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    library.cuDeviceGetUuid_v2(uuid, device)  # of the part, where there are parts; the older function gives the GPU's
    digits = re.sub(r"(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", bytes(uuid).hex())
    return VisibleGpu(digits, name.value.decode(errors="replace"), memory.value)


def _number(ask: ctypes._NamedFuncPointer) -> int:
    found = ctypes.c_int()
    return found.value if ask(ctypes.byref(found)) == _DONE else 0


def _error(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    return f"{text.value.decode(errors='replace')}, error {code}" if text.value else f"error {code}"
