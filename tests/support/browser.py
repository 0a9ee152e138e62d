"""Open a page in Debian's chromium, headless, through playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

# Without the second line the browser itself, not the page, calls home.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

NO_CHROMIUM = "chromium is not installed: `apt-get install chromium`, or `make test`, which does"


def chromium_path() -> str | None:
    """Return where chromium is, or None."""
    return shutil.which("chromium")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Yield a running ``playwright.sync_api.Browser``.

    Raises:
        FileNotFoundError: chromium is not installed.
    """
    from playwright.sync_api import sync_playwright

    path = chromium_path()
    if path is None:
        raise FileNotFoundError(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
