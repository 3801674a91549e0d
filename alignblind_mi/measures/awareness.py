"""Awareness: is an ambiguous identifier read as the group or as the other sense, and from which layer on?

Four instruments read the same residual streams (`sources.py`): a patchscope that asks a question (the race-blind score of "Aligned but
Blind"), open-ended interpretation (SelfIE), the logit or tuned lens, and linear probes. One row per reading and layer; `blind` is each
instrument's own scale from the group sense to the other sense (-1 to 1; of the patchscope, a difference of two changes, at most -2 to 2),
so that instruments can be laid side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from alignblind_mi.borders.settings import AnyLayers, Count, Layer, Mentions, Names, Seed, Temperature, Tokens, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.instruments.lens import Translators, lens_readings
from alignblind_mi.instruments.patchscope import Mapping, patchscope_rows
from alignblind_mi.instruments.probes import bag_of_words, shuffled, train_probes
from alignblind_mi.intervals.clustered import LEVEL, Interval, exact_interval, independent_half_width
from alignblind_mi.measures.sources import CONTROLS, TEXT_LAYER, Contexts, Recorded, Source, record_contexts, record_sources
from alignblind_mi.models.edits import Row, acts_in
from alignblind_mi.models.model import HookedModel, untrained
from alignblind_mi.models.spec import ModelError
from alignblind_mi.statistics.rates import column_interval, label_shares, relative_change, require
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.prompts import Prompt, fill, interpretation_prompt
from alignblind_mi.stimuli.protocol import ProtocolName
from alignblind_mi.stimuli.readings import classify, reading_names

TARGET_LAYER = 2    # where the paper injects, on Llama 3
SELFIE_TOKENS = 20
READING = ["context", "mark", "mention", "identifier"]    # columns that tell readings apart
READ_OVER = ("context", "template")    # what the intervals of readings are clustered over
VECTOR_CONTROLS = tuple(name for name in CONTROLS if name != "text")    # instruments that only read have nothing to ask of a text
SHUFFLES, UNTRAINED = 10, 3    # control probes, whose accuracies are averaged
PROBE_CONTROLS = {"shuffled": "drawn labels", "untrained": "random weights", "bag_of_words": "the words of the sentence"}
UNTRAINED_UP_TO = 2_000_000_000    # parameters up to which a model of random weights is made beside the model


def _senses(concept: Concept) -> list[str]:
    return [sense.word for sense in concept.both_senses()]


def _rows(recorded: Recorded, instrument: str, read: Callable[[int, int], dict[str, object]]) -> pd.DataFrame:
    """One record per source and layer: what identifies it, and what `read(source, layer)` (by index) says."""
    return pd.DataFrame.from_records([
        _row(recorded.model, source, instrument, layer, read(i, j))
        for i, source in enumerate(recorded.sources) if source.control != "text" for j, layer in enumerate(recorded.layers)])


def _row(model: HookedModel, source: Source, instrument: str, layer: int, said: dict[str, object]) -> dict[str, object]:
    return {"model": model.spec.name, "treatment": model.treatment.name, **source.labels(), "instrument": instrument, "layer": layer,
            **said}


@takes(ModelError)
def measure_awareness(model: HookedModel, concept: Concept, cue: str | Cue, *, reading: str = "paper", target_layer: Layer = TARGET_LAYER,
                      mentions: Mentions = (0,), layers: AnyLayers | None = None, max_word_pairs: Count | None = 20,
                      controls: Names = CONTROLS, mapping: Mapping | None = None, seed: Seed = 0) -> pd.DataFrame:
    """Readings of the identifiers of the balanced implicit prompts, at every layer, by one interpretation question.

    n counts different contexts: see `sources.reading_sources`. Columns: the prompt's labels, model, treatment, instrument ("patchscope"),
    interpretation, mark, identifier, mention, context (what intervals are clustered over), control, layer, p_group, p_other (patched),
    base_group, base_other (unpatched), d_group, d_other, blind = d_other - d_group. `mapping` maps the vectors before they are injected.

    Errors: ConceptError for an unknown reading or control; EditError for a layer that does not exist; ModelError for a sense of two tokens.
    """
    concept.interpretation(reading)    # refused before anything is recorded
    recorded = record_sources(model, concept, cue, mentions=mentions, layers=layers, max_word_pairs=max_word_pairs, controls=controls,
                              seed=seed)
    return ask_sources(recorded, concept, reading=reading, target_layer=target_layer, mapping=mapping)


@takes(ModelError)
def ask_sources(recorded: Recorded, concept: Concept, *, reading: str = "paper", target_layer: Layer = TARGET_LAYER,
                mapping: Mapping | None = None) -> pd.DataFrame:
    """`measure_awareness` of residual streams that were recorded already."""
    model, words, question = recorded.model, _senses(concept), concept.interpretation(reading)
    target = interpretation_prompt(question)
    base = model.next_probs([Row(target)], words)[0]
    rows = [row for at in recorded.resid for row in patchscope_rows(at, target, target_layer, mapping=mapping)]
    probs = model.next_probs(rows, words).view(len(recorded.sources), len(recorded.layers), 2)
    table = _rows(recorded, "patchscope", lambda i, j: _changes(probs[i, j], base))
    table = pd.concat([table, _from_text(recorded, question.text, words, base)], ignore_index=True)
    return table.assign(interpretation=reading)


def _changes(probs: Float[Tensor, " sense"], base: Float[Tensor, " sense"]) -> dict[str, object]:
    (group, other), (base_group, base_other) = probs.tolist(), base.tolist()
    return {"p_group": group, "p_other": other, "base_group": base_group, "base_other": base_other, "d_group": group - base_group,
            "d_other": other - base_other, "blind": (other - base_other) - (group - base_group)}


def _from_text(recorded: Recorded, question: str, words: Sequence[str], base: Float[Tensor, " sense"]) -> pd.DataFrame:
    """The control `text`: the source's text and the question about the identifier itself, nothing patched."""
    model = recorded.model
    sources = [source for source in recorded.sources if source.control == "text"]
    if not sources:
        return pd.DataFrame()
    probs = model.next_probs([_in_text(recorded, source, question) for source in sources], words)
    return pd.DataFrame.from_records([_row(model, source, "patchscope", TEXT_LAYER, _changes(probs[i], base))
                                      for i, source in enumerate(sources)])


def _in_text(recorded: Recorded, source: Source, question: str) -> Row:
    """The text up to the identifier, a full stop, and the question about it, under the treatment as far as its marks are there."""
    treatment, seen = recorded.model.treatment, source.seen()
    before = {name: tuple(span for span in spans if span.end <= len(seen)) for name, spans in source.prompt.marks.items()}
    asked = fill(question, {"x": source.prompt.labels[source.role]}, {"x": source.role}).prefixed(f"{seen}. ")
    marks = {**before, source.role: (*before[source.role], *asked.marks[source.role])}
    prompt = Prompt(asked.text, {name: spans for name, spans in marks.items() if spans}, source.prompt.labels).prefixed(treatment.prefix)
    return Row(prompt, tuple(edit for edit in treatment.edits if acts_in(prompt, edit.site.mark)))


@takes(ModelError)
def measure_selfie(model: HookedModel, concept: Concept, cue: str | Cue, *, prompt: str = "paper", target_layer: Layer = TARGET_LAYER,
                   mentions: Mentions | None = None, layers: AnyLayers | None = None, max_word_pairs: Count | None = 20,
                   controls: Names = CONTROLS, max_new_tokens: Tokens = SELFIE_TOKENS, temperature: Temperature = 0.0,
                   protocol: ProtocolName = "best", seed: Seed = 0) -> pd.DataFrame:
    """Open-ended readings: the residual stream is put into the placeholders of a concept's SelfIE prompt, and the model goes on writing.

    `protocol` "best" reads what leaves each layer at the first mention, and writes it where it leaves `target_layer`; "paper", as the
    released code, reads and writes what enters a layer (layer 0: the embedding), at all mentions of the published prompts behind
    "Question: ". `mentions` takes others.

    Columns: those that identify a reading (see `measure_awareness`), instrument ("selfie"), interpretation (the prompt's name), text,
    reading (a sense of the concept or "other", by its lexicons), p_group and p_other (1 or 0), blind = p_other - p_group. A
    sampled text depends on `seed`, its source and its layer alone. Source: Chen, Vondrick and Mao 2024; five placeholders, 20 tokens.

    Errors: ConceptError for an unknown prompt or senses without a lexicon; ModelError if the tokenizer does not know the prompt.
    """
    concept.selfie_prompt(prompt)    # refused before anything is recorded
    recorded = record_sources(model, concept, cue, mentions=mentions, layers=layers, max_word_pairs=max_word_pairs, controls=controls,
                              protocol=protocol, seed=seed)
    return interpret_sources(recorded, concept, prompt=prompt, target_layer=target_layer, max_new_tokens=max_new_tokens,
                             temperature=temperature, seed=seed)


@takes(ModelError)
def interpret_sources(recorded: Recorded, concept: Concept, *, prompt: str = "paper", target_layer: Layer = TARGET_LAYER,
                      max_new_tokens: Tokens = SELFIE_TOKENS, temperature: Temperature = 0.0, seed: Seed = 0) -> pd.DataFrame:
    """`measure_selfie` of residual streams that were recorded already: they are written into the stream that they were read from."""
    model, asked = recorded.model, concept.selfie_prompt(prompt)
    target = interpretation_prompt(asked)
    classify("", concept)    # a concept without lexicons is refused before anything is run
    _check_prompt(model, concept, prompt, target)
    rows = [row for at in recorded.resid for row in patchscope_rows(at, target, target_layer, stream=recorded.stream)]
    names = [f"{source.control}|{source.role}|{source.mention}|{source.seen()}|{layer}" for source in recorded.sources
             for layer in recorded.layers]
    written = [source for source in recorded.sources if source.control == "text"]
    rows += [_in_text(recorded, source, asked.text) for source in written]
    names += [f"text|{source.role}|{source.mention}|{source.seen()}" for source in written]
    made = model.generate(rows, max_new_tokens, temperature=temperature, seed=seed, draws=names)
    said = [_reading(one.text, concept) for one in made]
    table = _rows(recorded, "selfie", lambda i, j: said[i * len(recorded.layers) + j])
    plain = [_row(model, source, "selfie", TEXT_LAYER, reading)
             for source, reading in zip(written, said[len(said) - len(written):], strict=True)]
    return pd.concat([table, pd.DataFrame.from_records(plain)], ignore_index=True).assign(interpretation=prompt)


def _check_prompt(model: HookedModel, concept: Concept, name: str, target: Prompt) -> None:
    try:
        model.check_known([target])
    except ModelError as error:
        others = ", ".join(other for other in concept.selfie if other != name) or "none"
        raise ModelError(f"{model.spec.name} does not know the words of the SelfIE prompt {name!r} ({target.text!r}); other prompts of the "
                         f"concept {concept.name!r}: {others}.") from error


def _reading(text: str, concept: Concept) -> dict[str, object]:
    found = classify(text, concept)
    group, other = float(found == concept.group_sense), float(found == concept.other_sense)
    return {"text": text, "reading": found, "p_group": group, "p_other": other, "blind": other - group}


@takes(ModelError)
def measure_lens(model: HookedModel, concept: Concept, cue: str | Cue, *, translators: Translators | None = None,
                 mentions: Mentions = (0,), layers: AnyLayers | None = None, max_word_pairs: Count | None = 20,
                 controls: Names = VECTOR_CONTROLS, seed: Seed = 0) -> pd.DataFrame:
    """The sense words as the identifier's next token, by the logit lens or (with `translators`) the tuned lens.

    Columns: those that identify a reading (see `measure_awareness`), instrument ("logit_lens" or "tuned_lens"), log_odds (nats, other over
    group), p_group, p_other (over the whole vocabulary), blind = (p_other - p_group) / (p_other + p_group).

    Errors: ModelError for a model whose answer is not its final norm and head alone.
    """
    recorded = record_sources(model, concept, cue, mentions=mentions, layers=layers, max_word_pairs=max_word_pairs,
                              controls=[name for name in controls if name != "text"], seed=seed)
    return lens_sources(recorded, concept, translators=translators)


def lens_sources(recorded: Recorded, concept: Concept, *, translators: Translators | None = None) -> pd.DataFrame:
    """`measure_lens` of residual streams that were recorded already."""
    logs = lens_readings(recorded.model, recorded.resid, recorded.layers, _senses(concept), translators)

    def read(i: int, j: int) -> dict[str, object]:
        group, other = logs[i, j].tolist()
        return {"log_odds": other - group, "p_group": float(np.exp(group)), "p_other": float(np.exp(other)),
                "blind": float(np.tanh((other - group) / 2))}
    return _rows(recorded, "logit_lens" if translators is None else "tuned_lens", read)


@dataclass(frozen=True, eq=False)
class ProbeReadings:
    """What probes say of the ambiguous prompts (`rows`), and how good they are (`accuracy`).

    accuracy: probe, layer, n (sentences tested, each at several places), accuracy (of all places), low, high (exact interval as if n
    sentences had been judged once each: places of one sentence are not independent), and for the probe "sense" selectivity = accuracy -
    accuracy of its stronger control, and no_reading, why a layer gives none ("" where it does): the interval of its accuracy must lie
    above that control. Controls: "shuffled" (sentences with drawn labels, after Hewitt and Liang 2019), "untrained" (random weights),
    "bag_of_words" (the words of the sentence without their order, and no model).
    """

    __repr__ = one_line

    rows: pd.DataFrame
    accuracy: pd.DataFrame


@takes(ModelError)
def measure_probes(model: HookedModel, concept: Concept, cue: str | Cue, *, mentions: Mentions = (0,),
                   layers: AnyLayers | None = None, max_word_pairs: Count | None = 20, controls: Names = VECTOR_CONTROLS,
                   random_weights: bool | None = None, seed: Seed = 0) -> ProbeReadings:
    """Probes for the sense, trained on the concept's `train` contexts, tested on its `test` contexts, applied to the ambiguous prompts.

    The rows have the columns that identify a reading (see `measure_awareness`), instrument ("probe"), p_group, p_other and blind: the
    reading on the scale of the `test` contexts, -1 and 1 at the means of the two senses, and p_other = (1 + blind) / 2. They are NaN at a
    layer that gives no reading; `no_reading` says why, and `blind_unchecked` what it would have been. `random_weights`:
    also probe models of random weights (None: if the model has at most two thousand million parameters, since each takes as much memory,
    and is held by one process).

    Under a treatment the ambiguous prompts are read under it; probes are trained without its edits (but with its adapter).

    Errors: ConceptError for a concept without contexts; ModelError if the tokenizer does not know their words.
    """
    recorded = record_sources(model, concept, cue, mentions=mentions, layers=layers, max_word_pairs=max_word_pairs,
                              controls=[name for name in controls if name != "text"], seed=seed)
    return probe_sources(recorded, concept, cue, random_weights=random_weights, seed=seed)


def with_accuracy(found: ProbeReadings) -> pd.DataFrame:
    """The rows of probes with the accuracy of their layer beside them.

    Columns added: accuracy, accuracy_low, accuracy_high, selectivity, tested (n), accuracy_shuffled, accuracy_bag_of_words and, if there
    is one, accuracy_untrained.
    """
    wide = found.accuracy.pivot(index="layer", columns="probe", values="accuracy").add_prefix("accuracy_")
    sense = found.accuracy[found.accuracy["probe"] == "sense"].set_index("layer")
    wide = wide.rename(columns={"accuracy_sense": "accuracy"}).assign(
        accuracy_low=sense["low"], accuracy_high=sense["high"], selectivity=sense["selectivity"], tested=sense["n"])
    return found.rows.merge(wide.reset_index(), on="layer", validate="many_to_one")


@takes(ModelError)
def probe_sources(recorded: Recorded, concept: Concept, cue: str | Cue, *, random_weights: bool | None = None, seed: Seed = 0
                  ) -> ProbeReadings:
    """`measure_probes` of residual streams that were recorded already."""
    model, layers = recorded.model, recorded.layers
    # The ruler is made without the treatment's edits: they would put one vector into every sentence, and there would be nothing to learn.
    ruler = model.under(replace(model.treatment, edits=(), prefix=""))
    mentions = sorted({source.mention for source in recorded.sources})
    train, test = (record_contexts(ruler, concept, cue, layers, split, mentions=mentions) for split in ("train", "test"))
    probes = train_probes(train.resid, train.labels, layers)
    words = bag_of_words(*_by_sentence(train), *_by_sentence(test))
    tested = {"sense": [probes.accuracy(test.resid, test.labels)], "bag_of_words": [np.full(len(layers), words)],
              "shuffled": [_control_accuracy(train, test, layers, seed + i) for i in range(SHUFFLES)]}
    size = sum(part.numel() for part in model.engine.model.parameters())
    if random_weights if random_weights is not None else size <= UNTRAINED_UP_TO and not model.spec.tensor_parallel:
        tested["untrained"] = [_untrained_accuracy(model, concept, cue, layers, mentions, seed + i) for i in range(UNTRAINED)]
    said = probes.readings(recorded.resid, test.resid, test.labels)
    table = _accuracy_table(model, tested, layers, len(set(test.sentences)))
    why = table[table["probe"] == "sense"]["no_reading"].tolist()

    def read(i: int, j: int) -> dict[str, object]:
        reason = why[j] or ("held-out sentences of the two senses are not in order" if np.isnan(said[i, j]) else "")
        blind = float("nan") if reason else float(said[i, j])
        return {"p_group": (1 - blind) / 2, "p_other": (1 + blind) / 2, "blind": blind, "blind_unchecked": float(said[i, j]),
                "no_reading": reason}
    return ProbeReadings(_rows(recorded, "probe", read), table)


def _by_sentence(contexts: Contexts) -> tuple[list[str], Bool[np.ndarray, " sentence"]]:
    """The sentences of either sense, each once, and their labels."""
    return list(contexts.by_sentence), np.array(list(contexts.by_sentence.values()))


def _control_accuracy(train: Contexts, test: Contexts, layers: Sequence[int], seed: int) -> Float[np.ndarray, " layer"]:
    """Of probes whose labels are drawn by sentence: what a probe finds where there is nothing to be found."""
    probes = train_probes(train.resid, shuffled(train.labels, train.sentences, seed), layers)
    return probes.accuracy(test.resid, shuffled(test.labels, test.sentences, seed + 1))


def _untrained_accuracy(model: HookedModel, concept: Concept, cue: str | Cue, layers: Sequence[int], mentions: Sequence[int], seed: int
                        ) -> Float[np.ndarray, " layer"]:
    fresh = untrained(model, seed=seed)
    train, test = (record_contexts(fresh, concept, cue, layers, split, mentions=mentions) for split in ("train", "test"))
    return train_probes(train.resid, train.labels, layers).accuracy(test.resid, test.labels)


def _accuracy_table(model: HookedModel, tested: dict[str, list[np.ndarray]], layers: Sequence[int], n: int) -> pd.DataFrame:
    controls = {name: np.mean(runs, axis=0) for name, runs in tested.items() if name != "sense"}
    records = []
    for name, runs in tested.items():
        mean = np.mean(runs, axis=0)
        for j, layer in enumerate(layers):
            low, high = exact_interval(round(float(mean[j]) * n), n)
            selectivity, why = float("nan"), ""
            if name == "sense":
                stronger, beaten = max(((control, float(values[j])) for control, values in controls.items()), key=lambda one: one[1])
                selectivity = float(mean[j]) - beaten
                why = "" if low > beaten else (f"its accuracy, {mean[j]:.0%} (95 %: {low:.0%} to {high:.0%}), is not above its stronger "
                                               f"control, {PROBE_CONTROLS[stronger]} ({beaten:.0%})")
            records.append({"model": model.spec.name, "probe": name, "layer": layer, "n": n, "accuracy": float(mean[j]), "low": low,
                            "high": high, "selectivity": selectivity, "no_reading": why})
    return pd.DataFrame.from_records(records)


# ---- summaries ---------------------------------------------------------------------------------------------------------


@takes(ModelError)
def readings_of(rows: pd.DataFrame, control: str = "") -> pd.DataFrame:
    """The readings themselves, without their controls (or those of one control)."""
    return rows[rows["control"] == control] if "control" in rows else rows


@takes(ModelError)
def blind_score(readings: pd.DataFrame) -> float:
    """r_blind = mean over layers of dP(other sense) - mean over layers of dP(group sense) (protocol of "Aligned but Blind")."""
    return float(readings_of(readings)["blind"].mean())


@takes(ModelError)
def summarise_readings(rows: pd.DataFrame, by: Names = ("model", "treatment", "instrument", "control")) -> pd.DataFrame:
    """One row per group: n (different readings), layers, mean of `blind`, low, high (95 %, see `blind_interval`), p_group, p_other.

    An interval needs two contexts, and two templates where several were asked, and is NaN without; it ends where the instrument's scale
    does. Add "layer" to `by` for a profile over depth.

    Errors: StatisticsError for rows that are no readings.
    """
    numbers = ["blind", "p_group", "p_other"]
    require(rows, [*by, *READING, "instrument", "layer", *numbers], numbers=numbers)
    records = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        group = group.dropna(subset=["blind"])    # a probe says nothing at some layers
        low, high = blind_interval(group)
        bound = 2.0 if (group["instrument"] == "patchscope").any() else 1.0    # a difference of two changes; others are one scale
        records.append({**dict(zip(by, key, strict=True)), "n": n_readings(group), "layers": group["layer"].nunique(),
                        "mean": float(group["blind"].mean()), "low": max(low, -bound), "high": min(high, bound),
                        "p_group": float(group["p_group"].mean()), "p_other": float(group["p_other"].mean())})
    return pd.DataFrame.from_records(records)


def blind_interval(readings: pd.DataFrame, column: str = "blind") -> Interval:
    """The 95 % interval of the mean of `blind`, such as r_blind, over contexts and templates (`intervals.mean_interval`).

    Contexts of one template have its wording in common, so that templates, which are few, count as units too. Readings that are labels
    (SelfIE: -1, 0 or 1) often all agree by chance: their interval is never narrower than that of independent readings.
    """
    low, high = column_interval(readings, column, READ_OVER)
    read = readings.dropna(subset=[column])
    if len(read) and (read[column] % 1 == 0).all():
        mean = float(read[column].mean())
        apart = independent_half_width(read.groupby(READING)[column].mean().to_numpy(float), LEVEL)
        low, high = min(low, mean - apart), max(high, mean + apart)    # NaN, which comes first, stays
    return Interval(low, high)


def n_readings(rows: pd.DataFrame) -> int:
    """Different readings: each of them is read once at every layer."""
    return len(rows[READING].drop_duplicates())


@takes(ModelError)
def selfie_table(rows: pd.DataFrame, concept: Concept, by: Names = ("model", "treatment", "control", "layer")) -> pd.DataFrame:
    """How many open-ended readings were of each sense, per layer: `by`, n, a count for each reading, `<sense>_share` with its interval over
    contexts and templates, and the share of readings of no sense. Errors: StatisticsError for a missing column."""
    require(rows, [*by, "reading", *READ_OVER])
    names, records = reading_names(concept), []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        records.append({**dict(zip(by, key, strict=True)), "n": len(group),
                        **label_shares(group["reading"].tolist(), names, [group[name].to_numpy() for name in READ_OVER])})
    return pd.DataFrame.from_records(records)


@takes(ModelError)
def reading_reduction(treated: pd.DataFrame, untreated: pd.DataFrame) -> dict[str, float]:
    """By which share readings of the group sense are fewer in one set of rows than in another (aligned than base): estimate, low, high, n.

    estimate = mean p_group / mean p_group before - 1, of the contexts that both have, with all of their readings; the interval is over
    contexts and templates (`relative_change`); n counts contexts.
    The paper reports -52.2 % for the patchscope of Llama 3 8B and -74.4 % for SelfIE of Llama 3 70B.
    """
    return relative_change(readings_of(treated), readings_of(untreated), "p_group", READ_OVER)
