"""Files of answers in the released layout, written from the published prompts."""

import json
from pathlib import Path

from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import behaviour_prompts


def write(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return path


def as_released(concept: Concept, cue: str, answer: str, category: str) -> tuple[dict[str, dict[str, list[object]]], list[dict[str, str]]]:
    """The published prompts of a cue in the released layout, and the labels that should be read back."""
    data: dict[str, dict[str, list[object]]] = {}
    labels = []
    for kind in ("implicit", "explicit"):
        for prompt in behaviour_prompts(concept, cue, kind, design="published", categories=[category], max_word_pairs=6):
            of = prompt.labels
            key = " ".join(of[name] for name in ("unmarked", "marked", "positive", "negative"))
            data.setdefault(key, {})[of["template"]] = [prompt.text + answer, 1]
            labels.append(dict(of))
    return data, labels
