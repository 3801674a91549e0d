"""One question about one model: bias, awareness or patching, as parts of a study of that model alone.

Rows are kept, resumed and checked as those of a whole study are (`run_parts`). This module does NOT know how results are shown.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from alignblind_mi.concept import load_concept
from alignblind_mi.contrast import SWAPS, PatchError
from alignblind_mi.errors import AlignblindError
from alignblind_mi.model import HookedModel
from alignblind_mi.patching import CONTROLS, summarise_patching
from alignblind_mi.prompts import DESIGNS
from alignblind_mi.results import Result, load_result
from alignblind_mi.statistics import mean_interval, position_effect, summarise
from alignblind_mi.studies.awareness import summarise_readings
from alignblind_mi.studies.patching import HEAD_MARKS, PARTS, depth_profile, measure_patching
from alignblind_mi.studies.study import Part, StudyConfig, instruments, observations, run_parts

ROLE = "model"    # what the one model is called in the rows and in the names of the parts
QUICK_CONTROLS = CONTROLS[:2]
PROMPT_PARTS = {"balanced": f"balanced_{ROLE}", "published": f"behaviour_{ROLE}"}


class SingleError(AlignblindError):
    """A design, instrument or part that does not exist."""


def bias_parts(config: StudyConfig, design: str = "balanced") -> list[Part]:
    """Implicit and explicit answers in one design. Errors: SingleError for an unknown one."""
    if design not in DESIGNS:
        raise SingleError(f"unknown design {design!r}. Known: {', '.join(DESIGNS)}.")
    return _observed(config, lambda name: name == PROMPT_PARTS[design])


def awareness_parts(config: StudyConfig, names: Sequence[str] = (), reading: str = "paper") -> list[Part]:
    """The instruments `names` (default: all that the concept has what is needed for); `reading` is the patchscope's question.

    Errors: SingleError for an unknown instrument, ConceptError for a cue without senses or an unknown question.
    """
    concept = load_concept(config.concept)
    concept.both_senses(config.cue)
    concept.interpretation(reading)
    parts = {"patchscope": f"awareness_{ROLE}_{reading}",
             **{name: f"reading_{name}_{ROLE}" for name in instruments(concept, config.cue, config.selfie)}}
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise SingleError(f"unknown instrument {unknown[0]!r}. With the concept {concept.name!r} there are: {', '.join(parts)}.")
    return _observed(config, lambda name: name in {parts[one] for one in names or parts})


def _observed(config: StudyConfig, wanted: Callable[[str], bool]) -> list[Part]:
    return [part for part in observations(config, load_concept(config.concept), ROLE) if wanted(part.name)]


def patch_parts(config: StudyConfig, parts: Sequence[str] = ("residual",), *, swap: str = "context", max_word_pairs: int = 2
                ) -> list[Part]:
    """Activation patching of some parts (see `measure_patching`); with `quick` one word pair a category, two places, fewer controls.

    Errors: SingleError for an unknown part, PatchError for an unknown swap.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise SingleError(f"unknown part {unknown[0] if unknown else ''!r}. Known: {', '.join(PARTS)}.")
    if swap not in SWAPS:
        raise PatchError(f"unknown swap {swap!r}. Known: {', '.join(SWAPS)}.")
    pairs = 1 if config.quick else max_word_pairs
    compute = partial(_patched, config, tuple(parts), swap, pairs)
    return [Part(f"patching_{swap}_{'-'.join(parts)}_{pairs}_{ROLE}", ROLE, False, compute)]


def _patched(config: StudyConfig, parts: Sequence[str], swap: str, pairs: int, model: HookedModel, advance: Callable[[int], None]
             ) -> pd.DataFrame:
    quick = {"controls": QUICK_CONTROLS, "marks": HEAD_MARKS.get(swap)} if config.quick else {}
    return measure_patching(model, load_concept(config.concept), config.cue, swap=swap, parts=parts, max_word_pairs=pairs,
                            seed=config.seed, progress=advance, **quick)    # type: ignore[arg-type]


def measure_parts(config: StudyConfig, out: Path, parts: Sequence[Part]) -> list[Result]:
    """Run or read some parts in the folder `out`; their results, in order. Errors: as `run_parts`."""
    run_parts(config, out, parts)
    return [load_result(out / f"{part.name}.parquet") for part in parts]


# ---- tables ------------------------------------------------------------------------------------------------------------


def bias_tables(rows: pd.DataFrame, *, seed: int = 0) -> dict[str, pd.DataFrame]:
    """What answers say: `rates` (see `summarise`; per kind and category, and of all categories), `log_odds`, `position`.

    log_odds: of the two complete assignments to an implicit prompt (nats), per category and of all: n, mean, low, high (95 %, word pairs
    and templates resampled), positive (share of prompts that give the stereotyped one more probability). position: see `position_effect`.
    """
    every = rows.assign(category="all")
    both = pd.concat([every, rows], ignore_index=True)
    by = ["model", "treatment", "kind", "category"]
    implicit = both[both["kind"] == "implicit"]
    odds = [{**dict(zip(by, key, strict=True)), **_odds(group, seed)} for key, group in implicit.groupby(by, sort=False)]
    return {"rates": summarise(both, by, seed=seed), "log_odds": pd.DataFrame.from_records(odds),
            "position": position_effect(rows, ("model", "treatment"))}


def _odds(group: pd.DataFrame, seed: int) -> dict[str, float | int]:
    values = group["log_odds"].to_numpy(float)
    low, high = mean_interval(values, [group["word_pair"].to_numpy(), group["template"].to_numpy()], seed=seed)
    return {"n": len(group), "mean": float(values.mean()), "low": low, "high": high, "positive": float((values > 0).mean())}


def awareness_tables(results: Sequence[Result]) -> dict[str, pd.DataFrame]:
    """What instruments read: `readings` (see `summarise_readings`; per instrument and control) and `layers` (the readings themselves).

    invalid_share is the share of readings that say nothing: texts of no sense (SelfIE), layers without a direction (probes).
    """
    rows = pd.concat([result.rows for result in results], ignore_index=True)
    by = ["model", "treatment", "instrument", "control"]
    blind = rows["blind"].isna()
    silent = blind if "reading" not in rows else blind | ((rows["instrument"] == "selfie") & (rows["reading"] == "other"))
    shares = silent.groupby([rows[key] for key in by], sort=False).mean().rename("invalid_share").reset_index()
    layers = summarise_readings(rows[rows["control"] == ""], [*by, "layer"])
    return {"readings": summarise_readings(rows, by).merge(shares, on=by), "layers": layers}


def patch_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What patches do: `places` (see `summarise_patching`; every direction, control, stream, mark, layer and head) and, of the residual
    stream at all identifiers, `depth` (see `depth_profile`)."""
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
