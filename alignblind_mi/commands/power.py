"""`alignblind power`: how many word pairs a difference of rates needs, or which difference the ones at hand can show."""

from typing import Annotated

import typer

from alignblind_mi.borders.texts import json_text, say
from alignblind_mi.commands.options import AsOneJson


def power(
    untreated: Annotated[float, typer.Option(help="Stereotyped rate without the treatment, 0 to 1.")],
    treated: Annotated[float, typer.Option(help="Stereotyped rate with the treatment, 0 to 1.")],
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

    plan = Plan(untreated, treated, discordant, icc, template_icc, word_pairs, templates, orders, alpha, fixed_templates)
    found: dict[str, float | int | None] = {"discordant": plan.share, "templates": templates, "orders": orders}
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
