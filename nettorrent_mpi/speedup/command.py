"""The command `nettorrent speedup`: checks all arguments before anything is started or written."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# isort: split
from nettorrent_mpi.cli.launching import stopped_like_interrupted
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.data.storage import check_folder
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.run_lock import RunLock
from nettorrent_mpi.engine.run_plan import DeviceKind
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.engine.usage import WARM_UP, faster
from nettorrent_mpi.plan.errors import ChildError, ConfigError, LaunchError, NetTorrentError, OutputError
from nettorrent_mpi.speedup import machine, modes, sides
from nettorrent_mpi.speedup.comparison import Comparison, tell
from nettorrent_mpi.speedup.machine import Launcher
from nettorrent_mpi.speedup.modes import MODES, VALIDATION, Candidate
from nettorrent_mpi.speedup.runs import PROGRAM
from nettorrent_mpi.speedup.sides import PEERS, Side

TORCH_WARM_UP = 11  # steps: torch_peer.WARM_UP and one of an epoch's last size; that module loads PyTorch
HOW_TO_INSTALL = (  # PyPI's PyTorch brings gigabytes of CUDA
    "PyTorch is not installed, so the comparison omits it: pip install 'nettorrent_mpi[compare]' "
    "--extra-index-url https://download.pytorch.org/whl/cpu"
)
HOW_TO_INSTALL_ON_GPU = HOW_TO_INSTALL.partition(" --extra-index-url")[0]


def speedup(args: argparse.Namespace, program: Sequence[str] = PROGRAM) -> None:
    """Run the command. `program` is the command line by which ranks are started. Raises UserErrors before anything is
    started or written, ChildError if a program fails."""
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        raise LaunchError("speedup starts the ranks itself: run it without mpirun")
    counts = _counts(args.ranks)
    names = _chosen(args.modes, MODES, "mode")
    asked = _asked_peers(args.peers, args.baseline == "gpu")
    for option, value in (("--repeats", args.repeats), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: at least 1")
    if args.accuracy is not None and not 0 < args.accuracy <= 1:
        raise ConfigError(f"--accuracy {args.accuracy}: a fraction above 0 and at most 1, as 0.95")
    config = configuration.load(args.config, args.changes)
    device = _device(args.baseline, config)
    gpus = machine.gpus_of_node() if args.baseline == "gpu" else []
    shared = modes.baseline(config, names, device)
    one, setup = modes.serial(shared)
    if args.accuracy is not None and setup.dataset.classes is None:
        raise ConfigError(f"--accuracy: data set {config.data.name} has no classes, so there is no accuracy")
    if args.accuracy is not None and setup.dataset.test is None and not len(setup.sampler.validation_rows):
        raise ConfigError("--accuracy: there are no test rows; keep some back with --set data.validation=0.1")
    launcher = Launcher(args.launcher)
    plans = [one, *([modes.alone_on_gpu(shared)] if gpus and device == "cpu" else [])]
    for ranks in counts:
        plans += modes.plans(names, config, shared, setup.network.facts, ranks) if ranks > 1 else []
    name = Path(args.config).stem if args.config else "digits"
    folder = Path(args.output or f"runs/speedup-{name}")
    _check_folder(folder, args.overwrite)

    theirs = sides.peers_on_gpu(asked, setup) if gpus else sides.peers(asked, sorted({1, *counts}), setup)
    everyone = [*sides.ours(plans), *theirs]
    notes = _notes(config, shared, setup, args.peers, args.baseline == "gpu")
    results = _about(args, name, setup, one, counts, names, everyone, notes, gpus)
    comparison = Comparison(folder, launcher, plans, everyone, results, shared, program)
    with RunLock(folder):
        try:
            with stopped_like_interrupted():
                comparison.run(args.repeats, args.steps, args.accuracy)
        except ChildError as error:
            comparison.fail({"command": error.command, "exit_code": error.code, "lines": error.lines})
            raise NetTorrentError(f"{error}\nthe results so far are in {folder / 'results.json'}") from error
        except KeyboardInterrupt:
            comparison.fail({"interrupted": True})
            raise NetTorrentError(f"interrupted; the results so far are in {folder / 'results.json'}") from None
        comparison.finish()


# ---- arguments -----------------------------------------------------------------------------------
def _counts(text: str) -> list[int]:
    """Parse rank counts. The first need not be 1: one rank is always measured."""
    words = text.split(",")
    counts = [int(word) for word in words if word.strip().isdecimal()]
    if len(counts) < len(words) or 0 in counts or counts != sorted(set(counts)):
        raise ConfigError(f"--ranks {text}: ascending whole numbers, at least 1, as 1,2,4")
    return counts


def _chosen(text: str | None, known: Sequence[str] | dict[str, Any], what: str) -> list[str]:
    """Return the words of a comma-separated list, each once; all known ones without a list."""
    if text is None:
        return list(known)
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise ConfigError(f"--{what}s {text}: unknown {what} {word!r}; there are {', '.join(known)}")
    return list(dict.fromkeys(words))


def _device(baseline: str, config: Config) -> DeviceKind:
    """Return what the modes compute on: where they are compared with a GPU, on GPUs unless they are to use CPU
    cores."""
    if baseline == "gpu":
        return "cpu" if config.device == "cpu" else "gpu"
    if config.device == "gpu":
        raise ConfigError("device is gpu: compare with one GPU (--baseline gpu), or on CPU cores (--set device=cpu)")
    return "cpu"


def _asked_peers(text: str | None, on_gpu: bool = False) -> list[str]:
    if text == "none":
        return []
    there = sides.torch_is_there()
    known = sides.ON_GPU if on_gpu else list(PEERS)
    how = HOW_TO_INSTALL_ON_GPU if on_gpu else HOW_TO_INSTALL
    if text is None:
        if not there:
            tell(how)
        return list(known) if there else []
    chosen = _chosen(text, known, "peer")
    if not there:
        raise ConfigError(f"--peers {text}: {how}")
    return chosen


def _check_folder(folder: Path, overwrite: bool) -> None:
    check_folder(folder)
    if (folder / "results.json").exists() and not overwrite:
        raise OutputError(
            f"{folder} holds another comparison's results.json; choose another folder with --output DIR, or replace "
            "it with --overwrite"
        )


def _notes(config: Config, shared: Config, setup: Setup, asked: str | None, on_gpu: bool) -> list[str]:
    """Return the report's remarks on the setup of the comparison."""
    hint = faster(setup.network, setup.options, make_device("cpu", setup.options.kernels))
    notes = []
    if hint:
        tell(hint)
        notes.append(f"Here {hint}.")
    if shared.data.validation != config.data.validation:
        notes.append(
            f"elite chooses on validation rows, and the configuration keeps none back: here all sides train without a "
            f"tenth of the training rows (data.validation: {VALIDATION})."
        )
    if asked is None and not sides.torch_is_there():
        notes.append((HOW_TO_INSTALL_ON_GPU if on_gpu else HOW_TO_INSTALL) + ".")
    return notes


def _about(
    args: argparse.Namespace,
    name: str,
    setup: Setup,
    one: Candidate,
    counts: list[int],
    names: list[str],
    everyone: list[Side],
    notes: list[str],
    gpus: list[str],
) -> dict[str, Any]:
    """Return the contents of results.json before any measurement."""
    assert one.config is not None
    facts, train = setup.network.facts, one.config.train
    return {
        "format": 3,
        "complete": False,
        "failure": None,
        "command": shlex.join(["nettorrent", *args.command_line]),
        "config": name,
        "settings": to_plain(one.config),
        "network": {
            "weight_layers": len(facts),
            "parameters": sum(layer.parameters for layer in facts),
            "operations": sum(layer.operations for layer in facts),
            "batch_norm": setup.network.has_batch_norm,
        },
        "batch_size": train.batch_size,
        "dtype": one.config.dtype,
        "optimizer": train.optimizer.kind,
        "baseline": args.baseline,
        "ranks": counts,
        "modes": names,
        "repeats": args.repeats,
        "steps": args.steps,
        "warm_up": {"ours": WARM_UP, "torch": TORCH_WARM_UP},
        "host": machine.describe_host(gpus),
        "mpi": None,
        "kernels": None,
        "notes": notes,
        "sides": [side.plain() for side in everyone],
        "traces": [],
        "accuracy": None,
    }
