"""The command `nettorrent export`: the network of a run, or its metrics, as a file for other programs."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from nettorrent_mpi.cli.runs.run_data import read_run
from nettorrent_mpi.data.storage import check_file, check_folder, replacing
from nettorrent_mpi.engine.model_file import PARAMETERS, write_arrays
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.engine.saved_network import SavedArrays, SavedNetwork
from nettorrent_mpi.plan.errors import DataError, OutputError, UserError, warn

# The module that writes for a program, the package that it needs, and the extra that has it.
PROGRAMS = {
    "tensorboard": ("nettorrent_mpi.cli.runs.event_files", "tensorboardX", "tensorboard"),
    "wandb": ("nettorrent_mpi.cli.runs.wandb_runs", "wandb", "wandb"),
    "mlflow": ("nettorrent_mpi.cli.runs.mlflow_runs", "mlflow", "mlflow"),
}
CONVENTIONS = """\
Images are (row, height, width, channel). Weights are (inputs, outputs) of linear layers and (height, width, \
channels, filters) of convolutions. A flatten is in the order (height, width, channel). Inputs are x * unit for bytes, \
where `data` has a unit, then (x - mean) / std. The rows are upright images where the files of the data set have them \
transposed."""


def export(run: str, target: str | None, kind: str | None = None, *, overwrite: bool = False) -> Path:
    """Write the network of RUN, a run folder or a checkpoint, into a file, whole or not at all, and return it. Its
    `kind` is by default told by the ending of `target`; one of both has to be given. Raises UserErrors."""
    if target is None and kind is None:
        raise UserError(f"name the file with --output, by the ending one of {', '.join(_WRITERS)}; or give --format")
    path = Path(target or f"{Path(run).absolute().name}.{kind}")
    ending = path.suffix if kind is None else f".{kind}"
    write = _WRITERS.get(ending)
    if write is None or (path.suffix in _WRITERS and path.suffix != ending):
        raise OutputError(f"{path}: the file's name must end in {', '.join(_WRITERS) if kind is None else ending}")
    check_file(path, overwrite=overwrite)
    needed = _NEEDED.get(ending)
    module = None if needed is None else _loaded(*needed)
    saved = SavedArrays.read(Path(run))
    with written(path, "--output FILE"):
        write(saved, path, module)
    return path


def export_metrics(run: str, target: str | None, program: str, *, overwrite: bool = False) -> Path:
    """Write the metrics of RUN, a run folder, for one of PROGRAMS, and return the folder to name to it. They go into
    the folder `target`, or into one in the run's own, which is made anew each time. Raises UserErrors."""
    module = _loaded(*PROGRAMS[program])
    data = read_run(Path(run))
    for line in data.damage:
        warn(line, alone=True)
    folder = data.path / program if target is None else Path(target)
    path = folder / module.NAME
    check_folder(folder)
    if target is not None and path.is_file() and not overwrite:
        raise OutputError(f"{path} exists: choose another folder with --output DIR, or replace it with --overwrite")
    with written(path):
        if target is None and path.is_dir():
            shutil.rmtree(path)
        made: Path = module.write_events(data, folder)
    return folder if made.is_file() else made


def _loaded(module: str, package: str, extra: str) -> ModuleType:
    """Load what writes a kind of file. Raises a UserError where the package that it needs is missing."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        text = f"this kind of file needs the package {package}, which is not installed: "
        raise UserError(f"{text}pip install 'nettorrent_mpi[{extra}]'") from None


def _write_h5(saved: SavedArrays, path: Path, _: ModuleType | None) -> None:
    write_arrays(path, {PARAMETERS: saved.arrays}, saved.texts())


def _write_npz(saved: SavedArrays, path: Path, _: ModuleType | None) -> None:
    """Write as np.savez does, which takes no names like those of its own parameters."""
    texts = {name: np.array(text) for name, text in (saved.texts() | {"conventions": CONVENTIONS}).items()}
    taken = sorted(set(texts) & set(saved.arrays))
    if taken:
        raise DataError(f"array {taken[0]} is no layer's; use a file of nettorrent_mpi", file=saved.file)
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        for name, array in {**saved.arrays, **texts}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_pt(saved: SavedArrays, path: Path, module: ModuleType | None) -> None:
    assert module is not None
    network = SavedNetwork.of(saved)
    with replacing(path) as part:
        module.write_pt(network, part)


def _write_onnx(saved: SavedArrays, path: Path, module: ModuleType | None) -> None:
    assert module is not None
    network = SavedNetwork.of(saved)
    with replacing(path) as part:
        module.write_onnx(network, part)


_WRITERS: dict[str, Callable[[SavedArrays, Path, ModuleType | None], None]] = {
    ".h5": _write_h5,
    ".npz": _write_npz,
    ".pt": _write_pt,
    ".onnx": _write_onnx,
}
# The module that writes it, the package that this needs, and the extra that has it.
_NEEDED = {
    ".pt": ("nettorrent_mpi.torch.loaded_runs", "torch", "torch"),
    ".onnx": ("nettorrent_mpi.engine.onnx_file", "onnx", "onnx"),
}
