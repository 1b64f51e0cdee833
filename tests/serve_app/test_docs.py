"""The tables in docs/serving.md are those that the code prints."""

from pathlib import Path

from serve_app import metrics, settings

SERVING = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_current() -> None:
    assert settings.markdown() in SERVING


def test_the_table_of_metrics_is_current() -> None:
    assert metrics.markdown() in SERVING
