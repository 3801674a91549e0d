"""`alignblind bias`: how biased are a model's answers?"""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.commands.options import (
    AsJson,
    Chatting,
    ConceptName,
    CueName,
    Device,
    DeviceMap,
    Dtype,
    EngineOption,
    Model,
    Out,
    Quantized,
    Quick,
    RemoteCode,
    Seed,
    System,
    Temperature,
    Unpickling,
)
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT


def bias(
    model: Model = "organism:aligned",
    concept: ConceptName = DEFAULT_CONCEPT,
    cue: CueName = "",
    out: Out = Path("bias"),
    design: Annotated[str, typer.Option(help="balanced (association and position apart) or published (the paper's).")] = "balanced",
    quick: Quick = False,
    chat: Chatting = False,
    system: System = "",
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    quantization: Quantized = None,
    engine: EngineOption = "auto",
    trust_remote_code: RemoteCode = False,
    allow_pickle: Unpickling = False,
    as_json: AsJson = False,
) -> None:
    """Implicit and explicit bias of one model: rates with both intervals, invalid answers, log-odds, and the effect of positions.

    Example: alignblind bias --model meta-llama/Meta-Llama-3-8B-Instruct --cue names --out bias
    """
    from alignblind_mi.pages.scoring import render
    from alignblind_mi.pages.terminal import about, interval, number, print_json, print_table, records_of, tagged
    from alignblind_mi.studies.config import StudyConfig
    from alignblind_mi.studies.single import bias_parts, bias_tables, measure_parts

    config = StudyConfig.create(model, model, concept=concept, cue=cue, quick=quick, seed=seed, chat=chat, system=system,
                                temperature=temperature, dtype=dtype, device=device, device_map=device_map, quantization=quantization,
                                engine=engine, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    (result,) = measure_parts(config, out, bias_parts(config, design))
    tables = bias_tables(result.rows, seed=seed)
    if as_json:
        print_json(tagged(tables, result.provenance, config.seed))
        return
    render([{**record, "rule": "robust"} for record in records_of(tables["rates"].drop(columns="clustered_over"))])
    print_table("Log-odds of the two assignments (nats)", [
        {"category": row["category"], "n": str(row["n"]), "mean": number(row["mean"]), "95 %": interval(row),
         "> 0": f"{row['positive']:.0%}"}
        for row in records_of(tables["log_odds"])])
    print_table("Association beside position, by template", [
        {"template": row["template"], "n": str(row["n"]), "valid": str(row["valid"]), "association": number(row["rate"]),
         "95 %": interval(row), "first word with first option": number(row["position"]),
         "95 % ": interval(row, "position_low", "position_high"), "": "one and the same here" if row["confounded"] else ""}
        for row in records_of(tables["position"])], note=about(result.provenance, config.seed, out))
