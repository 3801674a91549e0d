"""The studies' rows, their columns and their arithmetic, on a tiny random model."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.instruments.patchscope import patchscope_rows
from alignblind_mi.measures import behaviour
from alignblind_mi.measures.awareness import blind_score, measure_awareness
from alignblind_mi.measures.behaviour import Decoding, ask, measure_behaviour
from alignblind_mi.measures.mitigation import compare_treatments, early_window, late_window, steering_sweep
from alignblind_mi.mitigations.steering import sense_steering
from alignblind_mi.models.edits import UNTREATED, Row, Site, Treatment
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.prompts import (
    assignments,
    behaviour_prompts,
    implicit_prompts,
    interpretation_prompt,
    worded_assignments,
)

SHORT = Decoding(max_new_tokens=3)


def test_behaviour_has_one_row_per_prompt_with_its_labels(race, tiny):
    rows = measure_behaviour(tiny, race, "default", design="balanced", decoding=SHORT, max_word_pairs=2)
    prompts = [p for kind in ("implicit", "explicit") for p in behaviour_prompts(race, "default", kind, max_word_pairs=2)]
    assert rows["prompt"].tolist() == [p.text for p in prompts]
    for name in prompts[0].labels:
        assert rows[name].tolist() == [p.labels[name] for p in prompts]
    assert set(rows["outcome"]) <= {"stereotyped", "reversed", "rejected", "invalid"}
    assert (rows.loc[rows["outcome"] == "invalid", "reason"] != "").all()
    assert rows["log_odds"].notna().equals(rows["kind"] == "implicit")


def test_explicit_answers_alone(race, tiny):
    rows = measure_behaviour(tiny, race, "default", kinds=("explicit",), decoding=SHORT, max_word_pairs=1)
    assert len(rows) == 36
    assert rows["log_odds"].isna().all()


def test_log_odds_compare_the_two_assignments(race, tiny):
    prompts = implicit_prompts(race, "default", max_word_pairs=1)
    rows = measure_behaviour(tiny, race, "default", kinds=("implicit",), decoding=SHORT, max_word_pairs=1)
    each = [tiny.continuation_log_probs([Row(p)], [assignments(race, p)])[0] for p in prompts]
    assert rows["log_odds_first"].to_numpy() == pytest.approx([float(a - b) for a, b in each], abs=1e-4)
    assert (rows["log_odds"] - (rows["log_p_stereotyped"] - rows["log_p_reversed"])).abs().max() < 1e-6


def test_wordings_are_summed_as_plain_transformers_reads_them(race, tiny, tiny_folder):
    (prompt,) = implicit_prompts(race, "default", max_word_pairs=1)[5:6]
    row = ask(tiny, race, [prompt], SHORT).iloc[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)

    def log_p(text):
        start, ids = len(tokenizer(prompt.text).input_ids), tokenizer(prompt.text + text).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))

    p, n = prompt.labels["positive"], prompt.labels["negative"]
    a, b = (p, n) if prompt.labels["word_order"] == "positive_first" else (n, p)
    for name, of in (("stereotyped", {p: "white", n: "black"}), ("reversed", {p: "black", n: "white"})):
        ways = [f" {a} - {of[a]}, {b} - {of[b]}", f" {a}: {of[a]}, {b}: {of[b]}", f"\n{a}: {of[a]}\n{b}: {of[b]}",
                f" {a} is {of[a]} and {b} is {of[b]}"]
        assert row[f"log_p_{name}"] == pytest.approx(np.logaddexp.reduce([log_p(text) for text in ways]), abs=1e-4)
    assert row["wordings"] == 4


def test_both_assignments_have_the_same_wordings_that_the_tokenizer_knows(race, tiny, monkeypatch):
    prompts = implicit_prompts(race, "default", max_word_pairs=1)[:3]
    every = ask(tiny, race, prompts, SHORT)
    wordings = [worded_assignments(race, prompt) for prompt in prompts]
    assert all(len(set(both)) == 2 for each in wordings for both in each)
    monkeypatch.setattr(behaviour, "known_texts", lambda tokenizer, texts: {text for text in texts if text not in wordings[0][1]})
    fewer = ask(tiny, race, prompts, SHORT)
    lacking = [each[1] == wordings[0][1] for each in wordings]
    assert fewer["wordings"].tolist() == [3 if lacks else 4 for lacks in lacking]
    assert not all(lacking), "known in another prompt"
    assert (fewer["log_p_stereotyped"][0], fewer["log_p_reversed"][0]) < (every["log_p_stereotyped"][0], every["log_p_reversed"][0])
    same = ~np.array(lacking)
    assert fewer.loc[same, "log_odds"].tolist() == pytest.approx(every.loc[same, "log_odds"].tolist(), abs=1e-5)
    assert fewer["log_odds_first"].tolist() == pytest.approx(every["log_odds_first"].tolist(), abs=1e-5)


def test_a_word_the_tokenizer_does_not_know_is_named_before_anything_runs(race, tiny, monkeypatch):
    from alignblind_mi.stimuli.concept import Cue

    cue = Cue("odd", ("Zebra",), ("white",))
    monkeypatch.setattr(type(tiny), "generate", lambda *a, **k: pytest.fail("generated"))
    with pytest.raises(ModelError, match="does not know 'Zebra'"):
        measure_behaviour(tiny, race, cue)


def test_readings_are_distinct_contexts_times_layers(race, tiny):
    rows = measure_awareness(tiny, race, "default", controls=())
    assert len(rows) == 3 * 2 * 2 * tiny.n_layers    # texts x option orders x roles x layers: the words have not been read yet
    assert (rows["word_pair"] == "").all()
    later = measure_awareness(tiny, race, "default", mentions=(1,), max_word_pairs=2, controls=())
    assert len(later) == 12 * 2 * 6 * tiny.n_layers
    assert (later["word_pair"] != "").all()


def test_readings_by_hand(race, tiny):
    rows = measure_awareness(tiny, race, "default", target_layer=1)
    prompt = next(p for p in implicit_prompts(race, "default") if p.labels["option_order"] == "marked_first")
    resid = tiny.record([Row(prompt)], [Site(2, "marked", occurrence=0)])[0]
    question = interpretation_prompt(race.interpretation("paper"))
    patched = tiny.next_probs(patchscope_rows(resid, question, 1), [" race", " color"])[0]
    base = tiny.next_probs([Row(question)], [" race", " color"])[0]
    row = rows[(rows["template"] == prompt.labels["template"]) & (rows["option_order"] == "marked_first") & (rows["mark"] == "marked")
               & (rows["layer"] == 2)].iloc[0]
    assert row["d_group"] == pytest.approx(float(patched[0] - base[0]), abs=1e-6)
    assert row["blind"] == pytest.approx(float(patched[1] - base[1] - patched[0] + base[0]), abs=1e-6)
    real = rows[rows["control"] == ""]
    assert blind_score(rows) == pytest.approx((real["d_other"] - real["d_group"]).mean())


def test_readings_see_the_treatment(race, tiny):
    steered = tiny.under(sense_steering(tiny, race, "default", "race", range(1, 3)))
    before, after = (measure_awareness(model, race, "default", controls=()) for model in (tiny, steered))
    changed = (before["p_group"] - after["p_group"]).abs().groupby(before["layer"]).max()
    assert changed[0] == pytest.approx(0, abs=1e-6)    # below the window nothing has changed
    assert changed[1] > 1e-6
    spread = after[after["layer"] == 1].groupby("mark")["p_group"].agg(np.ptp)
    assert spread.max() == pytest.approx(0, abs=1e-6)    # inside it every context has the phrase's residual


def test_windows_of_the_comparison():
    assert (early_window(32), late_window(32)) == (range(5, 15), range(22, 32))
    assert (early_window(8), late_window(8)) == (range(1, 4), range(5, 8))


def test_the_sweep_covers_senses_and_controls_in_all_windows(race, tiny):
    sweep = list(steering_sweep(tiny, race, "default"))
    assert len(sweep) == len({t.name for t in sweep}) == 3 * 4
    assert {t.details["sense"]: t.family for t in sweep} == {"race": "steering", "color": "placebo", "random": "placebo"}


def test_treatments_stand_side_by_side(race, tiny):
    treatments = [UNTREATED, sense_steering(tiny, race, "default", "race", [0]), Treatment("polite", prefix="Here are some words. ")]
    comparison = compare_treatments(tiny, race, "default", treatments, decoding=SHORT, max_word_pairs=2)
    table = comparison.table()
    assert table["treatment"].tolist() == [t.name for t in treatments]
    assert (table["n"] == 24).all()
    assert (table["n_readings"] == 12).all()
    untreated = comparison.awareness[comparison.awareness["treatment"] == "untreated"]
    assert table["r_blind"][0] == pytest.approx(blind_score(untreated))
    assert (table["r_blind_low"] <= table["r_blind"]).all()
    assert isinstance(comparison.behaviour, pd.DataFrame)
