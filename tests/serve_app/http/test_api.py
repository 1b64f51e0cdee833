"""The app as a whole: ids, versions, keys, origins, the OpenAPI document, and one form for all errors."""

import hmac
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from gptcore.package import Package
from serve_app.errors import STATUSES
from serve_app.http.app import create_api
from serve_app.http.logs import LOGGERS, JsonFormatter
from serve_app.metrics import Metrics
from serve_app.models.catalog import Models
from serve_app.settings import ServeSettings
from tests.serve_app.running import Running, running
from tests.waiting import eventually

BODY: dict[str, Any] = dict(prompt="The future of AI is", seed=7, max_new_tokens=4)
KEYS = ("first-key", "second-kéy")


@pytest.fixture(scope="module")
def service(package: Package) -> Iterator[Running]:
    with running(ServeSettings(models=(f"tiny={package.path}",), dtype="float32")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def locked(package: Package) -> Iterator[httpx2.Client]:
    """A service with keys and one allowed origin."""
    settings = ServeSettings(
        models=(f"tiny={package.path}",), dtype="float32", api_keys=KEYS, cors_origins=("https://pages.example",)
    )
    with running(settings) as service, httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The lines that the service logs within the block, parsed. A request's line comes after its last byte."""
    lines: list[dict[str, Any]] = []
    formatter = JsonFormatter()

    class Parsed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(formatter.format(record)))

    handler = Parsed()
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)


def error_of(reply: httpx2.Response, status: int) -> dict[str, Any]:
    """The error, after checking its form."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["message"]
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    assert body["error"]["type"] == kind
    assert reply.headers["x-request-id"]
    return body["error"]


# --- ids and versions ---


def test_a_request_keeps_its_own_id_if_it_is_short_and_plain(client: httpx2.Client) -> None:
    given = "trace-1.a_B:" + "x" * 116
    assert len(given) == 128
    assert client.post("/generate", json=BODY, headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "a\tb", "ä", "a,b", "<a>"])
def test_another_id_is_replaced(client: httpx2.Client, given: str) -> None:
    reply = client.get("/health", headers=[(b"x-request-id", given.encode())])
    assert reply.headers["x-request-id"] not in (given, "")
    assert reply.headers["x-request-id"].isalnum()


@pytest.mark.anyio
async def test_a_proxy_may_set_the_request_id_of_replies(package: Package) -> None:
    settings = ServeSettings(models=(f"tiny={package.path}",))
    for tag_replies in (True, False):
        app = create_api(settings, Models(settings), tag_replies=tag_replies)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
            assert ("x-request-id" in (await client.get("/health")).headers) == tag_replies


def test_generated_request_ids_differ(client: httpx2.Client) -> None:
    assert len({client.get("/health").headers["x-request-id"] for _ in range(8)}) == 8


@pytest.mark.parametrize("stream", [False, True])
def test_replies_name_the_version_that_answered(client: httpx2.Client, stream: bool) -> None:
    reply = client.post("/generate", json={**BODY, "stream": stream})
    version = client.get("/models").json()["models"][0]["version"]
    assert reply.headers["x-model-version"] == f"tiny/{version}"


# --- failures ---


@pytest.mark.parametrize(
    ("path", "hint"), [("/genrate", "'/generate'"), ("/v1/completion", "'/v1/completions'"), ("/" + "x" * 5000, None)]
)
def test_an_unknown_route_is_404_with_the_nearest_one(client: httpx2.Client, path: str, hint: str | None) -> None:
    error = error_of(client.post(path, json=BODY), 404)
    assert error["code"] == "route_not_found"
    assert error["message"].endswith(f"Did you mean {hint}?" if hint else ".")
    assert len(error["message"]) < 300


def test_a_trailing_slash_is_404_and_not_a_redirect(client: httpx2.Client) -> None:
    error_of(client.post("/generate/", json=BODY), 404)


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/metrics", "/models", "/v1/models", "/v1/models/tiny", "/tokenizer_info"]
)
def test_head_is_answered_like_get_without_the_body(client: httpx2.Client, path: str) -> None:
    got, asked = client.get(path), client.head(path)
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-type"] == got.headers["content-type"]


def test_head_of_an_unknown_route_is_404(client: httpx2.Client) -> None:
    assert [client.head(path).status_code for path in ("/v1/models/tinny", "/healthy")] == [404, 404]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/generate", "POST"),
        ("OPTIONS", "/tokenize", "POST"),
        ("DELETE", "/models", "GET, HEAD"),
        ("PUT", "/health", "GET, HEAD"),
        ("OPTIONS", "/v1/models", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405_and_the_reply_names_the_right_one(
    client: httpx2.Client, method: str, path: str, allowed: str
) -> None:
    reply = client.request(method, path)
    error = error_of(reply, 405)
    assert reply.headers["allow"] == allowed
    assert error["code"] == "method_not_allowed"
    assert method in error["message"]
    assert allowed in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"{", None, "invalid_json"),
        (b"not json", None, "invalid_json"),
        (b"{'prompt': 'x'}", None, "invalid_json"),
        (b'{"prompt": "x"} {}', None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b'"prompt"', None, "invalid_json"),
        (b"null", None, "invalid_json"),
        (b"\xff\xfe", None, "invalid_json"),
        (b'{"prompt": "\xc3("}', None, "invalid_json"),
        ('{"prompt": "x"}'.encode("utf-16"), None, "invalid_json"),
        (b'\xef\xbb\xbf{"prompt": "x"}', None, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "prompt", "invalid_json"),
        (b'{"prompt": "x", "stop": ["a", "\\udc00b"]}', "stop", "invalid_json"),
        (b'{"prompt": "x", "\\ud83d": 1}', None, "invalid_json"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature", "invalid_json"),
        (b'{"prompt": "x", "top_p": -Infinity}', "top_p", "invalid_json"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature", "invalid_value"),
        (b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}", "temperature", "invalid_value"),
        (b'{"prompt": "x", "max_new_tokens": 1' + b"0" * 400 + b"}", "max_new_tokens", "invalid_value"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 4000 + b"}", "seed", "invalid_value"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (b'{"a":' * 100_000, None, "invalid_json"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt", "invalid_value"),
        (b'{"prompt": ' + b'{"a":' * 900 + b"1" + b"}" * 901, "prompt", "invalid_value"),
        (b'{"prompt": 5}', "prompt", "invalid_value"),
        (b'{"prompt": null}', "prompt", "missing_required_parameter"),
        (b'{"max_new_tokens": 5}', "prompt", "missing_required_parameter"),
        (b'{"prompt": "x", "temprature": 1}', "temprature", "unknown_parameter"),
        (b'{"prompt": "x", "temperature": -1}', "temperature", "invalid_value"),
        (b'{"prompt": "x", "n": true}', "n", "invalid_value"),
        (b'{"prompt": "x", "stop": ["' + b'","'.join([b"a"] * 200_000) + b'"]}', "stop", "invalid_value"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else None,
)
def test_a_bad_body_is_400_and_names_the_field(
    client: httpx2.Client, body: bytes, param: str | None, code: str
) -> None:
    error = error_of(client.post("/generate", content=body), 400)
    assert (error["param"], error["code"]) == (param, code), error
    assert len(error["message"]) < 600


def test_bad_bodies_do_not_change_the_replicas_answers(client: httpx2.Client, service: Running) -> None:
    before = client.post("/generate", json=BODY).json()["choices"]
    for body in (b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"\xff"):
        error_of(client.post("/generate", content=body), 400)
    assert client.get("/health").status_code == 200
    assert client.post("/generate", json=BODY).json()["choices"] == before
    assert service.stats.slots_used == 0


def test_a_misspelt_field_gets_a_suggestion(client: httpx2.Client) -> None:
    error = error_of(client.post("/generate", json={**BODY, "temprature": 1}), 400)
    assert error["message"] == "there is no field \"temprature\". Did you mean 'temperature'?"
    body = {"model": "gpt", "prompt": "a", "stream": True, "stream_options": {"include": True}}
    error = error_of(client.post("/v1/completions", json=body), 400)
    assert error["message"] == 'there is no field "include" in stream_options.'


def test_the_first_of_many_errors_are_listed_and_the_others_counted(client: httpx2.Client) -> None:
    error = error_of(client.post("/generate", json={**BODY, **{f"field{i}": 1 for i in range(1000)}}), 400)
    assert error["message"].count("there is no field") == 3
    assert error["message"].endswith("(and 997 more)")


@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8", "x"]
)
def test_a_body_is_read_as_json_whatever_its_content_type(client: httpx2.Client, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    reply = client.post("/generate", content=json.dumps(BODY), headers=headers)
    assert reply.status_code == 200, reply.text


def test_an_unexpected_error_is_500_and_only_the_log_has_the_traceback(
    client: httpx2.Client, service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Any]:
        raise KeyError("internal-detail")

    monkeypatch.setattr(service.models, "describe", broken)
    with logged() as lines:
        reply = client.get("/models", headers={"x-request-id": "of-the-fault"})
        error = error_of(reply, 500)
        eventually(lambda: len(lines) == 2, "the fault and the request are logged")
    assert "internal-detail" not in reply.text
    assert error["code"] == "internal"
    fault, access = lines
    assert "internal-detail" in fault["exception"]
    assert {fault["request_id"], access["request_id"], reply.headers["x-request-id"]} == {"of-the-fault"}


def test_an_error_during_a_stream_ends_it_with_an_error_event(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve_app.generation.replies import Events

    monkeypatch.setattr(Events, "last", lambda self: 1 / 0)
    with logged() as lines:
        reply = client.post("/generate", json={**BODY, "stream": True})
        eventually(lambda: len(lines) == 2, "the fault and the request are logged")
    assert reply.status_code == 200
    *texts, last = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert texts
    assert json.loads(last)["error"]["code"] == "internal"
    fault, access = lines
    assert "ZeroDivisionError" in fault["exception"]
    assert (access["status"], access["code"]) == (200, "internal")


# --- the log ---


def test_a_request_is_one_log_line_without_text_or_keys(locked: httpx2.Client) -> None:
    headers = {"authorization": f"Bearer {KEYS[0]}", "x-request-id": "of-the-log"}
    with logged() as lines:
        version = locked.post("/generate", json=BODY, headers=headers).headers["x-model-version"]
        locked.get("/health")
        eventually(lambda: "of-the-log" in str(lines), "the request is logged")
    (line,) = [line for line in lines if line.get("request_id") == "of-the-log"]
    assert (line["level"], line["method"], line["route"], line["status"]) == ("info", "POST", "/generate", 200)
    assert f"{line['model']}/{line['version']}" == version
    assert 0 < line["seconds"] < 60
    assert BODY["prompt"] not in str(lines)
    assert KEYS[0] not in str(lines)
    assert not [line for line in lines if line.get("route") == "/health"]  # probes would drown the rest


# --- keys ---


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0]} {KEYS[0]}",
        f"Basic {KEYS[0]}",
        KEYS[0],
        "Bearer " + "x" * 10_000,
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/models", "/no-such-route"])
def test_without_a_valid_key_every_request_is_refused(
    locked: httpx2.Client, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    reply = locked.post(path, content=b"{", headers=headers)
    error = error_of(reply, 401)
    assert reply.headers["www-authenticate"] == "Bearer"
    assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_is_accepted(locked: httpx2.Client, key: str, scheme: str) -> None:
    reply = locked.post("/generate", json=BODY, headers=[(b"authorization", f"{scheme} {key}".encode())])
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/playground/app.js"])
def test_probes_metrics_and_pages_need_no_key(locked: httpx2.Client, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_every_key_is_compared_in_constant_time_whichever_is_given(
    locked: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr("serve_app.http.middleware.hmac.compare_digest", counted)
    for key in ("x", KEYS[0], "x" * 1000):
        compared.clear()
        locked.get("/models", headers={"authorization": f"Bearer {key}"})
        assert compared == [(32, 32)] * len(KEYS)


# --- origins ---


def test_other_origins_are_refused_by_default(client: httpx2.Client) -> None:
    asked = {"origin": "https://pages.example", "access-control-request-method": "POST"}
    assert client.options("/generate", headers=asked).status_code == 403
    reply = client.post("/generate", json=BODY, headers={"origin": "https://pages.example"})
    assert error_of(reply, 403)["code"] == "origin_not_allowed"  # nothing was computed
    assert not [name for name in reply.headers if name.startswith("access-control")]
    own = str(client.base_url).rstrip("/")
    assert client.post("/generate", json=BODY, headers={"origin": own}).status_code == 200


def test_an_allowed_origin_may_call_and_read_errors(locked: httpx2.Client) -> None:
    origin = {"origin": "https://pages.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    preflight = locked.options("/generate", headers=origin | asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin["origin"]
    refused = locked.post("/generate", json=BODY, headers=origin)
    error_of(refused, 401)
    assert refused.headers["access-control-allow-origin"] == origin["origin"]
    assert "x-request-id" in refused.headers["access-control-expose-headers"]


def test_origins_that_are_not_allowed_are_refused(locked: httpx2.Client) -> None:
    reply = locked.get("/health", headers={"origin": "https://other.example"})
    assert "access-control-allow-origin" not in reply.headers


# --- the OpenAPI document ---


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        ("GenerateRequest", {"prompt": "a", "max_new_tokens": 1, "nonsense": None, "top_k": None}),
        ("CompletionRequest", {"model": "tiny", "prompt": "a", "max_tokens": 1, "stream_options": {"": None}}),
        ("StreamOptions", {"model": "tiny", "prompt": "a", "max_tokens": 1, "stream_options": {"include_usage": None}}),
    ],
)
def test_null_is_the_same_as_leaving_out_in_the_service_and_in_the_openapi_document(
    client: httpx2.Client, schema: str, body: dict[str, object]
) -> None:
    path = "/generate" if schema == "GenerateRequest" else "/v1/completions"
    assert client.post(path, json=body).status_code == 200
    declared = client.get("/openapi.json").json()["components"]["schemas"][schema]
    assert declared["additionalProperties"] == {"type": "null"}
    optional = set(declared["properties"]) - set(declared.get("required", ()))
    assert all({"type": "null"} in declared["properties"][name]["anyOf"] for name in optional)


def test_an_empty_prompt_has_several_types_in_the_openapi_document(client: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": [], "max_tokens": 1}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert "oneOf" not in json.dumps(client.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"])


def test_the_openapi_document_declares_the_errors_of_every_route_in_one_form(client: httpx2.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = [(path, method) for path, methods in document["paths"].items() for method in methods]
    assert {path for path, _ in operations} >= {"/generate", "/v1/completions", "/models", "/health", "/metrics"}
    for path, method in operations:
        declared = document["paths"][path][method]["responses"]
        assert set(declared) - {"200"} <= {str(status) for status in STATUSES}, path
        assert "500" in declared
        for status in set(declared) - {"200"}:
            schemas = {kind: content["schema"] for kind, content in declared[status]["content"].items()}
            assert schemas == {"application/json": {"$ref": "#/components/schemas/ErrorBody"}}, (path, status)
        if "requestBody" in document["paths"][path][method]:
            assert {"400", "401", "404", "408", "413", "503", "504"} <= set(declared), path


def test_the_openapi_document_says_where_a_key_is_needed(client: httpx2.Client, locked: httpx2.Client) -> None:
    paths = locked.get("/openapi.json").json()["paths"]
    needed = {path for path, methods in paths.items() if any("security" in operation for operation in methods.values())}
    assert needed == set(paths) - {"/health", "/ready", "/metrics"}
    assert "security" not in client.get("/openapi.json").text.replace("securitySchemes", "")


def test_each_app_has_its_own_metrics(client: httpx2.Client, locked: httpx2.Client) -> None:
    assert 'gpt_requests_total{model="",route="/models",status="401",version=""}' in locked.get("/metrics").text
    assert 'route="/models",status="401"' not in client.get("/metrics").text
    assert "gpt_requests_total{" not in Metrics().render().decode()
