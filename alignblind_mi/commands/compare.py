"""`alignblind compare`: every mitigation on a model, what it changes and what it breaks."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.concept import DEFAULT_CONCEPT


def compare(
    base: Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:base.")] = "organism:base",
    aligned: Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:aligned.")] = "organism:aligned",
    concept: Annotated[str, typer.Option(help="A built-in concept or a .toml file.")] = DEFAULT_CONCEPT,
    cue: Annotated[str, typer.Option(help="A cue of the concept (default: its first).")] = "",
    out: Annotated[Path, typer.Option(help="Results folder; a comparison that is in it already is resumed.")] = Path("comparison"),
    quick: Annotated[bool, typer.Option("--quick", help="Few word pairs, one or two treatments a family: to see that it works.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default: greedy; the embedded pair is sampled at 1).")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template.")] = False,
    system: Annotated[str, typer.Option(help="System prompt of the chat.")] = "",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: by device).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")] = None,
    device_map: Annotated[str | None, typer.Option(help="Passed to transformers, e.g. auto for a model on several GPUs.")] = None,
    quantization: Annotated[str | None, typer.Option(help="8bit or 4bit (bitsandbytes).")] = None,
    engine: Annotated[str, typer.Option(help="fast, plain, or auto: fast where both agree.")] = "auto",
) -> None:
    """Compare steering, LoRA, unlearning, prompts and placebos; write OUT/comparison.json and OUT/comparison.html.

    Example: alignblind compare --base meta-llama/Meta-Llama-3-8B --aligned meta-llama/Meta-Llama-3-8B-Instruct --out compared
    """
    from alignblind_mi.comparison_page import write_comparison
    from alignblind_mi.studies.comparison import run_comparison
    from alignblind_mi.studies.study import StudyConfig

    config = StudyConfig.create(base, aligned, concept=concept, cue=cue, quick=quick, seed=seed, temperature=temperature, chat=chat,
                                system=system, dtype=dtype, device=device, device_map=device_map, quantization=quantization, engine=engine)
    page = write_comparison(run_comparison(config, out))
    typer.echo(f"The page is {page.resolve()}")
