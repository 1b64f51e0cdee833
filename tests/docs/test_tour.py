"""docs/tour.ipynb: its outputs come from a run, contain nothing about a machine, and can be reproduced."""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from docs.tour import NOTEBOOK, executed, settled

ROOT = Path(__file__).resolve().parents[2]
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(?:\w[\w.-]*/)+|[A-Z]:\\|file://")
ADDRESS = re.compile(r"https?://(?!127\.0\.0\.1)")


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: NotebookNode) -> str:
    """All text that a cell shows."""
    return "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in cell.outputs)


def kinds(cell: NotebookNode) -> list[str]:
    """The kinds of a cell's outputs: the stream of a text, the type of anything else."""
    return [output.get("name") or "/".join(sorted(output.data)) for output in cell.outputs]


def test_ten_cells_were_executed_in_order(stored: NotebookNode) -> None:
    nbformat.validate(stored)
    assert [cell.execution_count for cell in code_cells(stored)] == list(range(1, 11))


def test_every_cell_is_introduced_and_shows_something(stored: NotebookNode) -> None:
    before = None
    for cell in stored.cells:
        if cell.cell_type == "code":
            assert before == "markdown"
            assert cell.outputs
        before = cell.cell_type


def test_outputs_hold_no_path_no_address_and_no_warning(stored: NotebookNode) -> None:
    for cell in code_cells(stored):
        assert ABSOLUTE_PATH.findall(texts(cell)) == []
        assert ADDRESS.findall(texts(cell)) == []
        assert "stderr" not in kinds(cell)
        assert "error" not in [output.output_type for output in cell.outputs]


@pytest.mark.parametrize("path", ["/home/me/x.py", "in /tmp/a/b", "C:\\Users", "file:///x", "(/usr/lib/python3)"])
def test_a_path_would_be_found(path: str) -> None:
    assert ABSOLUTE_PATH.search(path)


@pytest.mark.parametrize("text", ["139 steps / 3 epochs", "and/or", "https://example.org/a/b", "docs/tour.ipynb"])
def test_text_that_is_not_a_path_is_ignored(text: str) -> None:
    assert not ABSOLUTE_PATH.search(text)


def test_text_that_arrived_in_pieces_is_stored_as_one() -> None:
    pieces = [nbformat.v4.new_output("stream", name=n, text=t) for n, t in (("stdout", "a"), ("stdout", "b"))]
    assert [output.text for output in settled(pieces)] == ["ab"]


@pytest.mark.slow
@pytest.mark.release
def test_the_notebook_runs_from_top_to_bottom_and_leaves_nothing_behind(
    stored: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads that wait for each other crawl where others run, too
    before = untracked()
    after = executed(nbformat.read(NOTEBOOK, as_version=4))
    assert untracked() == before
    assert [kinds(cell) for cell in code_cells(after)] == [kinds(cell) for cell in code_cells(stored)]
    said = [texts(cell) for cell in code_cells(after)]
    bits = float(re.findall(r"model +([\d.]+) bits per byte", said[5])[0])
    guessing = float(re.findall(r"guessing tokens +([\d.]+)", said[5])[0])
    assert bits < 0.7 * guessing
    assert "the batch of one: True" in said[2]
    assert "within 0.0001: True" in said[8]
    assert "got the same text: True" in said[9]


def untracked() -> set[str]:
    """Files of the checkout that are untracked or changed, except compiled Python files."""
    listed = subprocess.run(
        ["git", "status", "--porcelain", "--ignored", "-uall"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return {line for line in listed.splitlines() if "__pycache__" not in line}
