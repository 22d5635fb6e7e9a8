"""A folder of images becomes an HDF5 data set."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.folder import import_folder
from nettorrent_mpi.plan.errors import ConfigError, DataError, OutputError

Image = pytest.importorskip("PIL.Image", reason="Pillow, the extra `images`, is not installed")

CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 10 images, 8 x 6, each of one colour: (label, number, 100)."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (6, 8), (label, number, 100)).save(tmp_path / "images" / name / f"{number:02}.png")
    (tmp_path / "images" / ".cache").mkdir()
    (tmp_path / "images" / "ant" / ".hidden").write_text("not an image")
    return tmp_path / "images"


def test_import_and_read_back(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    target = tmp_path / "set.h5"
    result = import_folder(folder, target, test=0.2, progress=lambda done, total: calls.append((done, total)))
    assert result == (24, 6, (8, 6, 3), CLASSES)
    assert calls == [(n, 30) for n in range(1, 31)]
    dataset = open_dataset("hdf5", str(target))
    assert (dataset.shape, dataset.classes) == ((8, 6, 3), 3)
    assert dataset.test is not None
    seen = []
    for split, each in ((dataset.train, 8), (dataset.test, 2)):
        x = np.empty((split.rows, 8, 6, 3), np.float64)
        split.inputs().batch(np.arange(split.rows), x)
        colours = np.rint(x * 255).astype(int)
        labels = split.targets()
        np.testing.assert_array_equal(np.bincount(labels), [each] * 3)
        np.testing.assert_array_equal(colours[..., 0], np.broadcast_to(labels[:, None, None], (split.rows, 8, 6)))
        seen += [tuple(colour) for colour in colours[:, 0, 0]]
    assert sorted(seen) == [(label, number, 100) for label in range(3) for number in range(10)]


def test_grey_images_have_one_channel_and_a_size_scales(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*/*.png"):
        Image.open(path).convert("L").save(path)
    assert import_folder(folder, tmp_path / "grey.h5").shape == (8, 6, 1)
    Image.new("RGB", (20, 20)).save(folder / "ant" / "big.jpg")
    with pytest.raises(DataError, match=r"is 20 x 20, but .*00\.png is 8 x 6; give a size") as caught:
        import_folder(folder, tmp_path / "mixed.h5")
    assert caught.value.file == str(folder / "ant" / "big.jpg")
    assert import_folder(folder, tmp_path / "mixed.h5", size=(5, 4)).shape == (5, 4, 3)


def test_an_existing_file_stays_unless_told(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "set.h5"
    target.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        import_folder(folder, target)
    assert target.read_text() == "precious"
    import_folder(folder, target, overwrite=True)
    assert open_dataset("hdf5", str(target)).train.rows == 30


def test_a_broken_image_is_named_and_nothing_is_left_behind(folder: Path, tmp_path: Path) -> None:
    good = (folder / "cow" / "03.png").read_bytes()
    for content in (b"", b"GIF89a nonsense", good[:45]):
        (folder / "cow" / "03.png").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as an image") as caught:
            import_folder(folder, tmp_path / "set.h5")
        assert caught.value.file == str(folder / "cow" / "03.png")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_folders_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "set.h5"
    with pytest.raises(DataError, match="no such folder"):
        import_folder(tmp_path / "nowhere", target)
    with pytest.raises(DataError, match="no sub-folders"):
        import_folder(folder / "ant", target)
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match="holds no images") as caught:
        import_folder(folder, target)
    assert caught.value.file == str(folder / "dog")
    Image.new("I;16", (6, 8)).save(folder / "dog" / "deep.png")
    with pytest.raises(DataError, match="not 8 bits per channel"):
        import_folder(folder, target)
    (folder / "dog" / "deep.png").unlink()
    (folder / "dog").rmdir()
    with pytest.raises(ConfigError, match="fraction of test images"):
        import_folder(folder, target, test=1.0)
    with pytest.raises(ConfigError, match="at least 1 x 1"):
        import_folder(folder, target, size=(0, 4))
    with pytest.raises(OutputError, match="cannot write"):
        import_folder(folder, tmp_path / "missing" / "set.h5")


def test_without_pillow(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(OutputError, match=r"pip install 'nettorrent_mpi\[images\]'"):
        import_folder(folder, tmp_path / "set.h5")
