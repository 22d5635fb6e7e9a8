"""What rank 0 tells: plain lines for logs, a live display for terminals, and how the two are told apart."""

from __future__ import annotations

import io
import os
import re
import stat
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.cli.progress import Lines, Live, clock, open_reporter
from nettorrent_mpi.cli.streams import SafeStream
from nettorrent_mpi.cli.terminal import fitted, terminal_width
from nettorrent_mpi.cli.time_left import TimeLeft

RECORD: dict[str, Any] = {
    "step": 50,
    "epoch": 1.1111,
    "samples": 1600,
    "time": 10.0,
    "train_loss": 0.43214,
    "learning_rate": 0.00199,
    "samples_per_second": 3210.4,
}
SCORES = {"test_loss": 0.25, "test_accuracy": 0.9712, "validation_loss": None, "validation_accuracy": None}


class Log(io.StringIO):
    """A file that knows how much of it was flushed."""

    flushed = 0

    def flush(self) -> None:
        self.flushed = len(self.getvalue())


def opened(stream: io.StringIO) -> Any:
    return open_reporter(
        stream, layout="1 replica x [linear1 1x1]", ranks=1, environment="1 BLAS thread", output="runs/x",
        steps=450, steps_per_epoch=45, left=TimeLeft(450, 45),
    )  # fmt: skip


def test_plain_lines() -> None:
    log = Log()
    reporter = opened(log)
    reporter.report(RECORD | {"step": 1, "samples": 32, "time": 5.0})
    reporter.report(RECORD)
    reporter.epoch(RECORD | SCORES | {"step": 60, "time": 12.0})
    reporter.epoch(RECORD | SCORES | {"step": 450, "epoch": 10.0, "validation_accuracy": 0.5, "test_loss": None})
    reporter.close()
    figures = "loss 0.4321  lr 0.00199  3,210 samples/s"
    assert log.getvalue().splitlines() == [
        "layout: 1 replica x [linear1 1x1] on 1 rank",
        "1 BLAS thread",
        "run folder: runs/x",
        f"step   1/450  epoch 1.11/10  {figures}",
        f"step  50/450  epoch 1.11/10  {figures}  0:04 left",
        f"step  60/450  epoch 1.11/10  {figures}  test loss 0.2500  test accuracy 97.12 %  1:18 left",
        f"step 450/450  epoch 10.00/10  {figures}  test accuracy 97.12 %  validation accuracy 50.00 %",
    ]


def test_plain_lines_are_written_at_once_and_without_control_characters() -> None:
    log = Log()
    reporter = Lines(log, 450, 45, TimeLeft(450, 45))
    for tell in (reporter.report, reporter.epoch):
        tell(RECORD | SCORES)
        assert log.flushed == len(log.getvalue()) > 0
    reporter.message("[bold]words[/bold]")
    assert log.getvalue().endswith("[bold]words[/bold]\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", log.getvalue())


def test_the_live_display_shows_the_figures_and_keeps_a_line_for_every_evaluation() -> None:
    screen = io.StringIO()
    live = Live(screen, 450, 45, TimeLeft(450, 45), 110, "1 replica x [conv2d1 3x1 | linear1 1x2]  on 5 ranks")
    live.report(RECORD | {"step": 40, "time": 8.0})
    live.epoch(RECORD | SCORES)
    live.message("[bold]words[/bold]")
    live.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for words in ("1 replica x [conv2d1 3x1 | linear1 1x2]  on 5 ranks", "epoch 2/10", "1:20 left", "loss 0.4321",
                  "lr 0.00199", "3,210 samples/s", "test accuracy 97.12 %", "[bold]words[/bold]", "11 %"):  # fmt: skip
        assert words in text
    assert sum(line.startswith("epoch 1.111") for line in text.splitlines()) == 1
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l")  # the cursor is visible


def test_the_live_display_fits_a_narrow_terminal() -> None:
    screen = io.StringIO()
    live = Live(
        screen, 450, 45, TimeLeft(450, 45), 40, "1 replica x [" + " | ".join(f"conv2d{i} 3x1" for i in range(20)) + "]"
    )
    live.report(RECORD)
    live.epoch(RECORD | SCORES)
    live.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert {"conv2d19", "samples/s", "accuracy"} <= set(text.split())
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]+", text)) <= 40


def test_text_is_broken_between_words() -> None:
    text = "nettorrent: error: 2 mistakes\n  f.yaml:1: seed: unknown\n\nstage  rank  " + "x" * 30 + " end"
    assert fitted(text, 80) == text
    assert fitted(text, 18).splitlines() == [
        "nettorrent: error:", "  2 mistakes", "  f.yaml:1: seed:", "    unknown", "",
        "stage  rank", "  " + "x" * 30, "  end",
    ]  # fmt: skip
    for width in range(1, 90):
        assert fitted(text, width).split() == text.split()


def test_a_log_loads_no_terminal_library() -> None:
    code = (
        "import sys\nfrom nettorrent_mpi.cli.progress import open_reporter\n"
        "from nettorrent_mpi.cli.time_left import TimeLeft\n"
        "open_reporter(sys.stdout, layout='', ranks=1, environment='', output='', steps=1, steps_per_epoch=1, "
        "left=TimeLeft(1, 1))\n"
        "sys.exit('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@contextmanager
def terminal(columns: int) -> Iterator[tuple[int, int]]:
    """(the side that a person sees, the side that a program writes to) of a pseudo-terminal."""
    screen, line = os.openpty()
    termios.tcsetwinsize(line, (30 if columns else 0, columns))
    try:
        yield screen, line
    finally:
        os.close(screen)
        os.close(line)


def test_terminals_and_files_are_told_apart(tmp_path: Path) -> None:
    assert terminal_width(io.StringIO()) is None
    with (tmp_path / "log").open("w") as log:
        assert terminal_width(log) is None
    for columns, width in ((93, 93), (0, None)):
        with terminal(columns) as (_, line), os.fdopen(os.dup(line), "w") as stream:
            assert terminal_width(stream) == width


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("seen", [True, False])
def test_behind_a_launcher_its_own_output_counts(tmp_path: Path, seen: bool) -> None:
    """Open MPI gives a rank a pseudo-terminal of no size, whether mpirun writes to a terminal or to a file."""
    launcher = tmp_path / "mpirun"
    (tmp_path / "rank.py").write_text(
        "import os, sys\nfrom nettorrent_mpi.cli.terminal import terminal_width\n"
        "screen, line = os.openpty()\n"
        "open(sys.argv[1], 'w').write(str(terminal_width(os.fdopen(line, 'w'))))\n"
    )
    answer = tmp_path / "answer"
    # not the last command, so that the shell stays in between, as mpirun does
    launcher.write_text(f"#!/bin/sh\n{sys.executable} {tmp_path}/rank.py {answer}\nexit 0\n")
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    root = str(Path(__file__).parents[2])
    with terminal(77) as (_, line), (tmp_path / "log").open("w") as log:
        stdout = line if seen else log
        subprocess.run([launcher], stdout=stdout, env={**os.environ, "PYTHONPATH": root}, timeout=60, check=True)
    assert answer.read_text() == ("77" if seen else "None")


def test_what_is_written_to_a_terminal_is_broken_between_words() -> None:
    with terminal(40) as (screen, line), os.fdopen(os.dup(line), "w") as stream:
        output = SafeStream(stream)
        output.write("nettorrent: error: configs/mnist.yaml:12: model.layers[2]: unknown key; did you mean units?\n")
        output.write("\x1b[1m" + "a live display's line is its own affair and stays as it is\n")
        output.flush()
        lines = os.read(screen, 1000).decode().replace("\r", "").splitlines()
    assert lines == [
        "nettorrent: error:",
        "  configs/mnist.yaml:12:",
        "  model.layers[2]: unknown key; did you",
        "  mean units?",
        "\x1b[1ma live display's line is its own affair and stays as it is",
    ]


def test_clock() -> None:
    assert [clock(s) for s in (0, 9.6, 90, 3600, 36_061)] == ["0:00", "0:10", "1:30", "1:00:00", "10:01:01"]
