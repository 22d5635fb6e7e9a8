"""Checks of the libraries that compute: BLAS, Numba, oneDNN, HDF5, and those of GPUs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nettorrent_mpi.cores import local_rank
from nettorrent_mpi.data.storage import new_hdf5, read_hdf5
from nettorrent_mpi.device import choices, visible
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.doctor.finding import Finding, fault, ok, warning
from nettorrent_mpi.doctor.places import trial_folder
from nettorrent_mpi.doctor.surroundings import Surroundings
from nettorrent_mpi.plan.errors import DataError, LaunchError
from nettorrent_mpi.speedup.machine import blas_kernels, environment

SLOWER = 1.25  # times as long as with BLAS's own choice, from which on a variable is warned of
_CORE = "OPENBLAS_CORETYPE"
_LOCKS = "HDF5_USE_FILE_LOCKING"


def look_at_blas(place: Surroundings) -> Iterator[Finding]:
    """Check which kernels BLAS takes for this processor, and whether a variable keeps it from faster ones."""
    chosen = place.environ.get(_CORE)
    free = environment()
    found = blas_kernels(free | ({_CORE: chosen} if chosen else {}), timed=chosen is not None)
    if not found:
        yield fault("NumPy does not load, or finds no BLAS", "pip install --force-reinstall numpy")
        return
    name = ", ".join(" ".join(str(each[k]) for k in ("internal_api", "version", "architecture") if each[k])
                     for each in found)  # fmt: skip
    others = blas_kernels(free, timed=True) if chosen else []
    if others and found[0]["speed"] * SLOWER < others[0]["speed"]:
        yield warning(
            f"{name}: {_CORE}={chosen} makes products {others[0]['speed'] / found[0]['speed']:.1f} times as slow as "
            f"OpenBLAS's own choice ({others[0]['architecture'] or 'unknown'}; "
            f"{found[0]['speed'] / 1e9:.0f} GFLOP/s a core, not {others[0]['speed'] / 1e9:.0f})",
            f"unset {_CORE}",
        )
    else:
        yield ok(name)


def look_at_kernels(place: Surroundings) -> Iterator[Finding]:
    """Check that the libraries that make training faster are there, and that what is found out about them is kept."""
    missing = make_device("cpu").missing
    if missing:
        yield warning(
            f"{' and '.join(missing)}, which make training on CPU cores 1.1 to 1.9 times as fast, are not installed",
            "pip install 'nettorrent_mpi[fast]'",
        )
    try:
        folder = choices.choices_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except (OSError, RuntimeError) as error:
        yield warning(
            f"the fastest algorithms cannot be noted in the home folder ({error}): every run tries them again",
            "make room there, or set XDG_CACHE_HOME to a folder that can be written to",
        )
        return
    if not missing:
        yield ok(", ".join(make_device("cpu").names))


def look_at_hdf5(place: Surroundings) -> Iterator[Finding]:
    """Write and read a file of HDF5 in the output folder, under its locks."""
    try:
        import h5py
    except ImportError as error:
        yield fault(f"h5py does not load ({error})", "pip install --force-reinstall h5py")
        return
    try:
        with trial_folder(place.output) as folder:
            with new_hdf5(folder / "trial.h5") as file:
                file["x"] = list(range(5))
            with read_hdf5(folder / "trial.h5") as file:
                right = file["x"][:].tolist() == list(range(5))
    except (OSError, DataError, ValueError) as error:
        if _LOCKS in os.environ and "lock" in str(error):
            yield fault(
                f"{_LOCKS}={os.environ[_LOCKS]} asks for locks that the file system of {place.output} has not, so that "
                f"no file of HDF5 can be read there ({error})",
                f"export {_LOCKS}=FALSE, or unset it",
            )
        else:
            yield fault(f"a file in {place.output} cannot be written and read ({error})", "see `output`")
        return
    name = f"h5py {h5py.version.version}, HDF5 {h5py.version.hdf5_version}"
    if not right:
        yield fault(f"{name}: a file in {place.output} has other values than were written", "use another file system")
        return
    yield ok(name + (f", {_LOCKS}={os.environ[_LOCKS]}" if _LOCKS in os.environ else ""))


def look_at_gpus(place: Surroundings) -> Iterator[Finding]:
    """Ask the driver for GPUs, and look for the libraries that compute on them."""
    seen = visible.look(dict(os.environ), local_rank(os.environ))
    if not seen.gpus:
        reason, _, remedy = seen.missing.partition(": ")
        if seen.likely and not _no_driver(seen.missing):
            yield warning(f"none that can be used: {reason}; training runs on CPU cores", remedy or "see nvidia-smi")
        else:
            yield ok("none here: training runs on CPU cores")
        return
    names = ", ".join(f"{each.name} ({each.memory / 2**30:.0f} GiB)" for each in seen.gpus)
    if place.size > 1:
        from nettorrent_mpi.comm import nccl

        try:
            names += f"; NCCL {nccl.load().get_version()}"
        except LaunchError as error:
            reason, _, remedy = str(error).partition("): ")
            yield fault(f"{names}; {reason})", remedy)
            return
    yield ok(names)


def _no_driver(missing: str) -> bool:
    return f"({visible.LIBRARY} is not found)" in missing and not Path("/dev/nvidia0").exists()
