"""serve_app.models.registry, on an embedded MLflow and on a real tracking server."""

import time
from pathlib import Path

import pytest

from gptcore.errors import HubError
from serve_app.models.registry import Lineage, Registry, lineage
from tests.ports import free_port
from tests.serve_app.conftest import TestRegistry


def test_an_alias_has_the_version_that_it_was_last_moved_to(registry: TestRegistry):
    first, second = registry.publish("moved", seed=1), registry.publish("moved", seed=2)
    asked = Registry(registry.uri)
    assert asked.version("moved", "champion") == second
    registry.point("moved", first)
    assert asked.version("moved", "champion") == first
    assert asked.version("moved", "candidate") is None
    assert asked.version("unheard-of", "champion") is None


def test_a_version_leads_back_to_its_run_score_data_and_commit(registry: TestRegistry):
    version = registry.publish("traced", bits_per_byte=1.5)
    found = Registry(registry.uri).lineage("traced", version)
    run = registry.client.get_run(found.run_id)
    assert found.bits_per_byte == 1.5
    assert found.data_fingerprint == "fe" * 32
    assert found.git_commit == run.data.tags["mlflow.source.git.commit"]
    assert found.tags["promoted"] == "true"
    assert found.run_url is None  # an embedded database has no pages


def test_earlier_champions_are_listed_with_the_latest_first(registry: TestRegistry):
    for seed, promote in enumerate(["always", "never", "always", "always"]):
        registry.publish("line", seed=seed, promote=promote)
    assert Registry(registry.uri).earlier_champions("line", "4") == ["3", "1"]
    assert Registry(registry.uri).earlier_champions("line", "1") == []


def test_a_missing_database_is_an_error_and_is_not_created(tmp_path: Path):
    with pytest.raises(HubError, match="there is no database"):
        Registry(f"sqlite:///{tmp_path}/mlflow.db").version("gpt", "champion")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_down_is_an_error_within_seconds():
    port = free_port()
    begun = time.monotonic()
    for ask in (
        lambda r: r.version("gpt", "champion"),
        lambda r: r.lineage("gpt", "1"),
        lambda r: r.earlier_champions("gpt", "1"),
    ):
        with pytest.raises(HubError, match=f"MLflow at http://127.0.0.1:{port} does not answer") as caught:
            ask(Registry(f"http://me:secret@127.0.0.1:{port}"))
        assert "secret" not in str(caught.value)
    assert time.monotonic() - begun < 30


def test_invalid_tags_leave_the_rest_of_the_lineage_readable():
    assert lineage({"bits_per_byte": "good", "data": "notes"}) == Lineage(data="notes")
    assert lineage({}) == Lineage()
    assert lineage({"bits_per_byte": 1.25}, run_id="r").bits_per_byte == 1.25
