"""The playground: a static page at `/` that calls the service's own HTTP routes.

The files of `serve_app/playground` are read once and served unchanged, without a build step. The content security
policy allows this origin only, so even if a model's text were rendered as markup, it could not load or run anything.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response

from serve_app.errors import ApiError
from serve_app.state import AppState

FOLDER = Path(__file__).resolve().parents[2] / "playground"
PAGE = "index.html"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "cache-control": "no-cache",  # revalidate each time, so that page and service are of the same release
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Asset:
    """One file, ready to be sent. `etag` is a quoted hash of its content."""

    body: bytes
    content_type: str
    etag: str


def read_assets(folder: Path = FOLDER) -> dict[str, Asset]:
    """The files of `folder` by name, except types that the page does not use."""
    return {
        path.name: Asset(body, CONTENT_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:20]}"')
        for path in sorted(folder.iterdir())
        if path.suffix in CONTENT_TYPES
        for body in [path.read_bytes()]
    }


def router(state: AppState) -> APIRouter:
    """Routes `/` and `/playground/{file}`. They do not use `state` and need no key: the page asks for one.

    An unknown file gets a 404.
    """
    assets = read_assets()
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _send(assets[PAGE], request.headers)

    @routes.api_route("/playground/{file}", methods=["GET", "HEAD"])
    async def asset(request: Request, file: str) -> Response:
        if file not in assets:
            raise ApiError(404, f"the playground has no file {file[:80]!r}", code="route_not_found")
        return _send(assets[file], request.headers)

    return routes


def _send(asset: Asset, headers: Mapping[str, str]) -> Response:
    sent = {**HEADERS, "etag": asset.etag}
    if asset.etag in headers.get("if-none-match", ""):
        return Response(status_code=304, headers=sent)
    return Response(asset.body, media_type=asset.content_type, headers=sent)
