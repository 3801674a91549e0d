"""What a qualification allows to be said: its tables, and what they mean for a claim about bias or awareness. Runs NO model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from alignblind_mi.borders.texts import named_line
from alignblind_mi.measures.anchored import scale_table
from alignblind_mi.measures.competence import CAN, competence_table, nothing_asked
from alignblind_mi.measures.qualification import READS, instrument_table
from alignblind_mi.results import as_records, records_of
from alignblind_mi.studies.qualifying import COMPETENCE, QUALIFIED

TUNED = ("patchscope", "tuned")


@dataclass(frozen=True, eq=False)
class Qualification:
    """What a model can do (`competence`: see `competence_table`) and what reads it (`instruments`: see `instrument_table`).

    Beside each instrument stands where it places the ambiguous prompts between the two senses: n_ambiguous, reading, scale, scale_low,
    scale_high (see `scale_table`). rows: what both were computed from, "competence" and "qualified".
    """

    competence: pd.DataFrame
    instruments: pd.DataFrame
    rows: dict[str, pd.DataFrame]

    def __repr__(self) -> str:
        can = ", ".join(f"{one['kind']}: {one['verdict']}" for one in self.competence.to_dict("records"))
        return named_line(self, f"{can}; reads: {', '.join(self.reading()) or 'nothing'}")

    def can(self, kind: str) -> bool:
        """Whether the model can do the task of a kind of question."""
        return bool((self.competence.loc[self.competence["kind"] == kind, "verdict"] == CAN).any())

    def reading(self) -> list[str]:
        """The instruments that read this model, with their setting."""
        found = self.instruments[self.instruments["verdict"] == READS] if len(self.instruments) else self.instruments
        return [f"{one['instrument']} ({one['setting']})" for one in found.to_dict("records")]

    def why_not(self, kind: str) -> str:
        """Why nothing is said about a kind of bias; empty where the model can do the task."""
        if self.can(kind):
            return ""
        (one,) = self.competence[self.competence["kind"] == kind].to_dict("records")
        return f"{one['verdict']} do the {kind} task: {one['reason']}" if one["verdict"] != "cannot tell" else (
            f"whether it can do the {kind} task cannot be told: {one['reason']}")

    def unread(self, instrument: str, setting: str = "paper") -> str:
        """Why an instrument's readings say nothing here; empty where it reads, or where it was not tried."""
        one = self._tried(instrument, setting)
        return "" if one is None or one["verdict"] == READS else f"{one['verdict']}: {one['reason']}"

    def placed(self, instrument: str, setting: str) -> dict[str, Any] | None:
        """Where an instrument places the ambiguous prompts (scale, low, high, n); None where it did not."""
        one = self._tried(instrument, setting)
        if one is None or not one.get("n_ambiguous"):
            return None
        return {"scale": one["scale"], "low": one["scale_low"], "high": one["scale_high"], "n": one["n_ambiguous"]}

    def _tried(self, instrument: str, setting: str) -> dict[str, Any] | None:
        """What is said of an instrument in a setting; None where it was not tried."""
        return next((one for one in as_records(self.instruments) if (one["instrument"], one["setting"]) == (instrument, setting)), None)

    def records(self) -> dict[str, Any]:
        """Both tables as records, numbers that are not known as None: what `qualification.json` holds."""
        return {"competence": records_of(self.competence), "instruments": records_of(self.instruments)}


def qualification_of(rows: Mapping[str, pd.DataFrame], *, seed: int = 0) -> Qualification:
    """The tables of rows that were measured already: of "competence", and of "qualified" where instruments were tried."""
    answers = rows[COMPETENCE]
    instruments = instruments_of(rows[QUALIFIED], seed=seed) if QUALIFIED in rows else pd.DataFrame()
    return Qualification(competence_table(answers) if len(answers) else nothing_asked(answers), instruments, dict(rows))


def instruments_of(rows: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The verdicts on one model's instruments (see `instrument_table`), with where each places the ambiguous prompts."""
    table, places = instrument_table(rows, seed=seed), scale_table(rows)
    if places.empty:
        return table
    shown = places.rename(columns={"n": "n_ambiguous", "low": "scale_low", "high": "scale_high"})
    kept = ["instrument", "setting", "n_ambiguous", "reading", "scale", "scale_low", "scale_high"]
    return table.merge(shown[kept], on=["instrument", "setting"], how="left")


def instruments_by_role(qualified: Mapping[str, Qualification]) -> pd.DataFrame:
    """The instruments of several models one below the other, with their `role`; no row and no column where none was tried."""
    tried = [one.instruments.assign(role=role) for role, one in qualified.items() if len(one.instruments)]
    return pd.concat(tried, ignore_index=True) if tried else pd.DataFrame()


def read_qualification(parts: Mapping[str, pd.DataFrame], role: str, *, seed: int = 0) -> Qualification | None:
    """The qualification of one model of a study, from the rows of its parts by name; None where it was not qualified."""
    rows = {name: parts[f"{name}_{role}"] for name in (COMPETENCE, QUALIFIED) if f"{name}_{role}" in parts}
    return qualification_of(rows, seed=seed) if COMPETENCE in rows else None
