"""What is wrong with a concept file: every problem at once, each one sentence with its place in the file.

Works on the tables of a TOML file as they were read, so that a misspelt or missing field is named where it stands and hides nothing else.
It does NOT know models or tokenizers, nor how a sound concept is used.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from alignblind_mi.borders.texts import visible
from alignblind_mi.borders.writing import name_problem
from alignblind_mi.stimuli.concept_fields import _FIELDS, FILE, entries, fits, list_place, shown, size_problems, table_problems

FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
UNTESTED = 3    # words of either side of a competence set that are kept for tuning and worked examples
LEAST_CONTEXTS = 6    # sentences a sense and split: fewer tell nothing of sentences that a probe has not seen
QUESTION = "paper"    # the interpretation question that treatments are compared with
SCALES = ("", "likert", "agree")
PAIRINGS = ("parallel", "crossed")
ROLES, VALENCES, SPLITS = ("marked", "unmarked"), ("positive", "negative"), ("train", "test")
TEMPLATE_FIELDS = {*ROLES, *VALENCES, "first", "second", "word1", "word2"}
REQUIRED_FIELDS = {"implicit": {"first", "second", "word1", "word2"}, "explicit": {"first", "second", "positive", "negative"}}
ASSIGNMENT_FIELDS = {"word1", "option1", "word2", "option2"}
SENSE_TABLES = ("controls", "interpretations", "selfie", "contexts", "awareness")    # what only a concept with senses can use


def concept_problems(data: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the content of a concept file, in the order of its tables; empty when it is sound.

    Each is one sentence without its full stop that begins with the place: "[cues.default] marked: ...". What is missing, misspelt or of
    a wrong type is said once, and what depends on it is not judged.
    """
    found = size_problems("", data, 0) or _content_problems(data)    # nothing else of what is too large: it could take for ever
    return list(dict.fromkeys(visible(one, lines=False) for one in found))    # names in a file may hold line breaks


def _content_problems(data: Mapping[str, Any]) -> list[str]:
    found = table_problems("", data, FILE)
    sound = {name: value for name, value in data.items() if name in FILE and fits(value, FILE[name].kind)}
    for name, value in sound.items():
        for place, entry, fields in entries(name, value):
            found += table_problems(place, entry, fields)
    checks = (_name_problems, _cue_problems, _category_problems, _template_problems, _assignment_problems, _sense_problems,
              _question_problems, _context_problems, _instruction_problems, _competence_problems, _awareness_problems)
    for check in checks:
        found += check(_Sound(sound))
    return found


def template_fields(text: str) -> set[str]:
    """Names of the {fields} in a template text.

    A field is a plain name in braces. Errors: ValueError for any other brace: without its partner, {}, {0}, {x!r}, {x:>9}, {x.y}, {x[0]}.
    """
    rest = FIELD.sub("", text)
    if rest.count("{") != rest.count("}"):
        raise ValueError(f"the braces of {shown(text)} do not pair up")
    if "{" in rest:
        raise ValueError(f"{shown(text)} has braces that are no plain field such as {{x}}: no number, conversion, format, "
                         "attribute or index may stand in them")
    return set(FIELD.findall(text))


# ---- size ----------------------------------------------------------------------------------------------------------------


# ---- form ----------------------------------------------------------------------------------------------------------------


class _Sound:
    """What of a file has its right form; the rest is as if it were not there."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def text(self, name: str) -> str:
        return str(self.data.get(name, ""))

    def tables(self, name: str) -> dict[str, dict[str, Any]]:
        """The named tables of a field, each with those of its own fields that have the right form."""
        return {key: self._own(entry, name) for key, entry in self.data.get(name, {}).items()}

    def table(self, name: str) -> dict[str, Any]:
        return self._own(self.data.get(name, {}), name)

    def templates(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """(place, template) of a kind."""
        return [(list_place(kind, i, entry), self._own(entry, kind)) for i, entry in enumerate(self.data.get(kind, []))]

    @property
    def both(self) -> tuple[str, str]:
        """The names of the two senses, group first; empty where there are none."""
        return self.text("group_sense"), self.text("other_sense")

    @staticmethod
    def _own(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key in _FIELDS[name] and fits(value, _FIELDS[name][key].kind)}


def _fields_of(place: str, text: str, judge: Callable[[set[str]], str]) -> list[str]:
    """What `judge` says of the {fields} of a text, or that its braces do not pair up."""
    try:
        said = judge(template_fields(text))
    except ValueError as error:
        return [f"{place}: {error}"]
    return [f"{place}: {said}"] if said else []


def _exactly(wanted: set[str], text: str) -> Callable[[set[str]], str]:
    names = " and ".join(f"{{{name}}}" for name in sorted(wanted))
    many = f"the fields {names}" if len(wanted) > 1 else f"the one field {names}"
    return lambda fields: "" if fields == wanted else f"{shown(text)} must have {many}"


def _among(known: set[str], text: str) -> Callable[[set[str]], str]:
    names = "the fields " + " and ".join(f"{{{name}}}" for name in sorted(known)) + " only" if known else "no fields"
    return lambda fields: "" if fields <= known else f"{shown(text)} may have {names}"


def _repeated(place: str, words: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    twice = [word for word in words if word.lower() in seen or seen.add(word.lower())]    # type: ignore[func-returns-value]
    return [f"{place}: {word!r} stands there twice" for word in dict.fromkeys(twice)]


def _blank(place: str, words: Iterable[str]) -> list[str]:
    return [f"{place}: {word!r} is empty or has blanks at its ends" for word in words if word != word.strip() or not word]


def _inside(short: str, long: str) -> bool:
    """Whether one name occurs in another as whole words, in any case."""
    return short.casefold() in long.casefold() and re.search(rf"(?<!\w){re.escape(short)}(?!\w)", long, re.IGNORECASE) is not None


# ---- content -------------------------------------------------------------------------------------------------------------


def _name_problems(file: _Sound) -> list[str]:
    """Names become parts of file names: each must be a plain one (`name_problem`), and another one in small letters too."""
    name = file.text("name")
    found = [] if not name or re.fullmatch(r"[\w-]+", name) else [f"name: {name!r} must be one word of letters, digits, _ and -"]
    found += [f"name: {shown(name)} {problem}" for problem in [name_problem(name)] if name and not found and problem]
    for table, value in file.data.items():
        kind = FILE[table].kind
        names = list(value) if kind == "tables" else [entry.get("name") for entry in value] if kind == "list" else []
        given = [one for one in names if isinstance(one, str) and (one or kind == "tables")]
        found += [f"[{table}] {shown(one)}: the name {problem}" for one in given if (problem := name_problem(one))]
        small = Counter(one.lower() for one in dict.fromkeys(given))
        found += [f"[{table}] {one!r}: some file systems do not tell it from another name in small letters" for one in given
                  if small[one.lower()] > 1]
    return found


def _cue_problems(file: _Sound) -> list[str]:
    found: list[str] = []
    words = {word.lower(): f"[categories.{name}]" for name, entry in file.tables("categories").items()
             for valence in VALENCES for word in entry.get(valence, [])}
    for name, cue in file.tables("cues").items():
        place, pairing = f"[cues.{name}]", cue.get("pairing", "parallel")
        marked, unmarked = cue.get("marked", []), cue.get("unmarked", [])
        for role in ROLES:
            found += _blank(f"{place} {role}", cue.get(role, [])) + _repeated(f"{place} {role}", cue.get(role, []))
        if pairing not in PAIRINGS:
            found.append(f"{place} pairing: must be 'parallel' or 'crossed', not {pairing!r}")
        elif pairing == "parallel" and marked and unmarked and len(marked) != len(unmarked):
            found.append(f"{place}: pairs {len(marked)} marked with {len(unmarked)} unmarked identifiers")
        pairs = [(m, u) for m in marked for u in unmarked] if pairing == "crossed" else list(zip(marked, unmarked, strict=False))
        found += [f"{place}: {short!r} and {long!r} are asked together, and the one contains the other"
                  for pair in pairs for short, long in [sorted(pair, key=len)] if short.strip() and _inside(short, long)]
        found += [f"{place}: the identifier {one!r} is also a word of {words[one.lower()]}" for one in (*marked, *unmarked)
                  if one.lower() in words]
        known = file.tables("categories")
        found += [f"{place} categories: {one!r} is not among the categories ({', '.join(known)})"
                  for one in cue.get("categories", []) if one not in known]
        if cue.get("senses") and not file.tables("senses"):
            found.append(f"{place} senses: is true, but the file has no senses")
    return found


def _category_problems(file: _Sound) -> list[str]:
    found: list[str] = []
    for name, category in file.tables("categories").items():
        place = f"[categories.{name}]"
        for valence in VALENCES:
            found += _blank(f"{place} {valence}", category.get(valence, []))
            found += _repeated(f"{place} {valence}", category.get(valence, []))
        negative = {word.lower() for word in category.get("negative", [])}
        both = [word for word in category.get("positive", []) if word.lower() in negative]
        found += [f"{place}: {word!r} is both positive and negative" for word in both]
    return found


def _competence_problems(file: _Sound) -> list[str]:
    found: list[str] = []
    for name, one in file.tables("competence").items():
        place, sides = f"[competence.{name}]", ("options", "first", "second")
        for side in sides:
            found += _blank(f"{place} {side}", one.get(side, [])) + _repeated(f"{place} {side}", one.get(side, []))
        if len(one.get("options", ["", ""])) != 2:
            found.append(f"{place} options: must be two, one for the words of `first` and one for those of `second`")
        found += [f"{place} {side}: needs more than {UNTESTED} words: the first {UNTESTED} are kept for tuning, and not tested"
                  for side in sides[1:] if 0 < len(one.get(side, [])) <= UNTESTED]
        counts = Counter(word.lower() for side in sides for word in {*one.get(side, [])})
        found += [f"{place}: {word!r} stands on two sides" for word, n in counts.items() if n > 1]
    return found


def _template_problems(file: _Sound) -> list[str]:
    found: list[str] = []
    names: list[str] = []
    for kind in ("implicit", "explicit"):
        for place, template in file.templates(kind):
            names += [template["name"]] if "name" in template else []
            if template.get("text"):
                found += _fields_of(f"{place} text", template["text"], _template_judge(kind))
            if template.get("scale", "") not in SCALES:
                found.append(f"{place} scale: must be 'likert' or 'agree', not {template['scale']!r}")
            order = template.get("published", {})
            for field, known in (("first", ROLES), ("word1", VALENCES)):
                if isinstance(order.get(field), str) and order[field] not in known:
                    found.append(f"{place} published.{field}: must be {known[0]!r} or {known[1]!r}, not {order[field]!r}")
    return found + _repeated("[[implicit]] and [[explicit]] name", names)


def _template_judge(kind: str) -> Callable[[set[str]], str]:
    def judge(fields: set[str]) -> str:
        unknown, lacking = sorted(fields - TEMPLATE_FIELDS), sorted(REQUIRED_FIELDS[kind] - fields)
        said = [f"has the unknown fields {unknown}; known: {sorted(TEMPLATE_FIELDS)}"] if unknown else []
        return "; ".join([*said, *([f"lacks the fields {lacking}"] if lacking else [])])
    return judge


def _assignment_problems(file: _Sound) -> list[str]:
    text = file.text("assignment")
    wanted = "{word1}, {option1}, {word2} and {option2}"
    return _fields_of("assignment", text, lambda fields: "" if fields == ASSIGNMENT_FIELDS else f"{shown(text)} must have the fields "
                      + wanted) if text else []


def _sense_problems(file: _Sound) -> list[str]:
    senses = file.tables("senses")
    roles = dict(zip(("group_sense", "other_sense"), file.both, strict=True))
    if not senses:
        used = [name for name in SENSE_TABLES if file.data.get(name)]
        given = [f"{role}: names {name!r}, but the file has no [senses.{name}]" for role, name in roles.items() if name]
        return given + [f"[{name}]: only a concept with senses can use it, and the file has no [senses]" for name in used]
    found = [f"{role}: the field {role!r} is missing, and there are senses ({', '.join(senses)})" for role, name in roles.items()
             if not name]
    found += [f"{role}: {name!r} is not among the senses ({', '.join(senses)})" for role, name in roles.items()
              if name and name not in senses]
    if roles["group_sense"] and roles["group_sense"] == roles["other_sense"]:
        found.append(f"other_sense: {roles['other_sense']!r} is the group sense as well")
    said: dict[str, str] = {}
    for name, sense in senses.items():
        for field in ("word", "words", "lexicon"):
            words = [sense[field]] if isinstance(sense.get(field), str) else sense.get(field, [])
            place = f"[senses.{name}] {field}"
            found += _repeated(place, words) + (_blank(place, words) if field != "word" else [])
            found += [f"{place}: {word!r} is of another sense as well ({said[f'{field} {word.lower()}']})" for word in words
                      if said.setdefault(f"{field} {word.lower()}", name) != name]
        if isinstance(sense.get("word"), str) and sense["word"] and not sense["word"].strip():
            found.append(f"[senses.{name}] word: is blank")
    for table in ("senses", "controls"):
        for name, entry in file.tables(table).items():
            if entry.get("steering"):
                found += _fields_of(f"[{table}.{name}] steering", entry["steering"], _exactly(set(ROLES), entry["steering"]))
    found += [f"[controls.{name}]: a sense has this name" for name in file.tables("controls") if name in senses]
    if QUESTION not in file.data.get("interpretations", {}):
        found.append(f"[interpretations.{QUESTION}]: is missing; treatments are compared with the question of this name")
    return found


def _question_problems(file: _Sound) -> list[str]:
    found: list[str] = []
    words = {name: sense["word"].strip() for name, sense in file.tables("senses").items() if name in file.both and sense.get("word")}
    for table in ("interpretations", "selfie"):
        for name, question in file.tables(table).items():
            place, text, placeholder = f"[{table}.{name}]", question.get("text", ""), question.get("placeholder", "")
            if text:
                found += _fields_of(f"{place} text", text, _exactly({"x"}, text))
            if text and placeholder and _inside(placeholder, text.replace("{x}", " ")) and placeholder.isalnum():
                found.append(f"{place} placeholder: {placeholder!r} is also a word of the text")
            if table == "interpretations" and text:
                found += [f"{place} text: {shown(text)} does not name the sense word {word!r}" for word in words.values()
                          if word and not _inside(word, text)]
    return found


def _context_problems(file: _Sound) -> list[str]:
    found, senses = list[str](), file.tables("senses")
    for name, contexts in file.tables("contexts").items():
        place = f"[contexts.{name}]"
        if senses and name not in senses:
            found.append(f"{place}: is of no sense; senses: {', '.join(senses)}")
        for split in (*SPLITS, "settled"):
            texts = contexts.get(split, [])
            found += _repeated(f"{place} {split}", texts)
            found += [said for text in texts for said in _fields_of(f"{place} {split}", text, _exactly({"x", "y"}, text))]
            if 0 < len(texts) < LEAST_CONTEXTS:
                found.append(f"{place} {split}: at least {LEAST_CONTEXTS} sentences are needed, not {len(texts)}")
        both = [text for text in contexts.get("train", []) if text in contexts.get("test", [])]
        found += [f"{place}: {shown(text)} is in both train and test" for text in dict.fromkeys(both)]
    if file.tables("contexts"):
        found += [f"[contexts.{name}]: is missing; probes need sentences of both senses" for name in file.both
                  if name in senses and name not in file.tables("contexts")]
    return found


def _instruction_problems(file: _Sound) -> list[str]:
    return [said for name, entry in file.tables("instructions").items() if entry.get("text")
            for said in _fields_of(f"[instructions.{name}] text", entry["text"], _among(set(ROLES), entry["text"]))]


def _awareness_problems(file: _Sound) -> list[str]:
    found, awareness = list[str](), file.table("awareness")
    if awareness.get("separator"):
        found += _fields_of("[awareness] separator", awareness["separator"], _among(set(), awareness["separator"]))
    for name in ("sentences", "restatements", "others"):
        texts, place = awareness.get(name, []), f"[awareness] {name}"
        found += _repeated(place, texts)
        for text in texts:
            wanted = _exactly({"x", "y"}, text) if name == "sentences" else _mentions(text)
            found += _fields_of(place, text, wanted)
    return found


def _mentions(text: str) -> Callable[[set[str]], str]:
    return lambda fields: "" if fields and fields <= {"x", "y"} else f"{shown(text)} must have the field {{x}} or {{y}}, and no other"
