"""The documentation builds without a warning: each link and each anchor leads somewhere. It needs no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from nettorrent_mpi.cli.arguments import make_parser
from nettorrent_mpi.plan import exchange_specs, specs
from nettorrent_mpi.plan.actions import Kind
from tests.conftest import ROOT

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_kind_and_command_has_its_place(site: Path) -> None:
    text = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    for kinds in (specs.LAYERS, specs.LOSSES, specs.OPTIMIZERS, specs.SCHEDULES, exchange_specs.EXCHANGES):
        for kind in kinds:
            assert re.search(rf'<h3 id="[a-z-]+-{kind}"', text), kind
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    commands = next(action.choices for action in make_parser()._actions if action.dest == "command")
    assert commands
    for command in commands:
        assert f"nettorrent {command}" in text


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 5
    for page in pages:
        loaded = re.findall(
            r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert [each for each in loaded if "canonical" not in each] == [], page.name


def test_every_field_of_a_run_is_described(tmp_path: Path) -> None:
    """The page of the run folder names each file and field that a run writes, and each kind of action."""
    settings = ["train.epochs=1", "data.validation=0.1", "trace=true", "checkpoint.every_epochs=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "nettorrent_mpi",
        "train",
        "configs/digits.yaml",
        "--output",
        str(tmp_path),
        *words,
    ]
    subprocess.run([*command, "--overwrite"], cwd=ROOT, check=True, capture_output=True)
    page = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`([^`]+)`", page))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    files = {path.name + "/step-N/" * path.is_dir() for path in tmp_path.iterdir()}
    assert len(lines) >= 1
    assert len(files) > 5
    assert {*files, *lines[-1], *summary} - described == set()
    assert set(get_args(Kind)) - described == set()
