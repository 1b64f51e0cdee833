"""The table of metrics in docs/serving.md is the one that the code prints. tests/docs checks the table of settings."""

from pathlib import Path

from serve_app import metrics

SERVING = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_table_of_metrics_is_up_to_date() -> None:
    assert metrics.markdown() in SERVING
