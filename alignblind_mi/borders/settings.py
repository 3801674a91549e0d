"""What numbers and names a setting may be: declared once as a type, checked by the same function however a value comes in.

A field or parameter is annotated with one of the types below, such as `seed: Seed`. `check_fields` checks the fields of a settings class
when it is made, and so for the command line, a YAML file and Python alike; `takes` checks the arguments of a function. An error is one
sentence that names the field, the value and the bound, in the caller's own error class. This module does NOT know what any setting does.
"""

import functools
import inspect
import math
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from alignblind_mi.borders.remembered import Remembered
from alignblind_mi.borders.texts import shown
from alignblind_mi.errors import AlignblindError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
SAID: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
MOST = 1_000_000    # of anything that is counted, and the largest factor


@dataclass(frozen=True)
class Bound:
    """Where a number must lie, the ends included unless `open_low` or `open_high`; `or_zero`: 0 is right as well, and `said` says so.

    `sentence`, with {name} and {value}, stands in place of the usual one.
    """

    low: int | float
    high: int | float
    open_low: bool = False
    open_high: bool = False
    or_zero: bool = False
    said: str = ""
    sentence: str = ""

    def holds(self, value: int | float) -> bool:
        """Whether a finite number is within."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return (above and below) or (self.or_zero and value == 0)

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {shown(self.low)}"
        return self.said or f"{low} and {'below' if self.open_high else 'at most'} {shown(self.high)}"


@dataclass(frozen=True)
class Listed:
    """That a list has each member once (unless `once` is False), and with `some` that it is not empty.

    `alone`: where the type is one or many of something, such as `int | Sequence[int]`, one alone is a list of one (see `many`).
    """

    some: bool = False
    once: bool = True
    alone: bool = False


@dataclass(frozen=True)
class Made:
    """That a value is what `by` makes of what is given: something of the type `given`, in words `said`. `by` raises a TypeError for what
    it can make nothing of."""

    by: Callable[[Any], Any]
    said: str
    given: Any


def path_text(value: Any) -> str:
    """A path as text. Errors: TypeError for anything else."""
    if isinstance(value, (str, os.PathLike)) and isinstance(path := os.fspath(value), str):
        return path
    raise TypeError("no path")


@dataclass(frozen=True)
class Plain:
    """That a text has no half of a character (a lone surrogate), which no tokenizer, file or page takes; with `name` it is a name as well:
    not empty, and without characters that cannot be printed."""

    name: bool = False

    def problem(self, text: str) -> str:
        """Why a text is none such, as the end of a sentence; empty for one that is."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "has half a character (a lone surrogate) in it"
        if self.name and not text.strip():
            return "is empty"
        return "has a character in it that cannot be printed" if self.name and not text.isprintable() else ""


Text = Annotated[str, Plain()]
Name = Annotated[str, Plain(name=True)]
Count = Annotated[int, Bound(1, MOST)]
Shots = Annotated[int, Bound(0, 64)]    # worked examples before a question
Whole = Annotated[int, Bound(0, MOST)]
Tokens = Annotated[int, Bound(1, 100_000)]
NewTokens = Annotated[int, Bound(0, 100_000)]    # where none are right too
Draws = Annotated[int, Bound(1, 100_000)]
Rank = Annotated[int, Bound(1, 65_536)]
Jobs = Annotated[int, Bound(0, 1024)]
Layer = Annotated[int, Bound(0, 9_999)]
Seed = Annotated[int, Bound(0, 2**32 - 1)]    # what the generators of numpy and torch both take
Temperature = Annotated[float, Bound(0.001, 1000.0, or_zero=True,
                                     sentence="a {name} is 0 (greedy), or at least 0.001 and at most 1000, got {value}.")]
Strength = Annotated[float, Bound(-float(MOST), float(MOST))]
Positive = Annotated[float, Bound(0.0, float(MOST), open_low=True)]
Weight = Annotated[float, Bound(0.0, float(MOST), said=f"from 0 to {MOST} (it must not be negative)")]
LearningRate = Annotated[float, Bound(0.0, 1.0, open_low=True)]
Share = Annotated[float, Bound(0.0, 1.0)]
PartialShare = Annotated[float, Bound(0.0, 1.0, open_high=True)]
Chance = Annotated[float, Bound(0.0, 1.0, open_low=True, open_high=True)]
Names = Annotated[Sequence[str], Listed()]    # one or many: a text alone is a list of one
SomeNames = Annotated[Sequence[str], Listed(some=True)]
Words = Annotated[Sequence[Text], Listed(once=False)]    # the same, where one may stand there twice
Layers = Annotated[int | Sequence[Layer], Listed(some=True, alone=True)]    # one or many, as those that follow
AnyLayers = Annotated[int | Sequence[Layer], Listed(alone=True)]    # the same, where none are right too
Strengths = Annotated[float | Sequence[Strength], Listed(some=True, alone=True)]
Mentions = Annotated[int | Sequence[Annotated[int, Bound(-MOST, MOST)]], Listed(some=True, alone=True)]
Places = Annotated[str | Sequence[str], Listed(alone=True)]    # names of which one alone is meant often
PathText = Annotated[str, Made(path_text, "a text or a path", str | Path)]    # a name that may be a path
File = Annotated[Path | str, Made(lambda value: Path(path_text(value)), "a path (a text, or a Path)", str | Path)]
Files = Annotated[Path | str | Sequence[File], Listed(once=False, alone=True)]


def many(value: T | Sequence[T]) -> tuple[T, ...]:
    """One or many as many: what `takes` has checked, under its narrower type."""
    return tuple(value) if isinstance(value, (Sequence, range)) and not isinstance(value, str) else (value,)    # type: ignore[arg-type]


# ---- one value ---------------------------------------------------------------------------------------------------------


def checked(value: Any, hint: Any, name: str, kind: type[AlignblindError], *, bounds: bool = True) -> Any:
    """A value as its type asks for it (whole numbers of numpy become int, lists tuples); `bounds` False asks for its form alone.

    Types that say nothing of numbers, texts or lists of them are not looked into. Errors: `kind` for any other value.
    """
    base, marks = _parts(hint)
    made = next((mark for mark in marks if isinstance(mark, Made)), None)
    if made is not None:
        return _made(value, made, name, kind)
    if any(mark.alone for mark in marks if isinstance(mark, Listed)):
        return _one_or_many(value, hint, name, kind, bounds)
    origin = get_origin(base)
    if origin in (Union, UnionType):
        return _any_of(value, get_args(base), hint, name, kind, bounds)
    if origin is Literal:
        if value not in get_args(base):
            raise kind(f"unknown {name} {shown(value)}. Known: {', '.join(map(str, get_args(base)))}.")
    elif base in (int, float):
        return _number(value, hint, name, kind, bounds)
    elif origin is Sequence or (origin is tuple and get_args(base)[-1] is Ellipsis):
        return _list(value, hint, name, kind, bounds)
    elif base is bool and type(value).__name__ in ("bool", "bool_"):    # numpy's too
        return bool(value)
    elif base in SAID or _is_class(base) or origin in (dict, Mapping):
        plain = origin or base
        if not isinstance(value, plain):
            raise kind(f"{name} must be {said(base)}, got {shown(value)}.")
        if bounds and base is str:
            _check_text(value, marks, name, kind)
    return value


def _check_text(value: str, marks: Sequence[Any], name: str, kind: type[AlignblindError]) -> None:
    for mark in marks:
        problem = mark.problem(value) if isinstance(mark, Plain) else ""
        if problem:
            raise kind(f"{name} {problem}: expected {'a name' if mark.name else 'a plain text'}, got {shown(value)}.")


def said(hint: Any) -> str:
    """A type in words, without its bounds."""
    base, marks = _parts(hint)
    for mark in marks:
        if isinstance(mark, Made):
            return mark.said
    if get_origin(base) in (Union, UnionType):
        return " or ".join(dict.fromkeys(said(option) for option in get_args(base)))
    if get_origin(base) in (tuple, Sequence):
        return f"a list of which each is {said(get_args(base)[0])}"
    if is_dataclass(base) and all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(base)):
        return f"a mapping of {', '.join(field.name for field in fields(base))}"
    return SAID.get(base) or (f"{'an' if base.__name__[0] in 'AEIOU' else 'a'} {base.__name__}" if _is_class(base) else "a mapping")


def _is_class(hint: Any) -> bool:
    """Whether a type is a class whose instances are known as such: not one of jaxtyping's, which say shapes, nor a generic one."""
    plain = isinstance(hint, type) and get_origin(hint) is None and hint not in (object, Any, inspect.Parameter.empty)
    return plain and not hint.__module__.startswith("jaxtyping") and not getattr(hint, "_is_protocol", False)


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its marks, and the marks."""
    return (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _made(value: Any, made: Made, name: str, kind: type[AlignblindError]) -> Any:
    try:
        return made.by(value)
    except TypeError:
        raise kind(f"{name} must be {made.said}, got {shown(value)}.") from None


def _one_or_many(value: Any, hint: Any, name: str, kind: type[AlignblindError], bounds: bool) -> Any:
    """A list as its type asks for it; what has the form of a member is a list of it."""
    base, marks = _parts(hint)
    options = get_args(base) if get_origin(base) in (Union, UnionType) else (base,)
    lists = next(option for option in options if get_origin(_parts(option)[0]) in (tuple, Sequence))
    if value is None and NoneType in options:
        return None
    if not isinstance(value, (list, tuple, range)):
        try:
            checked(value, get_args(_parts(lists)[0])[0], name, kind, bounds=False)
            value = (value,)
        except kind as error:
            if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
                raise kind(f"{name} must be {said(get_args(_parts(lists)[0])[0])}, or a list of such, got {shown(value)}.") from error
    return _list(value, Annotated[lists, *marks], name, kind, bounds)


def _any_of(value: Any, options: Sequence[Any], hint: Any, name: str, kind: type[AlignblindError], bounds: bool) -> Any:
    """The value as the first of several types that it has the form of."""
    if value is None and NoneType in options:
        return None
    others = [option for option in options if option is not NoneType]
    if len(others) == 1 and any(isinstance(mark, Listed) for mark in _parts(others[0])[1]):
        return checked(value, others[0], name, kind, bounds=bounds)    # which says which member is wrong
    for option in others:
        try:
            checked(value, option, name, kind, bounds=False)
        except kind:
            continue
        return checked(value, option, name, kind, bounds=bounds)
    lists = [option for option in others if get_origin(_parts(option)[0]) in (tuple, Sequence)]
    if lists and not isinstance(value, str):
        return checked(value, lists[0], name, kind, bounds=bounds)    # which says which member is wrong
    raise kind(f"{name} must be {said(hint)}, got {shown(value)}.")


def _number(value: Any, hint: Any, name: str, kind: type[AlignblindError], bounds: bool) -> int | float:
    base, marks = _parts(hint)
    form = numbers.Integral if base is int else numbers.Real
    if not isinstance(value, form) or isinstance(value, bool):
        raise kind(f"{name} must be {SAID[base]}, got {shown(value)}.")
    plain: int | float = int(value) if isinstance(value, numbers.Integral) else value if isinstance(value, float) else float(value)
    if bounds:
        for bound in (mark for mark in marks if isinstance(mark, Bound)):
            finite = _finite(plain)
            if not (finite and bound.holds(plain)):    # only then is the sentence made
                usual = f"{name} must be {bound if finite else 'a finite number'}, got {{value}}."
                raise kind((bound.sentence or usual).replace("{name}", name).replace("{value}", shown(plain)))
    return plain


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:    # a whole number beyond all floats
        return False


def _list(value: Any, hint: Any, name: str, kind: type[AlignblindError], bounds: bool) -> tuple[Any, ...]:
    """A list as a tuple of its members. For a Sequence of texts a text alone is one of them, not its letters."""
    base, marks = _parts(hint)
    each = get_args(base)[0]
    if isinstance(value, str) and get_origin(base) is Sequence and _is_text(each):
        value = (value,)
    right = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, set, frozenset)) and getattr(value, "ndim", 1) != 0
    if not right:
        raise kind(f"{name} must be {said(base)}, got {shown(value)}.")
    found = tuple(checked(one, each, name if _is_text(each) and get_origin(each) is Literal else f"{name}[{i}]", kind, bounds=bounds)
                  for i, one in enumerate(_bounded(value, name, kind)))
    if bounds and any(mark.once for mark in marks if isinstance(mark, Listed)):
        seen: set[Any] = set()
        twice = [one for one in found if one in seen or seen.add(one)]    # type: ignore[func-returns-value]
        if twice:
            raise kind(f"{name} names {shown(twice[0])} twice: give each once.")
    if bounds and not found and any(mark.some for mark in marks if isinstance(mark, Listed)):
        raise kind(f"{name} is empty: give one at least.")
    return found


def _bounded(value: Iterable[Any], name: str, kind: type[AlignblindError]) -> Iterable[Any]:
    steps = max(0, (value.stop - value.start) // value.step) if isinstance(value, range) else 0    # len may overflow
    size = len(value) if isinstance(value, Sized) and not steps else steps
    if size > MOST:
        raise kind(f"{name} has {shown(size)} members: {MOST} are the most.")
    return value


def _is_text(hint: Any) -> bool:
    base, _ = _parts(hint)
    if get_origin(base) in (Union, UnionType):
        return any(_is_text(option) for option in get_args(base))
    return base is str or (get_origin(base) is Literal and all(isinstance(one, str) for one in get_args(base)))


RIGHT = Remembered(50_000)


# ---- classes and functions ---------------------------------------------------------------------------------------------


def check_fields(settings: Any, kind: type[AlignblindError]) -> None:
    """Check every field of a frozen dataclass by its type, from `__post_init__`. Errors: `kind` in one sentence that names the field.

    What was found right once is not checked again: a grid of patches has the same few sites tens of thousands of times.
    """
    hints = _hints(settings.__class__)
    values = tuple([getattr(settings, name) for name, _ in hints])
    if RIGHT.has(settings.__class__, values):
        return
    right = [checked(given, hint, name, kind) for (name, hint), given in zip(hints, values, strict=True)]
    for (name, _), given, value in zip(hints, values, right, strict=True):
        if value is not given:
            object.__setattr__(settings, name, value)
    if all(value is given for value, given in zip(right, values, strict=True)):
        RIGHT.add(settings.__class__, values)


def widened(cls: type[T]) -> type[T]:
    """A dataclass (decorate it above `@dataclass`) whose `__init__` says what it takes: more than its fields are, where these are made of
    what is given (`Made`) or one alone is a list of one. `check_fields` in its `__post_init__` makes them what they are."""
    hints = get_type_hints(cls, include_extras=True)
    cls.__init__.__annotations__ |= {field.name: _given(hints[field.name]) for field in fields(cls)    # type: ignore[arg-type]
                                     if _given(hints[field.name]) is not hints[field.name]}
    return cls


def _given(hint: Any) -> Any:
    """What may be given for a field of this type."""
    base, marks = _parts(hint)
    if get_origin(base) in (Union, UnionType):
        wider = tuple(_given(option) for option in get_args(base))
        return hint if wider == get_args(base) else Union[wider]    # noqa: UP007 - of types that are found out here
    for mark in marks:
        if isinstance(mark, Made):
            return mark.given
        if isinstance(mark, Listed) and mark.alone:
            each = _parts(get_args(base)[0])[0]
            return each | Sequence[each]    # type: ignore[valid-type]
    return hint


@functools.cache
def _hints(kind: Any) -> tuple[tuple[str, Any], ...]:
    """The fields of a dataclass and their types, also where these are written in quotes."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field.name, hints[field.name]) for field in fields(kind))


def takes(kind: type[AlignblindError]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose arguments are checked by their types before it runs, as far as these are types of this module.

    Errors: `kind` in one sentence that names the argument.
    """
    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        hints = {name: parameter.annotation for name, parameter in signature.parameters.items() if _says(parameter.annotation)}
        if any(isinstance(parameter.annotation, str) for parameter in signature.parameters.values()):
            raise TypeError(f"{function.__qualname__} has annotations in quotes, which say nothing here: name the types themselves.")

        @functools.wraps(function)
        def checking(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name, value in given.arguments.items():
                if name in hints:
                    given.arguments[name] = checked(value, hints[name], name, kind)
            return function(*given.args, **given.kwargs)

        return checking

    return decorate


def _says(hint: Any) -> bool:
    """Whether a type says anything that is checked here."""
    base, marks = _parts(hint)
    if isinstance(base, list) or get_origin(base) is Callable:    # what a function takes
        return False
    plain = get_origin(base) is Literal or _is_class(base)
    return plain or any(isinstance(mark, (Bound, Listed, Made, Plain)) for mark in marks) or any(_says(part) for part in get_args(base))
