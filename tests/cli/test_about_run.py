"""run.json tells the commit that a run runs from, and the parts that lead to a step."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from nettorrent_mpi.cli.about_run import parts_before
from nettorrent_mpi.cli.run_folder import _head
from tests.cli.runs.made import TWO, earlier, make


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_what_git_says(tmp_path: Path) -> None:
    """On a branch, packed, detached, in a worktree; None where nothing is checked out."""
    root = tmp_path / "checkout"

    def git(*words: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", "-C", str(root), *named, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    root.mkdir()
    assert _head(root) is None
    git("init", "-q")
    assert _head(root) is None
    git("commit", "-q", "--allow-empty", "-m", "one")
    one = git("rev-parse", "HEAD")
    assert _head(root) == one
    git("pack-refs", "--all")
    assert _head(root) == one
    git("worktree", "add", "-q", "-b", "other", str(tmp_path / "worktree"))
    git("commit", "-q", "--allow-empty", "-m", "two")
    assert _head(root) == git("rev-parse", "HEAD") != one
    assert _head(tmp_path / "worktree") == one
    git("checkout", "-q", "--detach", one)
    assert _head(root) == one


def test_the_parts_before_end_where_the_next_one_begins(tmp_path: Path) -> None:
    parts = [earlier(1, 40, TWO), earlier(41, 60, TWO)]
    run = make(tmp_path / "run", after=60, earlier=parts, hosts=["a", "a", "b"])

    def spans(after: int) -> list[tuple[int, int]]:
        return [(part["after"], part["until"]) for part in parts_before(run, after)]

    assert spans(90) == [(0, 40), (40, 60), (60, 90)]
    assert spans(50) == [(0, 40), (40, 50)], "what was trained after it does not count"
    assert spans(40) == [(0, 40)]
    assert spans(0) == []
    last = parts_before(run, 90)[-1]
    assert (last["hosts"], last["config"]) == (["a", "b"], (run / "config.yaml").read_text())
    assert last["arguments"] == json.loads((run / "run.json").read_text())["arguments"]
    (run / "run.json").write_text("[")
    assert spans(90) == []
    assert parts_before(tmp_path / "none", 5) == []
