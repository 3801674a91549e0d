"""Rows of a calibration as instruments of known quality would give them."""

import numpy as np
import pandas as pd

from alignblind_mi.studies.verdicts import KNOB


def made(member, instrument, value, *, layers=8, contexts=40, spread=0.1, seed=0):
    """Rows of one instrument on one organism: `value(variant, layer)` plus noise by context."""
    random = np.random.default_rng([seed, *map(ord, member.name + instrument)])
    reading = KNOB[instrument] == "reading"
    variants = {"open": [""], "placebo": ["random", "wrong_token"] if reading else ["random"]}
    variants |= {"group": [""], "other": [""]} if reading else {"depth": ["", "random"] if "patching" in instrument else [""]}
    rows = [{"instrument": instrument, "variant": variant, "control": control, "unit": f"u{i}", "context": f"c{i}", "trial": f"t{i % 4}",
             "layer": layer, "value": value("placebo" if control else variant, layer) + noise}
            for variant, controls in variants.items() for control in controls
            for i, noise in enumerate(random.normal(0, spread, contexts)) for layer in range(layers)]
    return pd.DataFrame(rows).assign(member=member.name, kind=member.kind, seed=member.seed, reading=member.reading,
                                     behaviour=member.behaviour, onset=-1 if member.onset is None else member.onset,
                                     last=max(member.effect, default=-1))


def perfect(member, instrument):
    """An instrument that says exactly what was planted."""
    inside = lambda layer: bool(member.effect) and layer >= min(member.effect)    # noqa: E731
    used = lambda layer: layer in member.effect    # noqa: E731
    if KNOB[instrument] == "reading":
        values = {"open": 2 * member.reading - 1, "placebo": 0.0, "group": -0.9, "other": 0.9}
        return made(member, instrument, lambda variant, layer: values[variant] * (inside(layer) or variant == "open"))
    effect = member.behaviour - member.group_rate
    return made(member, instrument, lambda variant, layer: 0.0 if variant == "placebo" else
                effect * (used(layer) or (variant == "open" and bool(member.effect))))
