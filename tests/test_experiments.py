import re
import subprocess
from pathlib import Path

import forked
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[1] / "experiments"


def run(*arguments: object, script: str = "released_answers") -> subprocess.CompletedProcess:
    return forked.run([FOLDER / f"{script}.py", *arguments])


def test_the_paper_s_numbers_come_out(released):
    done = run(released)
    assert done.returncode == 0, done.stderr
    lines = {tuple(line.split()[:3]): line.split()[3:] for line in done.stdout.splitlines()}
    assert lines["chat8b", "default", "published"][:6] == ["560", "545", "15", "0", "97.3", "%"]
    assert lines["nonchat8b", "default", "published"][:4] == ["560", "152", "234", "174"]
    assert lines["early_431", "default", "published"][:6] == ["560", "112", "152", "296", "42.4", "%"]
    assert re.search(r"early_431 +default +published .* 20\.0 % +72\.9 %", done.stdout)


def test_a_missing_folder_is_one_sentence():
    done = run("no-such-folder")
    assert done.returncode == 1
    assert "no-such-folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """One folder for the scripts of the same options, as a user may share it."""
    return tmp_path_factory.mktemp("experiments") / "out"


def quickly(script: str, out: Path) -> tuple[str, str]:
    done = run("--out", out, "--quick", script=script)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(out / "tables" / f"{name}.csv", keep_default_na=False, na_values=[""])


def check_pictures(out: Path, *names: str) -> None:
    for name in names:
        assert (out / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / "figures" / f"{name}.svg").read_text("utf-8")


@pytest.mark.slow
def test_figure_1_counts_the_open_readings_of_either_model(shared):
    said, _ = quickly("figure1_selfie", shared)
    check_pictures(shared, "selfie")
    layers, pooled = table(shared, "selfie_layers"), table(shared, "selfie")
    assert (layers[["race", "color", "other"]].sum(axis=1) == layers["n"]).all()
    read = pooled[pooled["control"].isna()].set_index("panel")
    assert read.loc["aligned", "race_share"] < read.loc["base", "race_share"]
    (reduction,) = table(shared, "selfie_reduction").to_dict("records")
    assert reduction["estimate"] == pytest.approx(read.loc["aligned", "race_share"] / read.loc["base", "race_share"] - 1)
    assert re.search(r"aligned +identifiers +96 ", said)
    assert re.search(rf"estimate +low +high +n\n +{reduction['estimate']:.3f} .* 6\n", said)


@pytest.mark.slow
def test_figure_2_is_the_report_s_behaviour(shared):
    said, _ = quickly("figure2_behaviour", shared)
    check_pictures(shared, "behaviour")
    rates = table(shared, "behaviour").set_index(["kind", "category", "role"])
    base, aligned = (rates.loc["implicit", "pooled", role] for role in ("base", "aligned"))
    assert base["n"] == aligned["n"] == 96
    assert base["low"] < 0.64 < base["high"], "planted"
    assert aligned["low"] < 0.94 < aligned["high"], "planted"
    assert re.search(r"implicit +pooled aligned +96 ", said)


@pytest.mark.slow
def test_figure_3_has_r_blind_by_question_with_controls_and_the_reduction(shared):
    said, _ = quickly("figure3_patching", shared)
    check_pictures(shared, "awareness")
    scores = table(shared, "awareness")
    assert {"random", "wrong_token", "anchor_group", "anchor_other", "text"} < set(scores["control"].dropna()) | {""}
    read = scores[scores["control"].isna() & (scores["role"] == "aligned")]
    assert (read["r_blind"] > 0.8).all(), "planted: 0.9"
    assert (table(shared, "reduction")["high"] < -0.5).all()
    assert re.search(r"paper +-0\.9\d+ +-0\.9\d+ +-0\.8\d+ +6\n", said)


@pytest.mark.slow
def test_figure_4_has_windows_and_layer_groups_beside_placebos(shared):
    said, _ = quickly("figure4_interventions", shared)
    check_pictures(shared, "steering", "lora", "comparison")
    steered = table(shared, "steering").set_index(["sense", "layers"])
    assert steered.loc[("race", "1-3"), "high"] < steered.loc[("random", "1-3"), "low"]
    assert set(table(shared, "lora")["label"]) == {"untreated", "early", "late"}
    assert re.search(r"race +1–3 +96 ", said)


@pytest.mark.slow
def test_templates_are_read_in_both_designs_and_nothing_is_computed_twice(shared):
    quickly("table_templates", shared)
    said, progress = quickly("table_templates", shared)
    check_pictures(shared, "position")
    assert progress.count("already there") == 4
    positions = table(shared, "position")
    assert (positions[positions["design"] == "published"]["confounded"]).all()
    assert not (positions[positions["design"] == "balanced"]["confounded"]).any()
    assert re.search(r"balanced +implicit_random0 +aligned +48 ", said)


@pytest.mark.slow
def test_cues_that_the_tokenizer_does_not_know_are_refused_in_a_line(tmp_path):
    said, _ = quickly("table_cues", tmp_path / "out")
    found = table(tmp_path / "out", "cues")
    assert set(found["cue"]) == {"default", "direct_color"}
    refused = [line for line in said.splitlines() if line.startswith("refused: ")]
    assert [re.search(r"the cue '(\w+)'", line).group(1) for line in refused] == ["uppercase", "names", "dialects"]
    assert re.search(r"direct_color implicit aligned +96 ", said)


@pytest.mark.slow
def test_activation_patching_finds_the_planted_layers_above_its_controls(shared):
    said, _ = quickly("activation_patching", shared)
    check_pictures(shared, "patching_places", "patching_tokens", "patching_heads_all_identifiers", "patching_heads_last_token",
                   "patching_depth")
    assert "denoise: an effect after layers 0 to 3" in said
    assert "\nnoise: an effect after layers 0 to 3" in said
    heads = table(shared, "patching_heads_all_identifiers")
    assert heads.groupby("panel")["n"].sum().nunique() == 1
    screen = table(shared, "patching_screen")
    assert screen["pearson"].between(0.3, 1).all()
    assert set(screen["n"]) == {7 * 3 * 12, 6 * 3 * 2 * 12}, "marks or heads, layers and pairs"
    tokens = table(shared, "patching_tokens")
    assert tokens["layer"].nunique() == 8
    assert tokens["place"].str.contains("black").any()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["figure1_selfie", "table_cues", "activation_patching"])
def test_a_wrong_model_name_is_one_sentence(script, tmp_path):
    done = run("--out", tmp_path / "out", "--aligned", "no-such/model", script=script)
    assert done.returncode == 1
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if "kernels" not in line]    # what a library says while it is imported
    assert len(said) == 1
    assert "the model 'no-such/model' cannot be found" in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demonstration_opens_with_what_it_may_not_say(tiny_folder, tmp_path):
    done = run("--model", tiny_folder, "--out", tmp_path / "out", script="demo")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "What these numbers do not say." in page
    assert page.index("No statement about implicit bias") < page.index("This study asked")
    rows = [pd.read_parquet(tmp_path / "out" / f"behaviour_{role}.parquet").drop(columns="role") for role in ("base", "aligned")]
    pd.testing.assert_frame_equal(*rows)    # one model in both places is asked once
