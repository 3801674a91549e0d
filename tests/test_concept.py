from pathlib import Path

import pytest

from alignblind_mi.concept import ConceptError, load_concept

RACE = (Path(__file__).parents[1] / "alignblind_mi" / "concepts" / "race.toml").read_text("utf-8")


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
