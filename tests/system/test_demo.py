"""`make demo` without the install: what a new user sees first."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.demo import QUESTIONS, await_ready
from tests.ports import free_port
from tests.system.conftest import ROOT, environment, what_now


@pytest.mark.slow
def test_the_demo_registers_and_promotes_a_model_and_reuses_it(tmp_path: Path) -> None:
    port = free_port()
    env = environment(tmp_path, RAY_ADDRESS="local", GPT_PORT=str(port))
    command = [sys.executable, "-m", "train_job.demo", "--max-steps=20"]
    first = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    for words in ("gpt version 1, now @champion", "sample", "make ui", "bits/byte"):
        assert words in first.stdout
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0
    assert "run demo is finished" in again.stdout
    assert "gpt version 1" in again.stdout
    assert what_now(again.stdout) == what_now(first.stdout)
    serve_and_chat(what_now(again.stdout), env, port)


@pytest.mark.slow
@pytest.mark.release
def test_the_chat_demo_tunes_a_base_serves_it_and_asks_three_questions(tmp_path: Path) -> None:
    env = environment(tmp_path, RAY_ADDRESS="local", GPT_PORT=str(free_port()))
    command = [sys.executable, "-m", "train_job.demo", "chat", "--max-steps=8", "--eval-interval=8"]
    for words in ("gpt-chat version 1, now @champion", "run demo-chat is finished"):
        train = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert train.returncode == 0, train.stdout + train.stderr
        assert words in train.stdout
    answer = [sys.executable, "-m", "serve_app.demo", "chat"]
    asked = subprocess.run(answer, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert [line[2:] for line in asked.stdout.splitlines() if line.startswith("> ")] == [*QUESTIONS]


def serve_and_chat(block: dict[str, str], env: dict[str, str], port: int) -> None:
    """Both commands as they stand, in a shell."""
    service = subprocess.Popen(f"exec {block['serve it']}", shell=True, cwd=ROOT, env=env, process_group=0)
    try:
        assert await_ready(f"http://127.0.0.1:{port}", service) is None
        chat = f"echo The | {block['chat']}"
        said = subprocess.run(chat, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert (said.returncode, bool(said.stdout.strip())) == (0, True), said.stderr
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(240)
