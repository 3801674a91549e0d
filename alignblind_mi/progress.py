"""How far a long run has come: a rich display on a terminal, plain lines otherwise. Goes to standard error; results never do."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from alignblind_mi.borders.texts import say, visible

Advance = Callable[[int], None]


@contextlib.contextmanager
def interruptible(out: Path, kept: str = "finished parts") -> Iterator[None]:
    """A block that writes into `out`: interrupted, it says what is kept there and how to go on, and ends as it would have."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: {kept} are kept in {out}; the same command, or call, goes on from there.", err=True)
        raise


class Progress:
    """Announces the parts of a run, one after the other. Use as `with progress.part(name, done) as advance: ... advance(rows)`."""

    def __init__(self, total: int) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
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
        from rich.progress import Progress as Display, SpinnerColumn, TextColumn, TimeElapsedColumn

        texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.completed:.0f} rows"))
        columns = (SpinnerColumn(), *texts, TimeElapsedColumn())
        with Display(*columns, console=self.console, transient=True) as display:
            task = display.add_task(visible(label, lines=False), total=None)
            yield lambda rows: display.advance(task, rows)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.console.is_terminal:
            self.console.print(visible(text), markup=False, emoji=False)
        else:
            say(text, err=True)
