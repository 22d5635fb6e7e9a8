"""`nettorrent draw`: drawings are read, in a real browser, too, by networks that were trained on real data."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as Request_
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

import nettorrent_mpi as nt
from nettorrent_mpi.__main__ import main
from nettorrent_mpi.cli.draw import Reader
from nettorrent_mpi.cli.local_server import FORBIDDEN, Request
from nettorrent_mpi.data.handwriting import HANDS, prepared
from nettorrent_mpi.data.rows import private, unlimited
from nettorrent_mpi.data.strokes import GLYPHS, Stroke, inked
from nettorrent_mpi.plan.errors import UserError
from tests.browser import browser_page

DIGITS, LETTERS = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CONVOLUTIONS = """\
data: {{name: {name}, root: {root}}}
model:
  layers:
    - conv2d: {{filters: 16, padding: same, activation: relu}}
    - max_pool2d: 2
    - conv2d: {{filters: 32, padding: same, activation: relu}}
    - max_pool2d: 2
    - flatten
    - linear: {{units: 128, activation: relu}}
    - dropout: 0.5
    - linear: {classes}
train: {{epochs: {epochs}, batch_size: 128, optimizer: {{adam: 0.001}}, schedule: cosine, report_every: 10000}}
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that was trained on the package's digits."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert main(["train", "--output", str(folder), "--set", "kernels=numpy", "--set", "train.epochs=6"]) == 0
    return folder


def test_strokes_are_read(digits: Path) -> None:
    reader = Reader(nt.load(digits))
    assert (reader.like, reader.transposed) == ("digits", False)
    read = [reader.read(inked(GLYPHS[name], HANDS["digits"].pen))["classes"][0]["class"] for name in DIGITS]
    assert sum(a == b for a, b in zip(read, DIGITS, strict=True)) >= 9, read


def test_the_answers_of_the_server(digits: Path) -> None:
    reader = Reader(nt.load(digits))
    ink = (255 * inked(GLYPHS["3"], HANDS["digits"].pen)).astype(np.uint8)

    def ask(body: bytes, kind: str = "ink", width: str = "96", height: str = "96") -> tuple[int, Any]:
        reply = reader.answer(Request("POST", f"read/{kind}/{width}/{height}", body))
        return reply.status, json.loads(reply.body) if reply.kind == "application/json" else reply.body

    status, found = ask(ink.tobytes())
    assert status == 200
    assert found["classes"][0]["class"] == "3"
    assert [each["score"] for each in found["classes"]] == sorted((e["score"] for e in found["classes"]), reverse=True)
    assert sum(each["score"] for each in found["classes"]) == pytest.approx(1)
    assert ask((255 - ink).tobytes(), kind="picture")[1]["classes"][0]["class"] == "3"
    assert ask(bytes(96 * 96)) == (200, {"empty": True})
    assert ask(bytes([200]) * (96 * 96), kind="picture") == (200, {"empty": True})
    for body, options in (
        (ink.tobytes()[1:], {}),
        (ink.tobytes(), {"kind": "other"}),
        (ink.tobytes(), {"width": "0"}),
        (ink.tobytes(), {"width": "-96", "height": "-96"}),
        (b"", {"width": "1" * 5000}),
        (b"", {"width": "²"}),
        (bytes(2000), {"width": "2000", "height": "1"}),
    ):
        assert ask(body, **options)[0] == 400
    for request in (("GET", "read/ink/1/1", b""), ("POST", "", b""), ("POST", "read", b"1"), ("POST", "read/a", b"1")):
        assert reader.answer(Request(*request)).status == 404
    page = reader.answer(Request("GET", "", b""))
    assert page.status == 200
    assert b"Draw a digit" in page.body
    assert re.findall(rb"(?:src|href)=[\"']?([^\"'> ]+)", page.body) == [b"data:,"], "it refers to nothing else"


def trained_on_strokes(folder: Path, *, transposed: bool) -> Path:
    """Train a network on the letters of strokes, pale and slanted in many ways, upright or transposed as EMNIST's."""
    random, hand = np.random.default_rng(0), HANDS["emnist"]
    x, y = [], []
    for label, name in enumerate(LETTERS):
        for _ in range(12):
            wide, slant = random.uniform(0.7, 1.1), random.uniform(-0.2, 0.2)
            strokes = [tuple((0.5 + wide * (a - 0.5) + slant * (0.5 - b), b) for a, b in each) for each in GLYPHS[name]]
            found = prepared(inked(strokes, random.uniform(0.07, 0.15)), hand, 28)
            assert found is not None
            x.append(np.rint(255 * (found.T if transposed else found)).astype(np.uint8)[..., np.newaxis])
            y.append(label)
    data = nt.from_arrays(np.stack(x), np.array(y), classes=tuple(LETTERS))
    layers = [nt.Flatten(), nt.Linear(64, "relu"), nt.Linear(26)]
    with nt.Trainer(layers, data, batch_size=32, epochs=12, optimizer=nt.Adam(0.003), kernels="numpy") as trainer:
        list(trainer.train())
        trainer.save(folder / "model.h5")
    return folder


@pytest.mark.parametrize("transposed", [False, True])
def test_both_orientations_are_found(tmp_path: Path, transposed: bool) -> None:
    network = nt.load(trained_on_strokes(tmp_path, transposed=transposed))
    reader = Reader(network, "emnist")
    assert reader.transposed == transposed
    read = [reader.read(inked(GLYPHS[name], 0.11))["classes"][0]["class"] for name in LETTERS]
    assert sum(a == b for a, b in zip(read, LETTERS, strict=True)) >= 24, read
    with pytest.raises(
        UserError, match="was trained on data of the kind arrays, not on mnist, emnist, digits: say with"
    ):
        Reader(network)


def test_refusals(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    x = np.zeros((8, 6), np.float32)
    with nt.Trainer([nt.Linear(2)], (x, np.arange(8) % 2), batch_size=4, steps=1) as trainer:
        list(trainer.train())
        trainer.save(tmp_path / "rows.h5")
    for arguments, told in (
        ([digits, "--like", "faces"], "--like faces: there are mnist, emnist, digits"),
        ([digits, "--port", "70000"], "--port 70000: cannot be listened on"),
        (
            [tmp_path / "rows.h5", "--like", "mnist"],
            "reads rows of (6,) and knows 2 classes; handwriting has square grey",
        ),
        ([tmp_path / "none"], "none does not exist: name the folder of a run"),
    ):
        capfd.readouterr()
        assert main(["draw", *map(str, arguments)]) == 2
        assert told in capfd.readouterr().err


# -- in a browser -----------------------------------------------------------------------------------------------------


@contextmanager
def served(run: Path, *options: str) -> Iterator[str]:
    """Run the command; give the address that it shows. Ctrl-C ends it in peace."""
    command = [sys.executable, "-m", "nettorrent_mpi", "draw", str(run), *options]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        found = re.search(r"draw at +(http://127\.0\.0\.1:(\d+)/\S+/)\n", "".join(lines))
        assert found is not None, (lines, process.communicate())
        assert f"ssh -N -L {found[2]}:127.0.0.1:{found[2]} " in lines[2]
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)
    assert (process.returncode, *rest) == (0, "", "")


def drawn(page: Any, strokes: Sequence[Stroke]) -> str:
    """Draw with the mouse; return what is shown to be read."""
    page.click("#clear")
    box = page.locator("#sheet").bounding_box()
    for stroke in strokes:
        points = [
            (box["x"] + box["width"] * (0.2 + 0.6 * x), box["y"] + box["height"] * (0.15 + 0.7 * y)) for x, y in stroke
        ]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        with page.expect_response(lambda reply: "/read/" in reply.url):
            page.mouse.up()
    page.evaluate("read()")
    return str(page.locator("#best").text_content())


def shows(page: Any, place: str, text: str) -> None:
    """Wait until the page shows this text."""
    from playwright.sync_api import expect

    expect(page.locator(place)).to_have_text(text, timeout=20_000)


PAINT = """async ({ side, rows, most }) => {
  const sheet = document.getElementById("sheet"), to = sheet.getContext("2d"), read_ = [];
  for (const row of rows) {
    clear();
    const small = document.createElement("canvas");
    small.width = small.height = side;
    const pixels = new ImageData(side, side);
    row.forEach((value, i) => (pixels.data[4 * i + 3] = (255 * value) / most));
    small.getContext("2d").putImageData(pixels, 0, 0);
    to.imageSmoothingEnabled = false;
    to.drawImage(small, 0, 0, sheet.width, sheet.height);
    const found = await read();
    read_.push(found.classes ? found.classes[0].class : "");
  }
  return read_;
}"""


def check_painted(page: Any, run: Path, count: int) -> None:
    """Test pictures that are painted into the canvas are read as well as they are in the test, within 2 points."""
    dataset = nt.plan(nt.load_config(run / "config.yaml")).setup.dataset
    test, names = dataset.test, dataset.class_names
    assert test is not None
    assert names is not None
    rows = np.linspace(0, test.rows - 1, min(count, test.rows)).astype(np.intp)
    raw = np.empty((len(rows), int(np.prod(test.shape))), np.uint8)
    test.open_rows(private, unlimited)(rows, raw)
    labels = test.targets()[rows]
    in_test = float(np.mean(nt.load(run).predict(raw.reshape(-1, *test.shape)) == labels))
    most = round(1 / test.scaling.unit)
    read = page.evaluate(PAINT, {"side": test.shape[0], "rows": raw.tolist(), "most": most})
    painted = float(np.mean([a == names[b] for a, b in zip(read, labels, strict=True)]))
    assert painted == pytest.approx(in_test, abs=0.02), (painted, in_test)


def check_strokes(page: Any, names: str, least: int) -> None:
    read = "".join(drawn(page, GLYPHS[name]) or "?" for name in names)
    assert sum(a == b for a, b in zip(read, names, strict=True)) >= least, read


def test_strangers_are_refused(digits: Path) -> None:
    """A wrong token, and a page that calls this machine by another name, get no answer: 403."""

    def status(url: str, host: str | None = None, body: bytes | None = None) -> int:
        headers = {} if host is None else {"Host": host}
        try:
            with urlopen(Request_(url, body, headers), timeout=20) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code if error.read() == FORBIDDEN.body else -1

    with served(digits) as address:
        assert status(address) == status(address, "localhost:9") == 200
        assert status(f"{address}read/ink/2/1", body=b"\0\xff") == 200
        assert status(address[:-3] + "/") == status(address.rpartition("/")[0][:-22] + "/") == 403
        assert status(address, "example.org") == status(f"{address}read/ink/2/1", "example.org:80", b"\0\xff") == 403


def test_digits_in_a_browser(digits: Path, tmp_path: Path) -> None:
    """Mouse, finger, a picture, an empty sheet, undo; on a desk and on a phone."""
    with served(digits) as address, browser_page(viewport={"width": 1000, "height": 720}) as (page, seen):
        page.goto(address)
        assert page.locator("#sure").text_content() == "Nothing is drawn yet."
        assert page.evaluate("read()") == {"empty": True}
        check_strokes(page, DIGITS, 9)
        assert page.locator("#bars li").count() == 10
        assert page.locator("#seen").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [8, 8]
        assert page.locator("#hint").is_hidden()
        page.keyboard.press("Escape")
        shows(page, "#sure", "Nothing is drawn yet.")
        assert page.locator("#hint").is_visible()
        check_painted(page, digits, 180)
        # A picture of handwriting, dark on light.
        ink = inked(GLYPHS["5"], 0.15, 200)
        Image.fromarray((230 - 200 * ink).astype(np.uint8)).convert("RGB").save(tmp_path / "five.jpg")
        (tmp_path / "none.png").write_bytes(b"nothing")
        page.set_input_files("#file", tmp_path / "five.jpg")
        shows(page, "#best", "5")
        page.set_input_files("#file", tmp_path / "none.png")
        shows(page, "#sure", "none.png is no picture that this browser can read.")
        # Two strokes, of which one is undone.
        one = drawn(page, GLYPHS["1"])
        drawn(page, [*GLYPHS["1"], ((0.0, 0.0), (1.0, 0.0))])
        page.click("#undo")
        shows(page, "#best", one)
        assert all(url == address or url.startswith(f"{address}read/") for url in seen.requests)
        assert seen.errors == []


def test_a_finger_on_a_phone(digits: Path) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
    with served(digits) as address, browser_page(**phone) as (page, seen):
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        box = page.locator("#sheet").bounding_box()
        assert box["width"] > 300
        touch = page.context.new_cdp_session(page)

        def send(kind: str, *points: tuple[float, float]) -> None:
            places = [
                {
                    "x": box["x"] + box["width"] * (0.2 + 0.6 * x),
                    "y": box["y"] + box["height"] * (0.15 + 0.7 * y),
                    "id": i,
                }
                for i, (x, y) in enumerate(points)
            ]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

        (stroke,) = GLYPHS["0"]
        send("touchStart", stroke[0])
        for point in stroke[1:]:
            send("touchMove", point)
        send("touchMove", stroke[-1], (0.9, 0.9))  # a second finger draws nothing
        send("touchEnd")
        shows(page, "#best", "0")
        assert page.evaluate("scrollY") == 0, "drawing does not scroll"
        assert seen.errors == []


@pytest.mark.slow
@pytest.mark.skipif("NETTORRENT_DATA" not in os.environ, reason="NETTORRENT_DATA names no folder with mnist/, letters/")
@pytest.mark.parametrize(("name", "names", "least", "epochs"), [("mnist", DIGITS, 9, 1), ("letters", LETTERS, 20, 4)])
def test_real_data_in_a_browser(tmp_path: Path, name: str, names: str, least: int, epochs: int) -> None:
    root = os.environ["NETTORRENT_DATA"]
    (tmp_path / "c.yaml").write_text(CONVOLUTIONS.format(name=name, root=root, classes=len(names), epochs=epochs))
    assert main(["train", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "run")]) == 0
    with served(tmp_path / "run") as address, browser_page() as (page, seen):
        page.goto(address)
        check_painted(page, tmp_path / "run", 520)
        check_strokes(page, names, least)
        assert seen.errors == []
