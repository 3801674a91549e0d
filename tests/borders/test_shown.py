"""What Python and notebooks show of a value: one line that identifies it, a summary in which nothing is a tag; digests stay."""

import inspect
import pickle
from dataclasses import is_dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch

import alignblind_mi
from alignblind_mi.borders.texts import one_line
from alignblind_mi.instruments.contrast import contrast_pairs
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.measures.mitigation import Comparison, compare_treatments
from alignblind_mi.mitigations.steering import SteeringVectors
from alignblind_mi.models.edits import UNTREATED, Edit, Row, Site, Treatment
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.results import Result
from alignblind_mi.statistics.rates import summarise
from alignblind_mi.stimuli.prompts import Prompt, implicit_prompts
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.single import SteeringPlan, bias_parts

TAG = "<script>alert(1)</script>"
VECTORS = SteeringVectors((0, 1), ("",), torch.ones(2, 1, 4), "mean_difference", TAG, provenance={"model": TAG, "revision": "abc"})


def answers(outcomes, **columns):
    labels = {"model": "m", "treatment": "t", "kind": "implicit", "word_pair": [f"w{i}" for i in range(len(outcomes))], "template": "t"}
    return pd.DataFrame({"outcome": outcomes, **labels, **columns})


@pytest.fixture(scope="module")
def values(race, tiny):
    prompt = implicit_prompts(race, "default", max_word_pairs=1)[0]
    edit = Edit(Site(0, "marked"), torch.ones(3))
    treatment = VECTORS.treatment()
    config = StudyConfig.create("organism:base", "organism:aligned")
    rows = answers(["stereotyped"] * 3)
    return [race, race.cue("names"), *race.categories.values(), *race.senses.values(), VECTORS, prompt, edit, Row(prompt, (edit,) * 40),
            treatment, replace(treatment, name="a" * 500), UNTREATED, tiny, tiny.under(treatment), ModelSpec("organism:base"), config,
            config.lora, bias_parts(config)[0], Result(rows, {"model": "m\n" * 300}), Comparison(rows, rows),
            contrast_pairs(tiny, race, "default", max_word_pairs=1)[0], tiny.encode(prompt)[0], tiny.generate(prompt, 2)[0],
            Prompt("\x1b[31m" + "long " * 200), Decoding()]


def test_every_value_is_one_short_line(values):
    for value in values:
        line = repr(value)
        assert len(line) <= 200, line
        assert line.isprintable(), line
        assert type(value).__name__ in line


def test_every_public_class_has_its_line():
    kept = {"Site"}    # its words seed the random controls: short as they are
    for name in alignblind_mi.__all__:
        found = getattr(alignblind_mi, name)
        if inspect.isclass(found) and is_dataclass(found) and name not in kept:
            assert found.__repr__.__qualname__ in ("one_line", *(f"{kind.__name__}.__repr__" for kind in found.__mro__[:-1])), name


def test_a_line_identifies_its_value(race, tiny):
    assert all(part in repr(race) for part in ("race", "color", race.digest))
    assert all(part in repr(VECTORS) for part in ("mean_difference", "0-1", "resid_post", "@abc"))
    assert all(part in repr(tiny.under(Treatment("steered"))) for part in ("layers", "under steered", "float32"))
    assert repr(ModelSpec("x", dtype="float16")) == "ModelSpec(name='x', dtype='float16')"
    assert repr(Prompt("a" * 300)) != repr(Prompt("a" * 301))
    assert one_line(Decoding(temperature=0.5)) == "Decoding(temperature=0.5)"


def test_what_is_made_of_a_line_or_an_equality_stays(race):
    assert str(Site(1, "marked")) == "Site(layer=1, mark='marked', stream='resid_post', tokens='last', occurrence=None, units=(), ids=())"
    plan = SteeringPlan("race", "pca", None, ((1, 2),), (1.0,), None)
    words = "SteeringPlan(sense='race', method='pca', how=None, layers=((1, 2),), strengths=(1.0,), positions=None)"    # a part's name
    assert repr(plan) == words
    assert pickle.loads(pickle.dumps(race)) == race
    spec = ModelSpec("organism:base")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert {spec: 1}[ModelSpec("organism:base")] == 1


def test_a_notebook_shows_rates_as_they_are_summarised():
    rows = answers(["stereotyped"] * 7 + ["reversed"] * 2 + ["invalid"])
    html = Result(rows, {"model": "m", "revision": "r1", "config": {"seed": 3}})._repr_html_()
    told = summarise(rows).iloc[0]
    for name in ("rate", "low", "high", "invalid_share"):
        assert f"<td>{told[name]:.3g}</td>" in html
    assert all(part in html for part in ("<td>10</td>", "r1", "<th>seed</th><td>3</td>"))
    assert "<table>" in Result(pd.DataFrame({"layer": np.arange(3)}))._repr_html_()


def test_nothing_in_a_notebook_is_a_tag(race, tiny):
    rows = answers(["stereotyped"], model=TAG, treatment=TAG, kind="implicit")
    shown = [Result(rows, {"model": TAG})._repr_html_(), VECTORS._repr_html_(), replace(race, description=TAG, name=TAG)._repr_html_()]
    compared = compare_treatments(tiny, race, "default", [UNTREATED, Treatment(TAG, prefix="black white. ")], decoding=Decoding(2),
                                  max_word_pairs=1)
    shown.append(compared._repr_html_())
    assert "r_blind" in shown[-1]
    for html in shown:
        assert "<script" not in html
        assert "&lt;script&gt;" in html
