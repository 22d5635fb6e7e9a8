"""Downloads of data sets from their publishers.

Every download is checked against a SHA-256 sum (data/recipes.py) before it gets its name. An interrupted download
resumes where it stopped (HTTP Range, a file with the suffix .part).
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
from typing import IO, NamedTuple, TypeAlias

from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.files import opening
from nettorrent_mpi.data.http_answer import asked
from nettorrent_mpi.data.recipes import RECIPES, Download, Recipe, extracted
from nettorrent_mpi.data.storage import create
from nettorrent_mpi.plan.errors import ConfigError, DataError

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""progress(file name, bytes done, bytes in all or None where the server does not say)."""

_CHUNK = 1 << 18
_PIECE = 1 << 14  # bytes of an answer at a time: few enough that a slow server is seen to advance
_SHOWN = 200  # characters of what a server tells


class Fetched(NamedTuple):
    """A Fetched data set lies in `folder`; `archive` is kept, if there is one, since it has others, too."""

    folder: Path
    archive: Path | None = None


def fetch(
    name: str, root: Path, progress: Progress | None = None, *, recipes: Mapping[str, Recipe] = RECIPES
) -> Fetched:
    """Make data set `name` available under the folder `root`.

    Existing readable files are kept; damaged ones are replaced, each atomically and only by a complete download with
    the right sum. An archive (of EMNIST or CIFAR) is removed after extraction; where several data sets share it, it
    stays in `root` until all of them have been extracted. EMNIST's own images are transposed: see
    dataset.DataOptions.transposed.

    Raises ConfigError for an unknown name, and DataError if nothing can be reached (the message says which files to put
    where), if a download has another sum, or if the disk is full.
    """
    recipe = recipes.get(name)
    if recipe is None:
        raise ConfigError(f"{name!r} cannot be downloaded; there are {', '.join(recipes)}")
    folder = root / recipe.folder
    if _complete(name, root):
        return Fetched(folder)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    kept = None
    for download in recipe.downloads:
        file = recipe.place(root, download)
        if not file.is_file() or _sha256(file) != download.sha256:
            _download(download, file, progress, _by_hand(name, root, recipe))
        if recipe.members:
            _unpack(file, folder, recipe.members)
            others = [each for each in recipes.values() if recipe.shared and download in each.downloads]
            if all(each.unpacked(root) for each in others):
                with _writing(file):
                    file.unlink()
            else:
                kept = file
    return Fetched(folder, kept)


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
                target = folder / extracted(member)
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
    files = ", ".join(f"{download.urls[0]} as {recipe.place(root, download)}" for download in recipe.downloads)
    again = " and run this again (it unpacks them)" if recipe.members else ""
    return (
        f"On a machine without network, run `nettorrent data fetch {name}` on one with network and copy "
        f"{root / recipe.folder}, or put {files}{again}"
    )
