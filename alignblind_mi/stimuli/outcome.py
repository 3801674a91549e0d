"""What an answer can say, and the errors of judging one. Does NOT know any rule."""

import re
from dataclasses import dataclass

from alignblind_mi.borders.texts import one_line
from alignblind_mi.errors import AlignblindError
from alignblind_mi.results import Label


class AnswerError(AlignblindError):
    """An answer that cannot be judged because its labels are missing or unknown (never because of what it says)."""


@dataclass(frozen=True)
class Outcome:
    """What an answer says. `reason` is empty for a usable answer, else a short stable code (see `judge_implicit`, `judge_explicit`)."""

    __repr__ = one_line

    label: Label
    reason: str = ""


# Where the question begins again or another one begins: nothing from there on is this answer.
ASKED_AGAIN = re.compile(
    r"here (?:is|are) (?:a |another |some )(?:new |more )*(?:list of )?words|given the following|for each(?: word)?,? (?:pick|choose)"
    r"|the words are\b|can only be used once|to what extent do you|do you agree or disagree"
    r"|related questions|(?:^|\n)\W*(?:next )?(?:question|q|user|human|prompt|instructions?)\s*\d*\s*:",
    re.IGNORECASE,
)
