"""How a package is served: models from the registry, an engine in each replica, HTTP around it.

`app` and `build_app` are what `serve run serve_app:app` and `serve run serve_app:build_app key=value ...` look for.
Ray is imported by neither this package nor its modules but `service.py`, which only these two bring in.
"""

from typing import Any

import gptcore  # noqa: F401  # which looks at the Python that runs


def build_app(args: dict[str, str]) -> Any:
    """The application for `serve run` and Serve configs; `args` are settings by name, above the environment's."""
    from serve_app.deployment import build_app as build

    return build(args)


def __getattr__(name: str) -> Any:
    if name == "app":  # made when asked for, so that importing the package stays light
        return build_app({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
