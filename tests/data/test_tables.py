"""Tables in text and archives of arrays become HDF5 data sets, row for row; what is wrong is told by file and line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.data.csv_file import import_csv
from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.npz_file import import_npz
from nettorrent_mpi.data.rows import Split
from nettorrent_mpi.plan.errors import ConfigError, DataError, OutputError

Array = np.ndarray[Any, Any]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "t.csv", encoding: str = "utf-8") -> Path:
        (tmp_path / name).write_text(text, encoding=encoding)
        return tmp_path / name

    return write


def values(split: Split | None) -> Array:
    assert split is not None
    out = np.empty((split.rows, *split.shape), np.float64)
    split.inputs().batch(np.arange(split.rows), out)
    return out


IRIS = "length,width,species\n" + "".join(f"{n}.5,{n * 2},{'iris' if n % 2 else 'rose'}\n" for n in range(20))


def test_a_table_with_names_of_classes(table: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / "iris.h5"
    made = import_csv(table(IRIS), target)  # `species` is a usual name
    assert made == (16, 4, (2,), ("iris", "rose"), ())
    dataset = open_dataset("hdf5", str(target))
    assert dataset.class_names == ("iris", "rose")
    assert dataset.test is not None
    rows = np.concatenate([values(dataset.train), values(dataset.test)])
    labels = np.concatenate([dataset.train.targets(), dataset.test.targets()])
    np.testing.assert_array_equal(rows[:, 1], 2 * (rows[:, 0] - 0.5))
    np.testing.assert_array_equal(labels, (rows[:, 1] // 2 + 1) % 2)
    assert sorted(rows[:, 1]) == [2 * n for n in range(20)]
    assert np.bincount(dataset.test.targets()).tolist() == [2, 2]  # a fifth of each class
    with pytest.raises(OutputError, match="exists"):
        import_csv(table(IRIS), target)


@pytest.mark.parametrize("label", ["Species", "3", "-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_and_separators(table: Callable[..., Path], tmp_path: Path, label: str, separator: str) -> None:
    text = "\ufeff" + IRIS.replace(",", separator).replace("iris", '"iris"') + "\n"
    made = import_csv(table(text), tmp_path / "t.h5", label=label, test=0.0)
    assert made == (20, 0, (2,), ("iris", "rose"), ())


def test_pixels_in_columns_become_images(table: Callable[..., Path], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12))
    text = "".join(",".join(map(str, [n % 2 + 5, *row])) + "\n" for n, row in enumerate(pixels.tolist()))
    path, held = table(text), table("".join(text.splitlines(keepends=True)[:3]), "held.csv")
    made = import_csv(path, tmp_path / "i.h5", (3, 4), label="1", test=held)
    assert made == (20, 3, (3, 4, 1), ("5", "6"), ())
    dataset = open_dataset("hdf5", str(tmp_path / "i.h5"))
    assert dataset.train.dtype == np.uint8
    np.testing.assert_array_equal(np.rint(values(dataset.train) * 255).reshape(20, 12), pixels)
    np.testing.assert_array_equal(np.rint(values(dataset.test) * 255).reshape(3, 12), pixels[:3])
    np.testing.assert_array_equal(dataset.train.targets(), np.arange(20) % 2)
    colours = import_csv(path, tmp_path / "c.h5", (2, 2, 3), label="1")
    assert colours.shape == (2, 2, 3)
    with pytest.raises(DataError, match="12 numbers in a row, which are no image of 5 x 2"):
        import_csv(path, tmp_path / "n.h5", (5, 2), label="1")


def test_targets_of_a_regression(table: Callable[..., Path], tmp_path: Path) -> None:
    path = table("a,b,y\n" + "".join(f"{n},1,{n / 4}\n" for n in range(10)))
    made = import_csv(path, tmp_path / "r.h5")
    assert made.classes == ()
    assert made.notes == ("the targets are numbers: train with loss: mean_squared_error",)
    dataset = open_dataset("hdf5", str(tmp_path / "r.h5"))
    assert dataset.classes is None
    np.testing.assert_array_equal(dataset.train.targets()[:, 0] * 4, values(dataset.train)[:, 0])


def test_what_is_doubtful_is_told(table: Callable[..., Path], tmp_path: Path) -> None:
    wide = "".join(",".join([*map(str, range(n, n + 64)), str(n % 2)]) + "\n" for n in range(10))
    assert "give --size" in import_csv(table(wide), tmp_path / "w.h5", label="-1").notes[0]
    many = "id,a\n" + "".join(f"n{n},{n}\n" for n in range(60))
    assert "is the label the right one?" in import_csv(table(many), tmp_path / "m.h5", label="id").notes[-1]


@pytest.mark.parametrize(
    ("text", "label", "told"),
    [
        ("", None, "t.csv: is empty"),
        ("a\n1\n", None, "one column; separate columns by"),
        ("a,label\n", None, "has a header and no rows"),
        ("a,b,label\n1,2,x\n1,y\n", None, "t.csv: line 3 has 2 columns, and the first one 3"),
        ("a,b,label\n1,2,x\n1,two,y\n", None, "t.csv: line 3, b: 'two' is no finite number"),
        ("a,b,label\n1,,x\n", None, "t.csv: line 2, b: there is no value; write numbers"),
        ("a,b,label\n1,nan,x\n", None, "line 2, b: 'nan' is no finite number"),
        ("a,b,label\n1,1e60,x\n", None, "line 2, b: '1e60' is no finite number"),
        ("1,2,x\n\n1,2,\n", "3", "t.csv: line 3 has no label"),
        ('1,2,x\n1,"2,y\n', "3", "cannot be read"),
        ("1,2,x\n1,2,x\n", "3", "all rows have the label x"),
        ("1,2,3\n4,5,6\n", None, "--label NAME or NUMBER has to say which column of"),
        ("1,2,3\n4,5,6\n", "4", "has no such column; columns count from 1 to 3"),
        ("1,2,3\n4,5,6\n", "0", "has no such column"),
        ("a,b,c\n4,5,6\n", "d", "has no such column; there are a, b, c"),
    ],
)
def test_damaged_tables(table: Callable[..., Path], tmp_path: Path, text: str, label: str | None, told: str) -> None:
    with pytest.raises((DataError, ConfigError)) as caught:
        import_csv(table(text), tmp_path / "bad.h5", label=label)
    assert told in str(caught.value)
    assert not (tmp_path / "bad.h5").exists()


def test_tables_that_are_no_text_or_do_not_agree(table: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no text in UTF-8"):
        import_csv(table("ä,ö,label\n1,2,ü\n", encoding="latin-1"), tmp_path / "x.h5")
    with pytest.raises(DataError, match="has other columns than"):
        import_csv(table(IRIS), tmp_path / "x.h5", test=table("length,species\n1,iris\n", "other.csv"))
    with pytest.raises(DataError, match="no such file"):
        import_csv(tmp_path / "missing.csv", tmp_path / "x.h5")
    made = import_csv(table("1,2,3\n4,5,6\n7,8,9\n4,4,4\n"), tmp_path / "x.h5", label="3", header=True, test=0.0)
    assert made.rows == 3


# -- archives of arrays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("x", "y"), ("x_train", "y_train"), ("train_images", "train_labels")])
def test_archives_by_their_usual_names(tmp_path: Path, names: tuple[str, str]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (12, 5, 4))
    y = (np.arange(12) % 3)[:, None]
    tested = {"train_images": ("test_images", "test_labels")}.get(names[0], ("x_test", "y_test"))
    arrays = dict(zip((*names, *tested), (x, y, x[:6], y[:6]), strict=True))
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    made = import_npz(tmp_path / "a.npz", tmp_path / "a.h5")
    assert made == (12, 6, (5, 4, 1), ("0", "1", "2"), ())
    dataset = open_dataset("hdf5", str(tmp_path / "a.h5"))
    assert dataset.train.dtype == np.uint8
    np.testing.assert_array_equal(np.rint(values(dataset.train)[..., 0] * 255), x)
    np.testing.assert_array_equal(dataset.train.targets(), y[:, 0])
    with pytest.raises(DataError, match="has test rows already"):
        import_npz(tmp_path / "a.npz", tmp_path / "b.h5", test=0.5)


def test_labels_in_words_are_held_out_by_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(40.0).reshape(20, 2), y=np.array(["no", "yes"] * 10))
    made = import_npz(tmp_path / "a.npz", tmp_path / "a.h5", test=0.3)
    assert made == (14, 6, (2,), ("no", "yes"), ())
    dataset = open_dataset("hdf5", str(tmp_path / "a.h5"))
    np.testing.assert_array_equal(dataset.train.targets(), values(dataset.train)[:, 0] // 2 % 2)


def test_damaged_archives(tmp_path: Path) -> None:
    path, target = tmp_path / "a.npz", tmp_path / "a.h5"
    x, y = np.ones((4, 3)), np.array([0, 1, 0, 1])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a": x, "b": y}, "has no arrays x and y or x_train and y_train"),
        ({"x": x, "y": y[:3]}, "x has 4 rows but y has 3"),
        ({"x": np.array(["a"] * 4), "y": y}, "x holds <U1; save it as numbers"),
        ({"x": x, "y": np.array([{}, {}, {}, {}])}, "holds Python objects, which are not read"),
        ({"x": np.full((4, 3), np.nan), "y": y}, "x has a value that is not finite, in row 0"),
        ({"x": x, "y": np.ones((4, 2), int)}, "y holds int64 of shape (4, 2)"),
        ({"x": x, "y": y, "x_test": x}, "x_test and y_test come together"),
        ({"x": np.ones((0, 3)), "y": y}, "x has no rows"),
    ]
    for arrays, told in cases:
        np.savez(path, **arrays)
        with pytest.raises(DataError) as caught:
            import_npz(path, target)
        assert told in str(caught.value), told
        assert str(path) in str(caught.value)
    np.savez(path, x=x, y=y)
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    with pytest.raises(DataError, match=r"is no whole \.npz"):
        import_npz(path, target)
    path.write_bytes(content.replace(b"'shape': (4, 3), }", b"'shape': (4, 3**)}"))
    with pytest.raises(DataError, match=r"is no whole \.npz"):
        import_npz(path, target)
    assert not target.exists()


def test_the_command(table: Callable[..., Path], tmp_path: Path) -> None:
    def nettorrent(*words: str | Path) -> tuple[int, str]:
        command = [sys.executable, "-m", "nettorrent_mpi", "data", "import", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    path, target = table(IRIS), tmp_path / "t.h5"
    code, told = nettorrent(path, "-o", target, "--label", "species", "--test", "0.5")
    assert (code, told) == (0, f"{target}: 10 training rows and 10 test rows of shape (2,) in 2 classes: iris, rose\n")
    code, told = nettorrent(path, "-o", target, "--size", "2")
    assert (code, "write height x width, as 32x32" in told) == (2, True)
    code, told = nettorrent(tmp_path, "-o", target, "--label", "1")
    assert (code, "--label is for tables" in told) == (2, True)
    code, told = nettorrent(table("x", "t.dat"), "-o", target)
    assert (code, "is no folder of images, no table" in told) == (2, True)
