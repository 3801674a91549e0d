"""Readings between their anchors: the place is right, and the interval holds it with the anchors' uncertainty."""

import math

import numpy as np
import pandas as pd
import pytest

from alignblind_mi.measures.anchored import Mean, scale_difference, scale_interval, scale_table

SENTENCES, CONTEXTS, TEMPLATES = 8, 12, 4


def rows_of(place, *, noise=0.0, apart=0.8, seed=0, instrument="patchscope", layers=3):
    """Sentences of the group sense at -apart / 2, of the other one at apart / 2, ambiguous contexts at `place` between."""
    drawn = np.random.default_rng(seed)
    ends = {"group": -apart / 2, "other": apart / 2}
    units = [({"split": "test", "sense": sense, "sentence": f"{sense}{k}", "context": "", "template": ""}, ends[sense])
             for sense in ends for k in range(SENTENCES)]
    units += [({"split": "ambiguous", "sense": "", "sentence": "", "context": f"c{k}", "template": f"t{k % TEMPLATES}"},
               ends["group"] + place * apart) for k in range(CONTEXTS)]
    return pd.DataFrame([
        {"model": "m", "treatment": "t", "instrument": instrument, "setting": "paper", **unit, "layer": layer, "score": value,
         "blind": value if instrument != "probe" else float("nan"), "mass": 1.0}
        for unit, at in units for value in [at + noise * drawn.normal()] for layer in range(layers)])


@pytest.mark.parametrize("instrument", ["patchscope", "probe"])
def test_a_reading_is_placed_between_its_anchors(instrument):
    (one,) = scale_table(rows_of(0.3, noise=1e-6, instrument=instrument)).to_dict("records")
    assert one["scale"] == pytest.approx(0.3, abs=1e-4)
    assert (one["n"], one["n_anchors"]) == (CONTEXTS, 2 * SENTENCES)
    assert one["low"] <= 0.3 <= one["high"] < 0.31
    assert (one["mean_group"], one["mean_other"]) == pytest.approx((-0.4, 0.4), abs=1e-4)


def test_the_interval_holds_the_place_with_the_anchors_uncertainty():
    held, wide = [], []
    for seed in range(400):
        (one,) = scale_table(rows_of(0.3, noise=0.3, seed=seed)).to_dict("records")
        held.append(one["low"] <= 0.3 <= one["high"])
        wide.append(one["high"] - one["low"])
    assert np.mean(held) > 0.93
    assert np.median(wide) > 2 * 0.3 / 0.8 * 1.96 / CONTEXTS**0.5    # wider than the ambiguous prompts alone would make it


def test_anchors_that_are_not_apart_give_no_bounds():
    assert scale_interval(Mean(0.0, 0.1), Mean(0.0, 0.3), Mean(0.2, 0.3)) == (-math.inf, math.inf)
    assert all(map(math.isnan, scale_interval(Mean(0.0, 0.1), Mean(math.nan, math.nan), Mean(1.0, 0.1))))


def test_labels_that_all_agree_are_not_sure():
    rows = rows_of(1.0, apart=2.0, instrument="selfie")
    assert set(rows["blind"]) == {-1.0, 1.0}
    (one,) = scale_table(rows).to_dict("records")
    assert one["scale"] == pytest.approx(1.0)
    assert one["high"] - one["low"] > 0.1


def test_without_uncertainty_of_the_anchors_it_is_the_readings_own_interval():
    assert scale_interval(Mean(0.5, 0.1), Mean(0.0, 0.0), Mean(1.0, 0.0)) == pytest.approx((0.4, 0.6))
    assert scale_interval(Mean(0.0, 0.0), Mean(0.0, 0.2), Mean(1.0, 0.0)) == pytest.approx((-0.25, 1 / 6))    # 0.2 (1 - t) = |t|


def test_two_places_differ_by_both_uncertainties():
    one, other = {"scale": 0.2, "low": 0.1, "high": 0.4}, {"scale": 0.9, "low": 0.6, "high": 1.0}
    change, (low, high) = scale_difference(one, other)
    assert change == pytest.approx(0.7)
    assert (low, high) == pytest.approx((0.7 - math.hypot(0.2, 0.3), 0.7 + math.hypot(0.1, 0.1)))


def test_rows_without_ambiguous_prompts_give_no_place():
    rows = rows_of(0.3)
    assert scale_table(rows[rows["split"] == "test"]).empty
    assert scale_table(rows.drop(columns="context")).empty
