"""Options that come together are declared once, and a verb has them in their place."""

import inspect
from dataclasses import fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from alignblind_mi.commands.options import AsJson, Asking, Loading, One, Pair, Seed, Without, configured, template_options, with_options
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.studies.config import StudyConfig

SEEN: list[dict] = []


@with_options
def verb(*, asked: One, times: int = 3, loading: Annotated[Loading, Without("engine", "dtype")], seed: Seed = 0, as_json: AsJson = False
         ) -> None:
    """What a verb says of itself."""
    SEEN.append({"asked": asked, "times": times, "loading": loading, "seed": seed, "as_json": as_json})


def test_a_kind_s_options_stand_in_its_place_without_those_left_out():
    assert list(inspect.signature(verb).parameters) == [
        "model", "concept", "cue", "times", "device", "device_map", "quantization", "trust_remote_code", "allow_pickle", "tensor_parallel",
        "seed", "as_json"]
    assert verb.__doc__ == "What a verb says of itself."


def test_a_verb_is_given_values_of_each_kind_from_the_command_line_and_from_python():
    app = typer.Typer()
    app.command()(verb)
    SEEN.clear()
    done = CliRunner().invoke(app, ["--cue", "names", "--device", "cpu", "--times", "2", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    verb("organism:aligned", cue="names", device="cpu", times=2, as_json=True)
    assert SEEN[0] == SEEN[1] == {"asked": One(cue="names"), "times": 2, "loading": Loading(device="cpu"), "seed": 0, "as_json": True}
    assert CliRunner().invoke(app, ["--engine", "fast"]).exit_code == 2
    with pytest.raises(TypeError, match="engine"):
        verb(engine="fast")


def test_what_is_not_given_is_what_python_takes():
    spec = {field.name: field.default for field in fields(ModelSpec)}
    assert {field.name: field.default for field in fields(Loading)} == {name: spec[name] for name in spec if name not in (
        "name", "revision", "offload_folder")}
    create = inspect.signature(StudyConfig.create).parameters
    asked = {field.name: field.default for field in fields(Asking)}
    assert template_options(asked.pop("chat_options")) == (create["chat_options"].default or {})    # a text on the command line
    assert asked == {name: create[name].default
                     for name in ("quick", "minutes", "chat", "system", "temperature", "shots", "protocol", "seed")}


def test_the_configuration_is_that_of_the_public_function():
    asked = configured(Pair(), Asking(quick=True, seed=4), Loading(dtype="float32", engine="plain"))
    assert asked == StudyConfig.create("organism:base", "organism:aligned", quick=True, seed=4, dtype="float32", engine="plain")
    one = configured(One("organism:base"), Asking(), Loading())
    assert one == StudyConfig.create("organism:base", "organism:base")
    assert Loading(device="cpu").spec("x", revision="main") == ModelSpec("x", revision="main", device="cpu")
