"""A folder of images becomes an HDF5 data set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import h5py
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
    assert result == (24, 6, (8, 6, 3), CLASSES, ())
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
    grey = import_folder(folder, tmp_path / "grey.h5")
    assert (grey.shape, grey.rows, grey.test_rows) == ((8, 6, 1), 24, 6), "a fifth is held out unless told"
    Image.new("RGB", (20, 20)).save(folder / "ant" / "big.jpg")
    with pytest.raises(DataError, match=r"is 20 x 20, but .*\.png is 8 x 6; give a --size") as caught:
        import_folder(folder, tmp_path / "mixed.h5")
    assert caught.value.file == str(folder / "ant" / "big.jpg")
    assert import_folder(folder, tmp_path / "mixed.h5", size=(5, 4)).shape == (5, 4, 3)


def test_an_existing_file_stays_unless_told(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "set.h5"
    target.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        import_folder(folder, target)
    assert target.read_text() == "precious"
    import_folder(folder, target, overwrite=True, test=0.0)
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
    with pytest.raises(DataError, match="holds one class, images, so there is nothing to tell apart"):
        import_folder(tmp_path, target)
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match="holds no images") as caught:
        import_folder(folder, target)
    assert caught.value.file == str(folder / "dog")
    Image.new("I;16", (6, 8)).save(folder / "dog" / "deep.png")
    with pytest.raises(DataError, match="not 8 bits per channel"):
        import_folder(folder, target)
    (folder / "dog" / "deep.png").unlink()
    (folder / "dog").rmdir()
    with pytest.raises(ConfigError, match="fraction of test rows"):
        import_folder(folder, target, test=1.0)
    with pytest.raises(ConfigError, match="at least 1 x 1"):
        import_folder(folder, target, size=(0, 4))
    with pytest.raises(OutputError, match=r"there is no folder .*missing: make it"):
        import_folder(folder, tmp_path / "missing" / "set.h5")


def stored(path: Path, suffix: str = "") -> tuple[np.ndarray[Any, Any], list[int]]:
    with h5py.File(path) as file:
        return file[f"x{suffix}"][...], file[f"y{suffix}"][...].tolist()


def test_images_are_read_as_they_are_shown(tmp_path: Path) -> None:
    """Upright, over white where they are transparent, the first of several frames; each is counted in a line."""
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
    wide = np.zeros((6, 8, 3), np.uint8)
    wide[:3] = 200  # the upper half as stored; turned by 90 degrees for orientation 6: the right half
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "in/a/phone.png", exif=exif)
    hidden = Image.new("RGBA", (6, 8), (255, 0, 0, 0))
    hidden.paste((0, 0, 255, 255), (0, 0, 3, 8))
    hidden.save(tmp_path / "in/a/seen.png")
    palette = Image.new("P", (6, 8), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "in/b/palette.png", transparency=0)
    frames = [Image.new("RGB", (6, 8), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "in/b/moves.gif", save_all=True, append_images=frames[1:])
    made = import_folder(tmp_path / "in", tmp_path / "set.h5", test=0.0)
    assert made.notes == (
        f"images turned upright, as their EXIF orientation says: 1 ({tmp_path}/in/a/phone.png)",
        f"images of which only the first frame is taken: 1 ({tmp_path}/in/b/moves.gif)",
        "classes without test images: 2 (a, ...)",
        f"transparent images laid over white: 2 ({tmp_path}/in/a/seen.png, ...)",
    )
    rows, labels = stored(tmp_path / "set.h5")
    assert (made.shape, labels) == ((8, 6, 3), [0, 0, 1, 1])
    phone, seen, moves, over = rows
    assert (phone[:, :3] == 0).all()
    assert (phone[:, 3:] == 200).all()
    assert (seen[:, :3] == (0, 0, 255)).all()
    assert (seen[:, 3:] == 255).all()
    assert (moves == (255, 0, 0)).all()
    assert (over == 255).all()


def test_everything_below_a_class_is_included_or_counted(folder: Path, tmp_path: Path) -> None:
    deep = folder / "ant" / "2024" / "may"
    deep.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (6, 8), (0, number, 7)).save(deep / f"{number}.png")
    (folder / "bee" / "gone.png").symlink_to("nowhere.png")
    (folder / "ant" / "round").symlink_to(folder / "ant")
    (folder / "bee" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    (folder / "__MACOSX" / "ant").mkdir(parents=True)
    (folder / "readme.txt").write_text("x")
    made = import_folder(folder, tmp_path / "set.h5", test=0.0)
    assert (made.rows, made.classes) == (33, CLASSES)
    assert made.notes == (
        f"images in folders inside their class: 3 ({deep}/0.png, ...)",
        f"links left out that lead to a folder above: 1 ({folder}/ant/round)",
        f"links left out that lead nowhere: 1 ({folder}/bee/gone.png)",
        f"files left out beside the folders of the classes: 1 ({folder}/readme.txt)",
        "classes without test images: 3 (ant, ...)",
    )


def test_folders_train_and_test_are_taken_as_they_are(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "divided"
    (whole / "test" / "cow").mkdir(parents=True)
    folder.rename(whole / "Train")
    (whole / "Train" / "cow" / "03.png").rename(whole / "test" / "cow" / "03.png")
    made = import_folder(whole, tmp_path / "set.h5")
    assert (made.rows, made.test_rows, made.classes) == (29, 1, CLASSES)
    assert made.notes == ("classes without test images: 2 (ant, ...)",)
    rows, labels = stored(tmp_path / "set.h5", "_test")
    assert labels == [2]
    assert (rows == (2, 3, 100)).all()
    with pytest.raises(DataError, match="divide the images already: leave out --test"):
        import_folder(whole, tmp_path / "other.h5", test=0.2)
    (whole / "test" / "cow").rename(whole / "test" / "yak")
    with pytest.raises(DataError, match=r"has classes that .*Train lacks: yak \(there are ant, bee, cow\)"):
        import_folder(whole, tmp_path / "other.h5")


@pytest.mark.slow
def test_thousands_of_classes_and_their_order(tmp_path: Path) -> None:
    Image.new("L", (1, 1)).save(tmp_path / "0.pgm")
    for number in range(4200):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        os.link(tmp_path / "0.pgm", tmp_path / "in" / str(number) / "0.pgm")
    made = import_folder(tmp_path / "in", tmp_path / "set.h5")
    assert made.classes == tuple(map(str, range(4200))), "numbers in the order of their values"
    assert open_dataset("hdf5", str(tmp_path / "set.h5")).classes == 4200


def test_an_image_never_starts_another_program(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS, whatever its name, to Ghostscript."""
    stand_in = tmp_path / "bin" / "gs"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    Image.new("RGB", (6, 8)).save(folder / "cow" / "03.png", "EPS")
    with pytest.raises(DataError, match="it is whole in none of the formats AVIF"):
        import_folder(folder, tmp_path / "set.h5")
    assert not (tmp_path / "ran").exists()


def test_a_small_file_is_no_large_picture(folder: Path, tmp_path: Path) -> None:
    (folder / "cow" / "03.png").write_bytes(b"P5\n9000 9000\n255\n" + bytes(100))
    with pytest.raises(DataError, match="81,000,000 pixels in 117 bytes"):
        import_folder(folder, tmp_path / "set.h5", (8, 8))


def test_a_class_whose_name_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    os.rename(folder / "ant", os.fsencode(folder) + b"/K\xe4fer")
    assert import_folder(folder, tmp_path / "set.h5").classes == (r"K\xe4fer", "bee", "cow")


def test_without_pillow(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(OutputError, match=r"pip install 'nettorrent_mpi\[images\]'"):
        import_folder(folder, tmp_path / "set.h5")
