"""HookedModel: load a causal language model, cache its activations, run rows with edits, read out text or probabilities.

The only place that boots a TransformerBridge (transformer-lens' successor of HookedTransformer). Everything of transformer-lens is at
hand as `HookedModel.bridge`, on the same weights. This module does NOT know concepts, outcomes or studies.
"""

import contextlib
import copy
import hashlib
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from alignblind_mi.edits import UNTREATED, EditError, Row, Site, Tokens, Treatment, adapter_name, apply
from alignblind_mi.errors import AlignblindError
from alignblind_mi.prompts import Prompt, PromptError, Span

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = "organism:"
TOKEN_BUDGET = 8192       # prompt tokens that run together
LOGIT_BUDGET = 1 << 26    # numbers of a logit tensor (256 MiB in float32)


class ModelError(AlignblindError):
    """A model, tokenizer or adapter that cannot be loaded or used as asked."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it: a Hugging Face id, a local checkpoint folder, or organism:base / organism:aligned.

    `dtype` and `device` default to bfloat16 on a GPU and float32 on a CPU; `device_map` is passed on to transformers.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ModelError(f"unknown dtype {self.dtype!r}. Known: {', '.join(DTYPES)}.")

    @property
    def source(self) -> str:
        """What transformers loads from: the folder of an embedded checkpoint, or the name itself."""
        if self.name.startswith(EMBEDDED):
            from alignblind_mi.organism import organism_path

            return str(organism_path(self.name.removeprefix(EMBEDDED)))
        return self.name

    def resolved(self) -> "ModelSpec":
        """The same spec with the defaults of this machine filled in."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return replace(self, device=device, dtype=self.dtype or ("float32" if device == "cpu" else "bfloat16"))


@dataclass(frozen=True)
class Encoded:
    """A prompt in tokens. `offsets[i]` are the characters of the text that token i stands for (0, 0 for special tokens)."""

    prompt: Prompt
    ids: list[int]
    offsets: list[tuple[int, int]]

    def tokens_of(self, span: Span) -> list[int]:
        """Indices of the tokens that overlap a span; PromptError if there is none."""
        found = [i for i, (start, end) in enumerate(self.offsets) if start < span.end and end > span.start]
        if not found:
            raise PromptError(f"no token covers characters {span.start}-{span.end} of the prompt {self.prompt.text!r}.")
        return found

    def positions(self, mark: str, tokens: Tokens = "last", occurrence: int | None = None) -> list[int]:
        """Token positions of a mark: see `Site`."""
        spans = self.prompt.spans(mark)
        if occurrence is not None:
            try:
                spans = (spans[occurrence],)
            except IndexError:
                raise PromptError(f"the mark {mark!r} occurs {len(spans)} times, occurrence {occurrence} was asked for.") from None
        each = [self.tokens_of(span) for span in spans]
        return [position for found in each for position in (found if tokens == "all" else found[-1:])]


@dataclass(frozen=True)
class Generation:
    """Text generated after a prompt; `finished` tells whether the model ended it itself (else the token limit did).

    `choices` are the log-probabilities of the continuations that were asked for, in their order.
    """

    text: str
    n_tokens: int
    finished: bool
    choices: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Cached:
    """Activations of a left-padded batch of prompts. `mask[i, t]` is 0 where row i has padding."""

    tokens: Int[Tensor, "row token"]
    mask: Int[Tensor, "row token"]
    activations: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """The activations at one hook point, [row, token, ...] (attention patterns: [row, head, query, key])."""
        return self.activations[name]


@dataclass(frozen=True)
class _Batch:
    """Rows that run together, left-padded to one length. `start[i]` is the first real column of row i."""

    index: list[int]
    rows: list[Row]
    encoded: list[Encoded]
    ids: Int[Tensor, "row token"]
    mask: Int[Tensor, "row token"]

    def start(self, i: int) -> int:
        return self.ids.shape[1] - len(self.encoded[i].ids)


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A model that runs rows: see `load_model`. `under(treatment)` gives a view on the same weights; nothing is changed in place."""

    spec: ModelSpec
    bridge: Any
    tokenizer: Any
    stop_ids: frozenset[int]
    fingerprint: str
    peft: Any = None
    treatment: Treatment = UNTREATED

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.bridge.cfg.n_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.bridge.cfg.d_model)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that were loaded with the model."""
        return tuple(self.peft.peft_config) if self.peft is not None else ()

    def under(self, treatment: Treatment) -> "HookedModel":
        """The same model under a treatment. Errors: EditError / ModelError for a layer or an adapter that the model does not have."""
        for edit in treatment.edits:
            self._check_layer(edit.site.layer)
        if treatment.adapter is not None and treatment.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ModelError(f"the adapter {treatment.adapter!r} is not loaded (loaded: {known}): give its folder to "
                             "load_model(adapters=).")
        return replace(self, treatment=treatment)

    def provenance(self) -> dict[str, Any]:
        """What identifies the model behind a number."""
        return {"model": self.spec.name, "revision": self.fingerprint, "dtype": self.spec.dtype, "device": self.spec.device,
                "treatment": self.treatment.name}

    # ---- tokens ----------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Tokenise prompts. Raw text gets the tokenizer's BOS; text that already begins with it (a chat template's) does not."""
        if not prompts:
            return []
        bos = self.tokenizer.bos_token
        encoded: list[Encoded] = []
        for with_bos in (True, False):
            chosen = [p for p in prompts if bool(bos and p.text.startswith(bos)) != with_bos]
            if chosen:
                out = self.tokenizer([p.text for p in chosen], add_special_tokens=with_bos, return_offsets_mapping=True)
                encoded += [Encoded(p, i, o) for p, i, o in zip(chosen, out["input_ids"], out["offset_mapping"], strict=True)]
        by_id = {id(item.prompt): item for item in encoded}
        return [by_id[id(prompt)] for prompt in prompts]

    def token_id(self, word: str) -> int:
        """The id of a word that is one token. Errors: ModelError if the tokenizer splits it or does not know it."""
        ids = self.word_ids(word)
        if len(ids) != 1:
            raise ModelError(f"{word!r} is {len(ids)} tokens in the tokenizer of {self.spec.name}; a single-token word is needed here.")
        return ids[0]

    def word_ids(self, word: str) -> list[int]:
        """The ids of a word as it stands, without special tokens. Errors: ModelError if the tokenizer does not know it."""
        ids = list(self.tokenizer(word, add_special_tokens=False)["input_ids"])
        if not ids or (self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids):
            raise ModelError(f"the tokenizer of {self.spec.name} does not know {word!r}: choose another cue or model.")
        return ids

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

    def cache(self, prompts: Prompt | str | Sequence[Prompt | str], names: Sequence[str] | Callable[[str], bool] | None = None) -> Cached:
        """Run prompts and keep activations at any hook points of the bridge (`names`: a list, a predicate, or None for all of them)."""
        items = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
        rows = self.treatment.rows([Prompt(item) if isinstance(item, str) else item for item in items])
        (batch,) = self._batches(rows, budget=None)
        wanted = _name_filter(names, self.bridge)
        with torch.no_grad(), self._adapter(), self.bridge.hooks(fwd_hooks=self._hooks(batch)):
            _, cache = self.bridge.run_with_cache(batch.ids, attention_mask=batch.mask, names_filter=wanted)
        return Cached(batch.ids, batch.mask, {name: value.detach().clone() for name, value in cache.items() if wanted(name)})

    def record(self, rows: Sequence[Row], sites: Sequence[Site]) -> Float[Tensor, "row site d_model"]:
        """Activations at sites, in float32. A site that is several tokens of a row is an error: pick one with `occurrence`."""
        for site in sites:
            self._check_layer(site.layer)
        out = torch.empty(len(rows), len(sites), self.d_model)
        with torch.no_grad(), self._adapter():
            for batch in self._batches(rows):
                cols = torch.tensor([[self._one(batch, i, site) for site in sites] for i in range(len(batch.rows))])
                self._record_batch(batch, sites, cols, out)
        return out

    def _record_batch(self, batch: _Batch, sites: Sequence[Site], cols: Int[Tensor, "row site"],
                      out: Float[Tensor, "all_rows site d_model"]) -> None:
        index = torch.tensor(batch.index)
        by_hook: dict[str, list[int]] = defaultdict(list)
        for j, site in enumerate(sites):
            by_hook[site.hook].append(j)

        def keep(js: list[int]) -> Callable[[Tensor, Any], None]:
            def hook(value: Tensor, hook: Any) -> None:
                for j in js:
                    out[index, j] = value[torch.arange(len(index)), cols[:, j]].float().cpu()
            return hook

        readers = [(name, keep(js)) for name, js in by_hook.items()]
        stop = max(site.layer for site in sites) + 1
        with self.bridge.hooks(fwd_hooks=self._hooks(batch) + readers):
            self.bridge.forward(batch.ids, attention_mask=batch.mask, logits_to_keep=1,
                                stop_at_layer=stop if stop < self.n_layers else None)

    def _one(self, batch: _Batch, i: int, site: Site) -> int:
        found = batch.encoded[i].positions(site.mark, site.tokens, site.occurrence)
        if len(found) != 1:
            raise EditError(f"the site at mark {site.mark!r} is {len(found)} tokens of {batch.encoded[i].prompt.text!r}: "
                            "choose one with Site(occurrence=..., tokens='last').")
        return batch.start(i) + found[0]

    def next_log_probs(self, rows: Sequence[Row]) -> Float[Tensor, "row vocabulary"]:
        """Log-probabilities of every next token after each row, in float32."""
        out: list[Tensor | None] = [None] * len(rows)
        with torch.no_grad(), self._adapter():
            for batch in self._batches(rows):
                logits = self._prefill(batch, use_cache=False)[0]
                for i, row in zip(batch.index, logits.float().log_softmax(-1).cpu(), strict=True):
                    out[i] = row
        return torch.stack([row for row in out if row is not None])

    def next_probs(self, rows: Sequence[Row], targets: Sequence[str]) -> Float[Tensor, "row target"]:
        """Probabilities of single-token target words as the next token after each row."""
        ids = torch.tensor([self.token_id(word) for word in targets])
        out = torch.empty(len(rows), len(targets))
        with torch.no_grad(), self._adapter():
            for batch in self._batches(rows):
                logits = self._prefill(batch, use_cache=False)[0].float()
                out[batch.index] = (logits[:, ids.to(logits.device)] - logits.logsumexp(-1, keepdim=True)).exp().cpu()
        return out

    def continuation_log_probs(self, rows: Sequence[Row], continuations: Sequence[Sequence[str]]) -> Float[Tensor, "row choice"]:
        """Log-probability of each of a row's continuations (the same number for every row), summed over their tokens, in float32."""
        ids = self._continuation_ids(rows, continuations)
        out = torch.empty(len(rows), len(ids[0]) if ids else 0)
        with torch.no_grad(), self._adapter():
            for batch in self._batches(rows):
                out[batch.index] = self._choices(batch, [ids[i] for i in batch.index], *self._prefill(batch, use_cache=True))
        return out

    def _continuation_ids(self, rows: Sequence[Row], continuations: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        counts = {len(choices) for choices in continuations}
        if len(continuations) != len(rows) or len(counts) > 1:
            raise ModelError(f"every row needs the same number of continuations: {len(rows)} rows, {len(continuations)} lists of "
                             f"{' or '.join(map(str, sorted(counts)))}.")
        return [[self.word_ids(text) for text in choices] for choices in continuations]

    def _choices(self, batch: _Batch, ids: list[list[list[int]]], first: Float[Tensor, "row vocabulary"],
                 past: Any) -> Float[Tensor, "row choice"]:
        """Log-probabilities of continuations after prompts that have been read: the logits after them and their cache (used up).

        Rows are taken in parts whose logits over the vocabulary stay within LOGIT_BUDGET numbers.
        """
        width = max(len(choice) for choices in ids for choice in choices)
        size = max(1, LOGIT_BUDGET // (width * len(ids[0]) * first.shape[-1]))
        if size >= len(ids):
            return self._choice_part(batch.mask, ids, first, past)
        parts = []
        for start in range(0, len(ids), size):
            index = torch.arange(start, min(start + size, len(ids)), device=batch.mask.device)
            share = copy.deepcopy(past)
            share.batch_select_indices(index)
            parts.append(self._choice_part(batch.mask[index], ids[start : start + size], first[index], share))
        return torch.cat(parts)

    def _choice_part(self, prompt_mask: Int[Tensor, "row token"], ids: list[list[list[int]]], first: Float[Tensor, "row vocabulary"],
                     past: Any) -> Float[Tensor, "row choice"]:
        n, device = len(ids[0]), prompt_mask.device
        flat = [choice for choices in ids for choice in choices]
        width = max(map(len, flat))
        targets = torch.tensor([choice + [0] * (width - len(choice)) for choice in flat], device=device)
        real = torch.tensor([[1] * len(choice) + [0] * (width - len(choice)) for choice in flat], device=device)
        log_probs = first.float().log_softmax(-1).repeat_interleave(n, 0).gather(1, targets[:, :1])
        if width > 1:
            past.batch_repeat_interleave(n)
            mask = torch.cat([prompt_mask.repeat_interleave(n, 0), real[:, :-1]], 1)
            logits = self.bridge.forward(targets[:, :-1], attention_mask=mask, past_key_values=past).float()
            rest = logits.log_softmax(-1).gather(2, targets[:, 1:, None])[..., 0]
            log_probs = torch.cat([log_probs, rest], 1)
        return (log_probs * real).sum(1).view(-1, n).cpu()

    def generate(self, rows: Sequence[Row], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0,
                 continuations: Sequence[Sequence[str]] | None = None,
                 progress: Callable[[int], None] | None = None) -> list[Generation]:
        """Continue each row, greedily (`temperature` 0, whatever the checkpoint's generation config says) or by sampling.

        Edits act on prompt positions only: they fire while the prompt is read, never on generated tokens. A row stops at any of the
        checkpoint's end tokens. A sampled row depends on `seed` and its own text alone, not on the rows it runs with.
        `continuations` (as in `continuation_log_probs`) are scored on the way: the prompts are read once for both.
        """
        ids = [] if continuations is None else self._continuation_ids(rows, continuations)
        out: list[Generation | None] = [None] * len(rows)
        with torch.no_grad(), self._adapter():
            for batch in self._batches(rows):
                logits, past = self._prefill(batch, use_cache=True)
                made = self._continue(batch, logits, copy.deepcopy(past) if ids else past, max_new_tokens, temperature, seed)
                if ids:
                    scored = self._choices(batch, [ids[i] for i in batch.index], logits, past).tolist()
                    made = [replace(one, choices=tuple(choices)) for one, choices in zip(made, scored, strict=True)]
                for i, generation in zip(batch.index, made, strict=True):
                    out[i] = generation
                if progress is not None:
                    progress(len(batch.index))
        return [generation for generation in out if generation is not None]

    def _continue(self, batch: _Batch, logits: Float[Tensor, "row vocabulary"], past: Any, limit: int, temperature: float,
                  seed: int) -> list[Generation]:
        """Decode after prompts that have been read; rows that end leave the batch (the cache is used up)."""
        noise = [random.Random(f"{seed}|{row.prompt.text}") for row in batch.rows]
        made: list[list[int]] = [[] for _ in batch.rows]
        live, mask = list(range(len(batch.rows))), batch.mask
        for step in range(limit):
            chosen = _choose(logits, temperature, [noise[i] for i in live])
            for i, token in zip(live, chosen, strict=True):
                made[i].append(token)
            keep = [k for k, token in enumerate(chosen) if token not in self.stop_ids]
            if not keep or step == limit - 1:
                break
            if len(keep) < len(live):
                index = torch.tensor(keep, device=mask.device)
                past.batch_select_indices(index)
                mask, live, chosen = mask[index], [live[k] for k in keep], [chosen[k] for k in keep]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            tokens = torch.tensor(chosen, device=mask.device)[:, None]
            logits, past = self.bridge.forward(tokens, return_type="logits_and_cache", attention_mask=mask, past_key_values=past)
            logits = logits[:, -1]
        return [self._generation(ids) for ids in made]

    def _generation(self, ids: list[int]) -> Generation:
        finished = bool(ids) and ids[-1] in self.stop_ids
        kept = ids[:-1] if finished else ids
        return Generation(self.tokenizer.decode(kept, skip_special_tokens=True), len(kept), finished)

    # ---- running ---------------------------------------------------------------------------------------------------

    def _prefill(self, batch: _Batch, *, use_cache: bool) -> tuple[Float[Tensor, "row vocabulary"], Any]:
        """Read the prompts with their edits: logits after the last token, and the key-value cache if asked for."""
        with self.bridge.hooks(fwd_hooks=self._hooks(batch)):
            logits, past = self.bridge.forward(batch.ids, return_type="logits_and_cache", attention_mask=batch.mask,
                                               use_cache=use_cache, logits_to_keep=1)
        return logits[:, -1], past

    def _batches(self, rows: Sequence[Row], budget: int | None = TOKEN_BUDGET) -> Iterator[_Batch]:
        """Rows in batches of like length with at most `budget` tokens (None: one batch); padding is on the left."""
        encoded = self.encode([row.prompt for row in rows])
        order = sorted(range(len(rows)), key=lambda i: (-len(encoded[i].ids), i))
        while order:
            size = len(order) if budget is None else max(1, budget // len(encoded[order[0]].ids))
            index, order = order[:size], order[size:]
            yield self._pad(index, [rows[i] for i in index], [encoded[i] for i in index])

    def _pad(self, index: list[int], rows: list[Row], encoded: list[Encoded]) -> _Batch:
        width, device = max(len(item.ids) for item in encoded), self.bridge.cfg.device
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(item.ids)) + item.ids for item in encoded], device=device)
        mask = torch.tensor([[0] * (width - len(item.ids)) + [1] * len(item.ids) for item in encoded], device=device)
        return _Batch(index, rows, encoded, ids, mask)

    def _hooks(self, batch: _Batch) -> list[tuple[str, Callable[[Tensor, Any], Tensor]]]:
        """One hook per hook point, kind of edit and turn: edits of one place act in the order in which their row lists them."""
        places: dict[tuple[str, int, str], list[tuple[int, int, Tensor, float]]] = defaultdict(list)
        for i, row in enumerate(batch.rows):
            turns: dict[tuple[str, int], int] = defaultdict(int)
            for edit in row.edits:
                site = edit.site
                self._check_layer(site.layer)
                if edit.vector.shape != (self.d_model,):
                    raise EditError(f"an edit needs a vector of shape ({self.d_model},), got {tuple(edit.vector.shape)}.")
                for position in batch.encoded[i].positions(site.mark, site.tokens, site.occurrence):
                    column = batch.start(i) + position
                    places[site.hook, turns[site.hook, column], edit.how].append((i, column, edit.vector, edit.strength))
                    turns[site.hook, column] += 1
        return [(hook, _editor(how, edits)) for (hook, _, how), edits in sorted(places.items(), key=lambda item: item[0][:2])]

    def _check_layer(self, layer: int) -> None:
        if layer >= self.n_layers:
            raise EditError(f"layer {layer} does not exist: {self.spec.name} has the layers 0 to {self.n_layers - 1}.")

    @contextlib.contextmanager
    def _adapter(self) -> Iterator[None]:
        """Switch the model to this view's adapter (or to none) while it runs."""
        if self.peft is None:
            yield
        elif self.treatment.adapter is None:
            with self.peft.disable_adapter():
                yield
        else:
            self.peft.set_adapter(self.treatment.adapter)
            yield


def _name_filter(names: Sequence[str] | Callable[[str], bool] | None, bridge: Any) -> Callable[[str], bool]:
    if names is None:
        return lambda name: True
    if callable(names):
        return names
    unknown = [name for name in names if name not in bridge.hook_dict]
    if unknown:
        raise ModelError(f"unknown hook point {unknown[0]!r}. Examples: blocks.0.hook_resid_post, blocks.0.attn.hook_pattern, "
                         "blocks.0.hook_mlp_out; all of them: list(model.bridge.hook_dict).")
    wanted = set(names)
    return lambda name: name in wanted


def _editor(how: Any, edits: list[tuple[int, int, Tensor, float]]) -> Callable[[Tensor, Any], Tensor]:
    """A hook that edits a batch at (row, column) places. It returns a copy: what others cached of this tensor stays as it was."""
    rows, columns = torch.tensor([e[0] for e in edits]), torch.tensor([e[1] for e in edits])
    vectors, strengths = torch.stack([e[2] for e in edits]), torch.tensor([[e[3]] for e in edits])

    def hook(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        at = value[rows, columns]
        value[rows, columns] = apply(at, vectors.to(at), how, strengths.to(at))
        return value

    return hook


def _choose(logits: Float[Tensor, "row vocabulary"], temperature: float, noise: Sequence[random.Random]) -> list[int]:
    """Next tokens: the most probable ones, or by inverse transform sampling with one uniform number per row."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1).cpu()
    draws = torch.tensor([[source.random()] for source in noise], dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, draws).squeeze(1).clamp_max(logits.shape[-1] - 1).tolist()


# ---- loading -----------------------------------------------------------------------------------------------------------


def load_model(spec: ModelSpec | str, *, adapters: Sequence[Path | str] = ()) -> HookedModel:
    """Load a model, put its LoRA adapters on it (before the bridge is booted, so that hooks and adapters are live together).

    Errors: ModelError in one sentence for a model that is gated, missing or not a causal language model, a tokenizer without character
    offsets, or an adapter folder that does not fit.
    """
    spec = (ModelSpec(spec) if isinstance(spec, str) else spec).resolved()
    check_model(spec)
    model, tokenizer = load_huggingface(spec)
    peft = _with_adapters(model, adapters, spec)
    bridge = _boot(spec, model if peft is None else peft.base_model.model, tokenizer)
    return HookedModel(spec, bridge, bridge.tokenizer, _stop_ids(model, tokenizer), fingerprint(spec, model.config), peft)


def check_model(spec: ModelSpec) -> None:
    """Find out cheaply (its configuration only) whether a model can be loaded. Errors: ModelError in one sentence."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    source = spec.source    # an embedded model's own error is clear already
    with _clear_errors(spec):
        config = AutoConfig.from_pretrained(source, revision=spec.revision)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{spec.name} is a {config.model_type!r} model, not a causal language model.")


@contextlib.contextmanager
def _clear_errors(spec: ModelSpec) -> Iterator[None]:
    """Turn the hub's and transformers' errors for an unreachable or broken checkpoint into one sentence."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    hub = "organism:base and organism:aligned are embedded and always there"
    try:
        yield
    except GatedRepoError:
        raise ModelError(f"{spec.name} is gated: accept its licence on its Hugging Face page and set HF_TOKEN, or use the embedded "
                         f"pair ({hub}).") from None
    except RepositoryNotFoundError:
        raise ModelError(_missing(spec, hub)) from None
    except (OSError, ValueError, SafetensorError) as error:
        cause = error.__cause__ if error.__cause__ is not None else error
        if isinstance(cause, GatedRepoError):
            raise ModelError(f"{spec.name} is gated: accept its licence on its Hugging Face page and set HF_TOKEN, or use the "
                             f"embedded pair ({hub}).") from None
        if Path(spec.source).is_dir():
            raise ModelError(f"the checkpoint folder {spec.source} cannot be loaded: {str(error).splitlines()[0]}") from error
        raise ModelError(_missing(spec, hub)) from error


def _missing(spec: ModelSpec, hub: str) -> str:
    return (f"the model {spec.name!r} cannot be found or reached: check its name and the connection; if it is a gated Hugging Face model, "
            f"accept its licence and set HF_TOKEN; or use the embedded pair ({hub}).")


def load_huggingface(spec: ModelSpec) -> tuple[Any, Any]:
    """The plain transformers model (frozen, in evaluation mode) and its tokenizer. Errors: as `load_model`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert spec.dtype is not None
    with _clear_errors(spec), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(spec.source, revision=spec.revision)
        model = AutoModelForCausalLM.from_pretrained(spec.source, revision=spec.revision, dtype=DTYPES[spec.dtype],
                                                     device_map=spec.device_map, attn_implementation="eager")
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {spec.name} gives no character offsets (it is not a fast one): marks cannot be placed.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False).eval()
    return (model if spec.device_map else model.to(spec.device)), tokenizer


def _with_adapters(model: Any, adapters: Sequence[Path | str], spec: ModelSpec) -> Any:
    """The model with LoRA adapters on it (a PeftModel), or None without any."""
    from peft import PeftModel

    peft = None
    for folder in adapters:
        name = adapter_name(folder)
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is no PEFT adapter folder: it has no adapter_config.json.")
        try:
            if peft is None:
                peft = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
            else:
                peft.load_adapter(str(folder), adapter_name=name)
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(f"the adapter {folder} does not fit {spec.name}: {str(error).splitlines()[0]}") from error
    return None if peft is None else peft.eval()


def _boot(spec: ModelSpec, model: Any, tokenizer: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with _quiet():
        bridge = TransformerBridge.boot_transformers(spec.source, hf_model=model, tokenizer=tokenizer, dtype=DTYPES[str(spec.dtype)])
    return bridge.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and transformer-lens' notes while loading; warnings of their loggers' errors remain."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), logging.root.level
    hf_logging.disable_progress_bar()
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every end token that the checkpoint's generation config and its tokenizer name (Llama 3 Instruct has two)."""
    named = model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*listed, tokenizer.eos_token_id] if i is not None)


def fingerprint(spec: ModelSpec, config: Any) -> str:
    """What identifies the weights: the hub's commit, or for a folder a hash of its files (large files by name and size)."""
    folder = Path(spec.source)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or spec.revision or "unknown")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model"):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            if size < 1 << 28:
                digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"
