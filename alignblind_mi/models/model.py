"""HookedModel: cache activations of a causal language model, run rows with edits, read out text or probabilities.

Rows run on the plain transformers model (`engine.py`, or `plain.py`). Everything of transformer-lens is at hand as `HookedModel.bridge`, a
TransformerBridge (the successor of HookedTransformer) on the same weights; this module is the only place that boots one. It does NOT know
concepts, outcomes or studies.
"""

import contextlib
import copy
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignblind_mi.borders.settings import Files, NewTokens, Seed, Temperature, Words, many, takes
from alignblind_mi.models.adapters import adapted, switched, with_adapters
from alignblind_mi.models.blocks import log_probs_of, text_config, tolerance, unembed
from alignblind_mi.models.configs import quiet
from alignblind_mi.models.decoding import Batch, Generation, Stop, continuation_log_probs, decode, sampler
from alignblind_mi.models.edits import UNITS, EditError, Row, Rows, Site, Sites, acts_in
from alignblind_mi.models.fingerprints import fingerprint
from alignblind_mi.models.loading import check_model, load_huggingface, stop_ids
from alignblind_mi.models.spec import DTYPES, AnySpec, ModelError, as_spec
from alignblind_mi.models.stems import cut
from alignblind_mi.models.tokens import Reader, Taps, TokenRow, left_pad, place
from alignblind_mi.models.trial import choose_engine, try_adapters
from alignblind_mi.models.twin import Cached, Twin, bridge_hooks, name_filter
from alignblind_mi.models.view import View, alone
from alignblind_mi.stimuli.prompts import Prompts

log = logging.getLogger(__name__)
_LOADING = threading.RLock()    # loading changes what all threads share: torch's defaults and its random numbers


@dataclass(frozen=True, eq=False, repr=False)    # View has it
class HookedModel(View):
    """A model that runs rows: see `load_model`. `under(treatment)` and `in_chat(chat)` give views on the same weights; nothing is changed
    in place.

    Threads may share a model and its views: a run puts hooks and adapters on the weights for a while, so that it holds `lock`, which all
    views have in common (a thread that holds it may take it again), and other threads wait. Who uses `bridge` or `engine` directly from
    several threads takes it too: `with model.lock: ...`.
    """

    @takes(ModelError)
    @alone
    def cache(self, prompts: Prompts, names: Sequence[str] | Callable[[str], bool] | None = None) -> Cached:
        """Run prompts and keep activations at any hook points of the bridge (`names`: a list, a predicate, or None for all of them)."""
        rows = self.rows(prompts)
        wanted = name_filter(names, self.bridge)
        with torch.no_grad(), self.edited_bridge(self.token_rows(rows)) as (bridge, ids, attended):
            _, cache = bridge.run_with_cache(ids, attention_mask=attended, names_filter=wanted)
        return Cached(ids, attended, {name: value.detach().clone() for name, value in cache.items() if wanted(name)})

    @contextlib.contextmanager
    def edited_bridge(self, rows: Sequence[TokenRow]) -> Iterator[tuple[Any, Int[Tensor, "row token"], Int[Tensor, "row token"]]]:
        """The bridge with the edits of a batch of rows in it, their left-padded tokens and their mask: for transformer-lens' own tools."""
        with self.lock:
            bridge = self.bridge
            ids, mask = left_pad([row.ids for row in rows], bridge.cfg.device)
            taps = Taps(rows, [len(row.ids) - ids.shape[1] for row in rows])
            with bridge.hooks(fwd_hooks=bridge_hooks(taps)):
                yield bridge, ids, mask.long()

    @takes(ModelError)
    @alone
    def record(self, rows: Rows, sites: Sites) -> Float[Tensor, "row site size"]:
        """Activations at sites, after the row's edits, in float32; size is d_model, or that of the sites' heads or neurons.

        Here and below, one row or several: each a `Row`, which is raw, or a prompt or text, which is asked as this view asks (see `rows`).

        Errors: EditError for a site of several tokens (pick one with `occurrence`), or for sites of different sizes.
        """
        rows, sites = self.as_rows(rows), many(sites)
        sizes = {self.site_size(site): site for site in reversed(sites)}
        if len(sizes) > 1:
            said = ", ".join(f"{site.stream} of layer {site.layer} has {size}" for size, site in sizes.items())
            raise EditError(f"sites of different sizes ({said}) cannot be recorded together: record those of each size in their own call.")
        return self._at_sites(rows, sites, Reader(next(iter(sizes), self.d_model), lambda activations: activations))

    @takes(ModelError)
    @alone
    def record_tokens(self, rows: Rows, sites: Sites) -> list[Float[Tensor, "_ d_model"]]:
        """For each row, the residual stream at every token of the sites, each token once, in their order; in float32.

        Where `record` reads one token a site, this reads them all: a mark that occurs several times, or the whole `prompt`. Sites at a mark
        that a row lacks have no tokens there. Errors: EditError for a site of other than d_model values.
        """
        rows, sites = self.as_rows(rows), many(sites)
        other = next((site for site in sites if self.site_size(site) != self.d_model), None)
        if other is not None:
            raise EditError(f"{other.stream} of layer {other.layer} is no residual stream: record it with `record`.")
        whole, encoded = self.token_rows(rows), self.encode([row.prompt for row in rows])
        reads = [tuple(dict.fromkeys(place(site.layer, site.stream, at) for site in sites if acts_in(item.prompt, site.mark)
                                     for at in item.at(site))) for item in encoded]
        some = [i for i, there in enumerate(reads) if there]
        out: list[Tensor] = [torch.empty(0, self.d_model) for _ in rows]

        def keep(batch: Batch) -> None:
            for k, found in zip(batch.index, batch.found, strict=True):
                out[some[k]] = found[: len(reads[some[k]])].clone()

        self._over([replace(whole[i], reads=reads[i]) for i in some], None, keep, Reader(self.d_model, lambda resid: resid))
        return out

    @takes(ModelError)
    @alone
    def lens_log_probs(self, rows: Rows, sites: Sites, targets: Words) -> Float[Tensor, "row site target"]:
        """What the residual stream at each site says of single-token words through the final norm and the unembedding.

        Exact log-probabilities over the whole vocabulary, which exists for a part of the sites at a time (logit lens, nostalgebraist 2020).
        """
        rows, sites = self.as_rows(rows), many(sites)
        inner = [site.stream for site in sites if site.stream in UNITS]
        if inner:
            raise EditError(f"the lens reads residual streams, not {inner[0]}: its {UNITS[inner[0]]}s are not in the space of the words.")
        self._check_lens()
        ids = torch.tensor([self.token_id(word) for word in targets], dtype=torch.long)
        return self._at_sites(rows, sites, Reader(len(ids), lambda resid: log_probs_of(self.engine.model, resid, ids,
                                                                                       self.engine.budget.lens_block)))

    @alone
    def _check_lens(self) -> None:
        """Errors: ModelError for a model whose answer is not its final norm and head alone (scaled or capped logits)."""
        ids = tuple(range(min(8, text_config(self.engine.model).vocab_size)))
        at = place(self.n_layers - 1, "resid_post", len(ids) - 1)
        found: list[Tensor] = []
        reader = Reader(self.d_model, lambda resid: resid)
        self._over([TokenRow(ids, reads=(at,))], None, lambda batch: found.append(batch.found[0, 0]), reader)
        with torch.no_grad(), switched(self.peft, self.treatment.adapter):
            model = self.engine.model
            answer = model(torch.tensor([ids], device=self.engine.device), use_cache=False).logits[0, -1].float().log_softmax(-1)
            resid = found[0].to(model.dtype).to(self.engine.device)
            difference = float((unembed(model, resid).log_softmax(-1).to(answer) - answer).abs().max())
        if difference > tolerance(model):
            raise ModelError(f"the answers of {self.spec.name} are not its final norm and head alone (they differ by {difference:.2g} in "
                             "log-probabilities: scaled or capped logits): a logit lens on it would be wrong.")

    @alone
    def _at_sites(self, rows: Sequence[Row], sites: Sequence[Site], reader: Reader) -> Float[Tensor, "row site value"]:
        out = torch.empty(len(rows), len(sites), reader.size)

        def keep(batch: Batch) -> None:
            out[batch.index] = batch.found

        if sites:
            self._over(self.token_rows(rows, sites), None, keep, reader)
        return out

    @takes(ModelError)
    @alone
    def next_log_probs(self, rows: Rows) -> Float[Tensor, "row vocabulary"]:
        """Log-probabilities of every next token after each row, in float32."""
        rows = self.as_rows(rows)
        out = torch.empty(len(rows), text_config(self.engine.model).vocab_size)

        def keep(batch: Batch) -> None:
            out[batch.index] = batch.logits().log_softmax(-1).cpu()

        self._over(self.token_rows(rows), None, keep)
        return out

    @takes(ModelError)
    @alone
    def text_log_probs(self, rows: Rows) -> list[Float[Tensor, "token vocabulary"]]:
        """For each row, log-probabilities of every next token after each of its tokens but the last, in float32."""
        whole = self.token_rows(self.as_rows(rows))
        starts = [(i, n) for i, row in enumerate(whole) for n in range(1, len(row.ids))]
        parts = [cut(whole[i], 0, n) for i, n in starts]
        out = [torch.empty(len(row.ids) - 1, text_config(self.engine.model).vocab_size) for row in whole]

        def keep(batch: Batch) -> None:
            for k, log_probs in zip(batch.index, batch.logits().log_softmax(-1).cpu(), strict=True):
                i, n = starts[k]
                out[i][n - 1] = log_probs

        self._over(parts, None, keep)
        return out

    @takes(ModelError)
    @alone
    def next_probs(self, rows: Rows, targets: Words) -> Float[Tensor, "row target"]:
        """Probabilities of single-token target words as the next token after each row."""
        rows = self.as_rows(rows)
        ids = torch.tensor([self.token_id(word) for word in targets], dtype=torch.long)
        out = torch.empty(len(rows), len(targets))

        def keep(batch: Batch) -> None:
            out[batch.index] = batch.log_probs_of(ids).exp()

        self._over(self.token_rows(rows), None, keep)
        return out

    @takes(ModelError)
    @alone
    def next_ranks(self, rows: Rows, targets: Words) -> Int[Tensor, "row target"]:
        """Ranks of single-token target words as the next token after each row: 0 is the most probable of the vocabulary."""
        rows = self.as_rows(rows)
        ids = torch.tensor([self.token_id(word) for word in targets], dtype=torch.long)
        out = torch.empty(len(rows), len(targets), dtype=torch.long)

        def keep(batch: Batch) -> None:
            logits = batch.logits()
            wanted = logits[:, ids.to(logits.device)]
            out[batch.index] = torch.stack([(logits > wanted[:, i : i + 1]).sum(-1) for i in range(len(ids))], 1).cpu()

        self._over(self.token_rows(rows), None, keep)
        return out

    @takes(ModelError)
    @alone
    def residual_log_probs(self, resid: Float[Tensor, "vector d_model"], targets: Words) -> Float[Tensor, "vector target"]:
        """What any residual-stream vectors say of single-token words through the final norm and the unembedding (exact log-probabilities).

        The vocabulary exists for a part of the vectors at a time. See `lens_log_probs` for vectors that are read where they arise.
        """
        self._check_lens()
        ids = torch.tensor([self.token_id(word) for word in targets], dtype=torch.long)
        with torch.no_grad(), switched(self.peft, self.treatment.adapter):
            model = self.engine.model
            return log_probs_of(model, resid.to(model.dtype).to(self.engine.device), ids, self.engine.budget.lens_block)

    @takes(ModelError)
    @alone
    def continuation_log_probs(self, rows: Rows, continuations: Sequence[Words]) -> Float[Tensor, "row choice"]:
        """Log-probability of each of a row's continuations (the same number for every row), summed over their tokens, in float32.

        They are scored as they are spelt behind the row's prompt: see `continuation_ids`.
        """
        rows = self.as_rows(rows)
        ids = self.continuation_ids(rows, continuations)
        out = torch.empty(len(rows), len(ids[0]) if ids else 0)

        def keep(batch: Batch) -> None:
            out[batch.index] = continuation_log_probs(batch, [ids[i] for i in batch.index], self.engine.scored)

        self._over(self.token_rows(rows), _longest(ids), keep)
        return out

    @takes(ModelError)
    @alone
    def generate(self, rows: Rows, max_new_tokens: NewTokens, *, temperature: Temperature = 0.0, seed: Seed = 0,
                 stop: Words = (), continuations: Sequence[Words] | None = None, draws: Sequence[str] | None = None,
                 progress: Callable[[int], None] | None = None) -> list[Generation]:
        """Continue each row, greedily (`temperature` 0, whatever the checkpoint's generation config says) or by sampling.

        Edits act while the prompt is read, and those at the mark `generated` on every token that follows. A row stops at any of the
        checkpoint's end tokens, or as soon as its text contains one of the `stop` strings, which is cut off. A sampled row depends on
        `seed` and its own text alone, not on the rows it runs with; `draws` names the rows instead of their texts, where several rows of
        one text must be drawn independently. `continuations` (as in `continuation_log_probs`) are scored on the way: the prompts are read
        once for both.
        """
        rows = self.as_rows(rows)
        if draws is not None and len(draws) != len(rows):
            raise ModelError(f"every row needs its own name in `draws`: {len(rows)} rows, {len(draws)} names.")
        if "" in stop:
            raise ModelError("an empty stop string would end every answer at once.")
        ids = [] if continuations is None else self.continuation_ids(rows, continuations)
        out: list[Generation | None] = [None] * len(rows)
        room = max(max_new_tokens - 1, _longest(ids) if ids else 0)

        def work(batch: Batch) -> None:
            index = list(batch.index)
            noise = [random.Random(f"{seed}|{rows[i].prompt.text if draws is None else draws[i]}") for i in index]
            scored = ([tuple(row) for row in continuation_log_probs(batch.copy(), [ids[i] for i in index], self.engine.scored).tolist()]
                      if ids else [()] * len(index))
            made = decode(batch, self.tokenizer, max_new_tokens, Stop(self.stop_ids, tuple(stop)), sampler(temperature, noise))
            for i, generation, choices in zip(index, made, scored, strict=True):
                out[i] = replace(generation, choices=choices)
            if progress is not None:
                progress(len(index))

        self._over(self.token_rows(rows), room, work)
        return [generation for generation in out if generation is not None]


def _longest(ids: Sequence[Sequence[Sequence[int]]]) -> int:
    """Tokens that are read to score continuations: all but the last of the longest one."""
    return max((len(choice) for choices in ids for choice in choices), default=1) - 1


# ---- loading -----------------------------------------------------------------------------------------------------------


@takes(ModelError)
def load_model(spec: AnySpec, *, adapters: Files = ()) -> HookedModel:
    """Load a model, put its LoRA adapters on it (before a bridge is booted, so that hooks and adapters are live together).

    Errors: ModelError in one sentence for a model that is gated, missing or not a causal language model, a tokenizer without character
    offsets, an adapter folder that does not fit, or an engine that cannot run the model.
    """
    spec = as_spec(spec).resolved()
    check_model(spec)
    with _LOADING:
        model, tokenizer = load_huggingface(spec)
        peft = with_adapters(model, many(adapters), spec)
        engine = choose_engine(spec, model)
        try_adapters(engine, spec, adapted(peft))
    return HookedModel(spec, engine, Twin(spec, peft or model, tokenizer), tokenizer, stop_ids(model, tokenizer),
                       fingerprint(spec, model.config), peft)


@takes(ModelError)
def untrained(model: HookedModel, *, seed: Seed = 0) -> HookedModel:
    """A model of the same architecture and tokenizer with random weights (transformers' own initialisation): a control for probes.

    It needs as much memory as the model itself, and is asked as the model is (raw or in a chat). Treatments do not carry over: its
    activations are its own.
    """
    from transformers import AutoModelForCausalLM

    if model.spec.tensor_parallel:
        raise ModelError(f"an untrained model beside {model.spec.name} is not made with tensor parallelism: load it in one process.")
    with _LOADING, torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.engine.model.config), dtype=DTYPES[str(model.spec.dtype)],
                                                 trust_remote_code=model.spec.trust_remote_code)
    fresh.requires_grad_(False).eval().to(model.engine.device)
    fresh.set_attn_implementation("sdpa")
    spec = replace(model.spec, quantization=None, device_map=None)
    return HookedModel(spec, choose_engine(spec, fresh), Twin(spec, fresh, model.tokenizer), model.tokenizer, model.stop_ids,
                       f"random:{seed}", chat=model.chat, lock=model.lock)    # the tokenizer is the same


