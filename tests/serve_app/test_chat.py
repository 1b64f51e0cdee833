"""The chat, in a real pseudo-terminal and in a pipe, against the real service: what is typed, seen and may get lost."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx2
import pexpect
import pytest

from serve_app.chat.__main__ import main
from serve_app.chat.client import KEY_VARIABLE
from serve_app.chat.terminal import harmless
from serve_app.chat.values import SHAPES
from serve_app.parameters import Parameters
from serve_app.schemas import GenerateRequest
from serve_app.settings import ServeSettings
from tests.serve_app.conftest import MakePackage, TestRegistry
from tests.serve_app.relay import Relay, saying
from tests.serve_app.running import Running, eventually, running

CHAT = [sys.executable, "-m", "serve_app.chat"]
LONG, SHORT_CONTEXT = 4000, 128
KEY = "key-of-the-chats-test"
FIGURES = r"\S+ version \S+ · \d+ tokens?(?: · \d+ tokens/s)? · seed -?\d+ · ([a-z ]+)\r\n"
END_OF_TEXT, ESCAPE = 256, "\x1b"
PROMPT = r"(?:\A|\n)(?:\x1b\[\?2004h)?> \Z"
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

Open = Callable[..., "Terminal"]


@pytest.fixture(scope="module")
def service(make_package: MakePackage) -> Iterator[Running]:
    """A model that speaks long enough to be stopped, one of a short context; one request runs and one waits."""
    shape = dict(hidden_size=256, num_layers=4, num_heads=4, context_length=LONG + 100)
    paths = (f"tiny={make_package(0, **shape).path}", f"short={make_package(1).path}")
    with running(
        ServeSettings(models=paths, slots=1, max_queue=1, max_new_tokens=LONG, log_level="warning")
    ) as service:
        yield service


class Terminal:
    """A chat in a pseudo-terminal. What its screen got since the last look is in `seen`."""

    def __init__(self, url: str, *flags: str, home: Path, **environment: str) -> None:
        # A dumb terminal gets nothing but text from readline: all control characters are somebody else's.
        plain = {"TERM": "dumb", "XDG_STATE_HOME": str(home), "PYTHONUTF8": "1", KEY_VARIABLE: ""}
        self.process = pexpect.spawn(
            CHAT[0],
            [*CHAT[1:], "--url", url, *flags],
            env=os.environ | plain | environment,  # type: ignore[arg-type]
            encoding="utf-8",
            codec_errors="replace",  # a line that is scrolled sideways may be shown from within a character
            dimensions=(24, 250),
            timeout=30,
        )
        self.seen = ""

    def type(self, line: str) -> None:
        """Types a line; what the terminal echoes of it is no longer among what is seen next."""
        self.process.sendline(line)
        self.see(re.escape(line) + "\r\n")

    def see(self, pattern: str) -> str:
        """Waits for the pattern; returns what came before it and itself."""
        self.process.expect(pattern)
        self.seen = self.process.before + self.process.after
        return self.seen

    def prompt(self) -> str:
        """Waits for the chat to ask for a line; returns what came before."""
        return self.see(PROMPT).removesuffix("> ")

    def do(self, line: str) -> str:
        """Types a line and waits for the next prompt; returns what came between."""
        self.type(line)
        return self.prompt()

    def ask(self, line: str) -> str:
        """Types a prompt; returns the answer, with its figures."""
        self.type(line)
        answer = self.see(FIGURES)
        self.prompt()
        return answer


@pytest.fixture
def open_chat(tmp_path: Path) -> Iterator[Open]:
    """Opens chats, with their first prompt waited for; none outlives the test."""
    opened: list[Terminal] = []

    def open(url: str, *flags: str, ready: bool = True, **environment: str) -> Terminal:
        terminal = Terminal(url, *flags, home=tmp_path, **environment)
        opened.append(terminal)
        if ready:
            terminal.prompt()
        return terminal

    yield open
    for terminal in opened:
        terminal.process.close(force=True)


@pytest.fixture
def chat(open_chat: Open, service: Running) -> Terminal:
    return open_chat(service.url, "--ignore-eos")


def piped(url: str, *flags: str, given: str | bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The chat with its input from a pipe."""
    given = given.encode() if isinstance(given, str) else given
    known = os.environ | {KEY_VARIABLE: "", "PYTHONUTF8": "1"} | environment
    return subprocess.run([*CHAT, "--url", url, *flags], input=given, capture_output=True, timeout=60, env=known)


def api(service: Running, prompt: str, **fields: Any) -> str:
    """What the service says itself."""
    body = {"prompt": prompt, "temperature": 0.9, "ignore_eos": True, **fields}
    reply = httpx2.post(f"{service.url}/generate", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def on_screen(text: str) -> str:
    """A text as a terminal gets it."""
    return harmless(text).replace("\n", "\r\n")


def endless(service: Running) -> socket.socket:
    """A client that has the service generate, until it is closed."""
    body = json.dumps({"prompt": "The", "max_new_tokens": LONG, "ignore_eos": True, "stream": True}).encode()
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


# --- an answer ---


def test_text_appears_while_the_model_speaks_and_ctrl_c_stops_it_alone(chat: Terminal, service: Running) -> None:
    chat.do(f"/max-new-tokens {LONG}")
    chat.do("/ignore-eos on")
    chat.type("The")
    for _ in range(3):  # in pieces, of which none is the end
        chat.see(r"(?s).{20}")
        assert service.stats.running == 1
    chat.process.sendintr()
    assert "stopped" in chat.see(FIGURES)
    chat.prompt()
    eventually(lambda: service.stats.slots_used == 0, "the slot is free")
    chat.do("/max-new-tokens 4")
    assert re.search(r"· 4 tokens .* · length reached", chat.ask("Again"))


def test_the_conversation_so_far_is_what_the_model_continues(chat: Terminal, service: Running) -> None:
    known = dict(max_new_tokens=12, seed=5)
    chat.do("/max_new_tokens 12")
    chat.do("/seed 5")
    chat.ask("Once upon a time")
    first = api(service, "Once upon a time", **known)
    so_far = f"Once upon a time{first}\nThere was"
    second = api(service, so_far, **known)
    assert on_screen(second) in chat.ask("There was")
    third = api(service, so_far + second, **known)
    assert on_screen(third) in chat.ask("/more")
    chat.do("/undo")
    assert on_screen(third) in chat.ask("/more")
    chat.do("/history off")
    assert on_screen(api(service, "There was", **known)) in chat.ask("There was")


def test_a_text_that_grows_too_long_is_cut_at_its_beginning_and_it_is_said(open_chat: Open, service: Running) -> None:
    chat = open_chat(service.url, "--model", "short", "--max-new-tokens", "30", "--ignore-eos")
    chat.ask("The beginning")
    cut = ""
    for line in range(6):
        cut += chat.ask(f"line {line}")
        assert "30 tokens" in chat.seen or "· 30 tokens" in cut  # there was room for all of each answer
    assert f"the text is longer than the {SHORT_CONTEXT} tokens that the model holds: its first" in cut
    assert "the model is no longer given the first" in chat.do("/history")
    refused = chat.do("x" * 200)
    assert "error: the prompt is 201 tokens long" in refused or "error: the prompt is 200 tokens long" in refused


def test_every_answer_says_who_gave_it_and_a_change_is_news(open_chat: Open, service: Running, package: Any) -> None:
    with running(ServeSettings(models=(f"tiny={package.path}",))) as newer:
        relay = Relay(service.url)
        chat = open_chat(relay.url, "--max-new-tokens", "3", "--ignore-eos")
        before = re.search(r"tiny version (\S+)", chat.ask("The"))[1]
        assert "answers now" not in chat.ask("The")
        relay.drop()
        relay.target = newer.url
        changed = chat.ask("The")
        after = re.search(r"tiny version (\S+) answers now; the answer before came from tiny version (\S+)", changed)
        assert after
        assert (after[1] != before, after[2]) == (True, before)
        relay.cut()


def test_special_tokens_and_control_characters_are_never_shown(open_chat: Open, service: Running) -> None:
    fields = dict(model="short", max_new_tokens=100, temperature=50.0, ignore_eos=True, logprobs=0)
    for seed in range(50):
        reply = httpx2.post(f"{service.url}/generate", json={"prompt": "a", "seed": seed, **fields}).json()["choices"][
            0
        ]
        if END_OF_TEXT in [token["token_id"] for token in reply["logprobs"]] and ESCAPE in reply["text"]:
            break
    else:
        pytest.fail("no seed has the model say what is not to be shown")
    flags = ("--model=short", "--max-new-tokens=100", "--temperature=50", "--ignore-eos", f"--seed={seed}")
    chat = open_chat(service.url, *flags)
    answer = chat.ask("a")
    assert on_screen(reply["text"]) in answer
    assert "endoftext" not in answer
    for shown in (answer, chat.do("/history")):
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown)


# --- settings ---


def test_the_settings_are_those_of_the_service() -> None:
    others = {"prompt", "model", "n", "echo", "logprobs", "stream"}
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
    assert re.search(r"temperature +0\.9 ", chat.seen)


def test_every_setting_has_a_flag(service: Running, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OTHER_VALUES.items()]
    assert main(["--url", service.url, *flags, "--prompt", "The"]) == 0
    assert capsys.readouterr().out == harmless(api(service, "The", **OTHER_FIELDS)) + "\n"


def test_what_is_wrong_is_said_in_one_line_and_the_chat_goes_on(chat: Terminal) -> None:
    said = {
        "/temperature hot": "error: temperature is 'hot'; expected a number of at least 0",
        "/set top_p 2": "error: top_p is '2'; expected a number above 0 and at most 1",
        "/seed 1.5": "error: seed is '1.5'; expected a whole number of at most 64 bits",
        "/ignore_eos perhaps": "error: ignore_eos is 'perhaps'; expected on or off",
        "/stop_token_ids 1 x": "error: stop_token_ids is '1 x'; expected whole numbers of at least 0",
        "/temprature 1": "error: there is no command '/temprature'. Did you mean '/temperature'?",
        "/set tempreture 1": "error: there is no setting 'tempreture'. Did you mean 'temperature'?",
        "/": "error: there is no command '/'. /help shows them",
        "/retri": "error: there is no command '/retri'. Did you mean '/retry'?",
        "/etc/passwd": "error: there is no command '/etc/passwd'. /help shows them; a prompt may begin with a slash",
        "/model tny": "error: there is no model 'tny'; there are tiny, short. Did you mean 'tiny'?",
        "/history perhaps": "error: history is 'perhaps'; expected on or off",
        "/retry": "error: there is no prompt to try again yet",
        "/more": "error: there is no text to go on from yet",
        "/save": "error: expected /save FILE",
        "/key abc": "error: a key that is typed in the open",
    }
    for line, expected in said.items():
        answer = chat.do(line)
        assert answer.startswith(expected), answer
        assert answer.count("\n") == 1
    chat.do(f"/max_new_tokens {LONG + 1}")
    assert "error: max_new_tokens is 4001; at most 4000 are allowed here" in chat.do("The")
    chat.do("/max_new_tokens 3")
    assert "length reached" in chat.ask("The")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--temperature", "hot"], "temperature is 'hot'; expected a number of at least 0"),
        (["--temprature", "1"], "Did you mean '--temperature'?"),
        (["--prompt", " "], "--prompt is empty; expected the beginning of a text"),
        (["--wait", "-1"], "--wait is -1; expected"),
        (["--api-key", KEY], f"expected it in {KEY_VARIABLE}"),
        (["--url", "localhost:8000"], "Did you mean 'http://localhost:8000'?"),
        (["--url", "ftp://localhost"], "--url is 'ftp://localhost'; expected http://HOST:PORT"),
        (["--url", "http://"], "expected http://HOST:PORT"),
        (["--url", "http://host:port"], "which is no address"),
        (["--url", f"http://{KEY}@host"], f"a key belongs into {KEY_VARIABLE}"),
    ],
)
def test_wrong_flags_end_with_one_line_and_2(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompt", "x", *flags]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert KEY not in error


# --- what gets lost ---


def test_a_service_that_is_away_is_waited_for_and_no_prompt_is_lost(open_chat: Open, service: Running) -> None:
    relay = Relay(service.url)
    chat = open_chat(relay.url, "--max-new-tokens", "3", "--ignore-eos")
    chat.ask("The")
    relay.cut()
    chat.type("And then")
    assert "connection refused); trying again, Ctrl-C stops" in chat.see(r"Ctrl-C stops\r\n")
    relay.listen()
    assert "· 3 tokens" in chat.see(FIGURES)
    chat.prompt()
    assert "> And then" in chat.do("/history")
    relay.cut()
    chat.type("Once more")
    chat.see(r"Ctrl-C stops\r\n")
    chat.process.sendintr()
    assert "stopped; /retry asks again" in chat.prompt()
    relay.listen()
    chat.ask("/retry")
    assert "> Once more" in chat.do("/history")
    relay.cut()


def test_an_answer_that_breaks_off_is_kept_and_can_be_tried_again(open_chat: Open, service: Running) -> None:
    relay = Relay(service.url)
    chat = open_chat(relay.url, "--max-new-tokens", f"{LONG}", "--ignore-eos")
    chat.type("The")
    chat.see(r"(?s).{20}")
    relay.drop()
    broken = chat.see(FIGURES)
    assert "error: the connection was" in broken
    assert "· broken off" in broken
    chat.prompt()
    assert "(broken off)" in chat.do("/history")
    eventually(lambda: service.stats.slots_used == 0, "the slot is free")
    chat.do("/max_new_tokens 3")
    assert "length reached" in chat.ask("/retry")
    assert "(broken off)" not in chat.do("/history")
    relay.cut()


def test_a_full_service_says_when_to_come_back_and_gets_asked_then(chat: Terminal, service: Running) -> None:
    chat.do("/max_new_tokens 3")
    with ExitStack() as others:
        for count in ("running", "waiting"):
            others.enter_context(closing(endless(service)))
            eventually(lambda count=count: getattr(service.stats, count) == 1, "the other client's turn")
        chat.type("The")
        assert "trying again in 1 s, Ctrl-C stops" in chat.see(r"Ctrl-C stops\r\n")
    assert "length reached" in chat.see(FIGURES)


def test_a_key_is_asked_for_and_typed_unseen(open_chat: Open, package: Any) -> None:
    settings = ServeSettings(models=(f"tiny={package.path}",), api_keys=(KEY,))
    with running(settings) as guarded:
        chat = open_chat(guarded.url, "--max-new-tokens", "3", ready=False)
        chat.see("error: an API key is needed.*/key asks for a key")
        chat.prompt()
        chat.process.sendline("/key")
        chat.see("API key: ")
        chat.process.waitnoecho()
        chat.process.sendline("wrong")
        chat.see("error: the API key is not known")
        chat.prompt()
        chat.process.sendline("/key")
        chat.see("API key: ")
        chat.process.waitnoecho()
        chat.process.sendline(KEY)
        assert KEY not in chat.see("the service takes this key")
        chat.prompt()
        chat.ask("The")
        assert piped(guarded.url, "--prompt", "The", **{KEY_VARIABLE: KEY}).returncode == 0
        refused = piped(guarded.url, given="The\nAnd\n")
        assert refused.returncode == 1
        assert refused.stderr.decode().count("an API key is needed") == 1


# --- at the keyboard ---


def test_ctrl_c_at_a_prompt_says_how_to_leave_and_ctrl_d_leaves(chat: Terminal) -> None:
    chat.process.sendintr()
    assert "Ctrl-D or /quit leaves" in chat.prompt()
    chat.process.sendeof()
    chat.process.expect(pexpect.EOF)
    chat.process.wait()
    assert chat.process.exitstatus == 0


def test_what_was_typed_comes_back_with_the_arrow_key_and_is_private(
    open_chat: Open, service: Running, tmp_path: Path
) -> None:
    chat = open_chat(service.url, "--max-new-tokens", "3", "--ignore-eos", TERM="xterm")
    chat.process.sendline("Once upon a time")
    chat.see("length reached")
    chat.process.sendline("/quit")
    chat.process.expect(pexpect.EOF)
    kept = tmp_path / "gpt-foundry" / "chat-history"
    assert kept.read_text() == "Once upon a time\n/quit\n"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    later = open_chat(service.url, "--max-new-tokens", "3", "--ignore-eos", TERM="xterm", ready=False)
    later.see("Ctrl-D leaves")
    later.process.send("\x1b[A\x1b[A")
    later.see("Once upon a time")
    later.process.send("\x15\x1b[200~Once\nupon\x1b[201~\r")  # a terminal that marks what is pasted: one prompt
    later.see("length reached")
    later.process.sendline("/history")
    later.see("> Once\r\nupon\r\n")


def test_a_paste_of_lines_text_of_any_script_and_a_long_line_are_prompts(chat: Terminal, service: Running) -> None:
    chat.do("/max_new_tokens 2")
    chat.process.send("one\ntwo\n")
    for _ in range(2):
        chat.see(FIGURES)
    chat.prompt()
    chat.process.setwinsize(5, 20)
    for line in ("Grüße 🙂 日本語", "x" * 3000):
        chat.process.sendline(line)
        assert "length reached" in chat.see(FIGURES)
        chat.prompt()
    chat.process.setwinsize(24, 250)
    shown = chat.do("/history").replace("\r\n", "\n")
    for line in ("> one\n", "> two\n", "> Grüße 🙂 日本語\n", f"> {'x' * 3000}\n"):
        assert line in shown


def test_a_conversation_is_saved_as_a_new_file_alone(chat: Terminal, service: Running, tmp_path: Path) -> None:
    chat.do("/max_new_tokens 8")
    chat.do("/seed 1")
    chat.ask("The")
    path = tmp_path / "said.txt"
    assert "saved as" in chat.do(f"/save {path}")
    assert path.read_text() == harmless("The" + api(service, "The", max_new_tokens=8, seed=1))
    assert f"error: {path} exists" in chat.do(f"/save {path}")
    assert "no such file or directory" in chat.do(f"/save {tmp_path}/no/where.txt")
    assert list(tmp_path.glob(".*")) == []


def test_models_can_be_seen_and_changed(chat: Terminal, service: Running) -> None:
    listed = chat.do("/models")
    assert re.search(r"\* tiny version \S+ · 2.500 bits/byte · [\d.]+ M parameters · context 4100", listed)
    assert "  short" in listed
    chat.do("/model short")
    chat.do("/max_new_tokens 3")
    assert "short version" in chat.ask("The")


# --- in a pipe ---


def test_piped_lines_are_prompts_of_their_own_and_answers_come_plain(service: Running) -> None:
    done = piped(
        service.url, "--seed", "3", "--max-new-tokens", "6", "--ignore-eos", given="Once upon a time\n\n/help me\r\n"
    )
    answers = [api(service, prompt, seed=3, max_new_tokens=6) for prompt in ("Once upon a time", "/help me")]
    assert done.stdout.decode() == "".join(f"{harmless(answer)}\n" for answer in answers)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_piped_prompt_that_fails_is_told_and_the_next_one_answered(service: Running) -> None:
    done = piped(service.url, "--model", "short", "--max-new-tokens", "3", given=b"x" * 200 + b"\nb\xffd \x00\n")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: the prompt is 200 tokens long")
    assert done.stdout.count(b"\n") >= 1


def test_a_pipe_with_a_history_is_one_text_cut_where_the_service_says_so(package: Any) -> None:
    with running(ServeSettings(models=(f"tiny={package.path}",), max_prompt_tokens=60, log_level="warning")) as strict:
        given = "".join(f"line {line}\n" for line in range(6))
        done = piped(strict.url, "--history", "--max-new-tokens", "12", "--ignore-eos", given=given)
    assert (done.returncode, b"characters are left out" in done.stderr) == (0, True)
    assert b"error" not in done.stderr


def test_a_service_that_stays_away_ends_a_pipe_with_1(service: Running) -> None:
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
        (head() + b"data: no json\n\n", "an event is not what it should be"),
        (head() + b"data: []\n\n", "an event is not what it should be"),
        (head() + b'data: {"choices": 5}\n\n', "an event is not what it should be"),
        (head() + b"\xff\xfe\x00\n\n", "closed before the text was complete"),
        (head(), "closed before the text was complete"),
        (head() + EVENT, "closed before the text was complete"),
        (head() + EVENT + b'data: {"error": {"message": "the engine died"}}\n\n', "the engine died"),
    ],
)
def test_whatever_a_server_says_is_one_line_and_steers_no_terminal(
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


# --- with a service in a process of its own ---


SERVER = """
import sys, uvicorn
from serve_app.api import create_api
from serve_app.models import Models
from serve_app.settings import load_settings
settings = load_settings()
models = Models(settings)
api = create_api(settings, models)
async def main():
    await models.start()
    await uvicorn.Server(uvicorn.Config(api, port=int(sys.argv[1]), log_config=None)).serve()
import asyncio; asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_service_that_is_started_again_goes_on_with_the_conversation(
    open_chat: Open, registry: TestRegistry
) -> None:
    first = registry.publish("chatted", seed=0, hidden_size=256, num_layers=4, num_heads=4, context_length=LONG)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"GPT_MODEL": "models:/chatted@champion", "GPT_TRACKING_URI": registry.uri,
                                "GPT_POLL_SECONDS": "0.2"}  # fmt: skip

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env=environment)

    process = start()
    try:
        chat = open_chat(f"http://127.0.0.1:{port}", "--max-new-tokens", f"{LONG}", "--ignore-eos")
        chat.type("The")
        chat.see(r"(?s)Ctrl-C stops.*\n.{20}")  # it was away while it started
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "broken off" in chat.see(FIGURES)
        chat.prompt()
        chat.do("/max_new_tokens 3")
        chat.type("And")
        chat.see(r"trying again, Ctrl-C stops\r\n")
        process = start()
        assert f"chatted version {first}" in chat.see(FIGURES)
        chat.prompt()
        second = registry.publish("chatted", seed=1)
        eventually(
            lambda: httpx2.get(f"http://127.0.0.1:{port}/ready").json()["version"] == second, "the alias is followed"
        )
        news = f"chatted version {second} answers now; the answer before came from chatted version {first}"
        assert news in chat.ask("Then")
    finally:
        process.kill()
        process.wait()
