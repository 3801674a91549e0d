"""The calibration: what it measures is not what was planted with, and its verdicts are right on rows whose truth is known."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from calibrated_rows import made, perfect

from alignblind_mi.errors import ResultError
from alignblind_mi.measures.sources import reading_sources
from alignblind_mi.models.embedded import OrganismError
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.organism.corpus import ALIGNED_MIX, BASE_MIX, Corpus
from alignblind_mi.organism.family import calibration_family
from alignblind_mi.organism.members import FamilyRecipe, MemberRows, measured_concept, member_world
from alignblind_mi.organism.world import Knobs, load_world
from alignblind_mi.pages import calibration_page
from alignblind_mi.stimuli.concept import former_digests, load_concept
from alignblind_mi.studies import calibration
from alignblind_mi.studies.calibration import CalibrationConfig, measure_instruments, run_calibration
from alignblind_mi.studies.qualified_organisms import qualify_organism
from alignblind_mi.studies.verdicts import (
    SMALLEST,
    advice,
    alarm_table,
    calibration_records,
    convergence_table,
    coverage_table,
    depth_table,
)

FAMILY = calibration_family()

# ---- held out ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_texts():
    """What is patched from and into in the planting of every kind of member: many rows each."""
    world, recipe = member_world(), FamilyRecipe()
    sources, asked, tasks = set(), set(), set()
    for member in {member.kind: member for member in FAMILY}.values():
        rows = MemberRows(world, member.knobs, recipe.planting_of(member), aligned=True, seed=5)
        for _ in range(40):
            for row in (*rows.placeholders(), *rows.tasks()):
                sources.add(row.source)
                (tasks if row.into == "identifiers" else asked).add(row.document[0].text)
    return sources, asked, tasks


def test_templates_that_measure_were_never_planted_or_trained_with(planted_texts, race):
    _, _, tasks = planted_texts
    stages = [(load_world(), False, BASE_MIX), (load_world(), True, ALIGNED_MIX), (member_world(), True, ALIGNED_MIX)]
    corpora = [(Corpus(world, Knobs(), aligned=aligned, seed=3), mix) for world, aligned, mix in stages]
    documents = [corpus.document(mix) for corpus, mix in corpora for _ in range(1500)]
    trained = {"".join(segment.text for segment in document) for document in documents}

    def leads(templates):
        return [template.text.split("{word1}")[0].format(first=x, second=y) for template in templates
                for x, y in (("black", "white"), ("white", "black"))]
    measured = leads(measured_concept().implicit)
    assert len(measured) == 4
    for lead in measured:
        assert not any(lead in text for text in (*tasks, *trained)), lead
    for lead in leads(race.implicit):    # the concept's own were: the check can fail
        assert any(lead in text for text in tasks)
        assert any(lead in text for text in trained)


def test_phrases_and_prompts_that_measure_were_never_planted_with(planted_texts, race):
    sources, asked, _ = planted_texts
    assert len(sources) > 500
    orders = [("black", "white"), ("white", "black")]
    templates = [text for contexts in race.contexts.values() for text in (*contexts.train, *contexts.test)]
    sentences = [text.format(x=x, y=y) for text in templates for x, y in orders]
    phrases = [race.steering_phrase(name).format(marked="black", unmarked="white") for name in (*race.senses, *race.controls)]
    prompts = [source.seen() for concept in (race, measured_concept()) for source in reading_sources(
        concept, calibration.CUE, mentions=(0, 1), max_word_pairs=1)]
    for text in (*sentences, *phrases, *prompts):
        assert not any(text in source for source in sources), text
    target = race.interpretation(calibration.QUESTION)
    selfie = race.selfie_prompt(calibration.SELFIE_PROMPT)
    for question in (target, selfie):
        assert question.text.format(x=question.placeholder) not in asked
    assert race.interpretation("paper").text.format(x="[MASK]") in asked    # the other question was planted with: the check can fail


def test_layers_and_streams_that_measure_were_never_planted_at():
    recipe = FamilyRecipe()
    for member in FAMILY:
        assert recipe.planting_of(member).target != calibration.TARGET_LAYER
    assert calibration.STREAM != "resid_post"    # interchange training patches the stream after a block


def test_words_that_measure_never_met_the_identifiers_in_training(race):
    world = load_world()
    words = {word for category in race.categories.values() for word in (*category.positive, *category.negative)}
    assert not words & {*world.positive, *world.negative}


# ---- verdicts on made rows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ideal():
    return pd.concat([perfect(member, name) for member in FAMILY for name in ("r_blind", "activation_patching")], ignore_index=True)


def test_a_perfect_instrument_passes_every_check(ideal):
    for record in calibration_records(ideal):
        assert record["seeds"] == [0, 1, 2]
        assert record["n"] == len(FAMILY)
        assert record["spearman"] == pytest.approx(1.0)
        assert record["spearman_other_knob"] == pytest.approx(0.0)
        assert record["depth_error"] == 0
        assert record["last_error"] == (0 if record["measures"] == "behaviour" else None)
        assert record["causal_separated"] is True
        assert record["false_alarm_rate"] == 0
        assert 0.93 <= record["coverage"] <= 0.97
        assert record["coverage_n"] == 21 * 400
    said = " ".join(advice(calibration_records(ideal)))
    assert "How is the word read? Believe r blind" in said
    assert "Does the answer depend on it? Believe activation patching" in said


def test_an_instrument_that_sees_what_is_not_used_does_not_separate(ideal):
    rows = ideal[ideal["instrument"] == "r_blind"].copy()
    for variant, value in (("group", -0.9), ("other", 0.9)):
        rows.loc[(rows["kind"] == "decodable") & (rows["variant"] == variant), "value"] = value
    (record,) = calibration_records(rows)
    assert record["causal_separated"] is False
    assert "That a sense is decoded is no evidence that it is used: r blind" in " ".join(advice([record]))


def test_a_blind_instrument_fails_and_is_not_believed():
    rows = pd.concat([made(member, "probe", lambda variant, layer: 0.0, seed=1) for member in FAMILY])
    (record,) = calibration_records(rows)
    assert record["spearman"] < 0.9
    assert record["depth_error"] is None
    assert record["causal_separated"] is False
    assert advice([record])[0].startswith("Do not read senses off probe")


def test_depth_is_off_by_as_much_as_the_instrument_is(ideal):
    late = ideal[ideal["instrument"] == "activation_patching"].assign(layer=lambda rows: rows["layer"] + 2)
    found = depth_table(late)
    assert set(found["onset_error"]) == {2.0}
    assert set(found["last_error"]) == {2.0}


@pytest.mark.parametrize(("shift", "rate"), [(0.0, 0.0), (SMALLEST["r_blind"] / 2, 0.0), (2 * SMALLEST["r_blind"], 1.0)])
def test_alarms_need_an_effect_beyond_the_controls(ideal, shift, rate):
    rows = ideal[(ideal["instrument"] == "r_blind")].copy()
    rows.loc[(rows["kind"] == "null") & (rows["variant"] == "open"), "value"] += shift
    alarms = alarm_table(rows)
    assert set(alarms["seed"]) == {0, 1, 2}
    own = alarms[alarms["control"] == ""]
    assert own["alarm"].mean() == rate
    assert alarms.loc[alarms["control"] == "wrong_token", "alarm"].mean() == 0
    rows.loc[rows["variant"] == "placebo", "value"] += shift    # a target prompt with a leaning of its own: the controls share it
    assert alarm_table(rows)["alarm"].mean() == 0


def test_coverage_is_that_of_the_interval(ideal):
    found = coverage_table(ideal[ideal["instrument"] == "r_blind"], simulations=200)
    assert (found["n"] == 200).all()
    assert 0.9 <= found["covered"].sum() / found["n"].sum() <= 0.98
    assert found["width"].mean() == pytest.approx(2 * 2.045 * 0.1 / np.sqrt(30), rel=0.2)


def test_instruments_of_different_knobs_do_not_agree(ideal):
    table = convergence_table(ideal).set_index(["first", "second"])["spearman"]
    assert table["r_blind", "planted reading"] == pytest.approx(1, abs=0.02)
    assert table["r_blind", "activation_patching"] == pytest.approx(0, abs=0.05)
    assert table["r_blind", "r_blind"] == pytest.approx(1)


# ---- on models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair_rows():
    # The pair was planted in the concept's own templates; of the sentences, those that organisms are measured with (`measured_concept`).
    concept = load_concept(f"race@{former_digests('race')[-1]}")
    return {role: measure_instruments(load_model(ModelSpec(f"organism:{role}")), concept, word_pairs=1) for role in ("base", "aligned")}


@pytest.mark.slow
def test_every_instrument_measures_the_shipped_pair(pair_rows):
    means = {role: rows[rows["variant"] == "open"].groupby("instrument")["value"].mean() for role, rows in pair_rows.items()}
    for name in ("r_blind", "selfie", "probe"):    # planted: base 0, aligned .9
        assert means["aligned"][name] > means["base"][name] + 0.1, name
    assert means["aligned"]["r_blind"] == pytest.approx(0.9, abs=0.2)
    for name in ("implicit_bias", "steering", "activation_patching"):    # planted: base .14, aligned .44 above one half
        assert means["aligned"][name] > means["base"][name] + 0.1, name
    for rows in pair_rows.values():
        assert set(rows["instrument"]) == set(calibration.INSTRUMENTS)
        assert rows["value"].notna().all()
        assert rows["value"].abs().max() <= 2


@pytest.mark.slow
def test_a_calibration_is_built_measured_resumed_and_shown(tmp_path, monkeypatch):
    few = [member for member in calibration_family((0,)) if member.kind in ("null", "decodable", "depth") or member.reading == 0.95][:3]
    tiny = FamilyRecipe().shortened(1)

    def ideal_rows(model, concept, *, word_pairs, seed):    # measuring itself is tested on the shipped pair
        member = next(member for member in few if member.name in model.spec.name)
        return pd.concat([perfect(member, name) for name in calibration.INSTRUMENTS])[list(calibration.COLUMNS)]

    monkeypatch.setattr(calibration, "measure_instruments", ideal_rows)
    monkeypatch.setattr(calibration, "calibration_family", lambda seeds, quick: few)
    from alignblind_mi.organism.family import member_path

    monkeypatch.setattr(calibration, "member_path", lambda member, cache, say: member_path(member, cache, recipe=tiny))
    monkeypatch.setattr(calibration, "qualify_organism", lambda *args, seed, shuffles, models: qualify_organism(
        *args, seed=seed, shuffles=2, models=1))
    config = CalibrationConfig((0,), quick=True)
    out = run_calibration(config, tmp_path / "out", cache=tmp_path / "cache")
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert len(before) == 2 * len(few)
    monkeypatch.setattr(calibration, "member_path", lambda *given: pytest.fail("built again"))
    assert run_calibration(config, out) == out
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")} == before
    page = calibration_page.write_calibration(out)
    records = json.loads((out / "calibration.json").read_text("utf-8"))
    assert [record["instrument"] for record in records] == list(calibration.INSTRUMENTS)
    assert {"instrument", "spearman", "depth_error", "causal_separated", "false_alarm_rate", "coverage", "seeds"} <= set(records[0])
    html = page.read_text("utf-8")
    assert pd.read_csv(out / "tables" / "records.csv")["instrument"].tolist() == list(calibration.INSTRUMENTS)
    for name in ("recovery", "depth", "trust", "convergence"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert html.count("data:image/svg+xml") == 4
    assert "A quick calibration" in html
    honesty = {(record["instrument"], record["setting"]): record for record in json.loads((out / "qualified.json").read_text("utf-8"))}
    assert honesty["patchscope", "tuned"]["shuffled_n"] == 2 * len(few)
    assert "Is qualification right about them?" in html
    with pytest.raises(ResultError):
        run_calibration(replace(config, seeds=(1,)), out)


def test_what_cannot_be_calibrated_is_said(tmp_path):
    assert CalibrationConfig.create("0, 2,2").seeds == (0, 2)
    assert CalibrationConfig.create("3,4", quick=True).seeds == (3,)
    with pytest.raises(OrganismError, match="'x' is no seed"):
        CalibrationConfig.create("0,x")
    with pytest.raises(ResultError, match="holds no calibration"):
        calibration_page.write_calibration(tmp_path)
