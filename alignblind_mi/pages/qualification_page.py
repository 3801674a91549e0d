"""The page of a qualification: what a model can do, which instruments read it, and what that allows to be said.

Reads what `studies/qualify.py` gives. Writes qualification.json, qualification.html, tables/*.csv and figures/*.png, *.svg.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignblind_mi.borders.texts import encodable
from alignblind_mi.pages import figures
from alignblind_mi.pages.page import as_uri, count, mean, page_text, plain, rate, save_shown, share, text, value, version_names, words
from alignblind_mi.results import Result, as_records
from alignblind_mi.studies.drawn import write_drawn
from alignblind_mi.studies.qualified import Qualification
from alignblind_mi.studies.qualifying import QUALIFIED


def place(number: Any) -> str:
    """A place between the anchors, which may have no bound."""
    return "–" if number is None or math.isnan(number) else f"{number:.2f}".replace("inf", "∞").replace("-", "−")


COLUMNS = {
    "competence": (
        text("kind", "kind"), text("verdict", "verdict"), count("n", "n"), count("word pairs", "pairs"),
        share("invalid %", "invalid_share"), text("judged by", "outcome"), rate("right %", "share_right", "low", "high"),
        mean("log-odds", "log_odds", "log_odds_low", "log_odds_high"),
        rate("first with first %", "position", "position_low", "position_high")),
    "instruments": (
        words("instrument", "instrument"), text("setting", "setting"), text("verdict", "verdict"), count("n", "n"),
        mean("AUC", "auc", "low", "high", plain), value("AUC on train", "train_auc", plain), share("mass %", "mass"),
        share("shuffled %", "false_alarm"), value("group sense", "mean_group", lambda number: f"{number:+.2f}"),
        value("other sense", "mean_other", lambda number: f"{number:+.2f}"),
        mean("ambiguous prompts", "scale", "scale_low", "scale_high", place), count("n ambiguous", "n_ambiguous"),
        text("question", "text")),
}


def summary(found: Qualification) -> list[str]:
    """What the qualification allows to be said, in sentences."""
    said = []
    for one in found.competence.to_dict("records"):
        kind, reason = one["kind"], one["reason"]
        said.append({
            "can": f"The model can do the {kind} task: {reason}.",
            "cannot tell": f"Whether the model can do the {kind} task cannot be told: {reason}.",
            "cannot": f"The model cannot do the {kind} task ({reason}): its {kind} answers say nothing about bias.",
        }[one["verdict"]])
    if len(found.instruments):
        reading = found.reading()
        said.append(f"Instruments that read it: {', '.join(reading)}." if reading else
                    "No instrument reads it: no reading of its identifiers says anything about awareness.")
    return said


def write_qualification(folder: Path, found: Qualification, results: Sequence[Result]) -> Path:
    """Write records, tables, figures and the page of a qualification into its folder. Returns the page."""
    tables = {"competence": found.competence, "instruments": found.instruments}
    shown = {name: table for name, table in tables.items() if len(table)}
    drawn = {"instruments": figures.qualification_figure(found.rows[QUALIFIED])} if QUALIFIED in found.rows else {}
    vectors = save_shown(folder, shown | found.rows, drawn)
    notes = [result.provenance for result in results]
    records: dict[str, Any] = {"summary": summary(found), **found.records(), "provenance": notes}
    page = folder / "qualification.html"
    html = page_text(
        "qualification.html.j2", summary=summary(found), tables={name: as_records(table) for name, table in shown.items()}, columns=COLUMNS,
        pictures={name: as_uri(svg) for name, svg in vectors.items()}, name=notes[0]["model"], config=notes[0]["config"],
        verdicts={one["kind"]: one["verdict"] for one in as_records(found.competence)}, versions=version_names(notes),
        made=max(note["made"] for note in notes), revision=notes[0]["revision"])
    write_drawn(folder, {"qualification.json": (json.dumps(records, indent=1, allow_nan=False) + "\n").encode(),
                         page.name: encodable(html).encode()})
    return page
