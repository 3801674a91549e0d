"""The probability outcome from what a served model tells: the log-probabilities of its answer's tokens, and of the few likeliest others.

A model that is served cannot be asked how probable an answer of ours is. But where its own answer decides, the likeliest tokens name the
other answer too: the two differ from there on. This module does NOT know any framework or tokenizer; tokens come as texts.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignblind_mi.stimuli.answers import judge

NAN = float("nan")
NOTHING: dict[str, Any] = {"log_p_stereotyped": NAN, "log_p_reversed": NAN, "log_odds": NAN, "log_odds_first": NAN, "wordings": 0,
                           "log_p_endorsed": NAN, "log_p_refused": NAN, "log_odds_endorsed": NAN, "log_odds_bounded": False}
_OPPOSITE = {"stereotyped": "reversed", "reversed": "stereotyped"}
_MARKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"})    # of blanks, as byte-level and sentencepiece vocabularies write them


@dataclass(frozen=True)
class Token:
    """A token of an answer: its text, its log-probability (nats), and those of the likeliest tokens there, itself among them."""

    text: str
    log_p: float
    likeliest: tuple[tuple[str, float], ...]


def probability_columns(tokens: Sequence[Token], answer: str, labels: Mapping[str, Any], positions: Sequence[tuple[str, str]] = ()
                        ) -> dict[str, Any]:
    """The columns of `measure_behaviour` that hold log-probabilities, as far as the tokens of one answer tell them; NaN otherwise.

    Implicit: at the token where the answer decides (see `deciding_place`), log_odds (nats) is that of the identifier that the stereotype
    takes there against the other one; log_p_* add the log-probability of the answer up to there. Explicit: that the answer begins with
    one of the endorsing answers of `positions` (endorsing, not endorsing), against the others, up to where its own text has chosen.

    `log_odds_bounded`: one side was not among the likeliest tokens; the probability of the least likely of these stands for it, so that
    the log-odds have the right sign, and are further from 0 than they are given.
    """
    places = _places(tokens, answer)
    if labels["kind"] == "explicit":
        found = _taken([tokens[i] for i, place in enumerate(places) if place is not None], positions)
        return NOTHING | ({} if found is None else {"log_p_endorsed": found[0], "log_p_refused": found[1],
                                                    "log_odds_endorsed": found[0] - found[1], "log_odds_bounded": found[2]})
    decided = deciding_place(answer, labels)
    at = next((i for i, place in enumerate(places) if decided and place and place[0] <= decided[0] < place[1]), None)
    if decided is None or at is None:
        return dict(NOTHING)
    chosen, outcome = decided[1], decided[2]
    other = "unmarked" if chosen == "marked" else "marked"
    found = _sides(tokens[at], str(labels[chosen]), str(labels[other]))
    if found is None:
        return dict(NOTHING)
    before = sum(token.log_p for token in tokens[:at])
    own, rival = found[0] + before, found[1] + before
    stereotyped, turned = (own, rival) if outcome == "stereotyped" else (rival, own)
    odds = stereotyped - turned
    return NOTHING | {"log_p_stereotyped": stereotyped, "log_p_reversed": turned, "log_odds": odds, "log_odds_first": odds, "wordings": 1,
                      "log_odds_bounded": found[2]}


def deciding_place(answer: str, labels: Mapping[str, Any]) -> tuple[int, str, str] | None:
    """Where a valid implicit answer decides: (character, role of the identifier there, outcome); None for an invalid one.

    It is the last mention of an identifier from which on both identifiers, exchanged, make the opposite answer.
    """
    outcome = judge(answer, labels).label
    if outcome not in _OPPOSITE:
        return None
    roles = {str(labels[role]).casefold(): role for role in ("marked", "unmarked")}
    names = re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(name) for name in sorted(roles, key=len, reverse=True))})(?!\w)", re.IGNORECASE)
    other = {name: str(labels["unmarked" if role == "marked" else "marked"]) for name, role in roles.items()}
    for found in reversed(list(names.finditer(answer))):
        exchanged = names.sub(lambda match: other[match.group().casefold()], answer[found.start() :])
        if judge(answer[: found.start()] + exchanged, labels).label == _OPPOSITE[outcome]:
            return found.start(), roles[found.group().casefold()], outcome
    return None


def _places(tokens: Sequence[Token], answer: str) -> list[tuple[int, int] | None]:
    """The characters of the answer that each token wrote; None for one that wrote nothing of it (a blank, an end mark, another token)."""
    places: list[tuple[int, int] | None] = []
    cursor = 0
    for token in tokens:
        text = token.text.translate(_MARKS).strip()
        at = answer.find(text, cursor) if text else -1
        if at < 0 or answer[cursor:at].strip():
            places.append(None)
            continue
        places.append((at, at + len(text)))
        cursor = at + len(text)
    return places


def _taken(tokens: Sequence[Token], positions: Sequence[tuple[str, str]]) -> tuple[float, float, bool] | None:
    """log P that an answer begins by endorsing and by not endorsing, by the likeliest tokens from its first one to the one that chooses."""
    sides = [[pair[side].strip().casefold() for pair in positions] for side in (0, 1)]
    found: tuple[list[float], list[float]] = ([], [])
    said, log_p, least = "", 0.0, 0.0
    for token in tokens:
        for text, own in token.likeliest:
            opened = [_opens(said + text, side) for side in sides]
            if opened[0] != opened[1]:
                found[opened.index(True)].append(log_p + own)
        least = log_p + min(own for _, own in token.likeliest)
        said += token.text
        log_p += token.log_p
        if sum(_opens(said, side) for side in sides) != 2:    # it has chosen, or says something else
            break
    return _two(found[0], found[1], least)


def _sides(token: Token, first: str, second: str) -> tuple[float, float, bool] | None:
    """log P of either text at a token."""
    opened = [(log_p, _opens(text, [first.casefold()]), _opens(text, [second.casefold()])) for text, log_p in token.likeliest]
    return _two([log_p for log_p, one, other in opened if one and not other], [log_p for log_p, one, other in opened if other and not one],
                min(log_p for _, log_p in token.likeliest))


def _two(first: Sequence[float], second: Sequence[float], least: float) -> tuple[float, float, bool] | None:
    """log P of two sides, and whether one is bounded by the least likely token that was told; None where neither was told."""
    if not first and not second:
        return None
    one, other = (float(np.logaddexp.reduce(found)) if found else least for found in (first, second))
    return (one, other, not (first and second)) if math.isfinite(one) and math.isfinite(other) else None


def _opens(said: str, texts: Sequence[str]) -> bool:
    """Whether one of the texts (in small letters) begins with what is said, or what is said with one of them."""
    own = re.sub(r"^[\W_]+|[\W_]+$", "", said.translate(_MARKS)).casefold()
    return bool(own) and any(own.startswith(text) or text.startswith(own) for text in texts)
