"""One question about one model: bias, awareness, patching or steering, as parts of a study of that model alone.

Rows are kept, resumed and checked as those of a whole study are (`run_parts`). This module does NOT know how results are shown.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import pandas as pd

from alignblind_mi.borders.settings import Count, File, Layer, Listed, Names, Strength, check_fields, many, takes
from alignblind_mi.borders.writing import refuse_taken
from alignblind_mi.errors import AlignblindError
from alignblind_mi.instruments.contrast import SWAPS, PatchError
from alignblind_mi.instruments.patching import CONTROLS, DIRECTIONS, summarise_patching
from alignblind_mi.measures.awareness import summarise_readings
from alignblind_mi.measures.behaviour import ask_under
from alignblind_mi.measures.mitigation import early_window
from alignblind_mi.measures.patching import HEAD_MARKS, MARKS, PARTS, SCREEN_STEPS, depth_profile, measure_patching
from alignblind_mi.mitigations.lora_settings import choose_layers
from alignblind_mi.mitigations.placebos import NOISE_PAIRS, SAMPLE, noise_placebos, treatment_effects, with_effects
from alignblind_mi.mitigations.steering import (
    Method,
    Positions,
    SteeringVectors,
    is_vectors,
    layer_windows,
    steering_grid,
    steering_vectors,
)
from alignblind_mi.models.configs import depth_of, load_config
from alignblind_mi.models.edits import UNTREATED, EditError, How, Site
from alignblind_mi.models.model import HookedModel
from alignblind_mi.results import Result, Results, load_result
from alignblind_mi.statistics.log_odds import improbable_share, judged, leading, outcomes_table
from alignblind_mi.statistics.paired import corrected, paired_differences
from alignblind_mi.statistics.placebos import placebo_bands
from alignblind_mi.statistics.rates import column_interval, position_effect, summarise
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.stimuli.prompts import DESIGNS, Prompt, filled, implicit_prompts
from alignblind_mi.studies.config import StudyConfig, asked_concept
from alignblind_mi.studies.part import TRAINING_COST, Load, Part, Parts
from alignblind_mi.studies.parts import MATCHING, MEASURING, instruments, observations, read_layers, skipped, writes_texts
from alignblind_mi.studies.qualified import instruments_of
from alignblind_mi.studies.qualifying import QUALIFIED, has_instruments, instruments_work
from alignblind_mi.studies.running import run_parts

ROLE = "model"    # what the one model is called in the rows and in the names of the parts
FEW_CONTROLS = CONTROLS[:2]    # of a patch, where not all places are patched
QUALIFIED_AS = {"patchscope": "patchscope", "selfie": "selfie", "lens": "logit_lens", "probes": "probe"}    # names of parts, and in rows
PROMPT_PARTS = {"balanced": f"balanced_{ROLE}", "published": f"behaviour_{ROLE}"}


class SingleError(AlignblindError):
    """A design, instrument or part that does not exist."""


@takes(SingleError)
def bias_parts(config: StudyConfig, design: str = "balanced") -> list[Part]:
    """Implicit and explicit answers in one design. Errors: SingleError for an unknown one."""
    if design not in DESIGNS:
        raise SingleError(f"unknown design {design!r}. Known: {', '.join(DESIGNS)}.")
    return _observed(config, lambda name: name == PROMPT_PARTS[design])


@takes(SingleError)
def awareness_parts(config: StudyConfig, names: Names = (), reading: str = "paper", *, skip: Names = ()) -> list[Part]:
    """The instruments `names` (default: all that the concept has what is needed for); `reading` is the patchscope's question.

    First what tells whether they read this model at all (`skip`: "qualification" leaves it out); a concept without contexts has none.

    Errors: ModelError for anything else to be skipped; SingleError for an unknown instrument, ConceptError for a cue without senses or an
    unknown question.
    """
    concept = asked_concept(config)
    concept.both_senses(config.cue)
    concept.interpretation(reading)
    parts = {"patchscope": f"awareness_{ROLE}_{reading}",
             **{name: f"reading_{name}_{ROLE}" for name in instruments(concept, config.cue, config.selfie,
                                                                       texts=bool(names) or writes_texts(config))}}
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise SingleError(f"unknown instrument {unknown[0]!r}. With the concept {concept.name!r} there are: {', '.join(parts)}.")
    found = _observed(config, lambda name: name in {parts[one] for one in names or parts}, texts=bool(names))
    tried = tuple(QUALIFIED_AS[one] for one in names or parts)
    return found if skipped(skip) or not has_instruments(config, concept) else [instruments_part(config, concept, tried), *found]


def instruments_part(config: StudyConfig, concept: Concept, instruments: Sequence[str]) -> Part:
    """What tells which instruments read one model. Errors: ModelError for an unknown instrument."""
    return Part(f"{QUALIFIED}_{ROLE}_{'-'.join(instruments)}{'_quick' if config.quick else ''}", ROLE, False,
                *instruments_work(config, concept, instruments))


def _observed(config: StudyConfig, wanted: Callable[[str], bool], *, texts: bool = False) -> list[Part]:
    return [part for part in observations(config, asked_concept(config), ROLE, texts=texts) if wanted(part.name)]


@takes(SingleError)
def patch_parts(config: StudyConfig, parts: Names = ("residual",), *, swap: str = "context", max_word_pairs: Count = 2
                ) -> list[Part]:
    """Activation patching of some parts (see `measure_patching`); with `quick` one word pair a category, two places, fewer controls;
    with `minutes` what was chosen.

    One `Part` a direction and part, so that an interrupted run keeps what is finished; each brings its own rows of the `screen`.

    Errors: SingleError for an unknown part, PatchError for an unknown swap, or the screen alone.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise SingleError(f"unknown part {unknown[0] if unknown else ''!r}. Known: {', '.join(PARTS)}.")
    if swap not in SWAPS:
        raise PatchError(f"unknown swap {swap!r}. Known: {', '.join(SWAPS)}.")
    taken = config.taken(depth_of(config.aligned))
    pairs, exact = 1 if config.quick else min(max_word_pairs, taken.pairs), [part for part in PARTS if part in parts and part != "screen"]
    if not exact:
        raise PatchError(f"the screen alone is no part to patch: name some of {', '.join(part for part in PARTS if part != 'screen')} too.")
    screen = [part for part in parts if part == "screen"]
    return [Part(f"patching_{swap}_{direction}_{'-'.join((part, *screen))}_{pairs}_{ROLE}", ROLE, False,
                 partial(_patched, config, (part, *screen), direction, swap, pairs),
                 partial(_patch_loads, config, part, bool(screen), swap, pairs)) for direction in DIRECTIONS for part in exact]


def _patched(config: StudyConfig, parts: Sequence[str], direction: str, swap: str, pairs: int, model: HookedModel,
             advance: Callable[[int], None]) -> pd.DataFrame:
    few = {} if config.taken(model.n_layers).every else {"controls": FEW_CONTROLS, "marks": HEAD_MARKS.get(swap)}
    layers = read_layers(config, model.n_layers) if config.amounts is not None else None
    return measure_patching(model, load_concept(config.concept), config.cue, swap=swap, parts=parts, directions=[direction], layers=layers,
                            max_word_pairs=pairs, seed=config.seed, progress=advance, **few)    # type: ignore[arg-type]


def _patch_loads(config: StudyConfig, part: str, screen: bool, swap: str, pairs: int) -> list[Load]:
    """A run of each prompt, behind the phrase that settles its sense, for each place and control; the screen as so many steps there and
    back."""
    concept, depth = load_concept(config.concept), depth_of(config.aligned)
    prompts = implicit_prompts(concept, config.cue, seed=config.seed, max_word_pairs=pairs)
    if swap == "context":
        lead = filled(concept.steering_phrase(concept.group_sense), **{role: prompts[0].labels[role] for role in ("marked", "unmarked")})
        prompts = [prompt.prefixed(f"{lead}. ") for prompt in prompts]
    else:
        prompts = prompts[::2]
    taken, layers = config.taken(depth), read_layers(config, depth) if config.amounts is not None else list(range(depth))
    places = {"residual": len(MARKS[swap] if taken.every else HEAD_MARKS[swap]) * (1 + len(CONTROLS if taken.every else FEW_CONTROLS)),
              "added": len(MARKS[swap] if taken.every else HEAD_MARKS[swap]) * 4,
              "heads": len(HEAD_MARKS[swap]) * 2 * int(load_config(config.aligned).get_text_config().num_attention_heads)}
    found = [Load(prompts, times=places[part] * len(layers), written=[Site(layer, "marked") for layer in layers])]
    return [*found, Load(prompts, times=TRAINING_COST * SCREEN_STEPS)] if screen else found


@takes(SingleError)
def measure_parts(config: StudyConfig, out: File, parts: Parts) -> list[Result]:
    """Run or read some parts in the folder `out`; their results, in order. Errors: as `run_parts`."""
    out, parts = Path(out), many(parts)
    run_parts(config, out, parts)
    return [load_result(out / f"{part.name}.parquet") for part in parts]


# ---- tables ------------------------------------------------------------------------------------------------------------


@takes(SingleError)
def bias_tables(rows: pd.DataFrame, outcome: str = "both") -> dict[str, pd.DataFrame]:
    """What answers say: `rates` (see `summarise`; per kind and category, and of all categories), `outcomes`, `log_odds`, `position`.

    rates are of texts, but by probability where `outcome` is that; position is judged by the outcome that leads (see `log_odds.leading`);
    their column `judged_by` says by which. outcomes: text and probability side by side (see `log_odds.outcomes_table`), and which `leads`.

    log_odds: of the two complete assignments to an implicit prompt (nats), per category and of all: n, mean, low, high (95 %, over word
    pairs and templates: `intervals.mean_interval`), positive (share of prompts that give the stereotyped one more probability), scored and
    improbable (see `improbable_share`). position: see `position_effect`.
    """
    lead, by_name = leading(rows, outcome), "probability" if outcome == "probability" else "text"
    measured, rows = rows, judged(rows, leading(rows, by_name))
    every = rows.assign(category="all")
    both = pd.concat([every, rows], ignore_index=True)
    by = ["model", "treatment", "kind", "category"]
    implicit = both[both["kind"] == "implicit"]
    odds = [{**dict(zip(by, key, strict=True)), **_odds(group)} for key, group in implicit.groupby(by, sort=False)]
    outcomes = outcomes_table(measured, ("model", "treatment"))
    return {"rates": summarise(both, by).assign(judged_by=by_name), "outcomes": outcomes.assign(leads=outcomes["kind"].map(lead)),
            "log_odds": pd.DataFrame.from_records(odds),
            "position": position_effect(judged(measured, lead), ("model", "treatment")).assign(judged_by=lead.get("implicit", "text"))}


def _odds(group: pd.DataFrame) -> dict[str, float | int]:
    values = group["log_odds"].to_numpy(float)
    low, high = column_interval(group, "log_odds")
    return {"n": len(group), "mean": float(values.mean()), "low": low, "high": high, "positive": float((values > 0).mean()),
            **improbable_share(group)}


@takes(SingleError)
def awareness_tables(results: Results) -> dict[str, pd.DataFrame]:
    """What instruments read: `readings` (see `summarise_readings`; per instrument and control) and `layers` (the readings themselves).

    Of readings, `reads` says whether the instrument reads this model ("not tried" without qualification); `qualification` has the whole
    verdicts, and where each places the ambiguous prompts between the two senses (see `qualified.Qualification`).
    invalid_share is the share of readings that say nothing: texts of no sense (SelfIE), layers whose probe does not beat its
    stronger control.
    """
    given = many(results)
    tried = [result for result in given if str(result.provenance.get("part", "")).startswith(f"{QUALIFIED}_")]
    rows = pd.concat([result.rows for result in given if result not in tried], ignore_index=True)
    by = ["model", "treatment", "instrument", "control"]
    blind = rows["blind"].isna()
    silent = blind if "reading" not in rows else blind | ((rows["instrument"] == "selfie") & (rows["reading"] == "other"))
    shares = silent.groupby([rows[key] for key in by], sort=False).mean().rename("invalid_share").reset_index()
    layers = summarise_readings(rows[rows["control"] == ""], [*by, "layer"])
    readings = summarise_readings(rows, by).merge(shares, on=by)
    if not tried:
        return {"readings": readings.assign(reads="not tried"), "layers": layers}
    seed = int(tried[0].provenance.get("config", {}).get("seed", 0))
    found = instruments_of(pd.concat([result.rows for result in tried], ignore_index=True), seed=seed)
    verdicts = found[found["setting"] == "paper"].set_index("instrument")["verdict"]
    return {"qualification": found, "readings": readings.assign(reads=readings["instrument"].map(verdicts).fillna("not tried")),
            "layers": layers}


@takes(SingleError)
def patch_tables(rows: pd.DataFrame | Results) -> dict[str, pd.DataFrame]:
    """What patches do: `places` (see `summarise_patching`; every direction, control, stream, mark, layer and head) and, of the residual
    stream at all identifiers, `depth` (see `depth_profile`). Takes rows, or the results of `patch_parts`."""
    if not isinstance(rows, pd.DataFrame):
        rows = pd.concat([result.rows for result in many(rows)], ignore_index=True)
    tables = {"places": summarise_patching(rows, ("model", "treatment", "direction", "control", "stream", "mark", "layer", "head"))}
    if (rows["stream"] == "resid_post").any():
        tables["depth"] = depth_profile(rows, mark="all_identifiers" if (rows["mark"] == "all_identifiers").any() else "identifiers")
    return tables


def strongest_places(places: pd.DataFrame, most: int = 10) -> pd.DataFrame:
    """The heads, attention and MLP outputs of the largest mean effects, with the mean of the random control beside each (control_mean)."""
    inner = places[places["stream"] != "resid_post"]
    keys = ["direction", "stream", "mark", "layer", "head"]
    random = inner.loc[inner["control"] == "random", [*keys, "mean"]].rename(columns={"mean": "control_mean"})
    own = inner[inner["control"] == ""].sort_values("mean", ascending=False, kind="stable").head(most)
    return own.merge(random, on=keys, how="left")


# ---- steering ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SteeringPlan:
    """What `alignblind steer` tries: vectors of a sense, in one or several groups of layers, at some strengths."""

    sense: str
    method: str
    how: How | None
    layers: tuple[Annotated[tuple[Layer, ...], Listed(some=True)], ...]
    strengths: Annotated[tuple[Strength, ...], Listed(some=True)]
    positions: Annotated[tuple[str, ...], Listed()] | None

    def __post_init__(self) -> None:
        check_fields(self, SingleError)

    @classmethod
    def create(cls, config: StudyConfig, *, sense: str = "", method: str = "replacement", how: str = "", layers: str = "",
               strengths: str = "1", positions: str = "") -> "SteeringPlan":
        """From texts, before any weights are loaded. Errors: SingleError, LoraError, EditError or ConceptError for what does not exist."""
        concept = load_concept(config.concept)
        concept.both_senses(config.cue)
        sense = sense or concept.group_sense
        concept.steering_phrase(sense)
        for name, value, known in (("method", method, get_args(Method)), ("how", how, ("", *get_args(How)))):
            if value not in known:
                raise SingleError(f"unknown {name} {value!r}. Known: {', '.join(filter(None, known))}.")
        places = tuple(name.strip() for name in positions.split(",") if name.strip())
        if positions and not places:
            raise SingleError(f"{positions!r} names no positions: give some of {', '.join(get_args(Positions))}, or leave them out.")
        unknown = [name for name in places if name not in get_args(Positions)]
        if unknown:
            raise SingleError(f"unknown positions {unknown[0]!r}. Known: {', '.join(get_args(Positions))}.")
        try:
            factors = tuple(float(text) for text in strengths.split(","))
        except ValueError:
            raise SingleError(f"{strengths!r} are no strengths: give numbers separated by commas, such as 0.5,1,2.") from None
        if config.protocol == "paper" and method != "replacement":
            raise SingleError(f"the protocol 'paper' has no method {method!r}: the paper replaces; choose the method replacement, or the "
                              "protocol best.")
        depth = depth_of(config.aligned)
        groups = layer_windows(depth) if layers == "windows" else [choose_layers(layers, depth)] if layers else [early_window(depth)]
        replaces = (how or ("replace" if method == "replacement" else "add")) == "replace"
        if replaces != (method == "replacement"):
            raise SingleError(f"the method {method} cannot {how or 'replace'}: replacement replaces, all others add or ablate.")
        if method != "replacement" and sense not in (concept.group_sense, concept.other_sense):
            raise SingleError(f"the method {method} leads from one sense to the other ({concept.group_sense}, {concept.other_sense}); "
                              f"{sense!r} is neither: replacement takes controls.")
        if replaces and places not in ((), ("identifiers",)):
            raise SingleError(f"a replacement acts at the identifiers alone, not at {positions}: leave the positions out.")
        if "prompt" in places and {"identifiers", "last"} & set(places):
            raise SingleError(f"the positions {positions} name tokens twice: the whole prompt holds its identifiers and its last token.")
        if factors != (1.0,) and replaces:
            raise SingleError("a replacement has no strength: choose another method to add a vector in doses.")
        return cls(sense, method, how or None, tuple(map(tuple, groups)), factors, places or None)    # type: ignore[arg-type]

    def vectors(self, model: HookedModel, concept: Concept, cue: str, seed: int) -> SteeringVectors:
        """The vectors of all layers that are tried."""
        layers = sorted({layer for group in self.layers for layer in group})
        return steering_vectors(model, concept, cue, self.sense, self.method, layers=layers, seed=seed)


def steer_parts(config: StudyConfig, plan: SteeringPlan, out: Path) -> list[Part]:
    """Implicit answers (balanced design) untreated, under every treatment of a plan, and under several draws of noise that does as much.

    Noise is asked of at most `NOISE_PAIRS` word pairs a category. Rows say what each treatment does (`with_effects`). The vectors are saved
    on the way: see `vectors_file`. Errors: EditError if anything else stands there.
    """
    refuse_taken(vectors_file(plan, out), mine=is_vectors, kind=EditError)
    return [Part(f"steering_{_digest(plan)}_{ROLE}", ROLE, False, partial(_steered, config, plan, out),
                 partial(_steer_loads, config, plan))]


def _digest(plan: SteeringPlan) -> str:
    return f"{plan.sense}_{plan.method}_{hashlib.sha256(repr(plan).encode()).hexdigest()[:8]}"


def vectors_file(plan: SteeringPlan, out: Path) -> Path:
    """Where the vectors of a plan lie (see `steering.load_vectors`)."""
    return out / f"vectors_{_digest(plan)}.safetensors"


def _steered(config: StudyConfig, plan: SteeringPlan, out: Path, model: HookedModel, advance: Callable[[int], None]) -> pd.DataFrame:
    concept = asked_concept(config)
    vectors = plan.vectors(model, concept, config.cue, config.seed)
    vectors.save(vectors_file(plan, out))
    treatments = list(steering_grid(vectors, plan.layers, plan.strengths, how=plan.how, positions=plan.positions,
                                    protocol=config.protocol if plan.method == "replacement" else "best"))
    prompts, few = _steer_prompts(config, concept)
    draws = config.taken(model.n_layers).draws
    noise = [one for treatment in treatments for one in noise_placebos(model, treatment, prompts, n=draws, seed=config.seed)]
    rows = [ask_under(model, concept, asked, some, config.decoding, advance)
            for asked, some in ((prompts, [UNTREATED, *treatments]), (few, noise))]
    return with_effects(pd.concat(rows, ignore_index=True), treatment_effects(model, [*treatments, *noise], prompts))


def _steer_prompts(config: StudyConfig, concept: Concept) -> tuple[list[Prompt], list[Prompt]]:
    """What is asked under every treatment, and what under noise."""
    most = config.word_pairs("balanced")
    prompts, few = (implicit_prompts(concept, config.cue, design="balanced", seed=config.seed, max_word_pairs=pairs)
                    for pairs in (most, min(NOISE_PAIRS, most or NOISE_PAIRS)))
    return prompts, few


def _steer_loads(config: StudyConfig, plan: SteeringPlan) -> list[Load]:
    concept, draws = asked_concept(config), config.taken(depth_of(config.aligned)).draws
    prompts, few = _steer_prompts(config, concept)
    treatments, sample = len(plan.layers) * len(plan.strengths), prompts[:SAMPLE]
    new, chat = config.decoding.max_new_tokens, config.chat
    return [Load.of_answers(concept, prompts, new, chat, 1 + treatments), Load.of_answers(concept, few, new, chat, treatments * draws),
            Load(sample, times=treatments * (MEASURING + MATCHING * draws), chat=config.chat)]


@takes(SingleError)
def steer_tables(rows: pd.DataFrame, outcome: str = "both") -> dict[str, pd.DataFrame]:
    """`rates` per treatment (see `summarise`), paired `differences` from untreated, and treatments beside their noise (`placebo_bands`).

    Differences are corrected for being many: those of the treatments, and apart from them those of the noise; beside them stands how many
    of a treatment's scored answers are improbable (`improbable_share`). Answers are judged by `outcome` (see `log_odds.leading`).
    """
    lead = leading(rows[rows["treatment"] == "untreated"], outcome)
    rows = judged(rows, lead)
    noise = rows["placebo_of"].fillna("") != "" if "placebo_of" in rows else rows["treatment"].str.startswith("noise_like_")
    families = [rows[~noise], rows[noise | (rows["treatment"] == "untreated")]]
    differences = [corrected(paired_differences(some, by=("kind",))) for some in families if some["treatment"].nunique() > 1]
    shares = pd.DataFrame([{"treatment": name, **improbable_share(group)} for name, group in rows.groupby("treatment", sort=False)])
    return {"rates": summarise(rows, ["treatment", "kind"]).assign(judged_by=lead["implicit"]), "placebos": placebo_bands(rows),
            "differences": pd.concat(differences, ignore_index=True).merge(shares, on="treatment", how="left")}
