"""`nettorrent watch`: a run in the terminal and on a page, until it ends."""

from __future__ import annotations

import http.client
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nettorrent_mpi.__main__ import main
from nettorrent_mpi.cli.local_server import FORBIDDEN, MOST_BYTES, LocalServer, Request, Response
from nettorrent_mpi.cli.runs import watching
from nettorrent_mpi.cli.runs.terminal_view import plot
from nettorrent_mpi.engine.run_lock import RunLock
from tests.browser import browser_page
from tests.cli.runs.made import TWO, about, make, records

ROOT = Path(__file__).resolve().parents[3]


def once(capfd: pytest.CaptureFixture[str], run: Path) -> str:
    capfd.readouterr()
    assert main(["watch", str(run), "--once"]) == 0
    return capfd.readouterr().out


def test_one_frame(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLock(make(tmp_path / "run", ended=None, metrics=records(TWO)[:4])):
        text = once(capfd, tmp_path / "run")
    assert max(map(len, text.splitlines())) <= watching.WIDTH
    assert "\x1b" not in text
    wanted = [
        "run  running  3 ranks  step 40/100  epoch 0.8  1,004 samples/s  0:06 left",
        " 40 %",
        "training loss 0.5",
        "test accuracy 87.50 %, best 87.50 %",
        "Slowest: rank 1 (host node0, stage 0 linear1): busy for 95 %",
    ]
    assert [words for words in wanted if words not in text] == []
    bars = {line.split(",")[0]: line for line in text.splitlines() if line.startswith("rank ")}
    assert [bars[f"rank {rank}"].count(".") > 25 for rank in range(3)] == [True, False, True]


def test_what_has_just_begun_and_what_is_strange(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "failed" in once(capfd, make(tmp_path / "empty", metrics=[], ended=None))
    strange = [{"step": 1, "train_loss": 1e99}, {"step": 0, "train_loss": -1e99}, {"step": 10**14}]
    text = once(capfd, make(tmp_path / "a\x1b[31m\nb", metrics=strange, stages=[], hosts=5))
    assert "\x1b" not in text
    assert main(["watch", str(tmp_path / "nothing")]) == 2
    assert main(["watch", str(tmp_path / "empty"), "--port", "80"]) == 2


def test_it_follows_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PAUSE", 0.02)
    run, lines = make(tmp_path / "run", ended=None, metrics=[]), records(TWO)
    lock = RunLock(run)
    seen: list[int] = []
    for found in watching.states(run):
        seen.append(len(found.points))
        assert not found.damage
        with (run / "metrics.jsonl").open("a") as file:
            if len(found.points) < len(lines):
                text = json.dumps(lines[len(found.points)])
                file.write(text[:20])
                file.flush()
                assert len(watching.read_run(run).points) == len(found.points), "half a line is not read yet"
                file.write(text[20:] + "\n")
            elif found.state == "running":
                (run / "run.json").write_text(json.dumps(about(TWO) | {"ended": "stopped"}))
                lock.release()
    assert seen == [*range(11), 10]
    assert found.state == "stopped"


def test_on_a_terminal_it_is_drawn_again_and_again(tmp_path: Path) -> None:
    """In colours, as wide as the terminal; the last frame stays."""
    run = make(tmp_path / "run", ended=None, metrics=records(TWO)[:3])
    lock = RunLock(run)
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    command = f"stty cols 120 rows 40; exec {sys.executable} -m nettorrent_mpi watch {run}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(["sh", "-c", command], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    ended = False
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the terminal's other side is closed
            break
        said += more
        if b"step 30/100" in said and not ended:
            ended = True
            (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records(TWO)))
            (run / "run.json").write_text(json.dumps(about(TWO) | {"ended": "done"}))
            lock.release()
    os.close(ours)
    assert process.wait() == 0
    text = said.decode()
    assert "step 100/100" in text
    assert text.index("running") < text.index("done")
    assert "\x1b[" in text
    assert re.search("[\u2801-\u28ff]", text)


@contextmanager
def served(server: LocalServer) -> Iterator[LocalServer]:
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def asked(
    url: str, path: str | None = None, *, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request(method, parts.path if path is None else path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_the_server_answers_those_who_know_its_address() -> None:
    def answer(request: Request) -> Response:
        return Response(f"{request.method} {request.path!r} {len(request.body)}".encode())

    with served(LocalServer(answer)) as server:
        parts = urlsplit(server.url)
        assert parts.hostname == "127.0.0.1"
        assert len(parts.path) > 30
        status, body, headers = asked(server.url)
        assert (status, body) == (200, b"GET '' 0")
        assert headers["Cache-Control"] == "no-store"
        assert asked(server.url, Host="localhost:4321")[0] == 200, "through a tunnel"
        for path, host in (("/", "127.0.0.1"), (parts.path[:-2] + "/", "127.0.0.1"), (parts.path, "evil.example:80"),
                           (parts.path, ""), ("/../" + parts.path, "localhost")):  # fmt: skip
            assert asked(server.url, path, Host=host)[:2] == (403, FORBIDDEN.body), (path, host)
        assert asked(server.url, method="POST", **{"Content-Length": str(MOST_BYTES + 1)})[0] == 413
        assert asked(server.url, method="POST", **{"Content-Length": "-1"})[0] == 413
        with pytest.raises(Exception, match=f"--port {parts.port}: cannot be listened on"):
            LocalServer(answer, int(parts.port or 0))


def test_the_page_follows_a_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run", ended=None, metrics=records(TWO)[:3])
    lock = RunLock(run)
    command = [sys.executable, "-m", "nettorrent_mpi", "watch", str(run), "--web"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\S+", process.stdout.readline())
        assert found
        with browser_page() as (shown, seen):
            shown.goto(found[0])
            assert "30 of 100 steps" in shown.locator("header").inner_text()
            (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records(TWO)[:7]))
            shown.get_by_text("70 of 100 steps").wait_for(timeout=20_000)
            (run / "run.json").write_text(json.dumps(about(TWO) | {"ended": "done"}))
            lock.release()
            shown.locator(".state.done").wait_for(timeout=20_000)
            assert seen.errors == []
            assert {urlsplit(url).hostname for url in seen.requests} == {"127.0.0.1"}
            assert shown.locator("main").get_attribute("data-refresh") is None, "what has ended is not read again"
    finally:
        process.send_signal(2)
        assert process.wait(10) == 0
        lock.release()


def test_a_plot_shows_where_values_are() -> None:
    rising = plot([(x, x) for x in range(10)], 10, 5, plain=True)
    assert [line.rstrip() for line in rising] == ["        **", "      **", "    **", "  **", "**"]
    assert plot([(3, 7.0)], 4, 3, plain=True) == ["    ", "*   ", "    "]
    assert {len(line) for line in plot([(x, x % 7) for x in range(5000)], 30, 4)} == {30}
