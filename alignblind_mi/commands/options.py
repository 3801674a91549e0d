"""Option types that several verbs share: one help text each. Does NOT know what a verb does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from alignblind_mi.errors import AlignblindError

Model = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, organism:base or organism:aligned.")]
Base = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:base.")]
Aligned = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:aligned.")]
ConceptName = Annotated[str, typer.Option(help="A built-in concept or a .toml file.")]
CueName = Annotated[str, typer.Option(help="A cue of the concept (default: its first).")]
Quick = Annotated[bool, typer.Option("--quick", help="A small share of the prompts: to see that it works.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: by device).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed to transformers, e.g. auto for a model on several GPUs.")]
Quantized = Annotated[str | None, typer.Option(help="8bit or 4bit (bitsandbytes; pip install 'alignblind-mi\\[quantized]').")]
Chatting = Annotated[bool, typer.Option("--chat", help="Ask in the models' own chat templates (default: raw text, as the paper).")]
System = Annotated[str, typer.Option(help="A system prompt before every prompt of the chat.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, above it answers are sampled (default: 0; 1 for an organism).")]
EngineOption = Annotated[str, typer.Option(help="fast, plain (transformers' own forward pass), or auto: fast where both agree.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along (read it first).")]
Unpickling = Annotated[bool, typer.Option("--allow-pickle", help="Unpickle weights that lie in .bin files (torch, weights_only): only from "
                                                           "makers whom you trust.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn, sampled answers among it.")]
Out = Annotated[Path, typer.Option(help="Results folder; what is in it already is not computed again.")]
StudyFile = Annotated[Path | None, typer.Argument(help="A YAML file with all settings (instead of options).", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON records and nothing else.")]


def listed(text: str) -> list[str]:
    """The names of a comma-separated option; none where it is not given. Errors: AlignblindError for commas without names."""
    names = [name.strip() for name in text.split(",")] if text else []
    if not all(names):
        raise AlignblindError(f"{text!r} has commas without a name: give names with one comma between them, or leave the option out.")
    return names


def refuse_beside(file: Path, context: Any, *, allowed: Sequence[str]) -> None:
    """Errors: AlignblindError for an option that is given beside a study file: a study's settings stand in one place.

    `context` is typer's (of a class of its own that is not the one it documents, so that functions which take one are not type-checked).
    """
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in ("file", *allowed)}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise AlignblindError(f"{option} was given beside the study file {file}, which holds all settings: write it into the file, or give "
                              "options alone.")
