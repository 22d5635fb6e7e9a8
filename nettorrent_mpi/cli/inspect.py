"""The command `nettorrent inspect`: what a checkpoint or model.h5 has, and whether it is whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from nettorrent_mpi.cli.tables import aligned
from nettorrent_mpi.engine.checkpoint import named_checkpoints, read_manifest
from nettorrent_mpi.engine.checkpoint_manifest import Manifest
from nettorrent_mpi.engine.model_file import MODEL, Attribute, array_shapes, opened, read_attributes, verify
from nettorrent_mpi.plan.errors import DataError, OutputError, UserError, readable

# What is told of a training, in this order; other attributes are long texts.
TOLD = ["step", "samples", "time", "loss", "accuracy", "ranks", "layout", "exchange", "device", "mpi"]
TOLD += ["version", "python", "numpy", "h5py", "hdf5"]
DAMAGED = UserError.exit_code


def inspect(path: str, *, as_json: bool) -> int:
    """Tell what is at `path`: a checkpoint, a folder of them, a run folder or model.h5. Everything is read, and what is
    damaged is named. Returns the exit code, 2 if anything is damaged. Raises OutputError where there is nothing."""
    found = [_file(each) if each.is_file() else _checkpoint(each) for each in _places(Path(path))]
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_text(each) for each in found))
    return DAMAGED if any(each["damage"] for each in found) else 0


def _places(path: Path) -> list[Path]:
    """Return what is to be inspected: checkpoints from the oldest on, then model.h5."""
    model = path / MODEL
    if path.is_file():
        return [path]
    try:
        return [*named_checkpoints(path), *([model] if model.is_file() else [])]
    except OutputError:
        if model.is_file():
            return [model]
        raise OutputError(f"{path} has no checkpoint and no {MODEL}") from None


def _checkpoint(folder: Path) -> dict[str, Any]:
    damage: list[str] = []
    told: dict[str, Any] = {"path": str(folder), "kind": "checkpoint", "damage": damage}
    try:
        manifest = Manifest.read(folder)
    except DataError as error:
        damage.append(str(error))
        return told
    try:
        read_manifest(folder)
    except DataError as error:
        damage.append(str(error))
    for name in manifest.files:
        try:
            manifest.verify(folder, [name])
        except DataError as error:
            if str(error) not in damage:
                damage.append(str(error))
    files = {
        name: {"bytes": file.bytes, "sha256": file.sha256, "blocks": len(file.blocks)}
        for name, file in manifest.files.items()
    }
    arrays = {name: {"shape": list(array.shape), "dtype": array.dtype} for name, array in manifest.arrays.items()}
    size = sum(file.bytes for file in manifest.files.values())
    return {**told, **_about(manifest.attributes), "bytes": size, "files": files, "arrays": arrays}


def _file(path: Path) -> dict[str, Any]:
    damage: list[str] = []
    told: dict[str, Any] = {"path": str(path), "kind": "network", "damage": damage}
    try:
        verify(path)
        with opened(path) as file:
            attributes, arrays = read_attributes(file), array_shapes(file)
    except DataError as error:
        damage.append(str(error))
        return told
    shapes = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in arrays.items()}
    return {**told, **_about(attributes), "bytes": path.stat().st_size, "arrays": shapes}


def _about(attributes: Mapping[str, Attribute]) -> dict[str, Any]:
    """Return the attributes, texts of JSON as what they say."""
    found: dict[str, Any] = {name: attributes[name] for name in TOLD if name in attributes}
    for name in ("data", "model", "config"):
        if name in attributes:
            try:
                found[name] = json.loads(str(attributes[name]))
            except (ValueError, RecursionError):
                found[name] = str(attributes[name])
    return found


def _text(told: Mapping[str, Any]) -> str:
    """Write for people."""
    state = "damaged" if told["damage"] else f"whole, {_size(told['bytes'])}"
    lines = [f"{told['path']}: a {told['kind']}, {state}", *(f"  {damage}" for damage in told["damage"])]
    lines += [f"  {name:<9} {_shown(told[name])}" for name in TOLD if name in told]
    if told.get("files"):
        header = ("file", "blocks", "size", "SHA-256")
        rows = [
            (name, str(file["blocks"] or ""), _size(file["bytes"]), file["sha256"][:16] + "...")
            for name, file in told["files"].items()
        ]
        lines += ["", *(f"  {line}" for line in aligned(header, rows, ("file", "SHA-256")).splitlines())]
    if told.get("arrays"):
        header = ("array", "shape", "type", "elements")
        rows = [
            (name, " x ".join(map(str, array["shape"])), array["dtype"], f"{prod(array['shape']):,}")
            for name, array in told["arrays"].items()
        ]
        lines += ["", *(f"  {line}" for line in aligned(header, rows, ("array", "shape")).splitlines())]
    return "\n".join([*lines, ""])


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else readable(str(value))


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
