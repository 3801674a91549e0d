"""Patchscopes: put a hidden representation into another prompt and let a model say what it is (Ghandeharioun et al. 2024).

A patchscope is a source (prompt, position, layer), a mapping, a target (prompt, positions, layer) and a read-out: probabilities or ranks
of next tokens, or generated text. The race-blind score, SelfIE, token identity and descriptions are settings of it, and so is reading one
model's representations with another. This module does NOT know senses or scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.settings import Layer, NewTokens, Seed, Temperature, Weight, Words, many, takes
from alignblind_mi.borders.texts import one_line
from alignblind_mi.models.edits import Edit, EditError, Row, Site, Sites, Stream, Tokens
from alignblind_mi.models.model import HookedModel
from alignblind_mi.stimuli.prompts import Prompt, Prompts, as_prompts, mark

Mapping = Callable[[Float[Tensor, "source d_model"]], Float[Tensor, "source d_model"]]


@takes(EditError)
def patchscope_rows(resid: Float[Tensor, "source d_model"], target: Prompt, layer: Layer, *, mark: str = "placeholder",
                    mapping: Mapping | None = None, stream: Stream = "resid_post", tokens: Tokens = "all") -> list[Row]:
    """One row per source vector: it replaces the stream after `layer` at every token of the target's `mark` (or the last one of each
    mention: `tokens`), mapped if there is a mapping.

    Source: Ghandeharioun et al. 2024; "Aligned but Blind" injects at layer 2 with the identity mapping (None).
    """
    site = Site(layer, mark, stream, tokens=tokens)
    return [Row(target, (Edit(site, vector),)) for vector in (resid if mapping is None else mapping(resid))]


def token_identity_prompt() -> Prompt:
    """The few-shot prompt that makes a model repeat a token ("cat->cat; 1135->1135; hello->hello; ?"); mark: placeholder (the ?).

    Source: Ghandeharioun et al. 2024, section 4.1.
    """
    return mark("cat->cat; 1135->1135; hello->hello; ?->", placeholder="?")


def description_prompt() -> Prompt:
    """The few-shot prompt that makes a model describe an entity; mark: placeholder (the x).

    Source: Ghandeharioun et al. 2024, section 4.3.
    """
    shots = ("Syria: Country in the Middle East", "Leonardo DiCaprio: American actor", "Samsung: South Korean multinational company", "x:")
    return mark(", ".join(shots), placeholder="x")


@dataclass(frozen=True)
class NormMatched:
    """Scales every vector to one norm (that of the vector which it replaces): direction without size."""

    norm: float

    def __call__(self, resid: Float[Tensor, "source d_model"]) -> Float[Tensor, "source d_model"]:
        """Vectors of norm `norm`; a zero vector stays one."""
        return resid * (self.norm / resid.norm(dim=-1, keepdim=True).clamp_min(1e-12))


@takes(EditError)
def norm_matched(model: HookedModel, target: Prompt, layer: Layer, *, mark: str = "placeholder") -> NormMatched:
    """The mapping to the norm that the target's own vector has at the place where a patchscope injects (its last token)."""
    own = model.record([Row(target)], [Site(layer, mark, occurrence=-1)])[0, 0]
    return NormMatched(float(own.norm()))


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> W x + b: carries representations of one layer or model into the space of another (Ghandeharioun et al. 2024, section 5)."""

    __repr__ = one_line

    weight: Float[Tensor, "to from"]
    bias: Float[Tensor, " to"]

    def __call__(self, resid: Float[Tensor, "source from"]) -> Float[Tensor, "source to"]:
        """The mapped vectors."""
        return resid @ self.weight.T + self.bias


@takes(EditError)
def fit_affine(source: Float[Tensor, "pair from"], target: Float[Tensor, "pair to"], *, ridge: Weight = 1e-2) -> Affine:
    """The affine map that carries `source` vectors to their `target` vectors with the least squared error.

    `ridge` times the mean squared size of the centred sources is added to the diagonal: with fewer pairs than dimensions the rest of the
    space is left at the mean. Errors: EditError for fewer than two pairs, or unequal numbers of vectors.
    """
    if len(source) != len(target) or len(source) < 2:
        raise EditError(f"an affine map is fitted on pairs, two or more: got {len(source)} source and {len(target)} target vectors.")
    x, y = source.double(), target.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    scale = ridge * float(x.square().sum(0).mean())
    weight = torch.linalg.solve(x.T @ x + scale * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x.T @ y).T
    return Affine(weight.float(), (mean_y - weight @ mean_x).float())


@takes(EditError)
def run_patchscope(model: HookedModel, prompts: Prompts, sites: Sites, target: Prompt, layer: Layer, *,
               into: HookedModel | None = None, mapping: Mapping | None = None, words: Words = (), max_new_tokens: NewTokens = 0,
               temperature: Temperature = 0.0, seed: Seed = 0) -> pd.DataFrame:
    """Read the representations at `sites` of `prompts` in a target prompt; one tidy row per prompt and site.

    The representations are those of `model` (under its treatment); the target is run by `into` (default: the same model, untreated as it
    stands), where they replace the stream after `layer` at the mark `placeholder`. Columns: the prompt's labels, model, into, source_layer,
    mark, stream, target_layer and, for each of the single-token `words`, p_<word>, base_<word> (target without a patch) and rank_<word>
    (0: the most probable); `text` if `max_new_tokens` is positive.

    Errors: EditError if the two models differ in width and no mapping fits.
    """
    into, prompts, sites = into or model, as_prompts(prompts), many(sites)
    into.check_known([target])
    resid = model.record(model.rows(prompts), sites)
    rows = patchscope_rows(resid.flatten(0, 1), target, layer, mapping=mapping)
    table = pd.DataFrame.from_records([
        {**prompt.labels, "model": model.spec.name, "into": into.spec.name, "treatment": model.treatment.name, "source_layer": site.layer,
         "mark": site.mark, "stream": site.stream, "target_layer": layer} for prompt in prompts for site in sites])
    if words:
        probs, base, ranks = into.next_probs(rows, words), into.next_probs([Row(target)], words)[0], into.next_ranks(rows, words)
        for i, word in enumerate(words):
            name = word.strip()
            table[f"p_{name}"], table[f"base_{name}"], table[f"rank_{name}"] = probs[:, i].numpy(), float(base[i]), ranks[:, i].numpy()
    if max_new_tokens:
        draws = [f"{prompt.text}|{site}" for prompt in prompts for site in sites]
        made = into.generate(rows, max_new_tokens, temperature=temperature, seed=seed, draws=draws)
        table["text"] = [one.text for one in made]
    return table
