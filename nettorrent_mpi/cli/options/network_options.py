"""The command lines that use a trained network."""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.cli.options.shared_options import add_output, add_overwrite, add_set

EVALUATE = """\
Computes loss and accuracy of RUN's network on the test set, and on the rows that the run held back for validation, on
any number of ranks:

    nettorrent evaluate runs/letters
    mpirun -n 4 nettorrent evaluate runs/letters
    nettorrent evaluate runs/letters --confusion --output report

--confusion also writes confusion.csv and .svg (how many rows of each class are taken to be which), classes.csv (rows,
precision, recall and F1 of each class), predictions.csv (every row) and, where rows are pictures, mistakes.svg: those
that the network is most sure of and wrong about. It looks at the test set; at the validation rows where there is
none."""

PREDICT = """\
Shows what the network of RUN takes pictures, or rows of numbers, to be. It needs neither MPI nor the data that the
network was trained on:

    nettorrent predict runs/pets cat.jpg dog.png
    nettorrent predict runs/pets photos/*.jpg --top 1 --json
    nettorrent predict runs/digits new.npy
    nettorrent predict runs/digits new.npz --array pixels

Pictures (PNG, JPEG, TIFF, WebP and others) become what the network was trained on, as `data import` makes them:
upright, scaled to its size, grey where it has one channel, over white where transparent. They need the extra `images`.
For a network of handwriting (mnist, letters and the other parts of EMNIST, digits) they are prepared as by `nettorrent
draw`, dark on light or light on dark, wherever and however large the character is; a picture of the network's own size,
light on dark, is taken as it is. --like says whose preparation they get instead.
Rows, (rows, ...) of .npy, .npz and HDF5 files, are as in the data set: bytes, or floating-point values on the scale to
which the run brings bytes, 0 to 1.

What cannot be read is named on standard error, the rest is answered all the same, and the exit code is 2 then."""

DRAW = """\
Shows a page on which you draw a letter or a digit, with mouse or finger, and the network of RUN reads it:

    nettorrent draw runs/letters
    nettorrent draw runs/digits --port 8800
    nettorrent draw runs/own --like mnist

The page is for this machine alone, at an address with a secret. To use it from another one, type the line `ssh ...`
that the command shows there first (for a compute node with -J LOGIN-NODE). Drawings, and pictures of handwriting, dark
on light or light on dark, are prepared as those of the data set that the network was trained on: mnist, emnist (letters
and its other parts, upright or transposed) or digits. For other networks --like says what their pictures resemble;
where their values are floating-point numbers, paper is 0 and ink is 1."""

EXPORT = """\
Writes the network of RUN into one file: its layers, its weights, the names of the classes and how inputs are prepared.
The ending of the file's name says for which programs:

    nettorrent export runs/cifar --output cifar.npz
    nettorrent export runs/cifar --output cifar.pt
    nettorrent export runs/cifar --output cifar.onnx
    nettorrent export runs/cifar/checkpoints/step-0000000400 --output cifar.h5
    nettorrent export runs/cifar --format tensorboard

.npz is for NumPy and .h5 for HDF5, with the arrays as in model.h5; images are (row, height, width, channel) there. .pt
is for PyTorch, whose own torch.load reads it, and nettorrent_mpi.torch.load_run makes a module of it; it needs PyTorch.
.onnx is for onnxruntime and others, the scaling of the inputs included; it needs the package onnx. Both have images as
(row, channel, height, width), and weights to match.

--format tensorboard, wandb or mlflow writes the metrics of the run instead, also while it goes on, on any machine that
sees its folder: for TensorBoard (`tensorboard --logdir runs` then shows the runs together; it needs the package
tensorboardX), as an offline run of Weights & Biases, or as a run of MLflow."""

INSPECT = """\
Shows what a run has: its network, data and layout, how it ended, its best figures, and its files. All weights and
checkpoints are read, and what is damaged is named; the exit code is 2 then:

    nettorrent inspect runs/letters
    nettorrent inspect runs/letters --all
    nettorrent inspect runs/letters/checkpoints/step-0000000400
    nettorrent inspect cifar.h5 --json"""

FORMATS = ("h5", "npz", "pt", "onnx", "tensorboard", "wandb", "mlflow")


def add_network_commands(commands: Any) -> None:
    """Add the commands to the subparsers."""
    evaluate = commands.add_parser(
        "evaluate", help="compute loss and accuracy of a finished run on its test set", description=EVALUATE
    )
    evaluate.add_argument("run", metavar="RUN", help="the run's folder, or one of its checkpoints")
    evaluate.add_argument(
        "--confusion",
        action="store_true",
        help="also tell which classes are taken for which, precision and recall of each, and the worst rows",
    )
    add_output(evaluate, "DIR", "the folder for the files of --confusion (default: the run's)")
    add_set(evaluate, "the run's configuration")

    predict = commands.add_parser(
        "predict", help="show what a network takes pictures or rows to be", description=PREDICT
    )
    predict.add_argument("run", metavar="RUN", help="the run's folder, one of its checkpoints, or its model.h5")
    predict.add_argument("files", nargs="+", metavar="FILE", help="pictures, and files of rows: .npy, .npz, .h5")
    predict.add_argument(
        "--top", type=int, default=3, metavar="N", help="show the N most probable classes (default: 3)"
    )
    predict.add_argument(
        "--array", metavar="NAME", help="the array of rows in files that have several (default: x_test, or else x)"
    )
    predict.add_argument(
        "--like", metavar="NAME",
        help="prepare pictures as mnist, emnist or digits did, or none (default: as the network's data set did)",
    )  # fmt: skip
    predict.add_argument("--json", action="store_true", help="write a list of JSON, with one element for each row")

    draw = commands.add_parser("draw", help="draw a letter or digit, and let a network read it", description=DRAW)
    draw.add_argument("run", metavar="RUN", help="the run's folder, one of its checkpoints, or its model.h5")
    draw.add_argument("--like", metavar="NAME", help="prepare drawings as mnist, emnist or digits did")
    draw.add_argument("--port", type=int, default=0, metavar="N", help="the port of the page (default: a free one)")

    export = commands.add_parser("export", help="write the network of a run for other programs", description=EXPORT)
    export.add_argument("run", metavar="RUN", help="the run's folder, or one of its checkpoints")
    add_output(
        export, "FILE",
        "the file to write, whose name ends in .h5, .npz, .pt or .onnx; of metrics, the folder (default: one in the "
        "run's folder)",
    )  # fmt: skip
    export.add_argument(
        "--format", choices=FORMATS, metavar="FORMAT",
        help="h5, npz, pt or onnx: the network, by default in a file of the run's name with this ending; tensorboard, "
        "wandb or mlflow: the metrics (default: the network, as the ending of FILE says)",
    )  # fmt: skip
    add_overwrite(export)

    inspect = commands.add_parser(
        "inspect", help="show what a run, a checkpoint or a file of weights has, and whether it is whole",
        description=INSPECT,
    )  # fmt: skip
    inspect.add_argument(
        "path", metavar="RUN", help="a run's folder, a checkpoint, the folder of them, or a file of weights"
    )
    inspect.add_argument("--all", action="store_true", help="also show every array, checksums and versions")
    inspect.add_argument("--json", action="store_true", help="write everything as JSON")
