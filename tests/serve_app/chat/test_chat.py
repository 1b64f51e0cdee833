"""The chat in a real pseudo-terminal against the real service: what a user types, sees and keeps."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx2
import pexpect
import pytest

from serve_app.chat.client import KEY_VARIABLE
from serve_app.chat.terminal import harmless
from serve_app.settings import ServeSettings
from tests.ports import free_port
from tests.serve_app.chat.chatting import FIGURES, LONG, SHORT_CONTEXT, Open, Terminal, api, on_screen, piped, speaking
from tests.serve_app.chat.relay import Relay
from tests.serve_app.conftest import MakePackage, TestRegistry
from tests.serve_app.running import Running, running
from tests.waiting import eventually

KEY = "key-of-the-chats-test"
END_OF_TEXT, ESCAPE = 256, "\x1b"
START_SECONDS = 120
"""Longest that a process may take to start on a busy machine."""


@pytest.fixture(scope="module")
def service(make_package: MakePackage) -> Iterator[Running]:
    with speaking(make_package) as service:
        yield service


@pytest.fixture
def open_chat(tmp_path: Path) -> Iterator[Open]:
    """Opens chats and waits for their first prompt. Ends them with the test."""
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


def endless(service: Running) -> socket.socket:
    """A client that keeps the service busy until it is closed."""
    body = json.dumps({"prompt": "The", "max_new_tokens": LONG, "ignore_eos": True, "stream": True}).encode()
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(
        f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    )
    return connection


# --- an answer ---


def test_text_appears_while_it_is_generated_and_ctrl_c_stops_only_the_answer(chat: Terminal, service: Running) -> None:
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


def test_the_model_continues_the_whole_conversation(chat: Terminal, service: Running) -> None:
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


def test_a_text_that_grows_too_long_loses_its_beginning_and_the_chat_says_so(open_chat: Open, service: Running) -> None:
    chat = open_chat(service.url, "--model", "short", "--max-new-tokens", "30", "--ignore-eos")
    chat.ask("The beginning")
    cut = ""
    for line in range(6):
        cut += chat.ask(f"line {line}")
        assert "30 tokens" in chat.seen or "· 30 tokens" in cut  # there was room for all of each answer
    assert f"the text is longer than the model's context of {SHORT_CONTEXT} tokens: its first" in cut
    assert "characters are no longer sent to the model" in chat.do("/history")
    refused = chat.do("x" * 200)
    assert "error: the prompt is 201 tokens long" in refused or "error: the prompt is 200 tokens long" in refused


def test_every_answer_names_its_model_and_a_change_is_announced(
    open_chat: Open, service: Running, package: Any
) -> None:
    with running(ServeSettings(models=(f"tiny={package.path}",))) as newer:
        relay = Relay(service.url)
        chat = open_chat(relay.url, "--max-new-tokens", "3", "--ignore-eos")
        before = re.search(r"tiny version (\S+)", chat.ask("The"))[1]
        assert "answers now" not in chat.ask("The")
        relay.drop()
        relay.target = newer.url
        changed = chat.ask("The")
        after = re.search(r"tiny version (\S+) answers now; the previous answer came from tiny version (\S+)", changed)
        assert after
        assert (after[1] != before, after[2]) == (True, before)
        relay.cut()


def test_special_tokens_and_control_characters_are_never_shown(open_chat: Open, service: Running) -> None:
    fields = dict(model="short", max_new_tokens=100, temperature=50.0, ignore_eos=True, logprobs=0)
    for seed in range(50):
        asked = {"prompt": "a", "seed": seed, **fields}
        reply = httpx2.post(f"{service.url}/generate", json=asked, timeout=60).json()["choices"][0]
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


# --- what gets lost ---


def test_the_chat_waits_for_a_service_that_is_down_and_loses_no_prompt(open_chat: Open, service: Running) -> None:
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
    assert "stopped; /retry tries again" in chat.prompt()
    relay.listen()
    chat.ask("/retry")
    written = chat.do("/history")
    assert "> Once more" in written
    relay.cut()
    chat.type("/retry")
    chat.see(r"Ctrl-C stops\r\n")
    chat.process.sendintr()
    assert "the previous answer stays" in chat.prompt()
    assert chat.do("/history") == written


def test_an_interrupted_answer_is_kept_and_can_be_tried_again(open_chat: Open, service: Running) -> None:
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


def test_the_chat_asks_a_full_service_again_when_it_says(chat: Terminal, service: Running) -> None:
    chat.do("/max_new_tokens 3")
    with ExitStack() as others:
        for count in ("running", "waiting"):
            others.enter_context(closing(endless(service)))
            eventually(lambda count=count: getattr(service.stats, count) == 1, "the other client's turn")
        chat.type("The")
        assert "trying again in 1 s, Ctrl-C stops" in chat.see(r"Ctrl-C stops\r\n")
    assert "length reached" in chat.see(FIGURES)


def test_the_chat_asks_for_a_key_and_hides_what_is_typed(open_chat: Open, package: Any) -> None:
    settings = ServeSettings(models=(f"tiny={package.path}",), api_keys=(KEY,))
    with running(settings) as guarded:
        chat = open_chat(guarded.url, "--max-new-tokens", "3", ready=False)
        chat.see("error: an API key is needed.*enter a key with /key")
        chat.prompt()
        chat.process.sendline("/key")
        chat.see("API key: ")
        chat.process.waitnoecho()
        chat.process.sendline("wrong")
        chat.see("error: the API key is unknown")
        chat.prompt()
        chat.process.sendline("/key")
        chat.see("API key: ")
        chat.process.waitnoecho()
        chat.process.sendline(KEY)
        assert KEY not in chat.see("the service accepts this key")
        chat.prompt()
        chat.ask("The")
        assert piped(guarded.url, "--prompt", "The", **{KEY_VARIABLE: KEY}).returncode == 0
        refused = piped(guarded.url, given="The\nAnd\n")
        assert refused.returncode == 1
        assert refused.stderr.decode().count("an API key is needed") == 1


# --- at the keyboard ---


def test_ctrl_c_at_a_prompt_says_how_to_leave_and_ctrl_d_leaves(chat: Terminal) -> None:
    chat.process.sendintr()
    assert "to leave, type exit or /quit, or press Ctrl-D" in chat.prompt()
    chat.process.sendeof()
    chat.process.expect(pexpect.EOF)
    chat.process.wait()
    assert chat.process.exitstatus == 0


@pytest.mark.parametrize("word", ["exit", "QUIT ", ":q", "exit()"])
def test_exit_and_quit_leave_the_chat_and_say_how_to_send_them(chat: Terminal, word: str) -> None:
    chat.process.sendline(word)
    chat.see(f"to send '{re.escape(word.rstrip())}' as a prompt, put a space before it")
    chat.process.expect(pexpect.EOF)
    chat.process.wait()
    assert chat.process.exitstatus == 0


def test_exit_after_a_space_or_in_a_text_is_a_prompt(open_chat: Open, service: Running) -> None:
    chat = open_chat(service.url, "--max-new-tokens", "3", "--ignore-eos")
    for line in (" exit", "exit the room"):
        assert "length reached" in chat.ask(line)
    assert "exit, quit" in chat.do("/help")


def test_the_arrow_key_recalls_prompts_and_the_history_is_private(
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
    later.process.send("\x15\x1b[200~Once\nupon\x1b[201~\r")  # a terminal that marks pasted text: one prompt
    later.see("length reached")
    later.process.sendline("/history")
    later.see("> Once\r\nupon\r\n")
    assert kept.read_text().endswith("Once\\\nupon\n/history\n")
    last = open_chat(service.url, "--max-new-tokens", "3", "--ignore-eos", TERM="xterm", ready=False)
    last.see("Ctrl-D leaves")
    last.process.send("\x1b[A\x1b[A\r")
    last.see("length reached")
    last.process.sendline("/history")
    last.see("> Once\r\nupon\r\n")


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


def test_a_conversation_is_only_saved_to_a_new_file(chat: Terminal, service: Running, tmp_path: Path) -> None:
    chat.do("/max_new_tokens 8")
    chat.do("/seed 1")
    chat.ask("The")
    path = tmp_path / "said.txt"
    assert "saved as" in chat.do(f"/save {path}")
    assert path.read_text() == harmless("The" + api(service, "The", max_new_tokens=8, seed=1))
    assert f"error: {path} exists" in chat.do(f"/save {path}")
    assert "no such file or directory" in chat.do(f"/save {tmp_path}/no/where.txt")
    assert list(tmp_path.glob(".*")) == []


def test_models_can_be_listed_and_changed(chat: Terminal, service: Running) -> None:
    listed = chat.do("/models")
    assert re.search(r"\* tiny version \S+ · 2.500 bits/byte · [\d.]+ M parameters · context 4100", listed)
    assert "  short" in listed
    chat.do("/model short")
    chat.do("/max_new_tokens 3")
    assert "short version" in chat.ask("The")


# --- with a service in its own process ---


SERVER = """
import sys, uvicorn
from serve_app.http.app import create_api
from serve_app.models.catalog import Models
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
def test_the_conversation_continues_after_the_service_is_killed_and_restarted(
    open_chat: Open, registry: TestRegistry
) -> None:
    first = registry.publish("chatted", seed=0, hidden_size=256, num_layers=4, num_heads=4, context_length=LONG)
    port = free_port()
    environment = os.environ | {"GPT_MODEL": "models:/chatted@champion", "GPT_TRACKING_URI": registry.uri,
                                "GPT_POLL_SECONDS": "0.2"}  # fmt: skip

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env=environment)

    process = start()
    try:
        chat = open_chat(f"http://127.0.0.1:{port}", "--max-new-tokens", f"{LONG}", "--ignore-eos")
        chat.process.timeout = START_SECONDS
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
        news = f"chatted version {second} answers now; the previous answer came from chatted version {first}"
        assert news in chat.ask("Then")
    finally:
        process.kill()
        process.wait()
