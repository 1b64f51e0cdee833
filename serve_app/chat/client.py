"""The chat's HTTP client: lists the models, and streams an answer as `Piece`s.

There are three kinds of errors: `Unreachable`, the request was not sent and a retry is safe; `ServiceError`, the
service (or another server at its address) refused; `BrokenOff`, a stream ended too early. Closing the generator closes
its connection, so the service frees the slot.
"""

import json
import os
import ssl
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import httpx2
from pydantic import AfterValidator, Field, TypeAdapter

from gptcore.errors import ConfigError, FoundryError
from serve_app.http.hosts import is_loopback

KEY_VARIABLE = "GPT_FOUNDRY_API_KEY"
CONNECT_SECONDS = 5.0
SILENT_SECONDS = 600.0
"""Read timeout: the service may load a model first, or queue the request."""
LONGEST_WAIT_SECONDS = 3600.0
SHOWN = 200
"""Most characters to show of a name or message from the service."""
LARGEST = 2**63 - 1
NONSENSE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""Exceptions from unexpected JSON, such as an infinite number or a thousand nested lists."""


class Unreachable(FoundryError):
    """The service could not be reached, or closed the connection without an answer."""


class BrokenOff(FoundryError):
    """The answer's stream ended too early."""


class ServiceError(FoundryError):
    """An error reply. `status` is 0 if the reply is not from a service of ours."""

    def __init__(
        self,
        message: str,
        status: int = 0,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after
        """Seconds, if the service sent Retry-After."""

    @property
    def temporary(self) -> bool:
        """Whether a retry may help: a full queue, a model that is not ready, a proxy without a replica."""
        return self.status in (429, 502, 503)


def encodable(text: str) -> str:
    """`text` with lone surrogates replaced, so that it can be encoded as UTF-8."""
    return text.encode("utf-8", "replace").decode()


Name = Annotated[str, AfterValidator(encodable)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]


@dataclass(frozen=True)
class ModelEntry:
    """A model in `GET /models`; only the fields that the chat shows."""

    name: Name
    state: Name = ""
    default: bool = False
    chat: bool | None = None
    """Whether it answers conversations; None: not known before it is loaded."""
    version: Name | None = None
    context_length: Count | None = None
    parameters: Count | None = None
    bits_per_byte: float | None = None
    error: Name | None = None


LISTING = TypeAdapter(list[ModelEntry])


@dataclass(frozen=True)
class Piece:
    """An event of a stream. The last one has `total_tokens`, of prompt and answer together."""

    model: str
    version: str
    seed: int | None
    text: str = ""
    tokens: int = 0
    end: str | None = None
    total_tokens: int | None = None
    dropped: int = 0
    """Messages of the conversation that were left out."""


Read = Callable[[Mapping[str, Any], Mapping[str, Any]], Piece]
"""Reads the piece in an event and its choice, as one route writes them."""


class Service:
    """A client for one service. Raises ConfigError for an invalid address, key or proxy."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = checked_url(url)
        self._client = _client(self.url)
        self.use_key(key)

    def use_key(self, key: str) -> None:
        """Send `key` from now on; "" sends none."""
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("the API key has invalid characters; expected printable ASCII")
        self._client.headers.pop("authorization", None)
        if key:
            self._client.headers["authorization"] = f"Bearer {key}"

    def models(self) -> list[ModelEntry]:
        """The models, the default model first."""
        with self._talking():
            reply = self._client.get("models", timeout=CONNECT_SECONDS)
        if reply.status_code != 200:
            raise self._refusal(reply)
        try:
            return LISTING.validate_python(reply.json()["models"])
        except NONSENSE:
            raise self._foreign("GET /models has no list of models") from None

    def generate(self, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        """Stream the pieces of a continuation."""
        # With logprobs 0, each event lists its tokens, so that the tokens of a stopped answer can be counted too.
        return self._stream("generate", {**body, "logprobs": 0}, _continued)

    def reply(self, body: Mapping[str, Any]) -> Generator[Piece, None, None]:
        """Stream the pieces of an answer to a conversation. They repeat the body's `seed`, which the events lack."""
        wanted = {**body, "logprobs": True, "stream_options": {"include_usage": True}}
        return self._stream("v1/chat/completions", wanted, partial(_answered, seed=body.get("seed")))

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _stream(self, route: str, body: Mapping[str, Any], read: Read) -> Generator[Piece, None, None]:
        with self._talking(), self._client.sse(route, method="POST", json={**body, "stream": True}) as source:
            reply = source.response
            if reply.status_code != 200:
                reply.read()
                raise self._refusal(reply)
            if reply.headers.get("content-type", "").partition(";")[0].strip() != "text/event-stream":
                raise self._foreign(f"POST /{route} sends no events")
            yield from self._pieces(source, read)

    def _pieces(self, source: httpx2.EventSource, read: Read) -> Iterator[Piece]:
        try:
            for event in source:
                if event.data == "[DONE]":
                    return
                yield self._piece(event.data, read)
        except httpx2.ReadTimeout:
            raise BrokenOff(f"the service sent nothing for {SILENT_SECONDS:g} s") from None
        except httpx2.TransportError:
            raise BrokenOff("the connection was lost before the text was complete") from None
        raise BrokenOff("the connection was closed before the text was complete")

    def _piece(self, data: str, read: Read) -> Piece:
        try:
            event = json.loads(data)
            if "error" in event:
                raise ServiceError(_message(event) or "the service stopped the answer", 200)
            return read(event, event["choices"][0] if event["choices"] else {})
        except NONSENSE:
            raise self._foreign("an event has an unexpected form") from None

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn the library's exceptions before an answer has started into our errors."""
        try:
            yield
        except httpx2.ReadTimeout:
            raise ServiceError(f"{self.url} accepted the request but did not answer in time") from None
        except httpx2.DecodingError:
            raise self._foreign("its reply cannot be decompressed") from None
        except httpx2.TransportError as error:
            if tls := [cause for cause in _chain(error) if isinstance(cause, ssl.SSLError)]:
                reason = getattr(tls[-1], "verify_message", "") or str(tls[-1].reason).replace("_", " ").lower()
                raise ServiceError(f"no secure connection to {self.url}: {reason}") from None
            raise Unreachable(f"{self.url} cannot be reached ({_reason(error)})") from None

    def _refusal(self, reply: httpx2.Response) -> ServiceError:
        status, known = reply.status_code, True
        try:
            body = reply.json()
        except NONSENSE:
            body, known = {}, False
        message = _message(body)
        if status == 401:
            message = f"{message or 'an API key is needed'} (set {KEY_VARIABLE} before the start)"
        elif not message:
            what = "" if known or status >= 500 else "; is it the address of a GPT Foundry service?"
            message = f"{self.url} returned status {status}{what}"
        error = body.get("error") if isinstance(body, dict) else None
        param, code = (error.get(key) if isinstance(error, dict) else None for key in ("param", "code"))
        return ServiceError(message, status, param, code, _seconds(reply.headers.get("retry-after")))

    def _foreign(self, what: str) -> ServiceError:
        return ServiceError(f"{self.url} does not answer as a GPT Foundry service does: {what}")


def _continued(event: Mapping[str, Any], choice: Mapping[str, Any]) -> Piece:
    tokens = len(choice.get("logprobs") or ())
    return _read(event, choice, event["version"], int(event["seed"]), choice.get("text"), tokens)


def _answered(event: Mapping[str, Any], choice: Mapping[str, Any], seed: int | None) -> Piece:
    text = (choice.get("delta") or {}).get("content")
    tokens = len((choice.get("logprobs") or {}).get("content") or ())
    return _read(event, choice, str(event["system_fingerprint"]).partition("/")[2], seed, text, tokens)


def _read(
    event: Mapping[str, Any], choice: Mapping[str, Any], version: Any, seed: int | None, text: Any, tokens: int
) -> Piece:
    usage = event.get("usage") or {}
    return Piece(
        model=encodable(str(event["model"]))[:SHOWN],
        version=encodable(str(version))[:SHOWN],
        seed=seed,
        text=encodable(str(text or "")),
        tokens=tokens,
        end=encodable(str(choice.get("finish_reason") or "")) or None,
        total_tokens=min(int(usage["total_tokens"]), LARGEST) if usage else None,
        dropped=min(int((event.get("truncated") or {}).get("messages", 0)), LARGEST),
    )


def _client(url: httpx2.URL) -> httpx2.Client:
    """The library's client. Raises ConfigError if the environment sets an invalid proxy or certificate file."""
    try:
        return httpx2.Client(
            base_url=url,
            timeout=httpx2.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            trust_env=not is_loopback(url.host),  # a proxy cannot reach this machine's loopback
        )
    except OSError as error:  # including ssl's
        file = os.environ.get("SSL_CERT_FILE")
        raise ConfigError(f"SSL_CERT_FILE is {file!r}; expected a file of certificates ({_reason(error)})") from None
    except ImportError:
        raise ConfigError("the environment sets a SOCKS proxy, which needs a package: pip install socksio") from None
    except (ValueError, httpx2.InvalidURL) as error:  # the library's message contains no password
        raise ConfigError(
            f"the environment sets an invalid proxy: {error}; expected http://HOST:PORT in HTTP_PROXY, HTTPS_PROXY and "
            "ALL_PROXY"
        ) from None


def checked_url(text: str) -> httpx2.URL:
    """The service's address, with a trailing slash. Raises ConfigError."""
    expected = "expected http://HOST:PORT or https://HOST"
    if "://" not in text:
        near = f". Did you mean 'http://{text}'?" if text and not text.startswith("/") else ""
        raise ConfigError(f"--url is {text!r}; {expected}{near}", param="url")
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url is {text!r}, which is not an address: {error}; {expected}", param="url") from None
    if url.userinfo:
        raise ConfigError(
            f"--url has a user or password, which other users can read; put a key in {KEY_VARIABLE}", param="url"
        )
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ConfigError(f"--url is {text!r}; {expected}", param="url")
    return url if url.path.endswith("/") else url.copy_with(path=f"{url.path}/")


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return encodable(message) if isinstance(message, str) else ""


def _seconds(text: str | None) -> float | None:
    """`Retry-After` in seconds; None for its other form, a date."""
    return min(float(text), LONGEST_WAIT_SECONDS) if text and text.isdecimal() else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    """The operating system's message, in lower case and without its number."""
    causes = [cause for cause in _chain(error) if isinstance(cause, OSError) and cause.strerror]
    text = causes[-1].strerror if causes else str(error) or type(error).__name__
    return str(text)[:SHOWN].lower()
