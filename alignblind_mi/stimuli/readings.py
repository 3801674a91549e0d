"""Free-text interpretations of a hidden representation -> the sense that they speak of, by the concept's lexicons.

A reading is the name of a sense, or OTHER for a text that names none (an unscored text is its own outcome, never a sense). Reads the
interpretation files in the released layout as well. This module does NOT know models.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.borders.reading import TABLE, check_file, foreign, loads, parsed, read_text
from alignblind_mi.borders.settings import File, takes
from alignblind_mi.borders.texts import encodable, encodable_row
from alignblind_mi.errors import ScoreError
from alignblind_mi.stimuli.concept import Concept, ConceptError

OTHER = "other"
FIELDS = ("prompt", "interpretation", "layer", "token", "token_decoded")


def classify(text: str, concept: Concept) -> str:
    """The sense that a text speaks of: the one with more words and phrases of its lexicon in it, OTHER if there are none.

    Words are matched whole and in any case; the longest phrase wins where several begin at the same place, and nothing is counted twice
    ("people of color" is one mention of race, not one of colour). Of equally many, the sense that is named first decides.
    """
    bare = next((sense.name for sense in concept.both_senses() if not sense.lexicon), None)
    if bare is not None:
        raise ConceptError(f"the sense {bare!r} of {concept.name!r} has no lexicon: free texts cannot be classified. Give it a `lexicon`.")
    pattern, sense_of = _lexicon(tuple((sense.name, sense.lexicon) for sense in concept.senses.values()))
    found = [sense_of[" ".join(match.group().lower().split())] for match in pattern.finditer(text)]
    return max(dict.fromkeys(found), key=found.count, default=OTHER)


@lru_cache
def _lexicon(entries: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    sense_of = {" ".join(phrase.lower().split()): name for name, phrases in entries for phrase in phrases}
    longest_first = sorted(sense_of, key=len, reverse=True)
    words = "|".join(r"\s+".join(map(re.escape, phrase.split())) for phrase in longest_first)
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE), sense_of


def reading_names(concept: Concept) -> list[str]:
    """What `classify` can give: the senses of the concept, the group's first, then OTHER."""
    both = [sense.name for sense in concept.both_senses()]
    return [*both, *(name for name in concept.senses if name not in both), OTHER]


def is_interpretations(path: Path) -> bool:
    """Whether a .json or .jsonl file holds interpretations, one JSON object a line, by its first line.

    Errors: ScoreError for a file that cannot be read.
    """
    if path.suffix.lower() not in (".json", ".jsonl"):
        return False
    check_file(path, "", ScoreError)
    with foreign(f"{path} cannot be read", ScoreError), path.open("r", encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        entry = json.loads(first)
    except (ValueError, RecursionError):
        return False    # JSON that is not one object a line: `released` reads it
    return isinstance(entry, dict) and "interpretation" in entry


@takes(ScoreError)
def read_interpretations(path: File) -> pd.DataFrame:
    """Rows of a released interpretation file: model (the file's stem), prompt, interpretation, layer, token, token_decoded.

    A line whose `interpretation` is a list of texts gives one row each; null is an empty text.

    Errors: ScoreError naming the file, the line and what was expected.
    """
    path = Path(path)
    rows = [encodable_row(row) for number, line in _lines(path) for row in _rows(path, number, line)]
    if not rows:
        raise ScoreError(f"{path} holds no interpretations. Expected one JSON object a line with {', '.join(FIELDS)}.")
    return pd.DataFrame.from_records(rows).assign(model=encodable(path.stem))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    text = read_text(path, "", ScoreError, limit=TABLE)
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _rows(path: Path, number: int, line: str) -> Iterator[dict[str, Any]]:
    where = f"{path}, line {number}"
    entry = parsed(loads, line, f"{where} is not valid JSON", ScoreError, f"expected one object a line with {', '.join(FIELDS)}")
    if not isinstance(entry, dict) or "interpretation" not in entry:
        raise ScoreError(f"{where} has no field 'interpretation'. Expected one object a line with {', '.join(FIELDS)}.")
    nested = [name for name in FIELDS if name != "interpretation" and isinstance(entry.get(name), list | dict)]
    if nested:
        raise ScoreError(f"{where}: the field {nested[0]!r} is nested. Expected one object a line with {', '.join(FIELDS)}.")
    texts = entry["interpretation"] if isinstance(entry["interpretation"], list) else [entry["interpretation"]]
    for text in texts:
        text = "" if text is None else text
        if not isinstance(text, str):
            raise ScoreError(f"{where}: the interpretation is not a text but {json.dumps(text)[:60]}.")
        yield {**{name: entry.get(name) for name in FIELDS}, "interpretation": text}
