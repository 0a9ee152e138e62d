"""Open a page in Debian's chromium, headless, through playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

# Without the second line the browser itself, not the page, calls home.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

NO_CHROMIUM = "chromium is not installed: `apt-get install chromium`, or `make test`, which does"


def chromium_path() -> str | None:
    """Return where chromium is, or None, so that a test can be skipped.

    Raises:
        FileNotFoundError: there is none and RRHF_TEST_BROWSER=required, as in `make test`.
    """
    path = shutil.which("chromium")
    if path is None and os.environ.get("RRHF_TEST_BROWSER") == "required":
        raise FileNotFoundError(f"{NO_CHROMIUM}; or `make test BROWSER=optional`, which skips the browser's tests")
    return path


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
