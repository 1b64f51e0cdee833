"""A picture of MLflow's page that compares the trials of a sweep.

    .venv/bin/python -m docs.pictures.mlflow SWEEP docs/images/mlflow-compare.png

In: the name of a sweep that this checkout's MLflow knows. Out: a PNG of the page that the UI shows when the sweep's
trials are chosen and compared. MLflow's UI runs on a free port of loopback while the picture is taken.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import Page, expect

from tests.serve_app.browser import chromium
from train_job.spool import mlflow_client
from train_job.tracking import tracking_uri

METRIC = "val/bits_per_byte"
SECONDS_TO_START = 120
SETTLING_MS = 2000
"""How long the plot takes to move its lines into their places."""


@contextlib.contextmanager
def ui(uri: str) -> Iterator[str]:
    """The address of an MLflow UI that runs meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("mlflow")), "ui", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    server = subprocess.Popen(
        [*command, f"--backend-store-uri={uri}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(SECONDS_TO_START):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def compare_url(base: str, uri: str, sweep: str) -> str:
    """The address of the page that compares the sweep's trials."""
    client = mlflow_client(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.sweep = '{sweep}'", order_by=["attributes.start_time ASC"])
    trials = [run.info for run in runs if "mlflow.parentRunId" in run.data.tags]
    if not trials:
        raise SystemExit(f"MLflow at {uri} knows no trials of a sweep {sweep!r}")
    ids, places = [trial.run_id for trial in trials], sorted({trial.experiment_id for trial in trials})
    return f"{base}/#/compare-runs?runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(places))}"


def screenshot(page: Page, path: Path) -> None:
    """Writes the picture once the plot shows bits per byte of the validation text."""
    expect(page.get_by_text("Parallel Coordinates Plot")).to_be_visible()
    with contextlib.suppress(Exception):  # a panel that some versions open by themselves
        page.get_by_role("button", name="Close").first.click(timeout=3000)
    chosen = page.get_by_role("combobox").nth(1)
    chosen.click()
    page.keyboard.press("Backspace")  # the metric that the page begins with
    page.keyboard.type(METRIC)
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator(".js-plotly-plot").get_by_text(METRIC)).to_be_visible()
    page.mouse.move(0, 0)
    page.wait_for_timeout(SETTLING_MS)
    page.screenshot(path=path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Take a picture of MLflow's comparison of a sweep's trials.")
    parser.add_argument("sweep", help="the sweep's name")
    parser.add_argument("png", type=Path, help="the file to write")
    args = parser.parse_args()
    uri = tracking_uri()
    with ui(uri) as base, chromium() as browser:
        page = browser.new_context(viewport={"width": 1400, "height": 860}).new_page()
        page.goto(compare_url(base, uri, args.sweep))
        screenshot(page, args.png)


if __name__ == "__main__":
    main()
