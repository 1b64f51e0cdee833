"""`docs/images/playground.png`: the playground after one answer of the pictures' model, with one token's card open.

    python -m docs.pictures.playground

It starts the service with `serve run serve_app:app` and opens its page in a headless Chromium. `--url` shows another
service; `--width`, `--dark` and `--set` change the page. tests/serve_app/playground/browser.py drives the browser, for
the tests too.
"""

import argparse
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Locator

from docs.pictures import environment, keep, trained_run
from serve_app.demo import await_ready, running
from tests.serve_app.playground.browser import chromium, open_page, run

PATIENCE_SECONDS = 600  # a picture may be made on a busy machine
PROMPT = "ROMEO:\n"
SETUP = {"temperature": "0.8", "max_new_tokens": "120", "seed": "7"}


@contextmanager
def service(**settings: str) -> Iterator[str]:
    """Runs a service of the pictures' registry until the block ends, by default of `gpt`. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = environment() | {"GPT_PORT": str(port)} | {f"GPT_{name.upper()}": value for name, value in settings.items()}
    os.environ.clear()  # this process's environment, which the service inherits
    os.environ.update(env)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as output, running(output) as process:
        if problem := await_ready(url, process, PATIENCE_SECONDS):
            output.seek(0)
            raise SystemExit(f"{output.read()[-4000:]}\nerror: {problem}")
        yield url


def screenshot(url: str, prompt: str, setup: dict[str, str], size: tuple[int, int], dark: bool) -> bytes:
    """A PNG of the playground after one run, at double resolution, with the card of one token open."""
    with chromium() as browser:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            device_scale_factor=2,
            reduced_motion="reduce",
        )
        page = context.new_page()
        open_page(page, url, prompt=prompt, **setup)
        page.get_by_label("Tint by probability").check()
        run(page)
        readable = page.locator(".pane .token", has_text=re.compile(r"\w")).all()
        max(readable, key=right_edge).hover()  # its card hides the least there
        return page.screenshot()


def right_edge(token: Locator) -> float:
    """The right edge of a token, in CSS pixels."""
    box = token.bounding_box()
    return box["x"] + box["width"] if box else 0


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and takes the picture."""
    parser = argparse.ArgumentParser(description="Take a picture of the playground.")
    parser.add_argument("--url", help="a running service; by default one is started")
    parser.add_argument("--name", default="playground", help="name of the file in docs/images")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, model or compare")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=816)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args(argv)
    setup = SETUP | dict(item.split("=", 1) for item in args.set)
    look = (args.prompt, setup, (args.width, args.height), args.dark)
    if args.url:
        keep(screenshot(args.url.rstrip("/"), *look), args.name)
        return
    trained_run()
    with service() as url:
        keep(screenshot(url, *look), args.name)


if __name__ == "__main__":
    main()
