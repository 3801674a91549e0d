"""Numbers that overflow are an error that names the format and a wider one, on either engine; never answers that count as invalid."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignblind_mi.models.edits import Edit, Row, Site
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.prompts import mark
from alignblind_mi.studies.doctor import check_up


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A checkpoint whose activations are beyond the range of float16, and whose weights are not."""
    folder = Path(shutil.copytree(organism_path("aligned"), tmp_path_factory.mktemp("large") / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 3e4 if ".layers.2.mlp.down_proj" in name else value for name, value in weights.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("engine", ["auto", "fast", "plain"])
def test_a_model_that_overflows_is_refused_when_it_is_loaded(large, engine):
    with pytest.raises(ModelError, match=r"become NaN or infinite in float16, .*: load it in bfloat16 or float32"):
        load_model(ModelSpec(str(large), dtype="float16", engine=engine))
    for dtype in ("float32", "bfloat16"):
        model = load_model(ModelSpec(str(large), dtype=dtype, engine=engine))
        assert model.next_log_probs(["black and white"]).isfinite().all()


def test_the_doctor_says_so(large):
    found = check_up(ModelSpec(str(large), dtype="float16"), drift=False).set_index("check")
    assert found.loc["weights", "status"] == "fail"
    assert "load it in bfloat16 or float32" in found.loc["weights", "found"]


@pytest.fixture(scope="module", params=["fast", "plain"])
def model(request) -> HookedModel:
    return load_model(ModelSpec("organism:aligned", engine=request.param))


SAID = "become NaN or infinite in float32, .*: its weights, or a vector that is put into it, are too large"


@pytest.mark.parametrize("ask", [
    lambda model, row: model.next_log_probs([row]), lambda model, row: model.next_probs([row], [" race"]),
    lambda model, row: model.next_ranks([row], [" race"]), lambda model, row: model.text_log_probs([row]),
    lambda model, row: model.generate([row], 2), lambda model, row: model.continuation_log_probs([row], [[" black white"]]),
    lambda model, row: model.record([row], [Site(7, "marked")]),
    lambda model, row: model.lens_log_probs([row], [Site(7, "marked")], [" race"])])
def test_a_vector_that_is_too_large_is_an_error_of_every_function(model, ask):
    prompt = mark("black and white", marked="black", last="white")
    huge = torch.full((model.d_model,), 3e38)
    rows = [Row(prompt, tuple(Edit(Site(layer, "marked"), huge, "add") for layer in (1, 2))), Row(prompt)]
    with pytest.raises(ModelError, match=SAID):
        ask(model, rows[0])
    ask(model, rows[1])    # the model itself is as well as it was


def test_what_overflows_while_an_answer_is_written_is_an_error(model):
    prompt = mark("black and white", marked="black")
    huge = torch.full((model.d_model,), 3e38)
    row = Row(prompt, tuple(Edit(Site(layer, "generated"), huge, "add") for layer in (1, 2)))
    with pytest.raises(ModelError, match=SAID):
        model.generate([row], 3)
    with pytest.raises(ModelError, match=SAID):
        model.continuation_log_probs([row], [[" black white"]])
