"""A loaded model as it is asked: under a treatment, raw or in a chat; its prompts as rows of tokens, and how rows run in batches.

What is read out of the rows is in `model.py`. This module does NOT know concepts, outcomes or studies.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from alignblind_mi.borders.settings import Text, Words, many, takes
from alignblind_mi.borders.texts import named_line
from alignblind_mi.models.adapters import adapters_of, switch, switched
from alignblind_mi.models.blocks import decoder_layers, mixer_width, text_config
from alignblind_mi.models.budget import is_out_of_memory, release
from alignblind_mi.models.chat import Chat, chat_frame, in_chat
from alignblind_mi.models.decoding import Batch, refuse_nan
from alignblind_mi.models.edits import GENERATED, UNITS, UNTREATED, EditError, Row, Rows, Site, Treatment
from alignblind_mi.models.engine import Engine
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.spec import ModelError, ModelSpec, not_finite
from alignblind_mi.models.tokens import Encoded, Reader, TokenEdit, TokenRow, continuation_ids, encode, place, unknown_words, word_ids
from alignblind_mi.models.twin import Twin
from alignblind_mi.progress import Advance, counted
from alignblind_mi.stimuli.prompts import Prompt, PromptError, Prompts, as_prompts

log = logging.getLogger(__name__)
_SAYS_BORDERS = ContextVar("says_borders", default=True)


@contextlib.contextmanager
def knowing_borders() -> Iterator[None]:
    """Score in this block without the warning of borders that move: for whoever asks templates that end in a blank knowingly, as the
    explicit ones of the paper do. A model goes on behind that blank as it is scored here."""
    token = _SAYS_BORDERS.set(False)
    try:
        yield
    finally:
        _SAYS_BORDERS.reset(token)
M = TypeVar("M", bound="View")
P = ParamSpec("P")
R = TypeVar("R")


def alone(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """A method during which no other thread uses the weights (see `HookedModel.lock`)."""
    @functools.wraps(method)
    def held(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return held


@dataclass(frozen=True, eq=False)
class View:
    """What a `HookedModel` is made of, its treatment and chat, and how its rows run."""

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

    def __repr__(self) -> str:
        about = [repr(self.spec.name), f"{self.n_layers} layers", f"{self.d_model} wide", f"{self.engine.name} engine",
                 f"{self.spec.dtype} on {self.spec.device}", *([f"adapters {', '.join(self.adapters)}"] if self.adapters else []),
                 *([f"under {self.treatment.name}"] if self.treatment is not UNTREATED else []), *(["in a chat"] if self.chat else [])]
        return named_line(self, ", ".join(about))

    @property
    def bridge(self) -> Any:
        """transformer-lens' TransformerBridge on the same weights: any hook point, attention patterns, gradients, its tools.

        It is one object for all views, with the adapter (or none) of the view that it was last asked from, and without edits: see `cache`.
        """
        if self.spec.tensor_parallel:
            raise ModelError(f"{self.spec.name} has no bridge with tensor parallelism (transformer-lens needs whole layers): load it in "
                             "one process, with device_map='auto' where it needs several GPUs.")
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
        return adapters_of(self.peft)

    @takes(ModelError)
    def under(self: M, treatment: Treatment) -> M:
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

    @takes(ModelError)
    @alone
    def in_chat(self: M, chat: Chat | None = Chat()) -> M:    # noqa: B008 - a value
        """The same model, asked in its chat format (None: raw again). Errors: ModelError for a tokenizer without a usable chat template."""
        if chat is not None:
            chat_frame(self.tokenizer, chat, self.spec.name)
        return replace(self, chat=chat)

    @takes(ModelError)
    @alone
    def rows(self, prompts: Prompts, *, partial: bool = False) -> list[Row]:
        """Prompts as this view asks them: after the treatment's prefix, in the chat if there is one, with the treatment's edits (`partial`:
        see `Treatment.rows`).

        A `Row` that is made by hand is raw: steering phrases, and the questions that representations are patched into, stay as they are in
        a chat as well.
        """
        rows = self.treatment.rows(as_prompts(prompts), partial=partial)
        if self.chat is None:
            return rows
        asked = in_chat([row.prompt for row in rows], self.tokenizer, self.chat, self.spec.name)
        return [replace(row, prompt=prompt) for row, prompt in zip(rows, asked, strict=True)]

    def as_rows(self, rows: Rows) -> list[Row]:
        """One or many rows: each `Row` as it is, a prompt or a text as this view asks it (see `rows`)."""
        found: tuple[Row | Prompt | str, ...] = many(rows)
        return [row if isinstance(row, Row) else self.rows(row)[0] for row in found]

    def provenance(self) -> dict[str, Any]:
        """What identifies the model behind a number."""
        return {"model": self.spec.name, "revision": self.fingerprint, "dtype": self.spec.dtype, "device": self.spec.device,
                "quantization": self.spec.quantization, "trust_remote_code": self.spec.trust_remote_code, "engine": self.engine.name,
                "batches": str(self.engine.budget), "treatment": self.treatment.name,
                "chat": None if self.chat is None else self.chat.record()}

    @takes(ModelError)
    @alone
    def encode(self, prompts: Prompts) -> list[Encoded]:
        """Tokenise prompts: the ids that transformers gives to their text, but no end token behind it (see `tokens.encode`)."""
        return encode(self.tokenizer, as_prompts(prompts))

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
        """The ids of a word as it stands in a text, behind other words. Errors: ModelError if the tokenizer does not know it."""
        ids = word_ids(self.tokenizer, word)
        if not ids:
            raise ModelError(f"the tokenizer of {self.spec.name} does not know {word!r}: choose another cue or model.")
        return ids

    @takes(ModelError)
    @alone
    def check_known(self, prompts: Prompts) -> None:
        """Errors: ModelError naming the first word of a prompt that the tokenizer does not know."""
        for item in self.encode(prompts):
            for word in unknown_words(self.tokenizer, item)[:1]:
                raise ModelError(f"the tokenizer of {self.spec.name} does not know {word!r} (in the prompt {item.prompt.text!r}): "
                                 "this model cannot be asked about it; choose another cue or model.")

    @takes(ModelError)
    @alone
    def continuation_ids(self, rows: Rows, continuations: Sequence[Words]) -> list[list[list[int]]]:
        """The ids of each row's continuations as they are spelt behind its prompt: both are tokenised together, and the tail is kept.

        Where a tokenizer merges the end of a prompt with the beginning of its continuation, the continuation is spelt as behind other
        text, and a warning says so. Errors: ModelError for a continuation that the tokenizer does not know, or another number of lists.
        """
        rows = self.as_rows(rows)
        counts = {len(choices) for choices in continuations}
        if len(continuations) != len(rows) or len(counts) > 1:
            raise ModelError(f"every row needs the same number of continuations: {len(rows)} rows, {len(continuations)} lists of "
                             f"{' or '.join(map(str, sorted(counts))) or 'none'}.")
        if 0 in counts:
            raise ModelError("a row without continuations has nothing to be scored: give each row at least one.")
        ids, apart = continuation_ids(self.tokenizer, [row.prompt for row in rows], continuations)
        for spelt, choices in zip(ids, continuations, strict=True):
            for one, text in zip(spelt, choices, strict=True):
                if not one:
                    raise ModelError(f"the tokenizer of {self.spec.name} does not know {text!r}: choose another cue or model.")
        if apart and _SAYS_BORDERS.get():
            log.warning("the tokenizer of %s merges the end of %d prompts with the beginning of their continuations (%r + %r): these are "
                        "scored as they are spelt behind other text. End the prompt where a token ends, such as without a blank.",
                        self.spec.name, len(apart), apart[0][0][-20:], apart[0][1][:20])
        return ids

    @alone
    def _over(self, rows: Sequence[TokenRow], room: int | None, work: Callable[[Batch], None], reader: Reader | None = None) -> None:
        """Read all rows in batches and do the work on each; when memory runs out, go on with smaller batches and the rows that are left."""
        self._refuse_too_long(rows, room or 0)
        left = list(range(len(rows)))
        with counted(self.spec.name, len(rows)) as advance, torch.no_grad(), switched(self.peft, self.treatment.adapter):
            while left:
                done: set[int] = set()
                try:
                    self._through({i: rows[i] for i in left}, room, reader, work, done, advance)
                except FloatingPointError as error:
                    raise not_finite(self.spec) from error
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.engine.budget.shrink(error)
                if len(done) < len(left):
                    release()
                left = [i for i in left if i not in done]

    def _refuse_too_long(self, rows: Sequence[TokenRow], room: int) -> None:
        longest, limit = max((len(row.ids) for row in rows), default=0), self.engine.limit
        if limit is not None and longest + room > limit:
            answers = f" and {room} that follow" if room else ""
            raise ModelError(f"{self.spec.name} can read {limit} tokens, where its table of positions ends; the longest row has {longest}"
                             f"{answers}: give shorter prompts{', or ask for fewer new tokens' if room else ''}.")

    def _through(self, rows: Mapping[int, TokenRow], room: int | None, reader: Reader | None, work: Callable[[Batch], None], done: set[int],
                 advance: Advance) -> None:
        """One go at some rows. A frame of its own: when it ends, well or not, no batch is held any more."""
        numbers = list(rows)
        for batch in self.engine.batches(list(rows.values()), room, reader):
            index = batch.index = [numbers[i] for i in batch.index]
            refuse_nan(batch)
            work(batch)
            done.update(index)
            advance(len(index))
            del batch    # its cache goes before the next prompts are read

    @alone
    def token_rows(self, rows: Sequence[Row], sites: Sequence[Site] = ()) -> list[TokenRow]:
        """Rows in tokens, with the places that `sites` are in each."""
        encoded = self.encode([row.prompt for row in rows])
        places: dict[tuple[int, str, str, int | None, tuple[int, ...]], list[int]] = {}

        def positions(i: int, site: Site) -> list[int]:
            key = (id(rows[i].prompt), site.mark, site.tokens, site.occurrence, site.ids)
            if key not in places:
                places[key] = encoded[i].at(site)
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
                act = functools.partial(TokenEdit, vector=edit.vector, how=edit.how, strength=edit.strength, as_far_as=edit.as_far_as)
                if site.mark == GENERATED:
                    later.append(act(place(site.layer, site.stream, 0, features)))
                edits += [act(place(site.layer, site.stream, at, features)) for at in positions(i, site)]
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
