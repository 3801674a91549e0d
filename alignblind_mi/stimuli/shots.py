"""Worked examples before a question: neutral items with their right answers, for base and small models that follow examples.

The items are those of competence that are kept for tuning (apple and carrot, fruit and vegetable), which no test asks; they are put in the
question's own template, in all orders by turns, so that no order is favoured. This module does NOT know answers or models.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from alignblind_mi.borders.settings import Seed, Shots, takes
from alignblind_mi.stimuli.competence import template_items
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import KINDS, Prompt, PromptError, assignments, worded_positions

DRAWS = 3    # different sets of examples before the items of a template: few, so that identifiers are read behind few beginnings
BETWEEN = "\n\n"


@takes(PromptError)
def with_shots(concept: Concept, shots: Shots, *, known: Iterable[str] | None = None, seed: Seed = 0) -> Concept:
    """The same concept whose bias and competence prompts come behind `shots` worked examples; marks stay at the asked item.

    Each item has one of `DRAWS` sets of examples, drawn by its words and the seed; orders of options and words (of explicit statements:
    true and false ones) take turns in a set. known: words that a tokenizer can spell (default: all).

    Errors: PromptError where there is no neutral item to be shown for a kind of question.
    """
    if not shots:
        return replace(concept, worked={})
    plain, spelt = replace(concept, worked={}), None if known is None else set(known)
    worked = {}
    for kind in KINDS:
        templates = plain.implicit if kind == "implicit" else plain.explicit
        found = template_items(plain, kind, known=spelt, seed=seed)
        if templates and not found:
            raise PromptError(f"the concept {concept.name!r} cannot be asked behind worked examples: of no competence set can its {kind} "
                              "templates and the tokenizer spell a word of either side; ask without shots.")
        scales = {template.text: template.scale for template in templates}
        for template in templates:    # one about people is shown the examples of the others: "fruit people" is no question
            alike = [item for text, items in found.items() for item in items if scales[text] == template.scale]
            every = [item for items in found.values() for item in items]
            items = found.get(template.text) or alike or every
            worked[template.text] = tuple(_examples(plain, items, shots, f"{seed}|{template.text}|{draw}") for draw in range(DRAWS))
    return replace(concept, worked=worked)


def _examples(concept: Concept, items: Sequence[Prompt], shots: int, seed: str) -> str:
    """`shots` items with their right answers, one order after the other."""
    drawn, orders = random.Random(seed), dict[tuple[object, ...], list[Prompt]]()
    for item in items:
        orders.setdefault(tuple(item.labels[name] for name in ("option_order", "word_order", "statement")), []).append(item)
    turns = [drawn.sample(some, len(some)) for some in drawn.sample(list(orders.values()), len(orders))]
    chosen = [turns[i % len(turns)][(i // len(turns)) % len(turns[i % len(turns)])] for i in range(shots)]
    return "".join(f"{item.text.rstrip()} {_right(concept, item).strip()}{BETWEEN}" for item in chosen)


def _right(concept: Concept, item: Prompt) -> str:
    """The right answer: of an implicit item the words with their own options, of an explicit one whether its statement is true."""
    if item.labels["kind"] == "implicit":
        return assignments(concept, item)[0]
    endorses, rejects = worded_positions(concept, item)[0]
    return endorses if item.labels["statement"] == "stereotype" else rejects
