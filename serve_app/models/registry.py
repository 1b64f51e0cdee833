"""Queries to MLflow's registry: which version an alias points to, and where that version came from.

Every call blocks, for some seconds if the server is down, so callers run them in threads. The first call imports
MLflow.
"""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcore.errors import HubError
from gptcore.redact import reason, without_password

HTTP_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Defaults for the environment: MLflow's own would make a thread wait for minutes."""
UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for an unregistered model and for an alias that no version has."""
FACTS = ("data", "data_fingerprint", "git_commit")
LONGEST_FACT = 1000


@dataclass(frozen=True)
class Lineage:
    """Where a version came from. What was not recorded is None."""

    run_id: str | None = None
    run_url: str | None = None
    """The run's page, if there is a tracking server."""
    bits_per_byte: float | None = None
    data: str | None = None
    data_fingerprint: str | None = None
    git_commit: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    """All tags of the version."""


class Registry:
    """MLflow's registry at one tracking URI. Its methods may be called from any thread."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri
        self._opened: Any = None

    def version(self, name: str, alias: str) -> str | None:
        """The version of `name` that `alias` points to, or None. Raises HubError if MLflow does not answer."""
        from mlflow import MlflowException

        try:
            return str(self._client().get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in UNKNOWN:
                return None
            raise self._away(error) from error
        except OSError as error:
            raise self._away(error) from error

    def earlier_champions(self, name: str, version: str) -> list[str]:
        """Versions before `version` that were promoted when they were registered, the latest first.

        Raises HubError if MLflow does not answer.
        """
        from mlflow import MlflowException

        try:
            found = self._client().search_model_versions(f"name='{name}'", max_results=1000)
        except (MlflowException, OSError) as error:
            raise self._away(error) from error
        earlier = [int(v.version) for v in found if v.tags.get("promoted") == "true" and int(v.version) < int(version)]
        return [str(number) for number in sorted(earlier, reverse=True)]

    def lineage(self, name: str, version: str) -> Lineage:
        """The origin of a version. Raises HubError if MLflow does not answer or there is no such version."""
        from mlflow import MlflowException

        try:
            client = self._client()
            found = client.get_model_version(name, version)
            url = self._run_url(client, found.run_id)
        except (MlflowException, OSError) as error:
            raise self._away(error) from error
        return lineage(found.tags, run_id=found.run_id or None, run_url=url, tags=dict(found.tags))

    def _run_url(self, client: Any, run_id: str | None) -> str | None:
        if not run_id or not self.tracking_uri.startswith(("http://", "https://")):
            return None
        experiment = client.get_run(run_id).info.experiment_id
        return f"{without_password(self.tracking_uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"

    def _client(self) -> Any:
        database = self.tracking_uri.removeprefix("sqlite:///")
        if database != self.tracking_uri and not Path(database).exists():  # the client would make an empty one
            raise HubError(f"there is no database at {self.tracking_uri}; train a model first, or set tracking_uri")
        if self._opened is None:
            for name, value in HTTP_PATIENCE.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            self._opened = MlflowClient(self.tracking_uri, self.tracking_uri)
        return self._opened

    def _away(self, error: Exception) -> HubError:
        uri = without_password(self.tracking_uri)
        return HubError(f"MLflow at {uri} does not answer: {reason(error).rstrip('.')}")


def lineage(known: Mapping[str, Any], **more: Any) -> Lineage:
    """A `Lineage` from a version's tags or a package's training summary; `more` fields are set unchanged."""
    facts: dict[str, Any] = {key: str(known[key])[:LONGEST_FACT] for key in FACTS if key in known}
    # A tag may hold any text; a package may hold null or a number that JSON lacks.
    with suppress(KeyError, ValueError, TypeError, OverflowError):
        if math.isfinite(bits := float(known["bits_per_byte"])):
            facts["bits_per_byte"] = bits
    return Lineage(**facts, **more)
