"""`nettorrent predict` answers as the run itself does: pictures, and files of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

import nettorrent_mpi as nt
from nettorrent_mpi.__main__ import main
from nettorrent_mpi.cli.draw import Reader
from nettorrent_mpi.data.handwriting import ink_of_picture
from nettorrent_mpi.data.rows import private, unlimited
from nettorrent_mpi.data.strokes import GLYPHS, inked

CONFIG = """\
data: {name: hdf5, root: pets.h5, mean: [0.5, 0.4, 0.3], std: [0.3, 0.2, 0.4]}
model: {layers: [{conv2d: {filters: 4, activation: relu}}, flatten, {linear: 3}]}
train: {epochs: 4, batch_size: 8, optimizer: {adam: 0.01}}
"""
NAMES = ("ant", "bee", "cat")


class Run:
    """A network that was trained on a folder of pictures, its test pictures, and what it takes them to be."""

    def __init__(self, folder: Path):
        random = np.random.default_rng(0)
        self.folder, self.pictures = folder / "run", []
        for part, count in (("train", 12), ("test", 8)):
            for label, name in enumerate(NAMES):
                (folder / "pets" / part / name).mkdir(parents=True)
                for number in range(count):
                    pixels = random.integers(0, 160, (6, 7, 3), np.uint8)
                    pixels[..., label] += 10
                    path = folder / "pets" / part / name / f"{number}.png"
                    Image.fromarray(pixels).save(path)
                    self.pictures += [str(path)] if part == "test" else []
        (folder / "config.yaml").write_text(CONFIG.replace("pets.h5", str(folder / "pets.h5")))
        assert main(["data", "import", str(folder / "pets"), "-o", str(folder / "pets.h5")]) == 0
        assert main(["train", str(folder / "config.yaml"), "--output", str(self.folder)]) == 0
        planned = nt.plan(nt.load_config(self.folder / "config.yaml"))
        with nt.Trainer(planned) as trainer:
            trainer.load(self.folder)
            test = planned.setup.dataset.test
            assert test is not None
            raw = np.empty((test.rows, 6 * 7 * 3), np.uint8)
            test.open_rows(private, unlimited)(np.arange(test.rows), raw)
            self.x, self.labels = raw.reshape(-1, 6, 7, 3), test.targets()
            outputs = trainer.predict(self.x)
            self.answers = outputs.argmax(axis=1)
            exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
            self.probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
            accuracy = trainer.evaluate().test
            assert accuracy is not None
            assert accuracy.accuracy == pytest.approx(np.mean(self.answers == self.labels))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("run"))
    assert 0.4 < np.mean(made.answers == made.labels) < 1, "some right, some wrong"
    return made


def test_pictures_and_rows_are_answered_as_in_the_run(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", run.x)
    np.savez(tmp_path / "x.npz", pixels=run.x / 255, other=run.x[:2])
    rows = run.folder.parent / "pets.h5"
    for files in (run.pictures, [tmp_path / "x.npy"], [tmp_path / "x.npz", "--array", "pixels"], [rows]):
        capfd.readouterr()
        assert main(["predict", str(run.folder), *map(str, files), "--json", "--top", "2"]) == 0
        answers = json.loads(capfd.readouterr().out)
        assert [answer["label"] for answer in answers] == run.answers.tolist()
        assert [answer["class"] for answer in answers] == [NAMES[label] for label in run.answers]
        found = [answer["probability"] for answer in answers]
        np.testing.assert_allclose(found, run.probabilities.max(axis=1), rtol=1e-4)
        second = [answer["top"][1]["probability"] for answer in answers]
        np.testing.assert_allclose(second, np.sort(run.probabilities, axis=1)[:, -2], rtol=1e-4)
        assert {len(answer["top"]) for answer in answers} == {2}
    assert [answer["row"] for answer in answers] == [*range(24)]


def test_text_and_what_cannot_be_read(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is broken is named; the rest is answered, in the order of the arguments."""
    (tmp_path / "broken.png").write_bytes(Path(run.pictures[0]).read_bytes()[:60])
    np.save(tmp_path / "wrong.npy", run.x[:, 1:])
    Image.open(run.pictures[1]).resize((30, 10)).convert("L").save(tmp_path / "wide.png")
    files = [run.pictures[0], tmp_path / "broken.png", tmp_path / "wrong.npy", tmp_path / "wide.png", run.pictures[1]]
    capfd.readouterr()
    assert main(["predict", str(run.folder), *map(str, files), "--top", "1"]) == 2
    out, err = capfd.readouterr()
    lines, told = out.splitlines(), err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(files[i]) for i in (0, 3, 4)]
    for line, row in ((lines[0], 0), (lines[2], 1)):
        best = run.probabilities[row].max()
        assert line.partition(": ")[2] == f"{NAMES[run.answers[row]]} {100 * best:.1f} %"
    assert told[0].startswith(f"nettorrent: error: {files[1]}: cannot be read as an image")
    shapes = "rows of (5, 7, 3); the network reads rows of (6, 7, 3)"
    assert told[1] == f"nettorrent: error: {files[2]}: its array has {shapes}"
    assert told[2] == f"nettorrent: warning: pictures stretched to 6 x 7 from another shape: {files[3]}"
    assert len(told) == 3
    assert main(["predict", str(run.folder), str(files[1]), str(tmp_path / "no.png"), "--json"]) == 2
    broken, missing = json.loads(capfd.readouterr().out)
    assert broken["file"] == str(files[1])
    assert "cannot be read as an image" in broken["error"]
    assert "(No such file or directory)" in missing["error"]


def test_refusals(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line says that a file is no network, or what a network cannot be asked."""

    def refusal(*arguments: Any) -> str:
        capfd.readouterr()
        assert main(["predict", *map(str, arguments)]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err.removeprefix("nettorrent: error: ").strip()

    picture = run.pictures[0]
    assert refusal(run.folder, picture, "--top", "0") == "--top 0: it has to be at least 1"
    assert (
        refusal(tmp_path / "no", picture)
        == f"{tmp_path}/no does not exist: name the folder of a run, which `nettorrent train` makes"
    )
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["parameters/layer/weight"] = np.zeros((3, 3))
    assert "foreign.h5: does not say what it was trained on (attribute data)" in refusal(
        tmp_path / "foreign.h5", picture
    )
    x = np.zeros((8, 6, 7, 3), np.float32)
    layers = [nt.Flatten(), nt.Linear(2)]
    with nt.Trainer(layers, (x, np.arange(8) % 2), batch_size=4, steps=1) as trainer:
        list(trainer.train())
        trainer.save(tmp_path / "floats.h5")
    told = "the network was trained on floating-point values, whose scale a picture does not tell: give rows"
    assert refusal(tmp_path / "floats.h5", picture) == f"{picture}: {told}"
    with nt.Trainer(
        [nt.Linear(1)], (x[:, 0, 0], x[:, 0, 0, :1]), batch_size=4, steps=1, loss="mean_squared_error"
    ) as trainer:
        list(trainer.train())
        trainer.save(tmp_path / "numbers.h5")
    assert "reads rows of (3,), which are no pictures" in refusal(tmp_path / "numbers.h5", picture)
    np.save(tmp_path / "x.npy", x[:2, 0, 0])
    assert main(["predict", str(tmp_path / "numbers.h5"), str(tmp_path / "x.npy")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == [f"{tmp_path}/x.npy row {row}" for row in range(2)]
    assert [float(line.rpartition(": ")[2]) for line in lines] == nt.load(tmp_path / "numbers.h5").predict(x[:2, 0, 0])[
        :, 0
    ].tolist()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained on the package's digits, whose bytes go from 0 to 16."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", "--output", str(folder), "--set", "kernels=numpy", "--set", "train.epochs=6"]) == 0
    return folder


def test_the_values_of_pictures_are_those_of_the_data_set(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pictures of the network's own size, light on dark, are taken as they are."""
    counts = np.random.default_rng(0).integers(0, 17, (4, 8, 8), np.uint8)
    counts[:, [0, -1]] = 0
    pictures = [str(tmp_path / f"{row}.png") for row in range(4)]
    for pixels, path in zip(counts, pictures, strict=True):
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(path)
    wanted = nt.load(digits).probabilities(counts).max(axis=1).tolist()
    for like in ([], ["--like", "none"]):
        capfd.readouterr()
        assert main(["predict", str(digits), *pictures, "--json", *like]) == 0
        out, err = capfd.readouterr()
        assert [answer["probability"] for answer in json.loads(out)] == wanted
        assert err == ("" if like else "nettorrent: 4 of 8 x 8, light on dark, taken as they are (see --like)\n")


def written_digits(folder: Path) -> tuple[list[str], list[Any], str]:
    """Pictures of digits in many hands, small and large, off the centre, on white, grey and black paper: their files,
    their pixels, and the digits."""
    random, files, pictures, names = np.random.default_rng(0), list[str](), list[Any](), ""
    for number in range(60):
        name = str(number % 10)
        wide, slant, size = random.uniform(0.7, 1.0), random.uniform(-0.15, 0.15), int(random.integers(40, 260))
        strokes = [tuple((0.5 + wide * (a - 0.5) + slant * (0.5 - b), b) for a, b in each) for each in GLYPHS[name]]
        ink = np.zeros((300, 420))
        y, x = random.integers(0, 300 - size), random.integers(0, 420 - size)
        ink[y : y + size, x : x + size] = inked(strokes, random.uniform(0.1, 0.18), size)
        paper, pen = ((255, 0), (225, 60), (20, 240))[number % 3]
        shown = paper + (pen - paper) * ink + random.normal(0, 2 if number % 3 else 0, ink.shape)
        pictures.append(shown.clip(0, 255).round().astype(np.uint8))
        files.append(str(folder / f"{number}.png"))
        Image.fromarray(pictures[-1]).convert("RGB" if number % 2 else "L").save(files[-1])
        names += name
    return files, pictures, names


def test_handwriting_is_read_as_the_page_for_drawing_reads_it(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Picture by picture, dark on light or light on dark; as they are, few would be read."""
    files, pictures, names = written_digits(tmp_path)
    reader = Reader(nt.load(digits))
    wanted = [reader.read(ink_of_picture(pixels))["classes"] for pixels in pictures]

    def answers(*options: str) -> tuple[list[dict[str, Any]], str]:
        capfd.readouterr()
        assert main(["predict", str(digits), *files, "--json", *options]) == 0
        out, err = capfd.readouterr()
        return json.loads(out), err

    found, told = answers()
    assert [answer["class"] for answer in found] == [each[0]["class"] for each in wanted]
    shown = [answer["probability"] for answer in found]
    np.testing.assert_allclose(shown, [each[0]["score"] for each in wanted], rtol=1e-6)
    inverted = "60 pictures prepared as those of digits, 40 of them dark on light paper: inverted"
    assert told == f"nettorrent: {inverted} (see --like)\n"
    right = np.mean([answer["class"] == name for answer, name in zip(found, names, strict=True)])
    raw, told = answers("--like", "none")
    assert "pictures stretched to 8 x 8 from another shape" in told
    assert right > 0.9
    assert right > 0.4 + np.mean([answer["class"] == name for answer, name in zip(raw, names, strict=True)])
    assert "as those of mnist" in answers("--like", "mnist")[1]
    Image.fromarray(np.full((50, 40), 250, np.uint8)).save(tmp_path / "empty.png")
    assert main(["predict", str(digits), str(tmp_path / "empty.png")]) == 2
    empty = "nothing stands out from its paper; --like none takes pictures as they are"
    assert f"{tmp_path}/empty.png: {empty}" in capfd.readouterr().err


def test_likenesses_that_do_not_fit(run: Run, digits: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder, like, told in (
        (digits, "faces", "--like faces: there are mnist, emnist, digits, none"),
        (run.folder, "mnist", "reads rows of (6, 7, 3) and knows 3 classes; handwriting has square grey"),
    ):
        capfd.readouterr()
        assert main(["predict", str(folder), run.pictures[0], "--like", like]) == 2
        assert told in capfd.readouterr().err
