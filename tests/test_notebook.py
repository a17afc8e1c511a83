"""The notebooks run from top to bottom, and what is stored in them comes from such a run."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORTER = ("max_steps=200", "max_steps=2")  # ten seconds of training
MACHINE_PATHS = ("/home/", "/tmp/", "/root/", "/Users/", "site-packages", "Traceback")


def notebook_params() -> list:
    return [pytest.param(path, id=path.name) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", notebook_params())
def test_notebook_runs(path: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where the package is not installed
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # else in the home folder
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(path, as_version=4)
    assert sum(SHORTER[0] in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(*SHORTER)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert "the same pictures: True" in notebook.cells[-1].outputs[-1].text


@pytest.mark.parametrize("path", notebook_params())
def test_stored_outputs_are_those_of_one_run(path: Path) -> None:
    """All cells were run once, in order, without an error, and name no path of the machine."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = path.read_text(encoding="utf-8")
    assert not [word for word in MACHINE_PATHS if word in text]
    assert path.stat().st_size < 1_000_000
