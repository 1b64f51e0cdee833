"""The chat's keyboard and history, and what a conversation keeps when the service is gone."""

import io
import re
import stat
import sys
import tempfile
from pathlib import Path

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.chat import terminal
from serve_app.chat.client import Service
from serve_app.chat.commands import Chat
from serve_app.chat.terminal import Keyboard, Screen, harmless, remember, remembered
from serve_app.chat.values import Values
from tests.serve_app.chat.chatting import CHAT, FIGURES, Terminal
from tests.serve_app.chat.relay import Relay, saying

TYPED = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc",)) | st.sampled_from("\n\\ a"), min_size=1
).filter(lambda line: not line.endswith("\\") and line.strip())
"""Lines from the keyboard. None ends with a backslash, which continues the line."""
NO_LIST = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n"
"""The reply to the question which models there are, from which the chat learns nothing."""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def answering(text: str) -> bytes:
    """A whole answer as the service streams it."""
    event = f'{{"model":"m","version":"1","seed":1,"choices":[{{"text":"{text}","finish_reason":"stop"}}]}}'
    return HEAD + f"data: {event}\n\ndata: [DONE]\n\n".encode()


# --- the keyboard ---


@given(st.lists(TYPED))
def test_the_history_returns_prompts_unchanged_with_all_their_lines(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history"
        path.touch()
        for line in lines:
            remember(path, line)
        assert remembered(path) == lines


def test_the_history_is_trimmed_and_stays_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "REMEMBERED_LINES", 3)
    path = tmp_path / "history"
    path.touch()
    for count in range(7):
        remember(path, f"line {count}\nof two")
    assert remembered(path) == [f"line {count}\nof two" for count in (4, 5, 6)]
    assert path.read_text() == "".join(f"line {count}\\\nof two\n" for count in (4, 5, 6))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_history_is_read_as_far_as_possible(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_bytes(b"one\n\n\xff\x00two\\")
    assert remembered(path) == ["one", harmless("\ufffd\x00two\\")]


@pytest.mark.parametrize("home", ["~", "~nobody-of-this-name"])
def test_without_a_home_folder_there_is_no_history(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert terminal.history_file() is None


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Keyboard:
    """A keyboard under a Python that has no readline."""
    monkeypatch.setitem(sys.modules, "readline", None)
    return Keyboard(list)


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\\\ntwo\n", ["one\ntwo"]),
        ("one\\\n", ["one"]),  # and Ctrl-D where it would go on
        ("one\\\ntwo\\\\\n", ["one\ntwo"]),
        ("\\\n", [""]),
    ],
)
def test_a_backslash_continues_the_line_and_ctrl_d_ends_it(
    plain: Keyboard, typed: str, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert [plain.line() for _ in lines] == lines
    with pytest.raises(EOFError):
        plain.line()


def test_the_chat_works_without_readline(tmp_path: Path) -> None:
    code = "import sys; sys.modules['readline'] = None; from serve_app.chat.__main__ import main; sys.exit(main())"
    chat = Terminal("http://127.0.0.1:9", home=tmp_path, command=[sys.executable, "-c", code])
    chat.prompt()
    assert "(default" in chat.do("/seed 7")
    chat.process.sendeof()
    chat.process.expect(pexpect.EOF)
    assert chat.process.wait() == 0


def test_keys_typed_during_an_answer_become_the_next_line(tmp_path: Path) -> None:
    relay = Relay("")
    relay.cut()
    chat = Terminal(relay.url, home=tmp_path)
    chat.prompt()
    chat.type("The")
    chat.see(r"trying again, Ctrl-C stops\r\n")
    chat.process.send("/seed 5\n")
    with saying(answering("one")) as relay.target:
        relay.listen()
        assert "/seed" not in chat.see(FIGURES)
        assert "seed is 5" in chat.see(r"> /seed 5\r\n.*\r\n")
        relay.cut()
    chat.process.close(force=True)


def test_the_terminal_is_restored_at_the_end(tmp_path: Path) -> None:
    shell = ["sh", "-c", 'trap : INT; "$@"; stty -a', "sh"]
    chat = Terminal("http://127.0.0.1:9", home=tmp_path, command=[*shell, *CHAT])
    chat.prompt()
    chat.type("The")
    chat.see(r"trying again, Ctrl-C stops\r\n")
    chat.process.sendintr()
    assert "stopped; /retry tries again" in chat.prompt()
    chat.process.sendeof()
    chat.process.expect(pexpect.EOF)
    assert " echo " in chat.process.before
    chat.process.close(force=True)


# --- what a conversation keeps ---


def test_the_old_answer_stays_until_a_new_one_begins() -> None:
    shown = io.StringIO()
    replies = (NO_LIST, answering("one"), NO_LIST, NO_LIST, b"", NO_LIST, answering("two"), NO_LIST)
    with saying(*replies) as url:  # before and after each answer the models are asked for
        chat = Chat(Service(url), Screen(True, shown), Values(), patience=0, remembers=True)
        chat.take("x")
        chat.take("/retry")
        assert [(turn.prompt, turn.answer) for turn in chat.conversation.turns] == [("x", "one")]
        assert re.search("cannot be reached.*\n.*the previous answer stays", shown.getvalue())
        chat.take("/retry")
        assert [(turn.prompt, turn.answer) for turn in chat.conversation.turns] == [("x", "two")]
        chat.service.close()


def test_input_that_is_not_text_is_not_kept() -> None:
    with saying(NO_LIST, answering(r"a\ud800b"), NO_LIST, answering("c")) as url:
        chat = Chat(Service(url), Screen(False, io.StringIO(), io.StringIO()), Values(), patience=0, remembers=True)
        chat.prompt("x\udcff")
        assert chat.prompt("y").problem is None
        assert chat.conversation.text == "x?a?b\nyc"
        chat.service.close()
