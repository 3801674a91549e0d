"""One model, many threads: views, adapters and edits give the numbers that they give one after the other."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from doubles import make_adapter, tiny_llama

from alignblind_mi.instruments.gradients import log_odds_gradients
from alignblind_mi.models.edits import Edit, Row, Site, Treatment
from alignblind_mi.models.model import HookedModel, load_model, untrained
from alignblind_mi.stimuli.prompts import Prompt, mark

WORDS = [f"w{i}" for i in range(40)]
TEXTS = ["w1 w2 w3 w4", "w5 w2 w9", "w7 w8 w2 w11 w12 w13", "w2 w2 w1"]
PROMPTS = [mark(text, here="w2") for text in TEXTS]
THREADS, ROUNDS = 6, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    base = tiny_llama(tmp_path_factory.mktemp("base"), WORDS)
    adapters = [make_adapter(base, tmp_path_factory.mktemp("adapters") / name, seed) for seed, name in enumerate(("one", "two"))]
    return load_model(str(base), adapters=adapters)


def views(model: HookedModel) -> list[HookedModel]:
    pushes = [tuple(Edit(Site(layer, "here", "resid_mid"), torch.full((model.d_model,), size), "add", 2.0) for layer in (0, 1))
              for size in (0.5, -1.0)]
    treatments = [Treatment("plain"), Treatment("one", adapter="one"), Treatment("two", adapter="two"),
                  *(Treatment(f"push{i}", edits) for i, edits in enumerate(pushes)), Treatment("both", pushes[0], adapter="two")]
    return [model.under(treatment) for treatment in treatments]


def sampled(view: HookedModel) -> Any:
    return [made.text for made in view.generate(view.rows(PROMPTS), 5, temperature=1.0, seed=3)]


def gradients(view: HookedModel) -> Any:
    return log_odds_gradients(view, view.rows(PROMPTS)[0], (" w3", " w4"), [(1, "resid_post")]).gradients[1, "resid_post"]


ASKED: dict[str, Callable[[HookedModel], Any]] = {
    "next": lambda view: view.next_log_probs(view.rows(PROMPTS)),
    "record": lambda view: view.record(view.rows(PROMPTS[:2]), [Site(layer, "here", "z") for layer in (0, 1)]),
    "choices": lambda view: view.continuation_log_probs(view.rows(PROMPTS), [[" w3 w4", " w5"]] * len(PROMPTS)),
    "sampled": sampled,
    "gradients": gradients,
    "cache": lambda view: view.cache(PROMPTS, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"],
    "lens": lambda view: view.lens_log_probs(view.rows(PROMPTS[:1]), [Site(0, "here")], [" w3"]),
}


def same(found: Any, expected: Any) -> bool:
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def test_threads_get_what_they_would_get_alone(model):
    work = [(view, name) for _ in range(ROUNDS) for view in views(model) for name in ASKED]
    alone = {(view.treatment.name, name): ASKED[name](view) for view, name in work[: len(work) // ROUNDS]}
    assert len({str(value) for (_, name), value in alone.items() if name == "next"}) == len(views(model))    # or a mix would not show
    order = torch.randperm(len(work), generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda i: (work[i], ASKED[work[i][1]](work[i][0])), order))
    wrong = [(view.treatment.name, name) for (view, name), value in found if not same(value, alone[view.treatment.name, name])]
    assert not wrong, f"{len(wrong)} of {len(found)}"


def test_a_thread_waits_for_the_run_of_another_view_and_may_run_inside_its_own(model):
    begun, inner = Event(), []
    slow, other = model.under(Treatment("one", adapter="one")), model.under(Treatment("two", adapter="two"))
    waiting: list[bool] = []

    def within(n: int) -> None:
        begun.set()
        inner.append(model.next_log_probs([Row(PROMPTS[0])]))    # the same thread: no deadlock
        waiting.append(not asked.done())

    def ask() -> torch.Tensor:
        begun.wait(30)
        return other.next_log_probs([Row(PROMPTS[0])])

    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask)
        pool.submit(slow.generate, [Row(PROMPTS[0])], 2, progress=within).result(60)
        assert torch.equal(asked.result(60), other.next_log_probs([Row(PROMPTS[0])]))
    assert waiting == [True]
    assert torch.equal(inner[0], model.next_log_probs([Row(PROMPTS[0])]))


def test_views_share_one_lock_and_models_do_not(model, tmp_path):
    assert all(view.lock is model.lock for view in views(model))
    assert load_model(str(tiny_llama(tmp_path / "other", WORDS))).lock is not model.lock


def test_random_weights_and_samples_are_those_of_their_seed_in_any_thread(model):
    def drawn(seed: int) -> float:
        return float(sum(part.sum() for part in untrained(model, seed=seed).engine.model.parameters()))

    alone = [drawn(seed) for seed in range(4)] * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(drawn, [*range(4)] * 3)) == alone
    assert model.generate([Row(Prompt(TEXTS[0]))], 4, temperature=1.0, seed=1)[0].text == sampled_again(model)


def sampled_again(model: HookedModel) -> str:
    torch.manual_seed(7)
    return model.generate([Row(Prompt(TEXTS[0]))], 4, temperature=1.0, seed=1)[0].text
