"""What of a study fits into some minutes: the fullest of ever thinner amounts that the loaded model has the time for.

A few rows of every kind are run by the loaded model, and all are reckoned by what these take. What is chosen decides which rows there are,
so it belongs to the configuration, and a folder that was begun with it goes on with it. Does NOT measure anything else.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter

from alignblind_mi.borders.settings import Positive, takes
from alignblind_mi.borders.texts import say, shown
from alignblind_mi.models.configs import depth_of, load_config
from alignblind_mi.models.loading import check_model
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies.amounts import FULL, Amounts, ladder
from alignblind_mi.studies.config import StudyConfig, as_begun, asked_concept
from alignblind_mi.studies.loads import Kind, TokenCount, seconds_of, timed
from alignblind_mi.studies.part import Load, Part
from alignblind_mi.studies.parts import study_parts, training_loads

PLANNED = 0.8    # of the minutes: tables, pages and what no load counts have the rest
TIMED = 0.1     # of the minutes, for measuring how long rows take
KEPT: list[HookedModel] = []    # the model that the rate was measured on, until a run takes it
PartsOf = Callable[[StudyConfig], Iterable[Part]]


def whole_study(config: StudyConfig) -> Iterable[Part]:
    """The parts of a study, with nothing skipped."""
    return study_parts(config, load_concept(config.concept))


@takes(ModelError)
def within(config: StudyConfig, minutes: Positive, parts: Callable[[StudyConfig], Iterable[Part]] = whole_study) -> StudyConfig:
    """The configuration thinned as little as fits into `minutes` on this machine, by what the loaded model needs for a few rows.

    `parts`: what is measured, as a function of a configuration, such as `bias_parts` (default: a whole study). Word pairs, layers (ends
    kept), controls, windows, adapters and draws of noise are thinned, texts at last; `amounts.said` says what was left out. Loading, and
    measuring the rate, count as well; four fifths of the minutes are planned, since tables and pages are not reckoned.

    Errors: ModelError where even the thinnest does not fit, with the minutes that it needs; for a quick configuration; as `load_model`.
    """
    chosen = _within(config, minutes, parts)
    KEPT.clear()
    return chosen


def _within(config: StudyConfig, minutes: float, parts: PartsOf) -> StudyConfig:
    begun = perf_counter()
    config = replace(config, minutes=minutes, amounts=None)
    check_model(config.aligned)
    counted = Counted(config, parts)
    loads = counted.loads(counted.ladder[0])
    if not loads:
        raise ModelError("how long these parts take cannot be reckoned: none says what it asks (Part.loads).")
    larger = max((config.base, config.aligned), key=_size)
    start = perf_counter()
    model = load_model(larger)
    loading = perf_counter() - start
    KEPT[:] = [model]
    rates = timed(model if config.chat is None else model.in_chat(config.chat), config, loads, counted.tokens, seconds=TIMED * 60 * minutes)
    loading *= counted.loadings(larger)
    fitting(counted, rates, spent=perf_counter() - begun, loading=loading)
    return fitting(counted, rates, spent=perf_counter() - begun, loading=loading)    # now with the time that counting took


def kept_model(spec: ModelSpec | None) -> HookedModel | None:
    """The model on which the rate was measured, if it is this one; it is held no longer."""
    found = next((model for model in KEPT if model.spec == spec), None)
    KEPT.clear()
    return found


class Counted:
    """What a configuration asks at each of the amounts of its ladder."""

    def __init__(self, config: StudyConfig, parts: PartsOf) -> None:
        self.config, self.tokens, self.concept = config, TokenCount(config), asked_concept(config)
        self.depth = depth_of(config.aligned)
        pairs = max(len(self.concept.categories[name].word_pairs())
                    for name in self.concept.cue(config.cue).categories or self.concept.categories)
        self.ladder = ladder(replace(FULL, pairs=pairs, layers=self.depth, texts=self.depth))
        self.parts = cache(lambda amounts: [part for part in _made(parts, replace(config, amounts=amounts)) if not part.same_as])

    def loadings(self, there: ModelSpec) -> int:
        """How often a model is loaded, when one is there already, which serves where it comes first."""
        asked = [(part.role == "base", part.adapters) for part in self.parts(self.ladder[0])]
        first = self.config.base if asked and asked[0][0] else self.config.aligned
        return len({*asked}) - (first == there and not asked[0][1])

    def loads(self, amounts: Amounts) -> list[Load]:
        """Everything that is asked, trainings among it."""
        parts = self.parts(amounts)
        trained = training_loads(replace(self.config, amounts=amounts), self.concept) if any(part.adapters for part in parts) else []
        return [*self.asked(amounts), *trained]

    def asked(self, amounts: Amounts) -> list[Load]:
        """What the parts ask, without trainings."""
        return [load for part in self.parts(amounts) for load in _loads(part)]


def _made(parts: PartsOf, config: StudyConfig) -> list[Part]:
    """The parts that a function makes. Errors: ModelError for what is none, or makes others."""
    if not callable(parts):
        raise ModelError(f"parts must be a function of a configuration, such as bias_parts, got {shown(parts)}.")
    made = parts(config)
    found = list(made) if isinstance(made, Iterable) else [made]
    if not all(isinstance(part, Part) for part in found):
        raise ModelError(f"parts must be a function that makes parts of a configuration, such as bias_parts; it made {shown(made)}.")
    return found


@cache
def _loads(part: Part) -> list[Load]:
    return part.loads()


def _size(spec: ModelSpec) -> int:
    """What tells the larger of two models."""
    config = load_config(spec).get_text_config()
    return int(config.num_hidden_layers * config.hidden_size**2)


def fitting(counted: Counted, rates: dict[Kind, float], *, spent: float = 0.0, loading: float = 0.0) -> StudyConfig:
    """The configuration with the fullest amounts that fit at given rates, when so many seconds are spent already and loading takes so many.

    Errors: ModelError where none fits.
    """
    config, rungs = counted.config, counted.ladder
    minutes = config.minutes or math.inf
    left = PLANNED * 60 * minutes - spent - loading

    def seconds(amounts: Amounts) -> float:
        return seconds_of(counted.loads(amounts), rates, counted.tokens)

    least = seconds(rungs[-1])
    if least > left:
        needed = (least + spent + loading) / PLANNED / 60
        raise ModelError(f"this does not fit into {_minutes(minutes)} here: thinned as far as it goes, it needs about "
                         f"{_up(needed):g} (minutes={_up(needed):g}, --minutes {_up(needed):g}); nothing was measured.")
    low, high = 0, len(rungs) - 1    # the first that fits lies between them
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(rungs[middle]) <= left else (middle + 1, high)
    planned = (seconds(rungs[low]) + spent + loading) / 60
    return replace(config, amounts=replace(rungs[low], said=_said(counted, rungs[low], planned)))


def _up(minutes: float) -> float:
    """Minutes rounded up, to two digits where they are few."""
    return float(math.ceil(minutes)) if minutes > 5 else math.ceil(10 * minutes) / 10


def _minutes(minutes: float) -> str:
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"


def thinned_to_fit(config: StudyConfig, out: Path, parts: PartsOf) -> StudyConfig:
    """The configuration as it runs in the folder `out`: where it asks for minutes, with the amounts that the folder was begun with, or
    with those that `within` chooses; says what was left out. Errors: as there."""
    if config.minutes is None or config.amounts is not None:
        return config
    config = as_begun(config, out)
    chosen = config if config.amounts is not None else _within(config, config.minutes or 0.0, parts)
    if chosen.amounts is not None:
        say(chosen.amounts.said, err=True)
    return chosen


# ---- what was left out -------------------------------------------------------------------------------------------------


def _said(counted: Counted, amounts: Amounts, planned: float) -> str:
    """What was thinned, how much of how much; what these parts have nothing of is not named."""
    full, minutes = counted.ladder[0], counted.config.minutes or math.inf
    rows, every = (sum(len(load.prompts) * load.times for load in counted.asked(one)) for one in (amounts, full))
    if rows == every and amounts.adapters == full.adapters:
        return f"Nothing was thinned: all {every:,} rows fit into {_minutes(minutes)} ({planned:.1f} planned)."
    left = [text for text in _left(counted, amounts) if text]
    return (f"Thinned to fit {_minutes(minutes)} ({planned:.1f} planned): {', '.join(left)}; {rows:,} of {every:,} rows are left, and "
            "intervals are as wide as that makes them.")


def _left(counted: Counted, amounts: Amounts) -> list[str]:
    full, names = counted.ladder[0], [part.name for part in counted.parts(counted.ladder[0])]

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in names)

    def share(field: str, what: str, there: bool) -> str:
        some, every = getattr(amounts, field), getattr(full, field)
        return f"{some} of {every} {what}" if there and some < every else ""

    pairs, of_pairs = (_word_pairs(counted, one) for one in (amounts, full))
    read, rivals, trained = has("awareness", "reading"), has("rival"), any(part.adapters for part in counted.parts(full))
    return [
        f"{pairs} of {of_pairs} word pairs a category" if pairs < of_pairs else "",
        share("layers", "layers", read or rivals or has("patching")),
        "no texts (SelfIE)" if has("reading_selfie", "qualified", "rival") and not amounts.texts else
        share("texts", "layers with texts", has("reading_selfie", "rival")),
        share("competence", "word pairs of the qualification", has("competence")),
        "instruments tried at 4 of 8 layers" if has("qualified") and full.tried and not amounts.tried else "",
        "controls random and wrong token alone" if read and not amounts.controls else
        "texts with the controls random and wrong token alone, probes without random weights" if read and not amounts.dear else "",
        "" if amounts.every else "two places and two controls of a patch" if has("patching") else
        "one or two treatments of a family" if rivals else "two windows of steering" if has("noise") else "",
        share("draws", "draws of noise", has("noise", "steering", "rival")),
        "no adapters" if (rivals or trained) and not amounts.adapters else share("adapters", "adapters", trained)]


def _word_pairs(counted: Counted, amounts: Amounts) -> int:
    """The most word pairs of a category that a part asks."""
    asked: dict[tuple[str, str, int], set[str]] = {}
    for part in counted.parts(amounts):
        for i, load in enumerate(_loads(part)):
            for prompt in load.prompts if load.new_tokens or load.written else ():
                if "competence" not in prompt.labels:
                    asked.setdefault((part.name, prompt.labels.get("category", ""), i), set()).add(prompt.labels.get("word_pair", ""))
    return max(map(len, asked.values()), default=0)

