"""Tables and analysis from figures made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.speedup.analysis import analysis, doubtful, overloaded
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


@pytest.mark.parametrize("name", ["rows-2", "1f1b-2"])
def test_losses_are_all_that_efficiency_lacks(results: Results, name: str) -> None:
    found = losses(results, name)
    assert found is not None
    figure, lost = found
    assert figure.efficiency + sum(lost.values()) == pytest.approx(1)
    assert max(lost, key=lambda part: lost[part]) == ("bubble" if name == "1f1b-2" else "waiting")
    assert losses(results, "gossip-2") is losses(results, "serial-1") is None


def test_analysis(results: Results) -> None:
    text = "\n".join(analysis(results))
    assert "One rank made 100 samples/s." in text
    assert "On 2 ranks `rows` = `auto` was the fastest with 180 samples/s, 1.80 times one rank (90% efficiency)" in text
    assert "`gossip` is not distinguishable from it within the spread" in text
    assert "On 4 ranks (more than cores) `gossip` was the fastest" in text
    assert "of the modes with the weights of one rank `auto` was, with 125 (1.25 times)" in text
    assert "2.00 times PyTorch's best (torch, 1 thread, 50 samples/s) with one rank" in text
    assert "2.25 times PyTorch's best (ddp, 2 processes, 80 samples/s) with `rows` = `auto` on 2 ranks" in text
    assert (
        "| rows = auto, 2 ranks | 90% | 1% | 4% | **5%** | 0% | 0% |\n| 1f1b, 2 ranks | 75% | 1% | 0% | 0% | **24%** |"
        in text
    )
    assert "The first at 90.00% was rows = auto, 2 ranks, after 2.0 s, 2.00 times as fast as one rank" in text
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
    rows = (
        r"| `rows` = `auto`: the rows of a batch divided | 2 | 180 | 11% | 1.80 | 90% | 1 replica x [a 1x1 \| b 1x1] |"
    )
    assert f"{rows} 4 |" in lines
    assert (
        r"| `gossip`: replicas that gossip | 4\* | 130 | 2% | 1.30 | 32% | 1 replica x [a 1x1 \| b 1x1] | 4 |" in lines
    )
    assert r"\* more than the 2 cores of this machine" in lines
    assert "| 1f1b, 4 ranks | 4 stages for 2 weight layers: a stage needs one at least |" in lines
    assert "| torch_compile, 1 thread | torch.compile does not work here: no compiler |" in lines
    assert "| 1f1b, 2 ranks | rank 0 | 73% | 0% | 0% | 25% | 2% |" in lines
    assert "| rows = auto, 2 ranks | 2 | 2.0 | 2 | 91.00% |" in lines
    assert "| torch, 2 threads | 2 | not reached | 1 | 50.00% |" in lines
    assert "![shares](shares.svg)" in lines
    assert "- a note" in lines
    assert sum("joined by =" in line for line in lines) == 1
    assert "as a whole" in text
    assert "Incomplete" not in text
    assert "abc" in text  # the commit
    assert max(line.count("\n") for line in lines) == 0


def test_wide_spread_is_warned_of(results: Results) -> None:
    assert doubtful(figures(results)[1:]) == ""
    text = to_markdown(results)  # one rank: from 90 to 110
    assert "**The figures of 1 of 10 sides spread by more than 15%:** one rank (20%)." in text
    assert "| one rank | 1 | 100 | **20%** |" in text
    results["sides"][1]["samples_per_second"] = [180.0]
    text = to_markdown(results)
    assert "**rows = auto, 2 ranks was measured once,**" in text
    assert "| 2 | 180 | ? | 1.80 |" in text
    assert "Medians of 1 to 3 alternating turns" in text
    for side in results["sides"]:
        side["samples_per_second"] = side["samples_per_second"][:1]
    text = to_markdown(results)
    assert "**Every side was measured once,**" in text
    assert "Figures of one turn of 100 steps" in text


def test_many_ranks_are_shown_by_their_extremes(results: Results) -> None:
    shares = [
        {"compute": 0.5 + n / 100, "communication": 0.5 - n / 100, "waiting": 0.0, "bubble": 0.0, "other": 0.0}
        for n in range(20)
    ]
    results["traces"][1]["shares"] = shares
    told = [line for line in to_markdown(results).splitlines() if line.startswith("| rows = auto, 2 ranks | ")]
    assert "| rows = auto, 2 ranks | mean of 20 ranks | 60% | 40% | 0% | 0% | 0% |" in told
    assert "| rows = auto, 2 ranks | rank 19, which computed most | 69% | 31% | 0% | 0% | 0% |" in told
    assert "| rows = auto, 2 ranks | rank 0, which computed least | 50% | 50% | 0% | 0% | 0% |" in told
    assert not any("rank 7" in line for line in told)


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
    from nettorrent_mpi.speedup.plots import draw, speedup

    assert draw(results, tmp_path) == ["speedup", "efficiency", "accuracy", "shares"]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{end}" for name in ("speedup", "efficiency", "accuracy", "shares") for end in ("png", "svg")
    }
    lines = (tmp_path / "speedup.svg").read_text()
    assert ">ideal<" in lines
    assert (">rows<" in lines, ">auto<" in lines) == (True, True)  # on 4 ranks they differ
    way = (tmp_path / "accuracy.svg").read_text()
    names = [way.index(f">{name}<") for name in ("rows = auto, 2 ranks", "one rank", "torch, 2 threads")]
    assert names == sorted(names)  # the fastest first
    assert ">2.0 s<" in way
    assert ">not reached: 50.00% in 3.0 s<" in way
    results["sides"] = [side for side in results["sides"] if side["cpus"] < 4]
    picture = speedup(results)
    assert picture is not None
    assert "rows = auto" in picture.axes[0].get_legend_handles_labels()[1]
    first = (tmp_path / "shares.svg").read_bytes()
    draw(results, tmp_path)
    assert (tmp_path / "shares.svg").read_bytes() == first  # the same figures, the same bytes
    assert draw({**results, "sides": [], "traces": [], "accuracy": None}, tmp_path) == []


def rows_of(report: str, heading: str) -> dict[str, list[str]]:
    """The cells of each line of the table below this heading, by the first; of its header by "side"."""
    part = report.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {cells[0]: [cell.strip() for cell in cells[1:]] for cells in lines}


def test_ranks_on_gpus(results_on_gpus: Results) -> None:
    report = to_markdown(results_on_gpus, ["speedup"])
    table = rows_of(report, "Samples per second")
    assert table["side"][:6] == ["GPUs used", "samples/s", "spread", "speedup", "efficiency", "of PyTorch on one GPU"]
    assert table["one GPU"][:6] == ["1", "100", "**20%**", "1.00", "100%", "1.25"]
    assert table["`rows`: the rows of a batch divided"][:6] == [r"4\*", "120", "2%", "1.20", "30%", "1.50"]
    assert table["PyTorch, torch.compile, on a GPU"] == ["1", "80", "2%", "0.80", "80%", "1.00", "one GPU"]
    assert r"\* more than the 2 GPUs of this machine" in report
    assert "A processor, 2 cores; 2 x A GPU; Python" in report
    assert "one GPU a rank" in report
    assert "brings them once" in report
    text = " ".join(report.split())
    assert "**4 ranks exceed the 2 GPUs of this machine.** There they share a GPU" in text
    assert (
        "One GPU made 100 samples/s. On 2 ranks `rows` = `auto` was the fastest with 180 samples/s, 1.80 times" in text
    )
    assert "1.80 times one GPU (90% efficiency)" in text
    assert (
        "Beside PyTorch on the same GPU this package made 1.25 times PyTorch's best (torch_compile, one GPU, 80" in text
    )
    assert "samples/s) with one GPU." in text
    assert "2.00 times as fast as one GPU" in text
    assert rows_of(report, "Time to accuracy")["torch, one GPU"][0] == "1"


def test_ranks_on_cores_beside_a_gpu(results_beside_a_gpu: Results) -> None:
    report = to_markdown(results_beside_a_gpu)
    table = rows_of(report, "Samples per second")
    assert table["side"][:5] == ["cores used", "samples/s", "spread", "speedup", "efficiency"]
    assert table["side"][5:7] == ["of one GPU", "of PyTorch on one GPU"]
    assert table["one rank"][:7] == ["1", "100", "**20%**", "1.00", "100%", "0.10", "0.20"]
    assert table["one GPU"][:7] == ["a GPU", "1,000", "2%", "10.00", "", "1.00", "2.00"]
    assert table["PyTorch, on a GPU"][:7] == ["a GPU", "500", "4%", "5.00", "", "0.50", "1.00"]
    text = " ".join(report.split())
    assert "One GPU made 1,000 samples/s, 10.00 times one rank on a core; the fastest on cores" in text
    assert "rows = auto, 2 ranks, made 0.18 times as many as the GPU" in text
    assert "2.00 times PyTorch's best (torch, one GPU, 500 samples/s) with one GPU" in text
    assert "**4 ranks exceed the 2 cores of this machine.**" in text
    assert rows_of(report, "Time to accuracy")["one GPU"][0] == "a GPU"
    assert rows_of(report, "Where the time went")


@pytest.mark.parametrize("kind", ["results_on_gpus", "results_beside_a_gpu"])
def test_pictures_of_gpus(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    plots = pytest.importorskip("nettorrent_mpi.speedup.plots", reason="matplotlib is not installed")
    drawn = plots.draw(request.getfixturevalue(kind), tmp_path)
    assert drawn == ["speedup", "efficiency", "accuracy", *(["shares"] if kind == "results_beside_a_gpu" else [])]
    told = (tmp_path / "speedup.svg").read_text()
    assert "of PyTorch: one GPU" in told
    assert ("more than the 2 GPUs" in told) == (kind == "results_on_gpus")
    assert ("speedup against one GPU" in told) == (kind == "results_on_gpus")
    assert "PyTorch, one GPU" in told
