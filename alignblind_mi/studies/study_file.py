"""A study as a YAML file: the names and types of `StudyConfig` and of what it is made of, each mistake one sentence that names it.

What a file does not say is what `StudyConfig.of` would take for these models: an organism's own recommendations, else the paper's settings.
This module does NOT know what the settings do.
"""

import contextlib
import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from alignblind_mi.borders.reading import SAID as LONGEST, has_halves, read_text, said
from alignblind_mi.borders.settings import File, checked, takes
from alignblind_mi.borders.texts import shown
from alignblind_mi.errors import AlignblindError
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.studies.config import StudyConfig

LIMIT = 256 << 10    # bytes of the largest study file that is read
NUMBERS = {"tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)$"),
           "tag:yaml.org,2002:float": re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
                                                 r"|\.(nan|NaN|NAN))$")}


class StudyFileError(AlignblindError):
    """A study file that cannot be read or says something unknown."""


@takes(StudyFileError)
def read_study_file(path: File) -> StudyConfig:
    """The configuration that a study file describes. Paths in it are relative to the working directory, as on the command line.

    Errors: StudyFileError naming the file and the key that is missing, unknown, given twice or of the wrong type; ModelError, ConceptError
    and LoraError as in Python.
    """
    path = Path(path)
    data = _mapping(path)
    hints = get_type_hints(StudyConfig)
    _check_keys(data, list(hints), path, "")
    models: list[ModelSpec] = []
    for role in ("base", "aligned"):
        if role not in data:
            raise StudyFileError(f"{path}: the key {role!r} is missing: name the {role} model, such as organism:{role}.")
        given = data.pop(role)
        models.append(_made(ModelSpec, {"name": given} if isinstance(given, str) else given, path, role))
    values = {key: _value(hints[key], value, path, key) for key, value in data.items() if not _is_settings(hints[key])}
    asked = set(inspect.signature(StudyConfig.of).parameters)    # what other settings follow from
    try:
        config = StudyConfig.of(*models, **{key: value for key, value in values.items() if key in asked})
    except AlignblindError as error:
        raise type(error)(f"{path}: {error}") from error
    settings = {key: _changed(getattr(config, key), value, path, key) for key, value in data.items() if _is_settings(hints[key])}
    return replace(config, **{key: value for key, value in values.items() if key not in asked}, **settings)


def _is_settings(hint: Any) -> bool:
    """Whether a field is settings of its own, whose other values stay as recommended."""
    return is_dataclass(hint)


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    class Unique(yaml.SafeLoader):
        """A safe loader that refuses a key given twice, of which YAML would drop one without a word, and references to what was written
        elsewhere: a few lines of them stand for gigabytes, or for a list in itself."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            """A node that stands where it is written."""
            if self.check_event(yaml.AliasEvent):
                raise StudyFileError(f"{path}: the reference *{self.peek_event().anchor} is not read: write the value out.")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """A mapping, its keys each once."""
            seen = set()
            for key in (self.construct_object(key, deep=True) for key, _ in node.value):
                if key in seen:
                    raise StudyFileError(f"{path}: the key {shown(key)} is given twice.")
                seen.add(key)
            return super().construct_mapping(node, deep)

    # Numbers as everybody writes them: YAML 1.1 takes 1:30 for 90 and 010 for 8, and 2e-4 for a text.
    Unique.yaml_implicit_resolvers = {first: [(tag, pattern) for tag, pattern in known if tag not in NUMBERS]
                                      for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    for tag, pattern in NUMBERS.items():
        Unique.add_implicit_resolver(tag, pattern, list("-+.0123456789"))
    text = read_text(path, "", StudyFileError, limit=LIMIT, advice="give the path of a YAML study file")
    try:
        data = yaml.load(text, Unique)    # a SafeLoader: plain values alone
    except yaml.YAMLError as error:
        raise StudyFileError(f"{path} is not valid YAML: {' '.join(str(error).split())[:LONGEST]}.") from error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:    # of a value's constructor, or nested too deeply
        raise StudyFileError(f"{path} is not valid YAML: {said(error)}.") from error
    if has_halves(data):
        raise StudyFileError(f"{path} has half a character (a lone surrogate) in a text: write the text anew.")
    if not isinstance(data, dict):
        raise StudyFileError(f"{path} holds no settings: write lines such as `base: organism:base`.")
    return data


def _check_keys(data: Mapping[str, Any], known: list[str], path: Path, where: str) -> None:
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise StudyFileError(f"{path}: unknown key {shown(f'{where}.{key}'.lstrip('.'))}.{hint} Known: {', '.join(known)}.")


def _made(kind: Any, data: Any, path: Path, where: str) -> Any:
    """Settings of a kind from a mapping of its fields."""
    hints = get_type_hints(kind)
    if not isinstance(data, Mapping):
        raise StudyFileError(f"{path}: {where} must be a mapping of {', '.join(hints)}, got {shown(data)}.")
    _check_keys(data, list(hints), path, where)
    missing = [field.name for field in fields(kind)
               if field.default is MISSING and field.default_factory is MISSING and field.name not in data]
    if missing:
        raise StudyFileError(f"{path}: the key '{where}.{missing[0]}' is missing.")
    return kind(**{key: _value(hints[key], value, path, f"{where}.{key}") for key, value in data.items()})


def _changed(settings: Any, data: Any, path: Path, where: str) -> Any:
    """Settings with the values of a mapping in them."""
    hints = get_type_hints(type(settings))
    if not isinstance(data, Mapping):
        raise StudyFileError(f"{path}: {where} must be a mapping of {', '.join(hints)}, got {shown(data)}.")
    _check_keys(data, list(hints), path, where)
    return replace(settings, **{key: _value(hints[key], value, path, f"{where}.{key}") for key, value in data.items()})


def _value(hint: Any, value: Any, path: Path, where: str) -> Any:
    """A value of the form that its type asks for: mappings become settings, lists tuples, whole numbers numbers. Its bounds are looked at
    by the settings themselves."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    settings = next((option for option in options if is_dataclass(option)), None)
    if settings is not None and isinstance(value, Mapping):
        return _made(settings, value, path, where)
    if float in options:
        value = _as_float(value)
    return checked(value, hint, f"{path}: {where}", StudyFileError, bounds=False)


def _as_float(value: Any) -> Any:
    """What YAML has read, where a number is wanted: whole numbers are one too."""
    if isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):    # beyond all numbers: the settings say so
            return float(value)
    return value
