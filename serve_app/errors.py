"""Error replies: `ApiError`, and the conversion of every other exception into one.

All routes use OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, with a 4xx status for the client's
errors and a 5xx status for the service's. Routes raise `ApiError`; a stream that has started sends `error_body` as its
last event instead.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from gptcore.errors import ConfigError, EngineError, QueueFull, TokenizerError, did_you_mean
from serve_app.front.unavailable import RETRY_AFTER_SECONDS

log = logging.getLogger(__name__)

RETRY_LATER = {"retry-after": str(RETRY_AFTER_SECONDS)}
"""The header of a 503 that may be gone soon."""
SHOWN_VALUE = 60
"""Characters of an invalid value or name that a reply repeats, so that it never repeats a megabyte of prompt."""
SHOWN_PATH = 200
SHOWN_FAULTS = 3
READ_FAULTS = 16
FOLDERS = re.compile(r"(?:(?<=:///)|(?<=file://)|(?<![\w.:/~-]))/(?:[^\s/'\",;:()]+/)+")
"""The folders of an absolute path, in a text or in a file URL; the paths of other URLs do not match."""


class ApiError(Exception):
    """A reply other than 2xx. `param` is the field at fault and `code` a word for programs, if there are any.

    Unless given, `type` follows from the status: invalid_request_error, authentication_error or server_error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        fault = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.message = message
        self.type = type or ("authentication_error" if status == 401 else fault)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's terms."""

    message: str = Field(description="For people: the invalid value, what was expected, and a suggestion.")
    type: str = Field(description="invalid_request_error, authentication_error or server_error.")
    param: str | None = Field(description="The field at fault, if there is one.")
    code: str | None = Field(description="For programs; for example model_not_found.")


class ErrorBody(BaseModel):
    """The body of every reply other than 2xx."""

    error: ErrorDetail


STATUSES = {
    400: "The request is malformed or a field is unknown, missing or out of range; `param` names it.",
    401: "The API key is missing or unknown.",
    403: "The request comes from a web page of a disallowed origin, or uses a disallowed host name.",
    404: "No such model or route.",
    405: "The route does not support this method.",
    408: "The client took too long to send the body.",
    413: "The body is too large.",
    415: "The body has a content-encoding; send it uncompressed.",
    500: "An error in the service; its log has the traceback under the reply's x-request-id.",
    503: "The queue is full or the model is not ready; Retry-After says when to try again.",
    504: "The request exceeded the time limit; its sequences were aborted.",
}
"""Every status other than 2xx that the service returns, and when."""


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route for the OpenAPI document: the named statuses, or all of them."""
    return {
        status: {"model": ErrorBody, "description": text}
        for status, text in STATUSES.items()
        if not statuses or status in statuses
    }


def error_body(error: ApiError) -> dict[str, Any]:
    """The error as JSON: a reply's body, or the last event of a stream that failed."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ApiError, scope: Scope) -> Response:
    """The error as a reply, in ASCII, since a message may repeat lone surrogates. The log reads it from the scope."""
    scope.setdefault("state", {})["error"] = error
    body = json.dumps(error_body(error))
    return Response(body, status_code=error.status, headers=error.headers, media_type="application/json")


def to_api_error(exc: BaseException) -> ApiError:
    """The ApiError for `exc`. An unexpected exception is logged with its traceback and not shown to the client."""
    match exc:
        case ApiError():
            return exc
        case ConfigError():
            return ApiError(400, str(exc), param=exc.param, code="invalid_value")
        case TokenizerError():  # a text on which an open model's split pattern backtracks too far
            return ApiError(400, str(exc), param="prompt", code="invalid_value")
        case QueueFull():
            return ApiError(503, str(exc), code="queue_full", headers=RETRY_LATER)
        case EngineError():
            log.error("the engine failed", exc_info=exc)
            return ApiError(503, "the model's engine is not running", code="engine_unavailable", headers=RETRY_LATER)
        case RequestValidationError():
            return _from_validation(exc.errors())
        case HTTPException():
            return ApiError(exc.status_code, str(exc.detail), headers=exc.headers)
        case _:
            log.error("unexpected %s", type(exc).__name__, exc_info=exc)
            return ApiError(500, "the service failed; its log has the details under this request's id", code="internal")


def add_handlers(app: FastAPI) -> None:
    """Register handlers that turn exceptions of routes into error replies. The middleware handles all others."""

    async def no_route(request: Request, exc: Exception) -> Response:
        return error_response(_no_route(app, request, exc), request.scope)

    async def answer(request: Request, exc: Exception) -> Response:
        return error_response(to_api_error(exc), request.scope)

    async def invalid(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, RequestValidationError)
        return error_response(_from_validation(exc.errors(), _known_fields(request)), request.scope)

    for kind in (ApiError, ConfigError, TokenizerError, QueueFull, EngineError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, no_route)


def _no_route(app: FastAPI, request: Request, exc: Exception) -> ApiError:
    assert isinstance(exc, HTTPException)
    path, headers = request.url.path[:SHOWN_PATH], exc.headers or {}
    if exc.status_code == 405:
        methods = {*headers.get("Allow", "").split(", ")}  # of the path's first route; HEAD has its own
        allowed = ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
        message = f"{shown(path)} does not support {request.method}; use {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    if exc.status_code == 404:
        near = did_you_mean(path, app.openapi()["paths"])
        return ApiError(404, f"there is no route {shown(path)}.{near}", code="route_not_found")
    return to_api_error(exc)


def _known_fields(request: Request) -> Sequence[str]:
    """The body's fields on the matched route, for suggestions."""
    body_field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(body_field, "field_info", None), "annotation", None)
    return list(getattr(model, "model_fields", ()))


def _from_validation(faults: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> ApiError:
    """A 400 from pydantic's list of errors: the field and code of the first, the messages of the first few."""
    described = [_describe(fault, known) for fault in faults[:READ_FAULTS]]  # there may be thousands
    messages = list(dict.fromkeys(message for message, _, _ in described))
    others = len(messages) - SHOWN_FAULTS + len(faults[READ_FAULTS:])
    more = f" (and {others} more)" if others > 0 else ""
    _, param, code = described[0]
    return ApiError(400, "; ".join(messages[:SHOWN_FAULTS]) + more, param=param, code=code)


def _describe(fault: Mapping[str, Any], known: Sequence[str]) -> tuple[str, str | None, str]:
    """(message, param, code) of one of pydantic's errors.

    Its location is (where, field, ...): indices follow the field and, for a field of several types, the type.
    """
    place = fault["loc"]
    param = place[1][:SHOWN_VALUE] if len(place) > 1 and isinstance(place[1], str) else None
    if fault["type"] == "json_invalid":
        return f"the body is not JSON: {fault['ctx']['error']}", None, "invalid_json"
    if param is None and fault["type"] == "missing":
        return "the body is missing; expected a JSON object", None, "invalid_json"
    if param is None:
        return f"expected a JSON object as the body: {_lower(fault['msg'])}", None, "invalid_json"
    if fault["type"] == "extra_forbidden":
        inner, near = str(place[-1])[:SHOWN_VALUE], did_you_mean(param, known) if len(place) == 2 else ""
        within = f" in {param}" if len(place) > 2 else ""
        return f"there is no field {shown(inner)}{within}.{near}", param, "unknown_parameter"
    if fault["type"] == "missing":
        within = f" in {_path(place[1:-1])}" if len(place) > 2 else ""
        return f"{place[-1]} is missing{within}", param, "missing_required_parameter"
    return (
        f"{_path([param, *place[2:]])} is {shown(fault.get('input'))}: {_lower(fault['msg'])}",
        param,
        "invalid_value",
    )


def _path(place: Sequence[str | int]) -> str:
    """Such as messages[0].role. A name behind an index is a field, and one behind another name is the type meant."""
    path = str(place[0])
    for before, part in pairwise(place):
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if isinstance(before, int) else ""
    return path


def without_folders(text: str) -> str:
    """`text` with absolute paths shortened to their last name, so that replies do not reveal this machine's folders."""
    return FOLDERS.sub("…/", text)


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def shown(value: Any) -> str:
    """`value` as shortened ASCII JSON."""
    if isinstance(value, str):
        value = value[: SHOWN_VALUE + 1]
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # not JSON, or an integer with too many digits
        text = type(value).__name__
    return text if len(text) <= SHOWN_VALUE else text[:SHOWN_VALUE] + "..."
