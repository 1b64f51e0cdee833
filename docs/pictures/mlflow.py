"""`docs/images/mlflow-compare.png`: MLflow's page that compares the trials of the included sweep.

    python -m docs.pictures.mlflow

MLflow's UI runs on a free port of loopback while the picture is taken.
"""

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

from docs.pictures import keep, trained_run
from tests.serve_app.playground.browser import chromium
from train_job.tracking.spool import mlflow_client

SWEEP = "rates"
METRIC = "val/bits_per_byte"
SECONDS_TO_START = 120
SETTLING_MS = 2000
"""Time that the plot takes to move its lines into place."""


@contextlib.contextmanager
def ui(uri: str) -> Iterator[str]:
    """Runs an MLflow UI until the block ends. Yields its address."""
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
        raise SystemExit(f"MLflow at {uri} has no trials of a sweep {sweep!r}")
    ids, places = [trial.run_id for trial in trials], sorted({trial.experiment_id for trial in trials})
    return f"{base}/#/compare-runs?runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(places))}"


def screenshot(page: Page) -> bytes:
    """A screenshot, once the plot shows bits per byte of the validation text."""
    expect(page.get_by_text("Parallel Coordinates Plot")).to_be_visible()
    with contextlib.suppress(Exception):  # a panel that some versions open automatically
        page.get_by_role("button", name="Close").first.click(timeout=3000)
    chosen = page.get_by_role("combobox").nth(1)
    chosen.click()
    page.keyboard.press("Backspace")  # the metric that the page starts with
    page.keyboard.type(METRIC)
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator(".js-plotly-plot").get_by_text(METRIC)).to_be_visible()
    page.mouse.move(0, 0)
    page.wait_for_timeout(SETTLING_MS)
    return page.screenshot()


def main() -> None:
    """Runs the sweep if it has not been run, and takes the picture."""
    run = trained_run(SWEEP, "train_job/sweep.py", "train_job/sweeps/quick.yaml", "--name", SWEEP)
    uri = f"sqlite:///{run.parents[1] / 'mlflow' / 'mlflow.db'}"
    with ui(uri) as base, chromium() as browser:
        page = browser.new_context(viewport={"width": 1400, "height": 860}).new_page()
        page.goto(compare_url(base, uri, SWEEP))
        keep(screenshot(page), "mlflow-compare")


if __name__ == "__main__":
    main()
