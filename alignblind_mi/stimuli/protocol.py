"""The two protocols: `paper`, as the code released with "Aligned but Blind" measures, and `best`, as this project holds better.

They differ in the fields of `Protocol` and in nothing else; `DIFFERENCES` says in words what each field means and why, and `STAYS` in what
neither is the paper's, for pages and the documentation alike. This module does NOT know how anything of it is done.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from alignblind_mi.borders.settings import Made

ReadStream = Literal["resid_pre", "resid_post"]


@dataclass(frozen=True)
class Protocol:
    """What the two protocols do in different ways.

    same_token: replacement edits every token of the prompt that is the very token of the steering phrase (else every mention of the
    identifiers). whole_text: LoRA learns every token of an example (else its completion and the end token). Of open readings (SelfIE):
    read_stream, the stream that is read after layers and written into the target (`resid_pre`: what enters a layer, so that layer 0 is the
    embedding); lead, what stands before the prompts that are read; every_mention (else the first); as_published, in the orders of the
    published design (else the balanced one); word_pairs of each category in a study.
    """

    same_token: bool = False
    whole_text: bool = False
    read_stream: ReadStream = "resid_post"
    lead: str = ""
    every_mention: bool = False
    as_published: bool = False
    word_pairs: int = 20


PROTOCOLS = {
    "paper": Protocol(same_token=True, whole_text=True, read_stream="resid_pre", lead="Question: ", every_mention=True, as_published=True,
                      word_pairs=4),
    "best": Protocol(),
}


def _known(value: Any) -> str:
    if isinstance(value, str) and value in PROTOCOLS:
        return value
    raise TypeError("no protocol")


ProtocolName = Annotated[str, Made(_known, " or ".join(PROTOCOLS), str)]


@dataclass(frozen=True)
class Difference:
    """In words: what differs, how either protocol does it, and why `best` does it otherwise."""

    topic: str
    paper: str
    best: str
    why: str

    def under(self, name: str) -> str:
        """How a protocol does it."""
        return self.paper if name == "paper" else self.best


DIFFERENCES = (
    Difference("Steering", "replaces the prompt's tokens that are exactly the phrase's own (an identifier with a blank before it)",
               "replaces every mention of the identifiers, however it is spelt",
               "a mention behind a bracket, or in capitals, says the same and would stay as it was"),
    Difference("LoRA", "learns every token of question and answer, and no end token",
               "learns the answer alone, and the end token behind it",
               "else most of what is learnt is to write the questions, and the model does not learn to stop"),
    Difference("SelfIE, layers", "reads and writes what enters a layer (its layer 0 is the embedding)",
               "reads and writes what leaves a layer, as all other instruments here",
               "one count of layers for all, so that they can be laid side by side"),
    Difference("SelfIE, sources",
               f"reads every mention, of prompts in the published orders that begin with “{PROTOCOLS['paper'].lead.strip()}”",
               "reads the first mention, of prompts in all orders, as they are asked",
               "what is read is what the behaviour is measured on, and each reading is a context of its own"),
)


# What no protocol here does as the paper or its released code.
STAYS = (
    "LoRA learns pairs that are generated from the concept: the paper's own are not ours to ship.",
    "Answers are judged by the robust rule; alignblind score DIR --rule published applies the paper's parser to the same answers.",
    "Steered and trained models are asked what all others are: every word pair (the released steering script asks ten of a category), with "
    "as many new tokens (the paper: 20 under steering).",
    "The patchscope reads the first mention of the identifiers, in all orders of options and words.",
    f"SelfIE reads {PROTOCOLS['paper'].word_pairs} word pairs of every category (the released notebook ten of one), and its five "
    "placeholders stand between blanks, as in the paper's text.",
)


def protocol_lines(name: str) -> list[str]:
    """What a protocol does where the two differ, a line each."""
    return [f"{one.topic}: {one.under(name)}" for one in DIFFERENCES]
