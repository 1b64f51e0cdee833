"""The dashboard, the alerts and Prometheus' config, checked with Prometheus' own tool."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.metrics import METRICS
from tests.system.conftest import ROOT
from train_job.cluster.exporter import FIGURES

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules.yml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "gpt-foundry.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
COLUMNS = 24
"""Of Grafana's grid."""


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Prometheus' checker. Skips the test if it is not installed."""
    if not shutil.which("promtool"):
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)


def shown() -> list[str]:
    """Every expression of the dashboard, with its variables filled in as Grafana does."""
    filled = {"$__rate_interval": "1m", "$run": ".*", "$model": ".*"}
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    for name, value in filled.items():
        expressions = [expression.replace(name, value) for expression in expressions]
    return expressions


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_metric_in_the_dashboard_and_the_rules_is_exported():
    exported = {f"ray_{name}" for name in FIGURES}
    for metric in METRICS:
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        exported |= {f"ray_{metric.name}{ending}" for ending in endings}
    variables = [entry["query"]["query"] for entry in DASHBOARD["templating"]["list"] if entry["type"] == "query"]
    looked_at = re.findall(r"\bray_\w+", " ".join([*shown(), *variables, *(rule["expr"] for rule in rules())]))
    assert len(looked_at) > 30
    assert set(looked_at) <= exported


def test_the_dashboard_shows_what_a_run_exports():
    drawn = set(re.findall(r"\bray_(\w+)", " ".join(shown())))
    assert set(FIGURES) - drawn == {"gpt_training_tokens"}  # steps say as much


def test_prometheus_understands_every_expression_of_the_dashboard(tmp_path: Path):
    recorded = [{"record": f"panel:{i}", "expr": expression} for i, expression in enumerate(shown())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    file.write_text(file.read_text().replace("sum by", "summ by"))
    assert promtool("check", "rules", file).returncode != 0


def test_the_panels_do_not_overlap_and_have_titles_and_units():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= COLUMNS for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)
    assert {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]} == {"${datasource}"}


def test_prometheus_accepts_the_config_and_the_rules():
    checked = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout


def test_each_alert_fires_when_it_should(tmp_path: Path):
    written = (Path(__file__).parent / "rules_test.yml").read_text()
    assert {rule["alert"] for rule in rules()} == set(re.findall(r"alertname: (\w+)", written))
    file = tmp_path / "test.yml"
    file.write_text(written.replace("RULES", str(RULES)))
    tested = promtool("test", "rules", file)
    assert tested.returncode == 0, tested.stdout + tested.stderr
