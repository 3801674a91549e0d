"""Every notebook runs top to bottom without a network, and leaves the pictures it promises.

What is checked is the executed copy that the documentation shows (`docs/executed.py`): a notebook runs once for both.
"""

import shutil
from pathlib import Path

import nbformat
import pytest

from docs import executed

NOTEBOOKS = executed.NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), "commit notebooks without their outputs"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(executed.executed(path), as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in cells] == [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))    # all of them, in their order
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []    # warnings, with paths of whoever built the site
    shown = [output.get("data", {}) for output in outputs]
    assert any("image/png" in data for data in shown)
    views = [data["text/html"] for data in shown if "CircuitsVis.render" in data.get("text/html", "")]
    assert views, "the attention view is missing"
    assert all("unpkg.com" not in view.split("CircuitsVis.render(")[-1] for view in views)


@pytest.mark.slow
def test_the_quickstart_shows_the_planted_reading_and_not_its_mean_with_the_controls():
    cells = nbformat.read(executed.executed(NOTEBOOKS[0]), as_version=4).cells
    (said,) = [cell.outputs[-1]["data"]["text/plain"] for cell in cells if "measure_awareness" in cell.source]
    shown = {line.split()[0]: float(line.split()[1]) for line in said.splitlines() if line.startswith("organism:")}
    assert 0.8 <= shown["organism:aligned"] <= 1    # its gate
    assert abs(shown["organism:base"]) <= 0.15


def a_notebook(folder: Path, code: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    return path


def output(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].outputs[0].text


@pytest.mark.slow
def test_a_notebook_runs_once_without_a_network_and_again_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(executed, "KEPT", tmp_path / "kept")
    asked = "import os, uuid; print(uuid.uuid4(), os.environ['HF_HUB_OFFLINE'], os.environ['https_proxy'])"
    first = executed.executed(a_notebook(tmp_path / "notebooks", asked))
    said = output(first)
    assert said.split()[1:] == ["1", executed.NOWHERE]
    assert output(executed.executed(tmp_path / "notebooks" / "one.ipynb")) == said
    second = executed.executed(a_notebook(tmp_path / "notebooks", asked + "    # again"))
    assert output(second) != said
    assert not first.exists()    # what nothing shows any more is not kept


def test_what_a_notebook_depends_on_is_in_its_digest(tmp_path):
    (tmp_path / "alignblind_mi" / "data").mkdir(parents=True)
    notebook = a_notebook(tmp_path / "notebooks", "1")
    (tmp_path / "constraints.txt").write_text("torch==2.13\n", "utf-8")
    code, data = tmp_path / "alignblind_mi" / "x.py", tmp_path / "alignblind_mi" / "data" / "x.toml"
    code.write_text("a = 1\n", "utf-8")
    data.write_text("a = 1\n", "utf-8")
    seen = [executed.digest(notebook, tmp_path)]
    for file in (code, data, tmp_path / "constraints.txt"):
        file.write_text("a = 2\n", "utf-8")
        seen.append(executed.digest(notebook, tmp_path))
    shutil.copy(code, code.with_name("y.py"))
    seen.append(executed.digest(notebook, tmp_path))
    a_notebook(tmp_path / "notebooks", "2")
    seen.append(executed.digest(notebook, tmp_path))
    assert len(set(seen)) == len(seen)
