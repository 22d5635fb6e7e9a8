"""The progress of a training on rank 0: a live display on a terminal, plain lines elsewhere.

`rich` is loaded only for the live display. It redraws when there is news and never by a thread of its own, which would
take time from the rank that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from nettorrent_mpi.cli.terminal import fitted, terminal_width
from nettorrent_mpi.cli.time_left import TimeLeft

Record = Mapping[str, Any]  # a line of metrics.jsonl


class Reporter(Protocol):
    """A Reporter shows the records of a training, on rank 0 only."""

    def report(self, record: Record) -> None:
        """Show a record between evaluations: step, epoch, train_loss, learning_rate, samples_per_second, time."""

    def epoch(self, record: Record) -> None:
        """Show a record with an evaluation: also test_loss, test_accuracy, validation_accuracy (None if not there)."""

    def message(self, text: str) -> None:
        """Show one line, which stays above the live display."""

    def close(self) -> None:
        """Restore the terminal after the run."""


def open_reporter(
    stream: TextIO,
    *,
    layout: str,
    ranks: int,
    environment: str,
    output: str,
    steps: int,
    steps_per_epoch: int,
    left: TimeLeft,
) -> Reporter:
    """Make the reporter for `stream`. It first shows the layout in one line, the chosen environment and the run folder.
    `steps` is the number of steps of the run, and `left` estimates how long they take."""
    width = terminal_width(stream)
    where = f"{layout} on {ranks} rank{'s' if ranks > 1 else ''}"
    reporter: Reporter
    if width is None:
        reporter = Lines(stream, steps, steps_per_epoch, left)
        reporter.message(f"layout: {where}")
    else:
        reporter = Live(stream, steps, steps_per_epoch, left, width, where)
    for line in (environment, f"run folder: {output}"):
        if line:
            reporter.message(line)
    return reporter


class Quiet:
    """Shows nothing."""

    def report(self, record: Record) -> None: ...

    def epoch(self, record: Record) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """Writes one line per record, at once and without control characters: for batch logs."""

    def __init__(self, stream: TextIO, steps: int, steps_per_epoch: int, left: TimeLeft):
        self._stream, self._steps, self._per_epoch, self._left = stream, steps, steps_per_epoch, left

    def report(self, record: Record) -> None:
        self._left.see(record["step"], record, evaluated=False)
        self._write(f"{self._step(record)}  {figures(record)}  {remaining(self._left)}")

    def epoch(self, record: Record) -> None:
        self._left.see(record["step"], record, evaluated=True)
        self._write(f"{self._step(record)}  {figures(record)}  {scores(record)}  {remaining(self._left)}")

    def message(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        self._stream.flush()

    def _step(self, record: Record) -> str:
        step = str(record["step"]).rjust(len(str(self._steps)))
        epochs = self._steps / self._per_epoch
        return f"step {step}/{self._steps}  epoch {record['epoch']:.2f}/{epochs:.4g}"

    def _write(self, line: str) -> None:
        self._stream.write(line.rstrip() + "\n")
        self._stream.flush()


class Live:
    """Shows bars for the run and the epoch with the latest figures; a line remains for every evaluation."""

    def __init__(self, stream: TextIO, steps: int, steps_per_epoch: int, left: TimeLeft, width: int, layout: str):
        from rich.console import Console, Group
        from rich.live import Live as Display
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        self._text, self._width = Text, width
        self._steps, self._per_epoch, self._left = steps, steps_per_epoch, left
        self._console = Console(file=stream, force_terminal=True, width=width, highlight=False, markup=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            expand=True,
        )
        self._epoch = self._bars.add_task("epoch", total=steps_per_epoch, note="")
        self._run = self._bars.add_task("run", total=steps, note="")
        self._now = Text("running the first steps", style="dim")
        end = Text("")  # mpirun forwards complete lines, so the last one would be delayed
        self._display = Display(
            Group(self._bars, self._now, end), console=self._console, auto_refresh=False, redirect_stdout=False
        )
        self._display.start()
        self._console.show_cursor(True)  # a killed run cannot restore it
        self.message(f"layout: {layout}")

    def report(self, record: Record) -> None:
        self._left.see(record["step"], record, evaluated=False)
        self._show(record)

    def _show(self, record: Record) -> None:
        step = record["step"]
        number = -(-step // self._per_epoch)
        inside = step - (number - 1) * self._per_epoch
        epochs = -(-self._steps // self._per_epoch)
        self._bars.update(self._epoch, completed=inside, description=f"epoch {number}/{epochs}")
        self._bars.update(self._run, completed=step, note=remaining(self._left))
        self._now.plain = f"step {step}/{self._steps}  {figures(record)}"
        self._now.style = ""
        self._display.refresh()

    def epoch(self, record: Record) -> None:
        self._left.see(record["step"], record, evaluated=True)
        self._show(record)
        self.message(
            f"epoch {record['epoch']:<6.4g} step {record['step']}  {figures(record)}  {scores(record)}".rstrip()
        )

    def message(self, text: str) -> None:
        self._console.print(self._text(fitted(text, self._width)), soft_wrap=True)
        self._display.refresh()

    def close(self) -> None:
        self._display.stop()


def figures(record: Record) -> str:
    """Write the figures that every record has."""
    loss, speed, distance = record["train_loss"], record["samples_per_second"], record.get("consensus_distance")
    apart = "" if distance is None else f"  replicas {100 * distance:.2g} % apart"
    return f"loss {loss:.4f}  lr {record['learning_rate']:.3g}  {speed:,.0f} samples/s{apart}"


def scores(record: Record) -> str:
    """Write the figures of an evaluation, if there are any."""
    parts = []
    if record.get("test_loss") is not None:
        parts.append(f"test loss {record['test_loss']:.4f}")
    for key, name in (("test_accuracy", "test accuracy"), ("validation_accuracy", "validation accuracy")):
        if record.get(key) is not None:
            parts.append(f"{name} {100 * record[key]:.2f} %")
    return "  ".join(parts)


def remaining(left: TimeLeft) -> str:
    """Write the time left, if it is known and there is any."""
    return f"{clock(left.seconds)} left" if left.seconds else ""


def clock(seconds: float) -> str:
    """Write 90 seconds as 1:30, an hour as 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
