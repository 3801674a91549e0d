"""Mitigation: what does each treatment change, measured in the same way for all of them?

Studies cannot tell steering from LoRA: they are given a model and a list of treatments.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from alignblind_mi.borders.settings import Count, Seed, many, takes
from alignblind_mi.borders.texts import html_summary, named_line
from alignblind_mi.measures.awareness import blind_interval, blind_score, measure_awareness, n_readings, readings_of
from alignblind_mi.measures.behaviour import Decoding, measure_behaviour
from alignblind_mi.mitigations.steering import ROLES, layer_windows, sense_steering
from alignblind_mi.models.edits import Site, Treatment, Treatments, check_treatments
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.progress import counted
from alignblind_mi.statistics.log_odds import improbable_share
from alignblind_mi.statistics.rates import column_interval, summarise
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.protocol import ProtocolName

EARLY_START = 5 / 32    # the paper's effective window of Llama 3 8B begins at layer 5 of 32


def early_window(n_layers: int) -> range:
    """The window that the paper found effective (layers 5-14 of 32), at this model's depth."""
    windows = layer_windows(n_layers)
    return windows[min(int(EARLY_START * n_layers + 0.5), len(windows) - 1)]


def late_window(n_layers: int) -> range:
    """The last window of layers."""
    return layer_windows(n_layers)[-1]


def identifier_sites(n_layers: int) -> list[Site]:
    """Where what has no edits (an adapter, a prefix) is looked at: at the identifiers, after the early window."""
    return [Site(early_window(n_layers)[-1], role) for role in ROLES]


def steering_names(concept: Concept) -> list[str]:
    """What is steered towards: the group sense first, then the placebos (the other sense and the controls)."""
    return [*(sense.name for sense in concept.both_senses()), *concept.controls]


def steering_sweep(model: HookedModel, concept: Concept, cue: str | Cue, *, protocol: ProtocolName = "best") -> Iterator[Treatment]:
    """Steering towards every sense and control in every window of layers (see `sense_steering`)."""
    for name in steering_names(concept):
        for window in layer_windows(model.n_layers):
            yield sense_steering(model, concept, cue, name, window, protocol=protocol)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Answers and readings of several treatments, one row each; `table()` sets them side by side."""

    behaviour: pd.DataFrame
    awareness: pd.DataFrame

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.behaviour["treatment"].unique())) if "treatment" in self.behaviour else "none"
        return named_line(self, f"{len(self.behaviour)} answers, {len(self.awareness)} readings, treatments {names}")

    def _repr_html_(self) -> str:
        """What a notebook shows: `table()`, the columns that matter."""
        kept = ("treatment", "n", "implicit", "low", "high", "invalid_share", "explicit", "explicit_low", "explicit_high",
                "log_odds", "log_odds_low", "log_odds_high", "r_blind", "r_blind_low", "r_blind_high")
        table = self.table()
        shown = table[[name for name in kept if name in table]].to_dict("records")
        models = ", ".join(map(str, self.behaviour["model"].unique()))
        return html_summary("Comparison of treatments", {"model": models, "n": len(self.behaviour)},
                            [{str(name): value for name, value in row.items()} for row in shown])

    def table(self) -> pd.DataFrame:
        """One row per treatment: see `comparison_table`."""
        return comparison_table(self.behaviour, self.awareness)


@takes(ModelError)
def compare_treatments(model: HookedModel, concept: Concept, cue: str | Cue, treatments: Treatments, *,
                       decoding: Decoding | None = None, reading: str = "paper", max_word_pairs: Count | None = None,
                       seed: Seed = 0) -> Comparison:
    """Measure implicit and explicit bias and awareness under each treatment, on the same prompts (published design).

    A concept or cue without senses has no readings: the table is of behaviour alone.

    Errors: EditError for no treatment, and for two of one name.
    """
    treatments = many(treatments)
    check_treatments(treatments)
    behaviour, awareness = [], []
    with counted("treatments", len(treatments), "treatments") as advance:
        for treatment in treatments:
            treated = model.under(treatment)
            behaviour.append(measure_behaviour(treated, concept, cue, design="published", decoding=decoding, seed=seed,
                                               max_word_pairs=max_word_pairs))
            if concept.has_senses(cue):
                awareness.append(measure_awareness(treated, concept, cue, reading=reading, controls=(), seed=seed))
            advance(1)
    readings = pd.concat(awareness, ignore_index=True) if awareness else pd.DataFrame(columns=["model", "treatment"])
    return Comparison(pd.concat(behaviour, ignore_index=True), readings)


@takes(ModelError)
def comparison_table(behaviour: pd.DataFrame, awareness: pd.DataFrame) -> pd.DataFrame:
    """One row per model and treatment, in the order of the rows: implicit and explicit rates, log-odds and r_blind, each with interval.

    Columns: n, implicit, low, high, interval, template_min, template_max, invalid_share, worst, best (see `summarise`), log_odds (mean,
    nats) with its interval, scored and improbable (see `improbable_share`), explicit with its interval and invalid share, r_blind with its
    interval and n_readings. The implicit answers that a treatment is compared on, valid under it and untreated alike, are in
    `paired_differences`.
    """
    by = ("model", "treatment")
    found = summarise(behaviour, by=(*by, "kind")).set_index([*by, "kind"])
    records = []
    for key in behaviour[list(by)].drop_duplicates().itertuples(index=False, name=None):
        implicit, explicit = found.loc[(*key, "implicit")], found.loc[(*key, "explicit")] if (*key, "explicit") in found.index else None
        rows = behaviour[(behaviour["model"] == key[0]) & (behaviour["treatment"] == key[1]) & (behaviour["kind"] == "implicit")]
        readings = readings_of(awareness[(awareness["model"] == key[0]) & (awareness["treatment"] == key[1])])
        record = {"model": key[0], "treatment": key[1], "n": int(implicit["n"]), "implicit": implicit["rate"]}
        record |= {name: implicit[name] for name in ("low", "high", "interval", "template_min", "template_max", "invalid_share", "worst",
                                                     "best")}
        low, high = column_interval(rows, "log_odds")
        record |= {"log_odds": float(rows["log_odds"].mean(skipna=False)), "log_odds_low": low, "log_odds_high": high}
        record |= improbable_share(rows)
        if explicit is not None:
            record |= {"explicit": explicit["rate"], "explicit_n": int(explicit["n"]), "explicit_low": explicit["low"],
                       "explicit_high": explicit["high"], "explicit_invalid_share": explicit["invalid_share"]}
        if len(readings):
            low, high = blind_interval(readings)
            record |= {"r_blind": blind_score(readings), "r_blind_low": low, "r_blind_high": high, "n_readings": n_readings(readings)}
        records.append(record)
    return pd.DataFrame.from_records(records)
