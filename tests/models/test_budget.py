"""The budget looks at every device that a model lies on: made-up figures of free memory."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alignblind_mi.models import budget as of_rows
from alignblind_mi.models.blocks import device_shares
from alignblind_mi.models.budget import Budget, OutOfMemoryError, RowCost

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
COST = RowCost(token=1000, column=8000, vocabulary=1000)


@pytest.fixture
def free(monkeypatch):
    """Free bytes by device, to be set."""
    found = {FIRST: 10 << 30, SECOND: 10 << 30}
    monkeypatch.setattr(of_rows, "free_memory", lambda device: found[torch.device(device)])
    return found


def test_a_full_second_device_makes_batches_small(free):
    both = {FIRST: 0.5, SECOND: 0.5}
    roomy = Budget(COST, FIRST, shares=both).most_rows(50, 100, keep=True)
    free[SECOND] = 10 << 20
    full = Budget(COST, FIRST, shares=both)
    assert full.most_rows(50, 100, keep=True) == int(0.6 * (10 << 20)) // (50 * 1000 + 100 * 4000) < roomy
    assert full.memory == int(0.6 * (10 << 20))
    assert Budget(COST, FIRST).most_rows(50, 100, keep=True) == roomy    # of a model that does not lie there it says nothing


def test_each_device_is_asked_for_the_keys_and_values_that_lie_on_it(free):
    free[FIRST], free[SECOND] = 10 << 20, 30 << 20
    even, uneven = (Budget(COST, FIRST, shares={FIRST: share, SECOND: 1 - share}).most_rows(10, 200, keep=True) for share in (0.5, 0.25))
    assert even == int(0.6 * (10 << 20)) // (10 * 1000 + 200 * 4000)
    assert uneven == int(0.6 * (10 << 20)) // (10 * 1000 + 200 * 2000) > even


def test_halving_halves_every_device(free):
    made = Budget(COST, FIRST, shares={FIRST: 0.5, SECOND: 0.5})
    before = made.places
    made.shrink(MemoryError())
    assert made.places == [(memory // 2, share) for memory, share in before]


def test_of_several_processes_none_halves_alone(free, monkeypatch):
    made = Budget(COST, FIRST)
    monkeypatch.setattr("alignblind_mi.borders.ranks.together", lambda: 2)
    with pytest.raises(OutOfMemoryError, match="not halved with tensor parallelism"):
        made.shrink(MemoryError())


def test_the_devices_of_a_model_are_those_that_its_layers_run_on():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2))
    cpu = torch.device("cpu")
    assert device_shares(model) == {cpu: 1.0}
    model.model.layers[3].to("meta")
    model.model.layers[3]._hf_hook = SimpleNamespace(execution_device=1)    # as accelerate leaves an offloaded layer
    assert device_shares(model) == {cpu: 0.75, SECOND: 0.25}
