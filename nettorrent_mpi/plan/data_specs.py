"""Data-set specs say what a configuration may contain for each data set: the meaning of `data.root`, and its options.

Opening them is in data/dataset.py. Only names are here, so that a configuration is checked without NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nettorrent_mpi.plan.records import dataclass


class Published(NamedTuple):
    """The size in which a data set of images is published."""

    rows: int
    test_rows: int
    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True)
class DatasetSpec:
    """A DatasetSpec says what `data:` may contain for one data set, besides the options that every data set takes.

    root: what `data.root` names; None for a data set without files.
    needs_root: whether `data.root` is required.
    options: those of OWN_OPTIONS that the data set takes.
    published: its size, by which a run is planned where the files are not.
    """

    root: str | None = None
    needs_root: bool = True
    options: tuple[str, ...] = ()
    published: Published | None = None


SYNTHETIC: dict[str, Any] = {"rows": 10_000, "test_rows": 1_000, "shape": (28, 28, 1), "classes": 10}  # unless told
OWN_OPTIONS = ("transposed", "rows", "test_rows", "shape", "classes")  # not every data set takes these

_MNIST = Published(60_000, 10_000, (28, 28, 1), 10)
# Parts of EMNIST besides the letters: rows for training and test, classes.
EMNIST: Mapping[str, tuple[int, int, int]] = {
    "balanced": (112_800, 18_800, 47),
    "byclass": (697_932, 116_323, 62),
    "bymerge": (697_932, 116_323, 47),
    "digits": (240_000, 40_000, 10),
    "mnist": (60_000, 10_000, 10),
}
_CIFAR100 = "the folder that holds cifar-100-binary/"
DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(needs_root=False),
    "mnist": DatasetSpec("the folder that holds mnist/", published=_MNIST),
    "fashion_mnist": DatasetSpec("the folder that holds fashion_mnist/", published=_MNIST),
    "letters": DatasetSpec(
        "the folder that holds letters/", options=("transposed",), published=Published(124_800, 20_800, (28, 28, 1), 26)
    ),
    **{
        f"emnist_{part}": DatasetSpec(
            "the folder that holds emnist/",
            options=("transposed",),
            published=Published(rows, test_rows, (28, 28, 1), classes),
        )
        for part, (rows, test_rows, classes) in EMNIST.items()
    },
    "cifar10": DatasetSpec(
        "the folder that holds cifar-10-batches-bin/", published=Published(50_000, 10_000, (32, 32, 3), 10)
    ),
    "cifar100": DatasetSpec(_CIFAR100, published=Published(50_000, 10_000, (32, 32, 3), 100)),
    "cifar100_coarse": DatasetSpec(_CIFAR100, published=Published(50_000, 10_000, (32, 32, 3), 20)),
    "hdf5": DatasetSpec("the file (an HDF5 file with x and y)"),
    "synthetic": DatasetSpec(needs_root=False, options=("rows", "test_rows", "shape", "classes")),
}
"""The data sets of the package, and those that `data.dataset.register_dataset` adds."""


def wrong_options(name: str, given: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield each option in `given` that data set `name` does not take, and the data sets that do."""
    for option in OWN_OPTIONS:
        value = given.get(option)
        if value is not None and value is not False and option not in DATASETS[name].options:
            yield option, " and ".join(owner for owner, spec in DATASETS.items() if option in spec.options)
