"""Competence items: the templates of the bias, words beyond doubt, and none that a concept is about."""

import tomllib
from importlib.resources import files

import pytest

from alignblind_mi.stimuli.answers import judge
from alignblind_mi.stimuli.competence import PAIRS, competence_prompts, competence_sets, competence_words, shared_sets
from alignblind_mi.stimuli.concept import concept_names, load_concept
from alignblind_mi.stimuli.concept_check import concept_problems
from alignblind_mi.stimuli.prompts import PromptError

OWN = {"sky": {"options": ["sky", "sea"], "first": ["cloud", "bird", "star", "moon"], "second": ["fish", "wave", "crab", "reef"]}}


@pytest.mark.parametrize("name", concept_names())
def test_sets_have_nothing_to_do_with_any_concept_and_are_enough(name):
    concept = load_concept(name)
    words = {word.lower() for word in competence_words(concept)}
    identifiers = {word.lower() for cue in concept.cues.values() for word in (*cue.marked, *cue.unmarked)}
    senses = {word.strip().lower() for sense in concept.senses.values() for word in (sense.word, *sense.words)}
    assert not words & (identifiers | senses)
    for kind in ("implicit", "explicit"):
        assert len({prompt.labels["word_pair"] for prompt in competence_prompts(concept, kind)}) >= 24


def test_no_word_is_used_for_tuning_and_for_the_test(race):
    every = [{prompt.labels[side] for prompt in competence_prompts(race, "implicit", split=split, pairs=None)
              for side in ("positive", "negative")} for split in ("tune", "test")]
    assert all(every)
    assert not every[0] & every[1]


def test_an_item_is_the_template_of_the_bias_with_the_first_option_for_the_marked_one(race):
    prompts = competence_prompts(race, "implicit")
    assert {prompt.labels["template"] for prompt in prompts} == {"implicit_random0", "implicit_variation0", "implicit_variation1"}
    for prompt in prompts:
        assert prompt.text.startswith(("Here is a list", "Here are some words", "Given the following"))
        (one,) = [found for found in shared_sets() if found.name == prompt.labels["competence"]]
        assert (prompt.labels["marked"], prompt.labels["unmarked"]) == one.options
        assert prompt.labels["negative"] in one.first
        assert prompt.labels["positive"] in one.second
        right = "\n".join(f"{prompt.labels[word]} - {prompt.labels[option]}"
                          for word, option in (("negative", "marked"), ("positive", "unmarked")))
        assert judge(right, prompt.labels).label == "stereotyped"


def test_each_word_pair_has_one_template_in_both_orders_of_options_and_words(race):
    found: dict[str, list] = {}
    for prompt in competence_prompts(race, "implicit"):
        found.setdefault(f"{prompt.labels['competence']}|{prompt.labels['word_pair']}", []).append(prompt)
    assert len(found) == PAIRS
    for prompts in found.values():
        assert len({prompt.labels["template"] for prompt in prompts}) == 1
        assert len({(prompt.labels["option_order"], prompt.labels["word_order"]) for prompt in prompts}) == len(prompts) == 4


def test_statements_of_people_are_not_made_of_things(race):
    assert any("people" in template.text for template in race.explicit)
    assert not any("people" in prompt.text for prompt in competence_prompts(race, "explicit"))


def test_what_a_tokenizer_cannot_spell_is_left_out(race):
    known = {"good", "bad", "murder", "violence", "poison", "cruel", "love", "joy"}
    prompts = competence_prompts(race, "implicit", known=known)
    assert {prompt.labels["competence"] for prompt in prompts} == {"valence"}
    assert {prompt.labels["negative"] for prompt in prompts} == {"poison", "cruel"}    # the others are kept for tuning
    assert not competence_prompts(race, "implicit", known={"good", "murder"})


@pytest.mark.parametrize("given", [{"split": "train"}, {"split": ""}])
def test_an_unknown_split_is_one_sentence(race, given):
    with pytest.raises(PromptError, match="there are no competence items"):
        competence_prompts(race, "implicit", **given)


def test_an_unknown_kind_is_one_sentence(race):
    with pytest.raises(PromptError, match="Known: implicit, explicit"):
        competence_prompts(race, "weird")


def race_with(own: dict) -> dict:
    data = tomllib.loads(files("alignblind_mi.stimuli.concepts").joinpath("race.toml").read_text("utf-8"))
    return {**data, "competence": own}


def test_a_concept_brings_its_own_sets(tmp_path):
    text = files("alignblind_mi.stimuli.concepts").joinpath("race.toml").read_text("utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text + '\n[competence.sky]\noptions = ["sky", "sea"]\nfirst = ["cloud", "bird", "star", "moon"]\n'
                           'second = ["fish", "wave", "crab", "reef"]\n', "utf-8")
    concept = load_concept(path)
    assert competence_sets(concept)[0].name == "sky"
    assert {prompt.labels["word_pair"] for prompt in competence_prompts(concept, "implicit")
            if prompt.labels["competence"] == "sky"} == {"reef|moon"}


@pytest.mark.parametrize(("change", "said"), [
    ({"options": ["sky"]}, "[competence.sky] options: must be two"),
    ({"first": ["cloud", "bird", "star"]}, "[competence.sky] first: needs more than 3 words"),
    ({"first": ["cloud", "bird", "fish", "moon"]}, "[competence.sky]: 'fish' stands on two sides"),
    ({"second": []}, "[competence.sky] second: is empty"),
    ({"first": ["cloud", "bird", "cloud", "moon"]}, "[competence.sky] first: 'cloud' stands there twice"),
    ({"colour": "x"}, "[competence.sky] colour: this field is unknown"),
])
def test_what_is_wrong_with_a_set_is_named(change, said):
    assert concept_problems(race_with(OWN)) == []
    assert any(problem.startswith(said) for problem in concept_problems(race_with({"sky": {**OWN["sky"], **change}})))
