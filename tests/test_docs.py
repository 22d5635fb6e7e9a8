"""The documentation builds without a warning: each link and each anchor leads somewhere. It needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nettorrent_mpi.cli.arguments import make_parser
from nettorrent_mpi.plan import exchange_specs, specs
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
