"""Fetches text that is behind a URL: a web page, or the objects of a store that fsspec knows, such as s3.

In: a URL of a page, an object, a folder or a glob. Out: files in the cache, unpacked if they were packed. A web page is
fetched again when the server says that it has changed. The copy of an object is named after the object and its state in
the store: a changed object gets a new copy, and a resumed run finds the text it started with. A machine that lacks a
copy fetches it when it reads it.
"""

import glob
import hashlib
import http.client
import logging
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gptcore.errors import CorpusError, FoundryError, RecordError, did_you_mean
from gptcore.progress import at, doing
from gptcore.stores import file_system
from train_job.data.formats import bare, unpacked
from train_job.files import LONGEST_NAME, locked, one_line, read_json, write_json, written_whole

log = logging.getLogger(__name__)

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
BLOCK_BYTES = 8 * 2**20
DOWNLOAD_BLOCK_BYTES = 2**20
FETCHERS = 8
"""Objects fetched at once: for small ones, most of the time is waiting."""
STATES = ("ETag", "generation", "etag", "md5Hash")
"""Properties that change with an object's content, as stores name them; the best first."""
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


def copy_name(source: str, name: str) -> str:
    """The name of the cached copy of `source`. It ends like `name`, so that the suffix is kept."""
    tail = name.encode()[-LONGEST_NAME:].decode(errors="ignore")
    return f"{hashlib.sha256(source.encode()).hexdigest()[:16]}-{tail}"


@dataclass(frozen=True)
class Origin:
    """The source of a copy: an object's URL and its state in the store; "" if the store has none."""

    url: str
    state: str = ""

    def copy_in(self, cache_dir: Path) -> Path:
        """The path of the cached copy. It ends like the object's name, so that the suffix is kept."""
        name = bare(PurePosixPath(self.url).name)
        return cache_dir.absolute() / "downloads" / copy_name(repr((self.url, self.state)), name)


def download(url: str, path: Path, refresh: bool = False) -> Path:
    """Downloads `url` to `path` unless it exists; with `refresh`, downloads it again if it has changed.

    The server decides that by the ETag or date that came with the copy; a copy without either is kept. If the server
    cannot be reached, the copy is used, with a warning. Raises CorpusError if there is no copy.
    """
    headers = path.with_name(f"{path.name}.headers")
    known = {}
    with suppress(RecordError):  # without readable headers, the copy is kept
        known = read_json(headers, "") if path.exists() else {}
    if path.exists() and not (refresh and known):
        return path
    try:
        request = urllib.request.Request(url, headers=known)
        with doing(f"downloading {url}"), urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as answer:
            with written_whole(path) as file:
                expected = int(answer.headers.get("Content-Length") or 0)
                while block := answer.read(DOWNLOAD_BLOCK_BYTES):
                    file.write(block)
                    at(file.tell(), expected)
                expected = expected or file.tell()
                if file.tell() != expected:
                    raise OSError(f"{file.tell()} of {expected} bytes arrived")
            conditions = {"If-None-Match": answer.headers["ETag"], "If-Modified-Since": answer.headers["Last-Modified"]}
        write_json(headers, {name: value for name, value in conditions.items() if value})
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == http.client.NOT_MODIFIED:
            return path
        reason = getattr(error, "reason", error)
        if not path.exists():
            raise CorpusError(f"cannot download {url}: {reason}") from error
        log.warning("cannot check %s for changes (%s); using the copy in %s", url, reason, path)
        return path
    if known:
        log.warning("%s has changed and was downloaded again", url)
    return path


def in_store(data: str) -> bool:
    """Whether `data` is the URL of a store; web pages are downloaded instead, and file:// is a path."""
    return "://" in data and not data.startswith(("http://", "https://", "file://"))


def list_objects(url: str) -> list[Origin]:
    """The objects at a URL, sorted by name, without hidden ones. Raises CorpusError if there are none."""
    if "::" in url:
        raise CorpusError(f"{url!r} is a chain of URLs; expected a single one, such as s3://BUCKET/FOLDER")
    with store_errors(url):
        fs, path = file_system(url)
        fs.invalidate_cache()
        root, found = path, fs.find(path, detail=True)
        if not found and glob.has_magic(path):
            root = path[: re.search(r"[^/]*[*?[]", path).start()].rstrip("/")  # type: ignore[union-attr]
            found = fs.glob(path, detail=True)
        names = [
            name
            for name, info in found.items()
            if info["type"] == "file" and not name.endswith("/")  # not a folder or a placeholder for one
            if "/." not in name.removeprefix(root)
        ]
        if not names:
            raise _not_found(fs, path, root, url)
        return [Origin(fs.unstrip_protocol(name), _state(found[name])) for name in sorted(names, key=PurePosixPath)]


def _not_found(fs: Any, path: str, root: str, url: str) -> CorpusError:
    """The error that explains why nothing was found; `root` is the part of `path` before a pattern."""
    if path != root:
        fs.ls(root)  # raises if there is no such bucket or folder
        return CorpusError(f"no object matches {url!r}")
    folder, _, name = path.rpartition("/")
    with suppress(Exception):  # no suggestion without the right to list the folder
        beside = [PurePosixPath(file).name for file in fs.ls(folder, detail=False)]
        return CorpusError(f"there is nothing at {url!r}.{did_you_mean(name, beside)}")
    return CorpusError(f"there is nothing at {url!r}")


def _state(info: dict[str, Any]) -> str:
    said = next((info[name] for name in STATES if info.get(name)), None)
    return str(said).strip('"') if said else str([info["size"], *(str(info[name]) for name in TIMES if name in info)])


def fetch_all(origins: Sequence[Origin], cache_dir: Path) -> list[Path]:
    """Fetches the objects that have no copy yet; returns the path of each copy.

    Raises CorpusError for an object that cannot be read, TrainingError for a full disk.
    """
    paths, given_up = [origin.copy_in(cache_dir) for origin in origins], threading.Event()
    with ThreadPoolExecutor(FETCHERS) as pool:
        try:
            with doing(f"fetching {len(origins)} objects such as {origins[0].url}" if origins else "nothing"):
                for n, _ in enumerate(pool.map(lambda o, path: fetch(o, path, given_up=given_up), origins, paths)):
                    at(n + 1, len(origins))
        except BaseException:
            given_up.set()  # stops the other fetches, so that the error is raised at once
            raise
    return paths


def fetch(origin: Origin, path: Path, digest: str = "", given_up: threading.Event | None = None) -> None:
    """Fetches a copy to `path` unless it exists; processes that fetch the same object wait for each other.

    Raises CorpusError if the object cannot be read or has changed: its state differs from the origin's, or the
    content's SHA-256 from `digest`.
    """
    if path.exists():
        return
    with locked(path.with_name(f".{path.name}.lock")), store_errors(origin.url):
        if path.exists():
            return
        hasher = hashlib.sha256()
        with _raw(origin) as raw, unpacked(raw, origin.url) as source, written_whole(path) as file:
            while block := source.read(BLOCK_BYTES):
                if given_up and given_up.is_set():
                    raise CorpusError(f"stopped fetching {origin.url}")
                hasher.update(block)
                file.write(block)
            if digest and hasher.hexdigest() != digest:
                raise _changed(origin)


def _raw(origin: Origin) -> Any:
    """Opens the object as stored. Raises CorpusError if its state has changed since it was listed."""
    if not in_store(origin.url):
        return urllib.request.urlopen(origin.url, timeout=DOWNLOAD_TIMEOUT)
    fs, path = file_system(origin.url)
    fs.invalidate_cache(path)
    raw = fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
    if _state(getattr(raw, "details", None) or fs.info(path)) != origin.state:
        raw.close()
        raise _changed(origin)
    return raw


def _changed(origin: Origin) -> CorpusError:
    return CorpusError(f"{origin.url} has changed since the run began; restore that text, or start a new run")


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turns any error of a store's client into a CorpusError; our own errors pass unchanged."""
    try:
        yield
    except FoundryError:
        raise
    except FileNotFoundError as error:
        raise CorpusError(f"there is nothing at {url!r}: {one_line(error)}") from error
    except Exception as error:  # each client has its own types for no network, no key, no permission
        raise CorpusError(f"the text at {url!r} cannot be read: {one_line(error)}") from error
