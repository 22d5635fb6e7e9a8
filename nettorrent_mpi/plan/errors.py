"""Every exception of the package, in one tree.

NetTorrentError              exit code 1 unless stated otherwise
├── UserError                a mistake that the user can correct: exit code 2, one line, no traceback
│   ├── ConfigError          the configuration: names file, key and line
│   ├── LayoutError          a layout that the network or the rank count does not allow
│   ├── ShapeError           two layers that do not fit
│   ├── DataError            a data file that is missing, truncated or corrupt: names file and offset
│   ├── OutputError          the run folder: another run's results, no space, no permission
│   │   └── InUseError       another run that lives holds it
│   ├── SizeError            something that does not fit into memory
│   ├── DeviceMemoryError    something that does not fit into a GPU's memory
│   ├── RefusedError         any other file or folder that the operating system refuses: names it and the reason
│   ├── LaunchError          the launcher and MPI, or the ranks among themselves, disagree
│   └── DeviceError          a GPU that is asked for and cannot be used: says what is missing
├── NonFiniteError           the training diverged: names step, layer and rank
├── CommunicationError       GPUs do not exchange arrays any more: NCCL failed, or waits for ever
├── RemoteError              another rank failed by an error that is not the package's, and reports it itself
├── LostRanksError           other ranks have died, and the survivors go on without them or end
├── LostStateError           a part of the training state that no living rank holds: names the array
├── ChildError               a program that this one started failed: names it and shows its last lines
└── ScheduleError            a schedule that cannot run: names the action that waits

NetTorrentWarning            what is doubtful but may be meant, in one line: given by `warn`
"""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_MOST = 20  # mistakes of a configuration that are told at once

# Exit codes of runs that a signal has ended: stopped with a checkpoint (EX_TEMPFAIL of sysexits.h), and at once by a
# second Ctrl-C (as shells count: 128 + SIGINT).
SIGNALLED, INTERRUPTED = 75, 130


class NetTorrentError(Exception):
    """The root of the tree. `exit_code` is the program's exit code if the error is not caught. `agreed` says that all
    ranks of a world raise it alike: then it ends their present operation, otherwise the program on all ranks."""

    exit_code = 1
    agreed: frozenset[int] = frozenset()


class UserError(NetTorrentError):
    """A mistake by the user; the text says what was wrong, where, and how to correct it. `key` is that of the
    configuration's value which is to be changed, if it is known."""

    exit_code = 2
    key: str | None = None

    def __str__(self) -> str:
        return readable(super().__str__())


class ConfigError(UserError):
    """A wrong configuration. `key` is the dotted path, `line` counts from 1."""

    def __init__(self, message: str, *, file: str | None = None, key: str | None = None, line: int | None = None):
        self.file, self.key, self.line = file, key, line
        where = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (where, key, message) if part))

    @classmethod
    def several(cls, errors: Sequence[ConfigError]) -> ConfigError:
        """Make one error of several, each in a line of its own; `file`, `key` and `line` are those of the first."""
        if len(errors) == 1:
            return errors[0]
        more = len(errors) - _MOST
        told = [*(f"  {error}" for error in errors[:_MOST]), *([f"  ... and {more:,} more"] if more > 0 else [])]
        made = cls("\n".join([f"{len(errors):,} mistakes", *told]))
        made.file, made.key, made.line = errors[0].file, errors[0].key, errors[0].line
        return made


class LayoutError(UserError):
    """An impossible layout; the text gives the nearest possible one."""


class ShapeError(UserError):
    """Two neighbouring layers whose shapes do not fit; the text names both. `layer` is the name of the second in the
    network, of the block that it is in, or of the layer whose activation it is."""

    layer: str | None = None


class DataError(UserError):
    """A data file that cannot be used. `offset` is the byte at which reading failed."""

    def __init__(self, message: str, *, file: str | None = None, offset: int | None = None):
        self.file, self.offset = file, offset
        where = f"{file} at byte {offset}" if offset is not None else file
        super().__init__(": ".join(part for part in (where, message) if part))


@contextmanager
def keyed(key: str) -> Iterator[None]:
    """Say that this key of the configuration is to be changed, where a UserError inside the `with` block names none."""
    try:
        yield
    except UserError as error:
        error.key = error.key or key
        raise


class OutputError(UserError):
    """The run folder cannot be written."""


class InUseError(OutputError):
    """A run folder that a living run holds."""


class SizeError(UserError):
    """Something that does not fit into memory."""


class DeviceMemoryError(UserError):
    """A GPU has too little memory: this rank, which holds `held` bytes, needs `needed` more; `free` of `memory` are
    free."""

    def __init__(self, name: str, *, needed: int, held: int, free: int, memory: int):
        sizes = [f"{size / 2**20:,.1f} MiB" for size in (needed, held, free, memory)]
        super().__init__(
            f"{name}: this rank needs {sizes[0]} more than the {sizes[1]} that it holds, but only {sizes[2]} of "
            f"{sizes[3]} are free: lower train.batch_size, raise train.micro_batches, use more ranks or replicas with "
            "GPUs of their own, or end other programs on this GPU; --dry-run predicts the memory of each rank"
        )


class RefusedError(UserError):
    """A file or folder that the operating system refuses to open, read or write."""


class LaunchError(UserError):
    """The launcher, MPI and the ranks disagree about the run."""


class DeviceError(UserError):
    """A GPU that is asked for and cannot be used."""


class NoPlanError(DeviceError):
    """A convolution that a GPU's library has no plan for."""


class NonFiniteError(NetTorrentError):
    """The training diverged: a value that is not finite occurred, though the data are finite. `step` counts from 1."""

    def __init__(self, *, step: int, layer: str, rank: int, evaluated: bool = False):
        self.step, self.layer, self.rank = step, layer, rank
        when = "in the evaluation after " if evaluated else ""
        super().__init__(
            f"{when}step {step}: the output of layer {layer} is not finite (seen on rank {rank}). The data are, so the "
            "training has diverged: lower the learning rate, add warm-up, or clip the gradients (train.clip_norm)"
        )


class RemoteError(NetTorrentError):
    """Another rank failed by an error that is not the package's. That rank prints it with its traceback."""


class CommunicationError(NetTorrentError):
    """GPUs do not exchange arrays any more: NCCL has failed, or a GPU waits for another rank for ever."""


class LostRanksError(NetTorrentError):
    """Other ranks have died."""


class LostStateError(NetTorrentError):
    """A part of an array that is wanted and that no rank holds."""

    def __init__(self, name: str, part: object):
        self.name = name
        super().__init__(f"no living rank holds part {part} of {name}")


class ChildError(NetTorrentError):
    """A started program failed. `command` is its command line, `lines` are its last lines of output."""

    def __init__(self, command: str, code: int, lines: Sequence[str]):
        self.command, self.code, self.lines = command, code, list(lines)
        how = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        super().__init__("\n".join([f"{command} {how}" + (":" if lines else ""), *(f"  {line}" for line in lines)]))


class ScheduleError(NetTorrentError):
    """A schedule that cannot run to completion."""


_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}  # where writing fails, no file is named


def in_one_line(error: Exception) -> NetTorrentError | None:
    """Return the error that tells a user of this one: itself if it is the package's, one for too little memory, or for
    what the operating system says about a file or its name; None for any other."""
    if isinstance(error, NetTorrentError):
        return error
    if isinstance(error, MemoryError):
        reason = f" ({error})" if str(error) else ""
        return SizeError(
            f"there is not enough memory{reason}: make the network, the mini-batch or the data smaller, or divide them "
            "over more ranks and nodes; --dry-run predicts the memory of each rank"
        )
    if isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in _OF_DISKS):
        return RefusedError(": ".join(str(part) for part in (error.filename, error.strerror) if part is not None))
    if isinstance(error, UnicodeEncodeError):
        text = f"{error.object!r} cannot be written in this locale's encoding, {error.encoding}; set LC_ALL=C.UTF-8"
        return RefusedError(text)
    return None


class NetTorrentWarning(UserWarning):
    """A NetTorrentWarning tells of what is doubtful but may be meant. `alone` says that only this rank may have found
    it."""

    def __init__(self, text: str, alone: bool = False):
        self.alone = alone
        super().__init__(readable(text))


def warn(text: str, *, alone: bool = False) -> None:
    """Warn of what is doubtful but may be meant, in one line that names the key or file, and the remedy.

    A command shows it as `nettorrent: warning: ...`: rank 0 what all ranks find alike, and, if `alone`, the rank that
    found it. From Python it is a NetTorrentWarning of the module `warnings`.
    """
    warnings.warn(NetTorrentWarning(text, alone), stacklevel=2)


def listed(names: Sequence[str]) -> str:
    """List names in a message: the first ten, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def readable(text: str) -> str:
    """Write as escapes what a terminal would not show but obey, or what no encoding has, and shorten endless words:
    names of files, classes and keys may hold anything. Lines stay lines."""
    text = re.sub(r"\S{500,}", lambda found: f"{found[0][:300]}...{found[0][-100:]}", text)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
