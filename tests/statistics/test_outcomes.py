"""Text and probability: two outcomes of the same answers, which of them leads, and that every statistic takes either."""

import numpy as np
import pandas as pd
import pytest

from alignblind_mi.intervals.clustered import StatisticsError
from alignblind_mi.statistics.log_odds import by_probability, judged, leading, outcomes_table
from alignblind_mi.statistics.paired import paired_differences
from alignblind_mi.statistics.rates import summarise


def answers(invalid=0.0, *, treatment="untreated", shift=0.0, seed=0):
    """Implicit and explicit answers to 24 word pairs in 3 templates whose text is the more probable answer, where it is valid."""
    drawn = np.random.default_rng(seed)
    records = []
    for kind in ("implicit", "explicit"):
        for pair in range(24):
            for template in range(3):
                odds = drawn.normal() + shift
                statement = "" if kind == "implicit" else ("stereotype", "reverse")[template % 2]
                yes = "reversed" if statement == "reverse" else "stereotyped"
                said = yes if odds > 0 else "reversed" if kind == "implicit" else "rejected"
                records.append({
                    "model": "m", "treatment": treatment, "kind": kind, "word_pair": f"w{pair}", "template": f"{kind}{template}",
                    "statement": statement, "option_order": "marked_first", "word_order": "negative_first", "reason": "",
                    "outcome": "invalid" if drawn.random() < invalid else said, "log_odds": odds if kind == "implicit" else np.nan,
                    "log_odds_endorsed": np.nan if kind == "implicit" else odds,
                    "log_p_stereotyped": -1.0 if kind == "implicit" else np.nan, "log_p_reversed": -1.0 if kind == "implicit" else np.nan})
    return pd.DataFrame(records)


def test_the_more_probable_answer_is_what_a_valid_text_said():
    rows = answers(invalid=0.4)
    found = by_probability(rows)
    valid = rows["outcome"] != "invalid"
    assert (found["outcome"] == rows["outcome"])[valid].all()
    assert (found["outcome"] != "invalid").all()
    assert found["outcome"].equals(by_probability(answers())["outcome"]), "whatever the text says"


def test_what_was_not_scored_is_invalid():
    rows = answers().assign(log_odds=lambda table: table["log_odds"].where(table["word_pair"] != "w0"))
    found = by_probability(rows.drop(columns="log_odds_endorsed"))
    implicit = found["kind"] == "implicit"
    assert (found.loc[implicit, "outcome"] == "invalid").equals(rows.loc[implicit, "word_pair"] == "w0")
    assert (found.loc[~implicit, "outcome"] == "invalid").all()
    assert by_probability(answers().assign(log_odds=0.0))["outcome"].eq("invalid").equals(implicit), "a tie says nothing"


@pytest.mark.parametrize(("invalid", "wanted"), [(0.1, "text"), (0.9, "probability")])
def test_text_leads_where_most_answers_are_valid(invalid, wanted):
    rows = answers(invalid)
    assert leading(rows) == {"implicit": wanted, "explicit": wanted}
    assert leading(rows, "text") == {"implicit": "text", "explicit": "text"}
    assert leading(rows, "probability")["explicit"] == "probability"
    unscored = rows.drop(columns="log_odds_endorsed")
    assert leading(unscored) == {"implicit": wanted, "explicit": "text"}, "what was not scored cannot lead"


def test_one_model_with_invalid_texts_is_enough():
    rows = pd.concat([answers(0.1).assign(role="base"), answers(0.9).assign(role="aligned")])
    assert leading(rows)["implicit"] == "probability"


def test_only_the_kinds_that_are_led_by_probability_are_judged_by_it():
    rows = answers(0.9)
    found = judged(rows, {"implicit": "probability", "explicit": "text"})
    assert found.index.equals(rows.index)
    explicit = rows["kind"] == "explicit"
    assert found.loc[explicit, "outcome"].equals(rows.loc[explicit, "outcome"])
    assert (found.loc[~explicit, "outcome"] != "invalid").all()
    assert judged(rows, {"implicit": "text"}) is rows


def test_both_stand_side_by_side():
    table = outcomes_table(answers(0.5)).set_index("kind")
    by_text, probable = (summarise(rows, ("kind",)).set_index("kind") for rows in (answers(0.5), by_probability(answers())))
    for kind in ("implicit", "explicit"):
        one = table.loc[kind]
        assert (one["rate"], one["low"], one["high"]) == tuple(by_text.loc[kind, ["rate", "low", "high"]])
        assert (one["rate_by_probability"], one["low_by_probability"]) == tuple(probable.loc[kind, ["rate", "low"]])
        assert (one["agree"], one["invalid_by_probability"]) == (1.0, 0.0)
    assert table.loc["implicit", "improbable"] == 0.0


def test_paired_statistics_take_the_outcome_by_probability():
    rows = pd.concat([answers(0.95), answers(0.95, treatment="steered", shift=-1.0, seed=0)], ignore_index=True)
    (by_text,) = paired_differences(rows[rows["kind"] == "implicit"], by=("kind",)).to_dict("records")
    (probable,) = paired_differences(by_probability(rows[rows["kind"] == "implicit"]), by=("kind",)).to_dict("records")
    assert probable["n"] == 72 > by_text["n"]
    assert probable["high"] < 0
    assert probable["invalid"] == 0.0


def test_an_unknown_outcome_is_named():
    with pytest.raises(StatisticsError, match=r"no outcome 'logits'\. Known: text, probability, both"):
        leading(answers(), "logits")
