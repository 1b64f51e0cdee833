"""Names on the pages: architecture.md lists every package, and every path, module and heading exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("bench", "deploy", "docs", "gptcore", "mlflow", "serve_app", "tests", "train_job")
PAGES = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / top / "README.md" for top in ("bench", "deploy/kuberay", "mlflow")),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
WRITTEN = {"mlflow/mlflow.db", "mlflow/artifacts"}
"""Paths that a run writes. A fresh clone does not have them."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def rooms() -> Iterator[str]:
    """Every top-level package and every folder in one."""
    for top in ("gptcore", "train_job", "serve_app"):
        yield top
        yield from (f"{top}/{path.name}" for path in sorted((ROOT / top).glob("*/")) if path.name != "__pycache__")


@pytest.mark.parametrize("room", list(rooms()))
def test_architecture_names_every_room(room: str) -> None:
    assert f"`{room}`" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_architecture_can_be_read_in_ten_minutes() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split()) <= 2500


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9000


def paths_in(text: str) -> set[str]:
    """The paths of this repository that a text names, in the form `folder/…`."""
    found = re.findall(rf"(?<![\w./:-])((?:{'|'.join(TOPS)})/[\w./*-]*[\w*/])", text)
    return {path.rstrip("/") for path in found} - WRITTEN


def modules_in(text: str) -> set[str]:
    """Our modules that a text runs with `-m` or names with dots."""
    run = re.findall(r"-m ((?:bench|docs|gptcore|serve_app|train_job)(?:\.\w+)*)", text)
    named = re.findall(r"`((?:bench|docs|gptcore|serve_app|train_job)(?:\.[a-z_]+)+)`", text)
    return {*run, *named}


def is_there(path: str) -> bool:
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def is_module(name: str) -> bool:
    """Whether a dotted name is a package, a module, or a name that a module's text has."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    module = path.parent.with_suffix(".py")
    return module.exists() and re.search(rf"\b{path.name}\b", module.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_and_module_on_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert sorted(path for path in paths_in(text) if not is_there(path)) == []
    assert sorted(module for module in modules_in(text) if not is_module(module)) == []


@pytest.mark.parametrize(
    "text", ["see `train_job/gone.py`", "`bench/none/`", "[x](tests/nowhere.py)", "run serve_app/*.exe"]
)
def test_a_missing_path_would_be_found(text: str) -> None:
    (path,) = paths_in(text)
    assert not is_there(path)


@pytest.mark.parametrize("text", ["python -m train_job.gone", "`gptcore.model.gone_for_good`"])
def test_a_missing_module_would_be_found(text: str) -> None:
    (module,) = modules_in(text)
    assert not is_module(module)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_on_a_page_leads_to_an_existing_file_and_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} leads to {target}"
        assert not anchor or anchor in headings(file), f"{page.name} leads to {target}#{anchor}"


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in readme] == []
