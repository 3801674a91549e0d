"""`alignblind forecast`: does a model fit here, and how long does its study take?"""

from typing import Annotated, no_type_check

import typer

from alignblind_mi.borders.texts import json_text, say
from alignblind_mi.commands.options import Asking, AsOneJson, Loading, Pair, StudyFile, Without, configured, from_file, with_options


@with_options
@no_type_check
def forecast(
    *,
    context: typer.Context,
    file: StudyFile = None,
    pair: Pair,
    asking: Annotated[Asking, Without("temperature", "seed", "minutes")],
    loading: Annotated[Loading, Without("engine", "tensor_parallel")],
    rate: Annotated[bool, typer.Option(help="Measure this machine's rate on two of the model's layers, without weights.")] = True,
    as_json: AsOneJson = False,
) -> None:
    """Before loading: does the model fit here, in which numbers, and how long does the study take?

    Example: alignblind forecast --base meta-llama/Meta-Llama-3-8B --aligned meta-llama/Meta-Llama-3-8B-Instruct
    """
    from dataclasses import asdict

    from alignblind_mi.studies.forecast import forecast as forecast_study

    config = configured(pair, asking, loading) if file is None else from_file(file, context, allowed=("rate", "as_json"))
    found = forecast_study(config, measure=rate)
    if as_json:
        fits = [{**asdict(one), "fits": one.fits} for one in found.fits]
        say(json_text({**asdict(found), "fits": fits}))
    else:
        say(str(found))
