import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats
from worlds import CHANGES, RATES, World, change_rates, rate_coverage

from alignblind_mi.intervals.clustered import (
    StatisticsError,
    change_test,
    exact_interval,
    mean_interval,
    mean_test,
    rate_interval,
)


def test_exact_interval_is_the_textbook_one() -> None:
    assert exact_interval(8, 10) == pytest.approx((0.4439, 0.9748), abs=1e-4)  # a standard table of binomial limits
    assert exact_interval(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert exact_interval(0, 0) == (0.0, 1.0)
    assert exact_interval(3, 10, level=0.5).low > exact_interval(3, 10).low


@given(st.integers(0, 60), st.integers(0, 60))
def test_exact_interval_contains_the_share_and_mirrors(successes: int, failures: int) -> None:
    n = successes + failures
    low, high = exact_interval(successes, n)
    assert 0 <= low <= (successes / n if n else 0.5) <= high <= 1
    assert exact_interval(failures, n) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("successes", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95.0)])
def test_impossible_counts_are_refused(successes: int, n: int, level: float) -> None:
    with pytest.raises(StatisticsError, match=rf"{successes} of {n} at level {level}"):
        exact_interval(successes, n, level)


# --- error rates, by simulation (docs/statistics.md has the whole table) --------------------------------------------------------------

FEW_TEMPLATES = {
    "template sd .5": World(template_sd=0.5), "template sd 1": World(template_sd=1.0), "template sd 2": World(template_sd=2.0),
    "words differ too": World(word_sd=1.0, template_sd=1.0), "near the end": World(rate=0.9, template_sd=1.0),
    "two templates": World(templates=2, template_sd=1.0), "six templates": World(templates=6, orders=1, template_sd=1.0),
    "many invalid": World(template_sd=1.0, valid=0.3, valid_sd=1.0),
}
N = 300
LEAST = 0.925    # 95 % less two of its standard errors in N simulations


@pytest.mark.parametrize("world", FEW_TEMPLATES.values(), ids=FEW_TEMPLATES)
def test_a_rate_is_covered_as_often_as_the_interval_says_and_not_by_the_former_ones(world: World) -> None:
    ours, _ = rate_coverage(world, RATES["ours"], N)
    assert LEAST <= ours <= 0.99
    assert rate_coverage(world, RATES["exact"], 100)[0] < 0.8
    assert world.templates > 3 or rate_coverage(world, RATES["clustered bootstrap"], 100)[0] < LEAST


def test_where_templates_do_not_differ_the_interval_is_wide_and_not_wrong() -> None:
    for world in (World(), World(word_sd=1.0), World(pairs=5, orders=1, rate=0.9)):
        ours, exact = rate_coverage(world, RATES["ours"], 150), rate_coverage(world, RATES["exact"], 150)
        assert ours[0] >= LEAST
        assert ours[1] > exact[1]


NO_EFFECT = {
    "few discordant, effect by template": World(rate=0.97, template_sd=1.0, effect=None, effect_sd=1.0),
    "ten word pairs": World(pairs=10, rate=0.9, effect=None, effect_sd=1.0),
    "no effect on any item": World(rate=0.95), "many discordant": World(word_sd=1.0, template_sd=1.0, effect=None, effect_sd=1.0),
    "half invalid": World(rate=0.9, effect=None, effect_sd=1.0, valid=0.5, valid_sd=1.0),
}


@pytest.mark.parametrize("world", NO_EFFECT.values(), ids=NO_EFFECT)
def test_no_difference_is_seldom_taken_for_one_and_p_never_disagrees_with_the_interval(world: World) -> None:
    assert world.difference == pytest.approx(0, abs=1e-6)
    held, claimed, at_odds = change_rates(world, CHANGES["ours"], N)
    assert held >= LEAST
    assert claimed <= 0.075    # 5 % and two standard errors
    assert at_odds == 0


def test_the_exact_branch_took_chance_for_an_effect() -> None:
    world = World(pairs=10, rate=0.9, effect=None, effect_sd=1.0)
    _, claimed, at_odds = change_rates(world, CHANGES["former"], N)
    assert claimed > 0.075
    assert at_odds > 0.02


@pytest.mark.parametrize("world", [World(rate=0.8, effect=-1.0, effect_sd=0.5), World(rate=0.7, effect=-1.5, templates=4, orders=1),
                                   World(rate=0.8, effect=-1.0, effect_sd=0.5, word_sd=1.0, template_sd=1.0, templates=6)], ids=repr)
def test_a_true_difference_is_covered(world: World) -> None:
    assert 0.9 <= change_rates(world, CHANGES["ours"], N)[0] <= 0.995    # changes from near the end of the scale are skewed


def test_readings_of_few_contexts_in_few_templates_are_covered() -> None:
    random, context, template = np.random.default_rng(0), np.repeat(np.arange(6), 4), np.repeat(np.arange(3), 8)
    both, alone = [], []
    for _ in range(500):
        values = random.normal(0, 1, 3)[template] + random.normal(0, 0.3, 6)[context] + random.normal(0, 0.3, 24)
        both.append(mean_interval(values, [context, template]))
        alone.append(mean_interval(values, [context]))
    covered = [float(np.mean([low <= 0 <= high for low, high in found])) for found in (both, alone)]
    assert 0.93 <= covered[0] <= 0.985
    assert covered[1] < 0.88


# --- against references, and by hand --------------------------------------------------------------------------------------------------


def test_a_mean_is_students_where_each_value_is_a_cluster_and_over_equal_clusters_means() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 60)
    found, reference = mean_test(values, [np.arange(60)]), stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval()))
    labels = np.repeat([f"t{i}" for i in range(6)], 10)
    one, means = mean_test(values, [labels]), stats.ttest_1samp(values.reshape(6, 10).mean(1), 0)
    assert (one.low, one.high, one.p) == pytest.approx((*means.confidence_interval(), means.pvalue))


def test_the_half_width_by_hand() -> None:
    values = np.array([0.0, 1.0, 2.0, 5.0, 1.0, 3.0])    # 3 word pairs x 2 templates, in rows
    pair, template = np.repeat([0, 1, 2], 2), np.tile([0, 1], 3)
    low, high = mean_interval(values, [pair, template])
    residual = (values - 2).reshape(3, 2)
    jack = [k / (k - 1) * np.sum(sums**2) / 36 for k, sums in ((3, residual.sum(1)), (2, residual.sum(0)), (6, residual.ravel()))]
    t3, t2 = stats.t.ppf(0.975, 2) ** 2, stats.t.ppf(0.975, 1) ** 2
    half = max(t3 * jack[0] + t2 * max(jack[1] - jack[2], 0), t2 * jack[1] + t3 * max(jack[0] - jack[2], 0)) ** 0.5
    assert (low, high) == pytest.approx((2 - half, 2 + half))


def test_unequal_clusters_are_jackknifed_and_count_by_their_effective_number() -> None:
    values, labels = np.array([1.0, 1, 1, 1, 0, 2, 3]), np.array([0, 0, 0, 0, 1, 1, 2])
    mean, without = values.mean(), [values[labels != k].mean() for k in range(3)]
    variance = 2 / 3 * np.sum((np.array(without) - mean) ** 2)
    df = 1 / np.sum((np.array([4, 2, 1]) / 7) ** 2) - 1
    half = stats.t.ppf(0.975, df) * variance**0.5
    assert mean_interval(values, [labels]) == pytest.approx((mean - half, mean + half))


def test_p_is_below_the_level_just_where_the_interval_leaves_out_zero() -> None:
    random = np.random.default_rng(4)
    pair, template = (index.ravel() for index in np.indices((12, 4)))
    for shift in np.linspace(0, 1.2, 25):
        values = shift + random.normal(0, 0.3, 4)[template] + random.normal(0, 1, 48)
        change = np.sign(np.where(np.abs(values) > 1, values, 0))
        for level in (0.9, 0.95):
            for found in (mean_test(values, [pair, template], level=level), change_test(change, [pair, template], level=level)):
                assert (found.p < 1 - level) == (found.low > 0 or found.high < 0)


def test_a_dozen_answers_that_agree_have_an_interval_with_width() -> None:
    pair, template = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)
    for hits, inside in ((np.ones(12), 1.0), (np.zeros(12), 0.0)):
        low, high, how = rate_interval(hits, [pair, template])
        assert how == "clustered"
        assert high - low > 0.25    # exact, of independent answers: 0.26
        assert low <= inside <= high
    still = change_test(np.zeros(12), [pair, template])
    assert (still.estimate, still.p) == (0, 1)
    assert still.low < -0.2
    assert still.high == -still.low


def test_independent_answers_have_the_exact_interval() -> None:
    hits = np.array([1.0] * 8 + [0.0] * 2)
    for clusters in ([], [np.arange(10)], [np.arange(10), np.zeros(10)], [np.arange(10), np.arange(10)]):
        assert rate_interval(hits, clusters) == (*exact_interval(8, 10), "exact")
    assert rate_interval(hits, [np.arange(10), np.repeat([0, 1], 5)]).interval == "clustered"


def test_what_was_asked_in_several_templates_and_answered_in_one_says_nothing_of_the_others() -> None:
    pair, template = np.tile(np.arange(10), 2), np.repeat(["a", "b"], 10)
    hits, valid = np.tile([1.0, 0.0], 10), (template == "a").astype(float)
    assert rate_interval(hits, [pair, template], valid=valid) == (0, 1, "none")
    assert rate_interval(hits[:10], [pair[:10], template[:10]]).interval == "exact"    # one template was asked: it is spoken of
    assert rate_interval(hits, [pair, template], valid=np.zeros(20)) == (0, 1, "none")
    assert rate_interval(hits, [np.zeros(20)]) == (0, 1, "none")
    change = change_test(hits, [pair, template], valid=valid)
    assert (change.low, change.high, change.p) == (-1, 1, 1)
    nothing = change_test(hits, [pair, template], valid=np.zeros(20))
    assert np.isnan([nothing.estimate, nothing.p]).all()
    assert np.isnan(mean_interval(np.where(valid > 0, hits, np.nan), [pair, template])).all()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=40))
def test_a_rates_interval_lies_within_zero_and_one_contains_the_rate_and_mirrors(answers: list[tuple[bool, int, int]]) -> None:
    hits, pair, template = (np.array(part, dtype=float) for part in zip(*answers, strict=True))
    low, high, how = rate_interval(hits, [pair, template])
    assert 0 <= low <= hits.mean() <= high <= 1
    assert high > low
    mirrored = rate_interval(1 - hits, [pair, template])
    assert (mirrored.low, mirrored.high, mirrored.interval) == (pytest.approx(1 - high), pytest.approx(1 - low), how)


def test_a_mean_of_odd_input() -> None:
    labels = np.arange(4)
    assert np.isnan(mean_test(np.ones(4), [np.zeros(4)])[1:]).all()
    assert np.isnan(mean_test(np.full(4, np.nan), [labels])).all()
    assert mean_test(np.zeros(4), [labels]) == (0, 0, 0, 1)
    assert np.isnan(mean_test(np.ones(4), [labels]).p)
    assert mean_test(np.array([1, 2, 3, np.nan]), [labels])[1:3] == pytest.approx(stats.ttest_1samp([1, 2, 3], 0).confidence_interval())
    with pytest.raises(StatisticsError, match="one or two cluster variables, not 3"):
        mean_test(np.ones(4), [labels] * 3)
    with pytest.raises(StatisticsError, match="name at least one"):
        mean_test(np.ones(4), [])


def test_repeating_a_clusters_values_tells_nothing_new() -> None:
    values = np.random.default_rng(1).normal(size=9)
    once, thrice = mean_interval(values, [np.arange(9)]), mean_interval(np.repeat(values, 3), [np.repeat(np.arange(9), 3)])
    assert thrice == pytest.approx(once)


@pytest.mark.parametrize(("values", "labels", "said"), [
    (["1", "2"], ["a", "b"], "numbers alone"), ([1.0, "b"], ["a", "b"], "numbers alone"), ([1.0, 2.0], ["a", "b", "c"], "2 values have 3"),
    ([1.0, 2.0, 3.0], ["a", "b"], "3 values have 2"), ([1.0, 2.0], ["a", None], "1 of 2 cluster labels are missing")])
def test_values_and_clusters_that_do_not_fit_are_said(values, labels, said) -> None:
    data, clusters = np.array(values, dtype=object), np.array(labels, dtype=object)
    for find in (mean_interval, mean_test, rate_interval, change_test):
        with pytest.raises(StatisticsError, match=said):
            find(data, [clusters])


def test_what_is_valid_is_said_of_every_value() -> None:
    for find in (rate_interval, change_test):
        with pytest.raises(StatisticsError, match="2 values have 3 entries"):
            find(np.ones(2), [np.array(["a", "b"])], valid=np.ones(3))
