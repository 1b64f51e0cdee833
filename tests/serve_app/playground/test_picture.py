"""The docs' picture of the playground, taken from a real service with a real Chromium."""

import io

import pytest
from PIL import Image

from docs.pictures.playground import screenshot
from gptcore.package import Package
from serve_app.settings import ServeSettings
from tests.serve_app.playground.browser import chromium_path
from tests.serve_app.running import running


@pytest.mark.skipif(chromium_path() is None, reason="no chromium on PATH: apt-get install chromium")
def test_the_picture_shows_the_page_after_a_run_at_double_resolution(package: Package) -> None:
    with running(ServeSettings(model=str(package.path), log_level="warning")) as service:
        setup = {"max_new_tokens": "60", "seed": "3", "ignore_eos": "true"}
        png = screenshot(service.url, "The", setup, (900, 600), dark=False)
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == (1800, 1200)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24) or []}
    assert (0xB5, 0x45, 0x1A) in colours  # the button's; tokens and their card are told apart by theirs
    assert len(colours) > 50
