"""The command `nettorrent inspect`: what a run, a checkpoint or model.h5 has, and whether it is whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from nettorrent_mpi.cli.progress import clock
from nettorrent_mpi.cli.runs.run_data import RunData, read_run
from nettorrent_mpi.cli.runs.values import number, one_line
from nettorrent_mpi.cli.tables import aligned, wrapped
from nettorrent_mpi.engine.checkpoint import named_checkpoints, read_manifest
from nettorrent_mpi.engine.checkpoint_manifest import Manifest
from nettorrent_mpi.engine.model_file import MODEL, Attribute, array_shapes, opened, read_attributes, verify
from nettorrent_mpi.engine.run_files import is_run, no_run, run_of
from nettorrent_mpi.plan.errors import DataError, OutputError, UserError, listed, readable

DAMAGED = UserError.exit_code
CHECKPOINTS = 4  # the newest, which have a line each
MOST_LINES = 3  # of a network's layers

# What is told of a training, in this order; other attributes are long texts.
TOLD: dict[str, Callable[[float], str]] = {
    "step": lambda value: f"{value:,.0f}",
    "samples": lambda value: f"{value:,.0f} training rows",
    "time": lambda value: f"{value:,.1f} s",
    "loss": lambda value: f"{value:.6g}",
    "accuracy": lambda value: f"{100 * value:.2f} %",
}
ABOUT = ("ranks", "layout", "exchange")
VERSIONS = ("device", "mpi", "version", "python", "numpy", "h5py", "hdf5")
FILES = {
    "config.yaml": "the configuration as it counted; `nettorrent train` repeats the run with it",
    "run.json": "what ran where, and how it ended",
    "metrics.jsonl": "a line of figures for each report",
    "summary.json": "the results",
    "trace.json": "what each rank did when",
    "report.html": "the run as a page for a browser",
}


def inspect(path: str, *, everything: bool, as_json: bool) -> int:
    """Tell what is at `path`: a run, a checkpoint, a folder of them or model.h5. Arrays are all read, and what is
    damaged is named. Returns the exit code, 2 if anything is damaged. Raises DataError where there is nothing."""
    place = Path(path)
    found = [_file(each) if each.is_file() else _checkpoint(each) for each in _places(place)]
    damaged = any(each["damage"] for each in found)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif is_run(place):
        run = read_run(place)
        damaged = damaged or bool(run.damage)
        sys.stdout.write("\n".join([*_screen(run, found), *_further(found, everything)]) + "\n")
    else:
        lines = [line for each in found[:-1] for line in ([_head(each)] if not everything else _text(each, everything))]
        lines += _text(found[-1], everything)
        sys.stdout.write("\n".join(lines) + "\n")
    return DAMAGED if damaged else 0


def _places(path: Path) -> list[Path]:
    """Return what is to be inspected: checkpoints from the oldest on, then model.h5."""
    model = path / MODEL
    if path.is_file() and (path.suffix == model.suffix or run_of(path) is None):
        if path.suffix in (".yaml", ".yml"):
            raise no_run(path)
        return [path]
    folder = path if path.is_dir() else run_of(path) or path
    try:
        return [*named_checkpoints(folder), *([model] if model.is_file() else [])]
    except (OutputError, DataError):
        if model.is_file():
            return [model]
        if is_run(folder):
            return []
        raise


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
    found: dict[str, Any] = {name: attributes[name] for name in (*TOLD, *ABOUT, *VERSIONS) if name in attributes}
    for name in ("data", "model", "config"):
        if name in attributes:
            try:
                found[name] = json.loads(str(attributes[name]))
            except (ValueError, RecursionError):
                found[name] = str(attributes[name])
    return found


# -- for people -------------------------------------------------------------------------------------------------------


def _screen(run: RunData, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write what a newcomer wants to know of a run."""
    shown: Mapping[str, Any] = next((each for each in reversed(found) if "arrays" in each), {})
    where = [run.layout] if run.layout else []
    where += [f"{run.ranks:,} rank{'s' * (run.ranks > 1)}"] if run.ranks is not None else []
    where += [f"exchange {run.exchange}"] if run.exchange else []
    lines = [f"{one_line(str(run.path))}: {run.state}", *_network(shown)]
    lines += wrapped("  layout    ", ", ".join(where)) if where else []
    lines += [f"  {name:<9} {told}" for name, told in (("training", _length(run)), ("best", _best(run))) if told]
    rows = [_row(Path(each["path"]).relative_to(run.path), each) for each in _newest(found)]
    older = len(found) - len(rows)
    rows += [("", "", f"and {older} older checkpoint{'s' * (older > 1)}, with --all")] if older else []
    for name, meaning in FILES.items():
        file = run.path / name
        if file.is_file():
            rows.append((name, _size(file.stat().st_size), meaning))
    lines += [
        "",
        *(f"  {line}" for line in aligned(("file", "size", "contents"), rows, ("file", "contents")).split("\n")),
    ]
    return [*lines, *(f"  {readable(each)}" for each in (*run.damage, *(d for each in found for d in each["damage"])))]


def _further(found: Sequence[Mapping[str, Any]], everything: bool) -> list[str]:
    """Write all else, or how to see it."""
    if not everything:
        return ["", "--all shows every array, checksums and versions"] if found else []
    return [line for each in found for line in ("", *_text(each, everything))]


def _newest(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the networks, all damaged checkpoints and the newest others, the latest first."""
    checkpoints = [each for each in found if each["kind"] == "checkpoint"]
    few = [each for each in checkpoints if each["damage"] or each in checkpoints[-CHECKPOINTS:]]
    return [each for each in found if each not in checkpoints] + few[::-1]


def _row(name: Path, told: Mapping[str, Any]) -> tuple[str, str, str]:
    meaning = "the trained network" if told["kind"] == "network" else "the training state"
    size = "" if told["damage"] else _size(told["bytes"])
    return str(name), size, f"{meaning}: {'DAMAGED' if told['damage'] else 'whole'}"


def _length(run: RunData) -> str:
    """Write how far the training came, how long it took and how it ended."""
    last = run.points[-1] if run.points else None
    if last is None:
        return ""
    told = [f"step {last.step:,}" + (f" of {run.steps:,}" if run.steps is not None else "")]
    epoch, seconds, speed = (run.last(name) for name in ("epoch", "time", "samples_per_second"))
    told += [f"{epoch:.4g} epochs"] if epoch is not None else []
    told += (
        [f"{seconds:.1f} s" if seconds < 60 else f"{clock(seconds)} {'min' if seconds < 3600 else 'h'}"]
        if seconds is not None
        else []
    )
    told += [f"{speed:,.0f} training rows/s"] if speed is not None else []
    why = run.summary.get("stopped_by")
    return ", ".join([*told, *([f"ended by {one_line(why)}"] if isinstance(why, str) else [])])


def _best(run: RunData) -> str:
    """Write the figures of the evaluation with the best accuracy; without one, the lowest of each loss."""
    losses = ("test_loss", "validation_loss", "train_loss")
    if run.best is None:
        found = {name: min(value for _, value in run.curve(name)) for name in losses if run.curve(name)}
        return ", ".join(_loss(name, value) for name, value in found.items())
    figures = run.best.point.figures
    told = [f"{run.best.kind} accuracy {100 * run.best.accuracy:.2f} %"]
    told += [_loss(name, figures[name]) for name in losses if name in figures]
    return ", ".join(told) + (f", after epoch {figures['epoch']:.4g}" if "epoch" in figures else "")


def _loss(name: str, value: float) -> str:
    return f"{name.replace('train_', 'training ').replace('_', ' ')} {value:.4g}"


def _head(told: Mapping[str, Any]) -> str:
    state = "damaged" if told["damage"] else f"whole, {_size(told['bytes'])}"
    return "\n".join([f"{told['path']}: a {told['kind']}, {state}", *(f"  {damage}" for damage in told["damage"])])


def _text(told: Mapping[str, Any], everything: bool) -> list[str]:
    """Write what a checkpoint or a file of weights has."""
    lines = [_head(told), *_network(told)]
    lines += [
        f"  {name:<9} {show(value)}" for name, show in TOLD.items() if (value := number(told.get(name))) is not None
    ]
    about = (*ABOUT, *VERSIONS) if everything else ABOUT
    lines += [f"  {name:<9} {readable(str(told[name]))}" for name in about if name in told]
    if not everything:
        return [*lines, *([] if told["damage"] else ["", "--all shows every array, checksums and versions"])]
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
    return lines


def _network(told: Mapping[str, Any]) -> list[str]:
    """Write the layers of a network, and the data that it was trained on, as its file tells them."""
    lines, model, data = [], told.get("model"), told.get("data")
    arrays = {name: each for name, each in told.get("arrays", {}).items() if name.startswith("parameters/")}
    if isinstance(model, dict) and isinstance(model.get("layers"), list):
        layers = [_layer(each) for each in model["layers"]]
        size = sum(prod(each["shape"]) for each in arrays.values())
        told_so = wrapped("  network   ", f"{len(layers)} layers, {size:,} parameters: {', '.join(layers)}")
        lines += told_so[:MOST_LINES] + (["            ..."] if len(told_so) > MOST_LINES else [])
    if isinstance(data, dict):
        shape, rows, classes = data.get("shape"), number(data.get("rows")), number(data.get("classes"))
        words = [f"{one_line(str(data.get('name')))}:"]
        words += [f"{rows:,.0f} training rows"] if rows is not None else []
        words += [f"of {' x '.join(map(str, shape))}"] if isinstance(shape, list) else []
        names = data.get("class_names")
        named = f" ({listed([one_line(str(each)) for each in names])})" if isinstance(names, list) else ""
        words += [f"in {classes:,.0f} classes{named}"] if classes is not None else []
        lines += wrapped("  data      ", " ".join(words))[:MOST_LINES]
    return lines


def _layer(plain: Any) -> str:
    """Write a layer in a few words: its kind, its first number, and its activation."""
    kind, options = next(iter(plain.items()), ("", {})) if isinstance(plain, dict) else (plain, {})
    options = options if isinstance(options, dict) else {"": options}
    numbers = [f"{value:g}" for value in options.values() if number(value) is not None][:1]
    activation = options.get("activation")
    return one_line(" ".join([str(kind), *numbers, *([str(activation)] if isinstance(activation, str) else [])]))


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"
