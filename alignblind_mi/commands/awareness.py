"""`alignblind awareness`: how does a model read the ambiguous identifiers?"""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.commands.options import VERDICTS, AsJson, Asking, Loading, One, Out, Skipped, configured, listed, with_options


@with_options
def awareness(
    *,
    asked: One,
    out: Out = Path("awareness"),
    instruments: Annotated[str, typer.Option(help="Comma-separated: patchscope, selfie, lens, probes (default: all there is).")] = "",
    reading: Annotated[str, typer.Option(help="The patchscope's question, an interpretation of the concept.")] = "paper",
    skip: Skipped = "",
    asking: Asking,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """How identifiers are read, by each instrument beside its controls: from the group sense (-1) to the other sense (1).

    Example: alignblind awareness --model meta-llama/Meta-Llama-3-8B --instruments patchscope,selfie --out awareness
    """
    from functools import partial

    from alignblind_mi.pages.terminal import about, interval, number, print_json, print_table, tagged
    from alignblind_mi.results import records_of
    from alignblind_mi.studies.single import awareness_parts, awareness_tables, measure_parts
    from alignblind_mi.studies.thinning import thinned_to_fit

    config = configured(asked, asking, loading)
    parts = partial(awareness_parts, names=listed(instruments), reading=reading, skip=listed(skip))
    config = thinned_to_fit(config, out, parts)
    results = measure_parts(config, out, parts(config))
    tables = awareness_tables(results)
    if as_json:
        print_json(tagged(tables, results[0].provenance, config.seed, protocol=config.protocol))
        return
    if "qualification" in tables:
        print_table("Does it read this model? Sentences that settle the sense; then the ambiguous prompts between the two", [
            {"instrument": row["instrument"].replace("_", " "), "verdict": row["verdict"], "setting": row["setting"], "n": str(row["n"]),
             "AUC": number(row["auc"]), "95 %": interval(row), "on its answers": number(row["mass"]),
             "place (0 group, 1 other)": number(row.get("scale")), "95 % of that": interval(row, "scale_low", "scale_high"),
             "question": row["question"] or "-"} for row in records_of(tables["qualification"])], styles=VERDICTS)
    print_table("Readings of the identifiers, and of their controls", [
        {"instrument": row["instrument"], "reads": row["reads"], "control": row["control"] or "-", "n": str(row["n"]),
         "layers": str(row["layers"]),
         "blind": number(row["mean"]), "95 %": interval(row), "P(group sense)": number(row["p_group"]),
         "P(other sense)": number(row["p_other"]), "no reading": f"{row['invalid_share']:.0%}"} for row in records_of(tables["readings"])],
        note=[about(results[0].provenance, config.seed, out, f"protocol {config.protocol}"),
              "blind: -1 is the group sense, 1 the other one (of the patchscope a difference of two changes, at most -2 to 2); contexts "
              "and templates are the units. No reading: texts of no sense, layers whose probe does not beat its stronger control."])
