"""Reads the result files released with "Aligned but Blind" (Sun et al. 2025) into this project's tidy rows, one per answer.

Layout of a file: {"<unmarked> <marked> <positive> <negative>": {"<template>": ["<prompt and answer>", flag], ...}, ...}. The four names are
recovered from the prompt text by the concept's templates, so that names of several words work, and their roles from the key. The stored
flags are not read: they follow different codes in different files. This module does NOT judge answers, nor know any group or word.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.borders.reading import TABLE, is_file, loads, named, parsed, read_text
from alignblind_mi.borders.texts import encodable_row
from alignblind_mi.errors import ScoreError
from alignblind_mi.stimuli.answers import asks_again
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, Concept, Template, load_concept

LAYOUT = '{"<unmarked> <marked> <positive> <negative>": {"<template>": ["<prompt and answer>", <flag>], ...}, ...}'
_PROMPT_END = "My Answer:"


def read_released(path: Path, concept: Concept | None = None) -> pd.DataFrame:
    """Rows of one released file, in its order; `concept` (default: race) gives the templates, cues and category names.

    Columns: model, treatment ("as released"), cue, category, kind, design ("published"), template, option_order, word_order, marked,
    unmarked, positive, negative, word_pair, statement, answer. model, cue and category are read from the file's name (and its folders);
    where that says nothing, the cue and category are those of the concept that hold the names, and model is the file's stem.
    Orders are empty where neither the prompt nor the template tells them.

    Errors: ScoreError naming the file, the key and what was expected.
    """
    path, concept = Path(path), concept or load_concept(DEFAULT_CONCEPT)
    records = [_row(item, concept) for item in _items(path, _load(path))]
    rows = [encodable_row({**_source(path, record, concept), **record}) for record in records]
    return pd.DataFrame.from_records(rows).drop(columns="prefix")


def _load(path: Path) -> dict[str, Any]:
    if not is_file(path):
        raise ScoreError(f"{named('', path)} does not exist or is not a file: give the path of a result file.")
    text = read_text(path, "", ScoreError, limit=TABLE)
    data = parsed(loads, text, f"{path} is not complete, valid JSON", ScoreError, "download or write it anew")
    if not isinstance(data, dict) or not data:
        found = "an empty object" if data == {} else f"a JSON {_kind_of(data)}"
        raise ScoreError(f"{path} holds {found}, not released answers. Expected {LAYOUT}.")
    return data


def _kind_of(data: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(data), type(data).__name__)


@dataclass(frozen=True)
class _Item:
    """One stored answer and where it stands in its file."""

    path: Path
    key: str
    template: str
    text: str

    def error(self, problem: str) -> ScoreError:
        """What is wrong with this item, and where it is."""
        return ScoreError(f"{self.path}, key {self.key!r}, template {self.template!r}: {problem}")


def _items(path: Path, data: Mapping[str, Any]) -> Iterator[_Item]:
    for key, templates in data.items():
        if not isinstance(templates, dict) or not templates:
            raise ScoreError(f"{path}, key {key!r}: expected template names with answers, found {_shown(templates)}. Expected {LAYOUT}.")
        for template, entry in templates.items():
            text = entry[0] if isinstance(entry, list) and entry else entry
            item = _Item(path, key, template, text if isinstance(text, str) else "")
            if not isinstance(text, str):
                raise item.error(f"expected [text, flag], found {_shown(entry)}.")
            yield item


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"a {_kind_of(value)}: {text if len(text) <= 60 else text[:57] + '...'}"


# --- one answer ---------------------------------------------------------------------------------------------------------------------------


def _row(item: _Item, concept: Concept) -> dict[str, str]:
    """The columns that the key, the template's name and the text tell; `prefix` is what stands before the question."""
    template = next((t for t in (*concept.implicit, *concept.explicit) if t.name == item.template), None)
    found = _prompt(item.text, concept, template)
    if found:
        known, match = found
        return _from_prompt(item, known, match)
    return _from_key(item, template)


def _prompt(text: str, concept: Concept, named: Template | None) -> tuple[Template, re.Match[str]] | None:
    """The template that the text begins with (after a cue's prefix), the one it is named after first."""
    candidates = [*([named] if named else []), *concept.implicit, *concept.explicit]
    for template in candidates:
        match = _question(template.text).search(text)
        if match and not asks_again(text[: match.start()]) and _PROMPT_END not in text[: match.start()]:
            return template, match
    return None


@lru_cache(maxsize=256)
def _question(text: str) -> re.Pattern[str]:
    """Matches a template's text with any names in its fields, any white space and any case."""
    seen: set[str] = set()
    pattern = ""
    for piece in re.split(r"(\{\w+\})", text.strip()):
        name = piece[1:-1] if piece.startswith("{") else ""
        if name:
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>\\S(?:[^\\n]{{0,80}}?\\S)?)"
            seen.add(name)
        else:
            pattern += re.sub(r"(?:\\?\s)+", r"\\s+", re.escape(piece))
    return re.compile(pattern, re.IGNORECASE)


def _from_prompt(item: _Item, template: Template, match: re.Match[str]) -> dict[str, str]:
    named = match.groupdict()
    identifiers, words = (named["first"], named["second"]), (named["word1"], named["word2"])
    roles = _roles(item.key, identifiers, words)
    if roles is None:
        raise item.error(f"the prompt asks about {', '.join((*identifiers, *words))}, which the key does not name. Expected a key "
                         f"'<unmarked> <marked> <positive> <negative>' of these four.")
    marked_first = roles["marked"] == identifiers[0]
    ties_negative = named.get("negative", roles["negative"]).casefold() == roles["negative"].casefold()
    return {
        **_labels(item, template.kind, roles),
        "option_order": f"{'marked' if marked_first else 'unmarked'}_first",
        "word_order": f"{'positive' if roles['positive'] == words[0] else 'negative'}_first",
        "statement": _statement(template.kind, marked_first == ties_negative),
        "prefix": item.text[: match.start()].strip(), "answer": item.text[match.end() :],
    }


def _roles(key: str, identifiers: tuple[str, str], words: tuple[str, str]) -> dict[str, str] | None:
    """Role -> name, by the order in which the key has them; None if it does not have them all."""
    wanted = " ".join(key.split()).casefold()
    for (unmarked, marked), (positive, negative) in product((identifiers, identifiers[::-1]), (words, words[::-1])):
        if " ".join(" ".join((unmarked, marked, positive, negative)).split()).casefold() == wanted:
            return {"marked": marked, "unmarked": unmarked, "positive": positive, "negative": negative}
    return None


def _from_key(item: _Item, template: Template | None) -> dict[str, str]:
    """Where the text has no known prompt: the key's four words, and the order of the template if its name is known."""
    parts = item.key.split()
    if len(parts) != 4:
        raise item.error("the text has no prompt of the concept, and the key is not four words. Expected '<unmarked> <marked> <positive> "
                         "<negative>'.")
    kind = template.kind if template else item.template.split("_")[0].lower()
    if kind not in ("implicit", "explicit") or (kind == "explicit" and template is None):
        raise item.error("neither the template's name nor the text tells which question was asked. Expected a template of the concept, "
                         "such as 'implicit_random0' or 'explicit_variation0'.")
    before, end, after = item.text.partition(_PROMPT_END)
    has_prompt = bool(end) and (template is None or asks_again(before))
    return {
        **_labels(item, kind, dict(zip(("unmarked", "marked", "positive", "negative"), parts, strict=True))),
        "option_order": f"{template.first}_first" if template else "", "word_order": f"{template.word1}_first" if template else "",
        "statement": _statement(kind, template is not None and template.first == "marked"),
        "prefix": "", "answer": after if has_prompt else item.text,
    }


def _labels(item: _Item, kind: str, roles: Mapping[str, str]) -> dict[str, str]:
    pair = f"{roles['positive']}|{roles['negative']}"
    return {"kind": kind, "design": "published", "template": item.template, **roles, "word_pair": pair}


def _statement(kind: str, states_stereotype: bool) -> str:
    return "" if kind == "implicit" else "stereotype" if states_stereotype else "reverse"


# --- where a file comes from --------------------------------------------------------------------------------------------------------------


def _source(path: Path, row: Mapping[str, str], concept: Concept) -> dict[str, str]:
    """model, treatment, cue and category: from the file's name and folders, else from the names in the row."""
    cue, rest = _cue_of(path, concept)
    category, bias, tag = rest.partition("_bias_results")
    model = tag.strip("_").removesuffix("deterministic").strip("_") if bias else ""
    return {
        "model": model or path.stem, "treatment": "as released", "cue": cue or _cue_with(row, concept),
        "category": _category_of(category if bias else "", path.stem, row, concept),
    }


def _cue_of(path: Path, concept: Concept) -> tuple[str, str]:
    """The cue that the file's name begins with, or a parent folder is called; and the rest of the file's stem."""
    for name in sorted(concept.cues, key=len, reverse=True):
        if path.stem.startswith(f"{name}_"):
            return name, path.stem[len(name) + 1 :]
    folder = next((parent.name for parent in path.absolute().parents if parent.name in concept.cues), "")
    return folder, path.stem


def _cue_with(row: Mapping[str, str], concept: Concept) -> str:
    """The cue with these identifiers and the prompt's prefix."""
    having = [cue for cue in concept.cues.values() if row["marked"] in cue.marked and row["unmarked"] in cue.unmarked]
    return next((cue.name for cue in having if cue.prefix.strip() == row["prefix"]), having[0].name if having else "unknown")


def _category_of(part: str, stem: str, row: Mapping[str, str], concept: Concept) -> str:
    """The category released under this name, else as the file calls it, else the one that has the row's words."""
    for category in concept.categories.values():
        if category.released_as and (part == category.released_as or (not part and category.released_as in stem)):
            return category.name
    having = (c.name for c in concept.categories.values() if row["positive"] in c.positive and row["negative"] in c.negative)
    return part or next(having, "unknown")
