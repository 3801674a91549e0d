"""How far a long run has come: a rich display on a terminal, plain lines otherwise. Goes to standard error; results never do.

Whatever takes longer than two seconds (rows that a model runs, pairs that are patched, steps of a training) shows how much of it is done
and how long the rest will take: on a terminal and in a notebook, and nowhere else. ALIGNBLIND_PROGRESS=0 in the environment turns that off,
ALIGNBLIND_PROGRESS=1 on where there is neither.
"""

import contextlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignblind_mi.borders import ranks
from alignblind_mi.borders.texts import label, say, visible

Advance = Callable[[int], None]
SWITCH = "ALIGNBLIND_PROGRESS"
WAIT = 2.0    # seconds that a run is silent
HERE = threading.local()    # what this thread shows: the outermost counter, the display that it stands in, whether a folder keeps its parts


@contextlib.contextmanager
def interruptible(out: Path, kept: str = "finished parts") -> Iterator[None]:
    """A block that writes into `out`: interrupted, it says what is kept there and how to go on, and ends as it would have."""
    before = getattr(HERE, "kept", False)
    HERE.kept = True
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: {kept} are kept in {out}; the same command, or call, goes on from there.", err=True)
        raise
    finally:
        HERE.kept = before


# ---- one run -----------------------------------------------------------------------------------------------------------


def in_notebook() -> bool:
    """Whether this runs in a notebook, which shows widgets."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def is_shown() -> bool:
    """Whether somebody looks: see the module."""
    if not ranks.leads():
        return False
    switch = os.environ.get(SWITCH, "")
    if switch:
        return switch != "0"
    return (in_notebook() or sys.stderr.isatty()) and "PYTEST_CURRENT_TEST" not in os.environ


class Counter:
    """How much of a run is done; call it with what was finished just now. `total` may be set while it runs; None is unknown."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit = label(what, 60), total, unit
        self.done, self.begun = 0, time.monotonic()
        self.bar: Any = None

    def __call__(self, n: int = 1) -> None:
        """`n` more are done."""
        self.done += n
        if self.bar is None and time.monotonic() - self.begun > WAIT and is_shown() and self.done != self.total:
            self.bar = _bar(self)
            self.bar.n = self.done
            self.bar.refresh()
        elif self.bar is not None:
            self.bar.total = self.total
            self.bar.update(self.done - self.bar.n)

    def close(self) -> None:
        """Clear the line."""
        if self.bar is not None:
            self.bar.close()


def _bar(counter: Counter) -> Any:
    """A widget in a notebook that has widgets, a line of the display that the run stands in, or a line on standard error."""
    display = getattr(HERE, "display", None)
    if display is not None:
        return _Line(display, counter)
    options: dict[str, Any] = {"total": counter.total, "desc": counter.what, "unit": f" {counter.unit}", "leave": False}
    if in_notebook() and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.auto import tqdm

        bar = tqdm(**options)
    else:
        from tqdm import tqdm as plain

        bar = plain(**options, file=sys.stderr, ascii=not (getattr(sys.stderr, "encoding", None) or "").lower().startswith("utf"))
    bar.start_t -= time.monotonic() - counter.begun    # what was done before it was shown counts for its speed
    return bar


class _Line:
    """A line of a rich display, called as tqdm's bars are: there is nothing more that it does."""

    def __init__(self, display: Any, counter: Counter) -> None:
        self.display, self.counter, self.total, self.n, self.start_t = display, counter, counter.total, 0, 0.0
        self.task = display.add_task(visible(f"  {counter.what}", lines=False), total=self.total, of="")

    def update(self, n: int) -> None:
        self.n += n
        self.refresh()

    def refresh(self) -> None:
        of = f" {self.counter.unit}" if self.total is None else f" of {self.total} {self.counter.unit}"
        self.display.update(self.task, completed=self.n, total=self.total, of=of)
        self.display.refresh()

    def close(self) -> None:
        self.display.remove_task(self.task)


@contextlib.contextmanager
def counted(what: str, total: int | None, unit: str = "rows") -> Iterator[Counter]:
    """A run of `total` units; call what it yields with what was finished. A run within it of the same unit counts for it; one of
    another unit has its own line.

    Interrupted, a run that writes into no folder says that nothing is kept of it.
    """
    outer: Counter | None = getattr(HERE, "counter", None)
    if outer is not None and outer.unit == unit:
        yield outer
        return
    HERE.counter = counter = Counter(what, total, unit)
    try:
        yield counter
    except KeyboardInterrupt:
        if outer is None and not getattr(HERE, "kept", False):
            counter.close()
            said = f"{counter.done} of {counter.total}" if counter.total is not None else counter.done
            say(f"interrupted after {said} {unit} ({counter.what}): nothing is kept of a call that writes into no folder. Parts in a "
                "folder (run_parts, measure_parts, or the command line) go on where they were.", err=True)
        raise
    finally:
        counter.close()
        HERE.counter = outer


# ---- several parts -----------------------------------------------------------------------------------------------------


class Progress:
    """Announces the parts of a run, one after the other. Use as `with progress.part(name, done) as advance: ... advance(rows)`."""

    def __init__(self, total: int) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, quiet=not ranks.leads())
        self.total, self.begun = total, 0

    @contextlib.contextmanager
    def part(self, name: str, *, done: bool = False) -> Iterator[Advance]:
        """Announce a part; `done` says that it was finished in an earlier run."""
        self.begun += 1
        label = f"[{self.begun:>{len(str(self.total))}}/{self.total}] {name}"
        if done:
            self.note(f"{label}: already there")
            yield lambda rows: None
            return
        start = time.monotonic()
        with self._rows(label) as advance:
            yield advance
        self.note(f"{label}: {time.monotonic() - start:.1f} s")

    @contextlib.contextmanager
    def _rows(self, label: str) -> Iterator[Advance]:
        if not self.console.is_terminal:
            yield lambda rows: None
            return
        from rich.progress import Progress as Display, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.completed:.0f}{task.fields[of]}"))
        columns = (SpinnerColumn(), *texts, TimeElapsedColumn(), TimeRemainingColumn())
        with Display(*columns, console=self.console, transient=True) as display:
            task = display.add_task(visible(label, lines=False), total=None, of=" rows")
            HERE.display = display
            try:
                yield lambda rows: display.advance(task, rows)
            finally:
                HERE.display = None

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.console.is_terminal:
            self.console.print(visible(text), markup=False, emoji=False)
        else:
            say(text, err=True)
