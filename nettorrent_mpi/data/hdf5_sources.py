"""The files from which HDF5 puts a data set together: links and virtual data sets lead to other ones.

A file that somebody else made could lead to any: to a pipe, which is waited for without an end, or to a private file,
whose bytes would become rows. So every step is looked at before HDF5 takes it: it has to end at a plain file that is
named as lying in the folder of the first one or below (a symbolic link of the user's own may stand there).
"""

from __future__ import annotations

import os
from pathlib import Path

import h5py

from nettorrent_mpi.data.hdf5_chunks import check_filters, check_whole, check_written
from nettorrent_mpi.data.storage import read_hdf5
from nettorrent_mpi.plan.errors import DataError

_MOST_RATIO = 4096  # of the bytes of a data set to those of its file: deflate reaches 1032
_MOST_STEPS = 32  # links on the way to one data set, and virtual data sets of virtual ones


class HDF5Sources:
    """HDF5Sources find data sets of one file, at whatever ends of links and in whatever other files they are."""

    def __init__(self, file: h5py.File, path: Path):
        self._file, self._path = file, path
        self._folder = os.path.abspath(path.parent)
        self._checked: set[tuple[str, str]] = set()

    def find(self, name: str) -> h5py.Dataset | h5py.Group | h5py.Datatype | None:
        """Return the object of this name, if there is one. Raises DataError where one of its parts is elsewhere."""
        return self._find(self._file, name, name, 0)

    def _find(self, file: h5py.File, place: str, name: str, steps: int) -> h5py.Dataset | h5py.Group | None:
        """Return what is at `place` of `file`, which is a part of data set `name`."""
        if steps > _MOST_STEPS:
            raise DataError(f"{name} is behind more than {_MOST_STEPS} links", file=str(self._path))
        here = file["/"]
        parts = [part for part in place.split("/") if part not in ("", ".")]
        for number, part in enumerate(parts):
            link = here.get(part, getlink=True) if isinstance(here, h5py.Group) else None
            if link is None:
                return None
            rest = "/".join(parts[number + 1 :])
            if isinstance(link, h5py.SoftLink):
                start = "" if link.path.startswith("/") else here.name
                return self._find(file, f"{start}/{link.path}/{rest}", name, steps + 1)
            if isinstance(link, h5py.ExternalLink):
                what = f"is a link to {link.path} of {link.filename}"
                other = read_hdf5(self._other(file, link.filename, name, what))
                return self._find(other, f"{link.path}/{rest}", name, steps + 1)
            here = here[part]
        if isinstance(here, h5py.Dataset):
            self._check(here, name, steps)
        return here

    def _check(self, data: h5py.Dataset, name: str, steps: int) -> None:
        """Raise DataError unless all parts of the data set are where they may be."""
        if data.external:
            text = f"{name} is stored in {data.external[0][0]}, outside of HDF5; write its values into this file"
            raise DataError(text, file=str(self._path))
        if not data.is_virtual:
            size = os.path.getsize(data.file.filename)
            if data.nbytes > _MOST_RATIO * size:
                text = (
                    f"{name} has {data.nbytes:,} bytes by its shape {data.shape}: a file of {size:,} cannot hold them"
                )
                raise DataError(text, file=str(self._path))
            check_filters(data, Path(data.file.filename), name)
            check_written(data, Path(data.file.filename), name)
            return
        sources = data.virtual_sources()
        for source in sources:
            if "%" in source.file_name:
                text = f"{name} is put together from files with numbers ({source.file_name}); name each of them"
                raise DataError(text, file=str(self._path))
            here = data.file.filename
            if source.file_name != ".":
                what = f"is put together from files, one of them {source.file_name}"
                here = str(self._other(data.file, source.file_name, name, what))
            if (here, source.dset_name) in self._checked:
                continue
            self._checked.add((here, source.dset_name))
            with read_hdf5(Path(here)) as other:
                found = self._find(other, source.dset_name, name, steps + 1)
                if not isinstance(found, h5py.Dataset):
                    text = f"{name} is put together from data sets, but {here} has no {source.dset_name}"
                    raise DataError(text, file=str(self._path))
                if not found.is_virtual:
                    place = Path(found.file.filename)
                    check_whole(place, found.name, place.stat().st_mtime_ns)
        if sum(source.vspace.get_select_npoints() for source in sources) < data.size:
            text = f"{name} is put together from data sets that have not all of its values; write the rest"
            raise DataError(text, file=str(self._path))

    def _other(self, file: h5py.File, named: str, name: str, what: str) -> Path:
        """Return the path of another file, as HDF5 would find it."""
        path = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(file.filename)), named))
        if os.path.commonpath([path, self._folder]) != self._folder or "\0" in named:
            text = f"{name} {what}, outside of this file's folder; put it, or a symbolic link to it, beside this file"
            raise DataError(text, file=str(self._path))
        if not os.path.exists(path):
            raise DataError(f"{name} {what}, which is not there; put it beside this file", file=str(self._path))
        return Path(path)
