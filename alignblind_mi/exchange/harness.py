"""lm-evaluation-harness: the suites of a concept as its task files, and steering vectors as its `steered` models read them.

Source: EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness. The files that are written call `harness_functions`, so that its
answers are judged as ours are. Writing needs no part of the harness. This module does NOT know its models, nor ours.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignblind_mi.borders.settings import Count, File, Seed, Strength, takes
from alignblind_mi.borders.writing import refuse_taken, whole_folder, write_bytes
from alignblind_mi.errors import AlignblindError
from alignblind_mi.exchange.harness_functions import SHARED
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.mitigations.steering import SteeringVectors
from alignblind_mi.models.edits import EditError
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import KINDS, Design, Prompt, assignments, behaviour_prompts, worded_positions

FUNCTIONS = "alignblind_functions"    # the module beside the task files
BY = {"": "generate_until", "_probability": "multiple_choice"}    # what a task's name ends with: how the harness asks
METRICS = {"": (*SHARED, "refused_share"), "_probability": (*SHARED, "log_odds")}
_CODE = '''"""What the task files of this folder call; `alignblind export harness` wrote them."""

from pathlib import Path

from alignblind_mi.exchange.harness_functions import {names}


def documents(file, **_):
    """The documents of one task."""
    return load_documents(Path(__file__).parent / file)
'''


class ExchangeError(AlignblindError):
    """Something that cannot be given to another framework."""


@takes(ExchangeError)
def write_harness(concept: Concept, out: File, *, cue: str = "", design: Design | str = "balanced", max_word_pairs: Count | None = None,
                  seed: Seed = 0) -> list[str]:
    """Write a new folder of task files for `lm_eval --include_path OUT`; returns the names of its tasks, the group of all of them first.

    For each cue (default: all of the concept) and kind: `alignblind_CONCEPT_CUE_KIND`, whose greedy answers are judged by the robust rule,
    and `..._probability`, in which the more probable answer counts: of implicit prompts the assignment in the concept's own wording
    (`log_odds_first` of `measure_behaviour`), of explicit ones all wordings of either position. Metrics: the rate with its interval over
    word pairs and templates, the share of invalid answers, of refusals, and the effect of positions (of implicit texts).

    Errors: ExchangeError for a folder that is not new; ConceptError and PromptError as `behaviour_prompts`.
    """
    cues = [cue] if cue else list(concept.cues)
    suites = {(name, kind): behaviour_prompts(concept, name, kind, design=design, seed=seed, max_word_pairs=max_word_pairs)
              for name in cues for kind in KINDS}
    group, files, tasks = f"alignblind_{concept.name}", dict[str, str](), list[str]()
    for (name, kind), prompts in suites.items():
        base = f"{group}_{name}_{kind}"
        files[f"{base}.jsonl"] = "".join(f"{json.dumps(_document(concept, prompt), ensure_ascii=False)}\n" for prompt in prompts)
        for end in BY:
            tasks.append(f"{base}{end}")
            files[f"{base}{end}.yaml"] = _yaml(_task(f"{base}{end}", f"{base}.jsonl", kind, end))
    files[f"{group}.yaml"] = _yaml({"group": group, "task": tasks})
    used = ["text_results", "probability_results", "load_documents", "position", *sorted({m for names in METRICS.values() for m in names})]
    files[f"{FUNCTIONS}.py"] = _CODE.format(names="(  # noqa: F401\n    " + ",\n    ".join(used) + ",\n)")
    with whole_folder(Path(out), ExchangeError) as folder:
        for file, text in files.items():
            (folder / file).write_text(text, "utf-8")
    return [group, *tasks]


def _document(concept: Concept, prompt: Prompt) -> dict[str, Any]:
    """A prompt with its labels, and the answers that are scored: by turns for the stereotype (the statement) and against it."""
    pairs = [assignments(concept, prompt)] if prompt.labels["kind"] == "implicit" else worded_positions(concept, prompt)
    return {"prompt": prompt.text, **prompt.labels, "choices": [text for pair in pairs for text in pair]}


def _task(name: str, file: str, kind: str, end: str) -> dict[str, Any]:
    metrics = (*METRICS[end], *(("position",) if kind == "implicit" and not end else ()))
    greedy = {"max_gen_toks": Decoding().max_new_tokens, "do_sample": False, "temperature": 0.0, "until": []}
    asked = {"generation_kwargs": greedy, "doc_to_target": "word_pair"} if not end else {
        "doc_to_choice": "choices", "doc_to_target": 0, "target_delimiter": ""}
    return {"task": name, "custom_dataset": _call("documents"), "dataset_kwargs": {"file": file}, "test_split": "test",
            "output_type": BY[end], "doc_to_text": "prompt", **asked,
            "process_results": _call("probability_results" if end else "text_results"), "num_fewshot": 0,
            "metric_list": [{"metric": one, "aggregation": _call(one), "higher_is_better": False} for one in metrics],
            "metadata": {"version": 1}}


class _Call(str):
    """A function of the module beside the task files."""


def _call(name: str) -> _Call:
    return _Call(f"{FUNCTIONS}.{name}")


def _yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes a call as `!function MODULE.NAME`, and nothing as a reference to what stands above."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    Dumper.add_representer(_Call, lambda dumper, value: dumper.represent_scalar("!function", str(value)))
    return str(yaml.dump(dict(settings), Dumper=Dumper, sort_keys=False, allow_unicode=True))


# ---- steering ------------------------------------------------------------------------------------------------------------


@takes(EditError)
def export_steered(vectors: SteeringVectors, path: File, *, how: str = "add", strength: Strength = 1.0, hookpoint: str = "layers.{layer}"
                   ) -> None:
    """Write steering vectors for the harness: `lm_eval --model steered --model_args pretrained=M,steer_path=PATH`, a new .pt file.

    how: `add` times strength, or `ablate` (its `clamp` to 0 along the direction). The harness steers every token that a model reads or
    writes: here that is `vectors.treatment(how=..., positions=("prompt", "generated"))`, but for a token that begins the text (BOS), which
    the harness steers too, and which changes what is read after it. `hookpoint` is where a layer lies below the model's base:
    `layers.{layer}` in most families, `h.{layer}` in GPT-2's.

    Errors: EditError for vectors that replace, are not of `resid_post`, a strength other than 1 for `ablate`, a hookpoint without {layer},
    a name that does not end in .pt, or one that is taken.
    """
    path = Path(path)
    problem = ("vectors of the method replacement are whole activations, which the harness cannot put in place: find directions, such as "
               "mean_difference" if vectors.replaces
               else f"the harness steers the output of layers, these are vectors of {vectors.stream}" if vectors.stream != "resid_post"
               else f"unknown way {how!r} to steer. Known: add, ablate" if how not in ("add", "ablate")
               else "the harness ablates a direction as a whole: leave the strength at 1" if how == "ablate" and strength != 1
               else f"the hookpoint {hookpoint!r} does not say where a layer lies: write {{layer}} for its number, as in layers.{{layer}}"
               if "{layer}" not in hookpoint else f"{path} does not end in .pt, by which the harness knows such files"
               if path.suffix != ".pt" else "")
    if problem:
        raise EditError(f"{problem}.")
    refuse_taken(path, kind=EditError)
    import torch

    entries = {hookpoint.replace("{layer}", str(layer)): {
        "steering_vector": vectors.vectors[index, 0].clone(), "steering_coefficient": float(strength) if how == "add" else 0.0,
        "action": "add" if how == "add" else "clamp", "bias": None, "head_index": None} for index, layer in enumerate(vectors.layers)}
    held = io.BytesIO()
    torch.save(entries, held)
    write_bytes(path, held.getvalue())
