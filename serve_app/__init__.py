"""Serves model packages over HTTP with Ray Serve.

`app` and `build_app` are for `serve run serve_app:app` and `serve run serve_app:build_app key=value ...`. Only
`deployment.py` and `ray_private.py` import Ray, and only these two functions import them.
"""

from typing import Any

import gptcore  # noqa: F401  # checks the Python version


def build_app(args: dict[str, str]) -> Any:
    """The application for `serve run` and Serve configs; `args` are settings, which override the environment's."""
    from serve_app.deployment import build_app as build

    return build(args)


def __getattr__(name: str) -> Any:
    if name == "app":  # built on access, so that importing the package stays fast
        return build_app({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
