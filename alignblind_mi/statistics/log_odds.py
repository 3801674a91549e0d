"""Log-odds of two scored answers: how probable either is at all, and rows of versions that scored otherwise. Knows nothing of models."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from alignblind_mi.statistics.rates import require

IMPROBABLE = 0.01    # of the two answers together: less than one of a hundred answers would begin with either
_SUMMED = ("log_p_stereotyped", "log_p_reversed")


def log_p_either(rows: pd.DataFrame) -> Float[np.ndarray, " row"]:
    """log P of either scored answer (nats); NaN where none was scored, and in rows of versions that kept no probabilities.

    Errors: StatisticsError for a probability that is no number.
    """
    if not set(_SUMMED) <= set(rows.columns):
        return np.full(len(rows), np.nan)
    require(rows, _SUMMED, numbers=_SUMMED)
    both = rows[list(_SUMMED)].to_numpy(float)
    return np.logaddexp(both[:, 0], both[:, 1], out=np.full(len(rows), np.nan), where=~np.isnan(both).any(1))


def improbable_share(rows: pd.DataFrame) -> dict[str, float | int]:
    """How many items have scored answers (`scored`: their n), and the share of them whose answers are `improbable`: together below 1 %.

    NaN where no row has the probabilities of its answers.
    """
    either = log_p_either(rows)
    known = either[~np.isnan(either)]
    return {"scored": len(known), "improbable": float((known < np.log(IMPROBABLE)).mean()) if len(known) else float("nan")}


def alike(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose log-odds can be set side by side: where some parts scored several wordings and parts of a former version one, those of
    the one wording that all have (`log_odds_first`); the others as they are."""
    if "log_odds_first" not in rows.columns:
        return rows
    former = rows["log_odds"].notna() & rows["log_odds_first"].isna()
    if not former.any():
        return rows
    return rows.assign(log_odds=rows["log_odds_first"].where(~former, rows["log_odds"]))
