"""Text behind a URL that fsspec knows, such as s3://BUCKET/FOLDER: what is there, and a copy of each object.

In: the URL of an object, of a folder or a glob. Out: files in the cache, unpacked if they were packed; from there on
they are files like any other. A copy is named after the object and the state that the store had it in: a changed one is
fetched anew beside it, and a run that goes on finds the text that it began with. A machine that lacks a copy fetches
it when it has to read it.
"""

import glob
import hashlib
import re
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gptcore.errors import CorpusError, FoundryError, did_you_mean
from gptcore.fetch import file_system
from gptcore.progress import at, doing
from train_job.data.formats import bare, unpacked
from train_job.files import DOWNLOAD_TIMEOUT, copy_name, locked, written_whole

BLOCK_BYTES = 8 * 2**20
FETCHERS = 8
"""Objects that are fetched at once: of small ones, most of the time is waiting."""
STATES = ("ETag", "generation", "etag", "md5Hash")
"""What stores call that which changes with an object's content, the best first."""
TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Origin:
    """Where a copy is from: an object's URL, and the state that the store had it in; "" where it does not say."""

    url: str
    state: str = ""

    def copy_in(self, cache_dir: Path) -> Path:
        """Where the copy is kept. It ends as the object's name does, so that its kind is known."""
        name = bare(PurePosixPath(self.url).name)
        return cache_dir.absolute() / "downloads" / copy_name(repr((self.url, self.state)), name)


def in_store(data: str) -> bool:
    """Whether `data` is a URL that is read here; the web's are downloaded with `train_job.files`, file:// is a path."""
    return "://" in data and not data.startswith(("http://", "https://", "file://"))


def listed(url: str) -> list[Origin]:
    """The objects behind a URL in the order of their names, but hidden ones. Raises CorpusError if none is left."""
    if "::" in url:
        raise CorpusError(f"{url!r} is a chain of URLs; expected one, such as s3://BUCKET/FOLDER")
    with answers(url):
        fs, path = file_system(url)
        fs.invalidate_cache()
        root, found = path, fs.find(path, detail=True)
        if not found and glob.has_magic(path):
            root = path[: re.search(r"[^/]*[*?[]", path).start()].rstrip("/")  # type: ignore[union-attr]
            found = fs.glob(path, detail=True)
        names = [
            name
            for name, info in found.items()
            if info["type"] == "file" and not name.endswith("/")  # else a folder, or a placeholder for one
            if "/." not in name.removeprefix(root)
        ]
        if not names:
            raise _nothing(fs, path, root, url)
        return [Origin(fs.unstrip_protocol(name), _state(found[name])) for name in sorted(names, key=PurePosixPath)]


def _nothing(fs: Any, path: str, root: str, url: str) -> CorpusError:
    """What tells best why nothing was found; `root` is what stands before a pattern."""
    if path != root:
        fs.ls(root)  # raises if there is no such bucket or folder, of which a pattern says nothing
        return CorpusError(f"no object matches {url!r}")
    folder, _, name = path.rpartition("/")
    with suppress(Exception):  # whoever may not list what is beside gets no suggestion
        beside = [PurePosixPath(file).name for file in fs.ls(folder, detail=False)]
        return CorpusError(f"there is nothing at {url!r}.{did_you_mean(name, beside)}")
    return CorpusError(f"there is nothing at {url!r}")


def _state(info: dict[str, Any]) -> str:
    said = next((info[name] for name in STATES if info.get(name)), None)
    return str(said).strip('"') if said else str([info["size"], *(str(info[name]) for name in TIMES if name in info)])


def copies(origins: Sequence[Origin], cache_dir: Path) -> list[Path]:
    """A file for each of the objects, fetched if it is not there.

    Raises CorpusError for an object that cannot be read, TrainingError for a full disk.
    """
    paths, given_up = [origin.copy_in(cache_dir) for origin in origins], threading.Event()
    with ThreadPoolExecutor(FETCHERS) as pool:
        try:
            with doing(f"fetching {len(origins)} objects such as {origins[0].url}" if origins else "nothing"):
                for n, _ in enumerate(pool.map(lambda o, path: fetch(o, path, given_up=given_up), origins, paths)):
                    at(n + 1, len(origins))
        except BaseException:
            given_up.set()  # or whoever stops us would have to wait for the others
            raise
    return paths


def fetch(origin: Origin, path: Path, digest: str = "", given_up: threading.Event | None = None) -> None:
    """Puts a copy at `path` unless there is one; many that ask for the same get one.

    Raises CorpusError if the object cannot be read or has changed: if its state is not the origin's, or the content
    has another SHA-256 than `digest`.
    """
    if path.exists():
        return
    with locked(path.with_name(f".{path.name}.lock")), answers(origin.url):
        if path.exists():
            return
        hasher = hashlib.sha256()
        with _opened(origin) as source, written_whole(path) as file:
            while block := source.read(BLOCK_BYTES):
                if given_up and given_up.is_set():
                    raise CorpusError(f"fetching {origin.url} was given up")
                hasher.update(block)
                file.write(block)
            if digest and hasher.hexdigest() != digest:
                raise _changed(origin)


@contextmanager
def _opened(origin: Origin) -> Iterator[Any]:
    """The object's content, unpacked if it is packed."""
    with _raw(origin) as raw, unpacked(raw, origin.url) as content:
        yield content


def _raw(origin: Origin) -> Any:
    """The object as it is in the store. Raises CorpusError if that is not the one that was listed."""
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
    return CorpusError(f"{origin.url} has changed since the run began with it; put that text back, or begin a new run")


@contextmanager
def answers(url: str) -> Iterator[None]:
    """Turns whatever a store's client raises within it into one CorpusError; our own errors pass."""
    try:
        yield
    except FoundryError:
        raise
    except FileNotFoundError as error:
        raise CorpusError(f"there is nothing at {url!r}: {_reason(error)}") from error
    except Exception as error:  # each client has errors of its own: no network, no key, no right
        raise CorpusError(f"the text at {url!r} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
