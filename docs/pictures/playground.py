"""`docs/images/playground.png`: the playground after one answer of the pictures' model, one token's card open.

    python -m docs.pictures.playground

Out of a real service, started as `serve run serve_app:app`, and a headless Chromium. With `--url` another service is
shown, with `--width`, `--dark` and `--set` another page; tests/serve_app/browser.py drives it for the tests, too.
"""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from docs.pictures import environment, keep, trained_run
from serve_app.demo import await_ready, running
from tests.serve_app.browser import chromium, open_page, run

PROMPT = "ROMEO:\n"
SETUP = {"temperature": "0.8", "max_new_tokens": "120", "seed": "7"}


@contextmanager
def service() -> Iterator[str]:
    """The address of a service that has the pictures' model as its champion, until the block ends."""
    trained_run()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    os.environ.clear()  # of this script alone, for the service inherits it
    os.environ.update(environment() | {"GPT_PORT": str(port)})
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as output, running(output) as process:
        if problem := await_ready(url, process):
            output.seek(0)
            raise SystemExit(f"{output.read()[-4000:]}\nerror: {problem}")
        yield url


def screenshot(url: str, prompt: str, setup: dict[str, str], size: tuple[int, int], dark: bool, token: int) -> bytes:
    """A PNG of the playground after one run, two pixels to each of CSS's, the card of the given token open."""
    with chromium() as browser:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            device_scale_factor=2,
            reduced_motion="reduce",
        )
        page = context.new_page()
        open_page(page, url, prompt=prompt, **setup)
        run(page)
        tokens = page.locator(".pane .token")
        if token >= 0:
            tokens.nth(min(token, tokens.count() - 1)).hover()
        return page.screenshot()


def main(argv: list[str] | None = None) -> None:
    """The command line: what is asked, and how it is looked at."""
    parser = argparse.ArgumentParser(description="Take a picture of the playground.")
    parser.add_argument("--url", help="a service that runs; otherwise one is started")
    parser.add_argument("--name", default="playground", help="of the file in docs/images")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, model or compare")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--token", type=int, default=24, help="the token whose card is open; -1: none")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args(argv)
    setup = SETUP | dict(item.split("=", 1) for item in args.set)
    look = (args.prompt, setup, (args.width, args.height), args.dark, args.token)
    if args.url:
        keep(screenshot(args.url.rstrip("/"), *look), args.name)
        return
    with service() as url:
        keep(screenshot(url, *look), args.name)


if __name__ == "__main__":
    sys.exit(main())
