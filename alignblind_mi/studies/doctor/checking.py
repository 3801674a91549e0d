"""Before an expensive run: is this model one that the instruments can be trusted on, and if not, what is to be done?

Checks of configuration and tokenizer come first and need no weights; then the model is loaded and compared with itself, computed in other
ways (one row at a time by transformers' own forward pass, without a cache, by transformer-lens, in other numbers). Every check says what
was measured, what it may be at most (or at least), and what to do. It does NOT change anything, nor judge a model's answers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.borders.settings import File, takes
from alignblind_mi.models.adapters import check_folders
from alignblind_mi.models.budget import release
from alignblind_mi.models.loading import check_config
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import AnySpec, ModelError, as_spec
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, Concept, Cue, load_concept
from alignblind_mi.studies.doctor.check import PROBLEMS, Check
from alignblind_mi.studies.doctor.with_weights import (
    Loaded,
    adapter_checks,
    answers_of,
    bridge_checks,
    cache_checks,
    drift_checks,
    engine_checks,
    lens_checks,
    padding_parity_checks,
)
from alignblind_mi.studies.doctor.without_weights import (
    DRIFT_PROMPTS,
    Subject,
    bos_checks,
    chat_checks,
    context_checks,
    generation_checks,
    memory_checks,
    offsets_checks,
    padding_checks,
    round_trip_checks,
    tokenizer_checks,
    words_checks,
)

BEFORE: dict[str, Callable[[Subject], Iterator[Check]]] = {
    "tokenizer": tokenizer_checks, "bos": bos_checks, "chat template": chat_checks, "padding token": padding_checks,
    "words": words_checks, "round trip": round_trip_checks, "offsets": offsets_checks, "context length": context_checks,
    "end tokens": generation_checks, "memory": memory_checks}
LOADED: dict[str, Callable[[Loaded], Iterator[Check]]] = {
    "engine": engine_checks, "padding": padding_parity_checks, "key-value cache": cache_checks, "logit lens": lens_checks,
    "transformer-lens": bridge_checks}


@takes(ModelError)
def check_up(model: AnySpec, concept: Concept | str | Path = DEFAULT_CONCEPT, *, cue: str | Cue = "", adapter: File | None = None,
             drift: bool = True, progress: Callable[[str], None] | None = None) -> pd.DataFrame:
    """Check a model for a concept and a cue (default: its first), perhaps with a LoRA adapter; one row per check, in their order.

    Columns: check, status (ok, warn, fail or skipped), found, measured, rule, bound, unit, advice: see `Check`. Weights are loaded only if
    no check before fails. `drift`: also load the model in other numbers (bfloat16 against float32), if they fit. `progress` is told what
    was checked.

    Errors: ModelError, ConceptError for a model, adapter or concept that cannot be reached or does not exist.
    """
    spec = as_spec(model).resolved()
    concept = concept if isinstance(concept, Concept) else load_concept(concept)
    check_config(spec)
    if adapter is not None:
        check_folders([adapter], spec.allow_pickle)
    subject = Subject(spec, concept, cue if isinstance(cue, Cue) else concept.cue(cue or concept.first_cue), adapter)
    found: list[Check] = []
    for check in _checks(subject, drift):
        found.append(check)
        if progress is not None:
            progress(f"{check.check}: {check.status}")
    return pd.DataFrame.from_records([asdict(check) for check in found])


def _checks(subject: Subject, drift: bool) -> Iterator[Check]:
    failed: list[str] = []
    for name, check in BEFORE.items():
        for made in [_skipped(name, failed)] if "tokenizer" in failed else _tried(name, check, subject):
            failed += [made.check] * (made.status == "fail")
            yield made
    if failed:
        yield from (_skipped(name, failed) for name in (*LOADED, "adapter", "drift"))
        return
    try:
        model = load_model(subject.spec)
    except ModelError as error:
        yield Check("weights", "fail", str(error), advice="nothing can be measured on them: see what was found")
        yield from (_skipped(name, ["weights"]) for name in (*LOADED, "adapter", "drift"))
        return
    loaded = Loaded(subject, model)
    for name, of_model in LOADED.items():
        yield from _tried(name, of_model, loaded)
    before = answers_of(loaded.model, subject, DRIFT_PROMPTS) if drift else None
    if subject.adapter is None:
        yield Check("adapter", "skipped", "no adapter was given")
    else:
        yield from _tried("adapter", adapter_checks, loaded)
    del model, loaded
    release()
    if before is None:
        yield Check("drift", "skipped", "not asked for")
    else:
        yield from _tried("drift", lambda asked: drift_checks(asked, before), subject)


def _skipped(name: str, failed: Sequence[str]) -> Check:
    return Check(name, "skipped", f"{' and '.join(failed)} failed: see there first")


def _tried(name: str, check: Callable[[Any], Iterator[Check]], subject: Any) -> list[Check]:
    """What a check found; an error on the way is a finding too."""
    try:
        return list(check(subject))
    except ModelError as error:
        return [Check(name, "fail", str(error), advice="see what was found")]
    except PROBLEMS as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Check(name, "fail", f"{type(error).__name__}: {said}", advice="this could not be run: report it with the model's name")]
