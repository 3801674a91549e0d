"""Notebooks with their outputs: each is run once, without a network, and kept until it, the package or a pinned version changes.

The site shows what is kept, and `tests/test_notebooks.py` checks it; whoever comes first runs it, and others wait.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nbformat
from filelock import FileLock
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KEPT = ROOT / "build" / "notebooks"
NOWHERE = "http://127.0.0.1:9"    # nothing answers there: any download fails
OFFLINE = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)}
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found", "ALIGNBLIND_PROGRESS": "0"}    # a page has no use for this advice, nor for bars


def digest(notebook: Path, root: Path = ROOT) -> str:
    """What the outputs of a notebook depend on: its cells, the package with its data, the pinned versions, Python, and how it is run."""
    found = hashlib.sha256(sys.version.encode())
    files = [file for file in (root / "alignblind_mi").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    for file in (Path(__file__), notebook, root / "constraints.txt", *sorted(files)):
        content = file.read_bytes()
        found.update(f"{file.name}|{len(content)}|".encode() + content)
    return found.hexdigest()[:16]


def executed(notebook: Path) -> Path:
    """The executed copy of a notebook, made if it is not there.

    It is `FOLDER/notebooks/NAME.ipynb`, with a folder of its own for each state of things; former ones are removed.
    Errors: nbclient's CellExecutionError for a cell that fails.
    """
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / f"{notebook.stem}.lock"):
        copy = KEPT / f"{notebook.stem}-{digest(notebook)}" / "notebooks" / notebook.name
        if not copy.is_file():
            for former in KEPT.glob(f"{notebook.stem}-*"):
                shutil.rmtree(former)
            content = nbformat.read(notebook, as_version=4)
            NotebookClient(content, timeout=600, resources={"metadata": {"path": str(notebook.parent)}}).execute(
                env={**os.environ, **OFFLINE, **QUIET})
            copy.parent.mkdir(parents=True)
            nbformat.write(content, copy.with_suffix(".part"))
            copy.with_suffix(".part").replace(copy)    # whole, or not there
        return copy
