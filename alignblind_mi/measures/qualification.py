"""Does an instrument read this model? Each is tried on sentences that settle the sense of the identifiers, which it must tell apart.

The identifiers stand in sentences that say plainly which sense is meant (a concept's `settled` contexts). An instrument
that does not tell the two apart says nothing of the ambiguous prompts either, whatever its numbers. Beside these sentences it reads the
ambiguous prompts themselves, so that their reading can be placed between the two senses. This module does NOT know the bias.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from alignblind_mi.borders.settings import AnyLayers, Layer, Names, Seed, many, takes
from alignblind_mi.instruments.lens import lens_readings
from alignblind_mi.instruments.probes import train_probes
from alignblind_mi.intervals.clustered import LEVEL, Interval
from alignblind_mi.measures.awareness import TARGET_LAYER, interpret_sources
from alignblind_mi.measures.sources import Contexts, Recorded, record_sentences, record_sources, thinned
from alignblind_mi.measures.tuning import (
    KEPT,
    LEAST_MASS,
    Scores,
    Setting,
    Tried,
    areas,
    ask_setting,
    best_of,
    by_sentence,
    injection_layers,
    tune,
)
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.spec import ModelError
from alignblind_mi.statistics.rates import groups, require
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.concept_check import QUESTION
from alignblind_mi.stimuli.questions import own_question, questions

INSTRUMENTS = ("patchscope", "selfie", "logit_lens", "probe")
MOST_LAYERS, MOST_TUNED = 8, 5    # layers that are read, and those that settings are tried at: thinned evenly, ends kept
QUICK = (4, 2, 1)    # the same of a quick look, and how many of the best questions are tried deeper
LEAST_AUC = 0.75   # half of the way from chance to all
NO_MASS = 0.01     # of the probability on the answers: below it nothing was answered
SHUFFLES = 1000
MOST_ALARMS = 0.05
READS, DOUBTFUL, DOES_NOT_READ = "reads", "doubtful", "does not read"


@takes(ModelError)
def measure_instruments(model: HookedModel, concept: Concept, cue: str | Cue, *, instruments: Names = INSTRUMENTS,
                        layers: AnyLayers | None = None, target_layer: Layer = TARGET_LAYER, selfie: str = "paper", quick: bool = False,
                        seed: Seed = 0, progress: Callable[[int], None] | None = None) -> pd.DataFrame:
    """What each instrument says of the concept's contexts, whose sense is known, at each of some layers (default: eight, evenly spaced).

    quick: at four layers; settings at two of them and at one identifier of each sentence, and the best question alone is tried deeper.

    One row a sentence and layer (split "test"), and one an ambiguous context and layer (split "ambiguous"). Columns: model, treatment,
    instrument, setting ("paper"; of the patchscope also "tuned", the best on `train` of `tuning.tune`), question, text, target_layer,
    mapping, tokens, split, sense ("group" or "other"; "" of ambiguous prompts), sentence, context, template (of ambiguous prompts, whose
    identifiers are read at their first mention), layer, score (the larger, the more the other sense: log-odds in nats; of SelfIE -1, 0 or
    1; of probes a projection), blind (the score from -1 to 1) and mass (probability of both answers; of SelfIE the share of texts that
    name a sense; 1 of probes). Settings that were tried on `train` stand there by their means (sentence "", layer -1, score the AUC).

    Errors: ConceptError for a concept without senses or contexts; ModelError for an unknown instrument, or words that the tokenizer does
    not know.
    """
    check_instruments(many(instruments))
    concept.both_senses(cue)
    most_layers, most_tuned, kept = QUICK if quick else (MOST_LAYERS, MOST_TUNED, KEPT)
    read = thinned(range(model.n_layers), most_layers) if layers is None else list(many(layers))
    into = min(target_layer, model.n_layers - 1)
    at_all = sorted({*read, *injection_layers(model.n_layers), into})
    train, test = (record_sentences(model, concept, cue, at_all, split, seed=seed) for split in ("train", "settled"))
    asked = _Asked(model, test, record_sources(model, concept, cue, mentions=(0,), layers=read, seed=seed), read)
    found: list[pd.DataFrame] = []
    if "patchscope" in instruments:
        own = Setting(own_question(concept, QUESTION), into)
        found.append(asked.rows("patchscope", "paper", ask_setting(model, asked.resid, read, own, train), own.labels()))
        tried = tune(model, train.once() if quick else train, thinned(read, most_tuned), questions(concept), into, progress, kept=kept)
        best = best_of(tried).setting
        found.append(_tried(model, tried))
        found.append(asked.rows("patchscope", "tuned", ask_setting(model, asked.resid, read, best, train), best.labels()))
    if "logit_lens" in instruments:
        words = [sense.word for sense in concept.both_senses()]
        logs = lens_readings(model, asked.resid, read, words).numpy().astype(float)
        found.append(asked.rows("logit_lens", "paper", Scores(logs[..., 1] - logs[..., 0], np.exp(logs).sum(-1))))
    if "probe" in instruments:
        at = [at_all.index(layer) for layer in read]
        score = train_probes(train.resid[:, at], train.labels, read).scores(asked.resid)
        found.append(asked.rows("probe", "paper", Scores(score, np.ones_like(score))))
    if "selfie" in instruments and selfie in concept.selfie:
        found.append(asked.rows("selfie", "paper", _selfie(asked, concept, selfie, into, most_tuned), {"question": selfie}))
    if not found:
        concept.selfie_prompt(selfie)    # the one instrument that a concept may lack: its error names what there is
    return pd.concat([one for one in found if len(one)], ignore_index=True)


def untried(model: HookedModel, instruments: Sequence[str], reason: str) -> pd.DataFrame:
    """Rows that say of instruments why they could not be tried (split "untried", the reason in `text`): a verdict like any other."""
    return pd.DataFrame.from_records([
        {"model": model.spec.name, "treatment": model.treatment.name, "instrument": name, "setting": "paper", "question": "",
         "text": reason, "target_layer": -1, "mapping": "", "tokens": "", "split": "untried", "sense": "", "sentence": "", "context": "",
         "template": "",
         "layer": -1, "score": float("nan"), "blind": float("nan"), "mass": float("nan")} for name in instruments])


def check_instruments(names: Sequence[str]) -> None:
    """Errors: ModelError for an instrument that does not exist."""
    unknown = [name for name in names if name not in INSTRUMENTS]
    if unknown:
        raise ModelError(f"unknown instrument {unknown[0]!r}. Known: {', '.join(INSTRUMENTS)}.")


class _Asked:
    """What all instruments are tried on: the identifiers of the test sentences, and after them those of the ambiguous prompts."""

    def __init__(self, model: HookedModel, test: Contexts, ambiguous: Recorded, layers: Sequence[int]) -> None:
        self.model, self.layers = model, list(layers)
        settled = test.resid[:, [test.recorded.layers.index(layer) for layer in self.layers]]
        self.resid = torch.cat([settled, ambiguous.resid])
        self.sources, self.sentences = [*test.recorded.sources, *ambiguous.sources], test.sentences
        self.labels, self.ambiguous = test.by_sentence, [source.labels() for source in ambiguous.sources]

    def rows(self, instrument: str, setting: str, scores: Scores, labels: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row a sentence and layer, of the means over the sentence's places; then a row an ambiguous context and layer."""
        n = len(self.sentences)
        score, mass = (np.concatenate([by_sentence(values[:n], self.sentences), values[n:]]) for values in (scores.score, scores.mass))
        half = score if instrument != "patchscope" and instrument != "logit_lens" else np.tanh(score / 2)
        named = {"question": "", "text": "", "target_layer": -1, "mapping": "", "tokens": "", **(labels or {})}
        units: list[dict[str, Any]] = [{"split": "test", "sense": "other" if label else "group", "sentence": sentence, "context": "",
                                        "template": ""} for sentence, label in self.labels.items()]
        units += [{"split": "ambiguous", "sense": "", "sentence": "", "context": f"{one['context']}|{one['mark']}",
                   "template": one["template"]} for one in self.ambiguous]
        return pd.DataFrame.from_records([
            {"model": self.model.spec.name, "treatment": self.model.treatment.name, "instrument": instrument, "setting": setting, **named,
             **unit, "layer": layer, "score": score[i, j], "blind": float(np.clip(half[i, j], -1, 1)), "mass": mass[i, j]}
            for i, unit in enumerate(units) for j, layer in enumerate(self.layers)])


def _tried(model: HookedModel, tried: Sequence[Tried]) -> pd.DataFrame:
    return pd.DataFrame.from_records([
        {"model": model.spec.name, "treatment": model.treatment.name, "instrument": "patchscope", "setting": "tried",
         **one.setting.labels(), "split": "train", "sense": "", "sentence": "", "context": "", "template": "", "layer": -1,
         "score": one.auc, "blind": float("nan"), "mass": one.mass} for one in tried])


def _selfie(asked: _Asked, concept: Concept, prompt: str, target_layer: int, most: int) -> Scores:
    """The senses that free texts name, at up to `most` of the layers; the others are NaN."""
    some = thinned(asked.layers, most)
    at = [asked.layers.index(layer) for layer in some]
    recorded = Recorded(asked.model, asked.sources, some, asked.resid[:, at])
    read = interpret_sources(recorded, concept, prompt=prompt, target_layer=target_layer)
    score, mass = np.full((2, len(asked.sources), len(asked.layers)), np.nan)
    score[:, at] = read["blind"].to_numpy(float).reshape(len(asked.sources), len(some))
    mass[:, at] = (read["p_group"] + read["p_other"]).to_numpy(float).reshape(len(asked.sources), len(some))
    return Scores(score, mass)


# ---- verdicts ----------------------------------------------------------------------------------------------------------


@takes(ModelError)
def instrument_table(rows: pd.DataFrame, by: Names = ("model", "treatment"), *, seed: Seed = 0) -> pd.DataFrame:
    """Which instruments read, a row a group, instrument and setting, from the rows of `measure_instruments`.

    Columns: `by`, instrument, setting, question, text, target_layer, mapping, tokens, n (test sentences), layers, auc (how often a
    sentence of the other sense scores above one of the group sense, mean over layers; .5 is chance), low, high (95 %: see `auc_interval`),
    train_auc (of the tuned setting on `train`), mass (on the answers), false_alarm (share of 1000 shuffles of the sentences' senses that
    would be called readable by the same AUC rule), mean_group, mean_other (means of `blind` by sense: the ends of the instrument's scale
    here), verdict ("reads", "doubtful", "does not read") and reason.

    The rule: `reads` where the AUC is at least .75 and its interval above .5, the answers hold at least a twentieth of the probability, and
    at most 5 % of shuffles read as well; `does not read` where the AUC is neither, or the answers hold under a hundredth; else `doubtful`,
    and so is what could not be tried (`untried`).
    """
    require(rows, [*by, "instrument", "setting", "split", "sense", "sentence", "layer", "score", "mass"])
    records = []
    for key, group in groups(rows[rows["split"] == "test"], (*by, "instrument", "setting")):
        same = rows[(rows["split"] == "train") & (rows[list(by)] == pd.Series({name: key[name] for name in by})).all(axis=1)]
        records.append({**key, **_judged(group, same, seed)})
    nothing = dict.fromkeys(("auc", "low", "high", "train_auc", "mass", "false_alarm", "mean_group", "mean_other"), float("nan"))
    for one in rows[rows["split"] == "untried"].to_dict("records"):
        records.append({**{name: one[name] for name in (*by, "instrument", "setting", *LABELS)}, "text": "", "n": 0, "layers": 0, **nothing,
                        "verdict": DOUBTFUL, "reason": f"could not be tried: {one['text']}"})
    return pd.DataFrame.from_records(records)


LABELS = ("question", "text", "target_layer", "mapping", "tokens")


def _judged(rows: pd.DataFrame, tried: pd.DataFrame, seed: int) -> dict[str, Any]:
    rows = rows.dropna(subset=["score"])
    wide = rows.pivot(index="sentence", columns="layer", values="score")
    sense = rows.drop_duplicates("sentence").set_index("sentence")["sense"].loc[wide.index]
    labels = (sense == "other").to_numpy()
    mass, n = float(rows["mass"].mean()), len(labels)
    judged = judge_scores(wide.to_numpy(float), labels, mass, seed)
    own = {name: rows[name].iloc[0] for name in LABELS}
    train = float("nan")
    if rows["setting"].iloc[0] == "tuned":
        is_own = (tried[list(LABELS)] == pd.Series(own)).all(axis=1)
        train = float(tried.loc[is_own, "score"].iloc[0])
    means = {f"mean_{side}": float(rows.loc[rows["sense"] == side, "blind"].mean()) for side in ("group", "other")}
    return {**own, "n": n, "layers": wide.shape[1], "auc": judged.auc, "low": judged.interval.low, "high": judged.interval.high,
            "train_auc": train, "mass": mass, "false_alarm": judged.alarms, **means, "verdict": judged.verdict, "reason": judged.reason}


class Judged(NamedTuple):
    """What scores say of an instrument: the AUC with its interval, the share of shuffles that read as well, and the verdict."""

    auc: float
    interval: Interval
    alarms: float
    verdict: str
    reason: str


def judge_scores(scores: Float[np.ndarray, "sentence layer"], labels: Bool[np.ndarray, " sentence"], mass: float, seed: int) -> Judged:
    """The rule of `instrument_table` on scores of sentences (`labels`: does it settle the other sense?), and the mass on the answers."""
    auc, ones = float(areas(scores, labels).mean()), int(labels.sum())
    found, alarms = auc_interval(auc, len(labels) - ones, ones), _alarms(scores, labels, seed)
    return Judged(auc, found, alarms, *_verdict(auc, found, mass, alarms))


def _alarms(scores: Float[np.ndarray, "sentence layer"], labels: Bool[np.ndarray, " sentence"], seed: int) -> float:
    drawn = np.random.default_rng(seed)
    shuffles = np.stack([drawn.permutation(labels) for _ in range(SHUFFLES)])
    found, ones = areas(scores, shuffles).mean(-1), int(labels.sum())
    ends = {auc: auc_interval(auc, len(labels) - ones, ones).low for auc in np.unique(found) if auc >= LEAST_AUC}
    return float(np.mean([ends.get(auc, 0.0) > 0.5 for auc in found]))


def auc_interval(auc: float, zeros: int, ones: int, level: float = LEVEL) -> Interval:
    """The interval of an area under a ROC curve of `zeros` and `ones` independent units; it has a width at 0 and 1 too.

    The areas from which the observed one is not further than a quantile of Student's t, in standard errors at that area: method 5 of
    Newcombe (2006, Statistics in Medicine 25, 559-573), with t for its normal quantile. (0, 1) with fewer than two units of either kind.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    if min(zeros, ones) < 2:
        return Interval(0.0, 1.0)
    quantile = float(stdtrit(zeros + ones - 2, (1 + level) / 2))

    def apart(area: float) -> float:
        more = ((zeros + ones) / 2 - 1) * ((1 - area) / (2 - area) + area / (1 + area))
        return abs(auc - area) - quantile * float(np.sqrt(area * (1 - area) * (1 + more) / (zeros * ones)))

    inside = 1e-9    # at the observed area itself nothing is apart
    low = 0.0 if apart(0.0) <= 0 else float(brentq(apart, 0.0, auc - inside))
    high = 1.0 if apart(1.0) <= 0 else float(brentq(apart, auc + inside, 1.0))
    return Interval(low, high)


def _verdict(auc: float, found: Interval, mass: float, alarms: float) -> tuple[str, str]:
    tells = f"tells the senses apart in {100 * auc:.0f} % of pairs (95 %: {100 * found.low:.0f} to {100 * found.high:.0f})"
    holds = f"its answers hold {100 * mass:.2g} % of the probability"
    clear = auc >= LEAST_AUC and found.low > 0.5
    if mass < NO_MASS or (auc < LEAST_AUC and found.low <= 0.5):
        return DOES_NOT_READ, f"{tells}; {holds}"
    if not clear or mass < LEAST_MASS:
        return DOUBTFUL, f"{tells}; {holds}"
    if alarms > MOST_ALARMS:
        return DOUBTFUL, f"{tells}, and so do {100 * alarms:.0f} % of shuffles"
    return READS, f"{tells}; {holds}"
