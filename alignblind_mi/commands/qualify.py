"""`alignblind qualify`: can this model do the task, and which instruments read it?"""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import VERDICTS, Asking, AsOneJson, Loading, One, Out, Spread, Without, configured, listed, with_options


@with_options
def qualify(
    *,
    asked: One,
    out: Out = Path("qualification"),
    instruments: Annotated[str, typer.Option(help="Comma-separated: patchscope, selfie, logit_lens, probe (default: all).")] = "",
    asking: Annotated[Asking, Without("protocol")],
    loading: Loading,
    spread: Spread,
    as_json: AsOneJson = False,
) -> None:
    """Whether a model can do the task at all, and which instruments read it; writes OUT/qualification.json and OUT/qualification.html.

    The task: items whose right answer is beyond doubt, in the templates that the bias is asked in. Instruments: sentences that say plainly
    which sense of the identifiers is meant must be told apart. Where a model or an instrument fails here, its bias or reading says nothing.

    Example: alignblind qualify --model meta-llama/Meta-Llama-3-8B-Instruct --out qualified
    """
    from functools import partial

    from alignblind_mi.pages.qualification_page import summary, write_qualification
    from alignblind_mi.pages.terminal import about, interval, number, print_table
    from alignblind_mi.results import records_of
    from alignblind_mi.studies.qualify import qualification_parts, run_qualification
    from alignblind_mi.studies.running import run_parts

    config = configured(asked, asking, loading)
    spread.check(config)
    if spread.divides and not spread.carry_out(partial(run_parts, config, parts=qualification_parts(config, listed(instruments))), out):
        return
    found, results = run_qualification(config, out, listed(instruments))
    page = write_qualification(out, found, results)
    if as_json:
        say((out / "qualification.json").read_text("utf-8").rstrip())
        return
    print_table("Can it do the task? Items whose right answer is beyond doubt", [
        {"kind": row["kind"], "verdict": row["verdict"], "n": str(row["n"]), "invalid": f"{row['invalid_share']:.0%}" if row["n"] else "-",
         "right": number(row["share_right"]), "95 %": interval(row), "first with first": number(row["position"]), "why": row["reason"]}
        for row in records_of(found.competence)], prose=("why",), styles=VERDICTS)
    print_table("Does it read this model? Sentences that settle the sense", [
        {"instrument": row["instrument"].replace("_", " "), "setting": row["setting"], "verdict": row["verdict"], "n": str(row["n"]),
         "AUC": number(row["auc"]), "95 %": interval(row), "on its answers": number(row["mass"]),
         "shuffled": f"{row['false_alarm']:.1%}", "question": row["question"] or "-"} for row in records_of(found.instruments)],
        styles=VERDICTS, note=[about(results[0].provenance, config.seed, out), f"The page is {page}"])
    say("\n".join(summary(found)))
