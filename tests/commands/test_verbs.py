"""The verbs bias, awareness and patch: rows saved with provenance, tables that are those of the public functions, JSON alone on request."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.errors import AlignblindError
from alignblind_mi.instruments.contrast import PatchError
from alignblind_mi.measures.awareness import summarise_readings
from alignblind_mi.results import load_result
from alignblind_mi.statistics.rates import summarise
from alignblind_mi.stimuli.concept import ConceptError
from alignblind_mi.studies import single
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.single import SingleError, awareness_parts, bias_parts, bias_tables, patch_parts, strongest_places


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def recorded(*arguments: object) -> list[dict]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def biased(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("bias") / "out"
    return out, recorded("bias", "--model", tiny_folder, "--quick", "--out", out)


def test_bias_prints_what_its_rows_say(biased, tiny_folder):
    out, records = biased
    result = load_result(out / "balanced_model.parquet")
    assert result.provenance["revision"].startswith("sha256:")
    rates = [r for r in records if r["table"] == "rates" and r["category"] == "all"]
    expected = summarise(result.rows, ["kind"])
    assert [(r["kind"], r["n"], r["invalid_share"]) for r in rates] == list(
        expected[["kind", "n", "invalid_share"]].itertuples(index=False, name=None))
    assert {r["table"] for r in records} == {"rates", "outcomes", "log_odds", "position"}
    leads = {(r["kind"], r["leads"]) for r in records if r["table"] == "outcomes"}
    assert leads == {("implicit", "probability"), ("explicit", "probability")}
    assert all(r["revision"] == result.provenance["revision"] and r["seed"] == 0 for r in records)
    odds = next(r for r in records if r["table"] == "log_odds" and r["category"] == "all")
    implicit = result.rows[result.rows["kind"] == "implicit"]
    assert odds["n"] == len(implicit)
    assert odds["mean"] == pytest.approx(implicit["log_odds"].mean())
    assert odds["low"] <= odds["mean"] <= odds["high"]


def test_a_second_run_only_shows_and_another_design_stands_beside(biased, tiny_folder, monkeypatch):
    out, _ = biased
    monkeypatch.setattr("alignblind_mi.studies.running.load_model", None)    # whoever computes fails
    done = run("bias", "--model", tiny_folder, "--quick", "--out", out)
    assert done.exit_code == 0, done.stderr
    said = " ".join(done.stdout.split())
    for text in ("bounds %", "Association beside position", "revision sha256:", "seed 0, greedy", "invalid"):
        assert text in said
    monkeypatch.undo()
    assert {r["n"] for r in recorded("bias", "--model", tiny_folder, "--quick", "--out", out, "--design", "published")} >= {8 * 4 * 3}
    assert sorted(file.name for file in out.glob("*.parquet")) == ["balanced_model.parquet", "behaviour_model.parquet"]


def test_other_settings_need_another_folder(biased, tiny_folder):
    done = run("bias", "--model", tiny_folder, "--quick", "--out", biased[0], "--seed", 1)
    assert isinstance(done.exception, AlignblindError)
    assert "seed is 0 there and 1 here" in str(done.exception)


@pytest.mark.slow
def test_awareness_asks_each_instrument_with_its_controls(tiny_folder, tmp_path):
    records = recorded("awareness", "--model", tiny_folder, "--quick", "--out", tmp_path / "out")
    readings = pd.DataFrame([r for r in records if r["table"] == "readings"])
    assert set(readings["instrument"]) == {"patchscope", "selfie", "logit_lens", "probe"}
    assert {"", "random", "wrong_token"} <= set(readings["control"])
    rows = load_result(tmp_path / "out" / "awareness_model_paper.parquet").rows
    expected = summarise_readings(rows, ["control"])
    found = readings[readings["instrument"] == "patchscope"]
    assert found["mean"].tolist() == pytest.approx(expected["mean"].tolist())
    selfie = load_result(tmp_path / "out" / "reading_selfie_model.parquet").rows
    own = readings[(readings["instrument"] == "selfie") & (readings["control"] == "")]["invalid_share"].item()
    assert own == pytest.approx((selfie[selfie["control"] == ""]["reading"] == "other").mean())
    assert {r["layer"] for r in records if r["table"] == "layers"} == {0, 1, 2, 3}
    done = run("awareness", "--model", tiny_folder, "--quick", "--out", tmp_path / "out", "--instruments", "patchscope, probes")
    assert "selfie" not in done.stdout
    assert "probe" in done.stdout


@pytest.mark.slow
def test_patch_shows_depth_beside_controls_and_the_strongest_places(tiny_folder, tmp_path):
    arguments = ("patch", "--model", tiny_folder, "--quick", "--parts", "residual,heads", "--out", tmp_path)
    records = recorded(*arguments)
    depth = [r for r in records if r["table"] == "depth"]
    assert {(r["direction"], r["layer"]) for r in depth} == {(d, layer) for d in ("denoise", "noise") for layer in range(4)}
    assert all(r["control"] in ("random", "wrong_token") for r in depth)
    places = pd.DataFrame([r for r in records if r["table"] == "places"])
    top = strongest_places(places, 3)
    heads = places[(places["stream"] == "z") & (places["control"] == "")]
    assert top["mean"].tolist() == sorted(heads["mean"], reverse=True)[:3]
    first = top.iloc[0]
    beside = places[(places["control"] == "random") & (places["stream"] == "z")].set_index(["direction", "mark", "layer", "head"])["mean"]
    assert first["control_mean"] == beside[tuple(first[["direction", "mark", "layer", "head"]])]
    said = run(*arguments).stdout
    assert "strongest places inside the layers" in said
    assert "Above its controls" in said


def test_what_does_not_exist_is_refused_before_a_model_is_loaded(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("alignblind_mi.studies.running.load_model", None)
    config = StudyConfig.create(str(tiny_folder), str(tiny_folder), quick=True)
    for make, error, said in (
            (lambda: bias_parts(config, "mixed"), SingleError, "unknown design 'mixed'"),
            (lambda: awareness_parts(config, ["tarot"]), SingleError, "unknown instrument 'tarot'"),
            (lambda: awareness_parts(config, reading="palm"), ConceptError, "palm"),
            (lambda: patch_parts(config, ["all"]), SingleError, "unknown part 'all'"),
            (lambda: patch_parts(config, []), SingleError, "Known: residual"),
            (lambda: patch_parts(config, swap="sides"), PatchError, "unknown swap 'sides'")):
        with pytest.raises(error, match=said):
            make()
    for arguments in (("bias", "--design", "mixed"), ("awareness", "--instruments", "tarot"), ("patch", "--parts", "all"),
                      ("patch", "--swap", "sides")):
        done = run(*arguments, "--model", tiny_folder, "--out", tmp_path / "out")
        assert isinstance(done.exception, AlignblindError), arguments
    assert not (tmp_path / "out").exists()


def test_every_verb_has_help_with_an_example():
    for verb in ("bias", "awareness", "patch", "doctor", "study", "forecast", "calibrate", "score", "report"):
        said = run(verb, "--help").stdout
        assert f"alignblind {verb}" in " ".join(said.split()), verb


def test_ray_alone_is_this_machine_and_a_word_behind_it_is_an_address(tiny_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("alignblind_mi.studies.on_ray.run_on_ray", lambda run, out, *, address, **rest: asked.append(address))
    monkeypatch.setattr("alignblind_mi.pages.comparison_page.write_comparison", lambda out, outcome: out / "page")
    pair = ["--base", tiny_folder, "--aligned", tiny_folder, "--out", tmp_path / "out"]
    for given in (["--ray"], ["--ray", "auto"], ["--ray=10.0.0.1:6379"]):
        assert run("compare", *given, *pair).exit_code == 0
        assert run("compare", *pair, *given).exit_code == 0
    assert asked == ["local", "local", "auto", "auto", "10.0.0.1:6379", "10.0.0.1:6379"]


def test_log_odds_are_summarised_beside_the_parsed_answers():
    rows = pd.DataFrame({"model": "m", "treatment": "t", "kind": "implicit", "category": ["a", "a", "b", "b"],
                         "log_odds": [1.0, -1.0, 2.0, 2.0], "word_pair": ["1", "2", "1", "2"], "template": "t", "outcome": "stereotyped",
                         "option_order": "marked_first",
                         "word_order": "negative_first"})
    odds = bias_tables(rows)["log_odds"].set_index("category")
    assert odds["mean"].to_dict() == {"all": 1.0, "a": 0.0, "b": 2.0}
    assert odds["positive"].to_dict() == {"all": 0.75, "a": 0.5, "b": 1.0}
    assert single.ROLE == "model"
