"""Path patching: one head's output goes to one later head's input alone, and everything else stays as it was.

Source: Goldowsky-Dill et al. 2023 (arXiv 2304.05969); Wang et al. 2023 (arXiv 2211.00593). The work is transformer-lens'
(`transformer_lens.patching.get_act_patch_direct_path` on the bridge): the sender's change of output, source minus target, is added at every
position to the receiver's own copy of the residual stream. This module makes tidy rows of it, under the model's treatment. It does NOT
know concepts.

What transformer-lens cannot do it says: with grouped key-value heads (GQA, as in Llama 3) several heads share one key and one value, so
that only queries (`component="q"`) are receivers; and a block must add its heads' outputs as they are.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from alignblind_mi.borders.settings import many, takes
from alignblind_mi.instruments.contrast import Pairs, PatchError
from alignblind_mi.instruments.patching import MIN_DIFFERENCE, Case, cases, outcome
from alignblind_mi.models.model import HookedModel
from alignblind_mi.models.tokens import TokenRow
from alignblind_mi.progress import counted

COMPONENTS = ("q", "k", "v")
Head = tuple[int, int]


@takes(PatchError)
def path_patch(model: HookedModel, pairs: Pairs, senders: Sequence[Head], *, receivers: Collection[Head] | None = None,
               component: str = "q", direction: str = "denoise", min_difference: float = MIN_DIFFERENCE,
               progress: Callable[[int], None] | None = None) -> pd.DataFrame:
    """Patch the direct path from each sending head (layer, head) into heads of later layers; one row per pair, sender and receiver.

    `component` is what of the receiver is reached: its query, key or value. `receivers` keeps those (layer, head) only; all later heads are
    computed anyway (one forward pass each, twice: once per answer). The answers' own tokens are positions too.

    Columns: model, treatment, the pair's labels, pair, direction, component, sender_layer, sender_head, layer, head (the receiver), and
    log_odds, clean, corrupt, moved, effect, p_stereotyped, flipped as in `patch_grid`.

    Errors: PatchError for an unknown component, a head that does not exist, or a model for which transformer-lens has no such path.
    """
    if component not in COMPONENTS:
        raise PatchError(f"unknown component {component!r}. Known: {', '.join(COMPONENTS)}.")
    for layer, head in (*senders, *(receivers or ())):
        if head >= model.n_units(layer, "z"):
            raise PatchError(f"head {head} of layer {layer} does not exist: {model.spec.name} has {model.n_units(layer, 'z')} heads there.")
    pairs = many(pairs)
    records: list[dict[str, object]] = []
    with counted("path patching", len(pairs), "pairs") as advance:
        for i, case in enumerate(cases(model, pairs, direction)):
            found, source, target = _both_answers(model, case, senders, component)
            clean, corrupt = (source, target) if direction == "denoise" else (target, source)
            about = {"model": model.spec.name, "treatment": model.treatment.name, "pair": str(i), **case.pair.labels,
                     "direction": direction, "component": component}
            for (layer, head), odds in zip(senders, found, strict=True):
                records += [{**about, "sender_layer": layer, "sender_head": head, "layer": at, "head": other,
                             **outcome(float(odds[at, other]), clean, corrupt, direction, min_difference)}
                            for at in range(layer + 1, odds.shape[0]) for other in range(odds.shape[1])
                            if receivers is None or (at, other) in receivers]
            if progress is not None:
                progress(1)
            advance(1)
    return pd.DataFrame.from_records(records)


def _both_answers(model: HookedModel, case: Case, senders: Sequence[Head], component: str) -> tuple[list[Tensor], float, float]:
    """Log-odds by [receiver layer, receiver head] for each sender, and those of the source and the target run."""
    first, second = (_log_probs(model, case, answer, senders, component) for answer in case.pair.answers)
    return [a - b for a, b in zip(first[0], second[0], strict=True)], first[1] - second[1], first[2] - second[2]


def _log_probs(model: HookedModel, case: Case, answer: str, senders: Sequence[Head], component: str) -> tuple[list[Tensor], float, float]:
    """The answer's log-probability after each path patch, and in the source and the target run."""
    from transformer_lens.patching import get_act_patch_direct_path

    ((ids,),) = model.continuation_ids([case.target], [[answer]])
    names = sorted({f"blocks.{layer}.attn.hook_z" for layer, _ in senders})

    def metric(logits: Tensor) -> Tensor:
        before = logits[0, -len(ids) - 1 : -1].float().log_softmax(-1)
        return before.gather(1, torch.tensor(ids, device=before.device)[:, None]).sum()

    source, target = (replace(tokens, ids=(*tokens.ids, *ids)) for tokens in model.token_rows([case.sources[""], case.target]))
    source_cache, source_value = _cached(model, source, names, metric)
    target_cache, target_value = _cached(model, target, names, metric)
    with torch.no_grad(), model.edited_bridge([target]) as (bridge, tokens, _):
        try:
            found = [get_act_patch_direct_path(bridge, tokens, source_cache, target_cache, metric, *sender, component, verbose=False).cpu()
                     for sender in senders]
        except (ValueError, NotImplementedError) as error:
            raise PatchError(f"transformer-lens has no direct path into component {component!r} of {model.spec.name}: {error}") from error
    return found, source_value, target_value


def _cached(model: HookedModel, row: TokenRow, names: list[str], metric: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], float]:
    with torch.no_grad(), model.edited_bridge([row]) as (bridge, tokens, mask):
        logits, cache = bridge.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    return {name: cache[name] for name in names}, float(metric(logits))
