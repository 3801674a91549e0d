"""`alignblind lora`: train an adapter (awareness, its mirror image, its placebo, or unlearning), and merge it if asked to."""

from pathlib import Path
from typing import Annotated, Any

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import Loading, One, ProtocolOption, Seed, Without, listed, with_options


@with_options
def lora(
    *,
    asked: Annotated[One, Without("cue")],
    layers: Annotated[str | None, typer.Option(help="early, middle, late, all, or numbers such as 0-3,7 (default: early; npo and "
                                                    "gradient_ascent: all).")] = None,
    kind: Annotated[str, typer.Option(help="aware, blind (the mirror image), placebo, npo or gradient_ascent (unlearning).")] = "aware",
    out: Annotated[Path, typer.Option(help="Adapter folder; one that is finished is kept, one that was killed goes on.")] = Path("adapter"),
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the pairs.")] = None,
    modules: Annotated[str | None, typer.Option(help="Comma-separated projections, q_proj ... down_proj.")] = None,
    activation_weight: Annotated[float, typer.Option(help="Weight of the loss that raises the group reading of the identifiers at the "
                                                          "trained layers.")] = 0.0,
    validation_share: Annotated[float, typer.Option(help="Share of the sentences held out; the epoch best on them is kept.")] = 0.0,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without a better one (needs --validation-share).")] = 0,
    protocol: ProtocolOption = None,
    seed: Seed = 0,
    merge: Annotated[Path | None, typer.Option(help="Also write a plain checkpoint with the adapter merged into the weights.")] = None,
    loading: Annotated[Loading, Without("engine", "tensor_parallel")],
) -> None:
    """Train a LoRA adapter as a mitigation, its rival or its placebo; a PEFT folder that load_model(adapters=[...]) takes.

    Hyper-parameters that are not given are the paper's, or what an organism's own record recommends.

    Example: alignblind lora --model organism:aligned --kind aware --layers early --out adapters/early
    """
    from contextlib import nullcontext
    from dataclasses import replace

    from alignblind_mi.borders.writing import refuse_taken
    from alignblind_mi.errors import AlignblindError
    from alignblind_mi.mitigations.lora import KINDS, examples_of, train_lora
    from alignblind_mi.mitigations.unlearning import METHODS, UnlearningSettings, train_unlearning
    from alignblind_mi.models.adapters import merge_adapter
    from alignblind_mi.models.loading import check_model
    from alignblind_mi.organism.build import one_thread
    from alignblind_mi.stimuli.concept import load_concept
    from alignblind_mi.studies.config import check_organism, organism_record, recommended_lora

    if kind not in (*KINDS, *METHODS):
        raise AlignblindError(f"unknown kind {kind!r}. Known: {', '.join((*KINDS, *METHODS))}.")
    if kind in METHODS and protocol == "paper":
        raise AlignblindError(f"the protocol 'paper' has no kind {kind}: the paper trains awareness; leave --protocol out.")
    if merge is not None:
        refuse_taken(merge, what="--merge")
        if merge.absolute() == out.absolute() or out.absolute() in merge.absolute().parents or merge.absolute() in out.absolute().parents:
            raise AlignblindError(f"--merge {merge} and --out {out} lie in one another: give the checkpoint a folder of its own.")
        if loading.quantization is not None:
            raise AlignblindError(f"--merge {merge} cannot be made of weights in {loading.quantization}: quantised weights cannot carry an "
                                  "adapter exactly; leave --quantization or --merge out.")
    spec = loading.spec(asked.model).resolved()
    data = load_concept(asked.concept)
    check_model(spec)
    check_organism(spec, data)
    data.both_senses()    # what is trained about
    given: dict[str, Any] = {
        "rank": rank, "learning_rate": learning_rate, "epochs": epochs,
        "modules": None if modules is None else tuple(listed(modules))}
    settings = replace(recommended_lora(spec, seed), activation_weight=activation_weight, validation_share=validation_share,
                       patience=patience, **{name: value for name, value in given.items() if value is not None})
    with one_thread() if organism_record(spec) else nullcontext():    # an organism's sums have one order
        if kind in METHODS:
            train_unlearning(spec, data, out, method=kind, layers=layers or "all", settings=UnlearningSettings(lora=settings))
        else:
            train_lora(spec, examples_of(data, kind), layers or "early", out, settings=settings, concept=data, kind=kind,
                       protocol="best" if protocol is None else protocol)
    _say(out)
    if merge is not None:
        say(f"merged checkpoint: {merge_adapter(spec, out, merge).resolve()}")


def _say(out: Path) -> None:
    """What was trained, from its training.json."""
    import json

    from alignblind_mi.mitigations.lora_settings import layers_text

    note = json.loads((out / "training.json").read_text("utf-8"))
    early = "" if note["steps"] == note["steps_planned"] else f" (of {note['steps_planned']}: stopped early)"
    lines = {"adapter": str(out.resolve()), "kind": note["method"], "layers": layers_text(note["layers"]),
             "parameters": f"{note['parameters']:,}", "examples": note["examples"], "steps": f"{note['steps']}{early}",
             "seconds": note["seconds"], "loss by epoch": _numbers(note["losses"])}
    if "validation_losses" in note:
        lines |= {"validation loss": f"{_numbers(note['validation_losses'])}; epoch {note['best_epoch']} was kept"}
    if "activation" in note:
        lines |= {f"score {when}": _numbers(note["activation"][f"score_{when}"]) for when in ("before", "after")}
    if "forget_loss" in note:
        lines |= {"loss on what is forgotten": f"{note['forget_loss']['before']} before, {note['forget_loss']['after']} after"}
    if "retain_kl" in note:
        lines |= {"divergence on the rest": note["retain_kl"]}
    for name, value in lines.items():
        say(f"{name}: {value}")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
