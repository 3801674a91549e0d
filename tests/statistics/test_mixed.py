import builtins

import numpy as np
import pandas as pd
import pytest

from alignblind_mi.statistics.mixed import mixed_logistic
from alignblind_mi.statistics.rates import StatisticsError


def design(n_pairs: int, n_templates: int) -> pd.DataFrame:
    """A balanced design under two treatments; `agrees` is 0.5 where the stereotyped answer is the first-with-first one, else -0.5."""
    treatment, pair, template, option, word = (index.ravel() for index in np.indices((2, n_pairs, n_templates, 2, 2)))
    table = pd.DataFrame({
        "treatment": np.where(treatment == 1, "aware", "untreated"), "kind": "implicit",
        "word_pair": pair, "template": template, "option_order": np.where(option == 0, "marked_first", "unmarked_first"),
        "word_order": np.where(word == 0, "negative_first", "positive_first"), "agrees": np.where(option == word, 0.5, -0.5)})
    return table.astype({"word_pair": str, "template": str})


def answered(random: np.random.Generator, n_pairs: int, n_templates: int, *, association: float = 2.0, change: float = -1.5,
             position: float = 0.5, words: float = 1.0, templates: float = 0.7) -> pd.DataFrame:
    """Answers drawn from the model itself."""
    table = design(n_pairs, n_templates)
    logit = association + change * (table["treatment"] == "aware") + position * table["agrees"]
    logit = logit + words * random.normal(size=n_pairs)[table["word_pair"].astype(int)]
    logit = logit + templates * random.normal(size=n_templates)[table["template"].astype(int)]
    return table.assign(outcome=np.where(random.random(len(table)) < 1 / (1 + np.exp(-logit)), "stereotyped", "reversed"))


def test_the_table_says_what_was_planted() -> None:
    rows = answered(np.random.default_rng(0), 30, 6)
    explicit, invalid = rows.assign(kind="explicit").head(20), rows.assign(outcome="invalid").head(20)
    found = mixed_logistic(pd.concat([rows, explicit, invalid])).set_index("term")
    assert found.index.tolist() == ["association[untreated]", "association[aware]", "change[aware]", "position", "spread[word_pair]",
                                    "spread[template]"]
    for term, truth in zip(found.index[:4], (2.0, 0.5, -1.5, 0.5), strict=True):
        assert found.loc[term, "low"] < found.loc[term, "estimate"] < found.loc[term, "high"]
        assert found.loc[term, "estimate"] == pytest.approx(truth, abs=3 * found.loc[term, "sd"]), term
    assert found["estimate"].iloc[4:].tolist() == pytest.approx([1.0, 0.7], abs=0.4)
    assert found[["low", "high", "sd"]].iloc[4:].isna().all(axis=None)
    assert (found["n"] == len(rows)).all()
    assert (found["groups"] == "word_pair: 30, template: 6").all()
    assert (found["method"] == "variational Bayes, Laplace errors").all()
    untreated, aware, change = found["estimate"].iloc[:3]
    assert aware - untreated == pytest.approx(change)


def test_without_dependence_it_is_the_logistic_model_of_statsmodels() -> None:
    import statsmodels.api as sm

    rows = answered(np.random.default_rng(1), 20, 6, words=0, templates=0)
    fixed = np.column_stack([np.ones(len(rows)), rows["treatment"] == "aware", rows["agrees"]]).astype(float)
    plain = sm.Logit((rows["outcome"] == "stereotyped").to_numpy(float), fixed).fit(disp=0)
    found = mixed_logistic(rows).set_index("term").loc[["association[untreated]", "change[aware]", "position"]]
    assert found["estimate"].tolist() == pytest.approx(list(plain.params), abs=0.15)
    assert found["sd"].tolist()[1:] == pytest.approx(list(plain.bse)[1:], rel=0.1)


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say_where_statsmodels_own_do_not() -> None:
    random, truth, n = np.random.default_rng(2), np.array([2.0, -1.5, 0.5]), 60
    ends = []
    for _ in range(n):
        found = mixed_logistic(answered(random, 20, 4)).set_index("term").loc[["association[untreated]", "change[aware]", "position"]]
        ends.append(found[["low", "high"]].to_numpy())
    covered = np.mean([(low <= truth) & (truth <= high) for low, high in (one.T for one in ends)], axis=0)
    assert (covered >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / n)).all(), covered    # variational Bayes' own: 0.4 of associations


def test_more_treatments_and_no_position() -> None:
    rows = answered(np.random.default_rng(3), 20, 4)
    again = rows[rows["treatment"] == "aware"].assign(treatment="lora")
    found = mixed_logistic(pd.concat([rows, again]), position=False, groups=["word_pair"]).set_index("term")
    assert found.index.tolist() == ["association[untreated]", "association[aware]", "association[lora]", "change[aware]", "change[lora]",
                                    "spread[word_pair]"]
    assert found.loc["change[aware]", "estimate"] == pytest.approx(found.loc["change[lora]", "estimate"], abs=1e-3)


def test_what_has_no_finite_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = answered(np.random.default_rng(4), 10, 3)
    with pytest.raises(StatisticsError, match="all 240 valid answers are stereotyped: log-odds are infinite"):
        mixed_logistic(rows.assign(outcome="stereotyped"))
    with pytest.raises(StatisticsError, match=r"separated: .*change\[aware\].* would be infinite"):
        mixed_logistic(rows.assign(outcome=rows["outcome"].where(rows["treatment"] != "aware", "reversed")))
    with pytest.raises(StatisticsError, match=r"separated: .*position"):
        mixed_logistic(rows.assign(outcome=np.where(rows["agrees"] > 0, "stereotyped", "reversed")))
    with pytest.raises(StatisticsError, match=r"association and position are one and the same .* position=False"):
        mixed_logistic(rows[rows["agrees"] > 0])
    with pytest.raises(StatisticsError, match="'template' has one level only"):
        mixed_logistic(rows[rows["template"] == "0"])
    with pytest.raises(StatisticsError, match="no valid implicit answer has treatment 'base'; there is untreated, aware"):
        mixed_logistic(rows, baseline="base")
    with pytest.raises(StatisticsError, match=r"no valid implicit answer .* there is none"):
        mixed_logistic(rows.assign(outcome="invalid"))
    with pytest.raises(StatisticsError, match="unknown method 'lme4'; known: statsmodels, bambi"):
        mixed_logistic(rows, method="lme4")
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "bambi":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StatisticsError, match=r"Bambi, which is not installed: pip install 'alignblind-mi\[bayes\]'"):
        mixed_logistic(rows, method="bambi")
