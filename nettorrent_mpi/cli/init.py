"""The command `nettorrent init`: a commented configuration to begin with, for the data at hand."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from math import prod
from pathlib import Path

from nettorrent_mpi.config.reading import loads
from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.storage import check_file
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.plan.data_specs import DATASETS
from nettorrent_mpi.plan.errors import UserError

VALIDATION = 0.1  # the part of the training rows that is held back
LEAST_BATCH, MOST_BATCH = 8, 128
STEPS, MOST_EPOCHS = 200, 100  # a training has about so many steps at least, and at most so many epochs
_HEAD = """\
# Begun by `nettorrent init`. Look at the plan, and train:
#     nettorrent train {path} --dry-run --ranks 4
#     mpirun -n 4 nettorrent train {path}
# All options: `nettorrent schema`; any value can be changed by --set, as in --set train.epochs=2.
seed: 1                          # every random number of the run comes from it, however many ranks there are
data:
  name: {name}
{root}  validation: {held:<19} # this part of the training rows is held back to measure, and to choose by
model:
  # Each layer with weights (conv2d, linear, residual) heads a swarm of ranks, with the layers after it.
  layers:
"""
_PERCEPTRON = """\
    - flatten                    # {inputs} numbers a row
    - linear: {{units: 256, activation: relu}}
    - dropout: 0.25              # in training only
    - linear: {{units: 128, activation: relu}}
"""
_CONVOLUTIONS = """\
    - conv2d: {{filters: 32, kernel: 3, padding: same, activation: relu}}
    - max_pool2d: 2              # {height} x {width} pixels become {half_height} x {half_width}
    - conv2d: {{filters: 64, kernel: 3, padding: same, activation: relu}}
    - max_pool2d: 2
    - flatten
    - linear: {{units: 128, activation: relu}}
    - dropout: 0.25              # in training only
"""
_TAIL = """\
    - linear: {{units: {outputs}}}        # {meaning}
  loss: {loss}
train:
  epochs: {epochs:<22} # passes over the {rows:,} training rows
  batch_size: {batch:<18} # rows for one update, whatever the number of ranks
  optimizer: {{adam: {{lr: 0.001}}}}   # or sgd, adagrad, rmsprop, adamw
  schedule: cosine               # the learning rate falls to zero along half a cosine; or constant, step, exponential
layout: layers                   # one swarm per layer, sized by its cost; or auto, or {{replicas: 4}}
exchange: allreduce              # how replicas agree: exactly; or gossip, elite, none
checkpoint: {{every_seconds: 600}} # what --resume goes on from, on any number of ranks
output: {output}
"""


def init(args: argparse.Namespace) -> None:
    """Write the configuration that the command line asks for. Raises UserErrors."""
    name = args.data or ("digits" if args.root is None else "hdf5")
    path = Path(args.output or f"{Path(args.root).stem if name == 'hdf5' and args.root else name}.yaml")
    check_file(path, overwrite=args.overwrite)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: the name of a configuration ends in .yaml")
    text = made(name, args.root, path)
    loads(text, str(path))  # it has no mistake
    with written(path, "--output FILE"):
        write_whole(path, text)
    shown = shlex.quote(str(path))
    sys.stdout.write(f"{path} is written; look at it, then: mpirun -n 4 nettorrent train {shown}\n")


def length(rows: int) -> tuple[int, int]:
    """Return a mini-batch and a number of epochs that suit so many training rows: ten steps an epoch where that is
    possible, and at least STEPS in all."""
    batch = min(max(LEAST_BATCH, min(MOST_BATCH, 1 << max(rows // 10, 1).bit_length() - 1)), max(rows, 1))
    steps = max(-(-rows // batch), 1)
    return batch, min(max(10, -(-STEPS // steps // 10) * 10), MOST_EPOCHS)


def made(name: str, root: str | None, path: Path) -> str:
    """Return the text for a data set; `root` is the folder or file that it needs."""
    if name not in DATASETS:
        raise UserError(f"--data {name}: there are {', '.join(DATASETS)}")
    spec = DATASETS[name]
    if not spec.needs_root and root is not None:
        raise UserError(f"--root {root}: {name} needs no files")
    if root is None and spec.needs_root:
        if name == "hdf5":
            raise UserError("hdf5 needs --root FILE.h5: `nettorrent data import` makes such a file")
        root = "data"
    dataset = open_dataset(name, root, planning=True)
    shape, classes = dataset.shape, dataset.classes
    labelled = classes is not None
    outputs = classes if classes is not None else prod(dataset.train.targets().shape[1:])
    line = "" if root is None else f"  root: {_quoted(root)}  # {spec.root}\n"
    text = _HEAD.format(path=path, name=name, root=line, held=VALIDATION)
    if len(shape) == 3 and min(shape[:2]) >= 8:
        height, width = shape[:2]
        text += _CONVOLUTIONS.format(height=height, width=width, half_height=height // 2, half_width=width // 2)
    else:
        text += _PERCEPTRON.format(inputs=f"{prod(shape):,}")
    rows = dataset.train.rows - round(VALIDATION * dataset.train.rows)
    batch, epochs = length(rows)
    return text + _TAIL.format(
        rows=rows,
        batch=batch,
        epochs=epochs,
        outputs=outputs,
        meaning="one number per class; the loss turns them into probabilities" if labelled else "what is predicted",
        loss="cross_entropy" if labelled else "mean_squared_error",
        output=f"runs/{path.stem}",
    )


def _quoted(text: str) -> str:
    """Return a text as YAML reads it."""
    return text if re.fullmatch(r"[\w~/][\w./~-]*", text) else json.dumps(text)  # JSON's texts are YAML's, too
