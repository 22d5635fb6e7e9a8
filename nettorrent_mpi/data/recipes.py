"""Recipes say how to get published data sets: the files, their addresses and sums, and what an archive has of each.

The sums are those of the files that the publishers' MD5 sums (fashion_mnist, EMNIST, CIFAR) or the original
distribution (mnist) identify.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nettorrent_mpi.plan.data_specs import EMNIST
from nettorrent_mpi.plan.records import dataclass


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
    """A Recipe describes how to get a data set into ROOT/folder: its files, or one archive and the members to extract.
    An archive that is `shared` has other data sets, too, and lies in ROOT itself."""

    folder: str
    downloads: tuple[Download, ...]
    members: tuple[str, ...] = ()
    shared: bool = False

    def place(self, root: Path, download: Download) -> Path:
        """Return where a download is put."""
        return (root if self.shared else root / self.folder) / download.name

    def unpacked(self, root: Path) -> bool:
        """Whether all members have been extracted."""
        return all((root / self.folder / extracted(member)).is_file() for member in self.members)


def extracted(member: str) -> str:
    """Return the name of the file that a member of an archive becomes."""
    return member.rpartition("/")[2]


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
    return Recipe(folder, (archive,), tuple(members), shared=True)


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
