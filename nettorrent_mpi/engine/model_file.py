"""model.h5: the network's arrays, whole, whatever the layout that trained them.

    /parameters/<layer>/<name>     linear weight (in, out), conv weight (kh, kw, in, out), ...
    attribute `model`              the network's configuration as JSON

Chunked with checksums (fletcher32), so that a flipped bit is an error when read and not a wrong weight.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from nettorrent_mpi.nn.backend import Array
from nettorrent_mpi.plan.errors import DataError


def write_model(path: Path, arrays: Mapping[str, Array], model: str) -> None:
    """Write the file whole or not at all: under another name first, then renamed. Raises OSError (a full disk)."""
    part = path.with_name(path.name + ".part")
    try:
        with h5py.File(part, "w") as file:
            file.attrs["model"] = model
            parameters = file.create_group("parameters")
            for key, array in arrays.items():
                if array.size:
                    parameters.create_dataset(key, data=array, chunks=True, fletcher32=True)
                else:
                    parameters.create_dataset(key, data=array)
        with part.open("rb") as done:
            os.fsync(done.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise OSError(getattr(error, "errno", None), str(error)) from error


def read_model(path: Path) -> tuple[dict[str, Array], str]:
    """(arrays by "<layer>/<name>", the network's configuration as JSON). Raises DataError for any other file."""
    arrays: dict[str, Array] = {}
    try:
        with h5py.File(path, "r", locking=False) as file:
            model = str(file.attrs["model"])

            def visit(name: str, item: object) -> None:
                if isinstance(item, h5py.Dataset):
                    arrays[name] = np.asarray(item)

            file["parameters"].visititems(visit)
    except FileNotFoundError:
        raise DataError("there is no trained model here; has the run come to its end?", file=str(path)) from None
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(f"is not a whole model file of nettorrent_mpi ({error}); train again", file=str(path)) from None
    return arrays, model
