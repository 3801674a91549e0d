"""The engine: rows x edits, at close to the cost of what must be computed at all.

Rows of one prompt share its clean *trunk*: what comes before their first edit, in layers and in columns, is computed once. A row enters the
batch at the first layer that an edit of its own changes, with the columns from its first edited token on; the keys and values of the
columns before it and of the layers below it are the trunk's. Rows of different prompts that begin alike, as the questions of one template
do, share that *stem* with its edits. The layers are transformers' own modules, called one by one with its sdpa attention; what is left out
is only what is known already, and in the last layer all columns but the last. `plain.py` does the same rows without any of this; both are
tested equal.

This module does NOT know prompts, words, adapters or decoding: see `decoding.py` for what is done with a batch that has been read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignblind_mi.models.blocks import has_own_keys, inner_taps, input_device, keys_and_values, log_probs_of, position_limit, unembed
from alignblind_mi.models.budget import Budget
from alignblind_mi.models.kernels import without_plans
from alignblind_mi.models.stems import common_stems, cut, first_column
from alignblind_mi.models.tokens import Later, Reader, Taps, TokenRow, left_pad, positions

ATTENTION = "alignblind_sdpa"


class Store:
    """Keys and values of a batch: per layer two tensors [row, kv head, column, head dim], with room for columns to come.

    Given to transformers' attention as its cache; `columns` are filled.
    """

    def __init__(self, columns: int, layers: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.columns, self.layers = columns, layers

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer up to the columns of this step, which are written behind the filled ones."""
        end = self.columns + key.shape[2]
        for store, new in zip(self.layers[layer], (key, value), strict=True):
            store[:, :, self.columns : end] = new
        return self.layers[layer][0][:, :, :end], self.layers[layer][1][:, :, :end]

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep these rows, in this order; a row may be asked for more than once."""
        self.layers = {layer: (k[rows.to(k.device)], v[rows.to(v.device)]) for layer, (k, v) in self.layers.items()}


@dataclass(frozen=True)
class Trunk:
    """Clean runs of some prompts, left-padded: residual streams entering the layers where rows join, keys and values of the columns.

    `hidden[l]` [prompt, column, d_model]; `layers[l]` keys and values [prompt, kv head, column, head dim], of fewer columns where no row
    needs more.
    """

    mask: Bool[Tensor, "prompt column"]
    rope: tuple[Tensor, Tensor]
    hidden: dict[int, Tensor]
    layers: dict[int, tuple[Tensor, Tensor]]


class _Reading:
    """The cache of rows that are being read: their trunk's keys and values in the columns before `first`, their own from there on.

    `owner[i]` is the trunk's prompt that row i goes on from. With `room` it becomes a Store of all `rows` with that many columns to come;
    without, nothing is kept.
    """

    def __init__(self, rows: int, columns: int, room: int | None, trunk: Trunk | None = None, owner: Tensor | None = None, first: int = 0
                 ) -> None:
        self.rows, self.columns, self.room = rows, columns, room
        self.trunk, self.owner, self.first = trunk, owner, first
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.all_columns: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of all columns. Where `all_columns` holds those of this reading, the new ones are the last of them."""
        if self.all_columns is not None:
            (key, value), self.all_columns = self.all_columns, None
        if self.room is not None:
            self.kept[layer] = (self._kept(0, layer, key), self._kept(1, layer, value))
            key, value = (part[: len(key), :, : self.columns] for part in self.kept[layer])
        elif self.first:
            key, value = (torch.cat([self._of_trunk(slot, layer, len(new))[:, :, : self.first], new], 2)
                          for slot, new in enumerate((key, value)))
        return key, value

    def _of_trunk(self, slot: int, layer: int, rows: int) -> Tensor:
        assert self.trunk is not None
        part = self.trunk.layers[layer][slot]
        return part.expand(rows, -1, -1, -1) if len(part) == 1 else part[self.owner[:rows].to(part.device)]    # type: ignore[index]

    def _kept(self, slot: int, layer: int, new: Tensor) -> Tensor:
        store = new.new_empty(self.rows, new.shape[1], self.columns + (self.room or 0), new.shape[3])
        if self.trunk is not None and layer in self.trunk.layers:
            part = self._of_trunk(slot, layer, self.rows)[:, :, : self.columns]
            store[:, :, : part.shape[2]] = part
        store[: len(new), :, self.first : self.columns] = new
        return store

    def store(self, n_layers: int) -> Store | None:
        """What is kept of all layers, those below the first entry included."""
        if self.room is None:
            return None
        for layer in set(range(n_layers)) - set(self.kept):
            key, value = self.trunk.layers[layer]    # type: ignore[union-attr]
            self.update(key[:0, :, self.first : self.columns], value[:0, :, self.first : self.columns], layer)
        return Store(self.columns, self.kept)


@dataclass(eq=False)
class Batch:
    """Rows whose prompts have been read: `index` says which rows of the call they are.

    `hidden` is the residual stream at the last column, `found` what was read at the places that the rows asked for. Rows that ask for
    places are run as far as those need; only rows that do not can be continued.
    """

    engine: "Engine"
    index: list[int]
    hidden: Float[Tensor, "row d_model"]
    mask: Bool[Tensor, "row column"]
    store: Store | None
    later: Later
    found: Float[Tensor, "row read value"] | None = None

    def logits(self) -> Float[Tensor, "row vocabulary"]:
        """Logits after the last column, in float32."""
        return unembed(self.engine.model, self.hidden)

    def is_finite(self) -> bool:
        """Whether what the next token is computed from, or was read, are numbers."""
        return bool((self.hidden if self.found is None else self.found).isfinite().all())

    def log_probs_of(self, ids: Int[Tensor, "*row target"]) -> Float[Tensor, "row target"]:
        """Exact log-probabilities of some next tokens, of every row or each row's own; the vocabulary is there in parts."""
        return log_probs_of(self.engine.model, self.hidden, ids, self.engine.budget.lens_block)

    def extend(self, tokens: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new vocabulary"]:
        """Read more tokens of every row and return the logits after each; `real` is False in padding on the right."""
        return unembed(self.engine.model, self._read(tokens, real))

    def score(self, ids: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new-1"]:
        """Read more tokens of every row, but the last; the log-probability of each but the first (0 in padding), on the CPU."""
        hidden, out, then = self._read(ids[:, :-1], real[:, :-1]), torch.zeros(len(ids), ids.shape[1] - 1), real[:, 1:]
        out[then] = log_probs_of(self.engine.model, hidden[then.to(hidden.device)], ids[:, 1:][then][:, None],
                                 self.engine.budget.lens_block)[:, 0]
        return out

    def _read(self, tokens: Int[Tensor, "row new"], real: Bool[Tensor, "row new"]) -> Float[Tensor, "row new d_model"]:
        assert self.store is not None
        self.mask = torch.cat([self.mask, real.to(self.mask.device)], 1)
        hidden = self.engine.step(tokens, self.mask, self.store, self.later.taps(tokens.shape[1]))
        self.store.columns += tokens.shape[1]
        self.hidden = hidden[:, -1]
        return hidden

    def select(self, rows: Int[Tensor, " row"]) -> "Batch":
        """The batch of these rows only (or of some rows more than once); this one is used up."""
        assert self.store is not None
        self.store.select(rows)
        return Batch(self.engine, [self.index[i] for i in rows.tolist()], self.hidden[rows], self.mask[rows], self.store,
                     self.later.select(rows))

    def copy(self) -> "Batch":
        """A batch whose rows can be selected (which copies them) and then used up while this one stays."""
        assert self.store is not None
        return Batch(self.engine, self.index, self.hidden, self.mask, Store(self.store.columns, dict(self.store.layers)), self.later)


class Engine:
    """Runs token rows on a Llama-like transformers model (`blocks.is_llama_like`). See the module's docstring."""

    name = "fast"

    def __init__(self, model: Any, budget: Budget) -> None:
        _register_attention()
        model.set_attn_implementation(ATTENTION)
        self.model, self.core, self.budget, self.device = model, model.model, budget, input_device(model)
        self.n_layers, self.limit = int(model.config.num_hidden_layers), position_limit(model)
        self.trims = has_own_keys(self.core.layers[-1])
        self.scored = budget.tokens    # scored at a time: as many as run at a time, since their logits exist for a part of the vocabulary

    # ---- what is run together --------------------------------------------------------------------------------------

    def batches(self, rows: Sequence[TokenRow], room: int | None, reader: Reader | None = None) -> Iterator[Batch]:
        """Read all rows, in batches; `room` is the number of tokens that will follow each prompt (None: no cache is kept).

        `reader` says what is kept at the places that rows ask for.
        """
        groups: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(i if row.reads else row.ids, []).append(i)
        alone = [group[0] for group in groups.values() if len(group) == 1]
        stems = [(stem, group) for stem, group in common_stems(rows, alone) if stem]
        yield from self._read_all(rows, sorted(set(alone) - {i for _, group in stems for i in group}), room, reader)
        if stems:
            yield from self._read_stems(rows, stems, room, reader)
        shared = sorted((group for group in groups.values() if len(group) > 1), key=lambda group: -len(rows[group[0]].ids))
        for chunk in self.budget.trunks(shared, [len(row.ids) for row in rows]):
            yield from self._read_shared(rows, chunk, room)

    def _read_all(self, rows: Sequence[TokenRow] | Mapping[int, TokenRow], chosen: Sequence[int], room: int | None, reader: Reader | None,
                  trunk: Trunk | None = None, owners: Mapping[int, int] | None = None) -> Iterator[Batch]:
        """Rows that have nothing in common, or that go on from a trunk's prompts (`owners`)."""
        before = 0 if trunk is None else trunk.mask.shape[1]
        length = {i: len(rows[i].ids) for i in chosen}
        order = sorted(chosen, key=lambda i: -length[i])
        for index in self.budget.parts(order, length, {i: before + n for i, n in length.items()}, room):
            owner = None if owners is None else torch.tensor([owners[i] for i in index])
            yield self._read([rows[i] for i in index], index, room, reader, trunk, owner)

    def _read_stems(self, rows: Sequence[TokenRow], stems: Sequence[tuple[int, list[int]]], room: int | None, reader: Reader | None
                    ) -> Iterator[Batch]:
        """Rows of different prompts that begin alike, edits included: each beginning once, then what is left of every row."""
        order = sorted(range(len(stems)), key=lambda k: -stems[k][0])
        for chunk in self.budget.trunks([[k] for k in order], [stem for stem, _ in stems]):
            some = [stems[k] for (k,) in chunk]
            trunk = self._trunk([cut(rows[group[0]], 0, stem) for stem, group in some], set(), whole=True, columns=0)
            owners = {i: owner for owner, (_, group) in enumerate(some) for i in group}
            rest = {i: cut(rows[i], stem, len(rows[i].ids)) for stem, group in some for i in group}
            yield from self._read_all(rest, sorted(owners), room, reader, trunk, owners)

    def _read_shared(self, rows: Sequence[TokenRow], chunk: Sequence[list[int]], room: int | None) -> Iterator[Batch]:
        """All rows of some prompts: their trunk once, then batches of rows by the length of what each must compute."""
        width = max(len(rows[group[0]].ids) for group in chunk)
        owner_of = {i: owner for owner, group in enumerate(chunk) for i in group}
        suffix = {i: len(rows[i].ids) - first_column(rows[i]) for i in owner_of}
        entry = {i: self.entry(rows[i]) for i in owner_of}
        trunk = self._trunk([TokenRow(rows[group[0]].ids) for group in chunk], set(entry.values()), whole=self.n_layers in entry.values(),
                            columns=width - min(suffix.values()))
        order = sorted(owner_of, key=lambda i: (-suffix[i], entry[i]))
        share = {i: (self.n_layers - entry[i]) / self.n_layers for i in order}
        for part in self.budget.parts(order, suffix, dict.fromkeys(order, width), room, share):
            index = sorted(part, key=lambda i: entry[i])
            yield self._join(trunk, [rows[i] for i in index], index, [owner_of[i] for i in index], width - suffix[part[0]], room)

    def entry(self, row: TokenRow) -> int:
        """The first layer that a row must compute itself; the number of layers for a row without edits."""
        return min((edit.entry for edit in row.edits), default=self.n_layers)

    # ---- reading prompts -------------------------------------------------------------------------------------------

    def _read(self, rows: Sequence[TokenRow], index: list[int], room: int | None, reader: Reader | None, trunk: Trunk | None = None,
              owner: Tensor | None = None) -> Batch:
        """Rows with every column of theirs (behind their trunk's, if any), and every layer that is asked for."""
        ids, mask = left_pad([row.ids for row in rows], self.device)
        taps = Taps(rows, [len(row.ids) - ids.shape[1] for row in rows], reader)
        if trunk is not None and owner is not None:
            mask = torch.cat([trunk.mask[owner.to(self.device)], mask], 1)
        first = mask.shape[1] - ids.shape[1]
        hidden = self.core.embed_tokens(ids)
        rope, attend = self._rope(hidden, mask, first), _causal(mask, first)
        cache = _Reading(len(rows), mask.shape[1], room, trunk, owner, first)
        hidden = taps.touch(-1, "resid_post", hidden)
        for layer in range(self.n_layers if taps.found is None else taps.deepest + 1):
            last = taps.found is None and layer == self.n_layers - 1
            hidden = self._last_column(hidden, attend, rope, cache, taps) if last else self._layer(layer, hidden, attend, rope, cache, taps)
            hidden = taps.touch(layer, "resid_post", hidden, skip=ids.shape[1] - hidden.shape[1])
        store = cache.store(self.n_layers) if taps.found is None else None
        return Batch(self, index, hidden[:, -1], mask, store, Later.of(rows), taps.found)

    def _trunk(self, rows: Sequence[TokenRow], entries: set[int], *, whole: bool, columns: int) -> Trunk:
        """What rows to come have in common, run once.

        Above the last layer at which a row joins only `columns` are needed, unless the `whole` run is asked for.
        """
        tokens, mask = left_pad([row.ids for row in rows], self.device)
        taps = Taps(rows, [len(row.ids) - tokens.shape[1] for row in rows])
        hidden = taps.touch(-1, "resid_post", self.core.embed_tokens(tokens))
        trunk = Trunk(mask, self._rope(hidden, mask, 0), {}, {})
        cache, attend, rope = _Reading(len(rows), tokens.shape[1], 0), _causal(mask, 0), trunk.rope
        last = self.n_layers if whole else max(entries)
        for layer in range(self.n_layers + 1):
            if layer in entries:
                trunk.hidden[layer] = hidden
            if layer == last and not whole:
                if columns == 0:
                    break
                hidden, rope = hidden[:, :columns], (rope[0][:, :columns], rope[1][:, :columns])
                cache, attend = _Reading(len(rows), columns, 0), _causal(mask[:, :columns], 0)
            if layer < self.n_layers:
                hidden = taps.touch(layer, "resid_post", self._layer(layer, hidden, attend, rope, cache, taps))
                trunk.layers[layer] = cache.kept[layer]
        return trunk

    def _join(self, trunk: Trunk, rows: Sequence[TokenRow], index: list[int], owners: list[int], first: int, room: int | None) -> Batch:
        """Rows (ordered by entry) that leave their trunks: each joins the batch at its layer, with the columns from `first` on."""
        width, owner = trunk.mask.shape[1], torch.tensor(owners)
        mask = trunk.mask[owner.to(self.device)]
        taps = Taps(rows, [len(row.ids) - width + first for row in rows])
        entries = [self.entry(row) for row in rows]
        attend, cache = _causal(mask, first), _Reading(len(rows), width, room, trunk, owner, first)
        at = owner.to(trunk.rope[0].device) if trunk.rope[0].shape[0] > 1 else None
        rope = tuple((part if at is None else part[at])[:, first:] for part in trunk.rope)
        hidden, active = trunk.hidden[entries[0]][:0, first:], 0
        for layer in range(entries[0], self.n_layers + 1):
            joining = sum(entry == layer for entry in entries[active:])
            if joining:
                new = trunk.hidden[layer][owner[active : active + joining], -hidden.shape[1] :]
                hidden, active = torch.cat([hidden, new]) if active else new, active + joining
            hidden = taps.touch(layer - 1, "resid_post", hidden, skip=width - first - hidden.shape[1])
            now = None if attend is None else attend[:active]
            turn = rope if at is None else (rope[0][:active], rope[1][:active])
            if layer < self.n_layers - 1:
                hidden = self._layer(layer, hidden, now, turn, cache, taps)
            elif layer == self.n_layers - 1:
                hidden = self._last_column(hidden, now, turn, cache, taps)
        return Batch(self, index, hidden[:, -1], mask, cache.store(self.n_layers), Later.of(rows))

    # ---- single steps ----------------------------------------------------------------------------------------------

    def _rope(self, hidden: Tensor, mask: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the columns from `first` on; one row of it where no prompt is padded."""
        where = positions(mask[:1] if bool(mask.all()) else mask)[:, first:]
        cos, sin = self.core.rotary_emb(hidden, position_ids=where)
        return cos, sin

    def _layer(self, layer: int, hidden: Tensor, mask: Tensor | None, rope: Any, cache: Any, taps: Taps | None = None) -> Tensor:
        """One of the model's own layers, with the taps inside it."""
        with inner_taps(self.core.layers[layer], layer, taps) if taps else nullcontext():
            return self.core.layers[layer](hidden, attention_mask=mask, position_embeddings=rope, past_key_values=cache, use_cache=True)

    def _last_column(self, hidden: Tensor, mask: Tensor | None, rope: Any, cache: "_Reading", taps: Taps) -> Tensor:
        """The model's last layer, at the last column only where nothing is touched inside it: of the others it needs keys and values."""
        last = self.n_layers - 1
        if not self.trims or last in taps.inside:
            return self._layer(last, hidden, mask, rope, cache, taps)
        cache.all_columns = keys_and_values(self.core.layers[last], hidden, rope)
        turn = (rope[0][:, -1:], rope[1][:, -1:])
        return self._layer(last, hidden[:, -1:], None if mask is None else mask[:, :, -1:], turn, cache)

    @without_plans
    def step(self, tokens: Int[Tensor, "row new"], mask: Bool[Tensor, "row column"], store: Store, taps: Taps | None = None
             ) -> Float[Tensor, "row new d_model"]:
        """Residual streams after more tokens, whose keys and values are written into the store; `mask` covers them, `taps` touch them."""
        hidden = self.core.embed_tokens(tokens.to(self.device))
        hidden = hidden if taps is None else taps.touch(-1, "resid_post", hidden)
        first = store.columns
        rope = self._rope(hidden, mask, first)
        attend = None if tokens.shape[1] == 1 and bool(mask.all()) else _causal(mask, first)
        for layer in range(self.n_layers):
            hidden = self._layer(layer, hidden, attend, rope, store, taps)
            hidden = hidden if taps is None else taps.touch(layer, "resid_post", hidden)
        return hidden


def _causal(mask: Bool[Tensor, "row column"], first: int) -> Bool[Tensor, "row 1 query key"] | None:
    """Which keys each query from column `first` on attends to; None where plain causal attention says it all.

    Queries in the padding attend to themselves, so that no softmax is over nothing. Queries that begin behind the first key always need
    a mask: sdpa aligns its own causal mask with the first key.
    """
    if first == 0 and bool(mask.all()):
        return None
    column = torch.arange(mask.shape[1], device=mask.device)
    query = column[first:, None]
    return ((column <= query) & mask[:, None, :] | (column == query))[:, None]


def _grouped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                       scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' sdpa attention; on a CPU, masked prompts of grouped heads without copying keys and values to every head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = not any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    if query.device.type != "cpu" or attention_mask is None or query.shape[2] == 1 or query.shape[1] == key.shape[1] or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, _grouped_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
