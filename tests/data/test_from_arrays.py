"""Data sets of one's own: arrays come back row for row, mistakes name the array; a registered name opens one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.config.reading import loads
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.data import dataset as opening
from nettorrent_mpi.data.dataset import DataOptions, open_dataset, register_dataset
from nettorrent_mpi.data.from_arrays import from_arrays, unlabelled
from nettorrent_mpi.data.rows import Dataset, Split
from nettorrent_mpi.plan.data_specs import DATASETS
from nettorrent_mpi.plan.errors import ConfigError, DataError

Array = np.ndarray[Any, Any]
ROWS, SHAPE = 20, (4, 3, 2)
X = np.random.default_rng(0).integers(0, 256, (ROWS, *SHAPE), np.uint8)
F = np.random.default_rng(1).standard_normal((ROWS, *SHAPE))
Y = np.arange(ROWS) % 3


def gather(split: Split, indices: Any) -> Array:
    out = np.full((len(indices), *split.shape), np.nan)
    split.inputs().batch(np.asarray(indices, np.intp), out)
    return out


def test_bytes_are_scaled_and_labels_counted() -> None:
    made = from_arrays(X, Y, X[:5], [7, 0, 1, 2, 0], mean=0.5, std=[0.25, 0.5])
    assert (made.shape, made.classes, made.train.rows) == (SHAPE, 8, ROWS)
    assert made.test is not None
    np.testing.assert_allclose(gather(made.train, [3, 19, 3]), (X[[3, 19, 3]] / 255.0 - 0.5) / [0.25, 0.5], rtol=1e-12)
    np.testing.assert_array_equal(made.train.targets(), Y)
    assert made.test.targets().dtype == np.int64
    assert made.test.targets().tolist() == [7, 0, 1, 2, 0]
    assert from_arrays(X, Y, classes=5).classes == 5
    assert from_arrays(X, Y).test is None


@pytest.mark.parametrize("x", [F, F.astype(">f4"), F.astype(np.float16), F.swapaxes(1, 2).copy().swapaxes(1, 2)])
def test_floats_are_taken_as_they_are(x: Array) -> None:
    made = from_arrays(x, np.arange(ROWS, dtype=">f8")[:, np.newaxis])
    assert made.classes is None
    np.testing.assert_array_equal(gather(made.train, range(ROWS)), x.astype(np.float64))
    assert made.train.targets().dtype.isnative
    np.testing.assert_array_equal(made.train.targets()[:, 0], np.arange(ROWS))


def test_contiguous_arrays_are_not_copied() -> None:
    x = X.copy()
    inputs = from_arrays(x, Y).train.inputs()
    x[2] = 255
    out = np.empty((1, *SHAPE))
    inputs.batch(np.array([2]), out)
    assert (out == 1.0).all()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((X.astype(np.int16), Y), "x holds int16; write it as uint8 or floating"),
        ((X[:, 0, 0, 0], Y), r"x has shape \(20,\)"),
        ((X[:0], Y[:0]), r"x has shape \(0, 4, 3, 2\)"),
        ((X, Y[:-1]), "x has 20 rows but y has 19"),
        ((X, Y.astype(float)), r"y holds float64 of shape \(20,\)"),
        ((X, Y[:, np.newaxis]), r"y holds int64 of shape \(20, 1\)"),
        ((X, Y - 1), "y: label -1 of row 0; number the classes 0, 1, 2"),
        ((X, Y, X), "x_test and y_test come together"),
        ((X, Y, X, Y - 1), "y_test: label -1 of row 0"),
        ((X, Y, X[:, 1:], Y), r"x_test has rows of \(3, 3, 2\) uint8, x of \(4, 3, 2\) uint8"),
        ((X, Y, F, Y), r"x_test has rows of \(4, 3, 2\) float64, x of \(4, 3, 2\) uint8"),
        ((X, Y, X, F[:, 0, 0]), r"y_test has rows of \(2,\) float64, y of \(\) int64"),
        (([["a", "b"]], [1]), "x holds <U1"),
    ],
)
def test_arrays_that_are_no_data_set(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(DataError, match=told):
        from_arrays(*arguments)


def test_classes_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"y: label 2 of row 2 is not in 0\.\.1"):
        from_arrays(X, Y, classes=2)
    with pytest.raises(DataError, match="classes=2 is for integer labels"):
        from_arrays(X, F[:, 0, 0], classes=2)
    with pytest.raises(ConfigError, match="or 2, one for each channel"):
        from_arrays(X, Y, mean=[1, 2, 3])


def test_rows_to_predict_are_prepared_as_the_training_rows_are() -> None:
    trained = from_arrays(X, Y, mean=0.5, std=0.25).train
    want = gather(trained, range(ROWS))
    np.testing.assert_array_equal(gather(unlabelled(X, trained, np.float64), range(ROWS)), want)
    np.testing.assert_allclose(gather(unlabelled(X / 255.0, trained, np.float64), range(ROWS)), want, rtol=1e-12)
    floating = from_arrays(F, Y, mean=0.5).train
    np.testing.assert_array_equal(gather(unlabelled(F, floating, np.float64), range(ROWS)), F - 0.5)
    assert unlabelled(X[:0], trained, np.float64).rows == 0
    for x, like, told in (
        (X[0], trained, r"the network reads rows of \(4, 3, 2\); write x\[np.newaxis\] for a single row"),
        (X[:, 1:], trained, r"x has shape \(20, 3, 3, 2\)"),
        (X, floating, "x holds uint8; make it floating"),
        (X.astype(int), trained, "x holds int64; make it uint8 or floating"),
    ):
        with pytest.raises(DataError, match=told):
            unlabelled(x, like, np.float64)


@pytest.fixture
def mine() -> Iterator[None]:
    @register_dataset("mine", options=("rows",))
    def open_mine(root: str | None, options: DataOptions) -> Dataset:
        rows = options.rows or ROWS
        return from_arrays(X[:rows], Y[:rows], mean=options.mean, std=options.std)

    yield
    del DATASETS["mine"], opening._OPENERS["mine"]


@pytest.mark.usefixtures("mine")
def test_a_registered_data_set_can_be_named_in_a_configuration() -> None:
    text = "data: {name: mine, rows: 7, root: anywhere}\nmodel: {layers: [linear: 3], loss: cross_entropy}\n"
    text += "train: {epochs: 1, batch_size: 4, optimizer: {sgd: {lr: 0.1}}}\n"
    config = loads(text, "mine.yaml")
    assert (config.data.name, config.data.rows) == ("mine", 7)
    assert to_plain(config)["data"]["rows"] == 7
    assert "shape" not in to_plain(config)["data"]
    made = open_dataset("mine", None, options=DataOptions(rows=config.data.rows))
    assert (made.name, made.train.rows) == ("mine", 7)
    with pytest.raises(ConfigError, match=r"mine.yaml:1: data.shape: is only for synthetic, not for mine"):
        loads(text.replace("rows: 7", "shape: [4]"), "mine.yaml")
    with pytest.raises(ConfigError, match=r"did you mean mine\?"):
        loads(text.replace("name: mine", "name: mime"), "mine.yaml")


def test_names_and_options_that_cannot_be_registered() -> None:
    with pytest.raises(ConfigError, match="mnist comes with the package"):
        register_dataset("mnist")
    with pytest.raises(ConfigError, match="no such option 'colour'; there are transposed, rows"):
        register_dataset("mine", options=("colour",))

    @register_dataset("mine", needs_root=True)
    def first(root: str | None, options: DataOptions) -> Dataset:
        raise AssertionError

    register_dataset("mine")(lambda root, options: from_arrays(X, Y))
    assert open_dataset("mine", None).train.rows == ROWS
    del DATASETS["mine"], opening._OPENERS["mine"]
