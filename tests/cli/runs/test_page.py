"""`nettorrent report`: one HTML file that a browser shows without asking for anything else."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from nettorrent_mpi.__main__ import main
from nettorrent_mpi.cli.runs import time_line
from nettorrent_mpi.cli.runs.charts import Curve, chart, thinned
from nettorrent_mpi.cli.runs.page import page
from nettorrent_mpi.cli.runs.run_data import read_run
from nettorrent_mpi.config.reading import load
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.plan.actions import Kind
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.browser import browser_page
from tests.cli.runs.made import TWO, earlier, make, records, trace

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def written(run: Path, *arguments: str) -> str:
    assert main(["report", str(run), *arguments]) == 0
    return (run / "report.html").read_text()


def test_what_a_report_says(tmp_path: Path) -> None:
    run = make(tmp_path / "my run")
    (run / "trace.json").write_text(trace(TWO))
    text = written(run)
    for words in (
        "my run", 'class="state done"', "95.00 %", "Slowest: rank 1 (host node0, stage 0 linear1): busy for 95 %",
        "mpirun -n 3 nettorrent train configs/digits.yaml --set train.epochs=2", "Step 3, of median length: 0.74 ms.",
        "linear2..linear3", "config.yaml, complete", "forward of micro-batch 0: 0.14 ms", "2026-01-01",
    ):  # fmt: skip
        assert words in text, words
    assert len(re.findall(r'<svg class="chart"', text)) == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_offline_without_a_request_or_an_error(tmp_path: Path, scheme: str) -> None:
    run = make(tmp_path / "run")
    (run / "trace.json").write_text(trace(TWO))
    written(run)
    with browser_page(color_scheme=scheme) as (shown, seen):
        shown.goto((run / "report.html").as_uri())
        box = shown.locator("svg.chart").first.bounding_box()
        shown.mouse.move(box["x"] + box["width"] - 15, box["y"] + 50)
        assert shown.locator("#tip").inner_text() == "epoch 2\ntraining 0.2\ntest 0.22"
        background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing hangs over the edge"
        assert seen.errors == []
        assert seen.requests == [(run / "report.html").as_uri()]


def hostile_run(folder: Path) -> Path:
    """A run whose every text is markup."""
    run = make(
        folder / HOSTILE.replace("/", "\u2215"),
        settings={HOSTILE: [HOSTILE, {"a": HOSTILE}]},
        hosts=[HOSTILE] * 3,
        layout=HOSTILE,
        arguments=["train", HOSTILE],
        stages=[{"layers": [HOSTILE], "rows": 2, "cols": 1}, {"layers": ["a", HOSTILE], "rows": 1, "cols": 1}],
        **dict.fromkeys(("job", "began", "exchange", "version", "commit", "mpi", "processor"), HOSTILE),
    )
    summary = {"failures": [{"step": HOSTILE, "lost": [HOSTILE]}, HOSTILE], "kernels": [HOSTILE], "stopped_by": HOSTILE}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "trace.json").write_text(trace(TWO).replace("(linear)", f"({json.dumps(HOSTILE)[1:-1]})"))
    return run


def test_hostile_texts_are_texts(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    tags = Tags()
    tags.feed(written(run))
    assert "img" not in tags.tags
    assert tags.tags.count("script") == 1
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert not [value for name, value in tags.attributes if name in ("src", "href") and value != "data:,"]
    with browser_page() as (shown, seen):
        dialogs: list[str] = []
        shown.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        shown.goto((run / "report.html").as_uri())
        assert HOSTILE.replace("/", "\u2215") in shown.locator("h1").inner_text()
        assert (dialogs, seen.errors, len(seen.requests)) == ([], [], 1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trace.json", '{"traceEvents": [{"ph": "X"'),
        ("trace.json", '{"traceEvents": [{"ph": "M", "args": {"name": "rank 7"}}]}'),
        ("trace.json", '{"traceEvents": [{"ph": "X", "pid": 3, "name": "F", "args": {"step": 1}, "ts": 1, "dur": 1}]}'),
        ("metrics.jsonl", "[]\n"),
        ("run.json", "\0"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_and_the_rest_is_there(tmp_path: Path, name: str, content: str) -> None:
    run = make(tmp_path / "run")
    with (run / name).open("a" if name == "metrics.jsonl" else "w") as file:
        file.write(content)
    text = written(run)
    assert len(re.findall('class="damage"', text)) == 1
    assert name in re.findall('class="damage">(.*?)</p>', text)[0]
    assert "95.00 %" in text


def test_all_parts_of_a_run_are_told_from_the_beginning_on(tmp_path: Path) -> None:
    """Each with its command, ranks, configuration, seed, versions and environment."""
    one = Topology(1, (Stage(0, 3, 1, 1),))
    parts = [
        earlier(1, 40, one, steps=100, ended="stopped", arguments=["train", "a.yaml"]),
        earlier(41, 60, TWO, source="runs/a/checkpoints/step-0000000040", config='{"seed": 7, "train": {"epochs": 4}}'),
    ]
    line = "rank 2 was lost after step 63: 2 go on after step 60, from memory (0.1 s)"
    two = Topology(1, (Stage(0, 2, 1, 1), Stage(2, 3, 1, 1)))
    run = make(tmp_path / "run", two, after=60, earlier=parts, lost=line, traced=False, settings={"seed": 7})
    text = written(run)
    assert (
        text.index("Part 1, steps 1 to 40") < text.index("Part 2, steps 41 to 60") < text.index("Part 3, steps 61 to")
    )
    for words in (
        "OMP_NUM_THREADS=2 nettorrent train a.yaml", "on 1 rank, 1 replica x", "seed 7", "(commit c0ffee)",
        "It was stopped after step 40 of 100.", "from <code>runs/a/checkpoints/step-0000000040</code>",
        "OMP_NUM_THREADS=2 mpirun -n 3 nettorrent train configs/digits.yaml --set train.epochs=2",
        "train.epochs: 4 (before: 2)", line, "stop the part before after step 60",
        "mpirun -n 2 nettorrent train configs/digits.yaml", "since step 61; before: part 1, steps 1 to 40: 1 rank,",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("complete</summary>") == 3
    assert "done again" not in text


def test_a_part_that_has_another_exchange_says_what_was_given(tmp_path: Path) -> None:
    """A run writes its configuration with all defaults; those of a kind that the part before has not are no change."""
    whole = json.dumps(to_plain(load(None, ["exchange={gossip: {every: 2}}", "layout={replicas: 2}"])))
    plain = json.dumps(to_plain(load(None, ["layout={replicas: 2}"])))
    parts = [earlier(1, 40, TWO, config=plain), earlier(41, 60, TWO, config=whole)]
    text = written(make(tmp_path / "run", TWO, after=60, earlier=parts, traced=False))
    told = "exchange: gossip (before: allreduce); exchange.gossip.every: 2 (before: -)"
    assert f"<p>Its configuration differs: {told}</p>" in text


def test_a_trace_is_told_and_drawn_with_the_layout_of_its_own_part(tmp_path: Path) -> None:
    one = Topology(1, (Stage(0, 3, 1, 1),))

    def step(name: str, *, first: bool, last: bool, steps: int = 5) -> str:
        part = earlier(1, 60, one) | ({"traced": True} if first else {})
        run = make(tmp_path / name, after=60, earlier=[part], traced=last)
        (run / "trace.json").write_text(trace(one if first and not last else TWO, steps))
        return written(run).partition("<h2>A step</h2>")[2].partition("</section>")[0]

    old = step("old", first=True, last=False)
    assert (
        "Of part 1, steps 1 to 60, on 1 rank, 1 replica x [linear1..linear3 1x1]. Of part 2, the latest, there" in old
    )
    assert ("rank 0, stage 0" in old, "rank 1" in old, "marked" in old) == (True, False, False)
    again = step("again", first=True, last=False, steps=200)
    assert "the step that is shown was done again later" in again
    new = step("new", first=True, last=True)
    assert "Of part 2, steps 61 to 100, on 3 ranks" in new
    assert "rank 2, stage 1" in new
    none = step("none", first=False, last=False)
    assert "trace.json is of no part of this run, and is left out" in none
    assert "<svg" not in none


def test_the_ranks_times_are_those_of_the_latest_part(tmp_path: Path) -> None:
    lines = [*records(TWO, slowest=1)[:6], *records(TWO, slowest=2)[6:]]
    assert "Slowest: rank 2" in written(make(tmp_path / "run", after=60, earlier=[earlier(1, 60, TWO)], metrics=lines))


@pytest.mark.parametrize(
    "strange",
    [
        7, [7], [{"after": "x"}], [{"after": 0, "until": 10**20}], [{"after": 50, "until": 20}],
        [{"after": 0, "until": 60, "arguments": [1, HOSTILE], "environment": {HOSTILE: [3]}, "config": "a: ["}],
    ],
)  # fmt: skip
def test_parts_that_make_no_sense(tmp_path: Path, strange: Any) -> None:
    text = written(make(tmp_path / "run", after=60, earlier=strange, source=HOSTILE))
    assert "How to repeat it" in text
    assert HOSTILE not in text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    text = written(make(tmp_path / "run", metrics=[], ended=None))
    assert "No record yet" in text
    assert "stage 1, 1 x 1" in text


def test_every_kind_of_action_has_words_and_a_colour() -> None:
    assert set(time_line.WORDS) == set(get_args(Kind))
    assert set(time_line.COLOURS) <= set(get_args(Kind))
    style = (Path(time_line.__file__).parent / "report.css").read_text(encoding="utf-8")
    for colour in {*time_line.COLOURS.values(), *time_line.LEGEND}:
        assert colour in time_line.LEGEND
        assert f".{colour} {{ --c: var(--{colour}); }}" in style
        assert style.count(f"--{colour}: #") == 2, "on light and on dark paper"


def test_another_file_is_replaced_only_if_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, target = make(tmp_path / "run"), tmp_path / "a.html"
    assert main(["report", str(run), "--output", str(target)]) == 0
    assert main(["report", str(run), "--output", str(target)]) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert main(["report", str(run), "--output", str(target), "--overwrite"]) == 0
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_thousand_ranks_are_drawn_in_seconds(tmp_path: Path) -> None:
    """The page of 3,000 records stays small."""
    topology = Topology(10, (Stage(0, 1, 10, 8), Stage(1, 2, 10, 1), Stage(2, 3, 5, 2)))
    assert topology.size == 1000
    run = make(tmp_path / "run", topology, metrics=records(topology, 3000, 3000, slowest=777))
    (run / "trace.json").write_text(trace(topology))
    began = time.perf_counter()
    text = page(read_run(run))
    assert time.perf_counter() - began < 20
    assert len(text) < 1_500_000
    assert "Slowest: rank 777 (host node12, stage 0 linear1, replica 7)." in text
    assert "linear1, mean" in text
    assert text.count('class="cell') == 1000


def test_of_many_ranks_that_are_told_one_by_one_the_swarms_are_shown(tmp_path: Path) -> None:
    topology = Topology(2, (Stage(0, 1, 50, 1), Stage(1, 2, 50, 1)))
    text = page(read_run(make(tmp_path / "run", topology, metrics=records(topology, slowest=120))))
    assert text.count(", mean") == 2 + 2 * 3
    assert "rank 120, linear1" in text


def test_an_axis_takes_any_values() -> None:
    for values in ([0.0], [5e-324, 1e299], [-1e299, 1e299], [3, 3, 3], [1e-30, 1.0], [0.0, 1e-300]):
        for logarithmic in (False, True):
            text = chart("a", [Curve("b", "first", list(enumerate(values)))], logarithmic=logarithmic)
            assert "nan" not in text.replace("nan-", "")
            assert "inf" not in text
            assert text.count('class="grid"') <= 12


def test_thinned_curves_keep_their_peaks() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[77_777] = 99.0
    points = thinned(list(enumerate(values.tolist())))
    assert len(points) <= 801
    assert (77_777, 99.0) in points
    assert points == sorted(points)
    assert points[-1][0] == 99_999
