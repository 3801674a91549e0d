import csv
import hashlib
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from alignblind_mi.instruments.contrast import contrast_pairs
from alignblind_mi.instruments.probes import bag_of_words
from alignblind_mi.measures.awareness import measure_awareness, measure_lens, measure_probes, measure_selfie
from alignblind_mi.measures.mitigation import steering_sweep
from alignblind_mi.mitigations.lora import awareness_examples
from alignblind_mi.mitigations.steering import sense_steering
from alignblind_mi.organism.members import measured_concept
from alignblind_mi.stimuli.answers import judge_implicit
from alignblind_mi.stimuli.concept import ConceptError, concept_names, load_concept, read_concept_file
from alignblind_mi.stimuli.prompts import assignments, implicit_prompts
from alignblind_mi.stimuli.readings import classify, reading_names

TEMPLATE = Path(__file__).parents[2] / "alignblind_mi" / "stimuli" / "template.toml"
RACE = (Path(__file__).parents[2] / "alignblind_mi" / "stimuli" / "concepts" / "race.toml").read_text("utf-8")


def test_race_has_what_the_protocol_names(race):
    assert set(race.cues) == {"default", "uppercase", "direct_color", "names", "dialects"}
    assert {name: len(c.word_pairs()) for name, c in race.categories.items()} == {"negativity": 42, "guilt": 63, "weapon": 35}
    assert len(race.implicit) == len(race.explicit) == 4
    assert len(race.cue("names").marked) == len(race.cue("names").unmarked) == 10
    assert len(race.cue("dialects").marked) == 6


def test_names_are_drawn_per_item_and_stay_drawn(race):
    cue = race.cue("names")
    drawn = [cue.identifiers(f"item {i}", seed=0) for i in range(200)]
    assert drawn == [cue.identifiers(f"item {i}", seed=0) for i in range(200)]
    assert {m for m, _ in drawn} == set(cue.marked)
    assert {u for _, u in drawn} == set(cue.unmarked)
    assert drawn != [cue.identifiers(f"item {i}", seed=1) for i in range(200)]


def test_dialect_words_stay_with_their_gloss(race):
    cue = race.cue("dialects")
    pairs = set(zip(cue.marked, cue.unmarked, strict=True))
    assert {cue.identifiers(f"item {i}", seed=0) for i in range(200)} == pairs


@pytest.mark.parametrize(("change", "said"), [
    (("[senses.race]", "[senses.people]"), "group_sense: 'race' is not among the senses"),
    (("{first} or {second} and write it", "{frist} or {second} and write it"), r"unknown fields \['frist'\]"),
    (('marked = ["black"]', 'maked = ["black"]'), "misspelt"),
    (('name = "race"\n', ""), "'name' is missing"),
    (('word = " race"', 'word = '), "not valid TOML"),
    (('"finna", ', ""), "pairs 5 marked with 6 unmarked"),
    (('pairing = "crossed"', 'pairing = "random"'), "'parallel' or 'crossed'"),
    (('"joyful", "superb"', '"joyful", "tragic"'), "both positive and negative"),
    (("What does {x} refer to", "What does {y} refer to"), r"the one field \{x\}"),
    (("{word1} - {option1}", "{word1} - "), r"assignment: .* must have the fields \{word1\}"),
])
def test_a_wrong_file_is_named(change, said, tmp_path):
    assert change[0] in RACE
    file = tmp_path / "mine.toml"
    file.write_text(RACE.replace(*change), "utf-8")
    with pytest.raises(ConceptError, match=said) as caught:
        load_concept(file)
    assert str(file) in str(caught.value)


def test_unknown_names_are_named(race):
    for call in (lambda: load_concept("nothing"), lambda: load_concept("nothing.toml"), lambda: race.cue("nothing"),
                 lambda: race.interpretation("nothing"), lambda: race.steering_phrase("nothing")):
        with pytest.raises(ConceptError, match=r"nothing.*Known: "):
            call()


def test_a_concept_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(RACE.replace('name = "race"\n', 'name = "mine"\n', 1), "utf-8")
    assert load_concept(file).name == "mine"
    assert load_concept(file).digest != load_concept("race").digest


# ---- the concepts that come with the package -----------------------------------------------------------------------------

STIMULI = Path(__file__).parents[3] / "shared" / "data" / "stimuli" / "iat_stimuli.csv"
# A category of Bai et al. -> concept, cue, category.
OF_BAI = {
    "racism": ("race_iat", "black_white", "racism"), "weapon": ("race_iat", "black_white", "weapon"),
    "guilt": ("race_iat", "black_white", "guilt"), "skintone": ("race_iat", "skin_tone", "skin_tone"),
    "arab/muslim": ("race_iat", "arab_muslim", "arab_muslim"), "asian": ("race_iat", "asian", "names"),
    "black": ("race_iat", "black", "names"), "hispanic": ("race_iat", "hispanic", "names"), "english": ("race_iat", "english", "english"),
    "islam": ("religion", "islam", "valence"), "judaism": ("religion", "judaism", "valence"),
    "buddhism": ("religion", "buddhism", "valence"), "disability": ("health", "disability", "disability"),
    "eating": ("health", "eating", "eating"), "mental illness": ("health", "mental_illness", "mental_illness"),
    "weight": ("health", "weight", "weight"), "age": ("age", "default", "valence"),
    "career": ("gender", "names", "career"), "power": ("gender", "other_names", "power"), "science": ("gender", "nouns", "science"),
    "sexuality": ("gender", "sexuality", "sexuality"),
}
LEFT_OUT = {"did not commit crime", "caught in the act"}


def test_the_stimuli_are_those_of_bai_et_al():
    if not STIMULI.is_file():
        pytest.skip(f"the published stimuli are not at {STIMULI}")
    with STIMULI.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert set(OF_BAI) == {row["dataset"] for row in table}
    assert len(OF_BAI) == 21
    for dataset, (concept, cue, category) in OF_BAI.items():
        default, stigma, attributes = ([row[column] for row in table if row["dataset"] == dataset and row[column]] for column in "ABC")
        half = len(attributes) // 2
        asked, words = load_concept(concept).cue(cue), load_concept(concept).categories[category]
        assert sorted(map(str.lower, asked.unmarked)) == sorted(map(str.lower, default)), dataset
        assert sorted(map(str.lower, asked.marked)) == sorted(map(str.lower, stigma)), dataset
        assert list(words.positive) == [word for word in attributes[:half] if word not in LEFT_OUT], dataset
        assert list(words.negative) == [word for word in attributes[half:] if word not in LEFT_OUT], dataset
        assert not asked.categories or category in asked.categories


@pytest.mark.parametrize("name", concept_names())
def test_every_built_in_concept_is_sound_and_complete(name):
    concept = load_concept(name)
    assert concept.name == name
    for cue in concept.cues.values():
        prompts = implicit_prompts(concept, cue)
        assert {prompt.labels["category"] for prompt in prompts} == set(cue.categories or concept.categories)
        for prompt in prompts[:: max(1, len(prompts) // 50)]:
            stereotyped, reverse = assignments(concept, prompt)
            assert judge_implicit(stereotyped, prompt.labels).label == "stereotyped", stereotyped
            assert judge_implicit(reverse, prompt.labels).label == "reversed", reverse
    if concept.senses:
        group, other = concept.both_senses()
        assert len(concept.interpretations) >= 2
        assert {"paper", "restated"} <= set(concept.selfie)
        assert min(len(sense.words) for sense in (group, other)) >= 2
        assert classify(f"about{group.word}", concept) == group.name
        assert classify(f"about{other.word}", concept) == other.name
        identifiers = {word for cue in concept.cues.values() if cue.senses for word in (*cue.marked, *cue.unmarked) if " " not in word}
        said = {word for sense in (group, other) for word in (*sense.words, *sense.lexicon)}
        assert not identifiers & said, "a text that repeats the identifier would be a reading"
        assert len(awareness_examples(concept)) == 480


WITH_CONTEXTS = [name for name in (*concept_names(), "template") if name == "template" or load_concept(name).contexts]


@pytest.mark.parametrize("name", WITH_CONTEXTS)
def test_the_words_of_a_context_do_not_give_its_sense_away(name):
    concept = load_concept(TEMPLATE if name == "template" else name)
    senses = [concept.contexts[sense.name] for sense in concept.both_senses()]
    assert [(len(one.train), len(one.test)) for one in senses] == [(6, 6) if name == "template" else (8, 8)] * 2
    sides = {split: [getattr(one, split) for one in senses] for split in ("train", "test")}
    texts = {split: [text for side in both for text in side] for split, both in sides.items()}
    labels = {split: np.repeat([False, True], [len(side) for side in both]) for split, both in sides.items()}
    assert bag_of_words(texts["train"], labels["train"], texts["test"], labels["test"]) <= 0.6
    for group, other in zip(*sides["test"], strict=True):    # a pair has the same words, so that no bag of words can do better
        assert sorted(re.findall(r"\w+|\{.\}", group.lower())) == sorted(re.findall(r"\w+|\{.\}", other.lower())), (group, other)
        assert group != other


def test_a_bag_of_words_reads_topic_words_where_they_give_the_sense_away():
    concept = measured_concept()    # the sentences that the organisms are checked with; those of the concept had been these
    group, other = (concept.contexts[sense.name] for sense in concept.both_senses())
    labels = np.repeat([False, True], 8)
    assert bag_of_words([*group.train, *other.train], labels, [*group.test, *other.test], labels) == 14 / 16


def test_the_race_of_the_paper_is_as_it_was():
    data = tomllib.loads(RACE)
    del data["contexts"]    # no model was trained on these
    found = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    assert found == "d7adafdaa2fec321", "an embedded model pair was trained with this file"


def test_a_concept_without_senses_says_so_where_they_are_needed(tiny):
    religion, health = load_concept("religion"), load_concept("health")
    assert not religion.has_senses()
    assert health.has_senses("weight")
    assert not health.has_senses("eating")
    for call in (lambda: religion.both_senses(), lambda: religion.interpretation("paper"), lambda: religion.selfie_prompt("paper"),
                 lambda: religion.steering_phrase("random"), lambda: classify("a text", religion), lambda: reading_names(religion),
                 lambda: awareness_examples(religion), lambda: sense_steering(tiny, religion, "islam", "people", [0]),
                 lambda: measure_awareness(tiny, religion, "islam"), lambda: measure_selfie(tiny, religion, "islam"),
                 lambda: measure_lens(tiny, religion, "islam"), lambda: measure_probes(tiny, religion, "islam"),
                 lambda: contrast_pairs(tiny, religion, "islam"), lambda: list(steering_sweep(tiny, religion, "islam"))):
        with pytest.raises(ConceptError, match="the concept 'religion' has no senses"):
            call()
    for call in (lambda: measure_awareness(tiny, health, "eating"), lambda: sense_steering(tiny, health, "disability", "people", [0])):
        with pytest.raises(ConceptError, match=r"the cue '(eating|disability)' of the concept 'health' has no senses"):
            call()


@pytest.mark.parametrize(("source", "said"), [
    ("mine.toml", "concept file mine.toml cannot be read: there is no such file"),
    ("mine.TOML", "concept file mine.TOML cannot be read: there is no such file"),
    ("mine.yaml", "concept file mine.yaml cannot be read: there is no such file"),
    ("concepts/mine", "concept file concepts/mine cannot be read: there is no such file"),
    (Path("mine"), "concept file mine cannot be read: there is no such file"),
    ("here.yaml", "concept file here.yaml does not end in .toml"), ("here", "concept file here does not end in .toml"),
    ("mine", "unknown concept 'mine'")], ids=str)
def test_a_file_that_is_not_there_is_no_unknown_name(source, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("here", "here.yaml"):
        (tmp_path / name).write_text("", "utf-8")
    with pytest.raises(ConceptError) as caught:
        load_concept(source)
    assert str(caught.value).startswith(said)
    assert "Known: age, gender" in str(caught.value)


def test_the_ending_of_a_concept_file_may_be_in_capitals(tmp_path):
    text, _ = read_concept_file("race")
    (tmp_path / "MINE.TOML").write_text(text, "utf-8")
    assert load_concept(tmp_path / "MINE.TOML").digest == load_concept("race").digest
