"""A warning tells what is doubtful in one line, once, and nothing else changes."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.cli.commands import warnings_shown
from nettorrent_mpi.plan.errors import warn

LAYERS = [nt.Linear(4, activation="relu"), nt.Linear(2)]
X, Y = np.linspace(0, 1, 60).reshape(20, 3), np.arange(20) % 2


def told_by_plan(*data: object, **settings: object) -> list[str]:
    """The warnings of a plan, each of one line; they are given as well as kept."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        planned = nt.plan(LAYERS, data or (X, Y), **settings)  # type: ignore[arg-type]
    assert all(each.category is nt.NetTorrentWarning for each in given)
    texts = [str(each.message) for each in given]
    assert texts == list(planned.warnings)
    assert not any("\n" in text for text in texts)
    return texts


def test_nothing_is_told_without_a_reason() -> None:
    assert told_by_plan(batch_size=20) == []


def test_a_mini_batch_larger_than_the_data() -> None:
    (text,) = told_by_plan(batch_size=21, validation=0.1)
    assert text.startswith("train.batch_size: 21, but there are only 18 training rows")


def test_commands_show_a_warning_once_and_as_errors_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell() -> None:
        for _ in range(3):
            warn("all of us")
            warn("one of us", alone=True)
        warnings.warn("another package's", stacklevel=1)

    for rank, told in (("0", ["all of us", "one of us"]), ("1", ["one of us"])):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        with pytest.warns(UserWarning, match="another package's"), warnings_shown():
            tell()
        assert re.findall(r"^nettorrent: warning: (.*)$", capsys.readouterr().err, re.MULTILINE) == told
