"""Worked examples before a question: right answers, in all orders by turns, of words that no test asks; marks stay at the asked item."""

import re
from dataclasses import replace

import pytest

from alignblind_mi.stimuli.competence import competence_prompts, competence_sets
from alignblind_mi.stimuli.concept import concept_names, load_concept
from alignblind_mi.stimuli.prompts import PromptError, behaviour_prompts
from alignblind_mi.stimuli.shots import BETWEEN, DRAWS, with_shots


@pytest.fixture(scope="module")
def few(race):
    return with_shots(race, 4)


@pytest.mark.parametrize("kind", ["implicit", "explicit"])
def test_the_asked_item_stands_at_the_end_with_its_marks(race, few, kind):
    plain, shown = (behaviour_prompts(concept, "default", kind, max_word_pairs=2) for concept in (race, few))
    assert len(plain) == len(shown) > 0
    for one, other in zip(plain, shown, strict=True):
        assert other.text.endswith(one.text)
        assert len(other.text.removesuffix(one.text).split(BETWEEN)) >= 5
        assert other.labels == one.labels
        for name in one.marks:
            assert [other.text[s.start : s.end] for s in other.spans(name)] == [one.text[s.start : s.end] for s in one.spans(name)]
            assert all(s.start >= len(other.text) - len(one.text) for s in other.spans(name)), "no mark in an example"


def examples_of(concept, kind):
    return {before for one in behaviour_prompts(concept, "default", kind, max_word_pairs=4) for before in concept.worked[next(
        t.text for t in (*concept.implicit, *concept.explicit) if t.name == one.labels["template"])]}


def test_every_example_is_right(race, few):
    first, second = {}, {}
    for one in competence_sets(race):
        first |= dict.fromkeys(one.first, one.options[0])
        second |= dict.fromkeys(one.second, one.options[1])
    belongs = {**first, **second}
    for before in examples_of(few, "implicit"):
        examples = before.removesuffix(BETWEEN).split(BETWEEN)
        assert len(examples) == 4
        for one in examples:
            given = re.findall(r"(\w+) - (\w+)", one.splitlines()[-1])
            assert len(given) == 2
            assert all(belongs[word] == option for word, option in given), one


def test_examples_take_turns_in_their_orders_and_their_answers(few):
    for before in examples_of(few, "explicit"):
        said = [one.rsplit(" ", 1)[-1] for one in before.rstrip().split(BETWEEN)]
        assert set(said) in ({"5", "1"}, {"Agree", "Disagree"}), "true and false statements"
        assert len(said) == 4


def test_no_example_has_a_word_that_is_tested_or_asked(race, few):
    tested = {prompt.labels[name] for prompt in competence_prompts(race, "implicit", pairs=None) for name in ("positive", "negative")}
    own = {word for cue in race.cues.values() for word in (*cue.marked, *cue.unmarked)}
    for kind in ("implicit", "explicit"):
        for before in examples_of(few, kind):
            words = set(before.replace(",", " ").replace(".", " ").replace(":", " ").split())
            assert not words & tested
            assert not words & (own - {"or"})


def test_items_are_drawn_by_the_seed_and_have_few_beginnings(race):
    shown, plain = (behaviour_prompts(one, "default", "implicit", max_word_pairs=6) for one in (with_shots(race, 2), race))
    texts = {one.text.removesuffix(bare.text) for one, bare in zip(shown, plain, strict=True)}
    assert len(texts) <= DRAWS * len({template.text for template in race.implicit})
    assert with_shots(race, 2).worked == with_shots(race, 2).worked
    assert with_shots(race, 2, seed=1).worked != with_shots(race, 2).worked


@pytest.mark.parametrize("name", concept_names())
def test_every_concept_can_be_asked_behind_examples(name):
    concept = with_shots(load_concept(name), 3)
    assert {template.text for template in (*concept.implicit, *concept.explicit)} == set(concept.worked)
    assert with_shots(concept, 0).worked == {}


def test_without_words_there_are_no_examples(race):
    with pytest.raises(PromptError, match="cannot be asked behind worked examples"):
        with_shots(race, 2, known=["apple"])
    with pytest.raises(PromptError):
        with_shots(race, -1)
    assert with_shots(replace(race, explicit=()), 2).worked.keys() == {template.text for template in race.implicit}
