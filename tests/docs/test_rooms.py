"""Claims about the lists of modules in docs/architecture.md and in the README: they name every module, and no other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADINGS = {
    "gptcore": "### gptcore",
    "gptcore/engine": "## The engine",
    "train_job": "### train_job",
    "serve_app": "## The service",
    "serve_app/chat": "## The service",
    "serve_app/routes": "## The service",
    "bench": "### bench",
    "bench/peers": "### bench",
}
"""Each package, and the section that lists its modules."""
UNLISTED = {"__init__", "__main__"}
SEVERAL = {"serve_app/chat", "serve_app/routes", "bench/peers"}
"""Told in one row, or in the README by their folder alone."""


def section(heading: str) -> str:
    """What stands under the heading, up to the next one."""
    return ARCHITECTURE.split(f"\n{heading}\n")[1].split("\n#")[0]


def modules(package: str) -> set[str]:
    return {path.stem for path in (ROOT / package).glob("*.py")} - UNLISTED


def test_every_package_with_modules_is_looked_at() -> None:
    found = {
        path.parent.relative_to(ROOT)
        for top in ("gptcore", "train_job", "serve_app", "bench")
        for path in (ROOT / top).rglob("*.py")
    }
    assert {str(folder) for folder in found} == set(HEADINGS)


@pytest.mark.parametrize("package", HEADINGS)
def test_architecture_names_every_module(package: str) -> None:
    named = set(re.findall(r"`(\w+)`", section(HEADINGS[package])))
    assert modules(package) - named == set()


@pytest.mark.parametrize("package", sorted(HEADINGS.keys() - SEVERAL))
def test_every_room_of_architecture_is_there(package: str) -> None:
    first = re.findall(r"^\| (`.*?) \|", section(HEADINGS[package]), re.MULTILINE)
    rooms = [room for cell in first for room in re.findall(r"`([\w./]+)`", cell)]
    assert rooms
    folder = ROOT / package
    assert [room for room in rooms if not any((folder / name).exists() for name in (room, f"{room}.py"))] == []


@pytest.mark.parametrize("package", sorted(HEADINGS.keys() - SEVERAL))
def test_the_readme_lists_every_module(package: str) -> None:
    assert modules(package) - listed_in_readme(package) == set()
    assert listed_in_readme(package) <= modules(package) | {"__init__"}


def listed_in_readme(package: str) -> set[str]:
    """The modules that stand under the package's folder in the README's tree."""
    top, _, inner = package.partition("/")
    tree = README.split("## The files")[1]
    block = re.search(rf"^{top}/.*\n((?: .*\n)+)", tree, re.MULTILINE)
    assert block, f"the README's tree has no {top}/"
    deep = set(re.findall(r"^    (\w+)\.py", block[1], re.MULTILINE))
    flat = {
        name for line in re.findall(r"^  (?! )(.*)", block[1], re.MULTILINE) for name in re.findall(r"(\w+)\.py", line)
    }
    return deep if inner else flat
