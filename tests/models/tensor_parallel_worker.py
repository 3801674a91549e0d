"""What is asked of a model in one process and in several, run by `test_tensor_parallel.py`: `OUT ADAPTER`, under torchrun or without.

Every process writes what it found, so that they are seen to agree. Not a test itself.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

import alignblind_mi as ab
from alignblind_mi.errors import AlignblindError
from alignblind_mi.instruments.gradients import log_odds_gradients
from alignblind_mi.instruments.patchscope import patchscope_rows
from alignblind_mi.models.edits import Edit, Row, Site, Treatment
from alignblind_mi.models.model import HookedModel, untrained
from alignblind_mi.stimuli.prompts import mark

PROMPTS = [mark(text, word=word) for text, word in (("the black car was good", "black"), ("the white house", "white"),
                                                     ("a person who is black is", "person"))]


def found_on(model: HookedModel) -> dict[str, Any]:
    """Numbers and texts of every kind."""
    width, rows = model.d_model, [Row(prompt) for prompt in PROMPTS]
    vectors = torch.randn(4, 2 * width + 64, generator=torch.Generator().manual_seed(0))
    streams = {"resid_post": width, "attn_out": width, "z": model.site_size(Site(3, "word", "z")),
               "post": model.site_size(Site(3, "word", "post"))}
    edits = {name: Edit(Site(3, "word", name), torch.randn(size, generator=torch.Generator().manual_seed(1)), "add", 2.0)
             for name, size in streams.items()}
    out: dict[str, Any] = {"plain": model.next_log_probs(rows)}
    for name, edit in edits.items():
        out[f"edited {name}"] = model.next_log_probs([Row(prompt, (edit,)) for prompt in PROMPTS])
        out[f"read {name}"] = model.record(rows, [Site(4, "word", name)])
    shared = [Row(PROMPTS[0], (Edit(Site(layer, "word"), vectors[0, :width]),)) for layer in range(model.n_layers)]
    out["steered"] = model.next_log_probs(shared)
    out["lens"] = model.lens_log_probs(rows, [Site(5, "word")], [" black", " white"])
    out["choices"] = model.continuation_log_probs(rows, [[" good", " bad"]] * len(rows))
    scope = patchscope_rows(vectors[:, :width], mark("good is x", placeholder="x"), 2)
    out["patchscope"] = model.next_probs(scope, [" black", " white"])
    out["greedy"] = [answer.text for answer in model.generate([*rows, *scope, *shared], 8)]
    out["sampled"] = [answer.text for answer in model.generate(rows, 8, temperature=1.0, seed=3)]
    return out


def refused(model: HookedModel) -> list[str]:
    """What is said where something does not run on parts of a model."""
    said = []
    for act in (lambda: model.cache(PROMPTS), lambda: untrained(model),
                lambda: log_odds_gradients(model, Row(PROMPTS[0]), (" good", " bad"), [])):
        try:
            act()
        except AlignblindError as error:
            said.append(str(error))
    return said


def main() -> None:
    out, adapter = Path(sys.argv[1]), sys.argv[2]
    split = "RANK" in os.environ
    found: dict[str, Any] = {}
    for engine in ("fast", "plain"):
        model = ab.load_model(ab.ModelSpec("organism:aligned", dtype="float32", engine=engine, tensor_parallel=split), adapters=[adapter])
        assert model.engine.name == engine
        if split:
            assert sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.engine.model.model.layers.parameters()
                       ) < 0.8 * sum(p.numel() for p in model.engine.model.model.layers.parameters())
        found |= {f"{engine}: {name}": value for name, value in found_on(model).items()}
        (name,) = model.adapters
        found |= {f"{engine}, adapter: {name_}": value for name_, value in found_on(model.under(Treatment("on", adapter=name))).items()}
        found[f"{engine}: refused"] = refused(model) if split else []
    torch.save(found, out / f"{'one' if not split else os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
