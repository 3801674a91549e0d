"""What a part of a study is: its name, the model it needs, how its rows are computed, and what that asks. Does NOT know which there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd

from alignblind_mi.borders.settings import Listed
from alignblind_mi.borders.texts import one_line
from alignblind_mi.models.chat import Chat, in_chat
from alignblind_mi.models.edits import Site, Treatment
from alignblind_mi.models.model import HookedModel
from alignblind_mi.progress import Advance
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import Prompt, worded_assignments

TRAINING_COST = 3    # a training step against a forward pass over the same tokens
Treat = Callable[[HookedModel], Treatment]


@dataclass(frozen=True)
class Load:
    """What a part asks of a model: prompts, each read `times` times and continued by at most `new_tokens`.

    `chat` is what they are asked in (None: raw); `scored` are the answers whose probability is read behind each prompt; `written` are
    places of the stream that are written into, by turns.
    """

    __repr__ = one_line

    prompts: Sequence[Prompt]
    new_tokens: int = 0
    times: int = 1
    chat: Chat | None = None
    scored: Sequence[Sequence[str]] = ()
    written: Sequence[Site] = ()

    @classmethod
    def of_answers(cls, concept: Concept, prompts: Sequence[Prompt], new_tokens: int, chat: Chat | None, times: int = 1) -> "Load":
        """Questions of one kind that are answered; of implicit ones both answers are scored as well."""
        implicit = bool(prompts) and prompts[0].labels["kind"] == "implicit"
        scored = [[text for both in worded_assignments(concept, one) for text in both] for one in prompts] if implicit else ()
        return cls(prompts, new_tokens, times, chat, scored)

    def texts(self, tokenizer: Any, name: str) -> list[str]:
        """What the model reads, by its tokenizer; `name` is the model's."""
        asked = self.prompts if self.chat is None else in_chat(self.prompts, tokenizer, self.chat, name)
        return [prompt.text for prompt in asked]


@dataclass(frozen=True)
class Part:
    """A piece of the study: its file name, the model it needs (with adapters or not), how its rows are computed, and what that asks.

    A part of one's own (see `run_parts`) need not say what it asks: `loads` is read by the forecast of a whole study, and where parts are
    divided among processes.
    """

    __repr__ = one_line

    name: str
    role: str
    adapters: bool
    compute: "Compute"
    loads: Callable[[], list[Load]] = list
    injects_at: int | None = None    # the layer of its model that it writes into: refused before anything runs if there is none
    piece: "Piece | None" = None    # how some of its rows are computed; of a part that is long, and whose rows do not depend on each other
    same_as: str = ""    # a part that asks the same of the same model: where it is finished, its rows are taken


Compute = Callable[[HookedModel, Advance], pd.DataFrame]
Piece = Callable[[int, int, HookedModel, Advance], pd.DataFrame]    # the i-th of n consecutive pieces of the rows, i from 0
Parts = Annotated[Part | Sequence[Part], Listed(once=False, alone=True)]    # one or many
Work = tuple[Compute, Callable[[], list[Load]]]


class Once:
    """What parts of one kind ask: made when it is first wanted, and left behind where a part goes to another process."""

    def __init__(self, make: Callable[[], list[Load]]) -> None:
        self.make, self.made = make, list[Load]()

    def __call__(self) -> list[Load]:
        """It."""
        self.made = self.made or self.make()
        return self.made

    def __reduce__(self) -> tuple[Any, ...]:
        return Once, (self.make,)
