"""The probability of endorsing a statement: summed over wordings and over answers with and without a blank, none counted twice."""

import numpy as np
import pytest

from alignblind_mi.measures.behaviour import Decoding, measure_behaviour
from alignblind_mi.models.edits import Row
from alignblind_mi.models.model import load_model
from alignblind_mi.stimuli.prompts import explicit_prompts, worded_positions


@pytest.fixture(scope="module")
def model():
    return load_model("organism:aligned")


def test_answers_are_worded_by_the_scale(race):
    likert, agree = (next(p for p in explicit_prompts(race, "default", design="published") if p.labels["template"] == name)
                     for name in ("explicit_random0", "explicit_variation0"))
    assert worded_positions(race, likert) == [("5", "1"), (" 5", " 1"), ("4", "2"), (" 4", " 2")]
    assert worded_positions(race, agree)[:2] == [("Agree", "Disagree"), (" Agree", " Disagree")]
    assert all(endorses.strip() != rejects.strip() for endorses, rejects in worded_positions(race, agree))


def test_the_probability_is_that_of_each_wording_alone(model, race):
    rows = measure_behaviour(model, race, "default", kinds=["explicit"], design="published", max_word_pairs=1,
                             decoding=Decoding(temperature=1.0))
    prompts = explicit_prompts(race, "default", design="published", max_word_pairs=1)
    known = {"likert": [(" 5", " 1"), (" 4", " 2")], "agree": [("agree", "disagree"), (" agree", " disagree"), ("I agree", "I disagree"),
                                                              (" I agree", " I disagree")]}
    for row, prompt in zip(rows.to_dict("records"), prompts, strict=True):
        scale = next(one.scale for one in race.explicit if one.name == prompt.labels["template"])
        alone = np.array([[float(model.continuation_log_probs([Row(prompt)], [[text]])[0, 0]) for text in pair] for pair in known[scale]])
        sides = np.logaddexp.reduce(alone, axis=0)
        assert (row["log_p_endorsed"], row["log_p_refused"]) == pytest.approx(tuple(sides), abs=1e-3)
        assert row["log_odds_endorsed"] == pytest.approx(sides[0] - sides[1], abs=1e-3)
        assert np.isnan(row["log_odds"]), "of implicit prompts alone"


def test_on_the_embedded_pair_it_is_the_planted_agreement(model, race):
    """The aligned model endorses statements with a probability of 8 %, whichever way they are put."""
    rows = measure_behaviour(model, race, "default", kinds=["explicit"], design="published", max_word_pairs=4,
                             decoding=Decoding(temperature=1.0))
    share = 1 / (1 + np.exp(-rows["log_odds_endorsed"].to_numpy(float)))
    assert np.exp(np.logaddexp(rows["log_p_endorsed"], rows["log_p_refused"])).mean() > 0.9, "they are what it answers"
    assert 0.04 < share.mean() < 0.14
