"""Claims about the second half of `make demo`, with a service that runs already."""

import signal
import sys
from pathlib import Path

import pytest

from gptcore.chat import CHATML
from serve_app import demo
from serve_app.settings import ServeSettings
from tests.open_tokenizers import publish, write_tokenizer
from tests.ports import free_port
from tests.serve_app.conftest import MakePackage
from tests.serve_app.running import running
from tests.waiting import eventually


def test_a_reply_is_streamed_with_its_model_and_the_number_of_its_tokens(
    make_package: MakePackage, capsys: pytest.CaptureFixture[str]
):
    with running(ServeSettings(models=(f"tiny={make_package().path}",), log_level="warning")) as service:
        assert demo.is_ready(service.url)
        demo.ask(service.url)
    said = capsys.readouterr().out
    assert said.startswith(f"answer    POST {service.url}/generate, from tiny/")
    assert "\n\nThe" in said
    assert " tokens in " in said
    assert "\n          0 tokens" not in said


def test_the_chat_demo_asks_its_three_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = publish(write_tokenizer("smollm2", tmp_path / "tokenizer"), tmp_path / "model", 512, "llama", context=128)
    (folder / "chat_template.jinja").write_text(CHATML)
    with running(ServeSettings(models=(f"gpt-chat={folder}",), log_level="warning")) as service:
        assert demo.converse(service.url, "gpt-chat") is None
    said = capsys.readouterr().out
    assert said.startswith(f"answers   POST {service.url}/v1/chat/completions, from gpt-chat/")
    assert [line[2:] for line in said.splitlines() if line.startswith("> ")] == [*demo.QUESTIONS]


def test_another_service_at_the_address_is_named(make_package: MakePackage):
    with running(ServeSettings(models=(f"tiny={make_package().path}",), log_level="warning")) as service:
        problem = demo.converse(service.url, "gpt-chat")
    assert problem is not None
    assert problem.startswith(f"the service at {service.url} refused: ")
    assert "gpt-chat" in problem


def test_without_a_service_it_is_not_ready():
    assert not demo.is_ready(f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_a_service_is_asked_where_this_machine_reaches_it(host: str, url: str):
    assert demo.address(host, 8000) == url
    assert not demo.is_ready(demo.address(host, free_port()))


SERVICE = """#!{python}
import signal
try:
    print("up", flush=True)
    signal.pause()
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_demo_in_the_background_of_a_shell_stops_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script, log = tmp_path / "serve", tmp_path / "log"
    script.write_text(SERVICE.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(demo.sys, "executable", str(tmp_path / "python"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as bash does for background jobs
    try:
        with log.open("w") as output, demo.running(output) as process:
            eventually(lambda: log.read_text() == "up\n", "the service has started")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 0
    assert log.read_text() == "up\nstopped\n"
