"""A headless Chromium, for the playground's tests and for the docs' pictures (docs/pictures).

The browser is the system's (Debian's package `chromium`): nothing is downloaded.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
DEADLINE_MS = 30_000


def chromium_path() -> str | None:
    """The first Chromium on PATH, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium without a window; raises FileNotFoundError if there is none on PATH."""
    path = chromium_path()
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is on PATH; on Debian: apt-get install chromium")
    expect.set_options(timeout=DEADLINE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


def open_page(page: Page, url: str, **setup: object) -> None:
    """Opens the playground with the values of a shared link (prompt, model, temperature...) and waits for models."""
    page.goto("about:blank")  # another fragment alone would not load the page anew
    page.goto(f"{url}/#{urlencode(setup)}")
    expect(page.locator(".model option").first).to_be_attached()


def run(page: Page) -> None:
    """Presses Run and waits until every pane has ended."""
    page.get_by_role("button", name="Run").click()
    ended(page)


def ended(page: Page) -> None:
    """Waits until no pane runs any more and each says how it ended."""
    panes = page.locator(".pane").count()
    expect(page.locator(".pane:not(.running) .figure:last-child dt", has_text="end")).to_have_count(panes)
