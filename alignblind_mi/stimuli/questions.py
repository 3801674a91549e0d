"""The questions that a patched representation may be asked with: a concept's own, and those of `questions.toml` in both orders.

Does NOT know which of them a model can be read by.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from alignblind_mi.borders.own import own_table
from alignblind_mi.borders.texts import one_line
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.concept_check import template_fields
from alignblind_mi.stimuli.prompts import Prompt, fill


@dataclass(frozen=True)
class Question:
    """A question about a placeholder (mark: placeholder), and the tokens that answer it with the group sense and with the other one."""

    __repr__ = one_line

    name: str
    prompt: Prompt = field(hash=False)
    group: str
    other: str


@lru_cache(1)
def _shared() -> dict[str, Any]:
    return own_table("stimuli", "questions")


def own_question(concept: Concept, name: str) -> Question:
    """An interpretation question of the concept. Errors: ConceptError for an unknown one, or a concept without senses."""
    (group, other), asked = concept.both_senses(), concept.interpretation(name)
    return Question(name, fill(asked.text, {"x": asked.placeholder}, {"x": "placeholder"}), group.word, other.word)


def questions(concept: Concept) -> list[Question]:
    """All questions that a concept can be asked with: its own, then the shared ones, those with two answers in both orders.

    Errors: ConceptError for a concept without senses.
    """
    group, other = concept.both_senses()
    values = {"x": str(_shared()["placeholder"]), "group": group.word.strip(), "other": other.word.strip()}
    for side, sense in (("group", group), ("other", other)):
        values |= {f"{side}{i + 1}": word for i, word in enumerate(sense.words[:2])}
    found = [own_question(concept, name) for name in concept.interpretations]
    for name, entry in _shared()["questions"].items():
        fields = template_fields(entry["text"])
        orders = ((group, other), (other, group)) if fields & {"first", "second"} else ((group, other),)
        for first, second in orders:
            here = {**values, "first": first.word.strip(), "second": second.word.strip()}
            if not fields <= set(here):
                continue
            answers = dict(zip((first.name, second.name), entry.get("answers", (first.word, second.word)), strict=True))
            tail = f", {first.word.strip()} first" if len(orders) > 1 else ""
            prompt = fill(entry["text"], here, {"x": "placeholder"})
            found.append(Question(f"{name}{tail}", prompt, answers[group.name], answers[other.name]))
    return found
