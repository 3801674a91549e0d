"""The command line: thin verbs over the public functions. Results go to standard output, everything else to standard error."""

import shlex
import sys
from typing import Annotated

import typer

from alignblind_mi import __version__
from alignblind_mi.borders.texts import middle_cut, safe_streams, say, visible
from alignblind_mi.commands.awareness import awareness
from alignblind_mi.commands.bias import bias
from alignblind_mi.commands.calibrate import calibrate
from alignblind_mi.commands.compare import compare
from alignblind_mi.commands.concept import concept_app
from alignblind_mi.commands.doctor import doctor
from alignblind_mi.commands.export import export_app
from alignblind_mi.commands.forecast import forecast
from alignblind_mi.commands.lora import lora
from alignblind_mi.commands.merge import merge
from alignblind_mi.commands.options import Verb
from alignblind_mi.commands.organism import organism_app
from alignblind_mi.commands.patch import patch
from alignblind_mi.commands.power import power
from alignblind_mi.commands.qualify import qualify
from alignblind_mi.commands.report import report
from alignblind_mi.commands.score import score
from alignblind_mi.commands.steer import steer
from alignblind_mi.commands.study import study
from alignblind_mi.errors import AlignblindError

USAGE_ERROR = typer.BadParameter.__mro__[1]    # of click, which typer brings along
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="How aligned language models hide bias from themselves: measure and mitigate it.")
app.add_typer(organism_app, name="organism")
app.add_typer(concept_app, name="concept")
app.add_typer(export_app, name="export")
for verb in (bias, awareness, qualify, patch, compare, steer, lora, doctor, power, study, forecast, report, calibrate, score, merge):
    app.command(cls=Verb)(verb)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        say(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors of this project are one sentence and exit code 2."""
    safe_streams()
    try:
        app()
    except AlignblindError as error:
        say(f"alignblind: {middle_cut(visible(error, lines=False), 1000)}", err=True)    # whatever was given may be of any length
        sys.exit(2)
    except SystemExit as end:
        if isinstance(end.__context__, USAGE_ERROR):    # typer's sentence names the option, not always what was given
            given = visible(shlex.join(sys.argv[1:]), lines=False)
            say(f"alignblind: the command line was: {middle_cut(given, 1000)}", err=True)
        raise


if __name__ == "__main__":
    main()
