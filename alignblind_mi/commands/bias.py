"""`alignblind bias`: how biased are a model's answers?"""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.commands.options import AsJson, Asking, Loading, One, Out, OutcomeName, Without, configured, with_options


@with_options
def bias(
    *,
    asked: One,
    out: Out = Path("bias"),
    outcome: OutcomeName = "both",
    design: Annotated[str, typer.Option(help="balanced (association and position apart) or published (the paper's).")] = "balanced",
    asking: Annotated[Asking, Without("protocol")],
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Implicit and explicit bias of one model: rates with intervals, invalid answers, log-odds, and the effect of positions.

    Example: alignblind bias --model meta-llama/Meta-Llama-3-8B-Instruct --cue names --out bias
    """
    from alignblind_mi.pages.scoring import render
    from alignblind_mi.pages.terminal import about, improbable, interval, number, print_json, print_table, tagged
    from alignblind_mi.results import records_of
    from alignblind_mi.statistics.log_odds import check_outcome
    from alignblind_mi.studies.single import bias_parts, bias_tables, measure_parts
    from alignblind_mi.studies.thinning import thinned_to_fit

    config = configured(asked, asking, loading)
    check_outcome(outcome)
    config = thinned_to_fit(config, out, lambda tried: bias_parts(tried, design))
    (result,) = measure_parts(config, out, bias_parts(config, design))
    tables = bias_tables(result.rows, outcome)
    if as_json:
        print_json(tagged(tables, result.provenance, config.seed))
        return
    render([{**record, "rule": "robust"} for record in records_of(tables["rates"].drop(columns=["clustered_over", "judged_by"]))])
    print_table("Text and probability (the more probable of the two answers) of the same answers", [
        {"kind": row["kind"], "n": str(row["n"]), "invalid": f"{row['invalid_share']:.0%}", "by text": number(row["rate"]),
         "95 %": interval(row), "by probability": number(row["rate_by_probability"]),
         "95 % of that": interval(row, "low_by_probability", "high_by_probability"),
         "same": "-" if row["agree"] is None else f"{row['agree']:.0%}", "leads": row["leads"]}
        for row in records_of(tables["outcomes"])])
    print_table("Log-odds of the two assignments, in nats", [
        {"category": row["category"], "n": str(row["n"]), "mean": number(row["mean"]), "95 %": interval(row),
         "> 0": f"{row['positive']:.0%}", "improbable": improbable(row)}
        for row in records_of(tables["log_odds"])])
    print_table("Association beside position, by template", [
        {"template": row["template"], "n": str(row["n"]), "valid": str(row["valid"]), "association": number(row["rate"]),
         "95 %": interval(row), "first word with first option": number(row["position"]),
         "95 % of that": interval(row, "position_low", "position_high"), "note": "one and the same here" if row["confounded"] else ""}
        for row in records_of(tables["position"])], note=[about(result.provenance, config.seed, out)])
