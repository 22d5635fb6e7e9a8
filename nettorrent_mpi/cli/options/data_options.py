"""The command lines for data and configurations."""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.cli.options.shared_options import add_output, add_overwrite
from nettorrent_mpi.plan.data_specs import DATASETS

INIT = """\
Writes a configuration with the usual options, each explained, and a network that suits the data: a small convolutional
one for images, a perceptron for other rows. The mini-batch and the number of epochs suit the number of rows.

    nettorrent init --output first.yaml
    nettorrent init --data letters --root data
    nettorrent init --root photos.h5

The first one takes the handwritten digits that ship with the package. The others write letters.yaml and
photos.yaml."""

SCHEMA = """\
Prints the JSON Schema (draft 7) of configurations: every option with its type, range, default and meaning. An editor
that has it completes keys and marks mistakes while you write: VS Code with its extension YAML, and whatever uses
yaml-language-server. Write the schema beside your configurations,

    nettorrent schema --output nettorrent.schema.json

and begin a configuration with the line

    # yaml-language-server: $schema=nettorrent.schema.json"""

COMPLETION = """\
Prints a script with which a shell completes the commands and their options when you press Tab:

    nettorrent completion bash > ~/.local/share/bash-completion/completions/nettorrent
    nettorrent completion zsh > ~/.zfunc/_nettorrent
    nettorrent completion fish > ~/.config/fish/completions/nettorrent.fish

It needs the package shtab: pip install 'nettorrent_mpi[completion]'."""

IMPORT = """\
Writes a data set that configurations name by `data: {name: hdf5, root: FILE.h5}`:

    nettorrent data import photos/ --size 32x32
    nettorrent data import iris.csv --label species --output data/iris.h5
    nettorrent data import m.csv --label 1 --size 28x28 --test m_test.csv
    nettorrent data import arrays.npz

Without --output they write photos.h5, m.h5 and arrays.h5 here."""

DATA = """\
Brings data to where configurations find them: downloads a published data set from its publisher, or makes a file (HDF5)
of your own images, tables or arrays:

    nettorrent data fetch mnist
    nettorrent data import photos/ --size 32x32
    nettorrent data import iris.csv --label species

The digits need neither: they ship with the package."""

FETCH = """\
Downloads a data set from its publisher into the folder that configurations name by `data: {root: DIR}`, and verifies
its checksums. What is there and whole is not loaded again, and a download that was interrupted goes on:

    nettorrent data fetch cifar10
    nettorrent data fetch letters --root /scratch/data

The parts of EMNIST come from one archive, which stays in that folder until all of them are fetched; you may remove it.
Without a network, it says which files to put where."""


def add_data_commands(commands: Any) -> None:
    """Add the commands to the subparsers."""
    init = commands.add_parser("init", help="write a commented configuration to begin with", description=INIT)
    init.add_argument("--data", metavar="NAME", help="the data set: " + ", ".join(DATASETS))
    init.add_argument("--root", metavar="PATH", help="the folder of the data sets (default: data), or an HDF5 file")
    add_output(init, "FILE", "the file to write, CONFIG.yaml (default: the name of the data set, .yaml)")
    add_overwrite(init)

    schema = commands.add_parser(
        "schema", help="print the JSON Schema of configurations, for editors", description=SCHEMA
    )
    add_output(schema, "FILE", "the file to write (default: the terminal)")
    add_overwrite(schema)

    completion = commands.add_parser(
        "completion", help="print a shell's script that completes commands and options", description=COMPLETION
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")

    data = commands.add_parser(
        "data", help="download published data sets, import images, tables and arrays", description=DATA
    )
    kinds = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = kinds.add_parser(
        "fetch", help="download a data set from its publisher and verify its checksums", description=FETCH
    )
    fetch.add_argument(
        "name", metavar="NAME",
        help="mnist, fashion_mnist, letters, emnist_balanced, emnist_byclass, emnist_bymerge, emnist_digits, "
        "emnist_mnist, cifar10 or cifar100 (which cifar100_coarse reads, too)",
    )  # fmt: skip
    fetch.add_argument("--root", default="data", metavar="DIR", help="the target folder (default: data)")
    importing = kinds.add_parser(
        "import", help="make a data set (HDF5) of a folder of images, a table or arrays", description=IMPORT
    )
    importing.add_argument(
        "source", metavar="SOURCE",
        help="a folder with one sub-folder of images per class, or with train/ and test/ that have these; a table "
        "(.csv, .tsv, .txt); or arrays (.npz: x, y, x_test, y_test)",
    )  # fmt: skip
    add_output(importing, "FILE", "the file to write (default: the name of SOURCE with the ending .h5, here)")
    importing.add_argument(
        "--size",
        metavar="HxW",
        help="resize all images, e.g. to 32x32; or the shape of the image in a row, also 32x32x3",
    )
    importing.add_argument(
        "--test", metavar="PART",
        help="fraction of each class held out as the test set (default: 0.2; test rows that are there are taken as "
        "they are); of a table also another one, with the test rows",
    )  # fmt: skip
    importing.add_argument(
        "--label", metavar="COLUMN",
        help="of a table: the column of the label, by its name or its number from 1 on (-1: the last one); default: "
        "the one called label, class, target or y",
    )  # fmt: skip
    importing.add_argument(
        "--header", choices=("yes", "no"),
        help="of a table: whether its first line names the columns (default: if no word of it is a number)",
    )  # fmt: skip
    add_overwrite(importing)
