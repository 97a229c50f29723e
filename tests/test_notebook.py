"""The notebook runs from top to bottom on the packaged model, and is committed without outputs."""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def test_there_is_a_notebook():
    assert [p.name for p in NOTEBOOKS] == ["demo_colab.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_is_valid_and_cleared(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_it_installs_from_the_repository_that_the_readme_names():
    """By its name alone pip finds nothing before there is a release."""
    source = "\n".join(cell.source for cell in read(NOTEBOOKS[0]).cells)
    repository = re.search(
        r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)/", (ROOT / "README.md").read_text()
    )[1]
    installs = re.findall(r"%pip install.*gpu-poor.*", source)
    wanted = f'"gpu-poor[hf] @ git+https://github.com/{repository}"'
    assert installs and all(line.endswith(wanted) for line in installs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("GPU_POOR_NOTEBOOK_RUNS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # quicker for a tiny model on a busy machine
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the install cell must not run; if it does, it fails
    notebook = read(path)
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    text = "".join(out.get("text", "") for out in outputs if out.output_type == "stream")
    assert "73.4% smaller" in text
    assert "same logits, bit for bit: True" in text
    assert "KL divergence" in text
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert "there was a little girl" in text  # not "littlegirl": the samples keep their space
    assert "pip" not in text  # gpu_poor was importable, so nothing was installed
