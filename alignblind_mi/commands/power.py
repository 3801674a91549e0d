"""`alignblind power`: how many word pairs a difference of rates needs, or which difference the ones at hand can show."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, no_type_check

import typer

from alignblind_mi.borders.texts import json_text, say
from alignblind_mi.commands.options import AsOneJson, typed
from alignblind_mi.errors import AlignblindError

if TYPE_CHECKING:
    from alignblind_mi.statistics.power import Plan

OF_A_PILOT = ("untreated", "treated", "discordant", "icc", "template_icc", "templates", "orders")    # what its answers say


@no_type_check
def power(
    context: typer.Context,
    untreated: Annotated[float | None, typer.Option(help="Stereotyped rate without the treatment, 0 to 1.")] = None,
    treated: Annotated[float | None, typer.Option(help="Stereotyped rate with the treatment, 0 to 1.")] = None,
    pilot: Annotated[Path | None, typer.Option(help="Answers of a pilot instead, which say all of this: results (steer, compare) or logs "
                                                    "of Inspect, of a model without and with a treatment.")] = None,
    treatment: Annotated[str, typer.Option(help="With --pilot: which treatment, if there are several.")] = "",
    discordant: Annotated[float | None, typer.Option(help="Share of items whose two answers differ (default: as if independent).")] = None,
    icc: Annotated[float, typer.Option(help="Share of the variance of changes that items of one word pair have in common.")] = 0.0,
    template_icc: Annotated[float, typer.Option(help="Share of it that items of one template have in common.")] = 0.0,
    templates: Annotated[int, typer.Option(help="Templates that every word pair is asked in.")] = 4,
    orders: Annotated[int, typer.Option(help="Orders of options and words in every template (balanced design: 4).")] = 1,
    fixed_templates: Annotated[bool, typer.Option("--fixed-templates", help="Speak of these templates only: fewer items.")] = False,
    word_pairs: Annotated[int, typer.Option(help="Word pairs at hand: prints their power, and the smallest fall they show.")] = 0,
    wanted: Annotated[float, typer.Option("--power", help="The chance to find the difference.")] = 0.8,
    alpha: Annotated[float, typer.Option(help="Level of the two-sided test.")] = 0.05,
    as_json: AsOneJson = False,
) -> None:
    """How many items does a difference of rates need (paired on the same items)? With --word-pairs: what can these show?

    Example: alignblind power --untreated .95 --treated .6 --icc .1 --template-icc .02
    """
    from alignblind_mi.statistics.power import Plan, connor_items, items_needed, power_of, smallest_difference

    if pilot is not None:
        given = typed(context, OF_A_PILOT)
        if given:
            raise AlignblindError(f"{given[0]} was given beside the pilot {pilot}, whose answers say it: leave one of the two out.")
        of, plan = _of_pilot(pilot, treatment, alpha)
        plan = replace(plan, word_pairs=word_pairs, fixed_templates=fixed_templates)
        untreated, treated, templates, orders, icc, template_icc = (round(value, 4) for value in (
            plan.untreated, plan.treated, plan.templates, plan.orders, plan.icc, plan.template_icc))
    elif treatment:
        raise AlignblindError(f"--treatment {treatment} was given without --pilot: give the answers that it is in.")
    elif untreated is None or treated is None:
        raise AlignblindError("there are no rates to tell apart: give --untreated and --treated, or a --pilot.")
    else:
        plan = Plan(untreated, treated, discordant, icc, template_icc, word_pairs, templates, orders, alpha, fixed_templates)
    found: dict[str, float | int | None] = {"discordant": plan.share, "templates": templates, "orders": orders}
    if pilot is not None:
        found |= {"untreated": untreated, "treated": treated, "icc": icc, "template_icc": template_icc}
        say(f"The pilot ({of}): {untreated:.1%} -> {treated:.1%}, discordant {plan.share:.1%}, icc {icc:.2g}, "
            f"template icc {template_icc:.2g}.", err=True)
    if word_pairs:
        smallest = smallest_difference(plan, wanted)
        found |= {"word_pairs": word_pairs, "items": plan.items, "power": power_of(plan),
                  "smallest_fall": smallest if smallest == smallest else None}
        shown = f"a fall of {smallest:.1%} or more" if smallest == smallest else "no fall at all"
        text = (f"{word_pairs} word pairs x {templates} templates x {orders} orders = {plan.items} items: power {found['power']:.0%} for "
                f"{untreated:g} -> {treated:g}. With a power of {wanted:.0%} they show {shown}.")
    else:
        needed = items_needed(plan, wanted)
        found |= {"word_pairs": needed.word_pairs, "items": needed.items, "power": power_of(needed),
                  "independent_items": connor_items(plan, wanted)}
        text = (f"{untreated:g} -> {treated:g} needs {needed.word_pairs} word pairs x {templates} templates x {orders} orders = "
                f"{needed.items} items, each under both treatments, for a power of {found['power']:.0%} "
                f"(alpha {alpha:g}, discordant {plan.share:.1%}). "
                f"Were items independent, {found['independent_items']:.0f} would do (Connor 1987).")
    say(json_text(found) if as_json else text)


def _of_pilot(pilot: Path, treatment: str, alpha: float) -> "tuple[str, Plan]":
    """What the implicit answers of a pilot say, and which they are: of several concepts, cues and designs those with most answers.

    Errors: ScoreError, StatisticsError; AlignblindError for several models or treatments.
    """
    from alignblind_mi.pages.scoring import judge_rows, read_answers
    from alignblind_mi.statistics.paired import BASELINE
    from alignblind_mi.statistics.power import plan_from_pilot

    rows = read_answers([pilot])
    # No items of competence; answers of one model to the same item again are no further items.
    for name, value in (("kind", "implicit"), ("competence", ""), ("epoch", 1)):
        rows = rows[rows[name] == value] if name in rows else rows
    treated = rows[rows["treatment"] != BASELINE] if {"treatment", "model"} <= {*rows} else rows[:0]
    treatments, models = (sorted({*treated[name]}) if len(treated) else [] for name in ("treatment", "model"))
    if len(models) != 1:
        raise AlignblindError(f"{pilot} has implicit answers under treatments of {len(models)} models{': ' if models else ''}"
                              f"{', '.join(models)}: give those of one model, without and with a treatment.")
    if treatment not in treatments and (treatment or len(treatments) > 1):
        raise AlignblindError(f"--treatment {treatment or 'is needed'}: {pilot} has {', '.join(treatments)}.")
    name = treatment or treatments[0]
    some = rows[(rows["model"] == models[0]) & rows["treatment"].isin([BASELINE, name])]
    by = [key for key in ("concept", "cue", "design") if key in some]
    groups = {" ".join(map(str, key)): group for key, group in some.groupby(by, sort=False)} if by else {"": some}
    largest = max(groups, key=lambda key: len(groups[key]))
    return " ".join([name, largest]).strip(), plan_from_pilot(judge_rows(groups[largest]), name, alpha=alpha)
