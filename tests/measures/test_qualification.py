"""Which instruments read a model: on the embedded pair those that were planted, on random weights none; choosing raises no false alarms."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.intervals.clustered import exact_interval
from alignblind_mi.measures.qualification import (
    MOST_LAYERS,
    auc_interval,
    instrument_table,
    measure_instruments,
)
from alignblind_mi.measures.sources import record_sentences, thinned
from alignblind_mi.measures.tuning import Setting, Tried, areas, ask_setting, best_of, by_sentence, injection_layers, sentence_labels, tune
from alignblind_mi.models.edits import Edit, Row, Site
from alignblind_mi.models.model import load_model, untrained
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.concept import ConceptError, concept_names, load_concept
from alignblind_mi.stimuli.questions import own_question, questions


@pytest.fixture(scope="module")
def aligned():
    return load_model("organism:aligned")


@pytest.fixture(scope="module")
def read(aligned, race):
    return measure_instruments(aligned, race, "default", selfie="restated")


def rows_of(gap, *, sentences=8, layers=4, mass=1.0, seed=0):
    """Rows of one instrument: scores of the other sense lie `gap` standard deviations above those of the group sense."""
    drawn = np.random.default_rng(seed)
    return pd.DataFrame([
        {"model": "m", "treatment": "t", "instrument": "lens", "setting": "paper", "question": "", "text": "", "target_layer": -1,
         "mapping": "", "tokens": "", "split": "test", "sense": sense, "sentence": f"{sense}{k}", "layer": layer,
         "score": shift + gap * (sense == "other"), "blind": 0.0, "mass": mass}
        for sense in ("group", "other") for k in range(sentences) for shift in [drawn.normal()] for layer in range(layers)])


# ---- scores ------------------------------------------------------------------------------------------------------------


def test_sentences_say_which_sense_is_meant_and_the_identifiers_are_read_in_them(aligned, race):
    found = record_sentences(aligned, race, "default", [0, 5], "settled")
    assert found.resid.shape == (2 * 2 * 8, 2, aligned.d_model)    # senses, identifiers, sentences
    for source, sentence, label in zip(found.recorded.sources, found.sentences, found.labels, strict=True):
        assert sentence in race.contexts["color" if label else "race"].settled
        assert source.prompt.text == sentence.format(x=_first(source, sentence), y=_second(source, sentence))
        (start, end) = (source.span.start, source.span.end)
        assert source.prompt.text[start:end] == source.prompt.labels[source.role]
    own = aligned.record([Row(found.recorded.sources[3].prompt)], [found.recorded.sources[3].site(5)])
    assert torch.allclose(own[0, 0], found.resid[3, 1], atol=1e-5)


def _first(source, sentence):
    return source.prompt.labels["marked" if source.prompt.labels["option_order"] == "marked_first" else "unmarked"]


def _second(source, sentence):
    return source.prompt.labels["unmarked" if source.prompt.labels["option_order"] == "marked_first" else "marked"]


def test_a_setting_is_asked_as_a_few_lines_would(aligned, race):
    train = record_sentences(aligned, race, "default", [0, 2, 5], "train")
    question = own_question(race, "about")
    found = ask_setting(aligned, train.resid[:3, [2]], [5], Setting(question, 2, tokens="last"), train)
    site = Site(2, "placeholder")
    probs = aligned.next_probs([Row(question.prompt, (Edit(site, train.resid[i, 2]),)) for i in range(3)], [" race", " color"])
    assert found.score[:, 0] == pytest.approx((probs[:, 1].log() - probs[:, 0].log()).numpy(), abs=1e-4)
    assert found.mass[:, 0] == pytest.approx(probs.sum(1).numpy(), abs=1e-5)


def test_areas_count_pairs_and_ties_half():
    scores, labels = np.array([[0.0], [1.0], [1.0], [2.0]]), np.array([False, False, True, True])
    assert areas(scores, labels).tolist() == [0.875]
    several = areas(scores, np.stack([labels, ~labels]))
    assert several[:, 0].tolist() == [0.875, 0.125]
    assert by_sentence(np.array([[1.0], [3.0], [5.0]]), ["a", "a", "b"]).tolist() == [[2.0], [5.0]]


@pytest.mark.parametrize(("auc", "zeros", "ones"), [(1.0, 8, 8), (0.5, 8, 8), (0.0, 8, 8), (0.8, 20, 30), (0.99, 5, 5)])
def test_the_interval_of_an_area_has_a_width_and_holds_it(auc, zeros, ones):
    low, high = auc_interval(auc, zeros, ones)
    assert 0 <= low <= auc <= high <= 1
    assert high - low > 0.1
    mirrored = auc_interval(1 - auc, zeros, ones)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-6)
    assert auc_interval(auc, 1, 8) == (0.0, 1.0)


def test_the_interval_of_an_area_covers():
    """Of two normal samples of 8, whose true area is known."""
    from scipy.stats import norm

    drawn, gap = np.random.default_rng(0), 1.2
    truth, labels = norm.cdf(gap / 2**0.5), np.arange(16) >= 8
    covered = []
    for _ in range(400):
        low, high = auc_interval(float(areas((drawn.normal(size=16) + gap * labels)[:, None], labels)[0]), 8, 8)
        covered.append(low <= truth <= high)
    assert np.mean(covered) > 0.93


# ---- the rule ----------------------------------------------------------------------------------------------------------


def test_instruments_that_tell_the_senses_apart_read():
    (one,) = instrument_table(rows_of(4.0)).to_dict("records")
    assert (one["verdict"], one["n"], one["layers"]) == ("reads", 16, 4)
    assert one["false_alarm"] < 0.05


@pytest.mark.parametrize(("mass", "verdict"), [(0.5, "reads"), (0.03, "doubtful"), (0.002, "does not read")])
def test_answers_that_are_hardly_given_say_little(mass, verdict):
    (one,) = instrument_table(rows_of(4.0, mass=mass)).to_dict("records")
    assert one["verdict"] == verdict
    assert "of the probability" in one["reason"]


def test_what_does_not_tell_them_apart_seldom_reads():
    """The rule is right in 97.5 % where there is nothing (one end of a 95 % interval): of 150, no more than a rate of 2.5 % bears."""
    verdicts = [instrument_table(rows_of(0.0, layers=2, seed=seed))["verdict"].iloc[0] for seed in range(150)]
    assert exact_interval(verdicts.count("reads"), 150).low < 0.025


# ---- on models -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_planted_reads_the_embedded_pair_and_the_lens_does_not(read):
    table = instrument_table(read).set_index(["instrument", "setting"])
    assert table["verdict"].to_dict() == {
        ("patchscope", "paper"): "reads", ("patchscope", "tuned"): "reads", ("logit_lens", "paper"): "does not read",
        ("probe", "paper"): "reads", ("selfie", "paper"): "reads"}
    assert (table["n"] == 16).all()
    assert table.loc[("patchscope", "tuned"), "train_auc"] > 0.95
    assert (table.loc[[("patchscope", "paper"), ("selfie", "paper")], "mean_group"] < -0.8).all()
    assert (table.loc[[("patchscope", "paper"), ("selfie", "paper")], "mean_other"] > 0.8).all()


@pytest.mark.slow
def test_nothing_reads_a_model_of_random_weights(aligned, race):
    table = instrument_table(measure_instruments(untrained(aligned), race, "default", instruments=["patchscope", "logit_lens"]))
    assert len(table) == 3
    assert not (table["verdict"] == "reads").any()


def test_sentences_that_a_tokenizer_cannot_spell_are_left_out(tiny, race):
    with pytest.raises(ModelError, match="knows the words of 2 and 7 of the sentences"):
        measure_instruments(tiny, race, "default", instruments=["probe"])


def test_choosing_sees_the_train_sentences_alone(aligned, race):
    train = record_sentences(aligned, race, "default", sorted({*injection_layers(aligned.n_layers), 7}), "train")
    tried = tune(aligned, train, [0, 7], questions(race)[:3], 2)
    best = best_of(tried)
    again = ask_setting(aligned, train.resid[:, [0, -1]], [0, 7], best.setting, train)
    assert best.auc == pytest.approx(areas(by_sentence(again.score, train.sentences), sentence_labels(train)).mean())
    assert max(one.auc for one in tried if one.mass >= 0.05) == best.auc
    asked = {one.setting.question.name for one in tried}
    assert asked <= {question.name for question in questions(race)[:3]}
    assert {one.setting.mapping for one in tried} == {"identity", "norm-matched", "affine"}


def test_the_best_has_mass_where_any_has(race):
    question = own_question(race, "paper")
    few, much, most = (Tried(Setting(question, layer), auc, mass) for layer, auc, mass in ((0, 1.0, 0.01), (1, 0.8, 0.3), (2, 0.7, 0.9)))
    assert best_of([few, much, most]) is much
    assert best_of([few]) is few


def test_layers_are_thinned_with_both_ends():
    assert thinned(range(32), MOST_LAYERS)[0::7] == [0, 31]
    assert thinned(range(5), MOST_LAYERS) == [0, 1, 2, 3, 4]
    assert len(thinned(range(80), MOST_LAYERS)) == MOST_LAYERS


@pytest.mark.parametrize("name", [name for name in concept_names() if load_concept(name).has_senses()])
def test_every_concept_has_a_dozen_questions_and_their_answers_differ(name):
    concept = load_concept(name)
    found = questions(concept)
    assert len(found) >= 12
    assert len({question.name for question in found}) == len(found)
    for question in found:
        assert question.group != question.other
        assert question.prompt.spans("placeholder")
        assert "{" not in question.prompt.text


def test_bad_input_is_one_sentence(aligned, race):
    with pytest.raises(ModelError, match="unknown instrument 'tarot'"):
        measure_instruments(aligned, race, "default", instruments=["tarot"])
    with pytest.raises(ConceptError, match="unknown cue"):
        measure_instruments(aligned, race, "nobody")


# ---- the verb ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_verb_writes_records_and_a_page_and_measures_once(tmp_path):
    arguments = ["qualify", "--model", "organism:aligned", "--quick", "--instruments", "patchscope,probe", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "qualification.json").read_text("utf-8"))
    assert json.loads(done.stdout) == found
    assert {"kind", "n", "share_right", "low", "high", "log_odds", "position", "verdict"} <= set(found["competence"][0])
    assert {"instrument", "setting", "auc", "low", "high", "mass", "false_alarm", "verdict"} <= set(found["instruments"][0])
    assert [(one["kind"], one["verdict"]) for one in found["competence"]] == [("implicit", "can"), ("explicit", "can")]
    assert found["provenance"][0]["revision"].startswith("sha256:")
    page = (tmp_path / "qualification.html").read_text("utf-8")
    assert "The model can do the implicit task" in page
    assert "Instruments that read it: patchscope (paper), patchscope (tuned), probe (paper)." in page
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.parquet")}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert "Can it do the task?" in again.stdout
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.parquet")} == before


@pytest.mark.slow
def test_a_model_that_knows_none_of_the_words_gets_a_page_that_says_so(tmp_path):
    done = CliRunner().invoke(app, ["qualify", "--model", "organism:gender-aligned", "--concept", "gender", "--instruments", "probe",
                                    "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "qualification.json").read_text("utf-8"))
    assert [(one["kind"], one["n"], one["share_right"], one["verdict"]) for one in found["competence"]] == [
        ("implicit", 0, None, "cannot tell"), ("explicit", 0, None, "cannot tell")]
    assert "0 word pairs could be asked" in (tmp_path / "qualification.html").read_text("utf-8")


def test_an_instrument_that_the_concept_lacks_is_one_sentence(aligned, race):
    with pytest.raises(ConceptError, match=r"unknown SelfIE prompt .*'none'"):
        measure_instruments(aligned, race, "default", instruments=["selfie"], selfie="none")
