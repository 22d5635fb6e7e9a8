"""A checkpoint comes into the folder `checkpoints/` whole or not at all; this module also says which ones are there.

step-N.tmp    a checkpoint that is being written; one with a manifest is complete and lacks only its name
step-N        a checkpoint
step-N.old    one that is being removed
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from nettorrent_mpi import __version__
from nettorrent_mpi.data.storage import flush, replacing, retried
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.engine.checkpoint_manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    SavedArray,
    SavedFile,
    blocks_of,
    digest,
    plain_blocks,
    shard_name,
)
from nettorrent_mpi.engine.checkpoint_shards import write_index, write_shard
from nettorrent_mpi.engine.model_file import Attribute
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.plan.errors import OutputError
from nettorrent_mpi.plan.moves import Holding

_WHOLE, _TMP, _OURS = (re.compile(r"step-\d{10}" + end) for end in ("", r"\.tmp", r"(\.tmp|\.old)?"))


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:010d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the one with the highest step last. Raises OutputError."""
    try:
        names = {path.name for path in folder.iterdir() if _OURS.fullmatch(path.name)}
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OutputError(f"{folder} cannot be read: {error.strerror or error}") from error
    unnamed = {name for name in names if _TMP.fullmatch(name) and name[:-4] not in names}
    complete = {name for name in unnamed if (folder / name / MANIFEST).is_file()}
    return [folder / name for name in sorted({name for name in names if _WHOLE.fullmatch(name)} | complete)]


def tidy(folder: Path) -> None:
    """Remove what runs that were killed have left in a folder of checkpoints; what lacks only its name gets it."""
    complete = checkpoints_in(folder)
    with suppress(OSError):
        for path in folder.iterdir():
            if path in complete and path.suffix:
                path.rename(path.with_suffix(""))
            elif path.suffix and _OURS.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints from a folder, and the folder itself if it has nothing else. Raises OSError."""
    for path in checkpoints_in(folder):
        _remove(path)
    tidy(folder)
    with suppress(OSError):  # it has files of the user's, or is not there
        folder.rmdir()


def _remove(path: Path) -> None:
    """Remove a checkpoint. If that is interrupted, no part of it is left under its name."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def nothing() -> None:
    """Do nothing between two pieces of what is written."""


def write_blocks(part: Path, rank: int, blocks: Mapping[Holding, Array], between: Callable[[], None] = nothing) -> None:
    """Write a rank's blocks into the folder `part`, and a note of them for the rank that completes the checkpoint.
    Raises OutputError, and what `between` raises, which is called after every piece."""
    path = part / shard_name(rank)
    with written(path):
        part.mkdir(parents=True, exist_ok=True)
        write_shard(path, blocks, between)
        with path.open("rb", buffering=0) as file:
            note = {"bytes": path.stat().st_size, "sha256": digest(file), "blocks": plain_blocks(list(blocks))}
        dtypes = {name: array.dtype.name for (name, _), array in blocks.items()}
        retried(lambda: path.with_suffix(".json").write_text(json.dumps(note | {"dtypes": dtypes})))


def complete(part: Path, ranks: Sequence[int], attributes: Mapping[str, Attribute], keep: int) -> None:
    """Complete the checkpoint in the folder `part`, `step-N.tmp`, which these ranks have written, and name it step-N.
    Afterwards remove all but the `keep` newest ones up to it. Raises OutputError.

    Checkpoints of later steps were left behind by a run that was resumed from an earlier one.
    """
    import h5py
    import numpy as np

    with written(part):
        files, dtypes = _notes(part, ranks)
        shapes: dict[str, Shape] = {}
        for block in (block for file in files.values() for block in file.blocks):
            before = shapes.get(block.name, (0,) * len(block.box))
            shapes[block.name] = tuple(max(a, b.stop) for a, b in zip(before, block.box, strict=True))
        arrays = {name: SavedArray(shapes[name], dtypes[name]) for name in sorted(shapes)}
        more = {"version": __version__, "numpy": np.__version__, "h5py": h5py.__version__}
        more |= {"hdf5": h5py.version.hdf5_version, "python": platform.python_version()}
        about = {**attributes, **more}
        index = part / INDEX
        write_index(index, about, arrays, files)
        with index.open("rb", buffering=0) as file:
            files[INDEX] = SavedFile(index.stat().st_size, digest(file))
        text = Manifest(about, arrays, files).text()
        for rank in ranks:
            (part / shard_name(rank)).with_suffix(".json").unlink()

        def write() -> None:
            with replacing(part / MANIFEST) as unnamed:
                unnamed.write_text(text)

        retried(write)
        target = part.with_suffix("")
        if target.exists():  # of the same step
            _set_aside(target)
        part.rename(target)
        flush(part.parent)
    with suppress(OSError):
        found = [path for path in checkpoints_in(part.parent) if not path.suffix]
        now = found.index(target) + 1
        shutil.rmtree(target.with_suffix(".old"), ignore_errors=True)
        for path in (*found[: max(now - keep, 0)], *found[now:]):
            _remove(path)


def _set_aside(path: Path) -> Path:
    old = path.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    return old


def _notes(part: Path, ranks: Sequence[int]) -> tuple[dict[str, SavedFile], dict[str, str]]:
    """Read the ranks' notes: their files, and the types of the arrays."""
    files: dict[str, SavedFile] = {}
    dtypes: dict[str, str] = {}
    for rank in ranks:
        path = part / shard_name(rank)
        try:
            note = json.loads(path.with_suffix(".json").read_text())
        except FileNotFoundError:
            raise OutputError(
                f"{path}, which rank {rank} has written, is not there for rank 0: the output folder has to be on a "
                "file system that all ranks share; choose another with --output DIR"
            ) from None
        files[path.name] = SavedFile(note["bytes"], note["sha256"], blocks_of(note["blocks"]))
        dtypes |= note["dtypes"]
    return files, dtypes


def newest(path: Path) -> Path | None:
    """Return the newest checkpoint in a run folder or a folder of checkpoints, or None. Nothing of it was read."""
    with suppress(OutputError):
        found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
        return found[-1] if found else None
    return None
