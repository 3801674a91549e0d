import pytest
import torch
from hypothesis import given, strategies as st

from alignblind_mi.models.edits import UNTREATED, Edit, EditError, Site, Treatment, apply, check_treatments
from alignblind_mi.stimuli.prompts import Prompt

FLOATS = st.floats(-5, 5, width=32)
VECTORS = st.lists(FLOATS, min_size=4, max_size=4).map(torch.tensor)


def strength(value: float) -> torch.Tensor:
    return torch.tensor([float(value)])


@given(VECTORS, VECTORS)
def test_replace_forgets_and_adding_nothing_changes_nothing(x, v):
    assert torch.equal(apply(x, v, "replace", strength(1)), v)
    assert torch.equal(apply(x, v, "add", strength(0)), x)
    assert torch.allclose(apply(apply(x, v, "add", strength(2)), v, "add", strength(-2)), x, atol=1e-4)


@given(VECTORS, VECTORS.filter(lambda v: bool(v.norm() > 0.1)))
def test_ablation_removes_the_direction_and_nothing_else(x, v):
    out, unit = apply(x, v, "ablate", strength(1)), v / v.norm()
    assert float(out @ unit) == pytest.approx(0, abs=1e-4)
    assert torch.allclose(out, apply(out, v, "ablate", strength(1)), atol=1e-4)
    assert torch.allclose(x - out, (x @ unit) * unit, atol=1e-4)


@given(VECTORS, VECTORS.filter(lambda v: bool(v.norm() > 0.1)), VECTORS)
def test_what_is_added_as_far_as_another_vector_goes_that_far(x, v, end):
    out = apply(x, v, "add", strength(0.5), end)
    assert torch.allclose(out - x, 0.5 * (end - x).norm() * v / v.norm(), atol=1e-4)


def test_values_that_make_no_sense_are_named():
    v = torch.ones(4)
    for make, said in ((lambda: Site(-1, "m"), "counted from 0"), (lambda: Edit(Site(0, "m"), v, "replace", 2.0), "no strength"),
                       (lambda: Edit(Site(0, "m"), torch.zeros(4), "ablate"), "zero vector"),
                       (lambda: Edit(Site(0, "m"), torch.zeros(4), "add", as_far_as=v), "zero vector"),
                       (lambda: Edit(Site(0, "m"), v, as_far_as=v), "does not add but replace"),
                       (lambda: Edit(Site(0, "m"), v, "add", as_far_as=torch.full((4,), torch.nan)), "finite numbers")):
        with pytest.raises(EditError, match=said):
            make()


def test_the_baseline_is_the_empty_value():
    prompt = Prompt("black and white")
    (row,) = UNTREATED.rows([prompt])
    assert row.edits == ()
    assert row.prompt is prompt
    assert Treatment("polite", prefix="Please. ").rows([prompt])[0].prompt.text == "Please. black and white"


def test_sites_name_their_hook():
    assert Site(3, "m").hook == "blocks.3.hook_resid_post"
    assert Site(0, "m", stream="attn_out").hook == "blocks.0.hook_attn_out"
    assert Site(2, "m", "z", units=(1,)).hook == "blocks.2.attn.hook_z"
    assert Site(2, "m", "post").hook == "blocks.2.mlp.hook_post"


def test_treatments_of_one_table_have_names_of_their_own():
    check_treatments([UNTREATED, Treatment("a", prefix="x "), Treatment("b")])
    same = [Treatment("a"), Treatment("a", prefix="x")]
    for wrong, said in (([], "no treatment"), ([UNTREATED, UNTREATED], "'untreated'"), (same, "'a'")):
        with pytest.raises(EditError, match=said):
            check_treatments(wrong)
