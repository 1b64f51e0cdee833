"""The HTTP app of one replica: routes, limits, errors and metrics around its models.

Builds a FastAPI app from settings and `Models`, without Ray: `deployment.py` runs it in a replica, tests call it
directly. The caller starts and closes the models.
"""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serve_app.errors import add_handlers, error_responses
from serve_app.feedback import open_log
from serve_app.http.hosts import is_loopback
from serve_app.http.logs import configure_logging
from serve_app.http.middleware import (
    AllowedHosts,
    AllowedOrigins,
    ApiKeys,
    BodyReader,
    Deadline,
    ErrorReplies,
    RequestLog,
)
from serve_app.http.routes import chat, compat, feedback, native, openai, ops, playground, tokens
from serve_app.metrics import LOADED, RUNNING, SLOTS, SLOTS_USED, WAITING, Metrics, Reading
from serve_app.models.catalog import Models
from serve_app.settings import ServeSettings
from serve_app.state import AppState

DESCRIPTION = """\
Continues text, and answers conversations, with models from an MLflow registry, a Hugging Face hub or a folder.

Every reply has the header `x-request-id` (the request's own, if it is short and plain), and a model's reply also
`x-model-version: <name>/<version>`. Errors have OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.
Bodies are read as JSON, whatever the content-type. If API keys are set, every route needs `Authorization: Bearer
<key>`, except the probes, the metrics and the web pages.
"""


def create_api(
    settings: ServeSettings, models: Models, metrics: Metrics | None = None, tag_replies: bool = True
) -> FastAPI:
    """The app. Without `metrics`, it gets its own.

    Set `tag_replies` to false behind a proxy that adds x-request-id itself, as Ray Serve's does.
    """
    configure_logging(settings.log_level)
    metrics = metrics or Metrics()
    metrics.gauges = lambda: _gauges(models)
    models.on_reload(metrics.reload)
    state = AppState(settings, models, metrics, open_log(settings.feedback, settings.feedback_bytes))
    app = FastAPI(
        title="GPT Foundry",
        version=version("gpt-foundry"),
        description=DESCRIPTION,
        middleware=_middleware(settings, metrics, tag_replies),
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    add_handlers(app)
    # ApiKeys checks the key before a body is read; this only documents it in OpenAPI.
    documented = [Depends(HTTPBearer(auto_error=False))] if settings.api_keys else []
    for routes in (native, openai, chat, feedback, tokens, compat):
        app.include_router(_answering_head(routes.router(state)), responses=error_responses(), dependencies=documented)
    app.include_router(_answering_head(ops.router(state, documented)))
    app.include_router(playground.router(state))
    _describe(app)
    return app


def _answering_head(routes: APIRouter) -> APIRouter:
    """`routes` with HEAD wherever there is GET; the server omits the body. The OpenAPI document shows GET only."""
    for route in list(routes.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            routes.routes.append(
                APIRoute(
                    route.path,
                    route.endpoint,
                    methods=["HEAD"],
                    response_model=route.response_model,
                    response_class=route.response_class,
                    include_in_schema=False,
                )
            )
    return routes


def _describe(app: FastAPI) -> None:
    """Build the OpenAPI document, which FastAPI caches, and correct it.

    Validation errors are 400 instead of 422, and any field may be null, even an unknown one:
    clients send null for fields that only their own API has.
    """
    document = app.openapi()
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    for responses in (operation["responses"] for operation in operations):
        responses.pop("422", None)
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for body in (schema for schema in schemas.values() if schema.get("additionalProperties") is False):
        for name in set(body["properties"]) - set(body.get("required", ())):
            body["properties"][name] = _nullable(body["properties"][name])
        body["additionalProperties"] = {"type": "null"}
        body["properties"] = _overlapping(body["properties"])


def _overlapping(schema: Any) -> Any:
    """The schema with anyOf for oneOf: pydantic calls the forms of a tagged union exclusive, but [] fits several."""
    if isinstance(schema, dict):
        return {"anyOf" if key == "oneOf" else key: _overlapping(value) for key, value in schema.items()}
    return [_overlapping(part) for part in schema] if isinstance(schema, list) else schema


def _nullable(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a field that may also be null; title, description and default stay at the top."""
    outer: dict[str, Any] = {key: field[key] for key in ("title", "description", "default") if key in field}
    kinds = field.get("anyOf", [{key: value for key, value in field.items() if key not in outer}])
    null = {"type": "null"}
    return {"anyOf": [*kinds, *([] if null in kinds else [null])], **outer}


def _middleware(settings: ServeSettings, metrics: Metrics, tag_replies: bool) -> list[Middleware]:
    """The middleware, from the outside in."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "x-model-version", "retry-after"),
    )
    return [
        Middleware(RequestLog, metrics=metrics, tag=tag_replies),
        *([cors] if settings.cors_origins else []),
        Middleware(ErrorReplies),
        *([Middleware(AllowedHosts, allowed=settings.allowed_hosts)] if _checks_hosts(settings) else []),
        Middleware(AllowedOrigins, allowed=settings.cors_origins),
        Middleware(ApiKeys, keys=settings.api_keys),
        Middleware(BodyReader, limit=settings.max_body_bytes, seconds=settings.body_timeout_s),
        Middleware(Deadline, seconds=settings.request_timeout_s),
    ]


def _checks_hosts(settings: ServeSettings) -> bool:
    """Whether Host headers are checked: if names are configured, or on loopback without API keys."""
    return bool(settings.allowed_hosts) or (is_loopback(settings.host) and not settings.api_keys)


def _gauges(models: Models) -> Iterator[Reading]:
    """The engines' current load."""
    for served in models.loaded():
        labels, stats = (served.name, served.version), served.engine.stats()
        yield LOADED, labels, 1.0
        yield RUNNING, labels, stats.running
        yield WAITING, labels, stats.waiting
        yield SLOTS, labels, stats.slots
        yield SLOTS_USED, labels, stats.slots_used
