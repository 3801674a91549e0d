"""Runs hostile cases one after the other in one process, each with a time limit, and says how each ended.

A case is a command line (or a call) on inputs that it makes in a folder of its own. Beside how it ended it is looked at what it did: work
that costs something is a tripwire (a refusal comes before it), and every file that was there before must be there after, unchanged.
"""

import contextlib
import functools
import gc
import hashlib
import io
import os
import pickle
import re
import resource
import select
import shutil
import signal
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes beyond what is loaded when the table begins
LONGEST_SENTENCE = 1200  # characters: a value of 5,000 is to be named, not repeated
LONG = 100  # of a longer value its beginning is enough
# How far a case may go before it must have ended: `check` loads no weights, `load` does, `full` may do all.
STAGES = ("check", "load", "full")
LIMITS = {"check": 5.0, "load": 10.0, "full": 60.0}  # seconds of this process; BLOCKED times as many of the clock
BLOCKED = 2
EXPECTED = ("refuse", "succeed", "either")
PROGRESS = re.compile(
    r"note: |[\w ,/-]+: (ok|warn|fail|skipped)$|\[\d+/\d+\] |[^\n]+ runs on the plain engine: "
)  # what may stand before a refusal


class TimeUp(BaseException):
    """The time limit of a case."""


class Tripped(BaseException):
    """A case went on to work that it should have been refused before."""


class Network(BaseException):
    """A case tried to reach another machine."""


@dataclass
class Place:
    """Where a case runs: `inputs` are shared and sound, `folder` is the case's own, `out` in it what it may write."""

    inputs: Path
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"


@dataclass(frozen=True)
class Case:
    """What is tried, how it should end and how far it may go; `named` are texts of which a refusal must say one."""

    group: str
    option: str
    value: str
    run: Callable[[Place], Any]
    expect: str = "refuse"
    stage: str = "check"
    named: tuple[str, ...] = ()
    codes: tuple[int, ...] = (2,)
    writes: tuple[str, ...] = ()  # in the case's folder: what may be changed there though it was there before
    here: tuple[str, ...] = ()  # in the working folder: what may be new
    on_stdout: bool = False  # problems are listed on standard output
    limit: float | None = None

    @property
    def key(self) -> str:
        return f"{self.group} | {self.option} | {shown(self.value)}"


@dataclass
class Ending:
    """How a case ended. `code` is None for what did not end by itself."""

    case: Case
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    kind: str = ""  # of the first fault

    def fault(self, kind: str, said: str) -> None:
        self.kind = self.kind or kind
        self.faults.append(f"{kind}: {said}")

    @property
    def sentence(self) -> str:
        return shown(" ".join((self.stderr or self.stdout).split()), 300)

    def record(self) -> dict[str, Any]:
        case = {key: value for key, value in asdict(self.case).items() if key in ("group", "option", "expect", "stage")}
        return {
            **case,
            "value": shown(self.case.value),
            "code": self.code,
            "sentence": self.sentence,
            "seconds": round(self.seconds, 3),
            "verdict": self.kind or "as expected",
            "faults": self.faults,
        }


def shown(text: str, most: int = 60) -> str:
    """A text in one printable line, cut where it is long."""
    plain = text.encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= most else f"{plain[: most - 12]}...({len(text)})"


# ---- what may not happen -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute replaced for a while."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _trip(what: str) -> Callable[..., Any]:
    def tripped(*arguments: Any, **options: Any) -> Any:
        raise Tripped(what)

    return tripped


@contextlib.contextmanager
def tripwires(stage: str) -> Iterator[None]:
    """Work that a case of this stage must have ended before raises Tripped."""
    from concurrent.futures import ProcessPoolExecutor

    import torch
    from transformers import AutoModelForCausalLM

    from alignblind_mi.models.model import HookedModel

    def connect(self: Any, address: Any) -> None:
        raise Network(str(address))

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(socket, "socket", type("NoSocket", (socket.socket,), {"connect": connect, "connect_ex": connect})))
        if stage != "full":
            stack.enter_context(replaced(torch.optim.Optimizer, "__init__", _trip("training")))
            stack.enter_context(replaced(ProcessPoolExecutor, "__init__", _trip("other processes")))
            for name in ("generate", "record", "next_probs", "continuation_log_probs"):
                stack.enter_context(replaced(HookedModel, name, _trip(name)))
        if stage == "check":
            stack.enter_context(_no_weights(AutoModelForCausalLM))
        yield


@contextlib.contextmanager
def _no_weights(auto: Any) -> Iterator[None]:
    """`from_pretrained` is inherited: put a tripwire before it."""
    auto.from_pretrained = classmethod(_trip("loading weights"))
    try:
        yield
    finally:
        del auto.from_pretrained


class TimeLimit:
    """Raises TimeUp in the main thread after so many seconds of work, or of waiting for something; again and again if it is swallowed."""

    TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, BLOCKED))

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        for number, timer, factor in self.TIMERS:
            signal.signal(number, self._up)
            signal.setitimer(timer, self.seconds * factor, 0.5)

    def __exit__(self, *error: Any) -> None:
        for _, timer, _ in self.TIMERS:
            signal.setitimer(timer, 0)

    @staticmethod
    def _up(signum: int, frame: Any) -> None:
        raise TimeUp


def bound_memory() -> None:
    """From here on at most MEMORY more: what asks for more gets a MemoryError."""
    held = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


# ---- what is there -------------------------------------------------------------------------------------------------------


def snapshot(folder: Path, *, digest: bool = True) -> dict[str, str]:
    """Every name in a folder with what is there: content, or (without `digest`) size and time of change."""
    found: dict[str, str] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)  # noqa: PTH118 - names may be what no Path takes
            found[os.path.relpath(path, folder)] = _content(path, digest)
    return found


def _content(path: str, digest: bool) -> str:
    is_ = os.lstat(path)
    if stat.S_ISLNK(is_.st_mode):
        return f"link to {os.readlink(path)}"  # noqa: PTH115
    if not stat.S_ISREG(is_.st_mode):
        return oct(stat.S_IFMT(is_.st_mode))
    if not digest:
        return f"{is_.st_size} {is_.st_mtime_ns} {is_.st_ino}"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was changed or deleted, and what is new."""
    return [f"{name} {'is gone' if name not in after else 'was changed'}" for name in before if before[name] != after.get(name)] + [
        f"{name} is new" for name in after if name not in before
    ]


# ---- running -------------------------------------------------------------------------------------------------------------


class Stream(io.TextIOBase):
    """A standard stream for the whole process whose text goes where it is pointed to; what holds on to it keeps working."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.target = real

    def write(self, text: str) -> int:
        return int(self.target.write(text))

    def flush(self) -> None:
        self.target.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return int(self.real.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return str(self.target.errors)

    @property
    def buffer(self) -> Any:
        return self.target.buffer


def stand_in() -> None:
    """Put a `Stream` in the place of both standard streams; before anything that remembers them is imported."""
    sys.stdout, sys.stderr = Stream(sys.__stdout__), Stream(sys.__stderr__)  # type: ignore[assignment]


@contextlib.contextmanager
def caught() -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """What is written to the standard streams, by the rules of the real ones (strict, and with backslashes)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors, write_through=True) for errors in ("strict", "backslashreplace"))
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream, target in zip(streams, (out, err), strict=True):
        stream.target = target
    try:
        yield out, err
    finally:
        for stream in streams:
            stream.target = stream.real


@functools.cache
def _built(get_command: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Typer builds all verbs anew at each call, a fifth of a table's time: here once."""
    return functools.cache(get_command)


def command(arguments: Sequence[str]) -> int:
    """The program's own `main` with these arguments; its exit code."""
    import typer.main

    from alignblind_mi.__main__ import main

    with replaced(sys, "argv", ["alignblind", *arguments]), replaced(typer.main, "get_command", _built(typer.main.get_command)):
        try:
            main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def attempt(case: Case, place: Place, act: Callable[[Any], int], watched: Sequence[Path]) -> Ending:
    """Run one case and judge it. `act` maps what the case's `run` returns to an exit code."""
    place.folder.mkdir(parents=True)
    given = case.run(place)
    before, shared = snapshot(place.folder), [snapshot(folder, digest=False) for folder in watched]
    ending, started = Ending(case), time.process_time()
    with caught() as (out, err):
        try:
            with tripwires(case.stage), TimeLimit(case.limit or LIMITS[case.stage]):
                ending.code = act(given)
        except TimeUp:
            ending.fault("hang", f"did not end within {case.limit or LIMITS[case.stage]:g} s")
        except Tripped as error:
            if case.expect != "either":
                ending.fault("work", f"went on to {error}")
        except Network as error:
            ending.fault("network", str(error))
        except BaseException as error:  # noqa: BLE001 - whatever it was is what the table shows
            last = traceback.extract_tb(error.__traceback__)[-1]
            ending.fault("traceback", f"{type(error).__name__}: {shown(str(error), 200)} ({Path(last.filename).name}:{last.lineno})")
        ending.seconds = time.process_time() - started
        ending.stdout, ending.stderr = (stream.buffer.getvalue().decode("utf-8") for stream in (out, err))  # type: ignore[attr-defined]
    _judge_files(ending, place, before, watched, shared)
    if not ending.kind and ending.code is not None:
        _judge_words(ending)
    return ending


def _judge_files(ending: Ending, place: Place, before: dict[str, str], watched: Sequence[Path], shared: list[dict[str, str]]) -> None:
    case = ending.case
    found = changes(before, snapshot(place.folder))
    mine = [one for one in found if not _may(one, case, before)]
    if mine:
        ending.fault("files", "; ".join(shown(one, 120) for one in mine[:4]))
    for folder, earlier in zip(watched, shared, strict=True):
        found = changes(earlier, snapshot(folder, digest=False))
        elsewhere = [one for one in found if one not in [f"{name} is new" for name in case.here]]
        if elsewhere:
            ending.fault("files", f"in {folder.name}: " + "; ".join(shown(one, 120) for one in elsewhere[:4]))


def _may(change: str, case: Case, before: dict[str, str]) -> bool:
    """Whether a case may change this: what is new in its out folder (unless it should be refused before), and what it is allowed to."""
    inside = change.startswith(("out/", "out ", ".out.")) or any(change.startswith(name) for name in case.writes)
    if not change.endswith("is new"):
        return any(change.startswith(name) for name in case.writes)
    return inside and (case.expect != "refuse" or case.stage != "check")


def _judge_words(ending: Ending) -> None:
    case, code = ending.case, ending.code
    if code == 0:
        if case.expect == "refuse":
            ending.fault("silent", "exit code 0")
        return
    if case.expect == "succeed":
        ending.fault("refused", f"exit code {code}: {ending.sentence}")
        return
    if code not in case.codes:
        ending.fault("code", f"exit code {code}, expected {' or '.join(map(str, case.codes))}")
    if case.on_stdout and ending.stdout and not ending.stderr:
        said = ending.stdout
    elif "\u2500 Error \u2500" in ending.stderr:
        said = ending.stderr  # typer's own refusal of an option
    elif code == 2:
        said = ending.stderr
        _judge_sentence(ending)
    else:
        return  # a page of its own says it: `doctor`
    bare = re.sub(r"[\u2502\s]+", "", said)
    kind = "unnamed" if said is ending.stderr and "\u2500 Error \u2500" not in said else "unnamed by typer"
    if case.named and not any(re.sub(r"\s+", "", name) in bare for name in case.named):
        ending.fault(
            kind if not case.on_stdout else "unnamed",
            f"does not say {' or '.join(shown(name, 40) for name in case.named[:3])}: {ending.sentence}",
        )


def _judge_sentence(ending: Ending) -> None:
    """One line on standard error alone, that begins with the program's name and ends with a full stop; before it, at most what was done."""
    every = ending.stderr.splitlines()
    lines = [line for line in every[:-1] if not PROGRESS.match(line)] + every[-1:]
    if ending.stdout and ending.code == 2:
        ending.fault("half printed", shown(ending.stdout, 80))
    if len(lines) != 1:
        ending.fault("sentence", f"{len(lines)} lines on standard error: {ending.sentence}")
    elif not lines[0].startswith("alignblind: ") or not lines[0].rstrip().endswith("."):
        ending.fault("sentence", f"no full stop: {shown(lines[0][-100:], 140)}")
    if len(ending.stderr) > LONGEST_SENTENCE:
        ending.fault("sentence", f"{len(ending.stderr)} characters")
    if any(ord(letter) < 32 and letter != "\n" for letter in ending.stderr):
        ending.fault("sentence", f"control characters: {ending.sentence}")


TOLD = ("code", "stdout", "stderr", "seconds", "faults", "kind")  # of an ending, by the fork that saw it


def run_all(
    cases: Sequence[Case], inputs: Path, root: Path, act: Callable[[Any], int], watched: Sequence[Path], tell: Callable[[Ending], None]
) -> list[Ending]:
    """Every case in a folder of its own, which is removed after it.

    They run in one fork of this process, which only a hang or crash outside of Python ends; the rest then goes on in another. What is there
    now stays, and is not looked through by each case's collection of garbage.
    """
    gc.collect()
    gc.freeze()
    endings: list[Ending] = []
    while len(endings) < len(cases):
        for ending in _in_fork(cases, len(endings), inputs, root, act, watched):
            endings.append(ending)
            tell(ending)
    return endings


def _in_fork(
    cases: Sequence[Case], first: int, inputs: Path, root: Path, act: Callable[[Any], int], watched: Sequence[Path]
) -> Iterator[Ending]:
    """The endings of the cases from `first` on, up to one that ends the fork."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as to:
            for number in range(first, len(cases)):
                place = Place(inputs, root / "cases" / f"{number:04d}")
                ending = attempt(cases[number], place, act, watched)
                shutil.rmtree(place.folder, ignore_errors=True)
                os.chdir(root / "work")
                pickle.dump({name: getattr(ending, name) for name in TOLD}, to)
                to.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb", 0) as said:
        for case in cases[first:]:
            limit = (case.limit or LIMITS[case.stage]) * BLOCKED * 2
            ready = select.select([said], [], [], limit)[0]
            try:
                yield Ending(case, **pickle.load(said)) if ready else _ended(case, "hang", "did not end and could not be interrupted")
            except EOFError:
                ready = []
                yield _ended(case, "crash", "ended the whole process")
            if not ready:
                break
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _ended(case: Case, kind: str, said: str) -> Ending:
    ending = Ending(case)
    ending.fault(kind, said)
    return ending


def names_of(value: str) -> tuple[str, ...]:
    """Ways in which a sentence may say a value: itself, as Python or escapes write it, as a number; of a long one its beginning."""
    found = [value, repr(value)[1:-1], shown(value, 10_000), value.removeprefix("organism:")]
    found += [repr(value.removeprefix("organism:"))[1:-1]]
    found += [part for one in value.split(",") if (part := one.strip("()[] "))] if "," in value else []    # a list, or one of its members
    found += [value[value.index("-") :]] if value[:1].isdigit() and "-" in value else []    # typer reads 0-9 as -9
    with contextlib.suppress(ValueError):
        found.append(repr(float(value)))
        found.append(f"{float(value):g}")
    short = [one[:12] if len(one) > LONG else one for one in found]
    return tuple(dict.fromkeys(one for one in short if one)) or ("''", '""')
