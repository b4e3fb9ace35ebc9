"""The notebooks run from top to bottom, on public names alone."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DEMOS = sorted((Path(__file__).parents[2] / "demos").glob("*.ipynb"))


def test_there_are_demos():
    assert DEMOS


@pytest.mark.real_model
@pytest.mark.parametrize("path", DEMOS, ids=lambda p: p.stem)
def test_the_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs) >= 3


@pytest.mark.parametrize("path", DEMOS, ids=lambda p: p.stem)
def test_the_notebook_imports_public_names_only(path):
    source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not str(node.module).startswith("sd_lens."), ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("sd_lens.") for alias in node.names), ast.unparse(node)
