"""Draws the pictures of the documentation from the package's own schedules and pairings, as SVG."""

from __future__ import annotations

from math import cos, pi, sin

from nettorrent_mpi.cli.runs.charts import Bar, rows
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.schedule import build
from nettorrent_mpi.plan.stream import stream
from nettorrent_mpi.plan.timeline import simulate

FORWARD, BACKWARD, WEIGHTS = 1.0, 2.0, 1.0  # units of time; those of the weights are part of backward


def schedule(pipeline: str, stages: int = 4, pieces: int = 6) -> str:
    """Draw who computes when in one step."""
    line = simulate(build(pipeline, stages, pieces), FORWARD, BACKWARD, 0.0, weights=WEIGHTS)
    return _lines(line.stages) + f"<p>{line.bubble:.0%} of the time stages wait.</p>"


def asynchronous(stages: int = 4, pieces: int = 4, steps: int = 3) -> str:
    """Draw some steps of a pipeline without flush."""
    line = simulate(stream(stages, pieces, steps), FORWARD, BACKWARD, 0.0)
    return _lines(line.stages) + f"<p>Of {steps} steps together, {line.bubble:.0%}; of a long run, nothing.</p>"


def _lines(stages: object) -> str:
    kinds = {"F": "forward", "B": "backward", "I": "backward", "W": "weights"}
    bars = [
        [Bar(i.start, i.end, kinds[i.action.kind], str(i.action), f"{i.action.kind}{i.action.micro_batch}")
         for i in intervals if i.action.kind in kinds]
        for intervals in stages  # type: ignore[attr-defined]
    ]  # fmt: skip
    return rows([f"stage {number}" for number in range(len(bars))], bars, unit="time")


def rounds(kind: str, replicas: int = 8, count: int = 3) -> str:
    """Draw who sends to whom in the first rounds of gossip."""
    pairing, parts = make_pairing(kind, replicas, seed=1), []
    for number in range(count):
        middle = 110 + 220 * number

        def at(replica: int, middle: int = middle) -> tuple[float, float]:
            turn = 2 * pi * replica / replicas
            return middle + 74 * sin(turn), 104 - 74 * cos(turn)

        for edge in pairing.edges(number):
            if edge.source != edge.target:
                (x, y), (u, v) = at(edge.source), at(edge.target)
                parts.append(f'<line class="talk" x1="{x:.1f}" y1="{y:.1f}" x2="{u:.1f}" y2="{v:.1f}"/>')
        for replica in range(replicas):
            x, y = at(replica)
            parts.append(f'<circle class="forward" cx="{x:.1f}" cy="{y:.1f}" r="13"/>')
            parts.append(f'<text class="label middle" x="{x:.1f}" y="{y + 4:.1f}">{replica}</text>')
        parts.append(f'<text class="middle" x="{middle}" y="214">round {number + 1}</text>')
    width = 220 * count
    return (
        f'<svg class="rounds" viewBox="0 0 {width} 222" style="max-width:{width}px" role="img">{"".join(parts)}</svg>'
    )
