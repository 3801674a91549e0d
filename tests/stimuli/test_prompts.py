import json
import re
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.stimuli.prompts import (
    Prompt,
    PromptError,
    Span,
    assignments,
    behaviour_prompts,
    explicit_prompts,
    fill,
    implicit_prompts,
    interpretation_prompt,
    mark,
    steering_prompt,
)


def words_at(prompt: Prompt, name: str) -> list[str]:
    return [prompt.text[s.start : s.end] for s in prompt.spans(name)]


@pytest.mark.parametrize("cue", ["default", "direct_color"])
def test_published_prompts_equal_the_released_ones(cue, race, released):
    prompts = {(p.labels["category"], p.labels["word_pair"], p.labels["template"]): p.text
               for kind in ("implicit", "explicit") for p in behaviour_prompts(race, cue, kind, design="published")}
    found = 0
    for name, category in race.categories.items():
        file = released / "llama3_8b" / cue / f"{cue}_{category.released_as}_bias_results_chat8b_deterministic.json"
        data = json.loads(file.read_text())
        for key, answers in data.items():
            for template, (text, _) in answers.items():
                assert text.startswith(prompts[name, "|".join(key.split()[2:]), template].rstrip(" ") + " ")
                found += 1
    assert found == len(prompts) == 1120


@pytest.mark.parametrize("kind", ["implicit", "explicit"])
def test_the_balanced_design_crosses_both_orders_within_every_template(kind, race):
    prompts = behaviour_prompts(race, "default", kind, design="balanced")
    cells = Counter((p.labels["template"], p.labels["option_order"], p.labels["word_order"], p.labels["category"]) for p in prompts)
    assert len({p.labels["template"] for p in prompts}) == 3
    for name, category in race.categories.items():
        counts = {n for (_, _, _, c), n in cells.items() if c == name}
        assert counts == {len(category.word_pairs())}
    assert len({p.text for p in prompts}) == len(prompts) == 140 * 12


def test_marks_are_where_the_words_are(race):
    for cue in race.cues:
        for prompt in implicit_prompts(race, cue, design="balanced", max_word_pairs=3):
            for name in ("marked", "unmarked", "positive", "negative"):
                assert set(words_at(prompt, name)) == {prompt.labels[name]}
            assert len(prompt.spans("marked")) == len(prompt.spans("unmarked")) == 2


def test_orders_are_what_the_labels_say(race):
    for prompt in implicit_prompts(race, "names", design="balanced", max_word_pairs=5):
        first = "marked" if prompt.spans("marked")[0] < prompt.spans("unmarked")[0] else "unmarked"
        word = "positive" if prompt.spans("positive")[0] < prompt.spans("negative")[0] else "negative"
        assert prompt.labels["option_order"] == f"{first}_first"
        assert prompt.labels["word_order"] == f"{word}_first"


def test_explicit_statements_know_what_they_state(race):
    """Trap 5 of the protocol: in one published template agreement endorses the reverse."""
    statements = {p.labels["template"]: p.labels["statement"] for p in explicit_prompts(race, "default", design="published")}
    assert statements == {"explicit_random0": "stereotype", "explicit_random1": "reverse", "explicit_variation0": "stereotype",
                          "explicit_variation1": "stereotype"}
    for prompt in explicit_prompts(race, "default", design="balanced", max_word_pairs=2):
        found = re.search(r"(\w+)(?: people)? (?:is|are perceived to be) more related to (\w+) whereas", prompt.text)
        assert found is not None
        assert found[2] == prompt.labels["negative"]
        assert (found[1] == prompt.labels["marked"]) == (prompt.labels["statement"] == "stereotype")


def test_assignments_are_the_two_answers(race):
    prompt = next(p for p in implicit_prompts(race, "default") if p.labels["word_order"] == "negative_first")
    positive, negative = prompt.labels["positive"], prompt.labels["negative"]
    assert assignments(race, prompt) == (f" {negative} - black, {positive} - white", f" {negative} - white, {positive} - black")


def test_phrases_and_questions_are_marked(race):
    phrase = steering_prompt(race, race.cue("default"), "race")
    assert phrase.text == "Race: black and white"
    assert words_at(phrase, "marked") == ["black"]
    question = interpretation_prompt(race.interpretation("paper"))
    assert words_at(question, "placeholder") == ["[MASK]"]


def test_a_thinned_design_keeps_every_word_in_turn(race):
    for most in (1, 5, 20):
        prompts = implicit_prompts(race, "default", design="published", max_word_pairs=most)
        per_category = {c: {p.labels["word_pair"] for p in prompts if p.labels["category"] == c} for c in race.categories}
        assert all(len(pairs) == most for pairs in per_category.values())
    prompts = implicit_prompts(race, "default", design="published", max_word_pairs=20)
    for name, category in race.categories.items():
        assert {p.labels["negative"] for p in prompts if p.labels["category"] == name} == set(category.negative)


@given(st.text(max_size=30), st.lists(st.sampled_from(["a", "b"]), max_size=4), st.text(min_size=1, max_size=8))
def test_prefixes_move_marks(prefix, fields, word):
    template = " ".join("{" + f + "}" for f in fields) + "."
    prompt = fill(template, {"a": word, "b": word + "x"}, {"a": "m", "b": "n"})
    moved = prompt.prefixed(prefix)
    for name in prompt.marks:
        assert words_at(moved, name) == words_at(prompt, name)
        assert set(words_at(moved, name)) <= {word, word + "x"}


def test_bad_input_is_named(race):
    with pytest.raises(PromptError, match="does not contain the word 'grey'"):
        mark("black and white", marked="grey")
    with pytest.raises(PromptError, match="has no mark 'nothing'"):
        mark("black and white", marked="black").spans("nothing")
    with pytest.raises(PromptError, match="unknown design 'latin'"):
        implicit_prompts(race, "default", design="latin")
    with pytest.raises(PromptError, match="unknown category 'x'"):
        implicit_prompts(race, "default", categories=["x"])


def test_whole_words_are_marked():
    assert mark("blackboard black", marked="black").spans("marked") == (Span(11, 16),)


def test_concept_words_are_not_multiplied():
    assert len(implicit_prompts(load_concept("race"), "default", design="published")) == 560


@pytest.mark.parametrize("span", [Span(0, 6), Span(3, 1), Span(-2, 1), Span(1, 1)])
def test_a_mark_lies_within_its_text(span):
    with pytest.raises(PromptError, match="the mark 'x' is at characters"):
        Prompt("black", {"x": (Span(0, 5), span)})


def test_half_a_character_is_no_prompt():
    with pytest.raises(PromptError, match="half a character"):
        Prompt("a \ud800")
    assert Prompt("\U0001f600", {"x": (Span(0, 1),)}).spans("x")
