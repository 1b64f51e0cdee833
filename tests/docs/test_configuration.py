"""docs/configuration.md is up to date and lists every setting."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from docs import configuration
from docs.configuration import OURS, PAGE, SET, THEIRS, Variable, markdown
from gptcore.errors import ConfigError
from serve_app.settings import FIELDS
from train_job.cli import parse_settings
from train_job.config import build_config, resume_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page != PAGE)]
PACKAGES = ("gptcore", "serve_app", "train_job")
NAMED = re.compile(r"\b(?:GPT_FOUNDRY|HF|MLFLOW|RAY|TIKTOKEN)_\w+")
ASKED = {"get", "setdefault", "pop", "getenv"}
LISTED = OURS + THEIRS + SET


def is_listed(name: str) -> bool:
    return any(fnmatchcase(name, variable.name) for variable in LISTED)


def names_in_code() -> Iterator[str]:
    """All names of environment variables in the packages, and all strings that look like one."""
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked = asked_for(node)
            if isinstance(asked, ast.Constant) and isinstance(asked.value, str):
                yield asked.value
            if isinstance(node, ast.Constant) and NAMED.fullmatch(str(node.value)):
                yield node.value


def asked_for(node: ast.AST) -> ast.expr | None:
    """The name in `environ[name]` or `environ.get(name)`."""
    if isinstance(node, ast.Subscript) and "environ" in ast.unparse(node.value):
        return node.slice
    called = node.func if isinstance(node, ast.Call) and node.args else None
    if isinstance(called, ast.Attribute) and called.attr in ASKED and "environ" in ast.unparse(called):
        return node.args[0]
    return None


def test_the_page_is_up_to_date_with_the_code() -> None:
    current = PAGE.read_text(encoding="utf-8") == markdown()
    assert current, "docs/configuration.md is not what the code says; `make docs` writes it anew"


def test_every_flag_of_the_command_line_has_one_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or a long flag is broken in two
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    flags = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)) - {"--help", "--config", "--presets"}
    rows = re.findall(r"^\| `(--[\w-]+)`(?:, `(--[\w-]+)`)? \|", markdown(), re.MULTILINE)
    listed = [flag for row in rows for flag in row if flag]
    assert sorted(listed) == sorted(flags)


def test_every_setting_of_the_service_has_one_row() -> None:
    rows = re.findall(r"^\| `\w+` \| `GPT_(\w+)` \|", markdown(), re.MULTILINE)
    assert [row.lower() for row in rows] == list(FIELDS)


def test_settings_marked_as_changeable_on_a_resume_are_those_that_it_accepts() -> None:
    saved = build_config({}).flat()
    rows = dict(re.findall(r"^\| `--([\w-]+)`.* \| (yes)? ?\|$", markdown(), re.MULTILINE))
    numbers = {name: value for name, value in saved.items() if type(value) in (int, float)}
    for name, value in numbers.items():
        given = {"resume": "first", name: 2 * value + 2 if value >= 1 else (value + 1) / 2}
        assert accepts(saved, given) == bool(rows[name.replace("_", "-")]), name


def accepts(saved: dict[str, Any], given: dict[str, Any]) -> bool:
    try:
        resume_config(saved, given)
    except ConfigError as error:
        if "cannot become" not in str(error):
            raise
        return False
    return True


def test_every_environment_variable_in_the_code_is_listed() -> None:
    missing = sorted({name for name in names_in_code() if not is_listed(name)})
    assert missing == [], f"list {', '.join(missing)} in docs/configuration.py, then `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_environment_variable_on_a_page_is_listed(page: Path) -> None:
    assert [name for name in NAMED.findall(page.read_text(encoding="utf-8")) if not is_listed(name)] == []


@pytest.mark.parametrize("variable", LISTED, ids=lambda variable: variable.name)
def test_every_listed_variable_is_used_somewhere(variable: Variable) -> None:
    code = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files = [*code, *PAGES, ROOT / "Makefile", ROOT / "cluster.yaml"]
    assert any(variable.name.rstrip("*") in path.read_text(encoding="utf-8") for path in files)


def test_a_new_variable_in_the_code_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gptcore").mkdir()
    (tmp_path / "gptcore" / "new.py").write_text(
        'import os\n"""RAY_SAID aloud."""\nos.environ.get("FRESH")\nos.environ["RAW"]\nDEFAULTS = {"RAY_NEW": "1"}\n'
    )
    monkeypatch.setattr("tests.docs.test_configuration.ROOT", tmp_path)
    assert {"FRESH", "RAW", "RAY_NEW"} == set(names_in_code())
    assert not is_listed("FRESH")


def test_a_table_keeps_its_columns_whatever_a_cell_contains() -> None:
    assert configuration.table(["a", "b"], [["x|y", 1]]).splitlines()[-1] == "| x\\|y | 1 |"
