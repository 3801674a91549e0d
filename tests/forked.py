"""Processes of their own without the price of the imports, which take longer than most of what is asked of them.

A server imports everything once, does nothing else, and each process is forked from it: `run` and `Forked` are `subprocess.run` and
`subprocess.Popen` for `python -c CODE`, `python -m MODULE` and `python SCRIPT`, with text captured. What is about imports, about the
interpreter's own options or about memory wants a true start: `subprocess`.
"""

import gc
import importlib
import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
LIBRARIES = ("matplotlib.backends.backend_agg", "matplotlib.pyplot", "pandas", "peft", "pyarrow.parquet", "scipy.stats", "torch",
             "transformers.models.llama.modeling_llama", "transformers.trainer")


def import_everything() -> None:
    """In the server, once: the libraries, and every module of the package but those that run when they are imported.

    What is there then stays, and no collection of garbage in a process that is forked looks through it.
    """
    import alignblind_mi

    for name in (*LIBRARIES, *(found.name for found in pkgutil.walk_packages(alignblind_mi.__path__, "alignblind_mi."))):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


@cache
def _server() -> ForkServerContext:
    """The server at work. It finds `preloaded` by PYTHONPATH alone: the path that multiprocessing gives it is lost (CPython 3.11)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, (Path(__file__).parent, ROOT)))):
        ensure_running()
    return context


def _child(arguments: Sequence[str], environment: Mapping[str, str], cwd: str, files: Sequence[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(ROOT))
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))    # noqa: SIM115 - of the process
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


class Forked:
    """A process at work; what it says is kept in files, so that it never waits for a reader."""

    def __init__(self, arguments: Sequence[object], *, env: Mapping[str, str] | None = None, cwd: Path | None = None):
        context = _server()
        self.folder = tempfile.TemporaryDirectory()
        self.files = [str(Path(self.folder.name) / name) for name in ("out", "err")]
        self.arguments = [str(one) for one in arguments]
        self.process = context.Process(target=_child, args=(self.arguments, dict(os.environ if env is None else env),
                                                            str(cwd or Path.cwd()), self.files))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, at once, to a process that has not ended."""
        self.process.kill()
        self.process.join()

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        out, err = (Path(file).read_text("utf-8") if Path(file).is_file() else "" for file in self.files)
        self.folder.cleanup()
        return out, err


def run(arguments: Sequence[object], *, env: Mapping[str, str] | None = None, cwd: Path | None = None,
        timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`."""
    process = Forked(arguments, env=env, cwd=cwd)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.arguments, process.returncode, out, err)
