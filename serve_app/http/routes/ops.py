"""What operators and their machines ask: is it alive, is it ready, what does it hold, what has it done.

`/health`, `/ready` and `/metrics` need no API key, since probes and scrapers have none and learn no text from them:
whoever can reach the port can read traffic figures and model names there. `/models` says where each model came from,
down to the run, the data's fingerprint and the commit, and needs a key where keys are set.
"""

from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter
from fastapi.params import Depends
from pydantic import BaseModel, Field
from starlette.responses import Response

from serve_app.errors import ApiError, error_responses
from serve_app.metrics import CONTENT_TYPE
from serve_app.models.catalog import ModelStatus
from serve_app.state import AppState


class Health(BaseModel):
    """Reply of `GET /health`."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """Reply of `GET /ready`."""

    status: Literal["ready"] = "ready"
    model: str = Field(description="The model that answers where a request names none.")
    version: str


class Listing(BaseModel):
    """Reply of `GET /models`."""

    models: list[ModelStatus] = Field(description="The default model first.")


def router(state: AppState, guarded: Sequence[Depends] = ()) -> APIRouter:
    """Routes `/health`, `/ready`, `/metrics` and `/models`; `guarded` documents that the last may need a key."""
    routes = APIRouter(tags=["operations"])
    models = state.models

    @routes.get("/health", summary="Is the replica alive?", responses=error_responses(500, 503))
    async def health() -> Health:
        """503 if an engine has died: the replica is to be replaced. A model that could not be loaded is no reason."""
        models.check_health()
        return Health()

    @routes.get("/ready", summary="May requests come?", responses=error_responses(500, 503))
    async def ready() -> Ready:
        """503 until the default model is loaded and its engine warm."""
        default = models.describe()[0]
        if not models.ready or default.version is None:
            # Why is told at /models, where keys are asked for: it may name folders and hosts.
            doing = default.loading or default.state
            message = f"the model {default.name!r} is not ready: it is {doing}; GET /models says more"
            raise ApiError(503, message, code="model_not_ready", headers={"retry-after": "1"})
        return Ready(model=default.name, version=default.version)

    @routes.get(
        "/metrics",
        summary="Figures of this replica for Prometheus",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}, **error_responses(500)},
    )
    async def metrics() -> Response:
        """Prometheus' text format. Through Serve's port it is one replica that answers: scrape Ray's exporter then."""
        return Response(state.metrics.render(), media_type=CONTENT_TYPE)

    @routes.get(
        "/models",
        summary="The models, and where they came from",
        responses=error_responses(401, 500),
        dependencies=guarded,
    )
    async def listing() -> Listing:
        """Every model, loaded or not: version, alias, run, bits per byte, data, commit; what is wrong with it."""
        return Listing(models=models.describe())

    return routes
