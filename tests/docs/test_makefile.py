"""What the Makefile's targets would run, and that pre-commit and CI run the same."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def told(*arguments: str) -> str:
    """The output of make, run as by a user and not as a child of `make test`."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def would_run(*arguments: str) -> str:
    """The commands that make would run once everything is installed."""
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


def test_help_fits_one_screen() -> None:
    lines = told("help").splitlines()
    assert len(lines) <= 24
    assert [line for line in lines if len(line) > 80] == []


def test_pre_commit_runs_every_tool_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    entries = [hook["entry"] for repo in hooks for hook in repo["hooks"]]
    tools = re.findall(r"\.venv/bin/[\w-]+(?: (?:check|format)\b)?", would_run("check"))
    assert len(tools) == 4
    assert [tool for tool in tools if not any(entry.startswith(tool) for entry in entries)] == []


def test_ci_on_github_runs_our_own_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
