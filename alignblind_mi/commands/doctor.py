"""`alignblind doctor`: is this model fit for an expensive run?"""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import AsJson, ConceptName, CueName, Loading, with_options
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


@with_options
def doctor(
    *,
    model: Annotated[str, typer.Argument(help="Hugging Face id, checkpoint folder, organism:base or organism:aligned.")],
    concept: ConceptName = DEFAULT_CONCEPT,
    cue: CueName = "",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter folder (PEFT) to check with the model.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    drift: Annotated[bool, typer.Option(help="Also load the model in other numbers and compare, where they fit.")] = True,
    loading: Loading,
    as_json: AsJson = False,
) -> None:
    """Check a model before an expensive run, and say what to do. Exit code 1 if a check fails, 2 for bad input.

    Tokenizer and memory come first; weights are loaded only if those are well.

    Example: alignblind doctor meta-llama/Meta-Llama-3-8B --cue names
    """
    from alignblind_mi.pages.terminal import number, print_json, print_table
    from alignblind_mi.results import records_of
    from alignblind_mi.studies.doctor import check_up

    spec = loading.spec(model, revision=revision)
    found = records_of(check_up(spec, concept, cue=cue, adapter=adapter, drift=drift, progress=lambda line: say(line, err=True)))
    if as_json:
        print_json(found)
    else:
        rows = [{"check": one["check"], "status": one["status"], "measured": number(one["measured"]),
                 "bound": "" if one["bound"] is None else f"{one['rule']} {number(one['bound'])} {one['unit']}", "found": one["found"],
                 "what to do": one["advice"]} for one in found]
        counts = [f"{sum(one['status'] == status for one in found)} {status}" for status in STYLES]
        print_table("Checks", rows, said=[model, f"concept {concept}", *counts], prose=("found", "what to do"), styles=STYLES)
    if any(one["status"] == "fail" for one in found):
        raise typer.Exit(1)
