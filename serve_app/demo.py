"""The second half of `make demo`: starts the service, streams one reply and prints what to try next.

With the argument `chat` it is that of `make demo-chat`: the chat demo's model answers three questions.

In a terminal the service runs until Ctrl-C; otherwise it is stopped. A service that already runs is used and left
running.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx2

from gptcore.cli import heed_interrupts
from gptcore.errors import FoundryError
from serve_app.settings import load_settings

PROMPT = "The"
REQUEST = {"prompt": PROMPT, "max_new_tokens": 60, "temperature": 0.8, "stream": True}
CHAT_MODEL = "models:/gpt-chat@champion"
QUESTIONS = ("Spell the word kitten.", "Nora has a green kite. What does Nora have?", "Sort the digits 7 2 5.")
START_SECONDS = 600
"""Enough for a busy machine; two idle cores take a quarter of a minute."""
WORD_SECONDS = 5.0
"""Interval of progress lines while the service starts."""
STOP_SECONDS = 60


def demo(chat: bool = False) -> int:
    """Run the demo; return the exit code."""
    if chat:
        os.environ.setdefault("GPT_MODEL", CHAT_MODEL)
    try:
        settings = load_settings()
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    url = address(settings.host, settings.port)
    with contextlib.ExitStack() as stack:
        process = None
        if not is_ready(url):
            print("service   starting (serve run serve_app:app)", flush=True)
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = stack.enter_context(running(output))
            if problem := await_ready(url, process):
                output.seek(0)
                print(f"{output.read()[-4000:]}\nerror: {problem}", file=sys.stderr)
                return 1
        key = {"authorization": f"Bearer {settings.api_keys[0]}"} if settings.api_keys else None
        if problem := converse(url, settings.default_model, key) if chat else ask(url, key):
            advice = "" if process else ". Stop it, or set GPT_PORT to another port"  # somebody else's service
            print(f"error: {problem}{advice}", file=sys.stderr)
            return 1
        print(next_steps(url, chat))
        if process and sys.stdout.isatty():
            print("           the service runs until Ctrl-C", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
    return 0


@contextlib.contextmanager
def running(output: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `serve run` and its Ray until the block ends."""
    heed_interrupts()  # or the service would not end
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve_app:app"]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def await_ready(url: str, process: subprocess.Popen[bytes], seconds: float = START_SECONDS) -> str | None:
    """Wait until the service is ready; return why it never will be, or None."""
    begun = reported = time.monotonic()
    deadline = begun + seconds
    while not is_ready(url):
        if time.monotonic() - reported >= WORD_SECONDS:
            reported = time.monotonic()
            print(f"          {reported - begun:.0f} s", flush=True)
        if process.poll() is not None:
            return "the service exited during startup; its output is above"
        if time.monotonic() > deadline:
            return f"the service was not ready after {seconds:g} seconds; its output is above"
        time.sleep(0.2)
    return None


def address(host: str, port: int) -> str:
    """The URL at which this machine reaches a service that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_ready(url: str) -> bool:
    """Whether our service answers at that address and its model is ready."""
    try:
        answer = httpx2.get(f"{url}/ready", timeout=5, trust_env=False)
    except httpx2.HTTPError:
        return False
    return answer.is_success and "json" in answer.headers.get("content-type", "")


def ask(url: str, key: dict[str, str] | None = None) -> str | None:
    """Stream one reply to the terminal, and print which model gave it. Returns what went wrong, if anything did."""
    begun, tokens = time.monotonic(), 0
    with (
        httpx2.Client(base_url=url, timeout=60, trust_env=False, headers=key) as client,
        client.sse("/generate", method="POST", json=REQUEST) as events,
    ):
        if not events.response.is_success:
            return refusal(url, events.response)
        version = events.response.headers["x-model-version"]
        print(f"answer    POST {url}/generate, from {version}\n\n{PROMPT}", end="", flush=True)
        for event in events:
            if event.data == "[DONE]":
                break
            reply = json.loads(event.data)
            for choice in reply.get("choices", []):
                print(choice["text"], end="", flush=True)
            tokens = reply.get("usage", {}).get("completion_tokens", tokens)
    print(f"\n\n          {tokens} tokens in {1000 * (time.monotonic() - begun):.0f} ms")
    return None


def converse(url: str, model: str, key: dict[str, str] | None = None) -> str | None:
    """Ask three questions, each in a conversation of its own. Returns what went wrong, if anything did."""
    with httpx2.Client(base_url=url, timeout=60, trust_env=False, headers=key) as client:
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
            reply = client.post("/v1/chat/completions", json=body)
            if not reply.is_success:
                return refusal(url, reply)
            if question == QUESTIONS[0]:
                print(f"answers   POST {url}/v1/chat/completions, from {reply.headers['x-model-version']}\n")
            print(f"> {question}\n{reply.json()['choices'][0]['message']['content']}", flush=True)
    return None


def refusal(url: str, reply: httpx2.Response) -> str:
    """What the service says to a request that it does not answer."""
    reply.read()
    try:
        said = reply.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        said = f"status {reply.status_code}"
    return f"the service at {url} refused: {said}"


def next_steps(url: str, chat: bool) -> str:
    """What to try when the demo has answered."""
    if chat:
        return f"""
playground {url}
talk to it .venv/bin/python -m serve_app.chat --url {url}
serve it   GPT_MODEL={CHAT_MODEL} .venv/bin/serve run serve_app:app"""
    return f"""
playground {url}
ask it     curl {url}/generate -d '{{"prompt": "{PROMPT}", "temperature": 0.8}}'
serve it   .venv/bin/serve run serve_app:app"""


if __name__ == "__main__":
    try:
        sys.exit(demo(chat="chat" in sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
