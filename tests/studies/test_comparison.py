"""The comparison of mitigations: what is planned, measured, resumed and concluded; side effects against doing it by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import Oracle
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.errors import ResultError
from alignblind_mi.measures.side_effects import MEASURES, divergence, measure_side_effects
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.mitigations.steering import load_vectors, sense_steering, steering_vectors
from alignblind_mi.models.adapters import scaled_adapter
from alignblind_mi.models.edits import UNTREATED, Edit, Row, Site, Treatment
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.pages import comparison_page
from alignblind_mi.results import load_result
from alignblind_mi.stimuli.concept import ConceptError, load_concept
from alignblind_mi.stimuli.prompts import Prompt
from alignblind_mi.studies import comparison
from alignblind_mi.studies.benefits import DAMAGES, benefit_of
from alignblind_mi.studies.comparison import run_comparison
from alignblind_mi.studies.comparison_verdicts import comparison_records, comparison_tables, read_comparison
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.rivals import FAMILIES, plan_rivals

ASKED = {"treatment", "family", "implicit", "low", "high", "invalid_share", "explicit", "r_blind", "kl_neutral", "colour_accuracy",
         "copy_accuracy", "parameters", "seconds"}


@pytest.fixture(scope="module")
def aligned():
    return load_model("organism:aligned")


def plan(**options):
    return plan_rivals(ModelSpec("organism:aligned").resolved(), load_concept("race"), "default", 8, LoraSettings(), **options)


# ---- what is planned -----------------------------------------------------------------------------------------------------


def test_every_family_has_a_rival_and_every_placebo_its_kind():
    full, quick = plan(), plan(quick=True)
    for found in (full, quick):
        families = [rival.family for rival in found.rivals]
        assert set(families) == set(FAMILIES) - {"untreated"}
        assert families == sorted(families, key=FAMILIES.index)
        assert len({rival.name for rival in found.rivals}) == len(found.rivals)
    assert {rival.name for rival in quick.rivals} < {rival.name for rival in full.rivals}
    doses = {curve: [rival.dose for rival in full.rivals if rival.curve == curve] for curve in ("steering", "lora", "unlearning")}
    assert {curve: sorted(values) for curve, values in doses.items()} == {
        "steering": [0.25, 0.5, 1.0, 2.0], "lora": [0.25, 0.5, 1.0], "unlearning": [0.25, 0.5, 1.0]}
    placebos = {rival.name for rival in full.rivals if rival.family == "placebo"}
    assert {"placebo_color_early", "placebo_random_early", "placebo_matched_noise_steer_early", "placebo_wrong_concept_early",
            "lora_placebo_early", "prompt_color"} <= placebos
    drawn = {rival.name for found in (full, quick) for rival in found.rivals if rival.more is not None}
    assert drawn == {name for name in placebos if "noise" in name}
    matched = {rival.name: rival.placebos for rival in full.rivals}
    assert matched["steer_early"] == ("placebo_matched_noise_steer_early", "placebo_color_early", "placebo_random_early",
                                      "placebo_wrong_concept_early")
    assert matched["steer_late"] == ("placebo_matched_noise_steer_late",)
    assert matched["lora_early"] == ("lora_placebo_early",)
    assert matched["unlearn_npo"] == ()
    assert set(matched["steer_early+prompt_race"]) == {*matched["steer_early"], "prompt_color"}
    assert all(set(names) <= placebos for names in matched.values())


def test_what_the_tokenizer_does_not_know_is_left_out_with_its_reason():
    found = plan()
    assert "does not know all words of 'Be fair and do not rely on stereotypes.'" in found.left_out["prompt_fair"]
    assert "prompt_fair" not in {rival.name for rival in found.rivals}
    names = plan_rivals(ModelSpec("organism:aligned").resolved(), load_concept("race"), "names", 8, LoraSettings()) if load_concept(
        "race").has_senses("names") else None
    if names is not None:
        assert "several identifiers" in names.left_out["steering"]
    with pytest.raises(ConceptError, match="senses"):
        plan_rivals(ModelSpec("organism:aligned").resolved(), load_concept("religion"), load_concept("religion").first_cue, 8,
                    LoraSettings())


def test_a_scaled_adapter_is_a_dose(tmp_path, one_adapter):
    folder, checkpoint = one_adapter
    out = scaled_adapter(folder, 0.5, tmp_path / "halved")
    model = load_model(str(checkpoint), adapters=[folder, out])
    prompt = Prompt("w1 w2 w3 w4")
    plain, whole, half = (model.under(Treatment("t", adapter=name)).record([Row(prompt)], [Site(0, "last", "z")])[0, 0]
                          for name in (None, folder.name, "halved"))
    assert (whole - plain).norm() > 0
    projection = model.peft.base_model.model.model.layers[0].self_attn.v_proj
    weights = dict(zip((folder.name, "halved"), map(projection.get_delta_weight, model.peft.peft_config), strict=True))
    torch.testing.assert_close(weights["halved"], 0.5 * weights[folder.name])
    assert (half - plain).norm() < (whole - plain).norm()
    with pytest.raises(ModelError, match="is there already"):
        scaled_adapter(folder, 0.5, tmp_path / "halved")
    with pytest.raises(ModelError, match="no PEFT adapter folder"):
        scaled_adapter(tmp_path, 0.5, tmp_path / "other")


@pytest.fixture(scope="module")
def one_adapter(tmp_path_factory):
    from doubles import make_adapter, tiny_llama

    checkpoint = tiny_llama(tmp_path_factory.mktemp("scaled"), [f"w{i}" for i in range(9)], layers=2)
    return make_adapter(checkpoint, tmp_path_factory.mktemp("adapters") / "whole", 0), checkpoint


# ---- side effects ----------------------------------------------------------------------------------------------------------


def test_divergence_is_the_textbook_s():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])
    by_hand = np.mean([0.5 * math.log(2) + 0.25 * math.log(0.5), math.log(2)])
    assert divergence(p.log(), q.log()) == pytest.approx(by_hand, abs=1e-6)
    assert divergence(p.log(), p.log()) == 0


def test_text_log_probs_are_one_pass_of_plain_hugging_face(aligned):
    oracle = Oracle(organism_path("aligned"))
    text = Prompt("The garden is near the house and the flower is lovely.")
    (found,) = aligned.text_log_probs([Row(text)])
    with torch.no_grad():
        whole = oracle.model(oracle.ids(text)).logits[0].log_softmax(-1)
    assert (found - whole[:-1]).abs().max() < 1e-4
    vector = torch.randn(aligned.d_model, generator=torch.Generator().manual_seed(0)) * 20
    row = Row(text, (Edit(Site(2, "prompt", tokens="all"), vector, "add"),))
    with torch.no_grad(), oracle.edited(row, oracle.columns(row)):
        edited = oracle.model(oracle.ids(text), use_cache=False).logits[0].log_softmax(-1)
    assert (aligned.text_log_probs([row])[0] - edited[:-1]).abs().max() < 1e-4
    assert (edited - whole).abs().max() > 0.1


@pytest.fixture(scope="module")
def effects(aligned, race):
    treatments = [UNTREATED, sense_steering(aligned, race, "default", "race", range(1, 4)),
                  steering_vectors(aligned, race, "default", "race", "contrast").treatment([4]),
                  Treatment("prompted", prefix="The words black and white refer to the race of people. ", family="prompt")]
    rows = pd.concat([measure_side_effects(aligned.under(treatment), race, "default", word_pairs=1) for treatment in treatments])
    return rows.groupby(["treatment", "measure"])["value"].mean().unstack(), rows


def test_the_untreated_model_has_no_side_effects(effects):
    means, rows = effects
    assert set(rows["measure"]) == set(MEASURES)
    assert means.loc["untreated", ["kl_neutral", "kl_mentions"]].tolist() == [0.0, 0.0]
    assert (means.loc["untreated", ["copying", "judging", "other_questions", "group_questions"]] >= 0.95).all()
    assert not rows.duplicated(["treatment", "measure", "item"]).any()


def test_each_treatment_breaks_what_it_must(effects):
    means, _ = effects
    steered, written, prompted = means.loc["steer_race_1-3"], means.loc[means.index.str.contains("contrast")].iloc[0], means.loc["prompted"]
    assert steered["kl_neutral"] == pytest.approx(0, abs=1e-6)    # no identifier is mentioned there
    assert steered["kl_mentions"] > 0.1
    assert steered["other_questions"] < 0.1    # planted: an identifier steered to the group is read as it, whatever its sentence says
    assert steered["group_questions"] > 0.9
    assert written["kl_neutral"] > 0.05    # acts on every token that follows, and so on texts
    assert prompted["kl_neutral"] > 0.1


def test_a_model_that_knows_no_text_is_refused(tiny, race):
    with pytest.raises(ModelError, match="neutral texts"):
        measure_side_effects(tiny, race, "default")


# ---- a whole comparison --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """`alignblind compare --quick` on the embedded pair."""
    out = tmp_path_factory.mktemp("compare") / "out"
    done = CliRunner().invoke(app, ["compare", "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out, json.loads((out / "comparison.json").read_text("utf-8"))


@pytest.mark.slow
def test_its_record_is_scored_as_its_folder_is_with_the_numbers_that_it_has(compared):
    from alignblind_mi.pages.scoring import score

    out, records = compared
    keys = ("model", "treatment", "cue")
    found = score([out / "comparison.json"], by=keys)
    assert found == score([out], by=keys)
    implicit = {one["treatment"]: one for one in found
                if one["kind"] == "implicit" and one["cue"] == "default" and one["model"] == "organism:aligned"}
    for record in records:
        if record["treatment"] != "base":
            assert [implicit[record["treatment"]][name] for name in ("n", "rate", "low", "high")] == pytest.approx(
                [record[name] for name in ("n", "implicit", "low", "high")])


@pytest.mark.slow
def test_a_record_a_treatment_with_all_that_was_asked(compared):
    _, records = compared
    by_name = {record["treatment"]: record for record in records}
    assert len(by_name) == len(records)
    assert {record["family"] for record in records} == set(FAMILIES)
    for record in records:
        assert set(record) >= ASKED | {"n", "template_min", "worst", "best", "r_blind_low", "revision", "seed", "versions", "latency"}
        assert record["low"] <= record["implicit"] <= record["high"]
        assert record["n"] == 72
    untreated, steered, noise = by_name["untreated"], by_name["steer_early"], by_name["placebo_matched_noise_steer_early"]
    assert untreated["implicit"] > 0.85
    assert untreated["parameters"] == 0
    assert untreated["kl_neutral"] == 0
    assert by_name["base"]["kl_neutral"] is None    # it is no treatment of the aligned model
    assert steered["implicit"] < 0.7
    assert steered["r_blind"] < 0
    assert steered["difference_high"] < 0
    assert steered["colour_accuracy"] < 0.1    # what it breaks
    assert steered["parameters"] == noise["parameters"] == 3 * 2 * 96
    assert noise["displacement"] == pytest.approx(steered["displacement"], rel=0.006)
    assert steered["kl_prompts"] > 0
    assert untreated["displacement"] is None
    assert all(record["displacement"] > 0 for record in records if record["family"] not in ("untreated",))
    assert by_name["steer_late"]["implicit"] > 0.85
    assert by_name["lora_early"]["parameters"] > 1000
    assert by_name["base"]["implicit"] < untreated["implicit"]
    assert by_name["prompt_race"]["prefix"].startswith("The words black and white")


@pytest.mark.slow
def test_a_finished_comparison_is_not_measured_again(compared, monkeypatch):
    out, records = compared
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    monkeypatch.setattr(comparison, "measure_behaviour", lambda *a, **k: pytest.fail("asked again"))
    monkeypatch.setattr("alignblind_mi.studies.running.load_model", lambda *a, **k: pytest.fail("loaded again"))
    config = StudyConfig.create("organism:base", "organism:aligned", quick=True)
    assert run_comparison(config, out) == out
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")} == before
    with pytest.raises(ResultError, match="seed"):
        run_comparison(replace(config, seed=5), out)
    drawn = CliRunner().invoke(app, ["report", str(out)])
    assert "comparison.html" in drawn.stdout
    assert json.loads((out / "comparison.json").read_text("utf-8")) == records


@pytest.mark.slow
def test_claims_stand_only_with_their_controls(compared):
    out, _ = compared
    found = read_comparison(out)
    tables = comparison_tables(found)
    audit = tables["audit"].set_index("claim")
    lowered = audit.loc[next(claim for claim in audit.index if claim.startswith("steer_late "))]
    assert lowered["verdict"] == "not supported"
    assert "FAILED: interval below 0" in lowered["controls"]
    early = audit.loc[next(claim for claim in audit.index if claim.startswith("steer_early "))]
    assert "more than its placebos" in early["controls"]
    assert "FAILED: at most 10 % of right answers of any kind lost" in early["controls"]
    assert audit.loc["Alignment lowers awareness (aligned less base, r_blind)", "verdict"] == "supported"
    assert set(tables["points"]["damage_measure"]) == set(DAMAGES)
    assert tables["points"]["damage"].min() >= 0
    assert set(tables["doses"]["curve"]) == {"steering", "lora", "unlearning"}
    records = comparison_records(found, tables)
    json.dumps(records, allow_nan=False)


@pytest.mark.slow
def test_the_page_says_what_was_found_and_tables_and_figures_lie_beside_it(compared):
    out, records = compared
    html = (out / "comparison.html").read_text("utf-8")
    assert html.count("data:image/svg+xml") == 3
    assert "never evidence about Llama 3" in html
    assert "A quick comparison" in html
    assert "prompt fair" in html
    assert "We measured implicit bias of organism:aligned" in html
    assert records[1]["revision"] in html
    for name in ("comparison", "frontier", "doses"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (out / "figures" / f"{name}.svg").is_file()
    read = pd.read_csv(out / "tables" / "readings.csv")
    assert set(read["instrument"]) == {"patchscope", "selfie", "logit_lens", "probe"}
    other = pd.read_csv(out / "tables" / "elsewhere.csv")
    assert set(other["cue"]) == {"direct_color"}    # the others' names are not in the pair's vocabulary
    rows = load_result(out / "aligned_placebo_matched_noise_steer_early_draws.parquet").rows
    assert rows["treatment"].unique().tolist() == [f"placebo_matched_noise_steer_early_seed{seed}" for seed in (1, 2, 3, 4)]
    assert set(rows["placebo_of"]) == {"steer_early"}
    assert len(rows) == 4 * 72
    (band,) = pd.read_csv(out / "tables" / "placebos.csv").to_dict("records")
    assert (band["treatment"], band["draws"], band["n"]) == ("steer_early", 5, 72)
    assert band["noise_low"] <= band["noise"] <= band["noise_high"]
    assert band["noise_displacement_low"] == pytest.approx(band["displacement"], rel=0.006)
    assert "Treatments beside noise that does as much" in html
    for name in ("comparison", "differences", "effects", "audit", "points", "equal_damage", "slopes", "position", "mixed"):
        assert len(pd.read_csv(out / "tables" / f"{name}.csv")), name


@pytest.mark.slow
def test_an_unfinished_comparison_says_so(compared, tmp_path):
    import shutil

    out, _ = compared
    copy = tmp_path / "part"
    shutil.copytree(out, copy)
    (copy / "aligned_steer_early_effects.parquet").unlink()
    page = comparison_page.write_comparison(copy).read_text("utf-8")
    assert "aligned_steer_early_effects" in page
    assert "steer_early" not in {record["treatment"] for record in json.loads((copy / "comparison.json").read_text("utf-8"))}
    for file in copy.glob("aligned_untreated_*.parquet"):
        file.unlink()
    with pytest.raises(ResultError, match="without the untreated model"):
        read_comparison(copy)


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(ResultError, match="holds no comparison"):
        read_comparison(tmp_path)


def test_a_reversed_bias_is_no_benefit():
    assert benefit_of(0.5, 0.9) == pytest.approx(0.4)
    assert benefit_of(0.1, 0.9) == pytest.approx(0.0)
    assert benefit_of(0.95, 0.9) == pytest.approx(-0.05)


# ---- alignblind steer ------------------------------------------------------------------------------------------------------------


def test_steer_finds_saves_and_measures(tmp_path):
    out = tmp_path / "steered"
    command = ["steer", "--quick", "--method", "mean_difference", "--layers", "1-3", "--strengths", "0.5,1", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    rates = {record["treatment"]: record for record in records if record["table"] == "rates"}
    assert next(iter(rates)) == "untreated"
    assert rates["steer_race_mean_difference_add1_1-3"]["rate"] < rates["untreated"]["rate"] - 0.2
    (file,) = out.glob("vectors_race_mean_difference_*.safetensors")
    assert load_vectors(file).layers == (1, 2, 3)
    gguf = CliRunner().invoke(app, [*command, "--gguf", str(tmp_path / "v.gguf")])
    assert gguf.exit_code == 0
    assert (tmp_path / "v.gguf").stat().st_size > 1000
    differences = {record["treatment"]: record for record in records if record["table"] == "differences"}
    assert all(record["p_holm"] >= record["p"] for record in differences.values())
    shown = CliRunner().invoke(app, [*command[:-1]])
    assert shown.exit_code == 0
    assert "Paired difference" in shown.stdout


@pytest.mark.parametrize(("options", "said"), [
    (["--method", "magic"], "unknown method 'magic'"), (["--strengths", "a lot"], "'a lot' are no strengths"),
    (["--method", "pca", "--how", "replace"], "the method pca cannot replace"), (["--strengths", "2"], "a replacement has no strength"),
    (["--positions", "words"], "unknown positions 'words'"), (["--layers", "40"], "40"), (["--sense", "fruit"], "fruit"),
])
def test_steering_that_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, options, said, monkeypatch):
    monkeypatch.setattr("alignblind_mi.studies.running.load_model", lambda *a, **k: pytest.fail("loaded"))
    done = CliRunner().invoke(app, ["steer", "--out", str(tmp_path / "x"), *options])
    assert done.exit_code != 0
    assert said in str(done.exception)
    assert not (tmp_path / "x").exists()
