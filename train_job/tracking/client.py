"""Connections to MLflow that give up in time, and errors that say what to do.

In: a tracking URI. Out: an MlflowClient whose HTTP calls have short time limits and whose errors are TrainingErrors
without passwords. MLflow is imported inside functions, since importing it takes seconds.
"""

import contextlib
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptcore.errors import FoundryError, TrainingError
from gptcore.home import home
from gptcore.redact import without_password
from train_job.files import locked, one_line

_environment = threading.Lock()


def _hide_addresses() -> None:
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # they may have passwords


def mlflow_client(uri: str) -> Any:
    """An MlflowClient, imported when first needed."""
    _hide_addresses()
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:///"):
        return MlflowClient(uri)
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    # The first client makes the tables, and MLflow's migrations fail if two processes run them at once.
    with locked(database.with_name(f"{database.name}.lock")):
        return MlflowClient(uri)


def import_beside(uri: str) -> None:
    """Imports MLflow in a thread, and makes an SQLite database's tables: seconds in which the caller waits for Ray.

    An error is left to the first real call. The environment stays as it is, since Ray's processes get a copy.
    """
    _hide_addresses()

    def ready() -> None:
        with contextlib.suppress(Exception):
            mlflow_client(uri)

    threading.Thread(target=ready).start()


@contextlib.contextmanager
def request_limits(timeout_s: int, retries: int) -> Iterator[None]:
    """Shortens the time limits of MLflow's HTTP calls within the block; by default they take minutes.

    MLflow reads the limits from the environment at each call, so only one thread at a time may change them.
    """
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
    with _environment:
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def translated_errors(uri: str) -> Iterator[None]:
    """Turns any error that MLflow raises into a TrainingError; our own errors pass unchanged."""
    try:
        yield
    except FoundryError:
        raise
    except Exception as error:  # MLflow's own types, SQLAlchemy's and requests'
        if getattr(error, "error_code", "") == "UNAUTHENTICATED":
            user = os.environ.get("MLFLOW_TRACKING_USERNAME")
            whom = f"user {user!r} with this password" if user else "requests without a user"
            raise TrainingError(
                f"MLflow at {without_password(uri)} does not accept {whom}; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            ) from error
        raise TrainingError(without_password(f"MLflow at {uri} refused: {error}")) from error


@contextlib.contextmanager
def connected(uri: str, retries: int = 3) -> Iterator[Any]:
    """An MlflowClient whose calls wait 30 s for an answer, and whose errors are TrainingErrors."""
    with translated_errors(uri), request_limits(timeout_s=30, retries=retries):
        yield mlflow_client(uri)


def _check_sqlite(path: Path) -> None:
    """Creates the database's folder; raises OSError if the path is not a database."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise OSError(f"{path} is a folder, expected a file")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                raise OSError(f"{path} is not an SQLite database")


def _check_database(uri: str, timeout_s: float) -> None:
    """Raises OSError if the database does not accept a connection in time."""
    from sqlalchemy import create_engine, pool
    from sqlalchemy.exc import SQLAlchemyError

    results: list[str] = []

    def connect() -> None:
        try:
            create_engine(uri, poolclass=pool.NullPool).connect().close()
            results.append("")
        except (SQLAlchemyError, ImportError) as error:
            results.append(one_line(getattr(error, "orig", None) or error))

    thread = threading.Thread(target=connect, daemon=True)  # drivers name their time limits differently
    thread.start()
    thread.join(timeout_s)
    if not results:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    if results[0]:
        raise OSError(results[0])


def check_server(uri: str, timeout_s: float = 5.0) -> None:
    """Raises TrainingError, within about `timeout_s` seconds, if nothing answers at the tracking URI."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            host = parts.netloc.rpartition("@")[2]
            health = f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health"
            with contextlib.closing(urllib.request.urlopen(health, timeout=timeout_s)):
                return
        if parts.scheme == "sqlite":
            _check_sqlite(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
        elif parts.hostname:
            port = parts.port or {"mysql": 3306, "mssql": 1433}.get(parts.scheme.partition("+")[0], 5432)
            socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
            _check_database(uri, timeout_s)
        elif not parts.scheme.startswith("databricks"):
            raise TrainingError(
                f"tracking URI {without_password(uri)!r} has an unknown scheme; expected http(s)://… or sqlite:///…"
            )
    except urllib.error.HTTPError as error:  # an older server or a gateway without /health is fine
        if error.code >= 500:
            raise TrainingError(
                f"the tracking server at {without_password(uri)} answers {error.code} {error.reason}"
            ) from error
    except (OSError, ValueError) as error:
        # A ValueError of the URL parser quotes part of the URL, which may be part of a password.
        reason = "it is not a valid URL" if isinstance(error, ValueError) else getattr(error, "reason", None) or error
        raise TrainingError(
            f"no tracking server answers at {without_password(uri)} ({without_password(str(reason))}); "
            "start it, correct MLFLOW_TRACKING_URI, or unset that to use the embedded database"
        ) from error


def check_user(uri: str) -> None:
    """Raises TrainingError if a tracking server rejects this environment's user."""
    if urlsplit(uri).scheme in ("http", "https"):
        with connected(uri) as client:
            client.search_experiments(max_results=1)


def artifact_root(uri: str) -> str | None:
    """The folder of run files, as a file:// URI: next to an sqlite database, else under home(); None for a server."""
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https") or scheme.startswith("databricks"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).parent if scheme == "sqlite" else home() / "mlflow"
    return (folder / "artifacts").absolute().as_uri()
