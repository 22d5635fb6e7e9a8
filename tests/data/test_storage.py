"""Files come whole or not at all, on full disks and on file systems that lack something or fail once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from nettorrent_mpi.data.storage import new_hdf5, replacing

HERE = Path(__file__).resolve().parent


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """Somebody may have put it there, in a folder that others can write to."""
    precious = tmp_path / "precious"
    precious.write_text("old")
    (tmp_path / "file.part").symlink_to(precious)
    with replacing(tmp_path / "file") as part:
        part.write_text("new")
    assert precious.read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_an_hdf5_file(tmp_path: Path) -> None:
    path, x = tmp_path / "file.h5", np.arange(100_000.0)
    with new_hdf5(path) as file:
        file.create_dataset("x", data=x, chunks=True, fletcher32=True)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["x"][...], x)


FULL = """
import errno, resource, sys
from pathlib import Path
import numpy as np
from nettorrent_mpi.data.storage import new_hdf5

folder, failed = Path(sys.argv[1]), 0
for room in (*range(0, 9000, 500), *range(9000, 200_000, 9000)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))  # as on a full disk
    try:
        with new_hdf5(folder / "file.h5") as file:
            file.attrs["text"] = np.bytes_(b"x" * 1000)
            for i in range(10):
                file.create_dataset(f"group{i % 3}/{i}", data=np.zeros(1500), chunks=True, fletcher32=True)
    except OSError as error:
        assert error.errno == errno.EFBIG, error
        failed += 1
        assert not list(folder.iterdir())
assert failed > 20, failed
assert [path.name for path in folder.iterdir()] == ["file.h5"]
"""


def test_hdf5_on_a_disk_with_little_room(tmp_path: Path) -> None:
    """HDF5 itself ends the process by a segmentation fault (seen with 2.0)."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# What some file systems do: no locks (NFS without lockd: 37; DVS: 524; others: 95), no flushing of folders (CIFS,
# FUSE), and one failure of each kind of call on files of a run.
SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
static int failed[3];
static int fails(int fd, int kind) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    if (!strstr(path, kind == 2 ? "data.h5" : ".part") || failed[kind]) return 0;
    failed[kind] = 1;
    fprintf(stderr, "FAILED %d\n", kind);
    errno = EIO;
    return 1;
}
int flock(int fd, int op) { errno = atoi(getenv("NO_LOCKS")); return -1; }
int fsync(int fd) {
    struct stat s;
    if (!fstat(fd, &s) && S_ISDIR(s.st_mode)) { errno = EINVAL; return -1; }
    return fails(fd, 0) ? -1 : syscall(SYS_fsync, fd);
}
ssize_t write(int fd, const void *data, size_t n) { return fails(fd, 1) ? -1 : syscall(SYS_write, fd, data, n); }
ssize_t pread(int fd, void *data, size_t n, off_t at) {
    return fails(fd, 2) ? -1 : syscall(SYS_pread64, fd, data, n, at);
}
ssize_t pread64(int fd, void *data, size_t n, off_t at) { return pread(fd, data, n, at); }
"""
CONFIG = """\
data: {{name: hdf5, root: {root}/data.h5}}
model: {{layers: [{{linear: 3}}]}}
train: {{epochs: 2, batch_size: 8}}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler makes the file system that fails")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c"], check=True)
    return folder / "shim.so"


@pytest.mark.parametrize("locks", ["37", pytest.param("524", marks=pytest.mark.slow)])
def test_training_where_the_file_system_lacks_locks_and_fails_once(tmp_path: Path, shim: Path, locks: str) -> None:
    """A training on chunked rows, which are read through HDF5, survives such a file system."""
    random = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("x", data=random.normal(size=(40, 6)), chunks=(8, 6))
        file["y"] = random.integers(0, 3, 40)
    (tmp_path / "c.yaml").write_text(CONFIG.format(root=tmp_path))
    environment = {**os.environ, "LD_PRELOAD": str(shim), "NO_LOCKS": locks, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nettorrent_mpi.train", tmp_path / "c.yaml", "--output", tmp_path / "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed = [line for line in done.stderr.splitlines() if line.startswith("FAILED")]
    assert sorted(failed) == ["FAILED 0", "FAILED 1", "FAILED 2"]
    assert "no checkpoint" not in done.stderr
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
    assert (tmp_path / "run" / "summary.json").exists()
