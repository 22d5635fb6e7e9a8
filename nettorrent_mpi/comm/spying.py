"""A Spy looks at what another thread of this process is doing, and at what the process moves, from outside.

It costs the observed thread nothing: Python's frames and the kernel's counters are read only where it does not advance.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = __name__.partition(".")[0]
LEAST = 1 << 16  # bytes per second that count as an advance
_WAITING = (f"{PACKAGE}.comm.", f"{PACKAGE}.exchange.rounds")  # modules whose innermost frame waits for others
_LOOP = f"{PACKAGE}.engine.trainer"
_STEP = {f"{PACKAGE}.engine.pipeline", f"{PACKAGE}.engine.device_pipeline"}
_LAYERS = f"{PACKAGE}.nn.layers.sequence"
_COUNTED = slice(120, 136)  # bytes_acked and bytes_received in Linux' struct tcp_info


class Spy:
    """A Spy remembers the last look, to see whether anything has moved since."""

    def __init__(self) -> None:
        self._bytes: int | None = None
        self._modules = len(sys.modules)
        self._layer = self._layer_before = ""
        self.waits: list[int] | None = None  # the ranks that the thread waits for; None: it computes
        self.where = ""  # the line of code where it is
        self.trains = self.acts = False  # whether it is in the training loop, in an action of a step

    def forget(self) -> None:
        """Begin anew: the thread has advanced."""
        self._bytes, self._layer, self._layer_before = None, "", ""

    def moves(self) -> bool:
        """Whether something has moved since the last call: another layer, bytes of files and connections, or modules
        that were imported."""
        modules, self._modules = self._modules, len(sys.modules)
        before, self._bytes = self._bytes, moved_bytes()
        layer, self._layer_before = self._layer_before, self._layer
        if modules != self._modules or (layer and layer != self._layer):
            return True
        return before is not None and self._bytes - before >= LEAST

    def look(self, thread: int | None) -> None:
        """Look what this thread is doing."""
        frame = sys._current_frames().get(thread or 0)
        modules = set()
        each = frame
        while each is not None:
            modules.add(_module(each))
            each = each.f_back
        self.trains, self.acts = _LOOP in modules, bool(modules & _STEP)
        self.waits, self._layer, self.where = awaited(frame), layer_of(frame), ""
        while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith("<frozen"):
            frame = frame.f_back  # of an import
        if frame is not None:
            place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
            self.where = f"layer {self._layer}, {place}" if self._layer else place


def awaited(frame: FrameType | None) -> list[int] | None:
    """Return the ranks for which a thread waits that is in this frame; None if it does not wait."""
    if frame is None or not _module(frame).startswith(_WAITING):
        return None
    while frame is not None and _module(frame).startswith(PACKAGE):
        for name in ("lap", "self", "group"):
            held = frame.f_locals.get(name)
            for each in (held, *(getattr(held, group, None) for group in ("group", "_group", "_peers"))):
                ranks = getattr(each, "ranks", None)
                if isinstance(ranks, tuple):
                    return list(ranks)
        frame = frame.f_back
    return []


def layer_of(frame: FrameType | None) -> str:
    """Return the name of the layer in whose forward or backward pass a thread is; "" outside."""
    while frame is not None:
        if _module(frame) == _LAYERS:
            return str(getattr(frame.f_locals.get("layer"), "name", ""))
        frame = frame.f_back
    return ""


def moved_bytes() -> int:
    """Return the bytes that this process has read, written, sent and received so far, as far as Linux counts them."""
    total = 0
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts: dict[str, Any] = dict(line.split(": ") for line in lines)
        total += int(counts["rchar"]) + int(counts["wchar"])
    for name in _descriptors():
        with suppress(OSError, ValueError), socket.socket(fileno=os.dup(int(name))) as connection:
            told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += sum(struct.unpack("QQ", told[_COUNTED])) if len(told) >= _COUNTED.stop else 0
    return total


def _descriptors() -> list[str]:
    found = []
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    found.append(name)
    return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
