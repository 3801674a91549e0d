"""A study folder as read: configuration, concept, finished parts, and which are missing. Does NOT compute or show anything."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.borders.reading import is_file, is_folder, named, read_json
from alignblind_mi.errors import ResultError
from alignblind_mi.measures.mitigation import early_window, late_window, steering_names
from alignblind_mi.mitigations.lora import trainable
from alignblind_mi.mitigations.lora_settings import layers_text
from alignblind_mi.mitigations.steering import can_steer, layer_windows
from alignblind_mi.models.spec import EMBEDDED, ModelSpec
from alignblind_mi.results import STUDY, Result
from alignblind_mi.statistics.log_odds import alike, check_outcome, judged, leading
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.studies.amounts import FULL, QUICK, Amounts
from alignblind_mi.studies.config import organism_record
from alignblind_mi.studies.parts import NOISE, QUALIFICATION, instruments, questions, view_names
from alignblind_mi.studies.qualified import Qualification, qualification_of, read_qualification
from alignblind_mi.studies.qualifying import COMPETENCE, QUALIFIED
from alignblind_mi.studies.running import load_study

ROLES = ("base", "aligned")
PARTS = ("competence_", "qualified_", "behaviour_", "balanced_", "awareness_", "reading_", "view_", "steering_", "noise_",
         "lora_")    # how names of parts begin
BOTH_COLUMNS = frozenset({"model", "treatment", "role"})
ANSWER_COLUMNS = BOTH_COLUMNS | {"kind", "category", "template", "word_pair", "option_order", "word_order", "outcome", "log_odds"}
INSTRUMENT_COLUMNS = BOTH_COLUMNS | {"instrument", "identifier", "context", "control", "mark", "mention", "layer", "blind"}
READING_COLUMNS = BOTH_COLUMNS | {"interpretation", "context", "control", "mark", "mention", "layer", "d_group", "d_other", "base_group",
                                  "base_other", "blind"}

COMPETENCE_COLUMNS = BOTH_COLUMNS | {"kind", "outcome", "right", "word_pair", "template"}
QUALIFIED_COLUMNS = BOTH_COLUMNS | {"instrument", "setting", "split", "sense", "sentence", "layer", "score", "blind", "mass"}


@dataclass(frozen=True, eq=False)
class Study:
    """A study folder as read: configuration, concept, finished parts, and which parts are missing.

    lead: by which outcome answers of each kind are judged, "text" or "probability" (see `log_odds.leading`).
    """

    folder: Path
    config: dict[str, Any]
    concept: Concept
    parts: dict[str, Result]
    n_layers: int | None
    missing: Sequence[str] = ()
    lead: Mapping[str, str] = field(default_factory=dict)

    def has(self, *names: str) -> bool:
        """Whether all these parts are finished."""
        return all(name in self.parts for name in names)

    def either(self, *kinds: str) -> bool:
        """Whether a part of one of these kinds is finished for one of the two models."""
        return any(f"{kind}_{role}" in self.parts for kind in kinds for role in ROLES)

    def rows(self, names: Iterable[str]) -> pd.DataFrame:
        """The rows of those of the named parts that are finished, one below the other, answers judged by the outcome that leads."""
        return judged(self.as_measured(names), self.lead)

    def as_measured(self, names: Iterable[str]) -> pd.DataFrame:
        """`rows` with answers judged by their text."""
        found = [self.parts[name].rows for name in names if name in self.parts]
        return alike(pd.concat(found, ignore_index=True)) if found else pd.DataFrame()

    @property
    def unfinished(self) -> list[str]:
        """What is missing, in words: parts by name, and steering as a whole where the depth of the model is not known yet."""
        return [*self.missing, *(["all steering parts"] if self.n_layers is None and self.steered else [])]

    @cached_property
    def qualified(self) -> dict[str, Qualification]:
        """What can be said of each model that was qualified, by role; empty where the study was run without, or by a former version."""
        rows = {name: part.rows for name, part in self.parts.items() if name.startswith((f"{COMPETENCE}_", f"{QUALIFIED}_"))}
        found = {role: read_qualification(rows, role, seed=int(self.config["seed"])) for role in ROLES}
        return {role: one for role, one in found.items() if one is not None}

    def competence_of(self, part: str) -> Qualification | None:
        """What the model can do under the treatment of a part; None where it was not asked."""
        asked = self.parts.get(f"{part}_{COMPETENCE}")
        return None if asked is None else qualification_of({COMPETENCE: asked.rows})

    def unfit(self, kind: str) -> str:
        """Why the study says nothing about a kind of bias: which model cannot do the task; empty where both can, or were not asked."""
        why = {role: one.why_not(kind) for role, one in self.qualified.items()}
        return "; ".join(f"{self.config[role]['name']} ({role}): {said}" for role, said in why.items() if said)

    @property
    def steered(self) -> bool:
        """Whether the study's cue can be steered at all."""
        return can_steer(self.concept, self.config["cue"])

    @property
    def read(self) -> bool:
        """Whether the identifiers of the study's cue have senses that can be read."""
        return self.concept.has_senses(self.config["cue"])

    @property
    def trained(self) -> bool:
        """Whether the study trains LoRA."""
        return trainable(self.concept, self.config["cue"])

    @property
    def compared(self) -> dict[str, str]:
        """The two compared windows by their layers as rows write them: {"1-3": "early", "5-7": "late"}. A window of one layer is
        written 5, and was written 5-5 before."""
        if self.n_layers is None:
            return {}
        return {written: name for name, window in (("late", late_window(self.n_layers)), ("early", early_window(self.n_layers)))
                for written in (f"{window[0]}-{window[-1]}", layers_text(window))}

    @property
    def organism(self) -> bool:
        """Whether a model is an organism: one of the embedded pair, or a rebuilt one with its record beside it."""
        return any(self.config[role]["name"].startswith(EMBEDDED) for role in ROLES) or bool(self.record)

    @property
    def record(self) -> dict[str, Any]:
        """organism.json of the aligned model; empty for any other model, or where the checkpoint is not on this machine."""
        try:
            return organism_record(ModelSpec(**self.config["aligned"]))
        except FileNotFoundError:
            return {}


def read_study(folder: Path, outcome: str = "both") -> Study:
    """Read a study folder; `outcome`: by what answers are judged (see `log_odds.leading`).

    Errors: ResultError if it is none, is damaged, or has no finished part; StatisticsError for an unknown outcome.
    """
    check_outcome(outcome)
    config = _read_config(folder)
    concept = load_concept(config["concept"])
    parts = load_study(folder)
    single = sorted(name for name, part in parts.items() if _is_single(part))
    known = {name: part for name, part in parts.items() if name.startswith(PARTS) and name not in single}
    if single and not known:
        raise ResultError(f"{folder} holds what one verb measured on one model ({single[0]}), and no study: that verb prints it again "
                          f"(with the same options and --out {folder}), and has no page.")
    if not known:
        raise ResultError(f"{folder} is a study without a finished part: run `alignblind study --out {folder}` with the models of "
                          "its study.json first.")
    for name, part in known.items():
        _check_columns(folder / f"{name}.parquet", part)
    n_layers = _n_layers(part for name, part in known.items() if not name.startswith("view_"))    # a view is of one layer
    skip = () if any(name.startswith(f"{COMPETENCE}_") for name in known) else (QUALIFICATION,)
    missing = [name for name in expected_parts(config, concept, n_layers, skip=skip) if name not in known]
    study = Study(folder, config, concept, known, n_layers, missing)
    untreated = study.as_measured(f"behaviour_{role}" for role in ROLES)
    return replace(study, lead=leading(untreated, outcome)) if len(untreated) else study


def _is_single(part: Result) -> bool:
    """Whether a part is of a verb that measures one model, and of no study: its model has neither role."""
    return "role" in part.rows and len(part.rows) > 0 and not part.rows["role"].isin(ROLES).any()


def _read_config(folder: Path) -> dict[str, Any]:
    note = folder / "study.json"
    if not is_folder(folder):
        raise ResultError(f"{named('', folder)} is not a folder: give the --out folder of a study.")
    if not is_file(note):
        raise ResultError(f"{folder} holds no study (no study.json in it): give the --out folder of `alignblind study`.")
    config = read_json(note, "", ResultError, advice="restore it or run the study into another folder")
    wanted = ("base", "aligned", "concept", "cue", "quick", "seed", "decoding", "lora")
    lacking = [name for name in wanted if not isinstance(config, dict) or name not in config]
    if lacking:
        raise ResultError(f"{note} is not the configuration of a study: it lacks {', '.join(lacking)}.")
    return dict(config)


def _check_columns(file: Path, part: Result) -> None:
    if file.stem.startswith("view"):
        return    # `views` says what it cannot show
    parts = {"awareness": READING_COLUMNS, "reading": INSTRUMENT_COLUMNS, QUALIFIED: QUALIFIED_COLUMNS, COMPETENCE: COMPETENCE_COLUMNS}
    wanted = next((columns for name, columns in parts.items() if file.stem.startswith(name) or file.stem.endswith(f"_{name}")),
                  ANSWER_COLUMNS)
    lacking = sorted(wanted - set(part.rows.columns))
    if lacking:
        raise ResultError(f"{file} lacks the columns {', '.join(lacking)}: another version made it. Delete it and its .json to compute "
                          "it anew.")


def _n_layers(parts: Iterable[Result]) -> int | None:
    """The depth of the models, from the layers that were read."""
    found = [int(part.rows["layer"].max()) + 1 for part in parts if "layer" in part.rows and part.rows["role"].eq("aligned").all()]
    return max(found, default=None)


def expected_parts(config: dict[str, Any], concept: Concept, n_layers: int | None, *, skip: Sequence[str] = ()) -> list[str]:
    """Names of all parts of a study, in the order in which they are computed (see `study_parts`); without steering where the depth is not
    known yet."""
    names, cue = list[str](), config["cue"]
    taken = Amounts.read(config["amounts"], STUDY) if config.get("amounts") else QUICK if config["quick"] else FULL
    for role in ROLES:
        tried = [f"{QUALIFIED}_{role}"] if concept.has_senses(cue) and concept.contexts else []
        names += [] if skip else [f"{COMPETENCE}_{role}", *tried]
        names += [f"behaviour_{role}", f"balanced_{role}", *(f"awareness_{role}_{question}" for question in questions(concept, cue)),
                  *(f"reading_{name}_{role}" for name in instruments(concept, cue, config.get("selfie", "paper"), texts=taken.texts > 0)),
                  *(f"view_{name}_{role}" for name in view_names(concept, cue))]
    if can_steer(concept, cue) and n_layers:
        compared = [early_window(n_layers), late_window(n_layers)]
        for sense in steering_names(concept):
            for window in layer_windows(n_layers) if taken.every else compared:
                label = f"steering_{sense}_{window[0]:02d}-{window[-1]:02d}"
                names += [label, f"{label}_awareness"] if window in compared else [label]
        names += [f"{NOISE}_{window[0]:02d}-{window[-1]:02d}" for window in (layer_windows(n_layers) if taken.every else compared)]
    for group in taken.groups if trainable(concept, cue) else ():
        names += [f"lora_{group}", f"lora_{group}_awareness", *([] if skip else [f"lora_{group}_{COMPETENCE}"])]
    return list(dict.fromkeys(names))
