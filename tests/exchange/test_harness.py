"""The harness's own code on the files that are written, against this project's measures on the same model."""

import json

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import alignblind_mi as ab
from alignblind_mi.__main__ import app
from alignblind_mi.exchange import harness_functions as functions
from alignblind_mi.exchange.harness import ExchangeError
from alignblind_mi.exchange.harness_functions import probability_results, text_results
from alignblind_mi.models.edits import EditError
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.stimuli.prompts import assignments

SETTINGS = {"device": "cpu", "dtype": "float32", "batch_size": 16}
TEXT, ODDS = "alignblind_race_default_{}", "alignblind_race_default_{}_probability"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("harness") / "tasks"
    done = CliRunner().invoke(app, ["export", "harness", "--concept", "race", "--cue", "default", "--max-word-pairs", "1", "--out",
                                    str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "alignblind_race_default_explicit_probability" in done.stdout
    return out


@pytest.fixture(scope="module")
def manager(folder):
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def model():
    return ab.load_model(str(organism_path("aligned")))


@pytest.fixture(scope="module")
def ours(model, race):
    return ab.measure_behaviour(model, race, "default", max_word_pairs=1)


@pytest.fixture(scope="module")
def theirs(manager):
    return simple_evaluate(model=HFLM(str(organism_path("aligned")), **SETTINGS), tasks=["alignblind_race"], task_manager=manager,
                           bootstrap_iters=0)


@pytest.mark.parametrize("kind", ["implicit", "explicit"])
def test_answers_and_rates_are_those_of_this_project(ours, theirs, kind):
    rows, said = ours[ours["kind"] == kind], theirs["results"][TEXT.format(kind)]
    samples = sorted(theirs["samples"][TEXT.format(kind)], key=lambda one: one["doc_id"])
    assert [one["doc"]["prompt"] for one in samples] == rows["prompt"].tolist()
    assert [one["filtered_resps"][0] for one in samples] == rows["answer"].tolist()
    table = ab.summarise(rows).iloc[0]
    for name in ("rate", "low", "high", "invalid_share"):
        assert said[f"{name},none"] == pytest.approx(table[name])
    assert said["refused_share,none"] == 0


@pytest.mark.parametrize(("kind", "column"), [("implicit", "log_odds_first"), ("explicit", "log_odds_endorsed")])
def test_log_odds_are_those_of_this_project(ours, theirs, kind, column):
    rows, said = ours[ours["kind"] == kind], theirs["results"][ODDS.format(kind)]
    samples = sorted(theirs["samples"][ODDS.format(kind)], key=lambda one: one["doc_id"])
    np.testing.assert_allclose([one["log_odds"]["odds"] for one in samples], rows[column], atol=1e-3)
    assert said["log_odds,none"] == pytest.approx(rows[column].mean(), abs=1e-3)
    assert said["rate,none"] == pytest.approx(ab.summarise(ab.by_probability(rows)).iloc[0]["rate"])


def test_positions_and_failures_are_counted(race):
    prompts = ab.implicit_prompts(race, "default", max_word_pairs=1)
    texts = [f" {prompt.labels['positive']} - {prompt.labels['unmarked']}, {prompt.labels['negative']} - {prompt.labels['marked']}"
             for prompt in prompts[:-2]]
    judged = [text_results({"prompt": prompt.text, **prompt.labels}, [said])["rate"]
              for prompt, said in zip(prompts, [*texts, "I'm sorry, I can't assist with that.", "Purple."], strict=True)]
    n = len(prompts)
    assert functions.rate(judged) == 1
    assert functions.invalid_share(judged) == pytest.approx(2 / n)
    assert functions.refused_share(judged) == pytest.approx(1 / n)
    assert functions.position(judged) == pytest.approx(0.5, abs=0.1)
    equal = probability_results({"prompt": "", **prompts[0].labels}, [(-1.0, False), (-1.0, True)])
    assert functions.invalid_share([equal["rate"]]) == 1


def test_every_concept_and_cue_is_written_and_loaded(tmp_path):
    for name in ("religion", "gender"):
        concept = ab.load_concept(name)
        group, *tasks = ab.write_harness(concept, tmp_path / name, max_word_pairs=1)
        manager = TaskManager(include_path=str(tmp_path / name), include_defaults=False)
        assert len(tasks) == 4 * len(concept.cues)
        assert {group, *tasks} <= {*manager.all_groups, *manager.all_subtasks}
        document = json.loads(next((tmp_path / name).glob("*_implicit.jsonl")).read_text("utf-8").splitlines()[0])
        assert document["concept"] == name


def test_a_folder_that_is_there_is_left_alone(race, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ExchangeError, match="is there already"):
        ab.write_harness(race, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# ---- steering ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(model, race):
    return ab.steering_vectors(model, race, "default", "race", "mean_difference", layers=[1, 2])


def by_hand(prompts, concept, vectors, change, first: int) -> list[float]:
    """Log-odds of the two assignments under hooks on the layers' outputs that change every token from the `first` one on."""
    folder = str(organism_path("aligned"))
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)

    def hook(vector):
        return lambda module, args, output: torch.cat([output[:, :first], change(output[:, first:], vector)], dim=1)

    for layer, vector in zip(vectors.layers, vectors.vectors[:, 0], strict=True):
        plain.model.layers[layer].register_forward_hook(hook(vector))
    odds = []
    for prompt in prompts:
        ids = tokenizer(prompt.text)["input_ids"]
        scores = []
        for text in assignments(concept, prompt):
            more = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_probs = plain(torch.tensor([ids + more])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_probs[len(ids) + k - 1, one]) for k, one in enumerate(more)))
        odds.append(scores[0] - scores[1])
    return odds


@pytest.mark.parametrize(("how", "strength"), [("add", 1.5), ("ablate", 1.0)])
def test_a_steered_model_of_the_harness_is_ours_under_the_treatment_and_steers_bos_too(model, race, vectors, manager, tmp_path, how,
                                                                                       strength):
    path = tmp_path / "steered.pt"
    vectors.save(tmp_path / "vectors.safetensors")
    done = CliRunner().invoke(app, ["export", "steered", str(tmp_path / "vectors.safetensors"), "--out", str(path), "--how", how,
                                    "--strength", str(strength)], catch_exceptions=False)
    assert done.exit_code == 0
    assert set(torch.load(path, weights_only=True)) == {"layers.1", "layers.2"}
    found = simple_evaluate(model=SteeredModel(str(organism_path("aligned")), str(path), **SETTINGS), task_manager=manager,
                            tasks=[ODDS.format("implicit")], bootstrap_iters=0, limit=6)
    odds = [one["log_odds"]["odds"] for one in sorted(found["samples"][ODDS.format("implicit")], key=lambda one: one["doc_id"])]
    treated = model.under(vectors.treatment(how=how, strength=strength, positions=("prompt", "generated")))
    rows = ab.measure_behaviour(treated, race, "default", kinds=["implicit"], max_word_pairs=1).head(6)
    changes = {"add": lambda h, v: h + strength * v, "ablate": lambda h, v: h - (h @ v)[..., None] * v / (v @ v)}
    prompts = ab.implicit_prompts(race, "default", max_word_pairs=1)[:6]
    np.testing.assert_allclose(odds, by_hand(prompts, race, vectors, changes[how], first=0), atol=1e-3)
    np.testing.assert_allclose(rows["log_odds_first"], by_hand(prompts, race, vectors, changes[how], first=1), atol=1e-3)


@pytest.mark.parametrize(("given", "said"), [({"how": "replace"}, "replace"), ({"how": "ablate", "strength": 2.0}, "strength"),
                                             ({"hookpoint": "layers"}, "hookpoint"), ({"path": "steered.safetensors"}, ".pt")])
def test_what_the_harness_cannot_do_is_refused(vectors, tmp_path, given, said):
    given = {"path": "steered.pt"} | given
    with pytest.raises(EditError, match=said):
        ab.export_steered(vectors, tmp_path / given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


def test_activations_cannot_be_put_in_place_by_the_harness(model, race, tmp_path):
    whole = ab.steering_vectors(model, race, "default", "race", "replacement", layers=[1])
    with pytest.raises(EditError, match="replacement"):
        ab.export_steered(whole, tmp_path / "steered.pt")
