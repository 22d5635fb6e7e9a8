"""`nettorrent evaluate --confusion`: what is told of mistakes, the same on any number of ranks."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
from PIL import Image

import nettorrent_mpi as nt
from nettorrent_mpi.__main__ import main
from nettorrent_mpi.cli.confusion import Confusion, MistakenRow
from nettorrent_mpi.cli.drawings import matrix_drawing, png
from nettorrent_mpi.cli.run_folder import EVALUATION
from nettorrent_mpi.data.rows import private, unlimited
from nettorrent_mpi.engine.answers import Answers
from nettorrent_mpi.engine.trained_on import TrainedOn
from tests.conftest import Mpirun

SVG = "{http://www.w3.org/2000/svg}"


def made(loss: Any = None) -> Confusion:
    """Three classes, of which nobody is taken to be the last, whose one row is a mistake."""
    about = TrainedOn("arrays", 9, 3, ("ant", "bee & co", "cat"), (0.0,), (1.0,), False, (4,), None)
    labels = np.array([0, 0, 0, 1, 1, 2])
    chosen, logits = np.array([0, 0, 1, 1, 1, 0]), np.zeros((6, 3))
    logits[np.arange(6), chosen] = [1, 2, 3, 4, 5, 6]
    return Confusion(Answers(about, loss or nt.CrossEntropy(), 3), np.arange(10, 16), labels, logits)


def test_figures_are_those_worked_out_by_hand() -> None:
    found = made()
    np.testing.assert_array_equal(found.counts, [[2, 1, 0], [0, 2, 0], [1, 0, 0]])
    assert found.figures() == [(3, 2 / 3, 2 / 3, 2 / 3), (2, 2 / 3, 1.0, 0.8), (1, None, 0.0, 0.0)]
    sure = [float(np.exp(logit) / (np.exp(logit) + 2)) for logit in (6, 3)]
    assert found.mistakes(5) == [
        MistakenRow(15, 2, 0, pytest.approx(sure[0])),
        MistakenRow(12, 0, 1, pytest.approx(sure[1])),
    ]
    assert len(found.mistakes(1)) == 1
    assert (
        found.text()
        == f"""\
true class in each line, and in columns what the network takes its rows to be
          ant bee  cat
ant         2    1   .
bee & co    .    2   .
cat         1    .   .

confused most (true → taken to be): ant → bee & co 1, cat → ant 1

class     rows  precision    recall       F1
ant          3    66.67 %   66.67 %  66.67 %
bee & co     2    66.67 %  100.00 %  80.00 %
cat          1          -    0.00 %   0.00 %

the most confident mistakes
  row 15: cat taken to be ant ({100 * sure[0]:.1f} %)
  row 12: ant taken to be bee & co ({100 * sure[1]:.1f} %)
"""
    )
    assert "row 15: cat taken to be ant (6)" in made(nt.MeanSquaredError()).text()


@pytest.mark.parametrize("classes", [2, 26, 40, 41, 300])
def test_a_matrix_is_drawn_for_any_number_of_classes(classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (classes, classes))
    names = [f"<{number}>" for number in range(classes)]
    drawing = ElementTree.fromstring(matrix_drawing(counts, names, "a & b"))
    cells = drawing.findall(f"{SVG}rect")
    told = [re.fullmatch(r"<(\d+)> → <(\d+)>: (\d+)", str(cell.findtext(f"{SVG}title"))) for cell in cells]
    found = np.zeros_like(counts)
    for match in told:
        assert match is not None
        found[int(match[1]), int(match[2])] = int(match[3])
    np.testing.assert_array_equal(found, counts)
    numbers = [each.text for each in drawing.findall(f"{SVG}text") if (each.text or "").isdecimal()]
    assert len(numbers) == (len(cells) if classes <= 40 else 0)
    wide = max(float(cell.attrib["x"]) + float(cell.attrib["width"]) for cell in cells)
    assert wide <= float(drawing.attrib["width"]) <= 2000


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_written_as_everybody_reads_them(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    found = np.asarray(Image.open(io.BytesIO(png(pixels))))
    np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)


def table(path: Path) -> list[list[str]]:
    return [*csv.reader(path.open())]


def test_a_run_on_one_rank_and_on_three(tmp_path: Path, mpirun: Mpirun, capfd: pytest.CaptureFixture[str]) -> None:
    """The same files; they agree with each other, with the accuracy and, row by row, with `nettorrent predict`."""
    run, other = tmp_path / "run", tmp_path / "other" / "folder"
    few = ["--set", "train.steps=60", "--set", "kernels=numpy", "--set", "data.validation=0.1"]
    assert main(["train", "--output", str(run), *few]) == 0
    capfd.readouterr()
    assert main(["evaluate", str(run), "--confusion"]) == 0
    told = capfd.readouterr().out
    assert f"written to {run}: confusion.csv" in told
    done = mpirun(3, ["-m", "nettorrent_mpi", "evaluate", run, "--confusion", "--output", other])
    assert done.returncode == 0, done.stderr
    assert {path.name for path in other.iterdir()} == set(EVALUATION)
    for name in set(EVALUATION) - {"predictions.csv"}:
        assert (other / name).read_text() == (run / name).read_text(), name
    (_, *rows), (_, *rows_of_three) = table(run / "predictions.csv"), table(other / "predictions.csv")
    assert [row[:3] for row in rows] == [row[:3] for row in rows_of_three]
    np.testing.assert_allclose([float(row[3]) for row in rows], [float(row[3]) for row in rows_of_three], atol=2e-4)
    # Within the files.
    test = nt.plan(nt.load_config(run / "config.yaml")).setup.dataset.test
    assert test is not None
    assert [row[1] for row in rows] == [str(label) for label in test.targets()]
    head, *matrix = table(run / "confusion.csv")
    assert head == ["true \\ predicted", *"0123456789"]
    counts = np.array([[int(count) for count in line[1:]] for line in matrix])
    for line in rows:
        counts[int(line[1]), int(line[2])] -= 1
    assert not counts.any()
    right = sum(row[1] == row[2] for row in rows)
    assert 0.5 < right / len(rows) < 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_accuracy"] == pytest.approx(right / len(rows))
    # The drawing of mistakes shows these rows.
    raw = np.empty((test.rows, 64), np.uint8)
    test.open_rows(private, unlimited)(np.arange(test.rows), raw)
    drawing = ElementTree.fromstring((run / "mistakes.svg").read_text())
    images = [each.attrib["href"].partition(",")[2] for each in drawing.findall(f"{SVG}image")]
    captions = [str(each.findtext(f"{SVG}title")) for each in drawing.findall(f"{SVG}text")[1:]]
    wrong = sorted((row for row in rows if row[1] != row[2]), key=lambda row: -float(row[3]))[:48]
    assert len(images) == len(wrong)
    for image, caption, row in zip(images, captions, wrong, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))
        np.testing.assert_array_equal(pixels.ravel(), np.rint(raw[int(row[0])] * (255 / 16)))
        assert caption == f"{row[1]} → {row[2]} ({100 * float(row[3]):.1f} %)" or float(row[3]) * 1000 % 1 == 0.5
    # By the other command.
    np.save(tmp_path / "x.npy", raw.reshape(-1, 8, 8, 1))
    capfd.readouterr()
    assert main(["predict", str(run), str(tmp_path / "x.npy"), "--json"]) == 0
    answers = json.loads(capfd.readouterr().out)
    assert [answer["class"] for answer in answers] == [row[2] for row in rows]
    np.testing.assert_allclose(
        [answer["probability"] for answer in answers], [float(row[3]) for row in rows], atol=2e-4
    )
    # A resumed run changes the network.
    assert main(["train", "--output", str(run), *few, "--set", "train.steps=61", "--resume"]) == 0
    assert not [name for name in EVALUATION if (run / name).exists()]


def test_refusals_and_rows_that_are_held_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a test set it looks at the validation rows; rows that are no pictures are not drawn."""
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 5))
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"] = x, (x[:, 0] > 0.2).astype(int)
        file.attrs["classes"] = ["no", "yes"]
    with h5py.File(tmp_path / "numbers.h5", "w") as file:
        file["x"], file["y"] = x, x[:, :1]
    for name, model in (
        ("data", "{layers: [{linear: 1}], loss: binary_cross_entropy}"),
        ("numbers", "{layers: [{linear: 1}], loss: mean_squared_error}"),
    ):
        data = f"{{name: hdf5, root: {tmp_path}/{name}.h5, validation: 0.5}}"
        text = f"data: {data}\nmodel: {model}\ntrain: {{steps: 4, batch_size: 8}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
        assert main(["train", str(tmp_path / f"{name}.yaml"), "--output", str(tmp_path / name)]) == 0
    run = tmp_path / "data"
    (run / "mistakes.svg").write_text("of an earlier network")
    assert main(["evaluate", str(run), "--confusion"]) == 0
    assert {name for name in EVALUATION if (run / name).exists()} == set(EVALUATION) - {"mistakes.svg"}
    _, *rows = table(run / "predictions.csv")
    assert len(rows) == 30
    assert [row[1] for row in rows] == [("no", "yes")[int(x[int(row[0]), 0] > 0.2)] for row in rows]
    with h5py.File(run / "model.h5") as file:
        weight, bias = file["parameters/linear1/weight"][:, 0], file["parameters/linear1/bias"][0]
    logits = np.array([x[int(row[0])] @ weight + bias for row in rows])
    assert [row[2] for row in rows] == [("no", "yes")[int(logit > 0)] for logit in logits]
    np.testing.assert_allclose([float(row[3]) for row in rows], 1 / (1 + np.exp(-np.abs(logits))), atol=2e-4)
    for arguments, told in (
        ([run, "--output", tmp_path], "--output is the folder for the files of --confusion, which is not given"),
        ([tmp_path / "numbers", "--confusion"], "--confusion: the targets of this run are numbers, not classes"),
        (
            [run, "--confusion", "--output", tmp_path / "data.h5"],
            "data.h5 is a file, not a folder; choose",
        ),
    ):
        capfd.readouterr()
        assert main(["evaluate", *map(str, arguments)]) == 2
        assert told in capfd.readouterr().err
