"""`alignblind concept`: the concepts that are there, what is wrong with a file of one's own or what it has, and a file to begin with.

Knows the tokenizer of a model, if one is named; no weights are loaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignblind_mi.borders.texts import say

if TYPE_CHECKING:
    from alignblind_mi.stimuli.concept import Concept

concept_app = typer.Typer(no_args_is_help=True, help="Concepts as data: check a file of your own, list those there are, begin a new one.")
SHOWN = 12    # texts of one kind that are listed by name


@concept_app.command("list")
def list_concepts() -> None:
    """The concepts that come with the package. Example: alignblind concept list"""
    from alignblind_mi.stimuli.concept import concept_names, load_concept

    for name in concept_names():
        concept = load_concept(name)
        senses = " against ".join(sense.name for sense in concept.both_senses()) if concept.senses else "none"
        say(f"{name}: {concept.description}\n  cues: {', '.join(concept.cues)}\n  categories: {', '.join(concept.categories)}\n"
                   f"  senses: {senses}")


@concept_app.command("template")
def template() -> None:
    """Print a commented concept file to begin with. Example: alignblind concept template > mine.toml"""
    say((resources.files("alignblind_mi.stimuli") / "template.toml").read_text("utf-8"), end="")


@concept_app.command("show")
def show(name: Annotated[str, typer.Argument(metavar="NAME_OR_FILE", help="A built-in concept, or a .toml file.")]) -> None:
    """Print the file of a concept, to begin one of your own from it. Example: alignblind concept show race > mine.toml"""
    from alignblind_mi.stimuli.concept import read_concept_file

    say(read_concept_file(name)[0], end="")


@concept_app.command("check")
def check(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_NAME", help="A .toml file, or a built-in concept.")],
    model: Annotated[str | None, typer.Option(help="Also ask this model's tokenizer what it knows (no weights are loaded).")] = None,
) -> None:
    """Name every problem of a concept file with its place; of a sound one, say what it has.

    Exit code 2 if the file has a problem, or if the tokenizer of --model does not know a text or splits a sense word; else 0.
    Example: alignblind concept check mine.toml --model meta-llama/Meta-Llama-3-8B-Instruct
    """
    from alignblind_mi.models.configs import load_tokenizer
    from alignblind_mi.models.spec import ModelSpec
    from alignblind_mi.pages.terminal import print_table
    from alignblind_mi.stimuli.concept import load_concept, parse_concept, read_concept_file
    from alignblind_mi.stimuli.concept_check import concept_problems

    text, where = read_concept_file(source)
    problems = concept_problems(parse_concept(text, where))
    if problems:
        say("\n".join([f"{where} has {_count(len(problems), 'problem')}:", *(f"  {problem}." for problem in problems)]))
        raise typer.Exit(2)
    concept = load_concept(source)
    tokenizer = None if model is None else load_tokenizer(ModelSpec(model))    # refused before anything is said
    print_table(f"{where} is sound: {concept.description or concept.name}", cue_records(concept), prose=("categories", "a study does"),
                right=("word pairs", "published prompts", "balanced prompts"))
    for line in (*abilities(concept), *(f"note: {note}" for note in notes(concept))):
        say(line)
    if model is not None and _show_vocabulary(concept, model, tokenizer):
        raise typer.Exit(2)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def cue_records(concept: "Concept") -> list[dict[str, str]]:
    """One row per cue: its identifiers, categories and word pairs, the prompts of either design, and what a study does with it."""
    from alignblind_mi.mitigations.lora import trainable
    from alignblind_mi.mitigations.steering import can_steer
    from alignblind_mi.stimuli.prompts import DESIGNS, KINDS, behaviour_prompts

    rows = []
    for cue in concept.cues.values():
        categories = cue.categories or tuple(concept.categories)
        prompts = {f"{design} prompts": str(sum(len(behaviour_prompts(concept, cue, kind, design=design)) for kind in KINDS))
                   for design in DESIGNS}
        does = ["behaviour", *(["awareness"] if concept.has_senses(cue) else []), *(["steering"] if can_steer(concept, cue.name) else []),
                *(["LoRA"] if trainable(concept, cue.name) else [])]
        pairs = len(cue.marked) * (len(cue.unmarked) if cue.pairing == "crossed" else 1)
        first = f"{cue.marked[0]} / {cue.unmarked[0]}" + (f" and {pairs - 1} more" if pairs > 1 else "")
        words = sum(len(concept.categories[name].word_pairs()) for name in categories)
        rows.append({"cue": cue.name, "identifiers": first, "categories": ", ".join(categories), "word pairs": str(words), **prompts,
                     "a study does": ", ".join(does)})
    return rows


def abilities(concept: "Concept") -> Iterator[str]:
    """What there is beside the cues, in sentences."""
    texts = [len({one.text for one in templates}) for templates in (concept.implicit, concept.explicit)]
    yield f"templates: {texts[0]} implicit and {texts[1]} explicit texts; instructions: {', '.join(concept.instructions) or 'none'}"
    if not concept.senses:
        yield "senses: none, so a study measures behaviour alone"
        return
    group, other = concept.both_senses()
    yield f"senses: {group.name} ({group.word!r}) against {other.name} ({other.word!r}); controls: {', '.join(concept.controls) or 'none'}"
    contexts = " and ".join(f"{len(entry.train)} + {len(entry.test)} of {name}" for name, entry in concept.contexts.items())
    yield f"questions: {', '.join(concept.interpretations)}; SelfIE: {', '.join(concept.selfie) or 'none'}; contexts: {contexts or 'none'}"
    if concept.awareness is not None:
        from alignblind_mi.mitigations.lora import awareness_examples

        yield f"awareness: {len(awareness_examples(concept))} training pairs for LoRA"


def notes(concept: "Concept") -> Iterator[str]:
    """What a sound concept lacks, or should be known of it."""
    for cue in concept.cues.values():
        for short, long in (sorted((m, u), key=len) for m in cue.marked for u in cue.unmarked):
            if short.lower() in long.lower():
                yield (f"{short!r} is a part of {long!r} (cue {cue.name!r}): the published rule of scoring mixes them up, the robust one "
                       "does not")
    if not concept.senses:
        return
    if len(concept.interpretations) < 2:
        yield "there is one interpretation question: a second, independent one shows what is the question's own"
    for sense in concept.both_senses():
        if len(sense.words) < 2:
            yield f"the sense {sense.name!r} has no two unambiguous `words`: readings lack the control of its end of the scale"
        if not sense.lexicon:
            yield f"the sense {sense.name!r} has no `lexicon`: open readings (SelfIE) are left out"
        if not sense.word.startswith(" "):
            yield f"the sense word {sense.word!r} does not begin with a blank: as the next token of most models it would"
    if "paper" not in concept.selfie:
        yield "there is no [selfie.paper], the open prompt of a study: open readings are left out"
    for name, there in (("contexts", concept.contexts), ("awareness", concept.awareness), ("controls", concept.controls)):
        if not there:
            yield f"there is no [{name}]: " + {"contexts": "probes", "awareness": "LoRA", "controls": "the placebo of steering"}[name] + (
                " is left out" if name != "contexts" else " are left out")


# ---- what a tokenizer knows ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A text of a concept and how many tokens it is (0: a part of it is unknown)."""

    kind: str
    text: str
    tokens: int

    @property
    def fails(self) -> bool:
        """Whether the model cannot be asked with it."""
        return self.tokens == 0 or (self.kind == "sense word" and self.tokens > 1)


def vocabulary(concept: "Concept", tokenizer: Any) -> list[Known]:
    """Every identifier, word and sense word as it stands in a text, every template and every question, by a tokenizer."""
    from alignblind_mi.models.loading import token_count
    from alignblind_mi.stimuli.prompts import fill, interpretation_prompt

    cues = concept.cues.values()
    texts = [("identifier", f" {one}") for cue in cues for one in (*cue.marked, *cue.unmarked)]
    texts += [("word", f" {one}") for category in concept.categories.values() for one in (*category.positive, *category.negative)]
    texts += [("sense word", sense.word) for sense in (concept.both_senses() if concept.senses else ())]
    cue = concept.cues[concept.first_cue]
    category = next(iter(concept.categories.values()))
    roles = {"marked": cue.marked[0], "unmarked": cue.unmarked[0], "positive": category.positive[0], "negative": category.negative[0]}
    fields = roles | {"first": roles["marked"], "second": roles["unmarked"], "word1": roles["positive"], "word2": roles["negative"]}
    texts += [("template", fill(one.text, fields).text) for one in (*concept.implicit, *concept.explicit)]
    texts += [("question", interpretation_prompt(one).text) for one in (*concept.interpretations.values(), *concept.selfie.values())]
    return [Known(kind, text, token_count(tokenizer, text)) for kind, text in dict.fromkeys(texts)]


def _show_vocabulary(concept: "Concept", model: str, tokenizer: Any) -> bool:
    """Say what a model's tokenizer splits and does not know; whether anything of it fails."""
    known = vocabulary(concept, tokenizer)
    say(f"to the tokenizer of {model}:")
    lines = [f"  {line}" for kind in ("sense word", "identifier", "word", "template", "question")
             for line in _vocabulary_lines(kind, [one for one in known if one.kind == kind])]
    say("\n".join(lines))
    return any(one.fails for one in known)


def _vocabulary_lines(kind: str, known: Sequence[Known]) -> Iterator[str]:
    """What is unknown, what is several tokens; that all is well where nothing is."""
    unknown = [repr(one.text.strip()) for one in known if one.tokens == 0]
    split = [f"{one.text.strip()!r} ({one.tokens})" for one in known if one.tokens > 1 and kind not in ("template", "question")]
    if unknown:
        yield f"{kind}s unknown, which this model cannot be asked about: {_some(unknown)}"
    if split:
        why = {"sense word": "its probability as the next token cannot be read; give the sense another word",
               "identifier": "edits and readings use the last one"}.get(kind, "")
        yield f"{kind}s of several tokens: {_some(split)}" + (f" ({why})" if why else "")
    if known and not unknown and not split:
        yield f"all {_count(len(known), kind)} known" + ("" if kind in ("template", "question") else ", one token each")


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")
