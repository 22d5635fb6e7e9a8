"""Checkpoints hold the whole training state in global coordinates, so that any layout and rank count can resume from
it. This module reads them; engine/checkpoint_writer.py writes them.

Random numbers are functions of the step, so only the step number is saved for them. Replicas that differ are all saved,
besides their average, from which a run with another number of replicas starts. Besides blocks of arrays there are
numbers of each rank, which a run with another layout leaves out (engine/rank_numbers.py).

Every rank reads its own boxes, out of the files that have parts of them. Before that, the ranks together have read all
files once and compared their checksums: each rank some of the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in, newest
from nettorrent_mpi.engine.checkpoint_manifest import MANIFEST, Manifest
from nettorrent_mpi.engine.checkpoint_shards import read_blocks, whole_arrays
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import (
    MODEL,
    Attribute,
    opened,
    own_array,
    read_arrays,
    read_attributes,
    read_box,
    verify,
)
from nettorrent_mpi.engine.resharding import REPLICAS
from nettorrent_mpi.engine.run_files import no_run, run_of
from nettorrent_mpi.engine.state import EXCHANGE, OPTIMIZER, PARAMETERS, VERSIONS
from nettorrent_mpi.plan.errors import ConfigError, DataError, LostStateError, OutputError, warn
from nettorrent_mpi.plan.moves import Holding

TRAINING: dict[str, Any] = {"step": int, "samples": int, "time": int | float, "config": str}  # attributes
MEASURED = ("loss", "accuracy")  # attributes, too: numbers that a training may not have yet
# The values that decide what a step computes: a resumed run must have the same.
DECISIVE = ("seed", "dtype", "data", "model", "train.batch_size", "train.optimizer")
Accept = Callable[[Mapping[str, Attribute]], None]


def named_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that a path names, the newest one last: itself, or those in a run folder or a folder of
    checkpoints. Raises OutputError if a run has none, DataError if it is no run."""
    run = run_of(path)
    if path.is_file() and run is not None:
        text = f"holds no training state; give the folder of its run, {run}, or one of those in {run / 'checkpoints'}"
        raise DataError(text, file=str(path))
    if (path / MANIFEST).exists():
        return [path]
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found and run is None:
        raise no_run(path)
    if not found:
        raise OutputError(f"{path} holds no checkpoint to resume from; start the run without --resume")
    return found


def find_checkpoint(world: World, path: Path) -> tuple[Path, Manifest]:
    """Return the newest undamaged checkpoint that a path names, with a warning of damaged ones. All its files have been
    read, by all ranks together, which call it. Raises OutputError if there is none, DataError if all are damaged."""
    found = world.once(lambda: named_checkpoints(path))
    damaged: list[str] = []
    for each in reversed(found):
        manifest, problem = _examined(each, world.rank, world.size)
        problems = [told for told in world.gather_objects(problem) if told]
        if manifest is not None and not problems:
            if world.rank == 0:
                _tell(damaged, each)
            return each, manifest
        damaged.append(problems[0])
    with world.agreement():
        raise DataError("; ".join(damaged))


def network_of(path: Path) -> Path:
    """Return where the network is that a path names: a file of weights, a checkpoint, or a folder with either. Raises
    DataError where there is none."""
    if path.is_file():
        if path.suffix == Path(MODEL).suffix:
            return path
    elif (path / MODEL).is_file() or (path / MANIFEST).is_file() or newest(path) is not None:
        return path
    run = run_of(path)
    if run is None:
        raise no_run(path)
    if run == path:
        text = f"holds neither {MODEL} nor a checkpoint yet: has the run come that far? (`nettorrent watch {path}`)"
        raise DataError(text, file=str(path))
    return network_of(run)


def read_network(path: Path) -> tuple[dict[str, Array], Mapping[str, Attribute]]:
    """Return the whole arrays "<layer>/<name>" of model.h5, of a checkpoint, or of a folder that has either, and the
    attributes beside them, without other ranks. Raises DataError or OutputError."""
    if (path / MODEL).is_file() or not path.is_dir():
        file = path if not path.is_dir() else path / MODEL
        arrays = read_arrays(file)
        with opened(file) as read:
            return arrays, read_attributes(read)
    damaged: list[str] = []
    for each in reversed(named_checkpoints(path)):
        manifest, problem = _examined(each, 0, 1)
        if manifest is not None and not problem:
            _tell(damaged, each)
            names = [name for name in manifest.arrays if name.startswith(f"{PARAMETERS}/")]
            found = whole_arrays(each, manifest, names)
            arrays = {name.removeprefix(f"{PARAMETERS}/"): array for name, array in found.items()}
            return arrays, manifest.attributes
        damaged.append(problem)
    raise DataError("; ".join(damaged))


def _examined(folder: Path, index: int, size: int) -> tuple[Manifest | None, str]:
    """Read a checkpoint's manifest and, as number `index` of `size` readers, some of its files. Return what is wrong
    with them, if anything."""
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(folder)
        manifest.verify(folder, list(manifest.files)[index::size])
    except DataError as error:
        return manifest, str(error)
    return manifest, ""


def _tell(damaged: list[str], instead: Path) -> None:
    """Warn of damaged checkpoints."""
    for text in damaged:
        warn(f"{text}; going on with {instead.name} instead", alone=True)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a training's checkpoint, and see that its files are there. Raises DataError."""
    manifest = Manifest.read(folder)
    manifest.check(folder)
    for name, kind in TRAINING.items():
        told = manifest.attributes.get(name)
        if not isinstance(told, kind) or not (isinstance(told, str) or 0 <= told < math.inf):
            raise DataError(f"does not tell {name}", file=str(folder / MANIFEST))
    for name in MEASURED:
        if not isinstance(manifest.attributes.get(name, 0.0), int | float):
            raise DataError(f"tells a {name} that is no number", file=str(folder / MANIFEST))
    return manifest


def restore_parameters(engine: Engine, path: Path, accept: Accept) -> None:
    """Load every rank's blocks of the parameters from model.h5, or from a checkpoint or the newest one in a folder.
    `accept` sees the attributes before anything changes. Raises DataError, or what `accept` raises, on all ranks."""
    if engine.world.once((path / MODEL).is_file):
        path = path / MODEL
    if engine.world.once(path.is_dir):
        folder, manifest = find_checkpoint(engine.world, path)
        with engine.world.agreement():
            accept(manifest.attributes)
            check_network(manifest, folder, engine)
        engine.blocks.load(lambda wanted: _read(engine, folder, manifest, "", wanted))
        return
    engine.world.once(lambda: verify(path))
    shapes = engine.shapes()
    with engine.world.agreement(), opened(path) as file:
        accept(read_attributes(file))
        for key, shape in shapes.items():
            own_array(file, f"{PARAMETERS}/{key}", shape)

    def read(wanted: Mapping[Holding, Array]) -> None:
        with engine.world.agreement(), opened(path) as file:
            for (name, box), array in wanted.items():
                read_box(file, name, box, array)

    engine.blocks.load(read)


def restore(engine: Engine, folder: Path, manifest: Manifest, accept: Accept) -> None:
    """Load the training state from a checkpoint made with any layout on any number of ranks.

    `accept` sees the attributes before anything changes. Raises DataError, or what `accept` raises, on all ranks.
    """
    with engine.world.agreement():
        accept(manifest.attributes)
        check_network(manifest, folder, engine)
        for name in engine.optimizer.states:
            if not any(each.startswith(f"{OPTIMIZER}/{name}/") for each in manifest.arrays):
                raise DataError(
                    f"holds no state {name!r} of the optimizer; resume with the optimizer it was made with",
                    file=str(folder),
                )
    replicas = len({name.split("/")[1] for name in manifest.arrays if name.startswith(f"{REPLICAS}/")})
    engine.restore(
        lambda prefix, wanted: _read(engine, folder, manifest, prefix, wanted),
        int(manifest.attributes["step"]),
        max(replicas, 1),
    )


def check_network(manifest: Manifest, folder: Path, engine: Engine) -> None:
    """Raise DataError unless the checkpoint has all parameters of the engine's network, before anything changes."""
    shapes = engine.shapes()
    for key, shape in shapes.items():
        if math.prod(shape) and f"{PARAMETERS}/{key}" not in manifest.arrays:
            text = f"array {PARAMETERS}/{key} is missing; is it another network's?"
            raise DataError(text, file=str(folder))
    for name, array in manifest.arrays.items():
        about = array_of(name)
        wanted = None if about is None else shapes.get(about)
        if about is not None and array.shape != wanted:
            found = f"has shape {array.shape}, the network wants {wanted}"
            raise DataError(f"array {name} {found}; is it another network's?", file=str(folder))


def _read(engine: Engine, folder: Path, manifest: Manifest, prefix: str, wanted: Mapping[Holding, Array]) -> None:
    """Fill the wanted arrays with their parts of the arrays of that name after `prefix`. Those that the checkpoint
    lacks stay unchanged. All ranks call."""
    with engine.world.agreement():
        try:
            read_blocks(folder, manifest, prefix, wanted)
        except LostStateError as error:
            raise DataError(str(error), file=str(folder)) from error


def array_of(name: str) -> str | None:
    """Return the network's array that an array of the state is about: "replicas/1/optimizer/m/linear1/weight" ->
    "linear1/weight"; None for what is not like these."""
    parts = name.split("/")
    first, *others = parts[2:] if parts[0] == REPLICAS else parts
    if first not in (PARAMETERS, OPTIMIZER, EXCHANGE, VERSIONS):
        return None
    return "/".join(others if first == PARAMETERS else others[1:])


def lies_in(path: Path, folder: Path) -> bool:
    """Whether the checkpoint at `path` is one of those in `folder`."""
    return path.resolve().parent == folder.resolve()


def must_match(text: str, config: Config, path: Path) -> None:
    """Raise ConfigError if a decisive value differs from the one in the checkpoint's configuration, which is JSON."""
    now = to_plain(config)
    try:
        before = parsed(text)
        values = [(key, _value(before, key), _value(now, key)) for key in DECISIVE]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError("has no configuration that can be read", file=str(path)) from None
    for key, then, given in values:
        # Weights are of float32 with all of these: a run on a GPU is resumed where there is none.
        if key == "dtype" and all(value in ("float32", "tf32", "bfloat16") for value in (then, given)):
            continue
        if then != given:
            raise ConfigError(
                f"{json.dumps(given)[:80]} is not what the checkpoint {path} was made with "
                f"({json.dumps(then)[:80]}); resume with the same, or start anew without --resume",
                key=key,
            )


def _value(plain: Any, key: str) -> Any:
    """Return a decisive value of a configuration; files may lie elsewhere."""
    for part in key.split("."):
        plain = plain[part]
    return {name: value for name, value in plain.items() if name != "root"} if key == "data" else plain
