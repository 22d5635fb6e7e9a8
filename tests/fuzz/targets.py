"""Targets read what is in a case's folder as the commands do, and check what they read: a damaged file is refused by a
UserError, or read as everybody reads it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console

from nettorrent_mpi.api import Trainer
from nettorrent_mpi.cli.export import export
from nettorrent_mpi.cli.inspect import inspect
from nettorrent_mpi.cli.run_folder import RunFolder
from nettorrent_mpi.cli.runs.event_files import write_events
from nettorrent_mpi.cli.runs.listing import runs
from nettorrent_mpi.cli.runs.page import page
from nettorrent_mpi.cli.runs.run_data import read_run
from nettorrent_mpi.cli.runs.terminal_view import frame
from nettorrent_mpi.config.dpwa_file import read_dpwa
from nettorrent_mpi.config.reading import exchange_of
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.data.csv_file import import_csv
from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.folder import import_folder
from nettorrent_mpi.data.npz_file import import_npz
from nettorrent_mpi.data.row_files import open_row_file
from nettorrent_mpi.data.rows import Dataset, Split
from nettorrent_mpi.plan.errors import NetTorrentWarning, UserError, in_one_line
from nettorrent_mpi.plan.specs import Linear
from nettorrent_mpi.planning import load_config, placed, plan

Array = np.ndarray[Any, Any]
warnings.simplefilter("ignore", NetTorrentWarning)
warnings.filterwarnings("ignore", category=RuntimeWarning)


def _rows(split: Split, has_room: bool = True) -> Array:
    """Read some rows as they are stored."""
    inputs = split.inputs(has_room=lambda size: has_room)
    chosen = np.unique(np.linspace(0, split.rows - 1, 16).astype(np.intp))
    out = np.empty((len(chosen), inputs.native_bytes), np.uint8)
    inputs.stored(chosen, out)
    return out


def _read(dataset: Dataset) -> list[tuple[int, Array, Array]]:
    return [(s.rows, _rows(s), s.targets()) for s in (dataset.train, dataset.test) if s is not None]


def idx(case: Path) -> str:
    """MNIST, plain or compressed."""
    read = _read(open_dataset("mnist", str(case)))
    for (rows, x, y), prefix in zip(read, ("train", "t10k"), strict=True):
        for values, kind, header in ((x, "images-idx3", 16), (y, "labels-idx1", 8)):
            path = case / "mnist" / f"{prefix}-{kind}-ubyte.gz"
            content = (path if path.exists() else path.with_suffix("")).read_bytes()
            content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            wanted = np.frombuffer(content, np.uint8, offset=header).reshape(rows, -1)
            assert values.shape[0] in (rows, 16)
            chosen = np.unique(np.linspace(0, rows - 1, 16).astype(np.intp)) if kind[0] == "i" else np.arange(rows)
            np.testing.assert_array_equal(values.reshape(len(chosen), -1), wanted[chosen])
    return f"{read[0][0]} rows"


def cifar(case: Path) -> str:
    """CIFAR-10."""
    read = _read(open_dataset("cifar10", str(case)))
    names = [[f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"]]
    for (rows, x, y), files in zip(read, names, strict=True):
        content = b"".join((case / "cifar-10-batches-bin" / name).read_bytes() for name in files)
        wanted = np.frombuffer(content, np.uint8).reshape(rows, 3073)
        np.testing.assert_array_equal(y, wanted[:, 0])
        chosen = np.unique(np.linspace(0, rows - 1, 16).astype(np.intp))
        planes = wanted[chosen, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1).reshape(len(chosen), -1)
        np.testing.assert_array_equal(x, planes)
    return f"{read[0][0]} rows"


def hdf5(case: Path) -> str:
    """A data set in HDF5: mapped, read at once and read batch by batch it has the rows that h5py reads."""
    path = case / "data.h5"
    dataset = open_dataset("hdf5", str(path))
    splits = [(dataset.train, ""), *([(dataset.test, "_test")] if dataset.test is not None else [])]
    read = [(_rows(split), _rows(split, has_room=False), split.targets()) for split, _ in splits]
    with h5py.File(path, "r") as file:
        for (split, suffix), (x, slowly, y) in zip(splits, read, strict=True):
            stored = file[f"x{suffix}"]
            chosen = np.unique(np.linspace(0, split.rows - 1, 16).astype(np.intp))
            inputs = split.inputs()
            if stored.compression == "lzf" and not stored.fletcher32:
                continue  # a damaged chunk may leave a part of the memory as it was
            wanted = stored[chosen].astype(inputs.native).reshape(len(chosen), -1).view(np.uint8)
            np.testing.assert_array_equal(x, wanted)
            np.testing.assert_array_equal(slowly, wanted)
            np.testing.assert_array_equal(y, file[f"y{suffix}"][...])
    return f"{splits[0][0].rows} rows"


def strange_hdf5(case: Path) -> str:
    """A data set that HDF5 wrote, with what no reader expects: it never has another file's bytes."""
    done = hdf5(case)
    dataset = open_dataset("hdf5", str(case / "data.h5"))
    for split in (dataset.train, dataset.test):
        if split is not None:
            inputs = split.inputs()
            found = np.empty((split.rows, inputs.native_bytes), np.uint8)
            inputs.stored(np.arange(split.rows), found)
            assert b"SECRET" not in found.tobytes()
            assert b"SECRET" not in split.targets().tobytes()
    return done


def config(case: Path) -> str:
    """A configuration is read, planned and written again."""
    path = case / "c.yaml"
    read, refused = load_config(path), None
    try:
        planned = plan(read, ranks=4)
        described = str(planned)
    except UserError as error:
        raise placed(error, path) from None
    except MemoryError as error:
        refused = in_one_line(error)
    if refused is not None:  # a network that is too large was asked for; for any other target this is a fault
        raise refused
    again = case / "again.yaml"
    again.write_text(to_yaml(read), encoding="utf-8")
    assert load_config(again) == read
    assert described
    return read.data.name


def dpwa(case: Path) -> str:
    """A file of dpwa is read as an exchange that a configuration can have."""
    found = read_dpwa(str(case / "d.yaml"))
    assert exchange_of(found.exchange) == found.exchange
    assert found.nodes is None or found.nodes >= 0
    return found.exchange.kind


def images(case: Path) -> str:
    """Pictures become a data set."""
    target = case / "data.h5"
    made = import_folder(case / "in", target, (8, 8), test=0.0)
    with h5py.File(target, "r") as file:
        assert file["x"].shape == (made.rows, *made.shape)
    return f"{made.rows} pictures"


def rows(case: Path) -> str:
    """Rows for predictions, of a .npy and a .npz, are those that NumPy reads, or none."""
    (path,) = (each for each in case.iterdir() if each.suffix in (".npy", ".npz"))
    found = open_row_file(path)
    if found.shape != (6, 5):
        return "of another shape"
    blocks = [*found.blocks(7)]
    with path.open("rb") as file:
        wanted = np.lib.npyio.NpzFile(file)[found.name] if found.name else np.lib.format.read_array(file)
    np.testing.assert_array_equal(np.concatenate(blocks) if blocks else wanted[:0], wanted)
    return f"{found.rows} rows"


def tables(case: Path) -> str:
    """A table in text and an archive of arrays become a data set that has their rows, or are refused."""
    (path,) = (each for each in case.iterdir() if each.suffix in (".csv", ".npz"))
    target = case / "made.h5"
    made = import_npz(path, target) if path.suffix == ".npz" else import_csv(path, target, label="-1")
    read = _read(open_dataset("hdf5", str(target)))
    assert [rows for rows, _, _ in read] == [rows for rows in (made.rows, made.test_rows) if rows]
    return f"{made.rows} rows"


def _made(output: Path | None = None) -> Trainer:
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 8)).astype(np.float32), np.arange(40) % 4
    layers = [Linear(6, activation="relu"), Linear(4)]
    return Trainer(layers, rows, batch_size=8, steps=4, kernels="numpy", device="cpu", output=output)


@cache
def _trainer() -> Trainer:
    return _made()


@cache
def _sound() -> dict[str, Array]:
    """Return the arrays of the network in the seed of model.h5."""
    trainer = _trainer()
    for _ in trainer.train():
        pass
    return {name: array.copy() for name, array in trainer.parameters().items()}


def _same(found: dict[str, Array]) -> None:
    for name, array in _sound().items():
        np.testing.assert_array_equal(found[name], array)


def model(case: Path) -> str:
    """A damaged model.h5 gives the arrays that it had, or none."""
    _sound()
    strange_model(case)
    _same(_trainer().parameters())
    with np.load(case / "out.npz") as arrays:
        _same(dict(arrays))
    return "the same arrays"


def strange_model(case: Path) -> str:
    """A model.h5 that HDF5 wrote, with what no reader expects, is loaded and exported; it never has another file's
    bytes."""
    path, target = case / "model.h5", case / "out.npz"
    refused = None
    try:
        _trainer().load(path)
    except UserError as error:
        refused = error
    _inspected(path)
    export(str(case), str(target))
    with np.load(target) as arrays:
        assert not any(b"SECRET" in array.tobytes() for array in arrays.values())
    if refused is not None:
        raise refused
    return "arrays"


def make_model(path: Path) -> None:
    """Write the network that `model` loads."""
    _sound()
    _trainer().save(path)


def checkpoint(case: Path) -> str:
    """A damaged checkpoint is resumed from with the arrays that it had, or not at all."""
    _sound()
    sealed_checkpoint(case)
    _same(_trainer().parameters())
    return "the same arrays"


def sealed_checkpoint(case: Path) -> str:
    """A checkpoint whose checksums somebody has made right again is shown, resumed from and exported, or not."""
    trainer = _trainer()
    _inspected(case)
    trainer.resume(case)
    export(str(case), str(case / "out.npz"))
    return f"step {trainer.step}"


def _inspected(path: Path) -> None:
    """See that `inspect` shows it, and as nothing but text."""
    for everything, as_json in ((False, False), (True, False), (True, True)):
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            inspect(str(path), everything=everything, as_json=as_json)
        assert all(line.isprintable() for line in shown.getvalue().split("\n"))


def make_checkpoint(folder: Path) -> None:
    """Train with checkpoints."""
    with _made(folder) as trainer:
        for _ in trainer.train():
            pass


def metrics(case: Path) -> str:
    """A run goes on after step 20 in a folder whose metrics.jsonl and summary.json are damaged."""
    folder = RunFolder(str(case))
    folder.has_results(20)
    before = (case / "metrics.jsonl").read_bytes().split(b"\n")
    try:
        folder.create("seed: 1\n", after=20)
    finally:
        folder.close()
    kept = (case / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    for line in kept:
        assert line in before
        assert json.loads(line)["step"] <= 20
    return f"{len(kept)} lines"


def run_folder(case: Path) -> str:
    """A run folder is listed, watched and reported, whatever its files hold: as text that a terminal shows, and as a
    page with no script but its own."""
    run = read_run(case)
    assert all(line.isprintable() for line in run.damage)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        runs([str(case)], sort="accuracy", as_json=False)
        Console(width=100).print(frame(run, 100))
    assert all(line.isprintable() for line in shown.getvalue().split("\n"))
    text = page(run)
    assert len(re.findall("<script", text)) == 1
    assert "<img" not in text
    write_events(run, case / "events")
    return f"{len(run.points)} records, {len(run.damage)} files damaged"
