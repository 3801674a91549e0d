import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.errors import AlignblindError
from alignblind_mi.intervals.clustered import StatisticsError, change_test
from alignblind_mi.pages.scoring import judge_rows
from alignblind_mi.results import Result, save_result
from alignblind_mi.statistics.power import Plan, _at_the_median, connor_items, items_needed, plan_from_pilot, power_of, smallest_difference
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.stimuli.prompts import assignments, implicit_prompts


def changes(random: np.random.Generator, plan: Plan) -> np.ndarray:
    """[word pair, template, order] changes (-1, 0, 1) with exactly the plan's discordant share, mean and correlations."""
    size = plan.word_pairs, plan.templates, plan.orders
    total = plan.share - plan.difference**2
    word, template = (np.sqrt(icc * total) / (2 * plan.share) for icc in (plan.icc, plan.template_icc))
    more = (plan.share + plan.difference) / (2 * plan.share) + word * random.choice([-1, 1], (size[0], 1, 1))
    more = more + template * np.sqrt(3) * random.uniform(-1, 1, (1, size[1], 1))
    assert 0 <= more.min() <= more.max() <= 1
    return (random.random(size) < plan.share) * np.where(random.random(size) < more, 1.0, -1.0)


def found_share(plan: Plan, seed: int, n: int = 400) -> float:
    """How often the test of `paired_differences` finds the difference, by simulation."""
    random, hits = np.random.default_rng(seed), 0
    labels = [index.ravel() for index in np.indices((plan.word_pairs, plan.templates, plan.orders))][: 1 if plan.fixed_templates else 2]
    for _ in range(n):
        change = changes(random, plan).ravel()
        found = change_test(change, labels, level=1 - plan.alpha)
        hits += (found.low > 0 or found.high < 0) and (found.estimate > 0) == (plan.difference > 0)
    return hits / n


PLANS = {
    "large effect": Plan(0.95, 0.6),
    "independent items": Plan(0.9, 0.8),
    "many templates": Plan(0.9, 0.75, templates=12),
    "one template": Plan(0.9, 0.8, 0.2, templates=1),
    "fixed templates": Plan(0.9, 0.8, 0.2, fixed_templates=True),
    "words differ": Plan(0.8, 0.6, icc=0.1),
    "words and templates differ": Plan(0.65, 0.5, 0.5, icc=0.05, template_icc=0.01, templates=8),
    "balanced orders": Plan(0.5, 0.65, 0.5, icc=0.1, template_icc=0.002, templates=3, orders=4),
}


@pytest.mark.parametrize(("plan", "seed"), [(plan, seed) for seed, plan in enumerate(PLANS.values())], ids=PLANS)
def test_the_planned_items_have_the_promised_power(plan: Plan, seed: int) -> None:
    needed = items_needed(plan)
    promised = power_of(needed)
    assert promised >= 0.8
    assert power_of(replace(needed, word_pairs=needed.word_pairs - 1)) < 0.8
    assert found_share(needed, seed) == pytest.approx(promised, abs=3 * np.sqrt(0.16 / 400) + 0.01)


def test_connors_number_by_hand_and_what_the_clustered_test_adds() -> None:
    # (1.95996 sqrt(.3) + .84162 sqrt(.3 - .04))^2 / .04
    plan = Plan(0.7, 0.5, 0.3)
    assert connor_items(plan) == pytest.approx((1.959964 * 0.3**0.5 + 0.841621 * 0.26**0.5) ** 2 / 0.04, rel=1e-5)
    assert connor_items(Plan(0.7, 0.7)) == float("inf")
    fixed, drawn = items_needed(replace(plan, fixed_templates=True)).items, items_needed(plan).items
    assert fixed == pytest.approx(connor_items(plan), rel=0.25)    # few word pairs cost degrees of freedom, which Connor's formula ignores
    assert drawn > 1.5 * fixed


def test_more_correlation_needs_more_and_more_items_show_less() -> None:
    needed = [items_needed(Plan(0.8, 0.6, icc=icc, fixed_templates=True)).items for icc in (0.0, 0.1, 0.3)]
    assert needed == sorted(set(needed))
    falls = [smallest_difference(Plan(0.9, 0.9, word_pairs=pairs)) for pairs in (20, 50, 200)]
    assert falls == sorted(falls, reverse=True)
    plan = Plan(0.9, 0.9 - falls[1], word_pairs=50)
    assert power_of(plan) == pytest.approx(0.8, abs=0.01)
    assert items_needed(plan).word_pairs == pytest.approx(50, abs=1)
    held = smallest_difference(Plan(0.9, 0.8, 0.15, word_pairs=100))
    assert power_of(Plan(0.9, 0.9 - held, 0.15, word_pairs=100)) == pytest.approx(0.8, abs=0.01)
    assert np.isnan(smallest_difference(Plan(0.02, 0.02, word_pairs=3)))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Plan(1.2, 0.5), "untreated is 1.2: expected a rate from 0 to 1"),
    (lambda: Plan(0.9, 0.5, 0.3), "a discordant share of 0.3 is impossible with rates of 0.9 and 0.5: expected 0.4 to 0.6"),
    (lambda: Plan(0.9, 0.5, icc=0.7, template_icc=0.5), "icc 0.7 and template_icc 0.5: expected shares"),
    (lambda: Plan(0.9, 0.5, templates=0), "templates 0"),
    (lambda: power_of(Plan(0.9, 0.5, word_pairs=1)), "1 word pairs has no power to compute: expected 2"),
    (lambda: items_needed(Plan(0.9, 0.9)), "both rates are 0.9: no number of items"),
    (lambda: items_needed(Plan(0.8, 0.75, template_icc=0.2)), "no number of word pairs .* plan more templates"),
    (lambda: items_needed(Plan(0.9, 0.5), 1.0), "a power of 1 cannot be planned for"),
])
def test_what_cannot_be_planned_is_said(make, said: str) -> None:
    with pytest.raises(StatisticsError, match=said):
        make()


def pilot(change: np.ndarray) -> pd.DataFrame:
    """Rows whose items change as said; items that do not change are stereotyped."""
    pair, template, order = (index.ravel() for index in np.indices(change.shape))
    base = pd.DataFrame({"word_pair": [f"w{i}" for i in pair], "template": [f"t{i}" for i in template], "option_order": order.astype(str)})
    answers = {"untreated": change.ravel() <= 0, "aware": change.ravel() >= 0}
    return pd.concat([base.assign(treatment=name, outcome=np.where(hit, "stereotyped", "reversed")) for name, hit in answers.items()])


def test_a_pilot_gives_back_what_it_was_drawn_from() -> None:
    truth = Plan(0.75, 0.7, 0.45, icc=0.1, template_icc=0.02, word_pairs=40, templates=8, orders=2)
    random = np.random.default_rng(0)
    plans = [plan_from_pilot(pilot(changes(random, truth)), "aware") for _ in range(40)]
    assert (plans[0].word_pairs, plans[0].templates, plans[0].orders) == (40, 8, 2)
    for name, size in (("icc", 0.02), ("template_icc", 0.02), ("difference", 0.02), ("share", 0.02)):
        assert np.mean([getattr(plan, name) for plan in plans]) == pytest.approx(getattr(truth, name), abs=size), name
    one = plan_from_pilot(pilot(changes(random, replace(truth, template_icc=0.0, templates=1, orders=8))), "aware")
    assert (one.templates, one.template_icc) == (1, 0.0)
    with pytest.raises(StatisticsError, match="the pilot has 1 word pairs"):
        plan_from_pilot(pilot(np.ones((1, 4, 1))), "aware")


def test_a_pilot_of_few_templates_that_differ_promises_what_there_is() -> None:
    truth = Plan(0.6, 0.4, 0.8, icc=0.02, template_icc=0.06, word_pairs=30, templates=3, orders=2)
    random = np.random.default_rng(2)
    said = [power_of(plan_from_pilot(pilot(changes(random, truth)), "aware")) for _ in range(40)]
    power = found_share(truth, 3)
    assert power < 0.2    # three templates that differ show little, however many word pairs
    assert power == pytest.approx(power_of(truth), abs=0.05)
    assert np.median(said) == pytest.approx(power, abs=0.08)


def test_a_variance_between_few_clusters_is_as_often_too_large_as_too_small() -> None:
    squares = np.random.default_rng(0).chisquare(2, 4000) / 2    # mean squares of three templates, true value 1
    noise, between = 0.3, 0.7
    found = [_at_the_median(square - noise, noise, 3) for square in squares]
    assert np.mean(np.array(found) > between) == pytest.approx(0.5, abs=0.03)
    assert np.mean(squares - noise > between) < 0.4    # the moments themselves


def test_the_command_prints_a_sentence_or_json_and_one_sentence_for_an_error() -> None:
    run = CliRunner().invoke
    text = run(app, ["power", "--untreated", ".95", "--treated", ".6"])
    assert text.exit_code == 0
    assert re.search(r"0\.95 -> 0\.6 needs \d+ word pairs x 4 templates x 1 orders = \d+ items", text.stdout)
    found = json.loads(run(app, ["power", "--untreated", ".95", "--treated", ".6", "--icc", ".2", "--power", ".9", "--json"]).stdout)
    assert found["power"] >= 0.9
    assert found["items"] == items_needed(Plan(0.95, 0.6, icc=0.2), 0.9).items
    have = json.loads(run(app, ["power", "--untreated", ".95", "--treated", ".9", "--word-pairs", "20", "--json"]).stdout)
    assert have["items"] == 80
    assert have["smallest_fall"] == pytest.approx(smallest_difference(Plan(0.95, 0.9, word_pairs=20)))
    assert isinstance(run(app, ["power", "--untreated", "2", "--treated", ".6"]).exception, AlignblindError)


def saved_pilot(folder, **more) -> pd.DataFrame:
    """Answers of a model without and with a treatment, as results of this project; under another cue there are fewer of them."""
    prompts = implicit_prompts(load_concept("race"), "default", max_word_pairs=3)
    rows = [{**prompt.labels, "prompt": prompt.text, "kind": "implicit", "model": "m", "treatment": treatment, "cue": cue,
             "answer": assignments(load_concept("race"), prompt)[int(treatment != "untreated" and i % 3 > 0)]}
            for cue, some in (("default", prompts), ("other", prompts[:5])) for treatment in ("untreated", "steered")
            for i, prompt in enumerate(some)]
    found = pd.DataFrame(rows).assign(**more)
    found["outcome"] = judge_rows(found)["outcome"]
    save_result(Result(found, {}), folder / "answers.parquet")
    return found[found["cue"] == "default"]


def test_the_command_plans_from_a_pilot_s_answers(tmp_path) -> None:
    run = CliRunner().invoke
    rows = saved_pilot(tmp_path)
    plan = plan_from_pilot(rows, "steered")
    done = run(app, ["power", "--pilot", str(tmp_path), "--json"])
    found = json.loads(done.stdout)
    needed = items_needed(replace(plan, word_pairs=0))
    assert (found["untreated"], found["treated"]) == (1.0, round(plan.treated, 4))
    assert (found["word_pairs"], found["items"], found["orders"]) == (needed.word_pairs, needed.items, plan.orders)
    assert "The pilot (steered race default balanced): 100.0% -> " in done.stderr
    for more, said in (([], "there are no rates"), (["--pilot", str(tmp_path), "--icc", ".1"], "--icc was given beside the pilot"),
                       (["--pilot", str(tmp_path), "--treatment", "x"], "--treatment x: .* has steered"),
                       (["--untreated", ".9", "--treated", ".5", "--treatment", "x"], "without --pilot")):
        error = run(app, ["power", *more]).exception
        assert isinstance(error, AlignblindError), more
        assert re.search(said, str(error))
    saved_pilot(tmp_path, treatment="untreated")
    assert "treatments of 0 models" in str(run(app, ["power", "--pilot", str(tmp_path)]).exception)
