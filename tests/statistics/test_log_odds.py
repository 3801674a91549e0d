"""Log-odds: which items are improbable, and rows of versions that scored one wording."""

import numpy as np
import pandas as pd
import pytest

from alignblind_mi.statistics.log_odds import IMPROBABLE, alike, improbable_share, log_p_either
from alignblind_mi.statistics.rates import StatisticsError

ROWS = pd.DataFrame({"log_p_stereotyped": np.log([0.5, 0.004, 0.006, np.nan]), "log_p_reversed": np.log([0.25, 0.005, 0.006, np.nan])})


def test_an_item_is_improbable_where_both_answers_together_are():
    assert np.exp(log_p_either(ROWS))[:3] == pytest.approx([0.75, 0.009, 0.012])
    assert improbable_share(ROWS) == {"scored": 3, "improbable": pytest.approx(1 / 3)}
    assert IMPROBABLE == 0.01


def test_rows_without_probabilities_have_no_share():
    former = improbable_share(pd.DataFrame({"log_odds": [1.0, 2.0]}))
    assert former["scored"] == 0
    assert np.isnan(former["improbable"])
    with pytest.raises(StatisticsError, match="log_p_reversed"):
        improbable_share(ROWS.assign(log_p_reversed="much"))


def test_rows_of_one_and_of_several_wordings_are_set_side_by_side_by_the_one():
    new = pd.DataFrame({"kind": ["implicit", "explicit"], "log_odds": [3.0, np.nan], "log_odds_first": [1.0, np.nan]})
    former = pd.DataFrame({"kind": ["implicit"], "log_odds": [2.0]})
    assert alike(new).equals(new)
    assert alike(former).equals(former)
    assert alike(pd.concat([new, former], ignore_index=True))["log_odds"].tolist() == pytest.approx([1.0, np.nan, 2.0], nan_ok=True)
