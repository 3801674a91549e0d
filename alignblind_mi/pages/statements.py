"""What a page may say and what not: its first sentences, and which rows and figures are no statement and shown greyed.

Where a model cannot do the task its answers say nothing about bias, and where an instrument does not read it its readings say nothing about
awareness. Does NOT decide either: `studies/qualified.py` does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from alignblind_mi.measures.qualification import INSTRUMENTS
from alignblind_mi.pages import figures
from alignblind_mi.pages.page import count, rate, share, text
from alignblind_mi.stimuli.prompts import KINDS
from alignblind_mi.studies.audit import LOST, UNTOLD
from alignblind_mi.studies.qualified import Qualification

LONGEST_NAME = 48
UNQUALIFIED = ("Not qualified: whether these models can do the task, and which instruments read them, was not asked (it was skipped by "
               "name, or an earlier version began this folder). Numbers near “no effect” may mean that nothing was measured.")
OUTCOMES = (
    text("model", "role"), text("kind", "kind"), text("leads", "leads"), count("n", "n"), share("invalid texts %", "invalid_share"),
    rate("by text %", "rate", "low", "high"), share("not scored %", "invalid_by_probability"),
    rate("by probability %", "rate_by_probability", "low_by_probability", "high_by_probability"), share("same %", "agree"),
    share("improbable %", "improbable"))
Muted = Callable[[str, Mapping[str, Any]], bool]


def short(name: str) -> str:
    """A model's name in a sentence: of a long path its last part."""
    return name if len(name) <= LONGEST_NAME else name.rstrip("/").rsplit("/", 1)[-1]


def headline(qualified: Mapping[str, Qualification], names: Mapping[str, str]) -> list[str]:
    """What the study gives no statement about, in sentences; empty where all is well, or nothing was asked. names: of the models."""
    said = []
    for kind in KINDS:
        unfit = _together(names, {role: one.why_not(kind) for role, one in qualified.items()})
        if unfit:
            about = [f"of {who}, {why}" if why.startswith("whether") else f"{who} {why}" for who, why in unfit]
            said.append(f"No statement about {kind} bias: {'; '.join(about)}.")
    for instrument in INSTRUMENTS:
        unread = _together(names, {role: "unread" if one.unread(instrument) else "" for role, one in qualified.items()})
        if unread:
            said.append(f"No statement by the {instrument.replace('_', ' ')} in its own setting: it does not surely read "
                        f"{', '.join(who for who, _ in unread)}.")
    return said


def _together(names: Mapping[str, str], said: Mapping[str, str]) -> list[tuple[str, str]]:
    """(model with its roles, what is said of it) of every role of which anything is said; one model in both places stands there once."""
    roles: dict[tuple[str, str], list[str]] = {}
    for role, why in said.items():
        if why:
            roles.setdefault((short(names[role]), why), []).append(role)
    return [(f"{name} ({', '.join(some)})", why) for (name, why), some in roles.items()]


def readers(qualified: Mapping[str, Qualification], names: Mapping[str, str]) -> list[str]:
    """What reads each model, in sentences."""
    reading = {role: ", ".join(one.reading()) or "nothing" for role, one in qualified.items() if len(one.instruments)}
    return [f"{who} is read by: {what}." for who, what in _together(names, reading)]


def lead_sentences(lead: Mapping[str, str], untreated: pd.DataFrame) -> list[str]:
    """By what answers are judged where that is not their text, and why. untreated: rows as measured."""
    said = []
    for kind in [kind for kind, outcome in lead.items() if outcome == "probability"]:
        invalid = (untreated.loc[untreated["kind"] == kind, "outcome"] == "invalid").mean()
        what = ("which of the two complete assignments is the more probable answer" if kind == "implicit" else
                "whether an answer that endorses the statement is more probable than one that does not")
        said.append(f"{kind.capitalize()} answers are judged by probability, {what}: {100 * invalid:.0f} % of their texts are invalid.")
    return said


def muted_rows(qualified: Mapping[str, Qualification]) -> Muted:
    """Which rows of which tables are no statement: (table, row) -> bool. Rows of treatments are of the aligned model."""
    def cannot(role: str, kind: str) -> bool:
        return role in qualified and bool(qualified[role].why_not(kind))

    def unread(role: str, instrument: str) -> bool:
        return role in qualified and bool(qualified[role].unread(instrument))

    def muted(table: str, row: Mapping[str, Any]) -> bool:
        role = str(row.get("role", "aligned"))
        if table in ("behaviour", "position", "steering", "lora", "comparison", "differences"):
            named = "base" if row.get("treatment") == "base" or str(row.get("label")) == "base" else role
            return cannot(named, str(row.get("kind", "implicit")))
        if table in ("awareness", "awareness_layers"):
            return unread(role, "patchscope")
        if table in ("instruments", "selfie", "probes"):
            fixed = {"selfie": "selfie", "probes": "probe"}
            return unread(role, fixed.get(table) or _of_panel(row["panel"]))
        return table == "audit" and str(row["verdict"]).startswith((UNTOLD, LOST))
    return muted


def mute_figures(drawn: Mapping[str, Figure], qualified: Mapping[str, Qualification]) -> None:
    """Grey out the figures, or those of their panels, that are no statement."""
    kinds = {kind: any(one.why_not(kind) for one in qualified.values()) for kind in KINDS}
    treated = "aligned" in qualified and bool(qualified["aligned"].why_not("implicit"))
    dead = {name for name, is_dead in (("position", kinds["implicit"]), ("steering", treated), ("lora", treated), ("comparison", treated),
                                       ("awareness", _unread(qualified, "patchscope"))) if is_dead}
    for name, figure in drawn.items():
        if name in dead:
            figures.mute(figure.axes)
        elif name == "behaviour":    # panels by kind, their invalid shares, and the log-odds of implicit answers
            panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
            figures.mute([axis for title, axis in panels.items() for kind in KINDS if kinds[kind] and title.lower().startswith(kind)])
        elif name == "instruments":
            figures.mute([axis for axis in figure.axes if (panel := getattr(axis, "panel", None))
                          and _unread(qualified, _of_panel(panel))])


def _of_panel(panel: str) -> str:
    """The instrument that a panel is of: its name with blanks."""
    return panel.replace(" ", "_")


def _unread(qualified: Mapping[str, Qualification], instrument: str) -> bool:
    return any(one.unread(instrument) for one in qualified.values())
