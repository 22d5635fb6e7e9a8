"""Downloads of data sets from their publishers.

Every download is checked against a SHA-256 sum before it gets its name. The sums are those of the files that the
publishers' MD5 sums (fashion_mnist, EMNIST, CIFAR) or the original distribution (mnist) identify. An interrupted
download resumes where it stopped (HTTP Range, a file with the suffix .part).
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
import urllib.error
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.files import opening
from nettorrent_mpi.data.http_answer import asked
from nettorrent_mpi.data.storage import create
from nettorrent_mpi.plan.data_specs import EMNIST
from nettorrent_mpi.plan.errors import ConfigError, DataError
from nettorrent_mpi.plan.records import dataclass

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""progress(file name, bytes done, bytes in all or None where the server does not say)."""

_CHUNK = 1 << 18
_PIECE = 1 << 14  # bytes of an answer at a time: few enough that a slow server is seen to advance
_SHOWN = 200  # characters of what a server tells


@dataclass(frozen=True)
class Download:
    """A Download describes a file: its name, the addresses to try in turn, its sum, and the bytes that it has at most:
    an answer that goes on beyond them is another file."""

    name: str
    urls: tuple[str, ...]
    sha256: str
    most: int = 16 << 20


@dataclass(frozen=True)
class Recipe:
    """A Recipe describes how to get a data set into ROOT/folder: its files, or one archive and the members to
    extract."""

    folder: str
    downloads: tuple[Download, ...]
    members: tuple[str, ...] = ()


def _idx(folder: str, bases: tuple[str, ...], sums: tuple[str, str, str, str]) -> Recipe:
    kinds = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [f"{kind}-ubyte.gz" for kind in kinds]
    downloads = (
        Download(file, tuple(base + file for base in bases), sha256, 64 << 20)
        for file, sha256 in zip(files, sums, strict=True)
    )
    return Recipe(folder, tuple(downloads))


def _emnist(folder: str, part: str) -> Recipe:
    """Return how to get a part of EMNIST, all of which are in one archive."""
    archive = Download(
        "emnist-gzip.zip",
        ("https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",),
        "fb9bb67e33772a9cc0b895e4ecf36d2cf35be8b709693c3564cea2a019fcda8e",
        1 << 30,
    )
    members = (
        f"gzip/emnist-{part}-{split}-{kind}-ubyte.gz"
        for split in ("train", "test")
        for kind in ("images-idx3", "labels-idx1")
    )
    return Recipe(folder, (archive,), tuple(members))


def _cifar(name: str, folder: str, files: tuple[str, ...], sha256: str) -> Recipe:
    archive = f"{name}-binary.tar.gz"
    download = Download(archive, (f"https://www.cs.toronto.edu/~kriz/{archive}",), sha256, 1 << 28)
    return Recipe(folder, (download,), tuple(f"{folder}/{file}" for file in files))


RECIPES: Mapping[str, Recipe] = {
    "mnist": _idx(
        "mnist",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion_mnist": _idx(
        "fashion_mnist",
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "letters": _emnist("letters", "letters"),
    **{f"emnist_{part}": _emnist("emnist", part) for part in EMNIST},
    "cifar10": _cifar(
        "cifar-10",
        "cifar-10-batches-bin",
        (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin", "batches.meta.txt"),
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    **dict.fromkeys(
        ("cifar100", "cifar100_coarse"),
        _cifar(
            "cifar-100",
            "cifar-100-binary",
            ("train.bin", "test.bin", "coarse_label_names.txt", "fine_label_names.txt"),
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
}


def fetch(name: str, root: Path, progress: Progress | None = None, *, recipes: Mapping[str, Recipe] = RECIPES) -> Path:
    """Make data set `name` available under the folder `root`, and return its folder.

    Existing readable files are kept; damaged ones are replaced, each atomically and only by a complete download with
    the right sum. An archive (of EMNIST or CIFAR) is removed after extraction. EMNIST's own images are transposed: see
    dataset.DataOptions.transposed.

    Raises ConfigError for an unknown name, and DataError if nothing can be reached (the message says which files to put
    where), if a download has another sum, or if the disk is full.
    """
    recipe = recipes.get(name)
    if recipe is None:
        raise ConfigError(f"{name!r} cannot be downloaded; there are {', '.join(recipes)}")
    folder = root / recipe.folder
    if _complete(name, root):
        return folder
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for download in recipe.downloads:
        file = folder / download.name
        if not file.is_file() or _sha256(file) != download.sha256:
            _download(download, file, progress, _by_hand(name, root, recipe))
        if recipe.members:
            _unpack(file, folder, recipe.members)
            with _writing(file):
                file.unlink()
    return folder


def _complete(name: str, root: Path) -> bool:
    """Whether the data set is complete, by reading all of it."""
    try:
        dataset = open_dataset(name, str(root))
        for split in (dataset.train, dataset.test):
            if split is not None:
                split.inputs()
                split.targets()
    except DataError:
        return False
    return True


def _download(download: Download, file: Path, progress: Progress | None, by_hand: str) -> None:
    """Download the file from the first address that has it; it gets its name only when its sum is right."""
    part = file.with_name(file.name + ".part")
    if part.is_symlink():  # not what this program left, and not to be followed
        part.unlink()
    failures = []
    for url in download.urls:
        try:
            _complete_part(url, part, download, progress)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a senseless answer
            failures.append(f"{url}: {' '.join(str(error).split())[:_SHOWN]}")
            continue
        with _writing(file):
            os.replace(part, file)
        return
    if part.exists() and not part.stat().st_size:
        part.unlink()
    kept = f" ({part.stat().st_size} bytes are kept: the same command goes on from there)" if part.exists() else ""
    raise DataError(f"could not be downloaded{kept}: {'; '.join(failures)}. {by_hand}", file=str(file))


def _complete_part(url: str, part: Path, download: Download, progress: Progress | None) -> None:
    """Make `part` the whole file. Raises as _transfer does, and ValueError for another file."""
    if part.exists() and _sha256(part) == download.sha256:
        return
    if _transfer(url, part, download, progress) and _sha256(part) != download.sha256:
        part.unlink()  # its beginning may be what another address has sent
        _transfer(url, part, download, progress)
    actual = _sha256(part)
    if actual != download.sha256:
        part.unlink()
        raise ValueError(f"the download has SHA-256 {actual}, not {download.sha256}")


def _transfer(url: str, part: Path, download: Download, progress: Progress | None) -> bool:
    """Append the missing bytes to `part`; return whether there were some before. Raises OSError, HTTPException or
    ValueError for the network, DataError for the disk."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "nettorrent_mpi"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        with asked(url, headers) as answer:
            if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
                done = 0  # the server sends the whole file
            resumed = done > 0
            total = None if answer.length is None else done + answer.length
            if total is not None and total > download.most:
                raise _too_long(download)
            with _creating(part, append=resumed) as output:
                for piece in answer.pieces(_PIECE):
                    done += len(piece)
                    if done > download.most:
                        break
                    _put(piece, output, part)
                    if progress is not None:
                        progress(download.name, done, total)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not done:
            raise
        part.unlink()  # longer than the file: not its beginning
        return _transfer(url, part, download, progress)
    if done > download.most:
        part.unlink()
        raise _too_long(download)
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done} of {total} bytes")
    return resumed


def _too_long(download: Download) -> ConnectionError:
    return ConnectionError(f"the answer has more than {download.most:,} bytes: it is another file")


def _unpack(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """Extract the members of a .zip or .tar.gz into `folder` under their last name, each atomically.

    Names inside the archive only select members: the target path is decided here, and links are refused.
    """
    try:
        with _reader(archive) as read:
            for member in members:
                target = folder / member.rpartition("/")[2]
                part = target.with_name(target.name + ".part")
                try:
                    with read(member) as source, _creating(part) as output:
                        while chunk := source.read(_CHUNK):
                            _put(chunk, output, part)
                    with _writing(target):
                        os.replace(part, target)
                finally:
                    part.unlink(missing_ok=True)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, KeyError, OSError) as error:
        text = f"cannot be unpacked ({error}); remove it and fetch it again"
        raise DataError(text, file=str(archive)) from error


@contextmanager
def _reader(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Yield a function that opens a member of the archive by its name."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as bundle:
            yield bundle.open
        return
    with tarfile.open(archive, "r:gz") as tar:

        def open_member(member: str) -> IO[bytes]:
            found = tar.extractfile(tar.getmember(member)) if tar.getmember(member).isreg() else None
            if found is None:
                raise tarfile.TarError(f"{member} is not a plain file")
            return found

        yield open_member


def _sha256(path: Path) -> str:
    with opening(path, "grant access to it or remove it") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _creating(path: Path, *, append: bool = False) -> Iterator[IO[bytes]]:
    """Open the file for writing without a buffer, so that a full disk raises in the write itself."""
    with _writing(path):
        if not append:
            path.unlink(missing_ok=True)
        file = open(path, "ab" if append else "wb", buffering=0, opener=_unlinked if append else create)  # noqa: SIM115
    with file:
        yield file


def _unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _put(chunk: bytes, output: IO[bytes], path: Path) -> None:
    left = memoryview(chunk)
    with _writing(path):
        while left:
            left = left[output.write(left) :]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"cannot be written ({error.strerror or error}); free space, or choose another folder"
        raise DataError(text, file=str(path)) from error


def _by_hand(name: str, root: Path, recipe: Recipe) -> str:
    """Explain what to do without a network."""
    files = ", ".join(f"{download.urls[0]} as {root / recipe.folder / download.name}" for download in recipe.downloads)
    again = " and run this again (it unpacks them)" if recipe.members else ""
    return (
        f"On a machine without network, run `nettorrent data fetch {name}` on one with network and copy "
        f"{root / recipe.folder}, or put {files}{again}"
    )
