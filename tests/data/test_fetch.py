"""Downloads, against a server on this machine that knows ranges and can be told to misbehave."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import re
import resource
import socket
import socketserver
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from nettorrent_mpi.data.cifar import COARSE, FINE
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.fetch import fetch
from nettorrent_mpi.data.recipes import RECIPES, Download, Recipe
from nettorrent_mpi.plan.data_specs import EMNIST
from nettorrent_mpi.plan.errors import ConfigError, DataError


class Server:
    """What the server has, what it was asked, and after how many bytes of a body it hangs up."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.hang_up_after: int | None = None
        self.ranges = True
        self.port = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def download(self, name: str, *, port: int | None = None) -> Download:
        url = self.url(name) if port is None else f"http://127.0.0.1:{port}/{name}"
        return Download(name, (url,), hashlib.sha256(self.files[name]).hexdigest())


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, wanted = self.path[1:], self.headers.get("Range")
            state.asked.append((name, wanted))
            if name not in state.files:
                self.send_error(404)
                return
            content, start = state.files[name], 0
            if wanted and state.ranges:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: state.hang_up_after])
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            return

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.port = listener.server_address[1]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    listener.shutdown()
    listener.server_close()
    thread.join()


def idx(values: np.ndarray) -> bytes:
    return gzip.compress(
        struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes(), mtime=0
    )


def offer_mnist(server: Server) -> dict[str, Recipe]:
    generator = np.random.default_rng(0)
    for prefix, rows in (("train", 40), ("t10k", 10)):
        server.files[f"{prefix}-images-idx3-ubyte.gz"] = idx(generator.integers(0, 256, (rows, 28, 28), np.uint8))
        server.files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(np.arange(rows, dtype=np.uint8) % 10)
    return {"mnist": Recipe("mnist", tuple(server.download(name) for name in server.files))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_full_download_and_nothing_more_to_do(server: Server, tmp_path: Path) -> None:
    recipes = offer_mnist(server)
    calls: list[tuple[str, int, int | None]] = []
    assert fetch("mnist", tmp_path, lambda *call: calls.append(call), recipes=recipes) == (tmp_path / "mnist", None)
    assert contents(tmp_path / "mnist") == server.files
    for name, content in server.files.items():
        assert [call for call in calls if call[0] == name][-1] == (name, len(content), len(content))
    assert open_dataset("mnist", str(tmp_path)).train.rows == 40
    asked = len(server.asked)
    fetch("mnist", tmp_path, recipes=recipes)
    assert len(server.asked) == asked == 4


def test_only_the_damaged_file_comes_again(server: Server, tmp_path: Path) -> None:
    recipes = offer_mnist(server)
    fetch("mnist", tmp_path, recipes=recipes)
    server.asked.clear()
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    fetch("mnist", tmp_path, recipes=recipes)
    assert [name for name, _ in server.asked] == [path.name]
    assert contents(tmp_path / "mnist") == server.files


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path, ranges: bool) -> None:
    recipes = offer_mnist(server)
    name = "train-images-idx3-ubyte.gz"
    server.hang_up_after = 5000
    with pytest.raises(DataError, match=r"5000 bytes are kept.*goes on.*ended after 5000 of \d+ bytes"):
        fetch("mnist", tmp_path, recipes=recipes)
    assert (tmp_path / "mnist" / f"{name}.part").read_bytes() == server.files[name][:5000]
    assert not (tmp_path / "mnist" / name).exists()
    server.hang_up_after, server.ranges = None, ranges
    fetch("mnist", tmp_path, recipes=recipes)
    assert server.asked[1] == (name, "bytes=5000-")
    assert contents(tmp_path / "mnist") == server.files


def test_a_part_that_is_too_long_is_thrown_away(server: Server, tmp_path: Path) -> None:
    recipes = offer_mnist(server)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz.part").write_bytes(bytes(1_000_000))
    fetch("mnist", tmp_path, recipes=recipes)
    assert contents(tmp_path / "mnist") == server.files


def test_wrong_sum(server: Server, tmp_path: Path) -> None:
    recipes = offer_mnist(server)
    name = "train-images-idx3-ubyte.gz"
    expected = hashlib.sha256(server.files[name]).hexdigest()
    server.files[name] += b"!"
    actual = hashlib.sha256(server.files[name]).hexdigest()
    with pytest.raises(DataError, match=f"the download has SHA-256 {actual}, not {expected}") as caught:
        fetch("mnist", tmp_path, recipes=recipes)
    assert caught.value.file == str(tmp_path / "mnist" / name)
    assert contents(tmp_path / "mnist") == {}


def test_the_second_address_helps(server: Server, tmp_path: Path) -> None:
    recipes = offer_mnist(server)
    with_dead = tuple(
        Download(download.name, (server.url("nothing-here"), *download.urls), download.sha256)
        for download in recipes["mnist"].downloads
    )
    fetch("mnist", tmp_path, recipes={"mnist": Recipe("mnist", with_dead)})
    assert contents(tmp_path / "mnist") == server.files


def test_unreachable(server: Server, tmp_path: Path) -> None:
    offer_mnist(server)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = Recipe("mnist", tuple(server.download(name, port=port) for name in server.files))
    with pytest.raises(DataError, match="refused") as caught:
        fetch("mnist", tmp_path, recipes={"mnist": recipe})
    text = str(caught.value)
    assert "On a machine without network, run `nettorrent data fetch mnist` on one with network" in text
    for download in recipe.downloads:
        assert f"{download.urls[0]} as {tmp_path / 'mnist' / download.name}" in text


def offer_cifar(server: Server, *, link: bool = False) -> dict[str, Recipe]:
    records = np.random.default_rng(0).integers(0, 10, (3, 3073), np.uint8).tobytes()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for member in RECIPES["cifar10"].members:
            entry = tarfile.TarInfo(member)
            if link and member.endswith("data_batch_3.bin"):
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
                tar.addfile(entry)
            else:
                entry.size = len(records)
                tar.addfile(entry, io.BytesIO(records))
        outside = tarfile.TarInfo("../outside")
        outside.size = 1
        tar.addfile(outside, io.BytesIO(b"x"))
    server.files["cifar-10-binary.tar.gz"] = packed.getvalue()
    return {
        "cifar10": Recipe(
            "cifar-10-batches-bin", (server.download("cifar-10-binary.tar.gz"),), RECIPES["cifar10"].members
        )
    }


def test_tar_archive(server: Server, tmp_path: Path) -> None:
    fetch("cifar10", tmp_path, recipes=offer_cifar(server))
    wanted = {member.rpartition("/")[2] for member in RECIPES["cifar10"].members}
    assert set(contents(tmp_path / "cifar-10-batches-bin")) == wanted  # no archive, no .part, nothing unasked
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-bin"]
    assert open_dataset("cifar10", str(tmp_path)).train.rows == 15


def test_cifar_100_is_fetched_for_both_kinds_of_labels(server: Server, tmp_path: Path) -> None:
    """The archive has the publisher's layout: a folder with four files; a record is the coarse label, the fine label,
    and the red, green and blue plane. The connection breaks once in the middle."""
    recipe = RECIPES["cifar100"]
    assert recipe == RECIPES["cifar100_coarse"]
    records = np.random.default_rng(0).integers(0, 256, (7, 3074), np.uint8)
    records[:, 0], records[:, 1] = np.arange(7) + 13, np.arange(7) + 93
    records[2, 2:] = np.repeat([10, 20, 30], 1024)
    records[2, 2 + 33] = 11  # red, second row, second column
    texts = {
        "train.bin": records.tobytes(),
        "test.bin": records[:2].tobytes(),
        "coarse_label_names.txt": "\n".join(COARSE).encode(),
        "fine_label_names.txt": "\n".join(FINE).encode(),
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        inside = tarfile.TarInfo("cifar-100-binary")
        inside.type = tarfile.DIRTYPE
        tar.addfile(inside)
        for name, text in texts.items():
            entry = tarfile.TarInfo(f"cifar-100-binary/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    server.files["cifar-100-binary.tar.gz"] = packed.getvalue()
    served = Recipe(recipe.folder, (server.download("cifar-100-binary.tar.gz"),), recipe.members)
    server.hang_up_after = 9000
    with pytest.raises(DataError, match="9000 bytes are kept"):
        fetch("cifar100", tmp_path, recipes={"cifar100": served})
    server.hang_up_after = None
    fetch("cifar100", tmp_path, recipes={"cifar100": served})
    assert [wanted for _, wanted in server.asked] == [None, "bytes=9000-"]
    fetch("cifar100_coarse", tmp_path, recipes={"cifar100_coarse": served})
    assert len(server.asked) == 2  # the same files
    assert contents(tmp_path / "cifar-100-binary") == texts
    fine, coarse = (open_dataset(name, str(tmp_path)) for name in ("cifar100", "cifar100_coarse"))
    for dataset, column, classes in ((fine, 1, 100), (coarse, 0, 20)):
        assert (dataset.classes, dataset.train.rows) == (classes, 7)
        assert dataset.test is not None
        assert dataset.test.rows == 2
        np.testing.assert_array_equal(dataset.train.targets(), records[:, column])
    assert fine.class_names is not None
    assert coarse.class_names is not None
    assert (fine.class_names[93], coarse.class_names[13]) == ("turtle", "non-insect_invertebrates")
    pixels = np.empty((1, 32, 32, 3), np.float32)
    fine.train.inputs().batch(np.array([2]), pixels)
    np.testing.assert_allclose(pixels[0, 5, 7] * 255, [10, 20, 30], rtol=1e-6)
    np.testing.assert_allclose(pixels[0, 1, 1] * 255, [11, 20, 30], rtol=1e-6)


def test_an_archive_put_there_by_hand_is_enough(server: Server, tmp_path: Path) -> None:
    recipes = offer_cifar(server)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    archive = tmp_path / "cifar-10-batches-bin" / "cifar-10-binary.tar.gz"
    archive.write_bytes(server.files[archive.name])
    fetch("cifar10", tmp_path, recipes=recipes)
    assert server.asked == []
    assert open_dataset("cifar10", str(tmp_path)).train.rows == 15


def test_links_in_an_archive_are_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_batch_3\.bin is not a plain file"):
        fetch("cifar10", tmp_path, recipes=offer_cifar(server, link=True))
    assert not (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").exists()


def test_zip_archive(server: Server, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as bundle:
        for part in ("train", "test"):
            bundle.writestr(f"gzip/emnist-letters-{part}-images-idx3-ubyte.gz", idx(np.zeros((26, 28, 28), np.uint8)))
            bundle.writestr(f"gzip/emnist-letters-{part}-labels-idx1-ubyte.gz", idx(np.arange(1, 27, dtype=np.uint8)))
        bundle.writestr("gzip/emnist-digits-train-images-idx3-ubyte.gz", b"not wanted")
    server.files["emnist-gzip.zip"] = packed.getvalue()
    recipes = {"letters": Recipe("letters", (server.download("emnist-gzip.zip"),), RECIPES["letters"].members)}
    fetch("letters", tmp_path, recipes=recipes)
    assert len(contents(tmp_path / "letters")) == 4
    np.testing.assert_array_equal(open_dataset("letters", str(tmp_path)).train.targets(), np.arange(26))

    recipes = {
        "emnist_digits": Recipe("emnist", (server.download("emnist-gzip.zip"),), RECIPES["emnist_digits"].members)
    }
    with pytest.raises(DataError, match="There is no item named 'gzip/emnist-digits-train-labels"):
        fetch("emnist_digits", tmp_path, recipes=recipes)

    server.files["emnist-gzip.zip"] = server.files["emnist-gzip.zip"][:-50]
    recipes = {"letters": Recipe("letters", (server.download("emnist-gzip.zip"),), RECIPES["letters"].members)}
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch("letters", tmp_path / "other", recipes=recipes)


def test_every_part_of_emnist_comes_from_the_one_archive(server: Server, tmp_path: Path) -> None:
    """The archive has the publisher's layout: gzip/ with four IDX files and a mapping of each part. The connection
    breaks once in the middle; an archive with another sum leaves nothing behind."""
    parts = {part: classes for part, (_, _, classes) in EMNIST.items()} | {"letters": 26}
    packed, stored = io.BytesIO(), {}
    with zipfile.ZipFile(packed, "w") as bundle:
        bundle.writestr("gzip/", b"")
        for number, (part, classes) in enumerate(parts.items()):
            labels = np.arange(classes, dtype=np.uint8) + (part == "letters")
            images = np.random.default_rng(number).integers(0, 256, (classes, 28, 28), np.uint8)
            stored[part] = images
            bundle.writestr(f"gzip/emnist-{part}-mapping.txt", "".join(f"{c} {48 + c}\n" for c in labels))
            for split, rows in (("train", slice(None)), ("test", slice(0, 5))):
                bundle.writestr(f"gzip/emnist-{part}-{split}-images-idx3-ubyte.gz", idx(images[rows]))
                bundle.writestr(f"gzip/emnist-{part}-{split}-labels-idx1-ubyte.gz", idx(labels[rows]))
    name = "emnist-gzip.zip"
    server.files[name] = packed.getvalue()
    whole = server.download(name)
    names = {part if part == "letters" else f"emnist_{part}": part for part in parts}
    recipes = {}
    for dataset in names:
        recipe = RECIPES[dataset]
        (real,) = recipe.downloads
        assert (real.name, real.urls[0].rpartition("/")[2]) == (name, "gzip.zip")
        recipes[dataset] = replace(recipe, downloads=(whole,))
    server.hang_up_after = 20_000
    with pytest.raises(DataError, match="20000 bytes are kept"):
        fetch("letters", tmp_path, recipes=recipes)
    server.hang_up_after = None
    for number, (dataset, part) in enumerate(names.items(), 1):
        kept = tmp_path / name if number < len(names) else None
        assert fetch(dataset, tmp_path, recipes=recipes) == (tmp_path / recipes[dataset].folder, kept)
        assert (tmp_path / name).exists() == (kept is not None)
        opened = open_dataset(dataset, str(tmp_path), options=DataOptions(transposed=True))
        assert opened.test is not None
        assert (opened.classes, opened.train.rows, opened.test.rows) == (parts[part], parts[part], 5)
        np.testing.assert_array_equal(opened.train.targets(), np.arange(parts[part]))
        pixels = np.empty((1, 28, 28, 1), np.float32)
        opened.train.inputs().batch(np.array([3]), pixels)
        np.testing.assert_allclose(pixels[0, :, :, 0] * 255, stored[part][3].T, rtol=1e-6)
    assert [wanted for _, wanted in server.asked] == [None, "bytes=20000-"], "it comes once"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emnist", "letters"]
    assert len(contents(tmp_path / "emnist")) == 4 * len(EMNIST)  # no .part

    (tmp_path / "emnist" / "emnist-digits-test-labels-idx1-ubyte.gz").unlink()
    (tmp_path / name).write_bytes(packed.getvalue()[:-100])  # what has another sum is not taken for the archive
    assert fetch("emnist_digits", tmp_path, recipes=recipes).archive is None
    assert len(server.asked) == 3
    assert len(contents(tmp_path / "emnist")) == 4 * len(EMNIST)

    server.files[name] = server.files[name][:-1] + b"!"
    with pytest.raises(DataError, match="the download has SHA-256"):
        fetch("emnist_digits", tmp_path / "other", recipes=recipes)
    assert contents(tmp_path / "other" / "emnist") == {}
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["emnist"]


def test_a_disk_that_takes_nothing(server: Server, tmp_path: Path) -> None:
    recipes = offer_mnist(server)
    (tmp_path / "mnist").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        fetch("mnist", tmp_path, recipes=recipes)
    (tmp_path / "mnist").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # as a disk that is full after 5,000 bytes
    try:
        with pytest.raises(DataError, match=r"cannot be written.*too large") as caught:
            fetch("mnist", tmp_path, recipes=recipes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.file == str(tmp_path / "mnist" / "train-images-idx3-ubyte.gz.part")
    fetch("mnist", tmp_path, recipes=recipes)
    assert contents(tmp_path / "mnist") == server.files


def test_recipes_are_complete_and_unknown_names_are_told() -> None:
    for recipe in RECIPES.values():
        for download in recipe.downloads:
            assert re.fullmatch(r"[0-9a-f]{64}", download.sha256)
            assert all(url.startswith(("https://", "http://")) for url in download.urls)
    with pytest.raises(ConfigError, match="'digits' cannot be downloaded; there are mnist"):
        fetch("digits", Path())


class Answers(socketserver.StreamRequestHandler):
    """Answers every request below /NAME by what `texts` has of that name, and /endless without an end."""

    texts: ClassVar[dict[str, bytes]] = {
        "length": b"Content-Length: abc\r\n\r\nx",
        "chunk": b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        "address": b"Location: http://[::1/x\r\n\r\n",
        "host": b"Location: http://.\xc3\xa4./x\r\n\r\n",
    }

    def handle(self) -> None:
        name = self.rfile.readline().split()[1].decode().strip("/")
        status = "302 Found" if b"Location" in self.texts.get(name, b"") else "200 OK"
        try:
            self.wfile.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n".encode() + self.texts.get(name, b"\r\n"))
            while name == "endless":
                self.wfile.write(bytes(1 << 16))
        except OSError:
            return  # it was told to stop


@pytest.fixture
def senseless() -> Iterator[str]:
    listener = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{listener.server_address[1]}"
    listener.shutdown()
    listener.server_close()
    thread.join()


@pytest.mark.parametrize("answer", ["endless", *Answers.texts])
def test_after_a_senseless_answer_the_next_address_is_tried(
    server: Server, senseless: str, tmp_path: Path, answer: str
) -> None:
    offer_mnist(server)
    downloads = []
    for name, content in server.files.items():
        urls = (f"{senseless}/{answer}", server.url(name))
        downloads.append(Download(name, urls, hashlib.sha256(content).hexdigest(), most=1 << 20))
    fetch("mnist", tmp_path, recipes={"mnist": Recipe("mnist", tuple(downloads))})
    assert contents(tmp_path / "mnist") == server.files
    nowhere = Download("a.gz", (f"{senseless}/{answer}",), "0" * 64, most=1 << 20)
    with pytest.raises(DataError, match=r"a\.gz: could not be downloaded: http"):
        fetch("mnist", tmp_path / "other", recipes={"mnist": Recipe("mnist", (nowhere,))})
    assert contents(tmp_path / "other" / "mnist") == {}
