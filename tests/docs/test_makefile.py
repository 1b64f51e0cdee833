"""What the Makefile's commands run, without running it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def told(*arguments: str) -> str:
    """What make prints, as it does for a user: `make test` is no parent of this make."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def would_run(*arguments: str) -> str:
    """What make would run in an environment that is installed."""
    return told("--dry-run", "--old-file=.venv/installed", "--old-file=.venv/installed-dev", *arguments)


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
    assert would_run(*arguments).strip() == command


def test_every_target_is_listed_by_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [phony] = [line for line in makefile.splitlines() if line.startswith(".PHONY")]
    listed = {line.split()[0] for line in told("help").splitlines()}
    assert listed == set(phony.removeprefix(".PHONY:").split())
