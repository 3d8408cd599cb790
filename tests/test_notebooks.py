"""The notebooks: stored without outputs, and running from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def _cells(path: Path) -> list[Any]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_three_are_there() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@every_notebook
def test_no_output_is_stored(path: Path) -> None:
    for cell in _cells(path):
        assert (cell.outputs, cell.execution_count, cell.metadata) == ([], None, {})


@every_notebook
@pytest.mark.slow
def test_it_runs_and_draws(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a notebook fetches is missing on a machine without a network: none may ask for it.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    # Progress bars may be there, warnings are not for readers.
    errors = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert "Warning" not in errors
    assert {path.name for path in FOLDER.iterdir() if path.suffix != ".ipynb"} <= {
        ".ipynb_checkpoints"
    }
