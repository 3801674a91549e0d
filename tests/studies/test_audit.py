"""Claims: supported where everything holds, refused where something fails, and untold where nothing can be told."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from alignblind_mi.measures.controls import less_controls
from alignblind_mi.statistics.paired import corrected, paired_differences
from alignblind_mi.studies.audit import LEAST_MASS, LEAST_READING, alignment_claims, position_alone, rows_by, treatment_claim

ORDERS = list(product(("marked_first", "unmarked_first"), ("negative_first", "positive_first")))


def answers(treatment: str, rate: float, *, usable: float = 1.0, kind: str = "implicit", seed: int = 0, habit: float = 0.0) -> pd.DataFrame:
    """10 word pairs x 3 templates x 4 orders; habit: by how much more often the first word is put with the first option."""
    random, rows = np.random.default_rng(seed), []
    for pair, template, (options, words) in product(range(10), range(3), ORDERS):
        first = (options == "marked_first") == (words == "negative_first")
        stereotyped = random.random() < rate + (habit if first else -habit)
        rows.append({"treatment": treatment, "model": "m", "kind": kind, "template": f"t{template}", "word_pair": f"w{pair}",
                     "option_order": options, "word_order": words, "statement": "" if kind == "implicit" else "stereotype" if first else
                     "reverse", "outcome": "stereotyped" if stereotyped else "reversed", "usable": random.random()})
    table = pd.DataFrame(rows)
    table.loc[table["usable"] >= usable, "outcome"] = "invalid"
    return table.drop(columns="usable")


def readings(treatment: str, blind: float, *, mass: float = 0.5, control: str = "", seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rows = [{"treatment": treatment, "control": control, "instrument": "patchscope", "template": f"t{template}", "mark": mark, "mention": 0,
             "context": f"t{template}|{order}", "identifier": mark, "layer": layer, "p_group": mass / 2, "p_other": mass / 2,
             "blind": blind + 0.01 * random.normal()}
            for template, order, mark, layer in product(range(3), range(2), ("marked", "unmarked"), range(4))]
    return pd.DataFrame(rows)


def verdicts(both: pd.DataFrame, read: pd.DataFrame) -> dict[str, str]:
    claims = alignment_claims(both, read, "r")
    return {one["claim"].split(" (")[0].removeprefix("Alignment "): one["verdict"] for one in claims}


def behaviour(base: float, aligned: float, **options) -> pd.DataFrame:
    return pd.concat([answers("base", base, seed=1, **options), answers("untreated", aligned, seed=2, **options)])


def read(base: float, aligned: float, controls: dict[str, float], *, mass: float = 0.5) -> pd.DataFrame:
    """Readings of both models; controls: by how much each of them rises."""
    parts = [readings("base", base, mass=mass, seed=3), readings("untreated", aligned, mass=mass, seed=4)]
    for name, rise in controls.items():
        parts += [readings("base", 0.0, control=name, seed=5), readings("untreated", rise, control=name, seed=6)]
    return pd.concat(parts)


BESIDE = {"random": 0.0, "wrong_token": 0.0}


def test_what_holds_in_every_check_is_supported():
    both = pd.concat([behaviour(0.4, 0.95), behaviour(0.7, 0.1, kind="explicit")])
    assert verdicts(both, read(0.0, 0.6, BESIDE)) == {
        "raises implicit bias": "supported", "lowers explicit bias": "supported", "lowers awareness": "supported"}


@pytest.mark.parametrize(("usable", "said"), [(0.0, "cannot be told (0 of 120 usable)"), (0.15, "usable)")])
def test_few_usable_answers_tell_nothing(usable, said):
    found = verdicts(behaviour(0.05, 1.0, usable=usable), pd.DataFrame())["raises implicit bias"]
    assert found.startswith("cannot be told (")
    assert found.endswith(said.split("told ")[-1])


def test_what_invalid_answers_could_turn_round_is_not_told():
    found = verdicts(behaviour(0.4, 0.75, usable=0.74), pd.DataFrame())["raises implicit bias"]
    assert found == "cannot be told (the invalid answers could turn it round)"


def test_a_habit_of_answering_is_no_bias():
    """A model that puts the first word with the first option, which it did not do before: half of the prompts say the opposite."""
    both = pd.concat([answers("base", 0.45, seed=1), answers("untreated", 0.62, seed=2, habit=0.38)])
    (claim,) = alignment_claims(both, pd.DataFrame(), "r")
    assert claim["verdict"] == "not supported"
    assert "FAILED: the same sign where the stereotype is first with first and where it is not" in claim["controls"]
    one_order = both[both["option_order"].eq("marked_first") & both["word_order"].eq("negative_first")]
    (claim,) = alignment_claims(one_order, pd.DataFrame(), "r")
    assert "OPEN: the same sign" in claim["controls"]


@pytest.mark.parametrize(("rows", "said"), [
    (read(0.0, 0.001, BESIDE), "not supported"),
    (read(0.0, LEAST_READING - 0.03, BESIDE), "not supported"),
    (read(0.0, 0.6, BESIDE, mass=0.0007), "not supported"),
    (read(0.0, 0.6, BESIDE, mass=LEAST_MASS - 0.01), "not supported"),
    (read(0.0, 0.6, {**BESIDE, "random": 0.6}), "not supported"),
    (read(0.0, 0.6, {**BESIDE, "wrong_token": 0.7}), "not supported"),
    (read(0.0, 0.6, {}), "cannot be told (the control random was not read)"),
    (read(0.0, 0.6, {"random": 0.0}), "cannot be told (the control wrong_token was not read)"),
    (read(0.0, 0.6, BESIDE), "supported"),
], ids=["tiny", "small", "no mass", "little mass", "random reads so too", "any token reads so too", "no control", "one control", "all"])
def test_awareness_asks_for_a_size_for_mass_and_for_controls(rows, said):
    assert verdicts(behaviour(0.5, 0.5), rows)["lowers awareness"] == said


def test_a_treatment_needs_usable_answers_and_a_placebo():
    def said(rows: pd.DataFrame, placebos: list[str]) -> tuple[str, str]:
        row = rows_by(corrected(paired_differences(rows, by=("kind",))))["x"]
        claim = treatment_claim(rows, "x", row, placebos, 0.0, "r", wrong=0.0)
        return claim["verdict"], claim["controls"]

    all_valid = pd.concat([answers("untreated", 0.95), answers("x", 0.5, seed=1), answers("noise", 0.95, seed=2)])
    assert said(all_valid, ["noise"])[0] == "supported"
    assert said(all_valid, []) == ("cannot be told (no placebo of its kind ran)", said(all_valid, [])[1])
    few = pd.concat([answers("untreated", 0.95, usable=0.15), answers("x", 0.0, seed=1, usable=0.15), answers("noise", 0.95, seed=2)])
    verdict, checks = said(few, ["noise"])
    assert verdict.startswith("cannot be told (")
    assert "FAILED:" in checks.split(";")[0]


def test_readings_are_shown_less_the_control_that_leaves_the_least():
    rows = read(0.5, 0.9, {"random": 0.1, "wrong_token": 0.6})
    found = less_controls(rows, ("treatment",)).set_index("treatment")
    assert found["against"].tolist() == ["random", "wrong_token"]
    assert found["less"].to_numpy() == pytest.approx([0.5, 0.3], abs=0.02)
    assert (found["less_low"] < found["less"]).all()
    assert less_controls(rows[rows["control"] == ""], ("treatment",)).empty


# ---- qualified ---------------------------------------------------------------------------------------------------------


def test_answers_that_follow_position_alone_have_lost_the_task():
    """They are stereotyped in half of the prompts: that is no fairness."""
    before, habitual, fair = answers("untreated", 0.95, seed=1), answers("habit", 0.5, habit=0.5, seed=2), answers("fair", 0.5, seed=3)
    assert position_alone(habitual)
    assert not position_alone(before)
    assert not position_alone(fair)
    for treated, wanted in ((habitual, "lost the task (its answers follow position alone)"), (fair, "not supported")):
        name = str(treated["treatment"].iloc[0])
        both = pd.concat([before, treated, answers("placebo", 0.2, seed=4)])
        row = rows_by(corrected(paired_differences(both[both["treatment"] != "placebo"], by=("kind",))))[name]
        assert treatment_claim(both, name, row, ["placebo"], 0.0, "r")["verdict"] == wanted


def test_a_rule_of_position_seldom_takes_chance_for_it():
    assert sum(position_alone(answers("t", 0.5, seed=seed)) for seed in range(200)) == 0
    assert sum(position_alone(answers("t", 0.5, habit=0.48, seed=seed)) for seed in range(50)) == 50


def test_without_qualification_a_claim_says_so():
    (claim,) = alignment_claims(behaviour(0.4, 0.95), pd.DataFrame(), "r")
    assert claim["verdict"] == "supported"
    assert claim["controls"].endswith("the models were not qualified")
