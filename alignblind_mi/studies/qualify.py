"""Qualification: can this model do the task, and which instruments read it? One model, one folder, two parts.

Knows parts and their files; does NOT know how anything is measured, nor how it is shown.
"""

from pathlib import Path

from alignblind_mi.borders.settings import Count, File, Names, Seed, takes
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.measures.competence import PAIRS, measure_competence
from alignblind_mi.measures.qualification import INSTRUMENTS, check_instruments, measure_instruments
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.results import Result, load_result
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.studies.config import StudyConfig, asked_concept
from alignblind_mi.studies.part import Part
from alignblind_mi.studies.qualified import Qualification, qualification_of
from alignblind_mi.studies.qualifying import COMPETENCE, QUALIFIED, all_instruments, asked_pairs, competence_work, has_instruments
from alignblind_mi.studies.running import run_parts
from alignblind_mi.studies.single import ROLE, instruments_part
from alignblind_mi.studies.thinning import thinned_to_fit


@takes(ModelError)
def qualify(model: HookedModel, concept: Concept, cue: str | Cue, *, instruments: Names = INSTRUMENTS, pairs: Count = PAIRS,
            decoding: Decoding | None = None, selfie: str = "paper", quick: bool = False,
            seed: Seed = 0) -> Qualification:
    """Whether a model can do the task, and which instruments read it: see `measure_competence` and `measure_instruments`.

    A concept without senses, or without contexts, has competence alone. Errors: as theirs.
    """
    rows = {COMPETENCE: measure_competence(model, concept, pairs=pairs, decoding=decoding, seed=seed)}
    if concept.has_senses(cue) and concept.contexts and instruments:
        rows[QUALIFIED] = measure_instruments(model, concept, cue, instruments=instruments, selfie=selfie, quick=quick, seed=seed)
    return qualification_of(rows, seed=seed)


def qualification_parts(config: StudyConfig, instruments: Names = ()) -> list[Part]:
    """The parts of one model's qualification; with `quick` fewer word pairs. Errors: ModelError for an unknown instrument."""
    concept, chosen = asked_concept(config), tuple(instruments) or all_instruments(config)
    check_instruments(chosen)
    parts = [Part(f"{COMPETENCE}_{ROLE}_{asked_pairs(config)}", ROLE, False, *competence_work(config, concept))]
    if has_instruments(config, concept):
        parts.append(instruments_part(config, concept, chosen))
    return parts


@takes(ModelError)
def run_qualification(config: StudyConfig, out: File, instruments: Names = ()) -> tuple[Qualification, list[Result]]:
    """Run or read the parts in the folder `out`: the qualification, and the results that it was made from. Errors: as `run_parts`."""
    config = thinned_to_fit(config, Path(out), lambda tried: qualification_parts(tried, instruments))
    out, parts = Path(out), qualification_parts(config, instruments)
    run_parts(config, out, parts)
    results = [load_result(out / f"{part.name}.parquet") for part in parts]
    rows = {part.name.partition("_")[0]: result.rows for part, result in zip(parts, results, strict=True)}
    return qualification_of(rows, seed=config.seed), results
