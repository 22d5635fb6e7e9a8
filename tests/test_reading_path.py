"""The reading path of CONTRIBUTING.md exists, is as long as it says, and can be read in one sitting."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST = 900  # lines in all
TOLERANCE = 15  # lines by which a stated count may be out of date
ENTRY = re.compile(r"^\d+\. `(?P<file>[\w/]+\.py)`(?:: `(?P<name>[\w.]+)`)? \((?P<lines>\d+) lines\): ", re.MULTILINE)


class Entry(NamedTuple):
    file: Path
    name: str | None  # a class or a method, where only this part of the file is to be read
    stated: int


def reading_path() -> list[Entry]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## Reading path\n")[1].split("\n## ")[0]
    found = [Entry(ROOT / m["file"], m["name"], int(m["lines"])) for m in ENTRY.finditer(section)]
    assert len(found) == len(re.findall(r"^\d+\. ", section, re.MULTILINE)), "an entry is not of the form of the others"
    return found


def lines(entry: Entry) -> int:
    text = entry.file.read_text()
    if entry.name is None:
        return len(text.splitlines())
    node: ast.AST = ast.parse(text)
    for part in entry.name.split("."):
        inner = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        assert inner, f"{entry.file.name} has no {entry.name}"
        node = inner[0]
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_the_reading_path_is_short() -> None:
    path = reading_path()
    assert len(path) >= 6
    counts = {f"{entry.file.name} {entry.name or ''}": lines(entry) for entry in path}
    assert sum(counts.values()) <= MOST, counts


def test_the_stated_lengths_are_right() -> None:
    wrong = [
        (str(entry.file), entry.stated, n)
        for entry in reading_path()
        if abs((n := lines(entry)) - entry.stated) > TOLERANCE
    ]
    assert wrong == []
