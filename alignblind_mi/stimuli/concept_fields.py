"""The fields of a concept file: which there are, of what kind and size, and what is wrong with the form of a table.

Does NOT know what they mean.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["text", "texts", "flag", "table", "tables", "list"]
LONGEST_TEXT, LONGEST_WORD = 20_000, 200    # characters of any text; of a name, an identifier and a word
MOST_WORDS, MOST_TEXTS = 500, 2_000    # entries of a list of words (each positive one is asked with each negative one); of any other list
_IS: dict[Kind, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda v: isinstance(v, str), "a text in quotes"),
    "texts": (lambda v: isinstance(v, list) and all(isinstance(one, str) for one in v), "a list of texts in quotes"),
    "flag": (lambda v: isinstance(v, bool), "true or false"),
    "table": (lambda v: isinstance(v, dict), "a table"),
    "tables": (lambda v: isinstance(v, dict) and all(isinstance(one, dict) for one in v.values()), "tables with a name each"),
    "list": (lambda v: isinstance(v, list) and all(isinstance(one, dict) for one in v), "a list of tables in double brackets"),
}


class _Field(NamedTuple):
    kind: Kind
    required: bool = False


_TEXT, _WANTED = _Field("text"), _Field("text", True)
_TEXTS, _LISTED = _Field("texts"), _Field("texts", True)
FILE = {
    "name": _WANTED, "description": _TEXT, "group_sense": _TEXT, "other_sense": _TEXT, "assignment": _WANTED,
    "cues": _Field("tables", True), "categories": _Field("tables", True), "senses": _Field("tables"), "controls": _Field("tables"),
    "interpretations": _Field("tables"), "selfie": _Field("tables"), "contexts": _Field("tables"), "instructions": _Field("tables"),
    "competence": _Field("tables"), "awareness": _Field("table"), "implicit": _Field("list", True), "explicit": _Field("list", True),
}
_QUESTION = {"text": _WANTED, "placeholder": _WANTED}
_TEMPLATE = {"name": _WANTED, "text": _WANTED, "scale": _TEXT, "published": _Field("table", True)}
_FIELDS: dict[str, dict[str, _Field]] = {
    "cues": {"marked": _LISTED, "unmarked": _LISTED, "prefix": _TEXT, "pairing": _TEXT, "description": _TEXT, "categories": _TEXTS,
             "senses": _Field("flag")},
    "categories": {"positive": _LISTED, "negative": _LISTED, "released_as": _TEXT, "description": _TEXT},
    "senses": {"word": _WANTED, "steering": _WANTED, "words": _TEXTS, "lexicon": _TEXTS},
    "controls": {"steering": _WANTED},
    "interpretations": _QUESTION,
    "selfie": _QUESTION,
    "contexts": {"train": _LISTED, "test": _LISTED, "settled": _TEXTS},
    "instructions": {"text": _WANTED, "placebo": _Field("flag")},
    "competence": {"options": _LISTED, "first": _LISTED, "second": _LISTED},
    "awareness": {"separator": _WANTED, "sentences": _LISTED, "restatements": _LISTED, "others": _TEXTS},
    "implicit": _TEMPLATE,
    "explicit": _TEMPLATE,
    "published": {"first": _WANTED, "word1": _WANTED},
}
# Fields that hold words.
WORDS = {"marked", "unmarked", "positive", "negative", "word", "words", "lexicon", "placeholder", "name", "options", "first", "second"}


def size_problems(place: str, value: Any, depth: int, field: str = "") -> list[str]:
    """Texts, lists and tables that are larger than anything that can be asked; levels below those of the format are not looked at."""
    longest, most = (LONGEST_WORD, MOST_WORDS) if field in WORDS else (LONGEST_TEXT, MOST_TEXTS)
    if isinstance(value, str):
        said = f"{place}: a text of {len(value)} characters is too long; at most {longest} are allowed here"
        return [said] if len(value) > longest else []
    if not isinstance(value, (dict, list)) or depth > 4:
        return []
    if len(value) > most:
        return [f"{place or 'the file'}: {len(value)} entries are too many; at most {most} are allowed here"]
    if isinstance(value, list):
        return [said for one in value for said in size_problems(place, one, depth + 1, field)][:1]
    found: list[str] = []
    for name, one in value.items():
        if len(name) > LONGEST_WORD:
            found.append(f"{place or 'the file'}: the name {shown(name)} is too long; at most {LONGEST_WORD} characters are allowed")
        else:
            found += size_problems(f"{place}.{name}".lstrip("."), one, depth + 1, name)
    return found


def fits(value: Any, kind: Kind) -> bool:
    """Whether a value is of a kind."""
    return _IS[kind][0](value)


def entries(name: str, value: Any) -> list[tuple[str, Mapping[str, Any], dict[str, _Field]]]:
    """The tables of a top-level field: (place, table, its fields)."""
    kind = FILE[name].kind
    if kind == "tables":
        return [(f"[{name}.{key}]", entry, _FIELDS[name]) for key, entry in value.items()]
    if kind == "list":
        tables = [(list_place(name, i, entry), entry, _FIELDS[name]) for i, entry in enumerate(value)]
        orders = [(f"{place} published", entry["published"], _FIELDS["published"]) for place, entry, _ in tables
                  if isinstance(entry.get("published"), dict)]
        return tables + orders
    return [(f"[{name}]", value, _FIELDS[name])] if kind == "table" else []


def list_place(name: str, index: int, entry: Mapping[str, Any]) -> str:
    """What names an entry of a list of tables."""
    given = entry.get("name")
    return f"[[{name}]] {given!r}" if isinstance(given, str) else f"[[{name}]] number {index + 1}"


def table_problems(place: str, table: Mapping[str, Any], fields: Mapping[str, _Field]) -> list[str]:
    """Unknown, missing and mistyped fields of one table."""
    found, unknown = [], [name for name in table if name not in fields]
    lacking = [name for name, field in fields.items() if field.required and name not in table]
    for name in unknown:
        near = difflib.get_close_matches(name, lacking or [other for other in fields if other not in table], 1)
        found.append(f"{at(place, name)}: this field is unknown or misspelt" + (f"; did you mean {near[0]!r}?" if near else
                                                                               f"; known here: {', '.join(fields)}"))
    found += [f"{at(place, name)}: the field {name!r} is missing" for name in lacking]
    for name, value in table.items():
        if name in fields and not fits(value, fields[name].kind):
            found.append(f"{at(place, name)}: must be {_IS[fields[name].kind][1]}, not {shown(value)}")
        elif name in fields and fields[name].required and not value:
            found.append(f"{at(place, name)}: is empty")
    return found


def at(place: str, name: str) -> str:
    """A field and the table that it stands in."""
    return f"{place} {name}".strip()


def shown(value: Any) -> str:
    """A value as a sentence shows it: at most 60 characters."""
    try:
        shown = repr(value)
    except (RecursionError, ValueError):    # nested too deeply; a number of thousands of digits
        shown = f"a value of the type {type(value).__name__}"
    return shown if len(shown) <= 60 else shown[:57] + "..."
