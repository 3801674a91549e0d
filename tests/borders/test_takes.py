"""What Python takes: one or many where it is clear what is meant, texts and paths alike; anything else is one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignblind_mi.errors import AlignblindError
from alignblind_mi.instruments.contrast import contrast_pairs
from alignblind_mi.instruments.lens import logit_lens
from alignblind_mi.instruments.patching import grid_sites, patch_grid
from alignblind_mi.measures.awareness import measure_awareness
from alignblind_mi.measures.behaviour import Decoding, ask_under
from alignblind_mi.measures.mitigation import compare_treatments
from alignblind_mi.mitigations.lora_settings import LoraSettings, choose_layers
from alignblind_mi.mitigations.steering import SteeringVectors, load_vectors, sense_steering, steering_grid, steering_vectors
from alignblind_mi.models.edits import UNTREATED, Edit, Row, Site, Treatment
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.results import load_result, save_result
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.stimuli.prompts import Prompt, implicit_prompts, steering_prompt
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.running import run_study
from alignblind_mi.studies.single import measure_parts

VECTORS = SteeringVectors((1, 2), ("",), torch.ones(2, 1, 4), "mean_difference", "x")
TEXT = "Race: black and white"


def test_rows_are_rows_prompts_or_texts(tiny):
    site, prompt = Site(0, "last"), Prompt(TEXT)
    expected = tiny.record([Row(prompt)], [site])
    for rows in (Row(prompt), [prompt], prompt, TEXT, [TEXT], (Row(TEXT),)):
        assert torch.equal(tiny.record(rows, site), expected)
    assert torch.equal(tiny.next_probs(TEXT, ["black"]), tiny.next_probs([Row(prompt)], ["black"]))
    assert torch.allclose(tiny.next_log_probs([TEXT, prompt])[1], tiny.next_log_probs(Row(prompt))[0], atol=1e-5)
    assert tiny.generate(TEXT, 2)[0].text == tiny.generate([Row(prompt)], 2)[0].text
    assert Row(TEXT, Edit(site, torch.ones(3))).edits[0].site == site


def test_a_prompt_is_asked_as_the_view_asks_and_a_row_is_raw(tiny):
    view = tiny.under(Treatment("said", prefix="black white. "))
    prompt, site = Prompt(TEXT), Site(1, "last")
    assert torch.equal(view.record(prompt, site), view.record(view.rows([prompt]), [site]))
    assert not torch.equal(view.record(prompt, site), view.record(Row(prompt), site))


def test_layers_are_one_or_many(tiny, race):
    assert len({VECTORS.treatment(layers).name for layers in (1, [1], np.int64(1), range(1, 2))}) == 1
    assert len(VECTORS.treatment(np.array([1, 2])).edits) == len(VECTORS.treatment((1, 2)).edits)
    assert grid_sites(1, ["marked"], units=()) == grid_sites([1], ["marked"])
    assert choose_layers(np.int64(2), 8) == choose_layers("2", 8) == [2]
    assert LoraSettings(activation_layers=3).activation_layers == (3,)    # type: ignore[arg-type]
    assert logit_lens(tiny, TEXT, ["black"], layers=1)["layer"].unique().tolist() == [1]
    vectors = steering_vectors(tiny, race, race.cue("default"), "race", layers=1)
    assert vectors.layers == (1,)
    assert len(list(steering_grid(vectors, [range(1, 2)], 2.0))) == 1
    assert sense_steering(tiny, race, "default", "race", 1).edits[0].site.layer == 1


def test_positions_mentions_and_treatments_are_one_or_many(tiny, race):
    assert VECTORS.treatment(positions="last").name == VECTORS.treatment(positions=["last"]).name
    one, many = (measure_awareness(tiny, race, "default", mentions=mentions, layers=0, max_word_pairs=1, controls=())
                 for mentions in (0, [0]))
    assert one.equals(many)
    first = implicit_prompts(race, "default", max_word_pairs=1)[0]
    alone = ask_under(tiny, race, first, UNTREATED, Decoding(2))
    assert alone.equals(ask_under(tiny, race, [first], [UNTREATED], Decoding(2)))
    compared = compare_treatments(tiny, race, race.cue("default"), UNTREATED, decoding=Decoding(1), max_word_pairs=1)
    assert compared.behaviour["treatment"].unique().tolist() == ["untreated"]
    assert steering_prompt(race, "default", "race") == steering_prompt(race, race.cue("default"), "race")


def test_one_pair_and_one_site(tiny, race):
    pair = contrast_pairs(tiny, race, "default", max_word_pairs=1)[0]
    site = grid_sites(1, ["last_token"])[0]
    assert patch_grid(tiny, pair, site, controls=[]).equals(patch_grid(tiny, [pair], [site], controls=[]))


def test_paths_are_texts_or_paths(tmp_path, tiny_folder, tiny):
    assert ModelSpec(tiny_folder) == ModelSpec(str(tiny_folder))    # type: ignore[arg-type]
    assert load_model(tiny_folder).spec == tiny.spec
    VECTORS.save(str(tmp_path / "v.safetensors"))
    assert load_vectors(str(tmp_path / "v.safetensors")).layers == VECTORS.layers
    config = StudyConfig(str(tiny_folder), tiny_folder, concept=Path("race"), cue=load_concept("race").cue("names"))    # type: ignore[arg-type]
    assert (config.base.name, config.concept, config.cue) == (str(tiny_folder), "race", "names")


def test_gguf_takes_a_text(tmp_path):
    pytest.importorskip("gguf")
    VECTORS.export_gguf(str(tmp_path / "v.gguf"))
    assert (tmp_path / "v.gguf").is_file()


REFUSED: dict[str, Callable[[HookedModel, Concept], Any]] = {
    "rows": lambda model, race: model.record([3], [Site(0, "last")]),    # type: ignore[list-item]
    "sites": lambda model, race: model.record([TEXT], ["last"]),    # type: ignore[list-item]
    "targets": lambda model, race: model.next_probs([TEXT], 3),    # type: ignore[arg-type]
    "layers": lambda model, race: VECTORS.treatment("one"),    # type: ignore[arg-type]
    "layers[0]": lambda model, race: VECTORS.treatment([1.5]),    # type: ignore[list-item]
    "windows[0]": lambda model, race: list(steering_grid(VECTORS, [1, 2])),    # type: ignore[list-item]
    "positions": lambda model, race: VECTORS.treatment(positions=3),    # type: ignore[arg-type]
    "path": lambda model, race: VECTORS.save(3),    # type: ignore[arg-type]
    "treatment": lambda model, race: model.under("steered"),    # type: ignore[arg-type]
    "treatments": lambda model, race: compare_treatments(model, race, "default", "steered"),    # type: ignore[arg-type]
    "model": lambda model, race: compare_treatments("tiny", race, "default", UNTREATED),    # type: ignore[arg-type]
    "concept": lambda model, race: implicit_prompts("race", "default"),    # type: ignore[arg-type]
    "cue": lambda model, race: implicit_prompts(race, 3),    # type: ignore[arg-type]
    "prompt": lambda model, race: Row(3),    # type: ignore[arg-type]
    "edits": lambda model, race: Row(TEXT, "replace"),    # type: ignore[arg-type]
    "name": lambda model, race: Treatment(3),    # type: ignore[arg-type]
    "name ": lambda model, race: ModelSpec(3),    # type: ignore[arg-type]
    "spec": lambda model, race: load_model(3),    # type: ignore[arg-type]
    "adapters": lambda model, race: load_model("organism:base", adapters=3),    # type: ignore[arg-type]
    "text of a prompt": lambda model, race: Prompt(3),    # type: ignore[arg-type]
    "out": lambda model, race: run_study(StudyConfig("organism:base", "organism:aligned"), 3),    # type: ignore[arg-type]
    "parts": lambda model, race: measure_parts(StudyConfig("organism:base", "organism:aligned"), "x", "bias"),    # type: ignore[arg-type]
    "result": lambda model, race: save_result("rows", "x.parquet"),    # type: ignore[arg-type]
    "path ": lambda model, race: load_result(3),    # type: ignore[arg-type]
    "chat": lambda model, race: model.in_chat(True),    # type: ignore[arg-type]
    "source": lambda model, race: load_concept(3),    # type: ignore[arg-type]
    "sense": lambda model, race: steering_vectors(model, race, "default", 3),    # type: ignore[arg-type]
}


def outcomes() -> dict[str, str]:
    """What the refused calls end in, each in its first line."""
    model, race, found = load_model("organism:base"), load_concept("race"), {}
    for name, call in REFUSED.items():
        try:
            found[name] = f"no error: {call(model, race)!r:.60}"
        except AlignblindError as error:
            found[name] = f"refused: {error}"
        except Exception as error:    # noqa: BLE001 - it is what the test is about
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def outside_pytest() -> dict[str, str]:
    """The outcomes without pytest's check of types, which would refuse some calls first."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True, cwd=root,
                          env={**os.environ, "PYTHONPATH": str(root)})
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_sentence(name, outside_pytest):
    said = outside_pytest[name]
    assert said.startswith("refused: "), said
    assert name.strip() in said
    assert "\n" not in said
    assert len(said) < 300


if __name__ == "__main__":
    sys.stdout.write(json.dumps(outcomes()))
