"""Stores that fsspec can open by URL, such as S3 or Google Cloud Storage. fsspec is imported when needed."""

from typing import Any

from gptcore.errors import HubError
from gptcore.redact import reason, without_password

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""URL scheme to the extra of this project that installs its client."""


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises HubError if its client is missing or unknown."""
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the client is not installed; the scheme is unknown
        extra = EXTRAS.get(url.partition("://")[0]) if isinstance(error, ImportError) else None
        advice = f" Install the extra {extra}: pip install -e '.[{extra}]'" if extra else ""
        raise HubError(f"{without_password(url)!r} cannot be opened: {reason(error)}{advice}") from error
    return fs, str(path).rstrip("/")
