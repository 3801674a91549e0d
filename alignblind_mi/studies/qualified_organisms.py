"""Is qualification honest? Asked of organisms whose truth is known: does it read where a sense is, and refuse where there is none?

Three questions to every organism of a calibration. What does each setting say of it, and where does it place the ambiguous prompts, whose
planted reading is known? What does it say of the same organism with random weights, which has no senses? And how often does choosing a
setting on sentences whose senses were shuffled find one that passes on other sentences, shuffled too? Does NOT know how they are trained.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from alignblind_mi.intervals.clustered import exact_interval
from alignblind_mi.measures.awareness import TARGET_LAYER
from alignblind_mi.measures.qualification import (
    MOST_LAYERS,
    MOST_TUNED,
    READS,
    judge_scores,
    measure_instruments,
)
from alignblind_mi.measures.sources import Contexts, record_contexts, thinned
from alignblind_mi.measures.tuning import Scores, Setting, ask_setting, best_of, by_sentence, sentence_labels, tune
from alignblind_mi.models.model import HookedModel, untrained
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.questions import questions
from alignblind_mi.studies.qualified import instruments_of

INSTRUMENTS = ("patchscope", "logit_lens", "probe")    # texts are slow, and say what the patchscope does
SHUFFLES = 40    # choices an organism
RANDOM = 4    # models of random weights an organism
WHAT = ("organism", "random weights", "shuffled senses")


def qualify_organism(model: HookedModel, concept: Concept, cue: str, *, seed: int = 0, shuffles: int = SHUFFLES, models: int = RANDOM
                     ) -> pd.DataFrame:
    """The verdicts on one organism: a row an instrument, setting and draw. Columns: what (`WHAT`), draw, instrument, setting, auc, low,
    high, mass, verdict, and of the organism itself and of random weights scale, scale_low, scale_high (see `instruments_of`).

    seed: of the organism, another one for each, so that no two share random weights.
    """
    found = [_verdicts(model, concept, cue, seed).assign(what=WHAT[0], draw=0)]
    for draw in range(models):
        found.append(_verdicts(untrained(model, seed=seed * models + draw), concept, cue, seed).assign(what=WHAT[1], draw=draw))
    found.append(_shuffled(model, concept, cue, shuffles, seed).assign(what=WHAT[2]))
    return pd.concat(found, ignore_index=True)


def _verdicts(model: HookedModel, concept: Concept, cue: str, seed: int) -> pd.DataFrame:
    found = instruments_of(measure_instruments(model, concept, cue, instruments=INSTRUMENTS, seed=seed), seed=seed)
    return found[["instrument", "setting", "auc", "low", "high", "mass", "verdict", "scale", "scale_low", "scale_high"]]


def _shuffled(model: HookedModel, concept: Concept, cue: str, shuffles: int, seed: int) -> pd.DataFrame:
    """A setting chosen on shuffled senses and tried on shuffled senses, again and again; the model is asked once a setting."""
    layers = thinned(range(model.n_layers), MOST_LAYERS)
    few, every = thinned(layers, MOST_TUNED), range(model.n_layers)
    first = min(TARGET_LAYER, model.n_layers - 1)
    train, test = (record_contexts(model, concept, cue, every, split).once() for split in ("train", "settled"))

    @lru_cache(None)
    def asked(setting: Setting, on_test: bool) -> Scores:
        contexts, at = (test, layers) if on_test else (train, few)
        return ask_setting(model, contexts.resid[:, list(at)], at, setting, train)

    drawn, records = np.random.default_rng(seed), []
    for draw in range(shuffles):
        choosing, trying = (_relabelled(contexts, drawn) for contexts in (train, test))
        best = best_of(tune(model, choosing, few, questions(concept), first, ask=lambda one: asked(one, False)))
        found = asked(best.setting, True)
        judged = judge_scores(by_sentence(found.score, trying.sentences), sentence_labels(trying), float(found.mass.mean()), seed)
        records.append({"instrument": "patchscope", "setting": "tuned", "draw": draw, "auc": judged.auc, "low": judged.interval.low,
                        "high": judged.interval.high, "mass": float(found.mass.mean()), "verdict": judged.verdict})
    return pd.DataFrame.from_records(records)


def _relabelled(contexts: Contexts, drawn: np.random.Generator) -> Contexts:
    """The contexts, a sentence each, with the senses in another order."""
    return Contexts(contexts.recorded, drawn.permutation(contexts.labels), contexts.sentences)


# ---- what it says ------------------------------------------------------------------------------------------------------


def honesty_records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A record an instrument and setting, from the rows of `qualify_organism` of all organisms; what cannot be computed is None.

    instrument, setting, organisms, reads (share of them), spearman (mean over seeds of the rank correlation between the planted reading and
    the scale, over the settings of the knobs), error (mean distance between them), held (share whose interval holds the planted reading),
    random_reads with random_low, random_high, random_n (share of models with random weights that it "reads", exact interval), and of
    the tuned setting shuffled_reads, shuffled_low, shuffled_high, shuffled_n (the same of senses that were shuffled).
    """
    return [_record(str(name), str(setting), group) for (name, setting), group in rows.groupby(["instrument", "setting"], sort=False)]


def _record(name: str, setting: str, rows: pd.DataFrame) -> dict[str, Any]:
    own = rows[rows["what"] == WHAT[0]]
    knobs = own[(own["kind"] == "knobs") & own["scale"].notna()]
    ranks = [float(np.corrcoef(group["reading"].rank(), group["scale"].rank())[0, 1]) for _, group in knobs.groupby("seed")
             if len(group) > 2]
    held = (knobs["scale_low"] <= knobs["reading"]) & (knobs["reading"] <= knobs["scale_high"])
    record: dict[str, Any] = {
        "instrument": name, "setting": setting, "organisms": len(own), "reads": _share(own["verdict"] == READS),
        "spearman": float(np.mean(ranks)) if ranks else None,
        "error": float((knobs["scale"] - knobs["reading"]).abs().mean()) if len(knobs) else None, "held": _share(held)}
    for key, what in (("random", WHAT[1]), ("shuffled", WHAT[2])):
        verdicts = rows.loc[rows["what"] == what, "verdict"]
        low, high = exact_interval(int((verdicts == READS).sum()), len(verdicts))
        record |= {f"{key}_reads": _share(verdicts == READS), f"{key}_low": low, f"{key}_high": high, f"{key}_n": len(verdicts)}
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in record.items()}


def _share(values: "pd.Series[bool]") -> float | None:
    return float(values.mean()) if len(values) else None
