"""Tables and analysis from figures made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from nettorrent_mpi.speedup.analysis import analysis, overloaded
from nettorrent_mpi.speedup.figures import best, figures, losses
from nettorrent_mpi.speedup.report import to_markdown

Results = dict[str, Any]


def test_figures(results: Results) -> None:
    found = {figure.side["name"]: figure for figure in figures(results)}
    assert set(found) == {side["name"] for side in results["sides"] if not side["impossible"]}
    rows = found["rows-2"]
    assert (rows.median, rows.speedup, rows.efficiency) == (180.0, 1.8, 0.9)
    assert rows.spread == pytest.approx(20 / 180)
    assert found["ddp-2"].efficiency == pytest.approx(0.4)


def test_without_the_baseline_there_is_nothing(results: Results) -> None:
    results["sides"][0]["samples_per_second"] = []
    assert figures(results) == []
    assert analysis(results) == ["There are no figures yet."]


def test_what_cannot_be_told_from_the_best(results: Results) -> None:
    found = figures(results)
    assert [figure.mode for figure in best(found, 2, ours=True)] == ["rows", "gossip"]
    assert [figure.mode for figure in best(found, 4, ours=True)] == ["gossip"]
    assert [figure.mode for figure in best(found, 2, ours=False)] == ["ddp"]
    assert best(found, 8, ours=True) == []


@pytest.mark.parametrize("mode", ["rows", "1f1b"])
def test_losses_are_all_that_efficiency_lacks(results: Results, mode: str) -> None:
    found = losses(results, mode)
    assert found is not None
    figure, lost = found
    assert figure.efficiency + sum(lost.values()) == pytest.approx(1)
    assert max(lost, key=lambda part: lost[part]) == ("bubble" if mode == "1f1b" else "waiting")
    assert losses(results, "gossip") is None


def test_analysis(results: Results) -> None:
    text = "\n".join(analysis(results))
    assert "One rank made 100 samples/s." in text
    assert "On 2 ranks `rows` was the fastest with 180 samples/s, 1.80 times one rank (90% efficiency)" in text
    assert "`gossip` is not distinguishable from it within the spread" in text
    assert "On 4 ranks (more than cores) `gossip` was the fastest" in text
    assert "of the modes with the weights of one rank `rows` was, with 120 (1.20 times)" in text
    assert "2.00 times PyTorch's best (torch, 1 thread, 50 samples/s) with one rank" in text
    assert "2.25 times PyTorch's best (ddp, 2 processes, 80 samples/s) with `rows` on 2 ranks" in text
    assert "`1f1b` on 2 ranks used 75% of its cores; it lost most, 24%, to the bubble of the pipeline" in text
    assert "The first at 90.00% was rows, 2 ranks, after 2.0 s, 2.00 times as fast as one rank" in text
    assert "torch, 2 threads did not reach it" in text


def test_nothing_faster_than_one_rank(results: Results) -> None:
    for side in results["sides"][1:]:
        side["samples_per_second"] = [figure / 10 for figure in side["samples_per_second"]]
    assert "nothing was faster than one rank" in "\n".join(analysis(results))


def test_ranks_that_exceed_the_cores(results: Results) -> None:
    assert overloaded(results).startswith("**4 ranks exceed the 2 cores of this machine.**")
    assert "no speedup beyond 2 is possible" in overloaded(results)
    results["host"]["cores"] = 1
    assert overloaded(results).startswith("**2 and 4 ranks exceed the 1 core of this machine.**")
    results["host"]["cores"] = 4
    assert overloaded(results) == ""
    assert r"\*" not in to_markdown(results)


def test_markdown(results: Results) -> None:
    text = to_markdown(results, ["speedup", "shares", "accuracy"])
    lines = text.splitlines()
    assert lines[0] == "# Speedup of some"
    assert (
        r"| `rows`: the rows of a batch divided | 2 | 180 | 11% | 1.80 | 90% | 1 replica x [a 1x1 \| b 1x1] | 4 |"
        in lines
    )
    assert (
        r"| `gossip`: replicas that gossip | 4\* | 130 | 2% | 1.30 | 32% | 1 replica x [a 1x1 \| b 1x1] | 4 |" in lines
    )
    assert r"\* more than the 2 cores of this machine" in lines
    assert "| 1f1b, 4 ranks | 4 stages for 2 weight layers: a stage needs one at least |" in lines
    assert "| torch_compile, 1 thread | torch.compile does not work here: no compiler |" in lines
    assert "| 1f1b | 0 | 73% | 0% | 0% | 25% | 2% |" in lines
    assert "| rows, 2 ranks | 2 | 2.0 | 2 | 91.00% |" in lines
    assert "| torch, 2 threads | 2 | not reached | 1 | 50.00% |" in lines
    assert "![shares](shares.svg)" in lines
    assert "- a note" in lines
    assert "as a whole" in text
    assert "Incomplete" not in text
    assert "abc" in text  # the commit
    assert max(line.count("\n") for line in lines) == 0


def test_batch_norm_is_told(results: Results) -> None:
    results["network"]["batch_norm"] = True
    assert "same micro-batches as one rank of ours" in to_markdown(results)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (None, "still running, or was killed"),
        ({"interrupted": True}, "interrupted"),
        ({"command": "mpirun x", "exit_code": 3, "lines": []}, "`mpirun x` failed with 3"),
    ],
)
def test_what_is_not_complete_says_so(results: Results, failure: Any, told: str) -> None:
    results |= {"complete": False, "failure": failure, "traces": [], "accuracy": None}
    text = to_markdown(results)
    assert "**Incomplete: " in text
    assert told in text


def test_pictures(results: Results, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (the extra `plots`) is not installed")
    from nettorrent_mpi.speedup.plots import draw

    assert draw(results, tmp_path) == ["speedup", "efficiency", "accuracy", "shares"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f"{name}.{end}" for name in ("speedup", "efficiency", "accuracy", "shares") for end in ("png", "svg")
    }
    assert ">ideal<" in (tmp_path / "speedup.svg").read_text()
    first = (tmp_path / "shares.svg").read_bytes()
    draw(results, tmp_path)
    assert (tmp_path / "shares.svg").read_bytes() == first  # the same figures, the same bytes
    assert draw({**results, "sides": [], "traces": [], "accuracy": None}, tmp_path) == []
