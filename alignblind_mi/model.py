"""HookedModel: cache activations of a causal language model, run rows with edits, read out text or probabilities.

Rows run on the plain transformers model (`engine.py`, or `plain.py`). Everything of transformer-lens is at hand as `HookedModel.bridge`, a
TransformerBridge (the successor of HookedTransformer) on the same weights; this module is the only place that boots one. It does NOT know
concepts, outcomes or studies.
"""

import contextlib
import copy
import functools
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignblind_mi.adapters import switch, switched, with_adapters
from alignblind_mi.blocks import decoder_layers, input_device, is_llama_like, log_probs_of, mixer_width, text_config, unembed
from alignblind_mi.budget import Budget, RowCost, is_out_of_memory, release
from alignblind_mi.chat import Chat, chat_frame, in_chat
from alignblind_mi.decoding import Batch, Generation, Stop, continuation_log_probs, decode, sampler
from alignblind_mi.edits import GENERATED, UNITS, UNTREATED, EditError, Row, Site, Treatment, hook_name
from alignblind_mi.engine import Engine, cut
from alignblind_mi.loading import DTYPES, ModelError, ModelSpec, check_model, fingerprint, load_huggingface, quiet, stop_ids
from alignblind_mi.plain import PlainEngine
from alignblind_mi.prompts import Prompt, PromptError
from alignblind_mi.settings import NewTokens, Seed, Temperature, Text, Words, takes
from alignblind_mi.tokens import Encoded, Reader, Taps, TokenEdit, TokenRow, encode, left_pad, place, word_ids

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
_LOADING = threading.RLock()    # loading changes what all threads share: torch's defaults and its random numbers


@dataclass(frozen=True, eq=False)
class Cached:
    """Activations of a left-padded batch of prompts. `mask[i, t]` is 0 where row i has padding."""

    tokens: Int[Tensor, "row token"]
    mask: Int[Tensor, "row token"]
    activations: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """The activations at one hook point, [row, token, ...] (attention patterns: [row, head, query, key])."""
        return self.activations[name]


class Twin:
    """transformer-lens' view of a transformers model: a copy of its modules on the same weights, with a bridge booted on it.

    Booted when it is first asked for. The copy is needed because the bridge forces eager attention on, and replaces modules of, the model
    that it is given.
    """

    def __init__(self, spec: ModelSpec, model: Any, tokenizer: Any) -> None:
        self.spec, self.model, self.tokenizer = spec, model, tokenizer

    @cached_property
    def module(self) -> Any:
        """The copied model (a PeftModel if there are adapters)."""
        return share_weights(self.model)

    @cached_property
    def bridge(self) -> Any:
        """The bridge. Errors: ModelError for an architecture that transformer-lens does not know."""
        from transformer_lens.model_bridge import TransformerBridge

        plain = self.module.base_model.model if hasattr(self.module, "peft_config") else self.module
        try:
            with quiet():
                bridge = TransformerBridge.boot_transformers(self.spec.source, hf_model=plain, tokenizer=copy.deepcopy(self.tokenizer),
                                                             dtype=DTYPES[str(self.spec.dtype)])
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"transformer-lens cannot carry {self.spec.name} ({str(error).splitlines()[0]}): rows run, but hook points, "
                             "attention patterns and its tools are not there.") from error
        difference = self._difference(bridge.eval(), plain)
        if difference > tolerance(plain):
            raise ModelError(f"transformer-lens' view of {self.spec.name} differs from the model by {difference:.2g} in log-probabilities: "
                             "rows run, but its hook points would show something else.")
        return bridge

    def _difference(self, bridge: Any, plain: Any) -> float:
        """The largest difference of next-token log-probabilities between the bridge and the model it was made from."""
        ids = torch.arange(min(8, plain.config.vocab_size), device=bridge.cfg.device)[None]
        with torch.no_grad():
            theirs = self.model(ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
            return float((bridge.forward(ids)[:, -1].float().log_softmax(-1) - theirs.to(ids.device)).abs().max())


def share_weights(model: Any) -> Any:
    """A copy of a model's modules that uses the very same parameters and buffers (and offloaded weights)."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for module in model.modules():
        for hook in _accelerate_hooks(module):
            for name in ("weights_map", "tied_params_map"):
                shared = getattr(hook, name, None)
                if shared is not None:
                    memo[id(shared)] = shared
    return copy.deepcopy(model, memo)


def _accelerate_hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def alone(method: Callable[Concatenate["HookedModel", P], R]) -> Callable[Concatenate["HookedModel", P], R]:
    """A method during which no other thread uses the weights (see `HookedModel.lock`)."""
    @functools.wraps(method)
    def held(self: "HookedModel", *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return held


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A model that runs rows: see `load_model`. `under(treatment)` and `in_chat(chat)` give views on the same weights; nothing is changed
    in place.

    Threads may share a model and its views: a run puts hooks and adapters on the weights for a while, so that it holds `lock`, which all
    views have in common (a thread that holds it may take it again), and other threads wait. Who uses `bridge` or `engine` directly from
    several threads takes it too: `with model.lock: ...`.
    """

    spec: ModelSpec
    engine: Engine | PlainEngine
    twin: Twin
    tokenizer: Any
    stop_ids: frozenset[int]
    fingerprint: str
    peft: Any = None
    treatment: Treatment = UNTREATED
    chat: Chat | None = None
    lock: contextlib.AbstractContextManager[Any] = field(default_factory=threading.RLock, repr=False)

    @property
    def bridge(self) -> Any:
        """transformer-lens' TransformerBridge on the same weights: any hook point, attention patterns, gradients, its tools.

        It is one object for all views, with the adapter (or none) of the view that it was last asked from, and without edits: see `cache`.
        """
        with self.lock:
            bridge = self.twin.bridge
            if self.peft is not None:
                switch(self.twin.module, self.treatment.adapter)
            return bridge

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.engine.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(text_config(self.engine.model).hidden_size)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that were loaded with the model."""
        return tuple(self.peft.peft_config) if self.peft is not None else ()

    def under(self, treatment: Treatment) -> "HookedModel":
        """The same model under a treatment. Errors: EditError / ModelError for a layer or an adapter that the model does not have."""
        for edit in treatment.edits:
            self._part(edit.site.layer, edit.site.stream, edit.site.units)
        if treatment.adapter is not None and treatment.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ModelError(f"the adapter {treatment.adapter!r} is not loaded (loaded: {known}): give its folder to "
                             "load_model(adapters=).")
        return replace(self, treatment=treatment)

    @property
    def architecture(self) -> str:
        """The model type of its configuration, such as `llama`."""
        return str(text_config(self.engine.model).model_type)

    @alone
    def in_chat(self, chat: Chat | None = Chat()) -> "HookedModel":    # noqa: B008 - a value
        """The same model, asked in its chat format (None: raw again). Errors: ModelError for a tokenizer without a usable chat template."""
        if chat is not None:
            chat_frame(self.tokenizer, chat, self.spec.name)
        return replace(self, chat=chat)

    @alone
    def rows(self, prompts: Sequence[Prompt], *, partial: bool = False) -> list[Row]:
        """Prompts as this view asks them: after the treatment's prefix, in the chat if there is one, with the treatment's edits (`partial`:
        see `Treatment.rows`).

        A `Row` that is made by hand is raw: steering phrases, and the questions that representations are patched into, stay as they are in
        a chat as well.
        """
        rows = self.treatment.rows(prompts, partial=partial)
        if self.chat is None:
            return rows
        asked = in_chat([row.prompt for row in rows], self.tokenizer, self.chat, self.spec.name)
        return [replace(row, prompt=prompt) for row, prompt in zip(rows, asked, strict=True)]

    def provenance(self) -> dict[str, Any]:
        """What identifies the model behind a number."""
        return {"model": self.spec.name, "revision": self.fingerprint, "dtype": self.spec.dtype, "device": self.spec.device,
                "quantization": self.spec.quantization, "trust_remote_code": self.spec.trust_remote_code, "engine": self.engine.name,
                "batches": str(self.engine.budget), "treatment": self.treatment.name,
                "chat": None if self.chat is None else asdict(self.chat)}

    # ---- tokens ----------------------------------------------------------------------------------------------------

    @alone
    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Tokenise prompts. Raw text gets the tokenizer's BOS; text that already begins with it (a chat template's) does not."""
        return encode(self.tokenizer, prompts)

    @takes(ModelError)
    def token_id(self, word: Text) -> int:
        """The id of a word that is one token. Errors: ModelError if the tokenizer splits it or does not know it."""
        ids = self.word_ids(word)
        if len(ids) != 1:
            raise ModelError(f"{word!r} is {len(ids)} tokens in the tokenizer of {self.spec.name}; a single-token word is needed here.")
        return ids[0]

    @takes(ModelError)
    @alone
    def word_ids(self, word: Text) -> list[int]:
        """The ids of a word as it stands, without special tokens. Errors: ModelError if the tokenizer does not know it."""
        ids = word_ids(self.tokenizer, word)
        if not ids:
            raise ModelError(f"the tokenizer of {self.spec.name} does not know {word!r}: choose another cue or model.")
        return ids

    @alone
    def check_known(self, prompts: Sequence[Prompt]) -> None:
        """Errors: ModelError naming the first word of a prompt that the tokenizer does not know."""
        unknown = self.tokenizer.unk_token_id
        for item in self.encode(prompts):
            if unknown is not None and unknown in item.ids:
                start, end = item.offsets[item.ids.index(unknown)]
                word = item.prompt.text[start:end].strip()
                raise ModelError(f"the tokenizer of {self.spec.name} does not know {word!r} (in the prompt {item.prompt.text!r}): "
                                 "this model cannot be asked about it; choose another cue or model.")

    # ---- read-outs -------------------------------------------------------------------------------------------------

    @alone
    def cache(self, prompts: Prompt | str | Sequence[Prompt | str], names: Sequence[str] | Callable[[str], bool] | None = None) -> Cached:
        """Run prompts and keep activations at any hook points of the bridge (`names`: a list, a predicate, or None for all of them)."""
        items = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
        rows = self.rows([Prompt(item) if isinstance(item, str) else item for item in items])
        wanted = _name_filter(names, self.bridge)
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
            with bridge.hooks(fwd_hooks=_bridge_hooks(taps)):
                yield bridge, ids, mask.long()

    @alone
    def record(self, rows: Sequence[Row], sites: Sequence[Site]) -> Float[Tensor, "row site size"]:
        """Activations at sites, after the row's edits, in float32; size is d_model, or that of the sites' heads or neurons.

        Errors: EditError for a site of several tokens (pick one with `occurrence`), or for sites of different sizes.
        """
        sizes = {self.site_size(site): site for site in reversed(sites)}
        if len(sizes) > 1:
            said = ", ".join(f"{site.stream} of layer {site.layer} has {size}" for size, site in sizes.items())
            raise EditError(f"sites of different sizes ({said}) cannot be recorded together: record those of each size in their own call.")
        return self._at_sites(rows, sites, Reader(next(iter(sizes), self.d_model), lambda activations: activations))

    @takes(ModelError)
    @alone
    def lens_log_probs(self, rows: Sequence[Row], sites: Sequence[Site], targets: Words) -> Float[Tensor, "row site target"]:
        """What the residual stream at each site says of single-token words through the final norm and the unembedding.

        Exact log-probabilities over the whole vocabulary, which exists for a part of the sites at a time (logit lens, nostalgebraist 2020).
        """
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

    @alone
    def next_log_probs(self, rows: Sequence[Row]) -> Float[Tensor, "row vocabulary"]:
        """Log-probabilities of every next token after each row, in float32."""
        out = torch.empty(len(rows), text_config(self.engine.model).vocab_size)

        def keep(batch: Batch) -> None:
            out[batch.index] = batch.logits().log_softmax(-1).cpu()

        self._over(self.token_rows(rows), None, keep)
        return out

    @alone
    def text_log_probs(self, rows: Sequence[Row]) -> list[Float[Tensor, "token vocabulary"]]:
        """For each row, log-probabilities of every next token after each of its tokens but the last, in float32."""
        whole = self.token_rows(rows)
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
    def next_probs(self, rows: Sequence[Row], targets: Words) -> Float[Tensor, "row target"]:
        """Probabilities of single-token target words as the next token after each row."""
        ids = torch.tensor([self.token_id(word) for word in targets], dtype=torch.long)
        out = torch.empty(len(rows), len(targets))

        def keep(batch: Batch) -> None:
            out[batch.index] = batch.log_probs_of(ids).exp()

        self._over(self.token_rows(rows), None, keep)
        return out

    @takes(ModelError)
    @alone
    def next_ranks(self, rows: Sequence[Row], targets: Words) -> Int[Tensor, "row target"]:
        """Ranks of single-token target words as the next token after each row: 0 is the most probable of the vocabulary."""
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
    def continuation_log_probs(self, rows: Sequence[Row], continuations: Sequence[Words]) -> Float[Tensor, "row choice"]:
        """Log-probability of each of a row's continuations (the same number for every row), summed over their tokens, in float32."""
        ids = self._continuation_ids(rows, continuations)
        out = torch.empty(len(rows), len(ids[0]) if ids else 0)

        def keep(batch: Batch) -> None:
            out[batch.index] = continuation_log_probs(batch, [ids[i] for i in batch.index], self.engine.budget.logit_rows)

        self._over(self.token_rows(rows), _longest(ids), keep)
        return out

    def _continuation_ids(self, rows: Sequence[Row], continuations: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        counts = {len(choices) for choices in continuations}
        if len(continuations) != len(rows) or len(counts) > 1:
            raise ModelError(f"every row needs the same number of continuations: {len(rows)} rows, {len(continuations)} lists of "
                             f"{' or '.join(map(str, sorted(counts))) or 'none'}.")
        if 0 in counts:
            raise ModelError("a row without continuations has nothing to be scored: give each row at least one.")
        known: dict[str, list[int]] = {text: self.word_ids(text) for text in {text for choices in continuations for text in choices}}
        return [[known[text] for text in choices] for choices in continuations]

    @takes(ModelError)
    @alone
    def generate(self, rows: Sequence[Row], max_new_tokens: NewTokens, *, temperature: Temperature = 0.0, seed: Seed = 0,
                 stop: Words = (), continuations: Sequence[Words] | None = None, draws: Sequence[str] | None = None,
                 progress: Callable[[int], None] | None = None) -> list[Generation]:
        """Continue each row, greedily (`temperature` 0, whatever the checkpoint's generation config says) or by sampling.

        Edits act while the prompt is read, and those at the mark `generated` on every token that follows. A row stops at any of the
        checkpoint's end tokens, or as soon as its text contains one of the `stop` strings, which is cut off. A sampled row depends on
        `seed` and its own text alone, not on the rows it runs with; `draws` names the rows instead of their texts, where several rows of
        one text must be drawn independently. `continuations` (as in `continuation_log_probs`) are scored on the way: the prompts are read
        once for both.
        """
        if draws is not None and len(draws) != len(rows):
            raise ModelError(f"every row needs its own name in `draws`: {len(rows)} rows, {len(draws)} names.")
        if "" in stop:
            raise ModelError("an empty stop string would end every answer at once.")
        ids = [] if continuations is None else self._continuation_ids(rows, continuations)
        out: list[Generation | None] = [None] * len(rows)
        room = max(max_new_tokens - 1, _longest(ids) if ids else 0)

        def work(batch: Batch) -> None:
            index = list(batch.index)
            noise = [random.Random(f"{seed}|{rows[i].prompt.text if draws is None else draws[i]}") for i in index]
            scored = ([tuple(row) for row in continuation_log_probs(batch.copy(), [ids[i] for i in index],
                                                                    self.engine.budget.logit_rows).tolist()] if ids else [()] * len(index))
            made = decode(batch, self.tokenizer, max_new_tokens, Stop(self.stop_ids, tuple(stop)), sampler(temperature, noise))
            for i, generation, choices in zip(index, made, scored, strict=True):
                out[i] = replace(generation, choices=choices)
            if progress is not None:
                progress(len(index))

        self._over(self.token_rows(rows), room, work)
        return [generation for generation in out if generation is not None]

    # ---- running ---------------------------------------------------------------------------------------------------

    @alone
    def _over(self, rows: Sequence[TokenRow], room: int | None, work: Callable[[Batch], None], reader: Reader | None = None) -> None:
        """Read all rows in batches and do the work on each; when memory runs out, go on with smaller batches and the rows that are left."""
        left = list(range(len(rows)))
        with torch.no_grad(), switched(self.peft, self.treatment.adapter):
            while left:
                done: set[int] = set()
                try:
                    self._through({i: rows[i] for i in left}, room, reader, work, done)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.engine.budget.shrink(error)
                if len(done) < len(left):
                    release()
                left = [i for i in left if i not in done]

    def _through(self, rows: Mapping[int, TokenRow], room: int | None, reader: Reader | None, work: Callable[[Batch], None], done: set[int]
                 ) -> None:
        """One go at some rows. A frame of its own: when it ends, well or not, no batch is held any more."""
        numbers = list(rows)
        for batch in self.engine.batches(list(rows.values()), room, reader):
            index = batch.index = [numbers[i] for i in batch.index]
            work(batch)
            done.update(index)
            del batch    # its cache goes before the next prompts are read

    @alone
    def token_rows(self, rows: Sequence[Row], sites: Sequence[Site] = ()) -> list[TokenRow]:
        """Rows in tokens, with the places that `sites` are in each."""
        encoded = self.encode([row.prompt for row in rows])
        places: dict[tuple[int, str, str, int | None], list[int]] = {}

        def positions(i: int, site: Site) -> list[int]:
            key = (id(rows[i].prompt), site.mark, site.tokens, site.occurrence)
            if key not in places:
                places[key] = encoded[i].positions(site.mark, site.tokens, site.occurrence)
            return places[key]

        def one(i: int, site: Site) -> int:
            found = positions(i, site)
            if len(found) != 1:
                raise EditError(f"the site at mark {site.mark!r} is {len(found)} tokens of {rows[i].prompt.text!r}: "
                                "choose one with Site(occurrence=..., tokens='last').")
            return found[0]

        out, part = [], cache(self._part)
        reads = [(site, part(site.layer, site.stream, site.units)[0]) for site in sites]
        for i, row in enumerate(rows):
            edits, later = list[TokenEdit](), list[TokenEdit]()
            for edit in row.edits:
                site = edit.site
                features, size = part(site.layer, site.stream, site.units)
                if edit.vector.shape != (size,):
                    units = f" (units {', '.join(map(str, site.units))})" if site.units else ""
                    raise EditError(f"an edit at {site.stream}{units} needs a vector of shape ({size},), got {tuple(edit.vector.shape)}.")
                if site.mark == GENERATED:
                    later.append(TokenEdit(place(site.layer, site.stream, 0, features), edit.vector, edit.how, edit.strength))
                edits += [TokenEdit(place(site.layer, site.stream, at, features), edit.vector, edit.how, edit.strength)
                          for at in positions(i, site)]
            if not encoded[i].ids:
                raise PromptError(f"the prompt {row.prompt.text!r} has no tokens: there is nothing to go on from.")
            at_sites = tuple(place(site.layer, site.stream, one(i, site), features) for site, features in reads)
            out.append(TokenRow(encoded[i].ids, tuple(edits), at_sites, tuple(later)))
        return out

    def site_size(self, site: Site) -> int:
        """How many values a vector at a site has. Errors: EditError for a layer, head or neuron that does not exist."""
        return self._part(site.layer, site.stream, site.units)[1]

    def site_features(self, site: Site) -> tuple[int, ...]:
        """The entries of its stream's vector that a site's units are; empty where it is all of them."""
        return self._part(site.layer, site.stream, site.units)[0]

    def n_units(self, layer: int, stream: str) -> int:
        """How many heads (stream `z`) or neurons (`post`) a layer has. Errors: EditError for a layer whose parts are not known."""
        self._check_layer(layer)
        return int(text_config(self.engine.model).num_attention_heads) if stream == "z" else self._width(layer, stream)

    @cached_property
    def _layers(self) -> Any:
        return decoder_layers(self.engine.model)

    def _width(self, layer: int, stream: str) -> int:
        return mixer_width(self._layers[layer], stream) if stream in UNITS else self.d_model

    def _part(self, layer: int, stream: str, units: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The entries of a stream's vector that its units are (none: all of them), and how many values that makes."""
        self._check_layer(layer)
        width = self._width(layer, stream)
        if not units:
            return (), width
        n = self.n_units(layer, stream)
        if max(units) >= n:
            raise EditError(f"{UNITS[stream]} {max(units)} of layer {layer} does not exist: {self.spec.name} has the {UNITS[stream]}s 0 to "
                            f"{n - 1} there.")
        each = width // n
        return tuple(unit * each + i for unit in units for i in range(each)), len(units) * each

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.n_layers:
            raise EditError(f"layer {layer} does not exist: {self.spec.name} has the layers 0 to {self.n_layers - 1}.")


def _longest(ids: Sequence[Sequence[Sequence[int]]]) -> int:
    """Tokens that are read to score continuations: all but the last of the longest one."""
    return max((len(choice) for choices in ids for choice in choices), default=1) - 1


def _bridge_hooks(taps: Taps) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    """The edits of a batch as hooks of the bridge.

    The bridge's hook_resid_mid is the input of the second norm: an edit there would miss the skip connection. It is made on attn_out.
    """
    hooks: list[tuple[str, Callable[[Tensor, Any], Tensor]]] = []
    for layer, stream in sorted(taps.edits, key=lambda where: (where[0], where[1] == "resid_mid")):
        if stream == "resid_mid":
            hooks += _mid_hooks(taps, layer)
        else:
            name = "blocks.0.hook_resid_pre" if layer < 0 else hook_name(layer, stream)
            hooks.append((name, lambda value, hook, layer=layer, stream=stream: _flat_touch(taps, layer, stream, value)))    # type: ignore[misc]
    return hooks


def _flat_touch(taps: Taps, layer: int, stream: Any, value: Tensor) -> Tensor:
    """The bridge has the heads of hook_z on an axis of their own."""
    return taps.touch(layer, stream, value.flatten(2)).view(value.shape)


def _mid_hooks(taps: Taps, layer: int) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
    entering: list[Tensor] = []

    def before(value: Tensor, hook: Any) -> Tensor:
        entering[:] = [value]
        return value

    def after(value: Tensor, hook: Any) -> Tensor:
        return taps.touch(layer, "resid_mid", entering[0] + value) - entering[0]

    return [(f"blocks.{layer}.hook_resid_pre", before), (f"blocks.{layer}.hook_attn_out", after)]


def _name_filter(names: Sequence[str] | Callable[[str], bool] | None, bridge: Any) -> Callable[[str], bool]:
    if names is None:
        return lambda name: True
    if callable(names):
        return names
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in bridge.hook_dict]
    if unknown:
        raise ModelError(f"unknown hook point {unknown[0]!r}. Examples: blocks.0.hook_resid_post, blocks.0.attn.hook_pattern, "
                         "blocks.0.hook_mlp_out; all of them: list(model.bridge.hook_dict).")
    wanted = set(names)
    return lambda name: name in wanted


# ---- loading -----------------------------------------------------------------------------------------------------------


def load_model(spec: ModelSpec | str, *, adapters: Path | str | Sequence[Path | str] = ()) -> HookedModel:
    """Load a model, put its LoRA adapters on it (before a bridge is booted, so that hooks and adapters are live together).

    Errors: ModelError in one sentence for a model that is gated, missing or not a causal language model, a tokenizer without character
    offsets, an adapter folder that does not fit, or an engine that cannot run the model.
    """
    spec = (ModelSpec(spec) if isinstance(spec, str) else spec).resolved()
    adapters = [adapters] if isinstance(adapters, (str, Path)) else adapters    # one or many
    check_model(spec)
    with _LOADING:
        model, tokenizer = load_huggingface(spec)
        peft = with_adapters(model, adapters, spec)
        engine = choose_engine(spec, model)
    return HookedModel(spec, engine, Twin(spec, peft or model, tokenizer), tokenizer, stop_ids(model, tokenizer),
                       fingerprint(spec, model.config), peft)


@takes(ModelError)
def untrained(model: HookedModel, *, seed: Seed = 0) -> HookedModel:
    """A model of the same architecture and tokenizer with random weights (transformers' own initialisation): a control for probes.

    It needs as much memory as the model itself, and is asked as the model is (raw or in a chat). Treatments do not carry over: its
    activations are its own.
    """
    from transformers import AutoModelForCausalLM

    with _LOADING, torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.engine.model.config), dtype=DTYPES[str(model.spec.dtype)],
                                                 trust_remote_code=model.spec.trust_remote_code)
    fresh.requires_grad_(False).eval().to(model.engine.device)
    fresh.set_attn_implementation("sdpa")
    spec = replace(model.spec, quantization=None, device_map=None)
    return HookedModel(spec, choose_engine(spec, fresh), Twin(spec, fresh, model.tokenizer), model.tokenizer, model.stop_ids,
                       f"random:{seed}", chat=model.chat, lock=model.lock)    # the tokenizer is the same


def choose_engine(spec: ModelSpec, model: Any) -> Engine | PlainEngine:
    """The engine that a spec asks for; `auto` is the fast one if it gives the model's own numbers on a small trial, and says if not.

    Errors: ModelError if the fast engine is asked for and cannot run the model.
    """
    plain = PlainEngine(model, Budget(RowCost.of(model.config, DTYPES[str(spec.dtype)].itemsize), input_device(model)))
    if spec.engine == "plain":
        return plain
    own = model.config._attn_implementation
    wrong = "its layers are not laid out as Llama's"
    if is_llama_like(model):
        expected = _trial(plain)    # before the fast engine changes the model's attention
        fast = Engine(model, plain.budget)
        try:
            difference = max(float((a - b).abs().max()) for a, b in zip(_trial(fast), expected, strict=True))
            wrong = "" if difference <= tolerance(model) else f"its log-probabilities differ from the model's own by {difference:.2g}"
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            wrong = f"its layers cannot be called one by one ({error})"
        if not wrong:
            return fast
        model.set_attn_implementation(own)
    if spec.engine == "fast":
        raise ModelError(f"the fast engine cannot run {spec.name}: {wrong}. Use engine='plain' (or auto).")
    log.warning("%s runs on the plain engine: %s.", spec.name, wrong)
    return plain


def _trial(engine: Engine | PlainEngine) -> list[Tensor]:
    """Log-probabilities of rows that use all that an engine has: padding, a shared prompt with edits, and tokens that follow."""
    config = text_config(engine.model)
    ids = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    vector = torch.ones(config.hidden_size)
    edits = [(TokenEdit(place(layer, "resid_post", 20), vector, "add", 1.0),) for layer in range(min(2, engine.n_layers))]
    rows = [TokenRow(tuple(ids)), *(TokenRow(tuple(ids[:30]), edit) for edit in edits), TokenRow(tuple(ids[5:12]))]
    first, then = torch.empty(2, len(rows), config.vocab_size)
    with torch.no_grad():
        for batch in engine.batches(rows, 1):
            first[batch.index] = batch.logits().log_softmax(-1).cpu()
            more = batch.extend(torch.full((len(batch.index), 1), ids[0]), torch.ones(len(batch.index), 1, dtype=torch.bool))
            then[batch.index] = more[:, -1].log_softmax(-1).cpu()
    return [first, then]


def tolerance(model: Any) -> float:
    """How far log-probabilities of two computations of the same model may be apart: rounding, more of it in fewer bits."""
    return 1e-3 if model.dtype == torch.float32 and not getattr(model, "is_quantized", False) else 0.2
