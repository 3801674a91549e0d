"""Option types that several verbs share: one help text each. Does NOT know what a verb does."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, organism:base or organism:aligned.")]
Base = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:base.")]
Aligned = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:aligned.")]
ConceptName = Annotated[str, typer.Option(help="A built-in concept or a .toml file.")]
CueName = Annotated[str, typer.Option(help="A cue of the concept (default: its first).")]
Quick = Annotated[bool, typer.Option("--quick", help="A small share of the prompts: to see that it works.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: by device).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed to transformers, e.g. auto for a model on several GPUs.")]
Quantized = Annotated[str | None, typer.Option(help="8bit or 4bit (bitsandbytes; pip install 'alignblind-mi[quantized]').")]
Chatting = Annotated[bool, typer.Option("--chat", help="Ask in the models' own chat templates (default: raw text, as the paper).")]
System = Annotated[str, typer.Option(help="A system prompt before every prompt of the chat.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, above it answers are sampled (default: 0; 1 for an organism).")]
EngineOption = Annotated[str, typer.Option(help="fast, plain (transformers' own forward pass), or auto: fast where both agree.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along (read it first).")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn, sampled answers among it.")]
Out = Annotated[Path, typer.Option(help="Results folder; what is in it already is not computed again.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON records and nothing else.")]


def listed(text: str) -> list[str]:
    """The names of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]
