"""How much of everything a study measures: all of it, the share of a quick look, or what was chosen so that it fits into some minutes.

What a study asks (word pairs, layers, controls, windows, adapters) is bounded in this one place. Does NOT know parts, nor their time.
"""

from dataclasses import dataclass, fields
from typing import Any

from alignblind_mi.borders.settings import MOST, Count, Text, Whole, check_fields
from alignblind_mi.borders.texts import one_line
from alignblind_mi.mitigations.lora_settings import LAYER_GROUPS
from alignblind_mi.mitigations.placebos import SEEDS
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.competence import PAIRS

FEWEST_TOLD = 24    # word pairs of competence: as few as anything is told from
SHALLOW = 8    # layers up to which a quick study reads all
BY_USE = ("early", "late", "middle", "all")    # the layer groups of adapters: the first that are trained where not all are


@dataclass(frozen=True)
class Amounts:
    """How much of everything is measured, at most. Layers are thinned evenly, the first and the last kept.

    pairs: word pairs a category, of either design. competence: word pairs of the qualification. layers: those that instruments read;
    texts: those of which texts are written (0: none are). draws: of noise. adapters: layer groups that are trained. controls: all of them
    (else random and wrong token alone); dear: those of texts, and probes of random weights. every: all windows of steering, all rivals of a
    comparison, all places of a patch (else few, as in a quick look). tried: the qualification at eight layers, with all settings of the
    patchscope (else four and few). said: what was left out, in a sentence.
    """

    __repr__ = one_line

    pairs: Count
    competence: Count
    layers: Count
    texts: Whole
    draws: Count
    adapters: Whole
    controls: bool
    dear: bool
    every: bool
    tried: bool
    said: Text = ""

    def __post_init__(self) -> None:
        check_fields(self, ModelError)

    @classmethod
    def read(cls, record: Any, where: object) -> "Amounts":
        """What a folder's note says was chosen. Errors: ModelError naming the file `where` it stands."""
        if not isinstance(record, dict) or set(record) != {field.name for field in fields(cls)}:
            raise ModelError(f"{where} does not say how much is measured (amounts): restore it, or give another --out.")
        return cls(**record)

    @property
    def groups(self) -> list[str]:
        """The layer groups whose adapters are trained."""
        return [name for name in LAYER_GROUPS if name in BY_USE[: self.adapters]]

    def at_most(self, other: "Amounts") -> bool:
        """Whether nothing is more than another's."""
        return all(mine <= others for mine, others in zip(self._numbers(), other._numbers(), strict=True))

    def capped(self, other: "Amounts") -> "Amounts":
        """The smaller of each."""
        return Amounts(*map(min, self._numbers(), other._numbers()))

    def _numbers(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "said"]


FULL = Amounts(MOST, PAIRS, MOST, MOST, SEEDS, len(LAYER_GROUPS), True, True, True, True)
QUICK = Amounts(MOST, FEWEST_TOLD, 4, 3, SEEDS, 2, True, False, False, False)    # its word pairs are settings of their own
QUICK_SHALLOW = Amounts(MOST, FEWEST_TOLD, MOST, MOST, SEEDS, 2, True, True, False, False)

# Thinner and thinner, each about two thirds of the one before: layers and pairs first, what is compared then, texts last.
RUNGS = tuple(Amounts(*row) for row in (
    (32, 30, 24, 16, 5, 4, True, True, True, True),
    (20, 30, 16, 8, 5, 4, True, True, True, True),
    (14, 30, 12, 6, 4, 4, True, False, True, True),
    (10, 30, 8, 5, 3, 4, True, False, True, False),
    (8, 24, 8, 4, 3, 2, True, False, False, False),
    (6, 24, 6, 3, 3, 2, True, False, False, False),
    (4, 24, 5, 3, 2, 2, True, False, False, False),
    (3, 24, 4, 2, 2, 2, False, False, False, False),
    (2, 24, 4, 2, 2, 1, False, False, False, False),
    (2, 24, 3, 1, 2, 0, False, False, False, False),
    (1, 24, 3, 1, 2, 0, False, False, False, False),
    (1, 24, 2, 0, 2, 0, False, False, False, False)))


def ladder(full: Amounts) -> list[Amounts]:
    """Thinner and thinner amounts, from `full` on: none has more of anything than the one before, and no two are the same."""
    found = [full]
    for rung in RUNGS:
        thinner = rung.capped(found[-1])
        found += [thinner] if thinner != found[-1] else []
    return found
