"""`alignblind export`: what other evaluation frameworks read."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import ConceptName, Seed
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT

export_app = typer.Typer(no_args_is_help=True, help="Tasks and steering vectors for lm-evaluation-harness.")


@export_app.command("harness")
def export_harness(
    out: Annotated[Path, typer.Option(help="A new folder for the task files.")],
    concept: ConceptName = DEFAULT_CONCEPT,
    cue: Annotated[str, typer.Option(help="A cue of the concept (default: all).")] = "",
    design: Annotated[str, typer.Option(help="balanced (association and position apart) or published (the paper's).")] = "balanced",
    max_word_pairs: Annotated[int | None, typer.Option(help="At most so many word pairs of each category.")] = None,
    seed: Seed = 0,
) -> None:
    """Write the implicit and explicit suites of a concept as tasks. Example: alignblind export harness --concept race --out tasks

    Then: lm_eval --include_path tasks --tasks alignblind_race --model hf --model_args pretrained=MODEL
    """
    from alignblind_mi.exchange.harness import write_harness
    from alignblind_mi.stimuli.concept import load_concept

    group, *tasks = write_harness(load_concept(concept), out, cue=cue, design=design, max_word_pairs=max_word_pairs, seed=seed)
    say("\n".join([f"{out} holds the group {group} of {len(tasks)} tasks:", *(f"  {name}" for name in tasks)]))


@export_app.command("steered")
def export_steering(
    vectors: Annotated[Path, typer.Argument(help="Steering vectors that `alignblind steer` saved (.safetensors).")],
    out: Annotated[Path, typer.Option(help="A new file, NAME.pt.")],
    how: Annotated[str, typer.Option(help="add or ablate.")] = "add",
    strength: Annotated[float, typer.Option(help="Factor of what is added.")] = 1.0,
    hookpoint: Annotated[str, typer.Option(help="Where a layer lies in the model: h.{layer} in GPT-2's family.")] = "layers.{layer}",
) -> None:
    """Write steering vectors for the harness's steered models. Example: alignblind export steered vectors.safetensors --out steered.pt

    Then: lm_eval --model steered --model_args pretrained=MODEL,steer_path=steered.pt
    """
    from alignblind_mi.exchange.harness import export_steered
    from alignblind_mi.mitigations.steering import load_vectors

    export_steered(load_vectors(vectors), out, how=how, strength=strength, hookpoint=hookpoint)
    say(f"{out} holds them; they act on every token.")
