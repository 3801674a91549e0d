"""What a comparison says: records, paired differences, side effects, doses, benefit for the same damage, and the audit of its claims.

Reads saved rows (see `comparison.py`) and runs no model. Every difference is paired by item; many treatments are corrected for being many
(Holm); a claim stands only with its controls.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alignblind_mi.borders.reading import is_file, named, read_object
from alignblind_mi.borders.settings import File, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.errors import ResultError
from alignblind_mi.intervals.clustered import StatisticsError, mean_interval
from alignblind_mi.measures.awareness import readings_of, summarise_readings
from alignblind_mi.measures.bbq import summarise_bbq
from alignblind_mi.measures.mitigation import comparison_table
from alignblind_mi.results import json_value, load_result
from alignblind_mi.statistics.log_odds import alike, check_outcome, improbable_share, judged, leading, outcomes_table
from alignblind_mi.statistics.mixed import mixed_logistic
from alignblind_mi.statistics.paired import corrected, item_slopes, paired_differences, paired_means, summarise_slopes
from alignblind_mi.statistics.placebos import placebo_bands
from alignblind_mi.statistics.rates import CLUSTERS, position_rates, summarise
from alignblind_mi.studies.audit import Check, alignment_claims, claim, methods_opening, rows_by, software, treatment_claim
from alignblind_mi.studies.benefits import (
    ACCURACIES,
    BASE,
    DAMAGES,
    FORGETTING,
    benefit_draws,
    doses_table,
    equal_damage_table,
    more_invalid,
    points_table,
)
from alignblind_mi.studies.comparison import DRAWS, MEASURED, QUALIFYING, part_name
from alignblind_mi.studies.qualified import Qualification, instruments_by_role, qualification_of
from alignblind_mi.studies.qualifying import COMPETENCE

LEAST_DAMAGE = 0.01    # below it a damage is a handful of answers, and no ground to compare families on
AWARE = ("steering", "lora")


@dataclass(frozen=True, eq=False)
class Compared:
    """The finished parts of a comparison folder: rows with the base model as the treatment `base`, notes by treatment, and the plan.

    `draws`: implicit answers under the further draws of noise. `qualified`: what can be said of the untreated models, by role;
    `competence`: of the treated model, by treatment (none of what acts at identifiers alone). Both are empty where nothing was qualified.
    `lead`: by which outcome all answers of a kind are judged (see `log_odds.leading`); `as_measured`: untreated answers by their text.
    """

    __repr__ = one_line

    folder: Path
    config: dict[str, Any]
    plan: dict[str, Any]
    answers: pd.DataFrame
    readings: pd.DataFrame
    effects: pd.DataFrame
    elsewhere: pd.DataFrame
    data: dict[str, pd.DataFrame]
    notes: dict[str, dict[str, Any]]
    missing: Sequence[str]
    draws: pd.DataFrame
    qualified: dict[str, Qualification]
    competence: dict[str, Qualification]
    lead: dict[str, str]
    as_measured: pd.DataFrame

    @property
    def blind(self) -> pd.DataFrame:
        """The patchscope's readings, without their controls."""
        return readings_of(self.read_beside_controls)

    @property
    def read_beside_controls(self) -> pd.DataFrame:
        """The patchscope's readings, and those of the controls of both untreated models."""
        return self.readings[self.readings["instrument"] == "patchscope"]

    @property
    def implicit(self) -> pd.DataFrame:
        """Implicit answers of the aligned model."""
        return self.answers[(self.answers["kind"] == "implicit") & (self.answers["treatment"] != BASE)]


RIVAL = {"treatment", "family", "curve", "dose", "placebos"}    # what plan.json says of each


@takes(ResultError)
def read_comparison(folder: File, outcome: str = "both") -> Compared:
    """Read a comparison, its answers judged by an `outcome` (see `log_odds.leading`). Errors: ResultError for a folder without finished
    parts of the untreated aligned model; StatisticsError for an unknown outcome."""
    check_outcome(outcome)
    folder = Path(folder)
    note, plan_file = folder / "study.json", folder / "plan.json"
    advice = "restore it, or compare into another folder"
    config = read_object(note, "", ResultError, advice=advice) if is_file(note) else {}
    if "comparison" not in config or not is_file(plan_file):
        raise ResultError(f"{named('', folder)} holds no comparison: give the --out folder of `alignblind compare`.")
    plan = read_object(plan_file, "", ResultError, needs=("rivals", "left_out"), advice=advice)
    if not isinstance(plan["rivals"], list) or not all(isinstance(rival, dict) and set(rival) >= RIVAL for rival in plan["rivals"]):
        raise ResultError(f"{plan_file} is damaged: its rivals are no list of objects with {', '.join(sorted(RIVAL))}; {advice}.")
    if not isinstance(config.get("data"), list) or not all(isinstance(name, str) for name in config["data"]):
        raise ResultError(f"{note} is damaged: its data are no list of names; {advice}.")
    wanted = [(BASE, "base", "untreated"), *((rival["treatment"], "aligned", rival["treatment"]) for rival in plan["rivals"])]
    measured = (*MEASURED, *config["data"])
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in measured}
    notes, missing, draws = dict[str, dict[str, Any]](), list[str](), list[pd.DataFrame]()
    several = {rival["treatment"] for rival in plan["rivals"] if rival.get("draws", 1) != 1}    # a former version drew noise once
    for treatment, role, rival in wanted:
        files = {name: folder / f"{part_name(role, rival, name)}.parquet" for name in measured}
        missing += [file.stem for file in files.values() if not file.is_file()]
        if not all(file.is_file() for file in files.values()):
            continue
        for name, file in files.items():
            result = load_result(file)
            parts[name].append(result.rows.assign(treatment=treatment))
            notes.setdefault(treatment, result.provenance)
        if treatment in several and role == "aligned":
            file = folder / f"{part_name(role, rival, DRAWS)}.parquet"
            draws += [load_result(file).rows] if file.is_file() else []
            missing += [] if file.is_file() else [file.stem]
    able, missing_too = _qualifications(folder, wanted, int(config["seed"]))
    missing += missing_too
    if "untreated" not in notes:
        raise ResultError(f"{folder} is a comparison without the untreated model: run `alignblind compare --out {folder}`.")
    frames = {name: alike(pd.concat(some, ignore_index=True)) for name, some in parts.items()}
    untreated = frames["answers"][frames["answers"]["treatment"].isin([BASE, "untreated"])]
    lead = leading(untreated, outcome)
    drawn = pd.concat(draws, ignore_index=True) if draws else pd.DataFrame({"treatment": pd.Series(dtype=str)})
    return Compared(folder, config, plan, judged(frames["answers"], lead), frames["readings"], frames["effects"],
                    judged(frames["elsewhere"], lead), {name: frames[name] for name in config["data"]}, notes, missing, judged(drawn, lead),
                    {role: able[name] for role, name in (("base", BASE), ("aligned", "untreated")) if name in able},
                    {name: one for name, one in able.items() if name not in (BASE, "untreated")}, lead, untreated)


def _qualifications(folder: Path, wanted: Sequence[tuple[str, str, str]], seed: int) -> tuple[dict[str, Qualification], list[str]]:
    """What the model can do under each treatment, and untreated what reads it as well, by treatment; and the parts that are missing. None
    of a comparison that was run without qualification, or by a former version."""
    files = {treatment: {name: folder / f"{part_name(role, rival, name)}.parquet" for name in QUALIFYING}
             for treatment, role, rival in wanted}
    if not any(file[COMPETENCE].is_file() for file in files.values()):
        return {}, []
    found = {treatment: {name: load_result(file).rows for name, file in some.items() if file.is_file()}
             for treatment, some in files.items()}
    able = {treatment: qualification_of(rows, seed=seed) for treatment, rows in found.items()
            if COMPETENCE in rows and (len(rows[COMPETENCE]) or treatment in (BASE, "untreated"))}
    return able, [files[treatment][COMPETENCE].stem for treatment, rows in found.items() if COMPETENCE not in rows]


def comparison_tables(found: Compared) -> dict[str, pd.DataFrame]:
    """All tables of a comparison, by name."""
    tables = {"comparison": main_table(found), "effects": effects_table(found), "differences": differences_table(found)}
    bands = placebo_bands(pd.concat([found.implicit, found.draws], ignore_index=True))
    if len(bands):
        tables["placebos"] = bands
    tables["outcomes"] = outcomes_table(found.as_measured, by=("role",)).assign(leads=lambda table: table["kind"].map(found.lead))
    tables["slopes"] = _in_order(summarise_slopes(item_slopes(found.implicit)), found)
    asked = found.answers[(found.answers["kind"] == "implicit") & (found.answers["option_order"] != "")]
    tables["position"] = _in_order(position_rates(asked, ("treatment",), cluster=CLUSTERS), found)
    tables["categories"] = _in_order(summarise(found.answers, by=("treatment", "kind", "category")), found)
    tables["readings"] = _in_order(summarise_readings(readings_of(found.readings), ("treatment", "instrument")), found)
    if len(found.elsewhere):
        tables["elsewhere"] = _in_order(summarise(found.elsewhere, by=("treatment", "concept", "cue", "kind")), found)
    mixed, why = _mixed(found)
    if mixed is not None:
        tables["mixed"] = mixed
    if "bbq" in found.data:
        tables["bbq"] = _in_order(summarise_bbq(found.data["bbq"], by=("treatment",)), found)
    tables["left_out"] = pd.DataFrame([{"treatment": name, "reason": reason} for name, reason in found.plan["left_out"].items()]
                                      + ([{"treatment": "mixed model", "reason": why}] if why else []), columns=["treatment", "reason"])
    draws = benefit_draws(found.implicit, _implicit_differences(tables))
    tables["points"] = points_table(tables["comparison"], tables["differences"], draws)
    tables["equal_damage"] = equal_damage_table(tables["points"], draws)
    tables["doses"] = doses_table(tables["comparison"])
    able = [one.competence.assign(treatment=name) for name, one in {
        **{BASE if role == "base" else "untreated": one for role, one in found.qualified.items()}, **found.competence}.items()]
    if able:
        tables["competence"] = _in_order(pd.concat(able, ignore_index=True), found)
    tried = instruments_by_role(found.qualified)
    if len(tried):
        tables["qualified"] = tried
    tables["audit"] = audit_table(found, tables)
    return tables


def _implicit_differences(tables: dict[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    return rows_by(tables["differences"][tables["differences"]["kind"] == "implicit"])


def _in_order(table: pd.DataFrame, found: Compared) -> pd.DataFrame:
    order = {name: i for i, name in enumerate(found.notes)}
    return table.sort_values("treatment", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)


def main_table(found: Compared) -> pd.DataFrame:
    """One row a treatment: `mitigation.comparison_table`, beside family, curve, dose, side effects and cost."""
    table = comparison_table(found.answers, found.blind)
    about = {BASE: {"family": "untreated"}, **{rival["treatment"]: rival for rival in found.plan["rivals"]}}
    table["family"] = [about[name]["family"] for name in table["treatment"]]
    table["curve"] = [about[name].get("curve") or "" for name in table["treatment"]]
    table["dose"] = [about[name].get("dose") if about[name].get("dose") is not None else math.nan for name in table["treatment"]]
    means = found.effects.groupby(["treatment", "measure"])["value"].mean().unstack()
    for measure, name in {**{measure: measure for measure in ("kl_neutral", "kl_mentions")}, **ACCURACIES}.items():
        table[name] = table["treatment"].map(means[measure])
    table.loc[table["treatment"] == BASE, ["kl_neutral", "kl_mentions"]] = np.nan    # they are from a model's own untreated self
    for name in ("displacement", "kl_prompts"):
        table[name] = [_number(found.notes[treatment].get("effect", {}).get(name)) for treatment in table["treatment"]]
    table["perplexity"] = np.exp(table["treatment"].map(_weighted(found.effects[found.effects["measure"] == "surprise"])))
    for name in ("parameters", "seconds", "latency"):
        table[name] = [found.notes[treatment]["cost"][name] for treatment in table["treatment"]]
    return _in_order(table, found)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _weighted(rows: pd.DataFrame) -> pd.Series:
    """Mean of `value` by treatment, weighted by tokens."""
    sums = rows.assign(sum=rows["value"] * rows["weight"]).groupby("treatment")[["sum", "weight"]].sum()
    return sums["sum"] / sums["weight"]


def effects_table(found: Compared) -> pd.DataFrame:
    """One row per treatment and measure: n, mean, low, high (Student's, items as the unit), and the paired difference from untreated."""
    effects = found.effects[found.effects["treatment"] != BASE]
    records = []
    for (treatment, measure), rows in effects.groupby(["treatment", "measure"], sort=False):
        low, high = mean_interval(rows["value"].to_numpy(float), [rows["item"].to_numpy()])
        records.append({"treatment": treatment, "measure": measure, "n": len(rows), "mean": float(rows["value"].mean()), "low": low,
                        "high": high})
    table = pd.DataFrame.from_records(records)
    if effects["treatment"].nunique() > 1:
        paired = paired_means(effects)[["measure", "treatment", "difference", "low", "high", "p"]]
        paired = paired.rename(columns={"low": "difference_low", "high": "difference_high"})
        table = table.merge(paired, on=["treatment", "measure"], how="left")
    return _in_order(table, found)


def differences_table(found: Compared) -> pd.DataFrame:
    """Paired differences of every treatment from the untreated aligned model, by kind, with Holm's and Benjamini-Hochberg's corrections,
    and how many of its items have scored answers, and improbable ones."""
    answers = found.answers[found.answers["treatment"] != BASE]
    if answers["treatment"].nunique() < 2:
        return pd.DataFrame(columns=["kind", "treatment", "difference", "low", "high", "p", "p_holm"])
    shares = pd.DataFrame([{"kind": kind, "treatment": name, **improbable_share(rows)}
                           for (kind, name), rows in answers.groupby(["kind", "treatment"], sort=False)])
    table = corrected(paired_differences(answers, by=("kind",)), family=("kind",)).merge(shares, on=["kind", "treatment"], how="left")
    return _in_order(table, found)


def _mixed(found: Compared) -> tuple[pd.DataFrame | None, str]:
    """The mixed logistic model over all treatments of the aligned model, or why there is none."""
    try:
        return mixed_logistic(found.implicit), ""
    except StatisticsError as error:
        return None, str(error)


# ---- records and audit -------------------------------------------------------------------------------------------------


def comparison_records(found: Compared, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One JSON record a treatment: rates with intervals and invalid shares, readings, side effects, cost, and where they come from."""
    implicit, slopes = _implicit_differences(tables), rows_by(tables["slopes"])
    records = []
    for row in tables["comparison"].to_dict("records"):
        name, note = row["treatment"], found.notes[row["treatment"]]
        record = {key: row[key] for key in row if key not in ("curve", "dose")}
        record |= {"curve": row["curve"] or None, "dose": row["dose"]}
        if name in implicit:
            record |= {key: implicit[name][source] for key, source in (
                ("difference", "difference"), ("difference_low", "low"), ("difference_high", "high"), ("difference_p", "p"),
                ("difference_p_holm", "p_holm"), ("difference_n", "n"), ("difference_from", "rate_baseline"),
                ("difference_to", "rate"))}
        if name in slopes:
            record["wrong_way"] = slopes[name]["wrong"]
        record |= {"revision": note["revision"], "seed": found.config["seed"], "dtype": note["dtype"], "versions": note["versions"],
                   "details": note["details"], "prefix": note["prefix"]}
        records.append({str(key): json_value(value) for key, value in record.items()})
    return records


def audit_table(found: Compared, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Claim -> estimate -> interval -> controls -> revision: the paper's claims, and one of each treatment that is no placebo.

    When a treatment's claim ("lowers implicit bias") is supported, `audit.treatment_claim` says.
    """
    rows, implicit = rows_by(tables["comparison"]), _implicit_differences(tables)
    revision = found.notes["untreated"]["revision"]
    records = alignment_claims(found.answers, found.read_beside_controls, revision, qualified=found.qualified) if BASE in rows else []
    asked = pd.concat([found.implicit, found.draws], ignore_index=True)
    wrong = rows_by(tables["points"][tables["points"]["damage_measure"] == "wrong"])
    for name, row in rows.items():
        if row["family"] not in ("untreated", "placebo"):
            more = more_invalid(row, rows["untreated"])
            records.append(treatment_claim(asked, name, implicit[name], _placebos(found, name), more, revision,
                                           wrong=wrong[name]["damage"], qualified=found.qualified,
                                           competence=found.competence.get(name)))
    records += _family_claims(found, tables)
    return pd.DataFrame.from_records(records)


def _placebos(found: Compared, name: str) -> list[str]:
    """The placebos that the plan matches with a treatment, as far as they ran: of noise, every draw."""
    matched = {rival["treatment"]: rival["placebos"] for rival in found.plan["rivals"]}
    drawn = found.draws["treatment"].drop_duplicates().tolist()
    return [one for placebo in matched.get(name, []) if placebo in found.notes
            for one in (placebo, *(draw for draw in drawn if draw.startswith(f"{placebo}_seed")))]


def _family_claims(found: Compared, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """More awareness against forgetting, at the largest damage that both curves were measured at."""
    table, out = tables["equal_damage"], list[dict[str, Any]]()
    if "difference" not in table:
        return out
    paired, curve_of = _implicit_differences(tables), {rival["treatment"]: rival.get("curve") for rival in found.plan["rivals"]}
    for curve in AWARE:
        for measure in DAMAGES:
            known = table[(table["family"] == curve) & (table["damage_measure"] == measure) & table["difference"].notna()]
            if known.empty:
                continue
            row = max(known.to_dict("records"), key=lambda one: one["damage"])
            if row["damage"] < LEAST_DAMAGE:
                continue
            compared = [item for name, item in paired.items() if curve_of.get(name) in (curve, FORGETTING)]
            fewest = min(compared, key=lambda item: item["n"])
            checks = [Check("interval above 0", bool(row["difference_low"] > 0))]
            out.append(claim(f"{curve} towards awareness beats unlearning at equal {measure} ({row['damage']:.2g})", row["difference"],
                             (row["difference_low"], row["difference_high"]), fewest["n"], fewest["n_items"], checks,
                             found.notes["untreated"]["revision"], note="benefits interpolated along dose curves, never beyond them"))
    return out


def methods_paragraph(found: Compared) -> str:
    """A paragraph that a paper can start from, with what was done and the numbers that it was done with."""
    note = found.notes["untreated"]
    untreated = found.implicit[found.implicit["treatment"] == "untreated"]
    families = ", ".join(dict.fromkeys(rival["family"] for rival in found.plan["rivals"] if rival["family"] != "untreated"))
    opening = methods_opening(found.config, untreated, note["revision"],
                              "each asked in both orders of options and words, so that association and position separate")
    n = sum(name not in (BASE, "untreated") for name in found.notes)
    return (
        f"{opening}{n} treatments ({families}) were compared with the untreated model on the same prompts. Differences "
        "are paired by item, with intervals clustered over word pairs and templates (Cameron, Gelbach and Miller, 2011; Banerjee, 1960), "
        "and p-values corrected after Holm (1979). Side effects are the divergence of next-token distributions on "
        "neutral text, lists copied, words judged and questions about words whose sense their sentence settles; families of treatments are "
        "compared at doses that do the same damage. Placebos (other sense, control phrases, several draws of noise that displaces the "
        f"residual stream as much) went through the same steps. {software(note['versions'])}")


def unfinished(found: Compared) -> str:
    """A sentence about what is missing; empty for a finished comparison."""
    if not found.missing:
        return ""
    return f"{len(found.missing)} parts are not finished ({', '.join(found.missing[:6])}{' ...' if len(found.missing) > 6 else ''})."
