"""Runs every cell of `docs/tour.ipynb` and saves the notebook with its outputs.

    python -m docs.tour

In: the notebook. Out: the same notebook with the outputs of this run. It runs in a temporary folder. Everything that
depends on the machine or the time is left out, so two runs differ only in their figures.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).with_suffix(".ipynb")
CELL_SECONDS = 300
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(notebook: NotebookNode) -> NotebookNode:
    """Runs the notebook and returns it. Raises CellExecutionError, with the cell and its traceback, if a cell fails."""
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        kernel = AsyncKernelManager(kernel_name=KERNEL["name"], transport="ipc", ip=f"{folder}/kernel")  # no ports
        client = NotebookClient(notebook, km=kernel, timeout=CELL_SECONDS, resources=place)
        after = client.execute(env=os.environ | {"IPYTHONDIR": folder})
    after.metadata = NotebookNode(kernelspec=KERNEL, language_info={"name": "python"})
    for cell in after.cells:
        cell.metadata.pop("execution", None)  # times of day
        cell.update({"outputs": settled(cell.outputs)} if cell.cell_type == "code" else {})
    return after


def settled(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Returns a cell's final outputs: joins pieces of text, and drops the text version of a picture."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
            continue
        if "image/png" in output.get("data", {}):
            output.data.pop("text/plain", None)
        kept.append(output)
    return kept


def main() -> int:
    """Runs the notebook in place; returns the exit code."""
    try:
        after = executed(nbformat.read(NOTEBOOK, as_version=4))
    except CellExecutionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    nbformat.write(after, NOTEBOOK)
    print(f"wrote {NOTEBOOK.relative_to(NOTEBOOK.parents[1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
