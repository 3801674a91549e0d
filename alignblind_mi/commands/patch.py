"""`alignblind patch`: at which layers and places does a model carry what settles its answer?"""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.commands.options import AsJson, Asking, Loading, One, Out, Without, configured, listed, with_options


@with_options
def patch(
    *,
    asked: One,
    out: Out = Path("patch"),
    parts: Annotated[str, typer.Option(help="Comma-separated: residual, added (attention and MLP), heads.")] = "residual",
    swap: Annotated[str, typer.Option(help="What two prompts differ in: context (a phrase before) or identifiers.")] = "context",
    max_word_pairs: Annotated[int, typer.Option(help="Word pairs of each category.")] = 2,
    asking: Annotated[Asking, Without("protocol", "shots")],
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Activation patching in both directions with its controls: what is enough (denoise), what is needed (noise), layer by layer.

    Example: alignblind patch --model meta-llama/Meta-Llama-3-8B-Instruct --parts residual,heads --out patch
    """
    from functools import partial

    from alignblind_mi.measures.patching import effect_span
    from alignblind_mi.pages.terminal import about, interval, number, print_json, print_table, tagged
    from alignblind_mi.results import records_of
    from alignblind_mi.studies.single import measure_parts, patch_parts, patch_tables, strongest_places
    from alignblind_mi.studies.thinning import thinned_to_fit

    config = configured(asked, asking, loading)
    wanted = partial(patch_parts, parts=listed(parts), swap=swap, max_word_pairs=max_word_pairs)
    config = thinned_to_fit(config, out, wanted)
    results = measure_parts(config, out, wanted(config))
    result, tables = results[0], patch_tables(results)
    if as_json:
        print_json(tagged(tables, result.provenance, config.seed))
        return
    said = about(result.provenance, config.seed, out)
    inner = strongest_places(tables["places"])
    if "depth" in tables:
        depth = tables["depth"]
        spans = {direction: effect_span(depth[depth["direction"] == direction]) for direction in depth["direction"].unique()}
        layers = tuple(f"{direction}: " + ("no layer" if span is None else f"layers {span.first} to {span.last}")
                       for direction, span in spans.items())
        print_table("Effect of patching all identifiers in the residual stream, after each layer", [
            {"direction": row["direction"], "layer": str(row["layer"]), "n": str(row["n"]), "effect": number(row["mean"]),
             "95 %": interval(row), "undefined": f"{row['undefined']:.0%}",
             "strongest control": f"{row['control']} {number(row['control_mean'])}", "95 % of controls": interval(row, "control_low",
                                                                                                              "control_high")}
            for row in records_of(depth)], note=[("Above its controls and at least a quarter", *layers), said])
    if len(inner):
        print_table("The strongest places inside the layers", [
            {"direction": row["direction"], "layer": str(row["layer"]), "stream": row["stream"],
             "head": str(row["head"]) if row["head"] >= 0 else "", "place": row["mark"], "n": str(row["n"]), "effect": number(row["mean"]),
             "95 %": interval(row), "undefined": f"{row['undefined']:.0%}", "random control": number(row["control_mean"])}
            for row in records_of(inner)], note=[said])
