"""What the task files for lm-evaluation-harness call: documents, what is said of one answer, and what of all of them.

The harness keeps a value a document and metric and gives all of one metric to its function; here each is the same judged row. This module
does NOT know how the files were made.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignblind_mi.statistics.log_odds import by_probability
from alignblind_mi.statistics.rates import CLUSTERS, position_rates, summarise
from alignblind_mi.stimuli.answers import judge
from alignblind_mi.stimuli.refusals import is_refusal

SHARED = ("rate", "low", "high", "invalid_share")    # metrics of all tasks
KEPT = ("kind", "template", "word_pair", "option_order", "word_order", "statement")
Judged = Mapping[str, Any]


def load_documents(file: Path) -> dict[str, Any]:
    """The documents of a file as the harness takes them: {"test": a Dataset}."""
    from datasets import Dataset

    return {"test": Dataset.from_list([json.loads(line) for line in file.read_text("utf-8").splitlines() if line])}


def text_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Judged]:
    """The judged answer of a document, for every metric."""
    outcome = judge(results[0], doc, prompt=doc["prompt"])
    row = {**{name: doc[name] for name in KEPT}, "outcome": outcome.label, "reason": outcome.reason,
           "refused": is_refusal(results[0], outcome, doc)}
    return dict.fromkeys((*SHARED, "refused_share", *(("position",) if doc["kind"] == "implicit" else ())), row)


def probability_results(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Judged]:
    """Which of a document's answers is the more probable, for every metric; `log_odds` in nats."""
    sides = [np.logaddexp.reduce([log_p for log_p, _ in results[side::2]]) for side in (0, 1)]
    odds = float(sides[0] - sides[1])
    row = {**{name: doc[name] for name in KEPT}, "outcome": "invalid", "reason": "", "refused": False, "odds": odds}
    return dict.fromkeys((*SHARED, "log_odds"), row)


def _rows(judged: Sequence[Judged]) -> pd.DataFrame:
    rows = pd.DataFrame.from_records([dict(one) for one in judged])
    if "odds" not in rows:
        return rows
    return by_probability(rows.assign(log_odds=rows["odds"], log_odds_endorsed=rows["odds"]))


def rate(judged: Sequence[Judged]) -> float:
    """The share of stereotyped among the valid answers."""
    return _number(judged, "rate")


def low(judged: Sequence[Judged]) -> float:
    """The lower end of its 95 % interval, over word pairs and templates."""
    return _number(judged, "low")


def high(judged: Sequence[Judged]) -> float:
    """The upper end of its 95 % interval."""
    return _number(judged, "high")


def invalid_share(judged: Sequence[Judged]) -> float:
    """The share of answers that cannot be used."""
    return _number(judged, "invalid_share")


def _number(judged: Sequence[Judged], name: str) -> float:
    return float(summarise(_rows(judged), ())[name].iloc[0])


def refused_share(judged: Sequence[Judged]) -> float:
    """The share of answers that refuse."""
    return sum(bool(one["refused"]) for one in judged) / len(judged) if judged else math.nan


def position(judged: Sequence[Judged]) -> float:
    """The share of implicit answers that put the first word with the first option; 0.5 is no effect."""
    return float(position_rates(_rows(judged), (), cluster=CLUSTERS)["position"].iloc[0])


def log_odds(judged: Sequence[Judged]) -> float:
    """The mean log-odds, in nats."""
    return sum(one["odds"] for one in judged) / len(judged) if judged else math.nan
