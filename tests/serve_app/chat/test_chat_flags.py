"""The chat's settings and flags, and the chat in a pipe: its input, its output and its exit codes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from serve_app.chat.__main__ import main
from serve_app.chat.client import KEY_VARIABLE, Service, ServiceError
from serve_app.chat.terminal import harmless
from serve_app.chat.values import SHAPES
from serve_app.http.parameters import Parameters
from serve_app.http.schemas import GenerateRequest
from serve_app.settings import ServeSettings
from tests.serve_app.chat.chatting import CHAT, LONG, Terminal, api, on_screen, piped, speaking
from tests.serve_app.chat.relay import Relay, saying
from tests.serve_app.conftest import MakePackage
from tests.serve_app.running import Running, running

KEY = "key-of-the-chats-test"
OTHER_VALUES: dict[str, str] = {
    "max_new_tokens": "9",
    "temperature": "1.5",
    "top_k": "40",
    "top_p": "0.9",
    "min_p": "0.01",
    "repetition_penalty": "1.1",
    "presence_penalty": "-0.5",
    "frequency_penalty": "0.5",
    "seed": "-7",
    "stop": r"\n\n",
    "stop_token_ids": "7 8",
    "ignore_eos": "on",
}
"""A value of each parameter that is not its default, as it is typed."""
OTHER_FIELDS = {
    name: json.loads(value)
    for name, value in OTHER_VALUES.items()
    if name not in ("stop", "stop_token_ids", "ignore_eos")
} | dict(stop="\n\n", stop_token_ids=[7, 8], ignore_eos=True)
"""The same as JSON."""


@pytest.fixture(scope="module")
def service(make_package: MakePackage) -> Iterator[Running]:
    with speaking(make_package) as service:
        yield service


@pytest.fixture
def chat(service: Running, tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(service.url, "--ignore-eos", home=tmp_path)
    terminal.prompt()
    yield terminal
    terminal.process.close(force=True)


# --- settings ---


def test_the_settings_are_the_ones_of_the_service() -> None:
    others = {"prompt", "model", "n", "echo", "logprobs", "stream", "add_special_tokens"}
    assert set(SHAPES) == set(Parameters.model_fields) == set(GenerateRequest.model_fields) - others
    assert set(OTHER_VALUES) == set(SHAPES)


def test_every_setting_can_be_set_and_reaches_the_model(chat: Terminal, service: Running) -> None:
    for name, value in OTHER_VALUES.items():
        assert f"{name} is" in chat.do(f"/set {name} {value}" if name == "stop" else f"/{name} {value}")
    shown = chat.do("/settings")
    assert len(re.findall(r"\(default ", shown)) == len(SHAPES)
    assert on_screen(api(service, "The", **OTHER_FIELDS)) in chat.ask("The")
    chat.do("/reset")
    assert "(default " not in chat.do("/settings")
    assert re.search(r"temperature +1 ", chat.seen)


def test_a_mistake_is_one_line_and_the_chat_goes_on(chat: Terminal) -> None:
    said = {
        "/temperature hot": "error: temperature is 'hot'; expected a number of at least 0",
        "/set top_p 2": "error: top_p is '2'; expected a number above 0 and at most 1",
        "/seed 1.5": "error: seed is '1.5'; expected a whole number of at most 64 bits",
        "/ignore_eos perhaps": "error: ignore_eos is 'perhaps'; expected on or off",
        "/stop_token_ids 1 x": "error: stop_token_ids is '1 x'; expected whole numbers of at least 0",
        "/temprature 1": "error: there is no command '/temprature'. Did you mean '/temperature'?",
        "/set tempreture 1": "error: there is no setting 'tempreture'. Did you mean 'temperature'?",
        "/": "error: there is no command '/'. /help lists them",
        "/retri": "error: there is no command '/retri'. Did you mean '/retry'?",
        "/etc/passwd": "error: there is no command '/etc/passwd'. /help lists them; to start a prompt with a slash",
        "/model tny": "error: there is no model 'tny'; there are tiny, short. Did you mean 'tiny'?",
        "/history perhaps": "error: history is 'perhaps'; expected on, off or nothing",
        "/retry": "error: there is no prompt to retry yet",
        "/more": "error: there is no text to continue yet",
        "/save": "error: expected /save FILE",
        "/save ~nobody-of-this-name/x.txt": "error: '~nobody-of-this-name/x.txt' starts with an unknown home folder",
        "/key abc": "error: a key on this line would be stored",
    }
    for line, expected in said.items():
        answer = chat.do(line)
        assert answer.startswith(expected), answer
        assert answer.count("\n") == 1
    chat.do(f"/max_new_tokens {LONG + 1}")
    assert "error: max_new_tokens is 4001; at most 4000 are allowed here" in chat.do("The")
    chat.do("/max_new_tokens 3")
    assert "length reached" in chat.ask("The")


def test_every_setting_has_a_flag(service: Running, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OTHER_VALUES.items()]
    assert main(["--url", service.url, *flags, "--prompt", "The"]) == 0
    assert capsys.readouterr().out == harmless(api(service, "The", **OTHER_FIELDS)) + "\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--temperature", "hot"], "temperature is 'hot'; expected a number of at least 0"),
        (["--temprature", "1"], "Did you mean '--temperature'?"),
        (["--stop", "[" * 5000], "stop is '[[[[[["),
        (["--prompt", " "], "--prompt is empty; expected the beginning of a text"),
        (["--wait", "-1"], "--wait is -1; expected"),
        (["--api-key", KEY], f"set {KEY_VARIABLE} instead"),
        (["--url", "localhost:8000"], "Did you mean 'http://localhost:8000'?"),
        (["--url", "ftp://localhost"], "--url is 'ftp://localhost'; expected http://HOST:PORT"),
        (["--url", "http://"], "expected http://HOST:PORT"),
        (["--url", "http://host:port"], "which is not an address"),
        (["--url", f"http://{KEY}@host"], f"put a key in {KEY_VARIABLE}"),
    ],
)
def test_wrong_flags_end_with_one_line_and_exit_code_2(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompt", "x", *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert KEY not in error


AWAY = "http://192.0.2.1:9"
"""An unreachable address that is not this machine, so the environment's proxies apply to it."""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ALL_PROXY", f"socks5://user:{KEY}@host:1", "a SOCKS proxy, which needs a package: pip install socksio"),
        ("HTTP_PROXY", f"foo://user:{KEY}@host", "an invalid proxy: Unknown scheme"),
        ("HTTPS_PROXY", f"http://user:{KEY}@host:port", "an invalid proxy: Invalid port: 'port'"),
        ("SSL_CERT_FILE", "/missing", "SSL_CERT_FILE is '/missing'; expected a file of certificates (no such file"),
        ("SSL_CERT_FILE", __file__, "expected a file of certificates ([x509"),
    ],
)
def test_an_invalid_environment_ends_with_one_line_and_exit_code_2(
    name: str, value: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["--url", AWAY, "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert KEY not in error


# --- in a pipe ---


def test_each_piped_line_is_a_prompt_and_answers_are_plain_text(service: Running) -> None:
    done = piped(
        service.url, "--seed", "3", "--max-new-tokens", "6", "--ignore-eos", given="Once upon a time\n\n/help me\r\n"
    )
    answers = [api(service, prompt, seed=3, max_new_tokens=6) for prompt in ("Once upon a time", "/help me")]
    assert done.stdout.decode() == "".join(f"{harmless(answer)}\n" for answer in answers)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_failed_piped_prompt_is_reported_and_the_next_one_is_answered(service: Running) -> None:
    done = piped(service.url, "--model", "short", "--max-new-tokens", "3", given=b"x" * 200 + b"\nb\xffd \x00\n")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: the prompt is 200 tokens long")
    assert done.stdout.count(b"\n") >= 1


def test_a_pipe_with_history_is_one_text_cut_to_the_services_limit(package: Any) -> None:
    with running(ServeSettings(models=(f"tiny={package.path}",), max_prompt_tokens=60, log_level="warning")) as strict:
        given = "".join(f"line {line}\n" for line in range(6))
        done = piped(strict.url, "--history", "--max-new-tokens", "12", "--ignore-eos", given=given)
    assert (done.returncode, b"characters are left out" in done.stderr) == (0, True)
    assert b"error" not in done.stderr


def test_a_service_that_stays_down_ends_a_pipe_with_exit_code_1(service: Running) -> None:
    relay = Relay(service.url)
    relay.cut()
    done = piped(relay.url, "--wait", "0.5", given="one\ntwo\n")
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == f"error: {relay.url} cannot be reached (connection refused)"
    assert done.stdout == b""


def head(status: str = "200 OK", kind: str = "text/event-stream") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode()


EVENT = (
    b'data: {"model":"m\\u001b[31m","version":"1","seed":1,"choices":[{"index":0,"text":"a\\u001b]0;x\\u0007b"}]}\n\n'
)

DEEP = b"[" * 5000 + b"]" * 5000


@pytest.mark.parametrize(
    "models",
    [
        DEEP,
        b'[{"name": "a", "parameters": 1' + b"0" * 400 + b"}]",
        b'[{"name": "a", "context_length": -1}]',
        b'[{"name": "a", "context_length": 1e999}]',
    ],
)
def test_an_invalid_list_of_models_is_one_error(models: bytes) -> None:
    with (
        saying(head(kind="application/json") + b'{"models": ' + models + b"}") as url,
        closing(Service(url)) as service,
        pytest.raises(ServiceError, match="GET /models has no list of models"),
    ):
        service.models()


def test_an_invalid_model_name_is_left_to_the_service_to_refuse(service: Running) -> None:
    done = piped(service.url, "--model", os.fsdecode(b"\xff"), given="The\n")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"there is no model '?'" in done.stderr


def test_a_closed_input_counts_as_empty() -> None:
    shell = ["sh", "-c", '"$@" <&-', "sh", *CHAT, "--url", "http://127.0.0.1:9"]
    done = subprocess.run(shell, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (head(kind="text/html") + b"<html>", "does not answer as a GPT Foundry service does"),
        (head("404 Not Found", "text/html") + b"<html>", "status 404; is it the address of a GPT Foundry service?"),
        (head("302 Found", "text/html"), "status 302"),
        (head("500 Oh", "application/json") + b'{"error": []}', "status 500"),
        (head("500 Oh", "application/json") + b'["error"]', "status 500"),
        (head("400 No", "application/json") + b'{"error": {"message": "a\\u001b[2Jb\\nc"}}', "error: a\ufffd[2Jb c"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot be reached"),
        (b"", "cannot be reached"),
        (head() + b"data: no json\n\n", "an event has an unexpected form"),
        (head() + b"data: []\n\n", "an event has an unexpected form"),
        (head() + b'data: {"choices": 5}\n\n', "an event has an unexpected form"),
        (head() + EVENT.replace(b'"seed":1', b'"seed":1e999'), "an event has an unexpected form"),
        (head() + b"data: " + DEEP + b"\n\n", "an event has an unexpected form"),
        (head() + EVENT.replace(b'"1"', DEEP), "an event has an unexpected form"),
        (head("500 Oh", "application/json") + DEEP, "status 500"),
        (head("400 No", "application/json") + b'{"error": {"message": "a\\ud800b"}}', "error: a?b"),
        (head() + b"\xff\xfe\x00\n\n", "closed before the text was complete"),
        (head(), "closed before the text was complete"),
        (head() + EVENT, "closed before the text was complete"),
        (head() + EVENT + b'data: {"error": {"message": "the engine died"}}\n\n', "the engine died"),
    ],
)
def test_any_message_of_a_server_is_one_line_without_control_characters(
    reply: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with saying(reply) as url:
        assert main(["--url", url, "--wait", "0", "--prompt", "x"]) == 1
    out, error = capsys.readouterr()
    assert expected in error
    assert error.count("\n") == 1
    assert out == ("a\ufffd]0;x\ufffdb\n" if EVENT in reply else "")
    assert "\x1b" not in error


def test_the_chat_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, serve_app.chat.__main__; print(*{'torch', 'ray', 'mlflow', 'fastapi', 'numpy'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
