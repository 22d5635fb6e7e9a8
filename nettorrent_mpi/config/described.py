"""Returns what the source says of an option: the comment beside or above a dataclass's field, and its docstring.

The options are described once, where they are defined, and shown by the schema and the reference.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from typing import Any


def descriptions(kind: type[Any]) -> dict[str, str]:
    """Return the text of each field of a dataclass that has one, those of its bases included; {} without sources."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        comments, beside = _comments(source)
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            last = node.end_lineno or node.lineno
            text = next((beside[line] for line in range(last, node.lineno - 1, -1) if line in beside), "")
            above, line = [], node.lineno - 1
            while line in comments:
                above.append(comments[line])
                line -= 1
            if text or above:
                found[node.target.id] = text or " ".join(reversed(above))
    return found


def summary(kind: type[Any]) -> str:
    """Return the docstring of a class in one line; nothing if it has none of its own."""
    text = kind.__dict__.get("__doc__") or ""
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.split())


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return the comments that have a line to themselves, and those beside code, by line."""
    alone: dict[int, str] = {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            where = alone if token.line.strip() == token.string else beside
            where[token.start[0]] = token.string.lstrip("# ")
    return alone, beside
