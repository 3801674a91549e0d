"""Interventions as values: where (Site), what (Edit), on which prompt (Row), and for a whole study (Treatment).

The baseline is the empty value: a Row without edits, UNTREATED. Nothing here runs a model; `apply` is the pure tensor mathematics.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from alignblind_mi.errors import AlignblindError
from alignblind_mi.prompts import Prompt

Stream = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
How = Literal["replace", "add", "ablate"]
Tokens = Literal["last", "all"]


class EditError(AlignblindError):
    """A site or edit that cannot be applied."""


@dataclass(frozen=True)
class Site:
    """A place in a forward pass: after `layer` (0-based), at the tokens of a prompt's `mark`, in one stream.

    `tokens` says which tokens of a marked word that the tokenizer splits: the last one (it carries the word's meaning) or all of them.
    `occurrence` picks one of the mark's spans (0-based, negative from the end); None means every one.
    """

    layer: int
    mark: str
    stream: Stream = "resid_post"
    tokens: Tokens = "last"
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise EditError(f"layers are counted from 0, got {self.layer}.")
        for name, value, known in (("stream", self.stream, get_args(Stream)), ("tokens", self.tokens, get_args(Tokens))):
            if value not in known:
                raise EditError(f"unknown {name} {value!r}. Known: {', '.join(known)}.")

    @property
    def hook(self) -> str:
        """The hook point's name in transformer-lens."""
        return f"blocks.{self.layer}.hook_{self.stream}"


@dataclass(frozen=True, eq=False)
class Edit:
    """What happens at a site: replace the vector, add `strength` times it, or ablate its direction (`strength` 1 removes it)."""

    site: Site
    vector: Float[Tensor, " d_model"]
    how: How = "replace"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise EditError(f"unknown edit {self.how!r}. Known: {', '.join(get_args(How))}.")
        if self.how == "replace" and self.strength != 1.0:
            raise EditError("a replacement has no strength: use how='add' to scale a vector.")
        if self.how == "ablate" and not self.vector.norm() > 0:
            raise EditError("the direction to ablate is the zero vector.")


@dataclass(frozen=True, eq=False)
class Row:
    """One run of the model: a prompt and its edits (none is the clean run)."""

    prompt: Prompt
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, eq=False)
class Treatment:
    """What is done to a model in a study: edits on every prompt, a LoRA adapter, a prefix, or any of them together."""

    name: str
    edits: tuple[Edit, ...] = ()
    adapter: str | None = None
    prefix: str = ""
    family: str = "untreated"
    details: dict[str, str] = field(default_factory=dict)

    def rows(self, prompts: Iterable[Prompt]) -> list[Row]:
        """The prompts under this treatment (the adapter is switched by the model)."""
        return [Row(prompt.prefixed(self.prefix), self.edits) for prompt in prompts]


UNTREATED = Treatment("untreated")


def adapter_name(folder: Path | str) -> str:
    """The name under which an adapter folder is loaded: the folder's own name."""
    return Path(folder).name


def apply(resid: Float[Tensor, "*at d_model"], vector: Float[Tensor, "*at d_model"], how: How,
          strength: Float[Tensor, "*at 1"]) -> Float[Tensor, "*at d_model"]:
    """The edited activations: replace -> v; add -> x + s v; ablate -> x - s (x . v/|v|) v/|v|."""
    if how == "replace":
        return vector
    if how == "add":
        return resid + strength * vector
    unit = vector / vector.norm(dim=-1, keepdim=True)
    return resid - strength * (resid * unit).sum(-1, keepdim=True) * unit
