"""Pages in a headless Chromium. None may contact another host, violate the page's policy or have a script error."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.serve_app.playground.browser import chromium, chromium_path

needs_chromium = pytest.mark.skipif(chromium_path() is None, reason="no chromium on PATH: apt-get install chromium")
LOOPBACK = ("http://127.0.0.1:", "about:blank")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages. At the end, none may have contacted another host, violated the policy or had a script error."""
    contexts, faults = [], []

    def make(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 840}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: request.url.startswith(LOOPBACK) or faults.append(request.url))
        page.on("pageerror", lambda error: faults.append(error.message))
        page.on("console", lambda message: "Content Security Policy" in message.text and faults.append(message.text))
        return page

    yield make
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(new_page: Callable[..., Page]) -> Page:
    return new_page()
