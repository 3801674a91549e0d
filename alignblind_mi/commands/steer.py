"""`alignblind steer`: find steering vectors, save them, and measure what they do beside noise that does as much."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.commands.options import AsJson, Asking, Loading, One, Out, OutcomeName, configured, with_options


@with_options
def steer(
    *,
    asked: One,
    sense: Annotated[str, typer.Option(help="The sense to steer towards (default: the group sense); replacement takes controls too.")] = "",
    method: Annotated[str, typer.Option(help="replacement (the paper's), mean_difference, pca, probe, contrast, noise.")] = "replacement",
    how: Annotated[str, typer.Option(help="replace, add or ablate (default: replace for replacement, else add).")] = "",
    layers: Annotated[str, typer.Option(help="Layers such as 1-3 or 0,2, a group such as early, or `windows`: each window of layers by "
                                             "itself (default: the paper's effective window).")] = "",
    strengths: Annotated[str, typer.Option(help="Comma-separated factors of what is added.")] = "1",
    positions: Annotated[str, typer.Option(help="identifiers, prompt, last, generated; comma-separated (default: the method's own).")] = "",
    out: Out = Path("steering"),
    outcome: OutcomeName = "both",
    gguf: Annotated[Path | None, typer.Option(help="Also write a control vector for llama.cpp (needs the extra `gguf`).")] = None,
    asking: Asking,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Find the vectors of a sense, save OUT/vectors_*.safetensors, and ask the model with them, without, and with noise that does as much.

    Example: alignblind steer --model organism:aligned --method mean_difference --layers 1-3 --strengths 0.5,1,2 --out steering
    """
    from alignblind_mi.mitigations.steering import check_gguf, load_vectors
    from alignblind_mi.pages.terminal import about, improbable, interval, number, print_json, print_table, tagged
    from alignblind_mi.results import records_of
    from alignblind_mi.statistics.log_odds import check_outcome
    from alignblind_mi.studies.single import SteeringPlan, measure_parts, steer_parts, steer_tables, vectors_file
    from alignblind_mi.studies.thinning import thinned_to_fit

    config = configured(asked, asking, loading)
    check_outcome(outcome)
    plan = SteeringPlan.create(config, sense=sense, method=method, how=how, layers=layers, strengths=strengths, positions=positions)
    if gguf is not None:
        check_gguf(gguf, plan.method, "resid_post", [layer for group in plan.layers for layer in group])
    config = thinned_to_fit(config, out, lambda tried: steer_parts(tried, plan, out))
    (result,) = measure_parts(config, out, steer_parts(config, plan, out))
    vectors = vectors_file(plan, out)
    if gguf is not None:
        load_vectors(vectors).export_gguf(gguf)
    tables = steer_tables(result.rows, outcome)
    if as_json:
        print_json(tagged(tables, result.provenance, config.seed, protocol=config.protocol))
        return
    noise = set(result.rows.loc[result.rows["placebo_of"].fillna("") != "", "treatment"]) if "placebo_of" in result.rows else set()
    judged_by = str(tables["rates"]["judged_by"].iloc[0])
    print_table(f"Implicit bias under each treatment, by {judged_by}", [
        {"treatment": row["treatment"], "n": str(row["n"]), "stereotyped": number(row["rate"]), "95 %": interval(row),
         "templates": interval(row, "template_min", "template_max"), "bounds": interval(row, "worst", "best"),
         "invalid": f"{row['invalid_share']:.1%}"} for row in records_of(tables["rates"]) if row["treatment"] not in noise])
    if len(tables["placebos"]):
        print_table("Beside noise that displaces the stream as much, on the items that all draws were asked", [
            {"treatment": row["treatment"], "n": str(row["n"]), "stereotyped": number(row["rate"]), "noise": number(row["noise"]),
             "draws": interval(row, "noise_low", "noise_high"), "displacement": number(row["displacement"]),
             "of noise": number(row["noise_displacement"]), "KL": number(row["kl_prompts"], 2),
             "KL of noise": interval(row, "noise_kl_low", "noise_kl_high")} for row in records_of(tables["placebos"])])
    print_table("Paired difference from the untreated model", [
        {"treatment": row["treatment"], "n": str(row["n"]), "difference": number(row["difference"]), "95 %": interval(row),
         "p": number(row["p"], 2), "Holm": number(row["p_holm"], 2), "log-odds": number(row["log_odds"]),
         "95 % of log-odds": interval(row, "log_odds_low", "log_odds_high"),
         "improbable": improbable(row)} for row in records_of(tables["differences"]) if row["treatment"] not in noise],
        note=[about(result.provenance, config.seed, out, f"protocol {config.protocol}", f"vectors in {vectors}")])
