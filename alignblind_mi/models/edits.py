"""Interventions as values: where (Site), what (Edit), on which prompt (Row), and for a whole study (Treatment).

The baseline is the empty value: a Row without edits, UNTREATED. Nothing here runs a model; `apply` and `random_like` are pure tensor
mathematics.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.settings import Bound, Listed, Made, Name, Strength, Whole, check_fields, checked, widened
from alignblind_mi.borders.texts import one_line, shown
from alignblind_mi.errors import AlignblindError
from alignblind_mi.stimuli.prompts import Prompt, as_prompt

Stream = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "post"]
UNITS: dict[str, str] = {"z": "head", "post": "neuron"}    # the streams that have parts of their own, and what a part is
PROMPT, LAST, GENERATED = "prompt", "last", "generated"
EVERYWHERE = (PROMPT, LAST, GENERATED)    # marks that every prompt has: see `Site`
_PREFIX = {"z": "attn.", "post": "mlp."}
How = Literal["replace", "add", "ablate"]
Tokens = Literal["last", "all"]


class EditError(AlignblindError):
    """A site or edit that cannot be applied."""


@widened
@dataclass(frozen=True)
class Site:
    """A place in a forward pass: after `layer` (0-based), at the tokens of a prompt's `mark`, in one stream.

    Beside the residual stream and what attention and MLP add to it there are, by transformer-lens' names, `z` (what the heads read, before
    the output projection mixes them) and `post` (the MLP's neurons after the activation). `units` chooses among those: indices of heads or
    of neurons, in the order in which a vector lists them (a head is d_head values, a neuron one); empty is all of them.

    Three marks need not be set: `prompt` is every token of the prompt's text, `last` the last one, `generated` every token that follows it
    (what is decoded, and given continuations), which can be edited and not read.

    `tokens` says which tokens of a marked word that the tokenizer splits: the last one (it carries the word's meaning) or all of them.
    `occurrence` picks one of the mark's spans (0-based, negative from the end); None means every one. `ids`: instead of the tokens of the
    mark's own spans, every token of the prompt's text with one of these ids.
    """

    layer: Annotated[int, Bound(0, 9_999, sentence="layers are counted from 0 (to 9999 at most), got {value}.")]
    mark: Name
    stream: Stream = "resid_post"
    tokens: Tokens = "last"
    occurrence: int | None = None
    units: Annotated[tuple[int, ...], Listed(once=False, alone=True)] = ()
    ids: Annotated[tuple[Whole, ...], Listed(alone=True)] = ()

    def __post_init__(self) -> None:
        check_fields(self, EditError)
        if self.ids and (self.mark in EVERYWHERE or self.occurrence is not None):
            raise EditError(f"ids {shown(self.ids)} choose among all tokens of a prompt that has a mark of its own: give them without an "
                            f"occurrence, and with a mark that is none of {', '.join(EVERYWHERE)}.")
        if self.units:
            self._check_units()

    def _check_units(self) -> None:
        if self.stream not in UNITS:
            raise EditError(f"the stream {self.stream} has no units of its own, got {self.units}: heads are units of z, neurons of post.")
        if min(self.units) < 0 or len(set(self.units)) < len(self.units):
            raise EditError(f"units are counted from 0 and named once each, got {self.units}.")

    @property
    def hook(self) -> str:
        """The hook point's name in transformer-lens."""
        return hook_name(self.layer, self.stream)


def hook_name(layer: int, stream: Stream) -> str:
    """A stream's hook point in transformer-lens."""
    return f"blocks.{layer}.{_PREFIX.get(stream, '')}hook_{stream}"


@dataclass(frozen=True, eq=False)
class Edit:
    """What happens at a site: replace the vector, add `strength` times it, or ablate its direction (`strength` 1 removes it).

    vector: [d_model]; at `z` and `post` the site's units one after the other, [heads * d_head] or [neurons].
    as_far_as: a vector of the same size, for what is added: it is first made as long as the activation is far from this one, token by
    token, so that `vector` says the direction and `strength` the share of that distance (a placebo of replacing by it: see
    `mitigations/placebos.py`).
    """

    __repr__ = one_line

    site: Site
    vector: Float[Tensor, " size"]
    how: How = "replace"
    strength: float = 1.0
    as_far_as: Float[Tensor, " size"] | None = None

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise EditError(f"unknown edit {self.how!r}. Known: {', '.join(get_args(How))}.")
        checked(self.strength, Strength, "strength", EditError)
        if not self.vector.numel():
            raise EditError(f"the vector of an edit after layer {self.site.layer} is empty: give one number for each entry of the stream.")
        if not bool(torch.isfinite(self.vector).all()):
            raise EditError(f"the vector of an edit after layer {self.site.layer} holds numbers that are not finite (NaN or infinite): it "
                            "would make every answer meaningless.")
        if self.as_far_as is not None:
            self._check_distance(self.as_far_as)
        if self.how == "replace" and self.strength != 1.0:
            raise EditError("a replacement has no strength: use how='add' to scale a vector.")
        if self.how == "ablate" and not self.vector.norm() > 0:
            raise EditError("the direction to ablate is the zero vector.")

    def _check_distance(self, end: Float[Tensor, " size"]) -> None:
        if self.how != "add":
            raise EditError(f"as_far_as says how much is added, and this edit does not add but {self.how}: leave it out, or use how='add'.")
        if end.shape != self.vector.shape or not bool(torch.isfinite(end).all()):
            raise EditError(f"as_far_as must be finite numbers in the shape of the vector, {tuple(self.vector.shape)}; got "
                            f"{tuple(end.shape)}.")
        if not self.vector.norm() > 0:
            raise EditError("the direction to add is the zero vector.")


Edits = Annotated[tuple[Edit, ...], Listed(once=False, alone=True)]    # one is taken too


@widened
@dataclass(frozen=True, eq=False)
class Row:
    """One run of the model: a prompt (a text is one without marks) and its edits (none is the clean run)."""

    __repr__ = one_line

    prompt: Annotated[Prompt, Made(as_prompt, "a Prompt or a text", Prompt | str)]
    edits: Edits = ()

    def __post_init__(self) -> None:
        if not (type(self.prompt) is Prompt and type(self.edits) is tuple and all(isinstance(edit, Edit) for edit in self.edits)):
            check_fields(self, EditError)    # made many times: looked into where there is something to do


@widened
@dataclass(frozen=True, eq=False)
class Treatment:
    """What is done to a model in a study: edits on every prompt, a LoRA adapter, a prefix, or any of them together."""

    __repr__ = one_line

    name: str
    edits: Edits = ()
    adapter: str | None = None
    prefix: str = ""
    family: str = "untreated"
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, EditError)

    def rows(self, prompts: Iterable[Prompt], *, partial: bool = False) -> list[Row]:
        """The prompts under this treatment (the adapter is switched by the model).

        `partial`: edits at a mark that a prompt lacks are left out of its row (a text that does not mention the identifiers); without it
        such a row is an error when it runs, so that a misspelt mark is no treatment without effect.
        """
        return [Row(prompt.prefixed(self.prefix), tuple(edit for edit in self.edits if not partial or acts_in(prompt, edit.site.mark)))
                for prompt in prompts]

    def text_rows(self, texts: Iterable[Prompt]) -> list[Row]:
        """Running texts under this treatment: what acts on generated tokens acts on all of a text's, as if the model had written it.

        Edits at the last token of a prompt (mark `last`) act with those at `generated`, once.
        """
        moved: dict[tuple[Site, How, float, int, int | None], Edit] = {}
        for edit in self.edits:
            site = replace(edit.site, mark=PROMPT, tokens="all", occurrence=None) if edit.site.mark in EVERYWHERE else edit.site
            end = None if edit.as_far_as is None else edit.as_far_as.data_ptr()
            moved.setdefault((site, edit.how, edit.strength, edit.vector.data_ptr(), end), replace(edit, site=site))
        return replace(self, edits=tuple(moved.values())).rows(texts, partial=True)


def acts_in(prompt: Prompt, mark: str) -> bool:
    """Whether a prompt has a mark: its own, or one that every prompt has."""
    return mark in EVERYWHERE or bool(prompt.marks.get(mark))


Sites = Annotated[Site | Sequence[Site], Listed(once=False, alone=True)]    # one or many, as the next two
Rows = Annotated[Row | Prompt | str | Sequence[Row | Prompt | str], Listed(once=False, alone=True)]
Treatments = Annotated[Treatment | Sequence[Treatment], Listed(some=True, once=False, alone=True)]
UNTREATED = Treatment("untreated")
"""The treatment that changes nothing: what every other one is compared with."""


def check_treatments(treatments: Sequence[Treatment]) -> None:
    """Whether several treatments can be told apart in one table. Errors: EditError for none, and for two of one name."""
    names = [treatment.name for treatment in treatments]
    if not names:
        raise EditError("no treatment was given: there is nothing to ask under; UNTREATED is the one that changes nothing.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EditError(f"two treatments have the name {shown(twice)}: their rows could not be told apart; give each a name of its own.")


def combine(*treatments: Treatment, name: str = "") -> Treatment:
    """Several treatments at once: edits in their order, prefixes one after the other, the adapter of the one that has one.

    Errors: EditError for two adapters (merge them first, or choose one).
    """
    adapters = [treatment.adapter for treatment in treatments if treatment.adapter is not None]
    if len(adapters) > 1:
        raise EditError(f"two adapters cannot be on at once ({', '.join(adapters)}): combine one of them with edits and prefixes.")
    parts = [treatment for treatment in treatments if treatment.family != UNTREATED.family]
    return Treatment(name or "+".join(treatment.name for treatment in parts) or UNTREATED.name,
                     tuple(edit for treatment in parts for edit in treatment.edits), next(iter(adapters), None),
                     "".join(treatment.prefix for treatment in parts), "combined" if len(parts) > 1 else
                     parts[0].family if parts else UNTREATED.family, {"parts": " + ".join(treatment.name for treatment in parts)})


def adapter_name(folder: Path | str) -> str:
    """The name under which an adapter folder is loaded: the folder's own name."""
    return Path(folder).name


def random_like(activation: Float[Tensor, "*at size"], name: str) -> Float[Tensor, "*at size"]:
    """Random directions of an activation's norms: the control of a patch. `name` is the seed; the same name gives the same directions."""
    generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
    drawn = torch.randn(activation.shape, generator=generator)
    return drawn * (activation.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


def apply(resid: Float[Tensor, "*at size"], vector: Float[Tensor, "*at size"], how: How, strength: Float[Tensor, "*at 1"],
          as_far_as: Float[Tensor, "*at size"] | None = None) -> Float[Tensor, "*at size"]:
    """The edited activations: replace -> v; add -> x + s v, or x + s |e - x| v/|v| as far as e; ablate -> x - s (x . v/|v|) v/|v|."""
    if how == "replace":
        return vector
    if as_far_as is not None:
        vector = vector * (as_far_as - resid).norm(dim=-1, keepdim=True) / vector.norm(dim=-1, keepdim=True)
    if how == "add":
        return resid + strength * vector
    unit = vector / vector.norm(dim=-1, keepdim=True)
    return resid - strength * (resid * unit).sum(-1, keepdim=True) * unit
