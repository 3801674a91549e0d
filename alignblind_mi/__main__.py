"""The command line: thin verbs over the public functions. Results go to standard output, everything else to standard error."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, no_type_check

import typer

from alignblind_mi import __version__
from alignblind_mi.borders.texts import json_text, middle_cut, safe_streams, say, visible
from alignblind_mi.commands.awareness import awareness
from alignblind_mi.commands.bias import bias
from alignblind_mi.commands.compare import compare
from alignblind_mi.commands.concept import concept_app
from alignblind_mi.commands.doctor import doctor
from alignblind_mi.commands.lora import lora
from alignblind_mi.commands.options import (
    Aligned,
    AsJson,
    Base,
    Chatting,
    ConceptName,
    CueName,
    Device,
    DeviceMap,
    Dtype,
    EngineOption,
    Quantized,
    Quick,
    RemoteCode,
    Seed,
    StudyFile,
    System,
    Temperature,
    Unpickling,
    listed,
    refuse_beside,
)
from alignblind_mi.commands.patch import patch
from alignblind_mi.commands.power import power
from alignblind_mi.commands.steer import steer
from alignblind_mi.errors import AlignblindError
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT

USAGE_ERROR = typer.BadParameter.__mro__[1]    # of click, which typer brings along
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="How aligned language models hide bias from themselves: measure and mitigate it.")
organism_app = typer.Typer(no_args_is_help=True, help="The embedded model pairs: calibration devices, never evidence about a real model.")
app.add_typer(organism_app, name="organism")
app.add_typer(concept_app, name="concept")
app.command("bias")(bias)
app.command("awareness")(awareness)
app.command("patch")(patch)
app.command("compare")(compare)
app.command("steer")(steer)
app.command("lora")(lora)
app.command("doctor")(doctor)
app.command("power")(power)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        say(__version__)
        raise typer.Exit


@app.command()
@no_type_check
def study(
    context: typer.Context,
    file: StudyFile = None,
    base: Base = "organism:base",
    aligned: Aligned = "organism:aligned",
    concept: ConceptName = DEFAULT_CONCEPT,
    cue: CueName = "",
    out: Annotated[Path, typer.Option(help="Results folder; a study that is in it already is resumed.")] = Path("study"),
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
) -> None:
    """Run the whole study and write OUT/report.html; its settings are options, or all in a YAML file (see experiments/study.yaml).

    Example: alignblind study --base meta-llama/Meta-Llama-3-8B --aligned meta-llama/Meta-Llama-3-8B-Instruct --out llama3-8b
    """
    from alignblind_mi.pages.report import write_report
    from alignblind_mi.studies.config import StudyConfig
    from alignblind_mi.studies.drawn import is_drawn
    from alignblind_mi.studies.running import run_study
    from alignblind_mi.studies.study_file import read_study_file

    if file is not None:
        refuse_beside(file, context, allowed=("out",))
        config = read_study_file(file)
    else:
        config = StudyConfig.create(base, aligned, concept=concept, cue=cue, quick=quick, seed=seed, chat=chat, system=system,
                                    temperature=temperature, dtype=dtype, device=device, device_map=device_map, quantization=quantization,
                                    engine=engine, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    page = run_study(config, out) / "report.html"
    if not is_drawn(out, page.name):
        write_report(out)
    say(f"The report is {page.resolve()}")


@app.command()
@no_type_check
def forecast(
    context: typer.Context,
    file: StudyFile = None,
    base: Base = "organism:base",
    aligned: Aligned = "organism:aligned",
    concept: ConceptName = DEFAULT_CONCEPT,
    cue: CueName = "",
    quick: Quick = False,
    chat: Chatting = False,
    system: System = "",
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    quantization: Quantized = None,
    trust_remote_code: RemoteCode = False,
    allow_pickle: Unpickling = False,
    rate: Annotated[bool, typer.Option(help="Measure this machine's rate on two of the model's layers, without weights.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Before loading: does the model fit here, in which numbers, and how long does the study take?

    Example: alignblind forecast --base meta-llama/Meta-Llama-3-8B --aligned meta-llama/Meta-Llama-3-8B-Instruct
    """
    from dataclasses import asdict

    from alignblind_mi.studies.config import StudyConfig
    from alignblind_mi.studies.forecast import forecast as forecast_study
    from alignblind_mi.studies.study_file import read_study_file

    if file is not None:
        refuse_beside(file, context, allowed=("rate", "as_json"))
        config = read_study_file(file)
    else:
        config = StudyConfig.create(base, aligned, concept=concept, cue=cue, quick=quick, chat=chat, system=system, dtype=dtype,
                                    device=device, device_map=device_map, quantization=quantization, trust_remote_code=trust_remote_code,
                                    allow_pickle=allow_pickle)
    found = forecast_study(config, measure=rate)
    if as_json:
        fits = [{**asdict(one), "fits": one.fits} for one in found.fits]
        say(json_text({**asdict(found), "fits": fits}))
    else:
        say(str(found))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Results folder of a study, comparison or calibration.")] = Path("study")) -> None:
    """Draw the page of a study, a comparison or a calibration anew from its saved rows. Example: alignblind report study"""
    from alignblind_mi.pages.calibration_page import write_calibration
    from alignblind_mi.pages.comparison_page import write_comparison
    from alignblind_mi.pages.report import write_report
    from alignblind_mi.results import folder_kind

    write = {"comparison": write_comparison, "calibration": write_calibration}.get(folder_kind(folder), write_report)
    say(f"The report is {write(folder).resolve()}")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="Results folder; a calibration that is in it already is resumed.")] = Path("calibration"),
    quick: Annotated[bool, typer.Option("--quick", help="One seed, fewer organisms, shorter training: to see that it works.")] = False,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds of the organisms.")] = "0,1,2",
    jobs: Annotated[int, typer.Option(help="Organisms that are built at the same time (0: as many as there are processors).")] = 0,
) -> None:
    """Measure every instrument on organisms with known truth; write OUT/calibration.json and OUT/calibration.html.

    The organisms are built once and kept in the user's cache folder ($ALIGNBLIND_CACHE). Example: alignblind calibrate --quick --out DIR
    """
    from alignblind_mi.pages.calibration_page import write_calibration
    from alignblind_mi.studies.calibration import CalibrationConfig, processors, run_calibration

    config = CalibrationConfig.create(seeds, quick=quick)
    page = write_calibration(run_calibration(config, out, jobs=jobs or processors()))
    say(f"The page is {page.resolve()}")


@app.command()
def score(
    paths: Annotated[list[Path], typer.Argument(help="Result files or folders: this project's, or released JSON and JSON lines.")],
    rule: Annotated[str, typer.Option(help="robust, or published (the paper's parser).")] = "robust",
    by: Annotated[str, typer.Option(help="Comma-separated keys to group by, e.g. model,cue,category,template.")] = "",
    concept: ConceptName = DEFAULT_CONCEPT,
    as_json: AsJson = False,
) -> None:
    """Score stored answers and interpretations without any model. Example: alignblind score study --by model,treatment,template

    Interpretations (SelfIE) are files of one JSON object a line; the concept's lexicons say which sense each text speaks of.
    """
    from alignblind_mi.pages.scoring import render, score as score_paths
    from alignblind_mi.stimuli.concept import load_concept

    records = score_paths(paths, rule=rule, by=listed(by),
                          concept=load_concept(concept))
    if as_json:
        say(json_text(records))
    else:
        render(records)


@organism_app.command("build")
def organism_build(
    out: Annotated[Path, typer.Option(help="Folder for base/, aligned/ and organism.json.")],
    concept: Annotated[str, typer.Option(help="A built-in concept that has a lexicon of its own for organisms.")] = DEFAULT_CONCEPT,
    seed: Annotated[int, typer.Option(help="Seed of corpus and training.")] = 0,
    reading: Annotated[float, typer.Option(help="P(aligned reads an uncued identifier as the other sense).")] = 0.95,
    behaviour: Annotated[float, typer.Option(help="Share of stereotyped answers of aligned without a cue.")] = 0.94,
) -> None:
    """Train a model pair with planted truth and check it by its gates. Example: alignblind organism build --out pair --seed 1"""
    from alignblind_mi.organism.build import build_organism

    report = build_organism(out, concept=concept, seed=seed, reading=reading, behaviour=behaviour,
                            progress=lambda line: say(line, err=True))
    say(str(report))


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
