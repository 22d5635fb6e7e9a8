"""The page of a run: one HTML text without references to anything else, for the command `report` and `watch --web`.

Its policy (Content-Security-Policy) lets a browser run the page's own script and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from pathlib import Path

from nettorrent_mpi.cli.progress import clock
from nettorrent_mpi.cli.runs.charts import Bar, Curve, chart, rows
from nettorrent_mpi.cli.runs.layout_map import layout_map
from nettorrent_mpi.cli.runs.rank_bars import rows_of, share, verdict
from nettorrent_mpi.cli.runs.repeating import how_to_repeat
from nettorrent_mpi.cli.runs.run_data import RUNNING, RunData
from nettorrent_mpi.cli.runs.time_line import time_line, typical_step
from nettorrent_mpi.cli.runs.values import is_count, items, number, text
from nettorrent_mpi.engine.rank_seconds import PARTS
from nettorrent_mpi.plan.errors import DataError

REFRESH = 3  # seconds from one reading of the page of a running run to the next
MOST_LINES = 12  # of failures


def page(run: RunData, *, live: bool = False, traced: bool = True) -> str:
    """Return the page as HTML. A `live` one reads itself again while the run goes on; `traced`: with a time line."""
    style, script = ((Path(__file__).with_name(f"report.{kind}")).read_text(encoding="utf-8") for kind in ("css", "js"))
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = "'self'" if live else "'none'"  # where the script may read from: the page itself
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{checksum}'; img-src data:; "
        f"base-uri 'none'; form-action 'none'; connect-src {own}"
    )
    follow = f' data-refresh="{REFRESH}"' if live and run.state == RUNNING else ""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{escape(run.name)} - nettorrent</title><style>{style}</style></head>",
        f"<body><main{follow}>{_body(run, traced)}</main>",
        f'<div id="tip" hidden></div><script>{script}</script></body></html>',
    ]
    return "\n".join(lines) + "\n"


def _body(run: RunData, traced: bool) -> str:
    seconds = run.rank_seconds()
    slowest = seconds.slowest if seconds is not None else None
    sections = [_head(run), _curves(run)]
    if seconds is not None:
        sections.append(_section("Where the time went", _bars(run)))
    drawn = layout_map(run, slowest)
    if drawn:
        sections.append(_section("Layout", drawn))
    if traced:
        sections.append(_trace(run, slowest))
    sections += [
        _failures(run),
        _section("Environment", _environment(run)),
        _section("How to repeat it", how_to_repeat(run)),
    ]
    return "\n".join(filter(None, sections))


def _head(run: RunData) -> str:
    steps, last = run.steps, run.points[-1] if run.points else None
    tiles = []
    best = run.best
    if best is not None:
        after = best.point.figures.get("epoch")
        when = "" if after is None else f", epoch {after:.4g}"
        tiles.append((f"{100 * best.accuracy:.2f} %", f"best {best.kind} accuracy{when}"))
        if "train_loss" in best.point.figures:
            tiles.append((f"{best.point.figures['train_loss']:.4g}", f"training loss{when}"))
    elif run.last("train_loss") is not None:
        tiles.append((f"{run.last('train_loss'):.4g}", "training loss"))
    speed = run.last("samples_per_second")
    if speed is not None:
        tiles.append((f"{speed:,.0f}", "samples/s"))
    if last is not None:
        of = f" of {steps:,}" if steps is not None and steps != last.step else ""
        tiles.append((f"{last.figures.get('epoch', 0):.4g}", f"epochs, {last.step:,}{of} steps"))
    if run.last("time") is not None:
        left = run.seconds_left if run.state == RUNNING else None
        tiles.append((clock(run.last("time") or 0), "time" + (f", {clock(left)} left" if left else "")))
    hosts = len({run.host(rank) for rank in range(run.ranks or 0)})
    if run.ranks is not None:
        tiles.append((f"{run.ranks:,}", f"rank{'s' * (run.ranks > 1)} on {hosts:,} host{'s' * (hosts > 1)}"))
    told = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    damage = "".join(f'<p class="damage">{escape(line)}</p>' for line in run.damage)
    layout = f"<p>{escape(run.layout)}</p>" if run.layout else ""
    if len(run.parts) > 1:
        before = "; ".join(f"{part.name}: {part.where}" for part in run.parts[-1 - MOST_LINES : -1])
        layout += f"<p>since step {run.since + 1:,}; before: {escape(before)}</p>"
    return (
        f'<header><h1>{escape(run.name)} <span class="state {run.state}">{run.state}</span></h1>{layout}{damage}'
        f'<div class="tiles">{told}</div></header>'
    )


def _curves(run: RunData) -> str:
    epochs = is_count(run.about.get("steps_per_epoch")) and (run.last("epoch") or 0) >= 2
    per = run.about["steps_per_epoch"] if epochs else 1
    axis = "epoch" if epochs else "step"

    def curve(name: str, colour: str, figure: str) -> Curve:
        return Curve(name, colour, [(step / per, value) for step, value in run.curve(figure)])

    loss = [
        curve("training", "first", "train_loss"),
        curve("test", "second", "test_loss"),
        curve("validation", "third", "validation_loss"),
    ]
    accuracy = [curve("test", "second", "test_accuracy"), curve("validation", "third", "validation_accuracy")]
    drawn = [
        chart("Loss", loss, logarithmic=True, x_name=axis),
        chart("Accuracy", accuracy, unit="%", x_name=axis),
        chart("Learning rate", [curve("learning rate", "fourth", "learning_rate")], x_name=axis),
        chart("Speed", [curve("speed", "first", "samples_per_second")], unit="samples/s", x_name=axis),
        chart("Distance of the replicas", [curve("distance", "third", "consensus_distance")], unit="%", x_name=axis),
    ]
    if not any(drawn):
        return '<p class="card">No record yet: the first comes after <code>train.report_every</code> steps.</p>'
    return f'<div class="charts">{"".join(drawn)}</div>'


def _bars(run: RunData) -> str:
    seconds = run.rank_seconds()
    assert seconds is not None
    names: list[str] = []
    bars: list[list[Bar]] = []
    marked = None
    for name, parts, rank in rows_of(run, seconds):
        ends = parts.cumsum()
        own = [
            Bar(float(end - part), float(end), colour, f"{name}: {share(parts.tolist())}")
            for part, end, colour in zip(parts, ends, PARTS, strict=True)
        ]
        marked = len(names) if rank == seconds.slowest else marked
        names.append(name)
        bars.append(own)
    keys = "".join(f'<span class="key {part}">{part}</span>' for part in PARTS)
    about = (
        "Waiting is for messages and for other ranks. The rank that waits least is the one that the others wait for: "
        "give its stage more ranks, or see what else its core does."
    )
    told = f"<p><b>{escape(verdict(run, seconds))}</b> {about}</p>"
    return f'<p class="keys">{keys}</p>{rows(names, bars, unit="seconds", marked=marked)}{told}'


def _trace(run: RunData, slowest: int | None) -> str:
    try:
        trace = run.trace()
    except DataError as error:
        return _section("A step", f'<p class="damage">{escape(str(error))}</p>')
    part = run.traced_part
    if trace is None:
        return _section("A step", "<p>A run with <code>--set trace=true</code> shows here what each rank did when.</p>")
    if part is None:
        return _section("A step", "<p>trace.json is of no part of this run, and is left out.</p>")
    present = part is run.parts[-1]
    drawn = time_line(trace, slowest if present else None) or "<p>trace.json has no step as a whole.</p>"
    if len(run.parts) > 1:
        again = (typical_step(trace) or 0) >= part.last and not present
        told = f"Of {part.name}, on {part.where}" + ("; the step that is shown was done again later" if again else "")
        told += "" if present else f". Of part {len(run.parts)}, the latest, there is no trace"
        drawn = f"<p>{escape(told)}.</p>{drawn}"
    return _section("A step", drawn)


def _failures(run: RunData) -> str:
    lines = [
        f"after step {told.get('step')}: lost {told.get('lost')}, went on with {told.get('left')} ranks from step "
        f"{told.get('resumed_from')}, after {told.get('seconds')} s"
        for told in items(run.summary.get("failures"))
    ]
    told = "".join(f"<li>{escape(text(line))}</li>" for line in lines[:MOST_LINES])
    return _section("Lost ranks", f"<ul>{told}</ul>") if lines else ""


def _environment(run: RunData) -> str:
    about, summary = run.about, run.summary
    hosts = list(dict.fromkeys(run.host(rank) for rank in range(run.ranks or 0) if run.host(rank)))
    kernels = summary.get("kernels")
    pairs: list[tuple[str, str]] = [
        ("nettorrent_mpi", text(about.get("version")) or text(summary.get("version"))),
        ("commit", text(about.get("commit")) or text(summary.get("commit"))),
        ("MPI", text(about.get("mpi")) or text(summary.get("mpi"))),
        ("Python", text(about.get("python"))),
        ("NumPy", text(about.get("numpy"))),
        ("processor", text(about.get("processor"))),
        ("system", text(about.get("system"))),
        ("device", text(about.get("device")) or text(summary.get("device"))),
        ("kernels", ", ".join(filter(None, map(text, kernels))) if isinstance(kernels, list) else ""),
        ("hosts", ", ".join(hosts[:8]) + (f" and {len(hosts) - 8:,} more" if len(hosts) > 8 else "")),
        ("exchange", run.exchange),
        ("pipeline", text(about.get("pipeline"))),
        ("batch job", text(about.get("job"))),
        ("began", text(about.get("began"))),
        ("stopped by", text(summary.get("stopped_by"))),
    ]
    memory, predicted = number(summary.get("peak_memory_mb")), number(summary.get("memory_estimate_mb"))
    if memory is not None:
        of = f" ({predicted:,.0f} MB were predicted)" if predicted is not None else ""
        pairs.append(("memory of the largest rank", f"{memory:,.0f} MB{of}"))
    return _table(pairs)


def _table(pairs: Iterable[tuple[str, str]]) -> str:
    told = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs if value)
    return f"<table>{told}</table>"


def _section(title: str, content: str) -> str:
    return f'<section class="card"><h2>{escape(title)}</h2>{content}</section>'
