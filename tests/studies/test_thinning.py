"""What fits into some minutes: a ladder of ever thinner amounts, the fullest of which fits by the given rate, and which a folder keeps."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import alignblind_mi as ab
from alignblind_mi.__main__ import app
from alignblind_mi.errors import AlignblindError, ResultError
from alignblind_mi.models.spec import ModelError
from alignblind_mi.pages.report import write_report
from alignblind_mi.pages.saved_study import expected_parts
from alignblind_mi.studies import thinning
from alignblind_mi.studies.amounts import FULL, QUICK, RUNGS, Amounts, ladder
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.loads import TokenCount, kind_of, seconds_of, timed
from alignblind_mi.studies.parts import read_layers, study_parts, text_layers
from alignblind_mi.studies.qualify import qualification_parts
from alignblind_mi.studies.rival_loads import comparison_parts
from alignblind_mi.studies.single import SteeringPlan, awareness_parts, bias_parts, measure_parts, patch_parts, steer_parts
from alignblind_mi.studies.study_file import read_study_file
from alignblind_mi.studies.thinning import Counted, fitting, thinned_to_fit

ORGANISM = StudyConfig.create("organism:aligned", "organism:aligned")
VERBS = {"bias": bias_parts, "awareness": awareness_parts, "qualify": qualification_parts,
         "patch": partial(patch_parts, parts=("residual", "heads", "screen")),
         "steer": lambda config: steer_parts(config, SteeringPlan.create(config, method="mean_difference"), Path("nowhere")),
         "compare": comparison_parts}
DEEP = replace(FULL, pairs=63, layers=30, texts=30)


def rates(seconds: float = 1.0) -> dict:
    return defaultdict(lambda: seconds)


def chosen(parts, minutes: float, seconds: float) -> StudyConfig:
    """What is chosen when a token takes so long."""
    counted = Counted(replace(ORGANISM, minutes=minutes), parts)
    return fitting(counted, rates(seconds))


@pytest.mark.parametrize("full", [DEEP, replace(FULL, pairs=4, layers=8, texts=8), replace(FULL, pairs=1, layers=2, texts=2)])
def test_each_rung_is_thinner_than_the_one_before_and_texts_go_last(full):
    rungs = ladder(full)
    assert rungs[0] == full
    assert all(thinner.at_most(fuller) and thinner != fuller for fuller, thinner in pairwise(rungs))
    assert [rung.texts for rung in rungs].count(0) == 1
    assert rungs[-1].texts == 0
    assert rungs[-1].competence == 24, "fewer tell nothing"
    assert len(ladder(DEEP)) == len(RUNGS) + 1


@pytest.mark.parametrize("verb", VERBS)
def test_a_thinner_rung_asks_no_more_and_the_last_much_less(verb):
    counted = Counted(ORGANISM, VERBS[verb])
    some = [counted.ladder[0], *counted.ladder[4::4], counted.ladder[-1]]
    loads = [seconds_of(counted.loads(rung), rates(), counted.tokens) for rung in some]
    assert loads == sorted(loads, reverse=True)
    assert loads[-1] < 0.75 * loads[0]


def test_the_layers_that_are_left_are_spread_evenly_and_the_ends_kept():
    for rung in ladder(DEEP):
        config = replace(ORGANISM, minutes=1.0, amounts=rung)
        for layers in (read_layers(config, 30), text_layers(config, 30)):
            assert layers[0] == 0
            assert layers[-1] == 29 or len(layers) == 1
            steps = {b - a for a, b in pairwise(layers)}
            assert not steps or max(steps) - min(steps) <= 1
        assert len(read_layers(config, 30)) == rung.layers


def test_the_fullest_that_fits_is_chosen():
    counted = Counted(replace(ORGANISM, minutes=10.0), bias_parts)
    taken = [seconds_of(counted.loads(rung), rates(), counted.tokens) for rung in counted.ladder]
    per_token = 600 / taken[0]    # all takes ten minutes
    for minutes in (20, 8, 3, 1):
        left = thinning.PLANNED * 60 * minutes
        found = fitting(Counted(replace(ORGANISM, minutes=float(minutes)), bias_parts), rates(per_token)).amounts
        at = next(i for i, rung in enumerate(counted.ladder) if replace(rung, said=found.said) == found)
        assert taken[at] * per_token <= left
        assert at == 0 or taken[at - 1] * per_token > left
    assert fitting(counted, rates(1e-9)).amounts.said.startswith("Nothing was thinned: all 1,440 rows fit into 10 minutes")
    late = fitting(counted, rates(480 / taken[0]), spent=60.0, loading=60.0).amounts
    assert late.pairs < counted.ladder[0].pairs, "what measuring the rate and loading take is gone"


def test_what_was_left_out_is_said_with_how_much_of_how_much():
    said = chosen(bias_parts, 3.0, 300 / 288_000).amounts.said
    assert said.startswith("Thinned to fit 3 minutes (")
    assert "of 20 word pairs a category; " in said
    assert "of 1,440 rows are left" in said
    assert "layers" not in said
    assert "SelfIE" not in said
    counted = Counted(replace(ORGANISM, minutes=1.0), awareness_parts)
    said = thinning._said(counted, counted.ladder[-1], 1.0)
    assert "2 of 8 layers, no texts (SelfIE), instruments tried at 4 of 8 layers, controls random and wrong token alone; " in said
    assert "word pairs" not in said


def test_where_nothing_fits_it_says_which_minutes_would_and_these_do():
    with pytest.raises(ModelError, match=r"does not fit into 0\.1 minutes here: thinned as far as it goes, it needs about") as error:
        chosen(bias_parts, 0.1, 0.001)
    needed = float(str(error.value).partition("--minutes ")[2].partition(")")[0])
    assert chosen(bias_parts, needed, 0.001).amounts.pairs == 1
    with pytest.raises(ModelError, match="does not fit"):
        chosen(bias_parts, 0.8 * needed, 0.001)


def test_named_texts_are_written_even_where_all_others_would_leave_them_out():
    thin = replace(ORGANISM, minutes=1.0, amounts=ladder(DEEP)[-1])
    assert not any("selfie" in part.name for part in awareness_parts(thin))
    assert [part.name for part in awareness_parts(thin, ["selfie"], skip="qualification")] == ["reading_selfie_model"]
    assert "selfie" in qualification_parts(thin, ["selfie"])[1].name


def test_what_is_not_thinned_is_what_it_was():
    identity = ORGANISM.identity()
    assert not {"minutes", "amounts"} & set(identity)
    assert replace(ORGANISM, minutes=2.0, amounts=FULL).identity() == identity | {
        "minutes": 2.0, "amounts": json.loads(json.dumps(FULL.__dict__))}
    assert ORGANISM.taken(30) == FULL
    quick = StudyConfig.create("organism:aligned", "organism:aligned", quick=True)
    assert quick.taken(30) == QUICK
    assert [len(layers(quick, depth)) for depth in (30, 8) for layers in (read_layers, text_layers)] == [4, 3, 8, 8]


@pytest.mark.parametrize("amounts", [ladder(replace(FULL, pairs=9, layers=8, texts=8))[i] for i in (0, 5, -3, -1)])
def test_a_thinned_study_misses_no_part(amounts):
    config = replace(StudyConfig.create("organism:base", "organism:aligned"), minutes=1.0, amounts=amounts)
    concept = ab.load_concept("race")
    assert expected_parts(config.identity(), concept, 8) == [part.name for part in study_parts(config, concept)]


def test_a_folder_goes_on_with_what_it_was_begun_with(tmp_path, tiny_folder, brief, monkeypatch):
    asked = replace(StudyConfig.create(str(tiny_folder), str(tiny_folder), concept=brief, minutes=0.5),
                    decoding=ab.Decoding(max_new_tokens=2))
    thin = Amounts(1, 24, 2, 1, 2, 0, False, False, False, False, "Thinned.")
    monkeypatch.setattr(thinning, "_within", lambda config, minutes, parts: replace(config, minutes=minutes, amounts=thin))
    begun = thinned_to_fit(asked, tmp_path, bias_parts)
    (first,) = measure_parts(begun, tmp_path, bias_parts(begun))
    assert first.provenance["config"]["amounts"]["said"] == "Thinned."
    assert first.rows.groupby("category")["word_pair"].nunique().max() == 1

    def never(config, minutes, parts):
        raise AssertionError("what was chosen is there")

    monkeypatch.setattr(thinning, "_within", never)
    for file in tmp_path.glob("balanced*"):
        file.unlink()
    again = thinned_to_fit(asked, tmp_path, bias_parts)
    assert again == begun
    (second,) = measure_parts(again, tmp_path, bias_parts(again))
    assert second.rows.equals(first.rows)
    with pytest.raises(ResultError, match=r"results of another configuration: minutes is 0\.5 there and 0\.25 here"):
        measure_parts(replace(begun, minutes=0.25), tmp_path, bias_parts(begun))
    with pytest.raises(ResultError, match="amounts is"):
        measure_parts(replace(begun, minutes=None, amounts=None), tmp_path, bias_parts(ORGANISM))
    note = tmp_path / "study.json"
    note.write_text(note.read_text().replace('"competence"', '"competences"'))
    with pytest.raises(ModelError, match=r"study\.json does not say how much is measured"):
        thinned_to_fit(asked, tmp_path, bias_parts)


def test_parts_that_were_not_chosen_to_fit_are_not_run(tmp_path):
    config = replace(ORGANISM, minutes=1.0)
    with pytest.raises(ModelError, match=r"what fits into 1 minutes is not chosen yet: choose it by `within\(config, 1, parts\)`"):
        measure_parts(config, tmp_path / "out", bias_parts(config))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("minutes", "said"), [
    (0, "minutes must be above 0"), (-1, "minutes must be above 0"), (float("nan"), "a finite number"), (float("inf"), "a finite number"),
    ("soon", "minutes must be a number"), (1e9, "at most 1000000"), (True, "minutes must be a number")])
def test_minutes_that_are_none_are_refused_before_anything_is_loaded(minutes, said, monkeypatch):
    monkeypatch.setattr(thinning, "load_model", lambda *_: pytest.fail("loaded"))
    for ask in (lambda: StudyConfig.create("organism:base", "organism:aligned", minutes=minutes), lambda: ab.within(ORGANISM, minutes)):
        with pytest.raises(ModelError, match=said):
            ask()


@pytest.mark.parametrize(("parts", "said"), [
    (lambda config: [7], "parts must be a function that makes parts of a configuration, such as bias_parts; it made"),
    (lambda config: [ab.Part("mine", "model", False, lambda model, advance: None)], "cannot be reckoned: none says what it asks")])
def test_parts_that_cannot_be_reckoned_are_refused_before_anything_is_loaded(parts, said, monkeypatch):
    monkeypatch.setattr(thinning, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=said):
        thinning._within(ORGANISM, 1.0, parts)


def test_minutes_and_a_quick_look_are_two_ways(tmp_path):
    for ask in (lambda: StudyConfig.create("organism:base", "organism:aligned", quick=True, minutes=1.0),
                lambda: ab.within(StudyConfig.create("organism:base", "organism:aligned", quick=True), 1.0)):
        with pytest.raises(ModelError, match="two ways to ask less: give one of them"):
            ask()
    done = CliRunner().invoke(app, ["bias", "--quick", "--minutes", "1", "--out", str(tmp_path)])
    assert done.exit_code != 0
    assert "two ways to ask less" in str(done.exception) + done.output


@pytest.mark.parametrize("verb", ["bias", "awareness", "steer", "patch", "qualify", "study", "compare"])
def test_every_verb_that_measures_takes_minutes(verb, tmp_path, monkeypatch):
    class AskedError(AlignblindError):
        pass

    def within(config, minutes, parts):
        assert minutes == 2.5
        assert [part.name for part in parts(config)]
        raise AskedError("asked")

    monkeypatch.setattr(thinning, "_within", within)
    done = CliRunner().invoke(app, [verb, "--minutes", "2.5", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, AskedError) or "asked" in done.output
    assert not (tmp_path / "out").exists()


def test_a_study_file_asks_for_minutes(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("base: organism:base\naligned: organism:aligned\nminutes: 4\n")
    assert read_study_file(file) == StudyConfig.create("organism:base", "organism:aligned", minutes=4.0)


def test_the_rate_of_every_kind_of_load_is_measured_on_the_model_itself(tiny, tiny_folder, brief):
    config = replace(StudyConfig.create(str(tiny_folder), str(tiny_folder), concept=brief, protocol="best"),
                     decoding=ab.Decoding(max_new_tokens=3))
    loads = Counted(config, thinning.whole_study).loads(replace(FULL, pairs=1, layers=2, texts=2))
    loads += Counted(config, patch_parts).loads(replace(FULL, pairs=1, layers=2, texts=2))
    found = timed(tiny, config, loads, TokenCount(config), seconds=0.0)
    assert set(found) == {kind_of(load) for load in loads}
    assert {kind[0] for kind in found} == {"answers", "texts", "questions", "patches", "readings"}
    assert all(rate > 0 for rate in found.values())


def test_python_thins_a_configuration_and_holds_no_model(tiny_folder, brief):
    config = replace(StudyConfig.create(str(tiny_folder), str(tiny_folder), concept=brief), decoding=ab.Decoding(max_new_tokens=2))
    found = ab.within(config, 60.0, bias_parts)
    assert found == replace(config, minutes=60.0, amounts=found.amounts)
    assert found.amounts.said.startswith("Nothing was thinned")
    assert not thinning.KEPT


def test_the_page_says_what_was_thinned(tmp_path):
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "data" / "former" / "study", tmp_path / "study"))
    note = json.loads((folder / "study.json").read_text())
    said = "Thinned to fit 2 minutes (1.0 planned): 8 of 63 word pairs a category; 1 of 2 rows are left."
    amounts = replace(ladder(DEEP)[5], said=said)
    (folder / "study.json").write_text(json.dumps(note | {"quick": False, "minutes": 2.0, "amounts": amounts.__dict__}))
    page = write_report(folder).read_text("utf-8")
    assert page.count(said) == 2
    assert "--minutes 2 --out" in page
