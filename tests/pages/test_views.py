"""Views: what CircuitsVis is given, and that it needs no network."""

import json
import re

import pandas as pd
import pytest

from alignblind_mi.instruments.attention import attention_rows
from alignblind_mi.instruments.lens import lens_contrast, logit_lens
from alignblind_mi.models.edits import EditError
from alignblind_mi.pages.views import View, ViewError, as_page, attention_view, pattern_view, token_view
from alignblind_mi.stimuli.prompts import mark


def given(view: View, component: str) -> dict:
    """What the page gives to CircuitsVis."""
    script, call = view.html.split("CircuitsVis.render(")[0], view.html.split("CircuitsVis.render(")[-1]
    assert len(script) > 100_000, "the library itself is in the page"
    assert "unpkg.com" not in call
    found = re.search(rf"{component},\s*(\{{.*\}})\s*\)", call, re.DOTALL)
    assert found is not None, call[:300]
    return json.loads(found.group(1))


@pytest.fixture(scope="module")
def rows(tiny) -> pd.DataFrame:
    return logit_lens(tiny, [mark("race : black and white", marked="black")], ["race", "color"])


def test_the_contrast_is_the_difference_of_the_two_words(rows):
    found = lens_contrast(rows, "race", "color")
    assert len(found) == len(rows) / 2
    for row in found.to_dict("records"):
        both = rows[(rows["position"] == row["position"]) & (rows["layer"] == row["layer"])].set_index("word")["log_prob"]
        assert row["log_odds"] == pytest.approx(both["race"] - both["color"])
    shuffled = lens_contrast(rows.sample(frac=1, random_state=0), "race", "color").sort_values(["position", "layer"], ignore_index=True)
    assert shuffled["log_odds"].tolist() == pytest.approx(found.sort_values(["position", "layer"])["log_odds"].tolist())
    with pytest.raises(EditError, match="has not read the word 'green'"):
        lens_contrast(rows, "race", "green")


def test_the_token_view_has_a_button_a_layer_and_one_scale(rows, tiny):
    table = lens_contrast(rows, "race", "color")
    shown = given(token_view(table), "ColoredTokensMulti")
    assert [token.strip() for token in shown["tokens"]] == ["race", ":", "black", "and", "white"]
    assert shown["labels"] == [f"layer {i}" for i in range(tiny.n_layers)]
    for i, values in enumerate(shown["values"]):
        assert values == pytest.approx(table[table["position"] == i].sort_values("layer")["log_odds"].tolist())
    limit = table["log_odds"].abs().max()
    assert shown["positiveBounds"] == pytest.approx([limit] * tiny.n_layers)
    assert shown["negativeBounds"] == pytest.approx([-limit] * tiny.n_layers)


def test_the_token_view_of_one_layer_and_another_value(rows):
    table = rows[rows["word"] == "race"]
    shown = given(token_view(table, value="prob", layer=1), "ColoredTokensMulti")
    assert shown["labels"] == ["layer 1"]
    assert [row[0] for row in shown["values"]] == pytest.approx(table[table["layer"] == 1]["prob"].tolist())


def test_what_cannot_be_shown_is_said(rows):
    with pytest.raises(ViewError, match="no column 'log_odds'"):
        token_view(rows)
    with pytest.raises(ViewError, match="no layer 99"):
        token_view(lens_contrast(rows, "race", "color"), layer=99)
    with pytest.raises(ViewError, match="several prompts or models"):
        token_view(rows, value="prob")


def test_attention_rows_are_the_patterns_of_the_bridge(tiny):
    rows = attention_rows(tiny, "race : black and white", 1)
    (pattern,) = tiny.cache("race : black and white", ["blocks.1.attn.hook_pattern"]).activations.values()
    assert (rows["key"] <= rows["query"]).all()
    sums = rows.groupby(["head", "query"])["weight"].sum()
    assert sums.to_numpy() == pytest.approx(1.0, abs=1e-5)
    row = rows[(rows["head"] == 2) & (rows["query"] == 3) & (rows["key"] == 1)].iloc[0]
    assert row["weight"] == pytest.approx(float(pattern[0, 2, 3, 1]))
    assert row["token"].strip() == "black"
    with pytest.raises(ViewError, match="of one prompt in one layer"):
        pattern_view(pd.concat([rows, attention_rows(tiny, "race : black and white", 2)]))
    page = as_page(pattern_view(rows), "a <b>")
    assert page.startswith("<!DOCTYPE html>")
    assert "a &lt;b&gt;" in page


def test_the_attention_view_has_every_head_and_needs_no_network(tiny):
    shown = given(attention_view(tiny, "race : black and white", layer=1), "AttentionPatterns")
    assert len(shown["attention"]) == tiny.n_units(1, "z")
    assert len(shown["attention"][0]) == len(shown["tokens"])
