"""Phrases about something else: they name no sense, group or person of any concept that is shipped, and are built for each."""

import re
import tomllib

import pytest

from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.mitigations.steering import can_steer
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.stimuli.concept import concept_names, load_concept, read_concept_file, wrong_phrases
from alignblind_mi.stimuli.concept_check import template_fields
from alignblind_mi.studies.rivals import plan_rivals

# What may stand in many sentences, and names nothing by itself.
COMMON = {"the", "and", "a", "of", "or"}
NAMED = {"people", "person", "persons", "men", "women", "man", "woman", "boy", "girl", "group", "groups", "families", "citizens"}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold())) - COMMON


def every_word(name: str) -> set[str]:
    """Identifiers (and so persons), what senses are called and known by, and what is associated with them."""
    concept, data = load_concept(name), tomllib.loads(read_concept_file(name)[0])
    texts = [one for cue in concept.cues.values() for one in (*cue.marked, *cue.unmarked)]
    texts += [one for sense in concept.senses.values() for one in (sense.name, sense.word, *sense.words, *sense.lexicon)]
    texts += [one for category in data["categories"].values() for side in ("positive", "negative") for one in category[side]]
    texts += [concept.name.replace("_", " "), *concept.controls]
    return {word for text in texts for word in words(text)}


def test_they_say_nothing_of_any_concept():
    phrases = wrong_phrases()
    assert phrases
    assert all(template_fields(phrase) == {"marked", "unmarked"} for phrase in phrases)
    for name in concept_names():
        known = every_word(name) | NAMED
        assert len(known) > 30
        for phrase in phrases:
            own = words(re.sub(r"{\w+}", "", phrase))
            assert own
            stems = {word.removesuffix("s") for word in known}
            assert not own & known, f"{phrase!r} speaks of {name}"
            assert not {word.removesuffix("s") for word in own} & stems, f"{phrase!r} speaks of {name}"


@pytest.mark.parametrize("name", [name for name in concept_names() if load_concept(name).has_senses()])
def test_it_is_built_for_every_concept_with_senses(name, everything_known):
    concept = load_concept(name)
    for cue in concept.cues:
        if not concept.has_senses(cue) or not can_steer(concept, cue):
            continue
        found = plan_rivals(everything_known, concept, cue, 8, LoraSettings())
        assert "placebo_wrong_concept_early" in {rival.name for rival in found.rivals}
        assert "placebo_wrong_concept_early" not in found.left_out


@pytest.fixture(scope="module")
def everything_known(tmp_path_factory) -> ModelSpec:
    """A model whose tokenizer knows the identifiers of all concepts, and the phrases."""
    from doubles import tiny_llama

    texts = [*wrong_phrases(), *(one for name in concept_names() for cue in load_concept(name).cues.values()
                                 for one in (*cue.marked, *cue.unmarked))]
    every = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    return ModelSpec(str(tiny_llama(tmp_path_factory.mktemp("known"), every, layers=1)), dtype="float32", device="cpu")


def test_the_embedded_pairs_know_one_of_them():
    for model, name in (("organism:aligned", "race"), ("organism:gender-aligned", "gender")):
        found = plan_rivals(ModelSpec(model).resolved(), load_concept(name), "default", 8, LoraSettings())
        assert "placebo_wrong_concept_early" in {rival.name for rival in found.rivals}
