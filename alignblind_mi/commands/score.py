"""`alignblind score`: stored answers and interpretations, judged without any model."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import json_text, say
from alignblind_mi.commands.options import AsJson, ConceptName, listed
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT


def score(
    paths: Annotated[list[Path], typer.Argument(help="Result files or folders: this project's, released JSON and JSON lines, or logs of "
                                                     "Inspect (.eval).")],
    rule: Annotated[str, typer.Option(help="robust, or published (the paper's parser).")] = "robust",
    by: Annotated[str, typer.Option(help="Comma-separated keys to group by, e.g. model,cue,category,template.")] = "",
    concept: ConceptName = DEFAULT_CONCEPT,
    as_json: AsJson = False,
) -> None:
    """Score stored answers and interpretations without any model. Example: alignblind score study --by model,treatment,template

    Interpretations (SelfIE) are files of one JSON object a line; the concept's lexicons say which sense each text speaks of. Logs of
    `inspect eval alignblind/...` need the extra `inspect`.
    """
    from alignblind_mi.pages.scoring import render, score as score_paths
    from alignblind_mi.stimuli.concept import load_concept

    records = score_paths(paths, rule=rule, by=listed(by), concept=load_concept(concept))
    if as_json:
        say(json_text(records))
    else:
        render(records)
