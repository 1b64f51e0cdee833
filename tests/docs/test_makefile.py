"""What the Makefile's commands run, without running it."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def told(*arguments: str) -> str:
    """What make would run."""
    command = ["make", "--dry-run", "--old-file=.venv/installed", "--old-file=.venv/installed-dev", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("serve",), ".venv/bin/serve run serve_app:build_app"),
        (
            ("serve", "MODEL=runs/my run/package", "PORT=8001"),
            'GPT_PORT="$PORT" .venv/bin/serve run serve_app:build_app "model=$MODEL"',
        ),
        (
            ("chat", "MODEL=other"),
            '.venv/bin/python -m serve_app.chat --url "http://127.0.0.1:${PORT:-${GPT_PORT:-8000}}" --model "$MODEL"',
        ),
        (("chat",), '.venv/bin/python -m serve_app.chat --url "http://127.0.0.1:${PORT:-${GPT_PORT:-8000}}"'),
    ],
)
def test_serve_and_chat_are_the_services_own_commands(arguments: tuple[str, ...], command: str) -> None:
    assert told(*arguments).strip() == command


def test_every_target_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [phony] = [line for line in makefile.splitlines() if line.startswith(".PHONY")]
    listed = {line.split()[0] for line in subprocess.check_output(["make", "help"], cwd=ROOT, text=True).splitlines()}
    assert listed == set(phony.removeprefix(".PHONY:").split())
