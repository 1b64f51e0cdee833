"""A headless Chromium, for the playground's tests and for its picture in the README.

    .venv/bin/python -m tests.serve_app.browser http://127.0.0.1:8000 docs/playground.png --prompt "The" --dark

In comes the address of a running service, out comes a PNG of the playground after one run. The browser is the
system's (Debian's package `chromium`): nothing is downloaded.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    """Opens the playground with what a shared link carries (prompt, model, temperature...) and waits for its models."""
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


def screenshot(
    url: str,
    path: Path | str,
    width: int = 1280,
    height: int = 840,
    dark: bool = False,
    token: int = 12,
    **setup: object,
) -> None:
    """Writes a PNG of the playground at `url` after one run, the card of the given token open.

    Sizes are in CSS pixels; the picture has two to each, so that it stays sharp where it is shown smaller.
    """
    with chromium() as browser:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            device_scale_factor=2,
            reduced_motion="reduce",
        )
        page = context.new_page()
        open_page(page, url, **setup)
        run(page)
        tokens = page.locator(".pane .token")
        tokens.nth(min(token, tokens.count() - 1)).hover()
        page.screenshot(path=path)


def main() -> None:
    """The command line: where the service is, where the picture goes, and what is asked."""
    parser = argparse.ArgumentParser(description="Take a picture of the playground of a running service.")
    parser.add_argument("url", help="the service's address")
    parser.add_argument("png", type=Path, help="the file to write")
    parser.add_argument("--prompt", default="The future of AI is")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, model or compare")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=840)
    parser.add_argument("--token", type=int, default=12, help="the token whose card is open")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    setup = dict(item.split("=", 1) for item in args.set)
    size = dict(width=args.width, height=args.height)
    screenshot(args.url.rstrip("/"), args.png, **size, dark=args.dark, token=args.token, prompt=args.prompt, **setup)


if __name__ == "__main__":
    main()
