"""`alignblind organism`: model pairs with planted truth."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT

organism_app = typer.Typer(no_args_is_help=True, help="The embedded model pairs: calibration devices, never evidence about a real model.")


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
