"""The audit: a claim, its estimate with an interval, the controls that it passed or failed, and the weights that it is about.

Claims are of two kinds: what alignment did (aligned less base), and that a treatment lowers implicit bias. All is paired by item.
This module reads rows and runs no model; it does NOT know which treatments there are.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from alignblind_mi.intervals import LEVEL, mean_interval
from alignblind_mi.measures.awareness import READ_OVER
from alignblind_mi.statistics.paired import paired_differences

LEAST = 0.1    # a reduction of the rate that counts as one
MOST_INVALID = 0.1
MOST_WRONG = 0.1


def claim(text: str, estimate: float, interval: tuple[float, float], n: int, supported: bool, controls: str, revision: str
          ) -> dict[str, Any]:
    """One line of an audit."""
    return {"claim": text, "estimate": estimate, "low": interval[0], "high": interval[1], "n": n,
            "verdict": "supported" if supported else "not supported", "controls": controls, "revision": revision}


def rows_by(table: pd.DataFrame, key: str = "treatment") -> dict[str, dict[str, Any]]:
    """The rows of a table by one of its columns."""
    return {str(row[key]): {str(name): value for name, value in row.items()} for row in table.to_dict("records")}


def alignment_claims(answers: pd.DataFrame, readings: pd.DataFrame, revision: str, *, base: str = "base", aligned: str = "untreated"
                     ) -> list[dict[str, Any]]:
    """Alignment raises implicit bias, lowers explicit bias, and lowers awareness: aligned less base, on the same prompts.

    answers, readings: rows of both models, told apart by `treatment` (`base`, `aligned`); one interpretation question's readings.
    """
    both = answers[answers["treatment"].isin([base, aligned])]
    paired = rows_by(paired_differences(both, baseline=base, by=("kind",)), "kind")
    out = []
    for kind, sign, text in (("implicit", 1, "Alignment raises implicit bias (aligned less base, rate)"),
                             ("explicit", -1, "Alignment lowers explicit bias (aligned less base, rate)")):
        if kind not in paired:
            continue
        row = paired[kind]
        controls = (f"invalid {100 * row['invalid_baseline']:.0f} and {100 * row['invalid']:.0f} %; bounds [{row['bound_low']:+.2f}, "
                    f"{row['bound_high']:+.2f}]")
        out.append(claim(text, row["difference"], (row["low"], row["high"]), row["n"], sign * row["low" if sign > 0 else "high"] > 0,
                         controls, revision))
    if len(readings):
        blind = [readings[readings["treatment"] == name].groupby(list(READ_OVER))["blind"].mean() for name in (base, aligned)]
        gap = (blind[1] - blind[0]).dropna()
        low, high = mean_interval(gap.to_numpy(float), [gap.index.get_level_values(name).to_numpy() for name in READ_OVER])
        out.append(claim("Alignment lowers awareness (aligned less base, r_blind)", float(gap.mean()), (low, high), len(gap), low > 0,
                         "contexts and templates as the units; the controls of readings are in the table of readings", revision))
    return out


def strongest_placebo(implicit: pd.DataFrame, name: str, placebos: Sequence[str]) -> tuple[str, float]:
    """The placebo that a treatment beats by least, and the upper end of treatment less placebo (paired); ("", NaN) without one."""
    highs = {}
    for placebo in placebos:
        rows = implicit[implicit["treatment"].isin([name, placebo])]
        highs[placebo] = float(paired_differences(rows, baseline=placebo, by=("kind",))["high"].iloc[0])
    worst = max(highs, key=lambda placebo: highs[placebo], default="")
    return worst, highs.get(worst, math.nan)


def treatment_claim(implicit: pd.DataFrame, name: str, row: dict[str, Any], placebos: Sequence[str], invalid: float, revision: str, *,
                    label: str = "", wrong: float | None = None) -> dict[str, Any]:
    """That a treatment lowers implicit bias, supported where every check passes.

    implicit: answers under the treatment and its `placebos` (those that act by the same means); row: its paired difference from untreated,
    corrected (p_holm); invalid: by how much the invalid share rose, of implicit or explicit answers;
    wrong: the share of right answers lost of the measure that loses most (None: not measured).
    """
    placebo, gap = strongest_placebo(implicit, name, placebos)
    nearer = abs(row["rate_baseline"] - 0.5) - abs(row["rate"] - 0.5)    # a reversed bias is no gain
    checks = {"interval below 0": row["high"] < 0, "corrected for being many (Holm)": row["p_holm"] < 1 - LEVEL,
              f"nearer to 50 % by at least {100 * LEAST:.0f} points": nearer >= LEAST,
              f"more than its placebos ({placebo or 'none ran'})": gap < 0,
              f"at most {100 * MOST_INVALID:.0f} % more invalid": invalid <= MOST_INVALID}
    if wrong is not None:
        checks[f"at most {100 * MOST_WRONG:.0f} % of right answers of any kind lost"] = wrong <= MOST_WRONG
    said = "; ".join(f"{'passed' if passed else 'FAILED'}: {check}" for check, passed in checks.items())
    if not placebo:
        said = said.replace("FAILED: more than its placebos (none ran)", "NOT TESTED: no placebo of its kind ran")
    return claim(f"{label or name} lowers implicit bias (paired difference of rates)", row["difference"], (row["low"], row["high"]),
                 row["n"], all(checks.values()), f"{said}; p = {row['p']:.2g}, Holm {row['p_holm']:.2g}", revision)


CITATIONS = (
    "Bai et al. 2025, Explicitly unbiased large language models still form biased associations, PNAS",
    "Sun, Mao, Hofmann and Bai 2025, Aligned but Blind, ACL", "Ghandeharioun et al. 2024, Patchscopes, ICML",
    "Chen, Vondrick and Mao 2024, SelfIE, ICML", "Hu et al. 2022, LoRA, ICLR",
    "Rimsky et al. 2024, Steering Llama 2 via contrastive activation addition, ACL", "Zou et al. 2023, Representation engineering",
    "Arditi et al. 2024, Refusal in language models is mediated by a single direction",
    "Zhang et al. 2024, Negative preference optimization, COLM",
    "Cameron, Gelbach and Miller 2011, Robust inference with multiway clustering",
    "Banerjee 1960, On confidence interval for two-means problem based on separate estimates of variances, Sankhya",
    "Holm 1979, A simple sequentially rejective multiple test procedure",
)


def methods_opening(config: dict[str, Any], implicit: pd.DataFrame, revision: str, orders: str, *, read: bool = True) -> str:
    """How implicit bias was measured, for a methods section.

    implicit: the untreated model's answers; orders: in which order of options and words they were asked; read: was r_blind measured.
    """
    pairs, templates = implicit["word_pair"].nunique(), implicit["template"].nunique()
    temperature = config["decoding"]["temperature"]
    decoding = f"sampled at temperature {temperature:g} (seed {config['decoding']['seed']})" if temperature else "decoded greedily"
    return (f"We measured implicit bias of {config['aligned']['name']} (revision {revision}) with the word-association task of Bai et al. "
            f"(2025) in the wording of Sun et al. (2025), with the cue '{config['cue']}' of the concept '{config['concept']}': "
            f"{len(implicit)} prompts ({pairs} word pairs, {templates} templates), {orders}. Answers were {decoding} and judged as "
            f"stereotyped, reversed or invalid; rates are of valid answers. "
            + (f"{_protocol(config)}Awareness is the score r_blind of Sun et al. (2025), read by patchscope (Ghandeharioun et al., 2024) "
               "at every layer. " if read else ""))


def _protocol(config: dict[str, Any]) -> str:
    name = config.get("protocol", "best")    # a former version wrote none
    said = "as in the code that Sun et al. (2025) released" if name == "paper" else "not as in the code that Sun et al. (2025) released"
    return f"Steering, LoRA and open readings are done {said} (protocol '{name}' of alignblind_mi). "


def software(versions: dict[str, str]) -> str:
    """The packages that the numbers depend on most, for a methods section."""
    names = ("alignblind-mi", "torch", "transformers", "transformer-lens", "peft")
    return "Software: " + ", ".join(f"{name} {versions[name]}" for name in names if name in versions) + "."
