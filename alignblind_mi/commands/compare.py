"""`alignblind compare`: every mitigation on a model, what it changes and what it breaks."""

from pathlib import Path
from typing import Annotated, no_type_check

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import (
    SPREAD,
    Asking,
    Loading,
    Out,
    OutcomeName,
    Pair,
    Skipped,
    Spread,
    StudyFile,
    configured,
    from_file,
    listed,
    typed,
    with_options,
)
from alignblind_mi.errors import AlignblindError


@with_options
@no_type_check
def compare(
    *,
    context: typer.Context,
    file: StudyFile = None,
    pair: Pair,
    out: Out = Path("comparison"),
    bbq: Annotated[Path | None, typer.Option(help="BBQ's JSONL file or folder (CC-BY-4.0, not in this package): asked as well.")] = None,
    bbq_items: Annotated[int, typer.Option(help="BBQ items drawn of each category and condition.")] = 100,
    skip: Skipped = "",
    outcome: OutcomeName = "both",
    asking: Asking,
    loading: Loading,
    spread: Spread,
) -> None:
    """Compare steering, LoRA, unlearning, prompts and placebos; write OUT/comparison.json and OUT/comparison.html.

    Example: alignblind compare --base meta-llama/Meta-Llama-3-8B --aligned meta-llama/Meta-Llama-3-8B-Instruct --out compared

    Served models are compared by their logs of Inspect: each instruction with none, each model with the first, on the same items.
    Example: alignblind compare logs --out served
    """
    import hashlib
    from functools import partial

    from alignblind_mi.measures.bbq import measure_bbq, read_bbq
    from alignblind_mi.pages.comparison_page import write_comparison
    from alignblind_mi.pages.served_page import are_logs, write_served
    from alignblind_mi.statistics.log_odds import check_outcome
    from alignblind_mi.stimuli.concept import load_concept
    from alignblind_mi.studies.comparison import run_comparison

    beside = ("out", "bbq", "bbq_items", "skip", "outcome", *SPREAD)
    if file is not None and are_logs(file):
        given = typed(context, [name for name in context.params if name not in ("file", "out", "outcome")])
        if given:
            raise AlignblindError(f"{given[0]} was given beside Inspect's logs {file}, whose models have answered already: leave it out.")
        say(f"The page is {write_served(file, out, outcome).resolve()}")
        return
    config = configured(pair, asking, loading) if file is None else from_file(file, context, allowed=beside)
    check_outcome(outcome)
    spread.check(config)
    if bbq is None and bbq_items != 100:
        raise AlignblindError(f"--bbq-items {bbq_items} was given without --bbq: give BBQ's files, or leave it out.")
    data, digest = {}, ""
    if bbq is not None:
        items = read_bbq(bbq, max_items=bbq_items, seed=config.seed)
        digest = hashlib.sha256(repr(items).encode()).hexdigest()[:16]
        data["bbq"] = partial(measure_bbq, items=items, concept=load_concept(config.concept), cue=config.cue, seed=config.seed)
    if spread.carry_out(partial(run_comparison, config, data=data, data_identity=digest, skip=listed(skip)), out):
        say(f"The page is {write_comparison(out, outcome).resolve()}")
