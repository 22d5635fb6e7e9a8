"""The files of a checkpoint: written by several ranks, read in any parts; and everything that is damaged is found."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.data.storage import _Target
from nettorrent_mpi.engine.checkpoint import read_manifest, read_network
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in, complete, tidy, write_blocks
from nettorrent_mpi.engine.checkpoint_manifest import Manifest, SavedFile, _text, digest
from nettorrent_mpi.engine.checkpoint_shards import read_blocks, write_shard
from nettorrent_mpi.engine.checkpoint_writer import _Writing
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.errors import DataError, NetTorrentError, OutputError
from nettorrent_mpi.plan.moves import Holding, whole, within

ATTRIBUTES = {"step": 7, "samples": 70, "time": 1.5, "config": "{}", "model": "größer"}
SHAPES = {"conv/weight": (3, 3, 4, 5), "linear/weight": (11, 700), "linear/bias": (700,), "scale": (), "none": (0, 4)}
NAMES = [*(f"parameters/{key}" for key in SHAPES), "optimizer/m/linear/weight", "replicas/1/parameters/linear/weight"]


def value(name: str) -> np.ndarray:
    shape = SHAPES[next(key for key in SHAPES if name.endswith(key))]
    return np.asarray(np.random.default_rng(len(name)).normal(size=shape).astype("float32"))


def blocks_of_ranks() -> list[dict[Holding, np.ndarray]]:
    """Return what three ranks own: each array is cut along one of its axes, or has one owner."""
    ranks: list[dict[Holding, np.ndarray]] = [{}, {}, {}]
    for i, name in enumerate(NAMES):
        array = value(name)
        box = whole(array.shape)
        if not array.ndim or not array.size:
            if array.size:
                ranks[i % 3][Holding(name, box)] = array
            continue
        axis = i % array.ndim
        cuts = [0, 1, array.shape[axis] // 2, array.shape[axis]]
        for rank, (start, stop) in enumerate(pairwise(cuts)):
            part = (*box[:axis], Span(start, stop), *box[axis + 1 :])
            if start < stop:
                ranks[(rank + i) % 3][Holding(name, part)] = array[within(part, box)]
    return ranks


def write(folder: Path, step: int = 7, keep: int = 100, **more: object) -> Path:
    part = folder / f"step-{step:010d}.tmp"
    for rank, blocks in enumerate(blocks_of_ranks()):
        write_blocks(part, rank, blocks)
    complete(part, range(3), {**ATTRIBUTES, "step": step, **more}, keep)  # type: ignore[dict-item]
    return part.with_suffix("")


def check(folder: Path) -> Manifest:
    """Do what a run that resumes does first."""
    manifest = read_manifest(folder)
    manifest.verify(folder, list(manifest.files))
    return manifest


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("written"))


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / written.name))


def test_any_program_reads_whole_arrays(written: Path) -> None:
    with h5py.File(written / "index.h5") as file:
        for name in NAMES:
            if value(name).size:
                np.testing.assert_array_equal(file[name], value(name))
        assert file.attrs["step"] == 7
        assert file.attrs["model"].decode() == "größer"
    names = {path.name for path in written.iterdir()}
    assert names == {"manifest.json", "index.h5", "shard-00000.h5", "shard-00001.h5", "shard-00002.h5"}
    if shutil.which("h5dump"):
        told = subprocess.run(["h5dump", "-d", "/parameters/linear/bias", written / "index.h5"], capture_output=True)
        assert f"{value('parameters/linear/bias')[0]:.4g}"[:5] in told.stdout.decode()


@settings(max_examples=60)
@given(data=st.data())
def test_any_part_is_read(written: Path, data: st.DataObject) -> None:
    manifest = Manifest.read(written)
    wanted = {}
    for name in data.draw(st.lists(st.sampled_from([n for n in NAMES if value(n).size]), min_size=1, unique=True)):
        box = []
        for length in value(name).shape:
            start = data.draw(st.integers(0, length - 1))
            box.append(Span(start, data.draw(st.integers(start + 1, length))))
        wanted[Holding(name, tuple(box))] = np.full([span.size for span in box], np.nan, np.float64)
    wanted[Holding("exchange/mass/scale", ())] = kept = np.array(5.0)  # which it lacks
    read_blocks(written, manifest, "", wanted)
    assert kept == 5.0
    for (name, part), found in list(wanted.items())[:-1]:
        np.testing.assert_array_equal(found, value(name)[within(part, whole(value(name).shape))])


def test_a_flipped_bit_is_found(copied: Path) -> None:
    random = np.random.default_rng(0)
    for path in sorted(copied.iterdir()):
        data = path.read_bytes()
        assert check(copied)
        count = min(len(data), 200 if path.suffix == ".json" else 40)
        for place in random.choice(len(data), count, replace=False):
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=path.name):
                check(copied)
        for size in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            with pytest.raises(DataError, match=path.name):
                check(copied)
        path.write_bytes(data + b"\0")
        with pytest.raises(DataError, match=path.name):
            check(copied)
        path.write_bytes(data)


def test_files_that_are_not_its_own_are_found(copied: Path, tmp_path: Path) -> None:
    """A missing, renamed or foreign one, a link, a pipe, a folder."""
    shard, kept = copied / "shard-00001.h5", tmp_path / "kept"
    other = write(tmp_path / "other", loss=2.0)
    shard.rename(kept)

    def found(told: str) -> None:
        with pytest.raises(DataError, match=rf"shard-00001\.h5: {told}"):
            check(copied)

    found("is missing")
    shutil.copy(copied / "shard-00002.h5", shard)
    found("is not the file that was written")
    shard.unlink()
    write_shard(shard, {key: array + 1 for key, array in blocks_of_ranks()[1].items()}, lambda: None)
    found("is not the file that was written")
    shard.unlink()
    shard.symlink_to(kept)
    found("is a link")
    shard.unlink()
    os.mkfifo(shard)
    found("is not a regular file")
    shard.unlink()
    shard.mkdir()
    found("is not a regular file")
    shard.rmdir()
    kept.rename(shard)
    assert check(copied)
    (copied / "manifest.json").rename(kept)
    (copied / "manifest.json").symlink_to(kept)
    with pytest.raises(DataError, match=r"manifest\.json: is a link"):
        check(copied)
    shutil.copy(other / "manifest.json", kept)
    with pytest.raises(DataError):
        check(copied)


def forged(folder: Path, name: str, make: Callable[[h5py.File], None]) -> None:
    """Change a shard, and let the manifest say that it has to be so."""
    manifest = Manifest.read(folder)
    with h5py.File(folder / name, "r+") as file:
        make(file)
    with (folder / name).open("rb", buffering=0) as raw:
        made = SavedFile((folder / name).stat().st_size, digest(raw), manifest.files[name].blocks)
    files = {**manifest.files, name: made}
    (folder / "manifest.json").write_text(Manifest(manifest.attributes, manifest.arrays, files).text())


@pytest.mark.parametrize("how", ["link", "soft link", "group link", "external", "virtual", "packed", "sparse", "none"])
def test_a_strangers_checkpoint_reads_no_other_file(copied: Path, tmp_path: Path, how: str) -> None:
    """Nor does it fill the memory."""
    blocks = Manifest.read(copied).files["shard-00001.h5"].blocks
    block = next(each for each in blocks if each.name == "parameters/linear/bias")
    stop = block.box[0].size
    assert stop > 1
    (tmp_path / "secret").write_bytes(b"secret!!" * 400)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(stop, np.float32)

    def make(file: h5py.File) -> None:
        group = file[block.name]
        (key,) = group
        if how == "group link":
            del file["parameters/linear/bias"]
            file["elsewhere/" + key] = np.zeros(stop, np.float32)
            file["parameters/linear/bias"] = h5py.SoftLink("/elsewhere")
            return
        del group[key]
        if how == "link":
            group[key] = h5py.ExternalLink(tmp_path / "other.h5", "x")
        elif how == "soft link":
            file["elsewhere"] = np.zeros(stop, np.float32)
            group[key] = h5py.SoftLink("/elsewhere")
        elif how == "external":
            group.create_dataset(key, (stop,), np.float32, external=[(tmp_path / "secret", 0, 4 * stop)])
        elif how == "virtual":
            layout = h5py.VirtualLayout((stop,), np.float32)
            layout[...] = h5py.VirtualSource(tmp_path / "other.h5", "x", (stop,))
            group.create_virtual_dataset(key, layout)
        elif how == "packed":
            group.create_dataset(key, data=np.zeros(stop, np.float32), compression="gzip")
        elif how == "sparse":
            group.create_dataset(key, (stop,), np.float32, chunks=(8,))

    forged(copied, "shard-00001.h5", make)
    manifest = check(copied)
    with pytest.raises(DataError, match=r"shard-00001\.h5: (has no array|array .* is not stored)"):
        read_blocks(copied, manifest, "", {block: np.empty(stop)})
    with pytest.raises(DataError):
        read_network(copied)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("files", {"../shard-00000.h5": {"bytes": 1, "sha256": "", "blocks": []}}),
        ("files", {"/etc/passwd": {"bytes": 1, "sha256": "", "blocks": []}}),
        ("files", {"index.h5": {"bytes": 1, "sha256": "\x1b[2J", "blocks": []}}),
        ("files", {"index.h5": {"bytes": 1, "sha256": 5, "blocks": []}}),
        ("arrays", {"parameters/linear/bias": {"shape": [1 << 61], "dtype": "float32"}}),
        ("arrays", {"parameters/linear/bias": {"shape": [700], "dtype": "O"}}),
        ("arrays", {"parameters/linear/bias": {"shape": [-1], "dtype": "float32"}}),
        ("arrays", {"parameters/../bias": {"shape": [700], "dtype": "float32"}}),
        ("arrays", {"parameters/\x1b[2J": {"shape": [0], "dtype": "float32"}}),
        ("attributes", {"step": [1]}),
        ("attributes", {"step": -1}),
        ("attributes", {"samples": 1 << 70}),
        ("attributes", {"time": float("nan")}),
        ("attributes", {"loss": "{}"}),
        ("attributes", {"accuracy": 10**400}),
        ("format", "something else"),
    ],
)
def test_a_strangers_manifest_is_read_with_care(copied: Path, key: str, wrong: object) -> None:
    told = json.loads((copied / "manifest.json").read_text())
    del told["checksum"]
    told[key] = {**told[key], **wrong} if isinstance(wrong, dict) else wrong
    (copied / "manifest.json").write_text(_text(told))
    with pytest.raises(DataError):
        check(copied)
    for text in ("[" * 100_000, "1" * 10_000, '{"format": 1}', "[]", "null", "\xff\xfe"):
        (copied / "manifest.json").write_text(text, encoding="latin1")
        with pytest.raises(DataError, match="is not the whole manifest"):
            check(copied)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    def steps(step: int) -> list[int]:
        write(tmp_path, step, keep=3)
        return sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir())

    assert [steps(step) for step in (5, 10, 15, 20)][-1] == [10, 15, 20]
    assert steps(12) == [10, 12], "15 and 20 are of a run that was resumed from 10"
    assert steps(12) == [10, 12], "written again"
    assert check(tmp_path / "step-0000000012")


def test_what_killed_runs_leave(tmp_path: Path) -> None:
    write(tmp_path, 2).rename(tmp_path / "step-0000000002.old")
    whole = write(tmp_path, 3)
    unnamed = write(tmp_path, 4).rename(tmp_path / "step-0000000004.tmp")  # killed when it lacked its name only
    write_blocks(tmp_path / "step-0000000005.tmp", 0, blocks_of_ranks()[0])
    assert checkpoints_in(tmp_path) == [whole, unnamed]
    assert check(unnamed)
    tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, "step-0000000004"}
    tidy(tmp_path / "nowhere")


def test_a_disk_that_fills(tmp_path: Path) -> None:
    part, limits = tmp_path / "step-0000000007.tmp", resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1000, 5000, 12000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OutputError, match=r"shard-00000\.h5 could not be written"):
                write_blocks(part, 0, {Holding("parameters/linear/weight", whole((90, 90))): np.ones((90, 90))})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(part.iterdir()) == []


def test_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which passes, or stays."""
    calls, original = [], _Target._write
    blocks = blocks_of_ranks()[0]

    def fail(self: _Target, view: memoryview) -> None:
        calls.append(1)
        if len(calls) <= stays:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(self, view)

    monkeypatch.setattr(_Target, "_write", fail)
    stays = 1
    write_blocks(tmp_path, 0, blocks)
    stays = 1 << 30
    with pytest.raises(OutputError, match="Input/output error"):
        write_blocks(tmp_path, 1, blocks)
    assert {path.name for path in tmp_path.iterdir()} == {"shard-00000.h5", "shard-00000.json"}


def test_a_folder_that_ranks_do_not_share(tmp_path: Path) -> None:
    part = tmp_path / "step-0000000007.tmp"
    write_blocks(part, 0, blocks_of_ranks()[0])
    with pytest.raises(OutputError, match="which rank 1 has written, is not there for rank 0"):
        complete(part, range(2), ATTRIBUTES, 1)


def test_no_error_of_a_writing_thread_is_lost() -> None:
    def fail(error: Exception | None) -> NetTorrentError | None:
        def work() -> None:
            if error is not None:
                raise error

        thread = _Writing(work)
        thread.start()
        return thread.outcome()

    assert fail(None) is None
    assert str(fail(OutputError("full"))) == "full"
    assert "Read-only" in str(fail(OSError(errno.EROFS, "Read-only file system", "x")))
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
