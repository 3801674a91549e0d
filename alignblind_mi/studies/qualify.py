"""Qualification: can this model do the task, and which instruments read it? One model, one folder, two parts.

Knows parts and their files; does NOT know how anything is measured, nor how it is shown.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.borders.settings import Count, File, Names, Seed, takes
from alignblind_mi.borders.texts import named_line
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.measures.competence import PAIRS, competence_table, measure_competence, nothing_asked
from alignblind_mi.measures.qualification import INSTRUMENTS, check_instruments, instrument_table, measure_instruments
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.progress import Advance
from alignblind_mi.results import Result, json_value, load_result
from alignblind_mi.stimuli.concept import Concept, Cue, load_concept
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.parts import Part
from alignblind_mi.studies.running import run_parts
from alignblind_mi.studies.single import ROLE

COMPETENCE, INSTRUMENT = f"competence_{ROLE}", f"qualified_{ROLE}"    # the parts


@dataclass(frozen=True, eq=False)
class Qualification:
    """What a model can do (`competence`: see `competence_table`) and what reads it (`instruments`: see `instrument_table`).

    rows: what both were computed from, by part.
    """

    competence: pd.DataFrame
    instruments: pd.DataFrame
    rows: dict[str, pd.DataFrame]

    def __repr__(self) -> str:
        can = ", ".join(f"{one['kind']}: {one['verdict']}" for one in self.competence.to_dict("records"))
        return named_line(self, f"{can}; reads: {', '.join(self.reading()) or 'nothing'}")

    def can(self, kind: str) -> bool:
        """Whether the model can do the task of a kind of question."""
        return bool((self.competence.loc[self.competence["kind"] == kind, "verdict"] == "can").any())

    def reading(self) -> list[str]:
        """The instruments (and settings, of the patchscope) that read this model."""
        found = self.instruments[self.instruments["verdict"] == "reads"] if len(self.instruments) else self.instruments
        return [f"{one['instrument']} ({one['setting']})" for one in found.to_dict("records")]

    def records(self) -> dict[str, Any]:
        """Both tables as records, numbers that are not known as None: what `qualification.json` holds."""
        return {"competence": _records(self.competence), "instruments": _records(self.instruments)}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): json_value(value) for key, value in one.items()} for one in table.to_dict("records")]


@takes(ModelError)
def qualify(model: HookedModel, concept: Concept, cue: str | Cue, *, instruments: Names = INSTRUMENTS, pairs: Count = PAIRS,
            decoding: Decoding | None = None, selfie: str = "paper", seed: Seed = 0) -> Qualification:
    """Whether a model can do the task, and which instruments read it: see `measure_competence` and `measure_instruments`.

    A concept without senses, or without contexts, has competence alone. Errors: as theirs.
    """
    rows = {COMPETENCE: measure_competence(model, concept, pairs=pairs, decoding=decoding, seed=seed)}
    if concept.has_senses(cue) and concept.contexts and instruments:
        rows[INSTRUMENT] = measure_instruments(model, concept, cue, instruments=instruments, selfie=selfie, seed=seed)
    return qualification_of(rows, seed=seed)


def qualification_of(rows: dict[str, pd.DataFrame], *, seed: int = 0) -> Qualification:
    """The tables of rows that were measured already, by part."""
    instruments = instrument_table(rows[INSTRUMENT], seed=seed) if INSTRUMENT in rows else pd.DataFrame()
    answers = rows[COMPETENCE]
    return Qualification(competence_table(answers) if len(answers) else nothing_asked(answers), instruments, rows)


def qualification_parts(config: StudyConfig, instruments: Names = ()) -> list[Part]:
    """The parts of one model's qualification; with `quick` fewer word pairs. Errors: ModelError for an unknown instrument."""
    concept, chosen = load_concept(config.concept), tuple(instruments) or INSTRUMENTS
    check_instruments(chosen)
    pairs = QUICK_PAIRS if config.quick else PAIRS

    def ask(model: HookedModel, advance: Advance) -> pd.DataFrame:
        return measure_competence(model, concept, pairs=pairs, decoding=config.decoding, seed=config.seed, progress=advance)

    def read(model: HookedModel, advance: Advance) -> pd.DataFrame:
        return measure_instruments(model, concept, config.cue, instruments=chosen, target_layer=config.target_layer, selfie=config.selfie,
                                   seed=config.seed, progress=advance)

    parts = [Part(f"{COMPETENCE}_{pairs}", ROLE, False, ask)]
    if concept.has_senses(config.cue) and concept.contexts:
        parts.append(Part(f"{INSTRUMENT}_{'-'.join(chosen)}", ROLE, False, read))
    return parts


QUICK_PAIRS = 24    # as few as anything is told from


@takes(ModelError)
def run_qualification(config: StudyConfig, out: File, instruments: Names = ()) -> tuple[Qualification, list[Result]]:
    """Run or read the parts in the folder `out`: the qualification, and the results that it was made from. Errors: as `run_parts`."""
    out, parts = Path(out), qualification_parts(config, instruments)
    run_parts(config, out, parts)
    results = [load_result(out / f"{part.name}.parquet") for part in parts]
    rows = {INSTRUMENT if part.name.startswith(INSTRUMENT) else COMPETENCE: result.rows
            for part, result in zip(parts, results, strict=True)}
    return qualification_of(rows, seed=config.seed), results
