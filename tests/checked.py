"""The types of every call are checked while the tests run: shapes by jaxtyping, everything else by beartype alone.

jaxtyping's import hook wraps every function for shapes, also the many whose arguments hold no array; binding their arguments at each call
more than doubled the time of the tests. Here only functions and dataclasses that name an array are wrapped by jaxtyping; the others get
beartype's own check of the same annotations. A function that is called more than `ALWAYS` times is checked at each `THEN`-th call from
there on: what differs between thousands of calls of one function is seldom a type, and their checks took a fifth of the time. A function
within a function is made anew at each call of the outer one, and making its check takes milliseconds: the first `WITHIN` have one. To be
imported before the package.
"""

import dataclasses
import functools
import inspect
import itertools
import re
import typing
from collections import Counter, defaultdict
from collections.abc import Iterator
from types import CodeType

import jaxtyping
from beartype import BeartypeConf, beartype

ALWAYS, THEN, WITHIN = 50, 100, 5
_jaxtyped = jaxtyping.jaxtyped
_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def _plain(function):
    """beartype's check of what can be looked up where the function stands; a name that only a type checker imports is not checked."""
    written, hints = function.__annotations__, {}
    for name, one in written.items():
        holder = type("holder", (), {"__annotations__": {name: one}})
        try:
            hints[name] = typing.get_type_hints(holder, function.__globals__, include_extras=True)[name]
        except (NameError, TypeError):    # `pd.Series[bool]` is for type checkers alone
            hints[name] = typing.Any
    function.__annotations__ = hints
    done = _beartype(function)
    function.__annotations__ = done.__annotations__ = written
    return done


def _names_an_array(annotations: dict, known: dict) -> bool:
    """Whether an annotation, a type or the text of one, is made of jaxtyping's types."""
    parts = [part for one in annotations.values() for part in (map(known.get, re.findall(r"\w+", one)) if isinstance(one, str) else [one])]
    return any("jaxtyping" in repr(part) for part in parts)


def _often(function, tested, calls):
    """`tested` for the first calls and some of the later ones, `function` itself for the others."""
    @functools.wraps(function)
    def called(*args, **kwargs):
        number = next(calls)
        return (tested if number < ALWAYS or number % THEN == 0 else function)(*args, **kwargs)

    return called


def checked(*, typechecker):
    """The decorator that jaxtyping's import hook puts on every function and class, cheaper where no array is named."""
    shaped = _jaxtyped(typechecker=typechecker)
    made: Counter[CodeType] = Counter()
    calls: defaultdict[CodeType, Iterator[int]] = defaultdict(itertools.count)

    def tested(function):
        return shaped(function) if _names_an_array(function.__annotations__, function.__globals__) else _plain(function)

    def decorate(thing):
        if isinstance(thing, (classmethod, staticmethod)):
            return type(thing)(decorate(thing.__func__))
        if isinstance(thing, property):
            return property(*(one and decorate(one) for one in (thing.fget, thing.fset, thing.fdel)))
        if inspect.isclass(thing):
            if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
                thing.__init__ = _often(thing.__init__, tested(thing.__init__), itertools.count())
            return thing
        if "<locals>" in thing.__qualname__:
            made[thing.__code__] += 1
            if made[thing.__code__] > WITHIN:
                return thing
        return _often(thing, tested(thing), calls[thing.__code__])

    return decorate


jaxtyping.jaxtyped = checked
