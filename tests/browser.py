"""A browser for tests of pages: Debian's chromium, driven by Playwright. Where either is missing, tests skip."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Seen:
    """A record of the requests and complaints of a page."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of its scripts, and what its console has warned of


@contextmanager
def browser_page(**options: Any) -> Iterator[tuple[Any, Seen]]:
    """Give a Playwright page with these options, and what it sees; the browser ends with the block."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install '.[browser]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page, seen = browser.new_page(**options), Seen()
            page.on("request", lambda request: seen.requests.append(request.url))
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.on("requestfailed", lambda request: seen.errors.append(request.url))
            page.on(
                "console",
                lambda said: seen.errors.append(said.text) if said.type in ("error", "warning") else None,
            )
            yield page, seen
        finally:
            browser.close()
