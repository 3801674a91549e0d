"""Study files: the names and types of Python, each mistake one sentence before anything is loaded, options beside a file refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.errors import AlignblindError
from alignblind_mi.mitigations.lora_settings import LoraError
from alignblind_mi.models.chat import Chat
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.parts import study_parts
from alignblind_mi.studies.running import load_study, run_parts
from alignblind_mi.studies.study_file import StudyFileError, read_study_file

EXAMPLE = Path(__file__).parents[2] / "experiments" / "study.yaml"
PAIR = "base: organism:base\naligned: organism:aligned\n"


def read(tmp_path: Path, text: str) -> StudyConfig:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return read_study_file(file)


def test_what_is_left_out_is_what_create_takes(tmp_path):
    assert read(tmp_path, PAIR) == StudyConfig.create("organism:base", "organism:aligned")
    assert read(tmp_path, PAIR + "quick: true\nseed: 3\ncue: direct_color") == StudyConfig.create(
        "organism:base", "organism:aligned", quick=True, seed=3, cue="direct_color")


def test_settings_of_settings_are_changed_one_by_one(tmp_path, llama3_folder):
    config = read(tmp_path, PAIR + """
decoding: {temperature: 0, max_new_tokens: 7}
lora: {learning_rate: 2e-4, modules: [q_proj], rank: 2}
balanced_pairs: null
""")
    usual = StudyConfig.create("organism:base", "organism:aligned")
    assert config.decoding == replace(usual.decoding, temperature=0.0, max_new_tokens=7)
    assert config.lora == replace(usual.lora, learning_rate=2e-4, modules=("q_proj",), rank=2)
    assert isinstance(config.decoding.temperature, float)
    assert config.balanced_pairs is None
    chat = read(tmp_path, f"""
base: {{name: {llama3_folder}, dtype: bfloat16, engine: plain}}
aligned: {llama3_folder}
chat: {{system: Be brief.}}
""")
    assert (chat.base.dtype, chat.base.engine, chat.aligned.dtype) == ("bfloat16", "plain", "float32")
    assert chat.chat == Chat("Be brief.")


@pytest.mark.parametrize(("text", "said"), [
    (PAIR + "sead: 3", r"unknown key 'sead'\. Did you mean 'seed'\? Known: base, aligned, concept"),
    (PAIR + "lora: {ranks: 3}", r"unknown key 'lora\.ranks'\. Did you mean 'rank'"),
    ("base: {nam: x}\naligned: y", r"unknown key 'base\.nam'\. Did you mean 'name'"),
    ("base: {dtype: float32}\naligned: y", r"the key 'base\.name' is missing"),
    ("base: organism:base", "the key 'aligned' is missing"),
    (PAIR + "seed: three", "seed must be a whole number, got 'three'"),
    (PAIR + "seed: true", "seed must be a whole number, got True"),
    (PAIR + "quick: 1", "quick must be true or false, got 1"),
    (PAIR + "lora: {modules: q_proj}", r"lora\.modules must be a list of which each is a text, got 'q_proj'"),
    (PAIR + "lora: {modules: [1]}", r"lora\.modules\[0\] must be a text, got 1"),
    (PAIR + "lora: [1]", "lora must be a mapping of rank"),
    (PAIR + "balanced_pairs: all", "balanced_pairs must be a whole number or null, got 'all'"),
    (PAIR + "chat: true", "chat must be a mapping of system, date, options or null, got True"),
    (PAIR + "base: organism:base", "'base' is given twice"),
    (PAIR + "lora: {rank: 1, rank: 2}", "'rank' is given twice"),
    ("base: [", "not valid YAML"),
    ("", "holds no settings"),
    ("- base", "holds no settings"),
    (PAIR + "decoding: !!python/object/apply:os.system ['true']", "not valid YAML"),
])
def test_a_mistake_is_one_sentence_that_names_it(text, said, tmp_path):
    with pytest.raises(StudyFileError, match=said) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "study.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_checked_as_in_python(tmp_path):
    with pytest.raises(LoraError, match="rank must be at least 1"):
        read(tmp_path, PAIR + "lora: {rank: 0}")
    with pytest.raises(AlignblindError, match="unknown dtype"):
        read(tmp_path, "base: {name: organism:base, dtype: float8}\naligned: organism:aligned")
    with pytest.raises(StudyFileError, match="cannot be read"):
        read_study_file(tmp_path / "nothing.yaml")


def test_options_beside_a_file_are_refused(tmp_path):
    for arguments in (["study", str(EXAMPLE), "--seed", "1"], ["study", str(EXAMPLE), "--quick"],
                      ["forecast", str(EXAMPLE), "--device-map", "auto"]):
        done = CliRunner().invoke(app, [*arguments, *(["--out", str(tmp_path / "out")] if arguments[0] == "study" else [])])
        assert isinstance(done.exception, AlignblindError)
        assert f"{next(a for a in arguments if a.startswith('--'))} was given beside the study file" in str(done.exception)
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, ["forecast", str(EXAMPLE), "--no-rate"]).exit_code == 0


@pytest.mark.slow
def test_the_example_runs_on_the_embedded_pair(tmp_path, race):
    config = read_study_file(EXAMPLE)
    wanted = [part for part in study_parts(config, race) if part.name in ("behaviour_base", "behaviour_aligned", "lora_early")]
    run_parts(config, tmp_path / "out", wanted)
    parts = load_study(tmp_path / "out")
    assert len(parts) == 3
    assert parts["lora_early"].provenance["config"]["lora"]["learning_rate"] == 1e-3
    for role in ("base", "aligned"):
        rows = parts[f"behaviour_{role}"].rows
        assert len(rows) == 2 * 4 * 3 * 2
        assert rows["n_tokens"].max() <= 12
        assert (rows["outcome"] != "invalid").mean() > 0.8
