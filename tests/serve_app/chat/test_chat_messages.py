"""The chat with models that answer conversations: what is sent, shown and saved."""

import io
import json
import re
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gptcore.package import Package
from serve_app.chat.__main__ import main
from serve_app.chat.client import Service
from serve_app.chat.commands import Chat
from serve_app.chat.conversation import Conversation, Turn
from serve_app.chat.terminal import Screen, harmless
from serve_app.chat.values import Values
from serve_app.settings import ServeSettings
from tests.open_tokenizers import publish, write_tokenizer
from tests.serve_app.chat.chatting import Terminal, on_screen, piped
from tests.serve_app.running import Running, running

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONTEXT = 128
SHORT = ("--max-new-tokens", "6", "--seed", "3", "--ignore-eos")
FIXED: dict[str, Any] = dict(model="talker", max_tokens=6, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    folder = publish(write_tokenizer("smollm2", root / "tokenizer"), root / "model", 512, "llama", CONTEXT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def service(folder: Path, package: Package) -> Iterator[Running]:
    """A service with a model that chats, and one that continues text and is loaded on first use."""
    models = (f"talker={folder}", f"tiny={package.path}")
    with running(ServeSettings(models=models, dtype="float32", slots=2, log_level="warning")) as service:
        yield service


class Talk:
    """A chat at a terminal, without the terminal."""

    def __init__(self, url: str, system: str = "", model: str | None = None) -> None:
        self._shown = io.StringIO()
        values = Values()
        for name, value in (("max_new_tokens", "6"), ("seed", "3"), ("ignore_eos", "on")):
            values.set(name, value)
        self.chat = Chat(Service(url), Screen(True, self._shown), values, 0, True, model, system)
        self.chat.greet()

    def take(self, line: str) -> str:
        """Types a line; returns what is shown."""
        self._shown.seek(0)
        self._shown.truncate()
        self.chat.take(line)
        return re.sub(r"\x1b\[\dm", "", self._shown.getvalue())

    @property
    def turns(self) -> list[tuple[str, str]]:
        return [(turn.prompt, turn.answer) for turn in self.chat.conversation.turns]


@pytest.fixture
def talk(service: Running) -> Iterator[Talk]:
    talk = Talk(service.url)
    with closing(talk.chat.service):
        yield talk


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def api(service: Running, *messages: dict[str, str], **fields: Any) -> str:
    """The service's answer."""
    reply = httpx2.post(
        f"{service.url}/v1/chat/completions", json={"messages": messages, **FIXED, **fields}, timeout=60
    )
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["message"]["content"]


# --- what is sent ---


def test_each_line_is_a_message_of_one_conversation(talk: Talk, service: Running) -> None:
    first = api(service, user("The cat?"))
    shown = talk.take("The cat?")
    assert harmless(first) in shown
    assert re.search(r"talker version \S+ · 6 tokens · \d+ tokens/s · seed 3 · length reached\n", shown)
    second = api(service, user("The cat?"), assistant(first), user("And?"))
    talk.take("And?")
    assert talk.turns == [("The cat?", first), ("And?", second)]
    talk.take("/undo")
    talk.take("And?")
    assert talk.turns[1] == ("And?", second)
    talk.take("/history off")
    talk.take("And?")
    assert talk.turns[2] == ("And?", api(service, user("And?")))


def test_retry_asks_for_another_answer_to_the_same_message(talk: Talk, service: Running) -> None:
    talk.take("The cat?")
    talk.take("/seed 4")
    talk.take("/retry")
    other = api(service, user("The cat?"), seed=4)
    assert talk.turns == [("The cat?", other)]
    talk.take("/seed none")
    assert re.search(r"· seed \d+ ·", talk.take("/retry"))  # chosen here, so that the answer can be had again


def test_more_continues_the_last_answer(talk: Talk, service: Running) -> None:
    first = api(service, user("The cat?"))
    goes_on = dict(continue_final_message=True, add_generation_prompt=False)
    talk.take("The cat?")
    talk.take("/more")
    more = api(service, user("The cat?"), assistant(first), **goes_on)
    assert talk.turns[1] == ("", more)
    talk.take("And?")
    assert talk.turns[2] == ("And?", api(service, user("The cat?"), assistant(first + more), user("And?")))


def test_the_system_prompt_can_be_set_shown_and_taken_back(talk: Talk, service: Running) -> None:
    assert talk.take("/system") == "the system prompt is none\n"
    assert talk.take("/system Be kind.") == 'the system prompt is "Be kind."\n'
    assert talk.take("/system") == 'the system prompt is "Be kind."\n'
    talk.take("The cat?")
    assert talk.turns == [("The cat?", api(service, system("Be kind."), user("The cat?")))]
    assert talk.take("/system none") == "the system prompt is none\n"
    talk.take("/retry")
    assert talk.turns == [("The cat?", api(service, user("The cat?")))]


def test_an_answer_has_no_default_length(talk: Talk) -> None:
    assert talk.take("/max_new_tokens default").startswith("max_new_tokens is none.")
    assert int(re.search(r"· (\d+) tokens ·", talk.take("The cat?"))[1]) > CONTEXT // 2  # the rest of the context
    assert re.search(r"max_new_tokens +none ", talk.take("/settings"))
    talk.take("/model tiny")
    talk.take("The cat")
    assert re.search(r"max_new_tokens +128 ", talk.take("/settings"))


def test_a_long_conversation_loses_its_oldest_turns_and_the_chat_says_so(talk: Talk) -> None:
    shown = "".join(talk.take(f"The {line}?") for line in range(8))
    cut = (
        rf"the conversation is longer than the model's context of {CONTEXT} tokens: its first \d+ messages are left out"
    )
    assert re.search(cut, shown)
    assert "error" not in shown
    assert "messages are no longer sent to the model" in talk.take("/history")
    assert f"this model's maximum context length is {CONTEXT}" in talk.take("x " * 200)


def test_a_message_without_an_answer_is_not_sent_again() -> None:
    said = Conversation([Turn("a", "b", opens=True), Turn("lost", "", opens=False)])
    assert said.messages("s", Turn("c", "", opens=False)) == [system("s"), user("a"), assistant("b"), user("c")]
    assert said.messages(newest=Turn("", "", opens=False)) == [user("a"), assistant("b"), user("lost")]
    assert said.messages(answered=True) == [user("a"), assistant("b")]
    assert said.messages(newest=Turn("c", "", opens=True)) == [user("c")]
    assert Conversation().messages("s") == []


# --- the two kinds of models ---


def test_the_chat_says_what_a_model_does(service: Running) -> None:
    for model, said in (("talker", "The model answers what you write"), ("tiny", "continue")):
        shown = io.StringIO()
        with closing(Service(service.url)) as client:
            Chat(client, Screen(True, shown), Values(), 0, True, model).greet()
        assert said in shown.getvalue()


def test_a_model_that_is_not_loaded_yet_is_asked_what_it_does(folder: Path, package: Package) -> None:
    models = (f"tiny={package.path}", f"talker={folder}", f"other={package.path}")
    with running(ServeSettings(models=models, dtype="float32", log_level="warning")) as service:
        talk = Talk(service.url, model="talker")
        with closing(talk.chat.service):
            talk.take("The cat?")
            assert talk.turns == [("The cat?", api(service, user("The cat?")))]
            talk.take("/model other")
            assert "other version" in talk.take("It goes on")
            assert "loads on first use" not in talk.take("/models")
            refused = talk.take("/system Be kind.")
            assert refused.startswith("error: other only continues text, so it takes no system prompt; leave it out")
            assert "models that chat: talker" in refused


def test_what_was_said_to_a_model_that_chats_is_a_text_for_one_that_does_not(talk: Talk) -> None:
    talk.take("The cat?")
    answer = talk.turns[0][1]
    talk.take("/model tiny")
    talk.take("It goes on")
    assert talk.chat.conversation.text.startswith(f"The cat?\n{answer}")
    assert talk.chat.conversation.text.count("It goes on") == 1


def test_a_service_that_sets_the_system_prompt_says_so(folder: Path) -> None:
    settings = ServeSettings(models=(f"talker={folder}",), dtype="float32", system_prompt="Be kind.")
    with running(settings) as strict:
        talk = Talk(strict.url, system="Be rude.")
        with closing(talk.chat.service):
            assert "this service sets the system prompt of every conversation" in talk.take("The cat?")
            talk.take("/system none")
            assert "length reached" in talk.take("/retry")


# --- files ---


def test_each_saved_conversation_is_a_line_of_json(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    assert "error: the conversation is empty; there is nothing to save" in talk.take(f"/save {path}")
    talk.take("/system Be kind.")
    talk.take("The cat?")
    assert talk.take(f"/save {path}") == f"saved as the last line of {path}\n"
    path.chmod(0o600)
    talk.take("/clear")
    talk.take("/system none")
    talk.take("Grüße\x7f")
    talk.take(f"/save {path}")
    first, second = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert json.loads(first)["messages"][:2] == [system("Be kind."), user("The cat?")]
    assert json.loads(second) == {"messages": [user("Grüße\x7f"), assistant(talk.turns[0][1])]}
    assert "Grüße" in second
    assert "\x7f" not in second
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["notes", '{"prompt": "x"}\n', "[1]", "\n"])
def test_no_other_file_is_added_to(talk: Talk, tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    talk.take("The cat?")
    assert f"error: {path} does not end with a conversation; expected a new file" in talk.take(f"/save {path}")
    assert path.read_text() == content
    assert "error" in talk.take(f"/save {tmp_path}")
    assert "no such file or directory" in talk.take(f"/save {tmp_path}/no/where.jsonl")


def test_a_line_without_an_end_gets_one(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text('{"messages": []}')
    talk.take("The cat?")
    talk.take(f"/save {path}")
    assert [len(json.loads(line)["messages"]) for line in path.read_text().splitlines()] == [0, 2]


# --- on the command line ---


def test_a_terminal_shows_the_answer(service: Running, tmp_path: Path) -> None:
    chat = Terminal(service.url, *SHORT, "--system", "Be kind.", home=tmp_path)
    assert f"context {CONTEXT} · chats" in chat.prompt()
    first = api(service, system("Be kind."), user("The cat?"))
    assert on_screen(first) in chat.ask("The cat?")
    assert "> The cat?" in chat.do("/history")
    assert "/system [TEXT]" in chat.do("/help")
    chat.process.close(force=True)


def test_a_pipe_answers_each_line_or_one_conversation(service: Running) -> None:
    first = api(service, system("Be kind."), user("The cat?"))
    for flags, second in (
        ((), api(service, system("Be kind."), user("And?"))),
        (("--history",), api(service, system("Be kind."), user("The cat?"), assistant(first), user("And?"))),
    ):
        done = piped(service.url, *SHORT, "--system", "Be kind.", *flags, given="The cat?\nAnd?\n")
        assert done.stdout.decode() == f"{harmless(first)}\n{harmless(second)}\n"
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_system_prompt_for_a_model_that_continues_text_is_refused(
    service: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", service.url, "--model", "tiny", "--system", "Be kind.", "--prompt", "The"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: tiny only continues text, so it takes no system prompt")
    assert error.count("\n") == 1
