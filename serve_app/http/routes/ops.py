"""Routes for operators and monitoring: `/health`, `/ready`, `/metrics` and `/models`.

The first three need no API key, since probes and scrapers have none. They reveal traffic figures and model names to
anyone who can reach the port, but no text. `/models` shows each model's run, data and commit, and needs a key if keys
are set.
"""

from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter
from fastapi.params import Depends
from pydantic import BaseModel, Field
from starlette.responses import Response

from serve_app.errors import RETRY_LATER, ApiError, error_responses
from serve_app.metrics import CONTENT_TYPE
from serve_app.models.catalog import ModelStatus
from serve_app.state import AppState


class Health(BaseModel):
    """Reply of `GET /health`."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Reply of `GET /ready`."""

    status: Literal["ready"] = "ready"
    model: str = Field(description="The default model.")
    version: str


class Listing(BaseModel):
    """Reply of `GET /models`."""

    models: list[ModelStatus] = Field(description="The default model first.")
    system_prompt: bool = Field(
        description="Whether the service sets the system message of every conversation, and refuses another."
    )
    feedback: bool = Field(description="Whether POST /v1/feedback keeps votes on answers.")


def router(state: AppState, guarded: Sequence[Depends] = ()) -> APIRouter:
    """The four routes; `guarded` documents that `/models` may need a key."""
    routes = APIRouter(tags=["operations"])
    models = state.models

    @routes.get("/health", summary="Is the replica alive?", responses=error_responses(500, 503))
    async def health() -> Health:
        """503 if an engine has died, so that the replica gets replaced. A model that failed to load does not count."""
        models.check_health()
        return Health()

    @routes.get("/ready", summary="Is it ready for requests?", responses=error_responses(500, 503))
    async def ready() -> Ready:
        """503 until the default model is loaded and its engine warm."""
        default = models.describe()[0]
        if not models.ready or default.version is None:
            # The reason may name folders and hosts, so only /models shows it, which may need a key.
            doing = default.loading or default.state
            message = f"the model {default.name!r} is not ready: it is {doing}; see GET /models"
            raise ApiError(503, message, code="model_not_ready", headers=RETRY_LATER)
        return Ready(model=default.name, version=default.version)

    @routes.get(
        "/metrics",
        summary="Metrics of this replica for Prometheus",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}, **error_responses(500)},
    )
    async def metrics() -> Response:
        """Prometheus' text format. Serve's port returns those of any one replica: scrape Ray's exporter instead."""
        return Response(state.metrics.render(), media_type=CONTENT_TYPE)

    @routes.get(
        "/models",
        summary="The models and their origin",
        responses=error_responses(401, 500),
        dependencies=guarded,
    )
    async def listing() -> Listing:
        """Every model, loaded or not: version, alias, run, bits per byte, data, commit, and errors."""
        return Listing(
            models=models.describe(),
            system_prompt=state.settings.system_prompt != "",
            feedback=state.feedback is not None,
        )

    return routes
