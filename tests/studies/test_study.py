"""The whole study as a process: complete, resumable after being killed anywhere, and clear about bad input."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import forked
import pandas as pd
import pytest
from doubles import TINY_CHAT, tiny_llama
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.errors import AlignblindError, ResultError
from alignblind_mi.models.spec import ModelError
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.parts import Part
from alignblind_mi.studies.running import load_study, run_parts, run_study

SMALL = """
import sys; from dataclasses import replace; from pathlib import Path; import torch; torch.set_num_threads(1)
from alignblind_mi import Decoding, LoraSettings, StudyConfig, run_study
config = StudyConfig.create(sys.argv[1], sys.argv[1], concept=sys.argv[3], quick=True)
config = replace(config, balanced_pairs=1, published_pairs=1, decoding=Decoding(max_new_tokens=4),
                 lora=LoraSettings(epochs=1, batch_size=8, accumulation=1))
run_study(config, Path(sys.argv[2]))
"""


def small_study(model: Path, out: Path, concept: str) -> forked.Forked:
    return forked.Forked(["-c", SMALL, model, out, concept])


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, brief, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "undisturbed"
    process = small_study(tiny_folder, out, brief)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout == ""
    assert "runs on the fast engine, in batches of at most" in stderr
    return out


def rows_of(out: Path) -> dict[str, pd.DataFrame]:
    return {name: result.rows for name, result in load_study(out).items()}


def test_every_part_is_there_with_its_provenance(undisturbed):
    parts = load_study(undisturbed)
    assert {"behaviour_base", "behaviour_aligned", "balanced_base", "balanced_aligned", "lora_early", "lora_late_awareness"} <= set(parts)
    assert {name for name in parts if name.startswith("steering_")} == {
        f"steering_{sense}_{window}{suffix}" for sense in ("race", "color", "random") for window in ("01-01", "03-03")
        for suffix in ("", "_awareness")}
    for name, result in parts.items():
        assert {"model", "revision", "dtype", "treatment", "config", "versions", "made"} <= set(result.provenance)
        assert result.provenance["revision"].startswith("sha256:")
        assert len(result.rows) or "competence" in name    # the tiny tokenizer knows no word of these items


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_gives_the_same_rows(undisturbed, tiny_folder, brief, tmp_path):
    out, moments = tmp_path / "killed", random.Random(0)
    for _ in range(4):
        process = small_study(tiny_folder, out, brief)
        time.sleep(moments.uniform(0.1, 0.8))
        process.kill()
        assert process.returncode == -signal.SIGKILL, "it ended before"
    process = small_study(tiny_folder, out, brief)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    expected, found = rows_of(undisturbed), rows_of(out)
    assert list(found) == list(expected)
    for name, rows in expected.items():
        pd.testing.assert_frame_equal(found[name], rows)


def test_a_second_run_computes_nothing(undisturbed, tiny_folder, brief):
    before = {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*.parquet")}
    process = small_study(tiny_folder, undisturbed, brief)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    lines = [line for line in stderr.splitlines() if line.startswith("[")]
    assert lines
    assert all(line.endswith("already there") for line in lines)
    assert {file: file.stat().st_mtime_ns for file in undisturbed.rglob("*.parquet")} == before


def test_another_configuration_or_a_damaged_part_is_refused(undisturbed, tiny_folder, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "copy")
    with pytest.raises(ResultError, match="another configuration"):
        run_study(StudyConfig.create(str(tiny_folder), str(tiny_folder), seed=7), out)
    part = out / "behaviour_base.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ResultError, match="behaviour_base"):
        load_study(out)


def alignblind(*arguments: object) -> subprocess.CompletedProcess:
    return forked.run(["-m", "alignblind_mi", *arguments], timeout=300)


@pytest.mark.parametrize(("arguments", "said"), [
    (("study", "--base", "meta-llama/no-such-model"), "HF_TOKEN"),
    (("study", "--base", "organism:nobody"), "organism"),
    (("study", "--cue", "nothing"), "unknown cue"),
    (("study", "--concept", "nothing"), "unknown concept"),
    (("study", "--dtype", "float8"), "unknown dtype"),
    (("study", "--cue", "names"), "does not know"),
    (("report", "no-such-folder"), "no-such-folder"),
    (("score", "no-such-file.json"), "no-such-file.json"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, said, tmp_path):
    extra = ("--out", tmp_path / "out") if arguments[0] == "study" else ()
    done = alignblind(*arguments, *extra)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_the_configuration_is_saved_and_names_the_weights(undisturbed):
    config = json.loads((undisturbed / "study.json").read_text())
    assert config["base_revision"].startswith("sha256:")
    assert config["concept_digest"]
    assert config["cue"] == "default"


@pytest.mark.slow
def test_the_study_runs_on_a_double_of_llama_3(llama3_folder, tmp_path, brief):
    from alignblind_mi.measures.behaviour import Decoding
    from alignblind_mi.mitigations.lora_settings import LoraSettings
    from alignblind_mi.pages.report import write_report

    config = StudyConfig.create(str(llama3_folder), str(llama3_folder), concept=brief, cue="names", quick=True)
    assert config.decoding.temperature == 0
    assert replace(config.lora, epochs=7) == LoraSettings()
    small = replace(config, balanced_pairs=1, published_pairs=1, decoding=Decoding(max_new_tokens=3),
                    lora=LoraSettings(epochs=1, batch_size=8, accumulation=8))
    report = write_report(run_study(small, tmp_path / "out")).read_text("utf-8")
    parts = load_study(tmp_path / "out")
    assert not any(name.startswith("steering") for name in parts)    # names are not steered, and the report says so
    assert max(parts["behaviour_base"].provenance["split_identifiers"].values()) > 1
    assert "this study has no steering parts" in report
    assert "Identifiers of several tokens" in report


def test_parts_of_one_s_own_are_kept_and_resumed_like_those_of_a_study(tiny_folder, tmp_path):
    asked = []

    def compute(model, advance):
        asked.append(model.spec.name)
        return pd.DataFrame({"layers": [model.n_layers]})

    config = StudyConfig.create(str(tiny_folder), str(tiny_folder), quick=True)
    for _ in range(2):
        assert run_parts(config, tmp_path / "out", [Part(f"depth_{role}", role, False, compute) for role in ("base", "aligned")]) == (
            tmp_path / "out")
    found = load_study(tmp_path / "out")
    assert asked == [str(tiny_folder)] * 2, "computed once each"
    assert {name: result.rows["role"].tolist() for name, result in found.items()} == {"depth_base": ["base"], "depth_aligned": ["aligned"]}
    assert all({"model", "revision", "part", "config"} <= set(result.provenance) for result in found.values())
    assert not (tmp_path / "out" / "adapters").exists(), "nothing is trained for parts that need no adapter"


def in_process(*arguments: object) -> str | AlignblindError:
    """What a command prints, or the error that it ends in."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0 or isinstance(done.exception, AlignblindError), done.exception
    return done.exception if isinstance(done.exception, AlignblindError) else done.output


@pytest.fixture(scope="module")
def religion_folder(tmp_path_factory) -> Path:
    """A model that knows the words of a concept without senses, with a chat template."""
    from alignblind_mi.stimuli.concept import load_concept
    from alignblind_mi.stimuli.prompts import behaviour_prompts

    religion = load_concept("religion")
    texts = [p.text for cue in religion.cues for kind in ("implicit", "explicit") for p in behaviour_prompts(religion, cue, kind)]
    words = {w for text in [*texts, "user system assistant : - , . Be fair"] for w in re.findall(r"\w+|[^\w\s]", text)}
    return tiny_llama(tmp_path_factory.mktemp("religion"), sorted(words), layers=2, chat_template=TINY_CHAT)


def test_a_concept_without_senses_is_studied_by_behaviour_alone(religion_folder, tmp_path):
    pair, out = ("--base", religion_folder, "--aligned", religion_folder, "--concept", "religion", "--quick"), tmp_path / "out"
    asked = ("--chat", "--system", "Be fair.", "--temperature", "0.8", "--seed", "4")
    assert isinstance(in_process("study", *pair, *asked, "--out", out), str)
    parts = load_study(out)
    names = ("competence", "behaviour", "balanced", "view_attention")
    assert set(parts) == {f"{part}_{role}" for part in names for role in ("base", "aligned")}
    rows = parts["behaviour_aligned"].rows
    assert rows["prompt"].str.startswith("<bos>system : Be fair.\nuser : ").all()
    assert rows["prompt"].str.endswith(" My Answer:\nassistant :").all()
    assert rows["cue"].eq("islam").all(), "the first cue, where none is named"
    assert set(rows["decoding_temperature"]) == {0.8}
    assert parts["behaviour_aligned"].provenance["chat"] == {"system": "Be fair.", "date": "2024-07-26"}
    report = " ".join((out / "report.html").read_text("utf-8").split())
    assert "This study is unfinished" not in report
    assert report.count("The identifiers of the cue “islam” have no senses: they are not ambiguous") == 5    # summary and four sections
    assert "after the system prompt “Be fair.”" in report
    assert "--temperature 0.8 --chat --system &#39;Be fair.&#39;" in report
    assert not (out / "adapters").exists()
    assert isinstance(in_process("study", *pair, *asked, "--out", out), str), "resumed"
    other = in_process("study", *pair, "--out", out)
    assert isinstance(other, ResultError)
    assert "results of another configuration: chat is" in str(other)


def test_the_forecast_of_a_concept_without_senses_has_no_training(religion_folder):
    from alignblind_mi.studies.forecast import study_load

    raw, chat = (study_load(StudyConfig.create(str(religion_folder), str(religion_folder), concept="religion", cue="judaism", chat=chat))
                 for chat in (False, True))
    assert set(raw) == {"competence", "behaviour", "balanced", "view"}
    assert raw["behaviour"]["rows"] == 2 * 16 * 8
    assert chat["behaviour"]["prompt_tokens"] > raw["behaviour"]["prompt_tokens"]


def test_treatments_of_a_concept_without_senses_are_compared_by_behaviour(religion_folder):
    from alignblind_mi.measures.behaviour import Decoding
    from alignblind_mi.measures.mitigation import compare_treatments
    from alignblind_mi.models.edits import UNTREATED
    from alignblind_mi.models.model import load_model
    from alignblind_mi.stimuli.concept import load_concept

    found = compare_treatments(load_model(str(religion_folder)), load_concept("religion"), "islam", [UNTREATED], max_word_pairs=2,
                               decoding=Decoding(max_new_tokens=3))
    assert found.awareness.empty
    table = found.table()
    assert table["treatment"].tolist() == ["untreated"]
    assert "r_blind" not in table


def test_a_system_prompt_without_a_chat_and_a_model_without_a_template_are_refused(tmp_path):
    for arguments, said in ((("--system", "Be fair."), "--chat"), (("--chat",), "the tokenizer of organism:base has no chat template"),
                            (("--temperature", "-1"), "a temperature is 0")):
        refused = in_process("study", *arguments, "--out", tmp_path / "out")
        assert isinstance(refused, ModelError)
        assert said in str(refused)
        assert not (tmp_path / "out").exists()


def test_a_concept_with_nothing_but_senses_and_a_question_is_studied_as_far_as_it_goes(tiny_folder, brief, tmp_path):
    from alignblind_mi.measures.behaviour import Decoding
    from alignblind_mi.pages.report import write_report
    left_out = ("[controls", "[selfie", "[contexts", "[instructions", "[awareness", "[interpretations.about")
    bare = "".join(part for part in re.split(r"(?m)^(?=\[)", Path(brief).read_text("utf-8")) if not part.startswith(left_out))
    bare = re.sub(r"(?ms)^lexicon = \[.*?^\]\n|^words = .*?\]\n", "", bare)
    file = tmp_path / "bare.toml"
    file.write_text(bare, "utf-8")
    config = replace(StudyConfig.create(str(tiny_folder), str(tiny_folder), concept=str(file), quick=True), balanced_pairs=1,
                     published_pairs=1, decoding=Decoding(max_new_tokens=2))
    report = write_report(run_study(config, tmp_path / "out")).read_text("utf-8")
    parts = load_study(tmp_path / "out")
    assert {"awareness_base_paper", "reading_lens_aligned", "steering_color_03-03_awareness"} <= set(parts)
    assert not any(name.startswith(("lora", "reading_selfie", "reading_probes", "steering_random")) for name in parts)
    assert set(parts["awareness_base_paper"].rows["control"]) == {"", "random", "wrong_token", "text"}
    assert "This study is unfinished" not in report
    assert "no [awareness] sentences to train on" in report
