"""A part records what it finds out case by case: each record is written when its case ends, so that a part that is
stopped keeps them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Skipped(Exception):  # noqa: N818 - it is no error
    """Raised where a tool is missing or refuses; the text says which and why."""


class Record:
    """A Record writes the cases of one part to a file, a line of JSON each. `host`: on the host device; `seconds`: how
    long the part may take."""

    def __init__(self, path: Path, host: bool, seconds: float):
        self.host, self._until = host, time.monotonic() + seconds
        self.failed = self.passed = self.skipped = 0
        self._path = path

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self._until - time.monotonic()

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Run one case inside the `with` block, which adds its figures to the dictionary. It passes, is skipped
        (`Skipped`) or fails; the part goes on in any case."""
        figures: dict[str, Any] = {"case": name, "status": "passed"}
        began = time.monotonic()
        try:
            yield figures
        except Skipped as reason:
            figures |= {"status": "skipped", "reason": str(reason)}
            self.skipped += 1
        except Exception:
            figures |= {"status": "failed", "traceback": traceback.format_exc()}
            self.failed += 1
        else:
            self.passed += 1
        figures["seconds"] = round(time.monotonic() - began, 3)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """Return a number of NumPy's as one of Python's."""
    return value.item() if hasattr(value, "item") else str(value)
