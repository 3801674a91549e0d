"""What was found right once. Knows values and their types; does NOT know what makes them right."""

from types import NoneType
from typing import Any

_PLAIN = {int, float, str, bool, NoneType}


class Remembered:
    """Fields of classes that were found right, at most so many. Only numbers, texts and tuples of these are known again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[Any] = set()

    def has(self, cls: type, values: tuple[Any, ...]) -> bool:
        """Whether the very same values, of the same types, were right."""
        key = _key(cls, values)
        return key is not None and key in self._known

    def add(self, cls: type, values: tuple[Any, ...]) -> None:
        """These were right."""
        key = _key(cls, values)
        if key is not None and len(self._known) < self._most:
            self._known.add(key)


def _key(cls: type, values: tuple[Any, ...]) -> Any:
    """Values with their types, as 1, 1.0 and True are equal; None for values of other kinds."""
    types = tuple(map(type, values))
    inner = tuple([tuple(map(type, value)) for value in values if type(value) is tuple])
    plain = all(kind in _PLAIN for kind in types if kind is not tuple) and all(kind in _PLAIN for one in inner for kind in one)
    return (cls, values, types, inner) if plain else None
