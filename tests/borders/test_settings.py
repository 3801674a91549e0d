"""Bad numbers and names are one sentence that names the field, whichever way they come in; a concept's texts have plain fields alone."""

import copy
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.borders.settings import AnyLayers, Layer, Listed, Name, Names, SomeNames, Text, Words, check_fields, checked
from alignblind_mi.errors import AlignblindError
from alignblind_mi.measures.behaviour import Decoding, measure_behaviour
from alignblind_mi.mitigations.lora_settings import LoraSettings, choose_layers
from alignblind_mi.mitigations.steering import SteeringVectors, steering_grid
from alignblind_mi.mitigations.unlearning import UnlearningSettings
from alignblind_mi.models.chat import Chat
from alignblind_mi.models.edits import Edit, EditError, Site
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.statistics.paired import difference_draws
from alignblind_mi.statistics.power import Plan, items_needed
from alignblind_mi.statistics.rates import summarise
from alignblind_mi.stimuli.concept_check import concept_problems
from alignblind_mi.stimuli.prompts import behaviour_prompts, fill, filled, implicit_prompts
from alignblind_mi.studies.calibration import CalibrationConfig
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.study_file import read_study_file

NAN, INF, DIGITS = float("nan"), float("inf"), "9" * 5000
NO_NUMBER: list[Any] = [NAN, INF, -INF, True, "three", [1]]
BAD: dict[str, list[Any]] = {
    "seed": [-1, 2**32, 0.5], "target_layer": [-1, 99999, 0.5], "balanced_pairs": [0, -1, 10**7], "published_pairs": [0, 2.5],
    "protocol": ["papers", "PAPER", ""], "minutes": [0, -1, 10**9],
    "decoding.max_new_tokens": [0, -1, 10**9], "decoding.temperature": [-1, 1e-9, 1e9], "decoding.seed": [-1, 2**32],
    "lora.rank": [0, -1, 10**9], "lora.alpha": [0], "lora.dropout": [-0.1, 1.0], "lora.epochs": [0, 10**9], "lora.batch_size": [0],
    "lora.accumulation": [0], "lora.learning_rate": [0, -1, 5], "lora.warmup_share": [-1, 1], "lora.weight_decay": [-1],
    "lora.max_length": [0, 10**9], "lora.seed": [-1, 2**32], "lora.validation_share": [-0.1, 1.0], "lora.patience": [-1],
    "lora.activation_weight": [-1, 1e9],
}
TABLE = [(name, value) for name, values in BAD.items() for value in (*values, *NO_NUMBER)]
SETTINGS: dict[str, Any] = {"decoding": Decoding, "lora": LoraSettings}
WRITTEN = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf", "True": "true"}


def made(name: str, value: Any) -> Any:
    """Settings with one field of a value."""
    table, _, field = name.rpartition(".")
    usual = StudyConfig.create("organism:base", "organism:aligned")
    return SETTINGS[table](**{field: value}) if table else StudyConfig(usual.base, usual.aligned, **{field: value})


def outcome(make: Callable[[], Any]) -> str:
    """What a call ends in: the sentence of our own error, or what else."""
    try:
        return f"no error: {make()!r:.100}"
    except AlignblindError as error:
        return f"refused: {error}"
    except Exception as error:    # noqa: BLE001 - it is what the test is about
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def outside_pytest() -> dict[str, str]:
    """What the calls of this file end in without pytest's check of types, which would refuse some of them first."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
                          env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}"})
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "value"), TABLE, ids=lambda one: str(one)[:30])
def test_python_and_a_study_file_refuse_alike(name, value, tmp_path, outside_pytest):
    table, _, field = name.rpartition(".")
    assert re.match(f"refused: .*{field}", outside_pytest[f"{name} {value}"]), outside_pytest[f"{name} {value}"]
    text = WRITTEN.get(str(value), str(value))
    line = f"{table}: {{{field}: {text}}}" if table else f"{field}: {text}"
    (tmp_path / "study.yaml").write_text(f"base: organism:base\naligned: organism:aligned\n{line}\n")
    with pytest.raises(AlignblindError, match=field) as caught:
        read_study_file(tmp_path / "study.yaml")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [
    ["bias", "--seed", "-1"], ["bias", "--seed", str(2**32)], ["bias", "--temperature", "nan"], ["bias", "--temperature", "inf"],
    ["bias", "--temperature", DIGITS], ["steer", "--method", "pca", "--strengths", "1,nan"],
    ["steer", "--protocol", "papers"], ["steer", "--protocol", "paper", "--method", "pca"], ["study", "--protocol", ""],
    ["lora", "--protocol", "papers"], ["lora", "--protocol", "paper", "--kind", "npo"],
    ["steer", "--method", "pca", "--strengths", "1,1"],
    ["steer", "--method", "pca", "--strengths", "1e30"], ["steer", "--method", "pca", "--positions", "prompt,prompt"],
    ["steer", "--layers", "0-99999999999"], ["steer", "--layers", "3-1"], ["steer", "--layers", DIGITS], ["steer", "--layers", "²"],
    ["patch", "--max-word-pairs", "0"], ["patch", "--parts", "residual,residual"], ["lora", "--rank", "0"], ["lora", "--rank", "99999999"],
    ["lora", "--learning-rate", "nan"], ["lora", "--activation-weight", "inf"], ["lora", "--validation-share", "nan"],
    ["power", "--untreated", "nan", "--treated", ".5"], ["power", "--untreated", ".9", "--treated", ".5", "--icc", "nan"],
    ["power", "--untreated", ".9", "--treated", ".5", "--templates", "0"],
    ["power", "--untreated", ".9", "--treated", ".5", "--alpha", "nan"],
    ["power", "--untreated", ".9", "--treated", ".5", "--power", "nan"], ["calibrate", "--seeds", "²"], ["calibrate", "--seeds", DIGITS],
    ["calibrate", "--jobs", "-1"], ["organism", "build", "--reading", "nan"]], ids=lambda one: " ".join(one)[:40])
def test_the_command_line_refuses_before_it_writes(arguments, tmp_path):
    done = CliRunner().invoke(app, [*arguments, *([] if arguments[0] == "power" else ["--out", str(tmp_path / "out")])])
    assert isinstance(done.exception, AlignblindError), (done.exception, done.output)
    assert not (tmp_path / "out").exists()


VECTORS = SteeringVectors((1,), ("",), torch.ones(1, 1, 4), "mean_difference", "x")
ROWS = pd.DataFrame({"kind": ["implicit"], "outcome": ["stereotyped"], "word_pair": ["a"], "template": ["t"]})


CALLS: list[Callable[[Any], Any]] = [
    lambda race: implicit_prompts(race, "default", max_word_pairs=0), lambda race: implicit_prompts(race, "default", max_word_pairs=-1),
    lambda race: implicit_prompts(race, "default", seed=-1), lambda race: behaviour_prompts(race, "default", "neither"),
    lambda race: choose_layers(range(10**12), 8), lambda race: choose_layers([0.5], 8),
    lambda race: Edit(Site(0, "m"), torch.ones(3) * NAN),
    lambda race: Edit(Site(0, "m"), torch.ones(3), "add", NAN), lambda race: Edit(Site(0, "m"), torch.ones(3), "add", INF),
    lambda race: Site(True, "m"), lambda race: Site(0.5, "m"), lambda race: VECTORS.treatment(strength=NAN),
    lambda race: VECTORS.treatment(positions=["last", "last"]), lambda race: list(steering_grid(VECTORS, [[1]], [])),
    lambda race: VECTORS.export_gguf("x.gguf", strength=INF), lambda race: difference_draws(ROWS, draws=0),
    lambda race: summarise(ROWS, ["kind"], level=NAN), lambda race: Plan(0.9, 0.5, orders=0),
    lambda race: Plan(0.9, 0.5, template_icc=-0.1),
    lambda race: items_needed(Plan(0.9, 0.5), NAN), lambda race: CalibrationConfig((-1,)), lambda race: CalibrationConfig(()),
    lambda race: Site(0, "m", ids=(-1,)), lambda race: Site(0, "m", ids=(1, 1)), lambda race: VECTORS.treatment(protocol="papers"),
    lambda race: UnlearningSettings(beta=NAN), lambda race: LoraSettings(modules=("q_proj", "q_proj")),
    lambda race: LoraSettings(activation_layers=(-1,)), lambda race: LoraSettings(rank=10**5000), lambda race: Chat(system=3)]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_functions_refuse_alike(number, outside_pytest):
    assert outside_pytest[f"call {number}"].startswith("refused: "), outside_pytest[f"call {number}"]


def test_numbers_of_numpy_are_taken_as_plain_ones(outside_pytest):
    assert outside_pytest["seed of numpy"] == "int"
    assert outside_pytest["modules in a list"] == "('q_proj',)"


def test_one_or_many(race, tiny):
    one = measure_behaviour(tiny, race, "default", kinds="implicit", decoding=Decoding(2), max_word_pairs=1)
    assert set(one["kind"]) == {"implicit"}
    with pytest.raises(AlignblindError, match="unknown kinds 'implici'"):
        measure_behaviour(tiny, race, "default", kinds="implici")
    first = next(iter(race.categories))
    assert implicit_prompts(race, "default", categories=first) == implicit_prompts(race, "default", categories=[first])
    assert summarise(ROWS, "kind")["n"].tolist() == [1]


RACE = tomllib.loads((Path(__file__).parents[2] / "alignblind_mi" / "stimuli" / "concepts" / "race.toml").read_text("utf-8"))
FIELDS = ["{x!r}", "{x:d}", "{x:>99999999}", "{x.__class__}", "{x[0]}", "{}", "{0}", "{x", "x}", "{{x}}", "{ x }"]
PLACES = [("assignment",), ("implicit", 0, "text"), ("explicit", 0, "text"), ("senses", "race", "steering"),
          ("controls", "random", "steering"),
          ("interpretations", "paper", "text"), ("selfie", "paper", "text"), ("contexts", "race", "train", 0),
          ("contexts", "race", "test", 0), ("awareness", "separator"), ("awareness", "sentences", 0), ("awareness", "restatements", 0),
          ("awareness", "others", 0)]


def changed(path: tuple[Any, ...], change: Any) -> dict[str, Any]:
    data = copy.deepcopy(RACE)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = change(inner[path[-1]])
    return data


@pytest.mark.parametrize("field", FIELDS)
def test_only_plain_fields_stand_in_a_concept(field):
    for path in PLACES:
        problems = concept_problems(changed(path, lambda text: f"{text} {field}"))
        assert any("no plain field" in one or "do not pair up" in one for one in problems), path
    with pytest.raises(AlignblindError):
        fill(f"a {field}", {"x": "b"})


def test_fields_are_filled_letter_by_letter():
    assert filled("{x} and {y}", x="{y}", y="!r") == "{y} and !r"
    with pytest.raises(AlignblindError, match="nothing to fill"):
        filled("{z}", x="a")


@pytest.mark.parametrize(("path", "change"), [
    (("senses", "race", "word"), lambda word: "w" * 10**6), (("categories", "weapon", "positive"), lambda words: ["w"] * 10**6),
    (("implicit", 0, "text"), lambda text: text + " w" * 10**6), (("implicit",), lambda entries: entries * 10**4)])
def test_absurd_sizes_are_refused_with_their_bound(path, change):
    problems = concept_problems(changed(path, change))
    assert any("at most" in one for one in problems)
    assert all(len(one) < 300 for one in problems)


@pytest.mark.parametrize(("hint", "given", "said"), [
    (Name, "", "is empty"), (Name, " ", "is empty"), (Name, "a\0b", "cannot be printed"), (Name, "a\nb", "cannot be printed"),
    (Name, "\ud800", "half a character"), (Text, "\ud800", "half a character"), (Words, ["a", "\udfff"], r"x\[1\] has half a character"),
    (Names | None, ["a", "a"], "twice"), (SomeNames, [], "empty"), (AnyLayers | None, [1, 1], "twice")])
def test_texts_names_and_lists_that_mean_nothing_are_said(hint, given, said):
    with pytest.raises(EditError, match=said):
        checked(given, hint, "x", EditError)


def test_texts_that_are_plain_stay_as_they_are():
    for text in ("", "a\0b", "a\nb", "\U0001f600"):
        assert checked(text, Text, "x", EditError) == text
    assert checked("abc", Words, "x", EditError) == checked("abc", SomeNames, "x", EditError) == ("abc",)    # one, not its letters
    assert checked((), AnyLayers, "x", EditError) == ()


def test_a_device_is_looked_for_where_it_is_needed_and_known_from_the_start():
    assert ModelSpec("m", device="cuda:99").device == "cuda:99"    # as another machine's record says it
    for device in ("", "abc", "a\0b", "meta", "99", "x" * 5000):
        with pytest.raises(AlignblindError, match="unknown device"):
            ModelSpec("m", device=device)
    with pytest.raises(AlignblindError, match="there is no device 'cuda:99'"):
        ModelSpec("m", device="cuda:99").resolved()


def test_an_edit_says_what_its_vector_holds():
    with pytest.raises(EditError, match="not finite"):
        Edit(Site(3, "m"), torch.tensor([1.0, INF]))


if __name__ == "__main__":
    from alignblind_mi import load_concept

    print(json.dumps({"seed of numpy": type(Decoding(seed=np.int64(3)).seed).__name__,
                      "modules in a list": str(LoraSettings(modules=["q_proj"]).modules),
                      **{f"{name} {value}": outcome(partial(made, name, value)) for name, value in TABLE},
                      **{f"call {number}": outcome(partial(make, load_concept("race"))) for number, make in enumerate(CALLS)}}))


@dataclass(frozen=True)
class Settings:
    layer: Layer = 1
    units: Annotated[tuple[int, ...], Listed(once=False)] = ()

    def __post_init__(self) -> None:
        check_fields(self, EditError)


def test_what_was_right_once_is_not_taken_for_what_only_equals_it():
    for _ in range(2):    # the second time it is known
        assert Settings(1, (1, 2)).units == (1, 2)
        for wrong in ({"layer": True}, {"layer": 1.0}, {"units": (True, 2)}, {"units": (1.0, 2)}):
            with pytest.raises(EditError, match="must be a whole number"):
                Settings(**{"layer": 1, "units": (1, 2), **wrong})
