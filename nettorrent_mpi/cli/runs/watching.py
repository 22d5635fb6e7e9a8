"""The command `nettorrent watch`: a run while it goes on, in the terminal or on a page."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nettorrent_mpi.cli.local_server import NOT_FOUND, LocalServer, Request, Response
from nettorrent_mpi.cli.runs.page import page
from nettorrent_mpi.cli.runs.run_data import RUNNING, RunData, read_run
from nettorrent_mpi.cli.runs.values import one_line
from nettorrent_mpi.cli.terminal import terminal_width
from nettorrent_mpi.engine.run_files import RUN_FILES, is_run, run_of
from nettorrent_mpi.engine.run_lock import LOCK, in_use
from nettorrent_mpi.plan.errors import UserError

PAUSE = 1.0  # seconds between two looks at the files
SHARE = 0.1  # of the time, at most, for reading them
AGAIN = 15.0  # seconds after which a run is read again though no file has changed: its processes may be gone
WIDTH = 100  # columns where there is no terminal


def watch(place: str, *, once: bool, web: bool, port: int) -> int:
    """Show the run at `place` until it ends: in the terminal, or by a server. Raises UserErrors."""
    if port and not web:
        raise UserError("--port is for --web: write both, or leave it out")
    folder = run_of(Path(place)) or Path(place)
    try:
        while not once and not is_run(folder) and folder.is_dir() and in_use(folder):
            time.sleep(PAUSE)  # the ranks have just started
        if web:
            return _serve(folder, port)
        return _show(folder, once=once)
    except KeyboardInterrupt:
        return 0  # the usual end of looking on


def states(folder: Path) -> Iterator[RunData]:
    """Yield a run again whenever its files change, until it is over; the last one is how it ended."""
    before, at = None, 0.0
    while True:
        now, began = _signature(folder), time.monotonic()
        if now != before or began - at > AGAIN:
            run = read_run(folder)
            before, at = now, began
            yield run
            if run.state != RUNNING:
                return
        time.sleep(max(PAUSE, (time.monotonic() - began) / SHARE))


def _signature(folder: Path) -> list[tuple[int, int] | None]:
    """Return what changes when any of a run's files does."""
    found: list[tuple[int, int] | None] = []
    for name in (*RUN_FILES, LOCK):
        try:
            status = (folder / name).stat()
            found.append((status.st_mtime_ns if name != LOCK else 0, status.st_size))
        except OSError:
            found.append(None)
    return found


def _show(folder: Path, *, once: bool) -> int:
    from rich.console import Console
    from rich.live import Live

    from nettorrent_mpi.cli.runs.terminal_view import frame

    terminal = terminal_width(sys.stdout)
    width = terminal or WIDTH
    plain = not _can_draw(sys.stdout.encoding)
    colours = terminal is not None and "NO_COLOR" not in os.environ
    console = Console(file=sys.stdout, width=width, force_terminal=terminal is not None, no_color=not colours)
    if once:
        console.print(frame(read_run(folder), width, plain=plain, coloured=colours))
        return 0
    with Live(console=console, auto_refresh=False, redirect_stdout=False, vertical_overflow="crop") as live:
        for run in states(folder):
            live.update(frame(run, width, plain=plain, coloured=colours), refresh=True)
    return 0


def _can_draw(encoding: str) -> bool:
    try:
        "█━⣿".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _serve(folder: Path, port: int) -> int:
    run = read_run(folder)
    known: dict[str, object] = {}

    def answer(request: Request) -> Response:
        if request.method != "GET" or request.path:
            return NOT_FOUND
        now = (_signature(folder), int(time.monotonic() / AGAIN))
        if known.get("at") != now:
            found = read_run(folder)
            known["page"] = page(found, live=True, traced=found.state != RUNNING).encode()
            known["at"] = now
        told = known["page"]
        assert isinstance(told, bytes)
        return Response(told)

    server = LocalServer(answer, port)
    sys.stdout.write(f"{one_line(str(run.path))}: {server.url}\nOpen this address in a browser; Ctrl-C ends it.\n")
    sys.stdout.flush()
    server.serve()
    return 0
