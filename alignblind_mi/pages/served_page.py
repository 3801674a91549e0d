"""The page of Inspect's logs: what served models answered, treatments and models on the same items, and whether they can do the task.

Reads the rows of `exchange.inspect_logs`. Writes report.html and tables/*.csv into a folder of its own. Does NOT run models.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from alignblind_mi.borders.reading import is_file, is_folder, named
from alignblind_mi.borders.settings import File, Files, many, takes
from alignblind_mi.errors import ResultError
from alignblind_mi.exchange.inspect_logs import ENDING, read_inspect_logs
from alignblind_mi.measures.competence import CANNOT, competence_table
from alignblind_mi.pages.page import count, page_text, points, rate, save_shown, share, shares, text, value, version_names
from alignblind_mi.pages.qualification_page import COLUMNS as QUALIFICATION
from alignblind_mi.results import STUDY, as_records, stamp
from alignblind_mi.statistics.log_odds import check_outcome, judged, leading, outcomes_table
from alignblind_mi.statistics.paired import BASELINE, ITEM, paired_differences
from alignblind_mi.statistics.rates import position_effect, summarise
from alignblind_mi.studies.drawn import write_drawn

PAGE = "report.html"
BY = ("model", "treatment", "concept", "cue", "design", "kind")
_WHO = (text("model", "model"), text("treatment", "treatment"), text("concept", "concept"), text("cue", "cue"), text("design", "design"),
        text("kind", "kind"))
COLUMNS = {
    "rates": (*_WHO, text("judged by", "judged_by"), count("n", "n"), share("invalid %", "invalid_share"),
              share("refused %", "refused_share"), share("failed format %", "format_failure_share"),
              rate("stereotyped %", "rate", "low", "high"), shares("templates %", "template_min", "template_max"),
              shares("bounds %", "worst", "best")),
    "outcomes": (*_WHO, count("n", "n"), rate("by text %", "rate", "low", "high"), share("not scored %", "invalid_by_probability"),
                 rate("by probability %", "rate_by_probability", "low_by_probability", "high_by_probability"), share("same %", "agree"),
                 share("bounded %", "bounded")),
    "position": (*_WHO[:-1], text("template", "template"), count("valid", "valid"), rate("association %", "rate", "low", "high"),
                 rate("position %", "position", "position_low", "position_high")),
    "differences": (text("compared", "between"), text("with", "baseline"), text("of", "of"), text("kind", "kind"), count("n", "n"),
                    share("before %", "rate_baseline"), share("after %", "rate"), value("difference", "difference", points),
                    shares("95 %", "low", "high"), value("p", "p", lambda p: "–" if pd.isna(p) else f"{p:.2g}")),
    "competence": (text("model", "model"), text("concept", "concept"), *QUALIFICATION["competence"]),
}


@takes(ResultError)
def write_served(logs: Files, out: File, outcome: str = "both") -> Path:
    """Write report.html and tables/ of Inspect's logs into the folder `out` (new, or one of such a page). Returns the page's path.

    outcome: by what answers are judged: see `write_report`. Several treatments of one model are compared with the untreated one, several
    untreated models with the first, on the same items and epochs.

    Errors: ScoreError as `read_inspect_logs`; ResultError for a folder of anything else.
    """
    check_outcome(outcome)
    paths: tuple[Path | str, ...] = many(logs)
    files = [file for path in map(Path, paths) for file in (sorted(path.rglob(f"*{ENDING}")) if is_folder(path) else [path])]
    if paths and not files:
        raise ResultError(f"{named('', Path(paths[0]))} holds no log (*{ENDING}): give a log that `inspect eval alignblind/...` wrote, "
                          "or the folder of such logs.")
    rows, folder = read_inspect_logs(files), Path(out)
    found = served_tables(rows, outcome)
    save_shown(folder, found, {})
    html = page_text("served.html.j2", tables={name: as_records(table) for name, table in found.items()}, columns=COLUMNS, pictures={},
                     models=list(rows["model"].unique()), logs=[file.name for file in files], failed=rows.attrs["failed"],
                     epochs=int(rows["epoch"].max()), unfit=_unfit(found), made=stamp()["made"], versions=version_names([stamp()]),
                     asked="competence" in found)
    write_drawn(folder, {PAGE: html.encode()})
    return folder / PAGE


def are_logs(path: Path) -> bool:
    """Whether a path is a log of Inspect by its name, or a folder that holds such logs and no results of this project."""
    if path.suffix.lower() == ENDING:
        return True
    return is_folder(path) and not is_file(path / STUDY) and any(path.rglob(f"*{ENDING}"))


def served_tables(rows: pd.DataFrame, outcome: str = "both") -> dict[str, pd.DataFrame]:
    """The tables of the page by name; one that there is nothing for is left out. Errors: StatisticsError for an unknown outcome."""
    right = rows["right"].notna() if "right" in rows else pd.Series(False, index=rows.index)
    if "competence" in rows:
        right |= rows["competence"].fillna("") != ""
    able, asked = rows[right], rows[~right]
    tables = {"competence": competence_table(able, ("model", "concept"))} if len(able) else {}
    if len(asked):
        lead = leading(asked.assign(role=asked["treatment"]), outcome)
        answers = judged(asked, lead)
        tables |= {"rates": _rates(answers, asked, lead), "outcomes": _outcomes(asked), "differences": _differences(answers)}
        implicit = answers[answers["kind"] == "implicit"]
        if len(implicit):
            tables["position"] = position_effect(implicit, [name for name in BY if name != "kind"])
    return {name: table for name, table in tables.items() if len(table)}


def _rates(answers: pd.DataFrame, said: pd.DataFrame, lead: dict[str, str]) -> pd.DataFrame:
    """Rates by the leading outcome, with the share of texts that refuse or fail the format."""
    failed = said.assign(failed=(said["outcome"] == "invalid") & ~said["refused"].astype(bool))
    shares = failed.groupby(list(BY), sort=False)[["refused", "failed"]].mean().astype(float).reset_index()
    table = summarise(answers, BY).merge(shares, on=list(BY))
    return table.rename(columns={"refused": "refused_share", "failed": "format_failure_share"}).assign(judged_by=table["kind"].map(lead))


def _outcomes(asked: pd.DataFrame) -> pd.DataFrame:
    """Both outcomes side by side where log-probabilities were told, with the share of log-odds that are bounds."""
    table = outcomes_table(asked, BY[:-1])
    bounded = asked.groupby(list(BY), sort=False)["log_odds_bounded"].mean().rename("bounded").reset_index()
    told = table.merge(bounded, on=list(BY))
    return told[told["invalid_by_probability"] < 1].reset_index(drop=True)


def _differences(answers: pd.DataFrame) -> pd.DataFrame:
    """Each treatment against none, of a model; each untreated model against the first. Items that only one side has are left out."""
    parts, item = [], (*ITEM, "design", "epoch")
    for (model, _), some in answers.groupby(["model", "kind"], sort=False):
        if BASELINE in set(some["treatment"]) and some["treatment"].nunique() > 1:
            parts.append(_named(paired_differences(some, by=("kind",), item=item), "treatment", str(model)))
    untreated = answers[answers["treatment"] == BASELINE]
    for _, some in untreated.groupby("kind", sort=False):
        models = list(some["model"].unique())
        if len(models) > 1:
            found = paired_differences(some, baseline=models[0], between="model", by=("kind",), item=item)
            parts.append(_named(found, "model", BASELINE))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _named(table: pd.DataFrame, between: str, of: str) -> pd.DataFrame:
    return table.rename(columns={between: "between"}).assign(of=of)


def _unfit(tables: dict[str, pd.DataFrame]) -> Sequence[str]:
    """Which model cannot do which task, in sentences."""
    table = tables.get("competence", pd.DataFrame(columns=["verdict"]))
    return [f"{row['model']} cannot do the {row['kind']} task ({row['reason']}): its {row['kind']} answers say nothing about bias."
            for row in table[table["verdict"] == CANNOT].to_dict("records")]
