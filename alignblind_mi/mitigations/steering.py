"""Steering: vectors found on a model, and the treatments that replace, add or ablate them at identifiers, prompts or generated tokens.

Sources: "Aligned but Blind", activation engineering (token replacement: the residual at the identifiers of "Race: black and white" replaces
that of the bias prompt); Marks and Tegmark 2024 (difference of means, probe direction); Zou et al. 2023 (first principal component of
paired differences); Rimsky et al. 2024 (contrastive activation addition); Arditi et al. 2024 (directional ablation). Vectors are files: see
`save` and `export_gguf`. This module does NOT know what steering changes.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.reading import check_file, foreign, is_file, said
from alignblind_mi.borders.settings import AnyLayers, Count, File, Layer, Layers, Listed, Places, Seed, Strength, Strengths, many, takes
from alignblind_mi.borders.texts import html_summary, named_line
from alignblind_mi.borders.writing import refuse_taken, write_bytes
from alignblind_mi.mitigations.directions import ROLES, contrasted, direction
from alignblind_mi.models.edits import EVERYWHERE, Edit, EditError, How, Row, Site, Stream, Treatment, random_like
from alignblind_mi.models.model import HookedModel
from alignblind_mi.results import versions
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.prompts import steering_prompt
from alignblind_mi.stimuli.protocol import PROTOCOLS, ProtocolName

Method = Literal["replacement", "mean_difference", "pca", "probe", "contrast", "noise"]
Windows = Annotated[Sequence[Annotated[Sequence[Layer], Listed(some=True)]], Listed(some=True)]
Positions = Literal["identifiers", "prompt", "last", "generated"]
WINDOW_SHARE = 10 / 32    # the paper's window: 10 consecutive layers of Llama 3 8B's 32
AFTER_PROMPT: tuple[str, ...] = ("last", "generated")
SHARED = ("",)
VECTORS = 4 << 30    # bytes of the largest file of vectors that is read
GGUF_MARK = b"alignblind_mi.method"    # a key of the header of control vectors that were written here


def window_size(n_layers: int, share: float = WINDOW_SHARE) -> int:
    """Layers per window: the paper's share of the model's depth, at least one."""
    return max(1, int(share * n_layers + 0.5))


@takes(EditError)
def layer_windows(n_layers: int, size: Count | None = None) -> list[range]:
    """All windows of `size` consecutive layers (default: the paper's share of depth), from the first layer to the last."""
    width = size or window_size(n_layers)
    if width > n_layers:
        raise EditError(f"a window of {width} layers does not fit a model of {n_layers} layers.")
    return [range(start, start + width) for start in range(n_layers - width + 1)]


def steerable(cue: Cue) -> bool:
    """Whether a cue has one pair of identifiers: replacing one name by another would change who is asked about, not the sense."""
    return len(cue.marked) == 1 and len(cue.unmarked) == 1


def can_steer(concept: Concept, cue: str) -> bool:
    """Whether a study steers: the cue has the concept's senses, and one pair of identifiers."""
    return concept.has_senses(cue) and steerable(concept.cue(cue))


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """One vector a layer (and, for `replacement`, a role) that stands for a sense, and where it came from.

    vectors: [layer, role, d_model], in the units of the stream; `roles` are `marked` and `unmarked`, or one empty name where all places
    share a vector. `provenance`: model, revision, stream, method, sense, the prompts that it was made from, versions.
    """

    layers: tuple[int, ...]
    roles: tuple[str, ...]
    vectors: Float[Tensor, "layer role d_model"]
    method: Method
    sense: str
    stream: Stream = "resid_post"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        source = f", found on {self._source}" if self._source else ""
        return named_line(self, f"{self.sense!r} by {self.method}, layers {_span(self.layers)} of {self.stream}, "
                                f"{self.vectors.shape[-1]} wide{source}")

    @property
    def _source(self) -> str:
        """The model that the vectors come from, and its revision."""
        return "@".join(str(self.provenance[name]) for name in ("model", "revision") if name in self.provenance)

    def _repr_html_(self) -> str:
        """What a notebook shows: where the vectors come from, and their norms by layer."""
        about = {name: self.provenance[name] for name in ("model", "revision", "concept", "cue", "phrase", "seed", "treatment")
                 if name in self.provenance}
        norms = [{"layer": layer, **{f"norm {role}".strip(): float(self._at(layer, role).norm()) for role in self.roles}}
                 for layer in self.layers]
        return html_summary(f"Steering vectors: {self.sense}", {"method": self.method, "stream": self.stream, **about}, norms)

    @takes(EditError)
    def treatment(self, layers: AnyLayers | None = None, *, how: How | None = None, strength: Strength = 1.0,
                  positions: Places | None = None, name: str = "", family: str = "steering", protocol: ProtocolName = "best"
                  ) -> Treatment:
        """Apply the vectors after each of `layers` (default: all that there are).

        `how`: `replace` (the default for `replacement`), `add` times `strength`, or `ablate` their direction (`strength` 1 removes it).
        `positions`: `identifiers` (the default, all mentions), `prompt` (every token), `last` (of the prompt), `generated` (what follows);
        the default for `contrast` is the last token and what follows, as in its source. `protocol` "paper" replaces at the tokens of a
        prompt that are the phrase's own (see `stimuli/protocol.py`).

        Errors: EditError for a layer without a vector, or a combination that means nothing.
        """
        layers = self.layers if layers is None else many(layers)
        how = how or ("replace" if self.replaces else "add")
        positions = many(positions or (AFTER_PROMPT if self.method == "contrast" else ("identifiers",)))
        self._check(layers, how, positions)
        ids = self._own_ids(protocol)
        sites = [(layer, mark, role) for layer in layers for mark, role in self._marks(positions)]
        edits = tuple(Edit(Site(layer, mark, self.stream, tokens="all" if mark in EVERYWHERE else "last", ids=ids.get(role, ())),
                           self._at(layer, role), how, float(strength)) for layer, mark, role in sites)
        span = _span(layers)
        amount = "" if how == "replace" else f"_{how}" if how == "ablate" and strength == 1 else f"_{how}{strength:g}"
        where = "" if positions == ("identifiers",) else f"_{'+'.join(positions)}"
        kind = "" if self.method == "replacement" else f"_{self.method}"
        return Treatment(name or f"steer_{self.sense}{kind}{amount}{where}_{span}", edits, family=family,
                         details={"sense": self.sense, "layers": span, "method": self.method, "how": how, "strength": f"{strength:g}",
                                  "positions": "+".join(positions), "phrase": str(self.provenance.get("phrase", "")),
                                  **({"protocol": protocol} if self.replaces else {})})

    @property
    def replaces(self) -> bool:
        """Whether the vectors are whole activations (to put in place of others) and no directions."""
        return self.roles != SHARED

    def _own_ids(self, protocol: ProtocolName) -> Mapping[str, tuple[int, ...]]:
        """By role, the token that its activation was recorded at, where a protocol edits that token alone."""
        if not PROTOCOLS[protocol].same_token:
            return {}
        if not self.replaces or "tokens" not in self.provenance:
            lack = "do not say at which these were: find them anew" if self.replaces else "are directions: use the protocol 'best'"
            raise EditError(f"the protocol {protocol!r} replaces at the tokens that activations were recorded at; these vectors {lack}.")
        return {role: tuple(found) for role, found in self.provenance["tokens"].items()}

    def _check(self, layers: Sequence[int], how: How, positions: Sequence[str]) -> None:
        missing = [layer for layer in layers if layer not in self.layers]
        if missing or not layers:
            raise EditError(f"these vectors are of the layers {_span(self.layers)}, not {missing[0] if missing else 'none'}.")
        unknown = [name for name in positions if name not in get_args(Positions)]
        if unknown:
            raise EditError(f"unknown positions {unknown[0]!r}. Known: {', '.join(get_args(Positions))}.")
        if "prompt" in positions and {"identifiers", "last"} & set(positions):
            raise EditError("the whole prompt holds its identifiers and its last token: named as well, they would be edited twice.")
        if (how == "replace") != self.replaces:
            raise EditError(f"vectors of the method {self.method} are {'activations: replace by them' if self.replaces else 'directions'}"
                            f"{'' if self.replaces else ': add or ablate them'}, do not {how}.")
        if self.replaces and tuple(positions) != ("identifiers",):
            raise EditError("activations of identifiers can only replace identifiers: positions=('identifiers',).")

    def _marks(self, positions: Sequence[str]) -> list[tuple[str, str]]:
        """(mark, role of the vector there)."""
        marks = [(role, role if self.replaces else "") for role in ROLES] if "identifiers" in positions else []
        return marks + [(name, "") for name in positions if name != "identifiers"]

    def _at(self, layer: int, role: str) -> Float[Tensor, " d_model"]:
        return self.vectors[self.layers.index(layer), self.roles.index(role)]

    # ---- files -----------------------------------------------------------------------------------------------------

    @takes(EditError)
    def save(self, path: File) -> None:
        """Write a .safetensors file: tensors `layer.L` [d_model] (or `layer.L.marked`, `layer.L.unmarked`), provenance as its metadata.

        Without this project: `v = load_file(path)["layer.3"]`, then a forward hook on `model.model.layers[3]` that returns its output + v.

        Steering vectors that are there are replaced. Errors: EditError for a file of anything else.
        """
        from safetensors.torch import save

        path = Path(path)
        refuse_taken(path, mine=is_vectors, kind=EditError)
        tensors = {".".join(["layer", str(layer), *([role] if role else [])]): self._at(layer, role).contiguous().clone()
                   for layer in self.layers for role in self.roles}
        note = {**self.provenance, "method": self.method, "sense": self.sense, "stream": self.stream}
        data = save(tensors, {name: json.dumps(value) for name, value in note.items()})
        write_bytes(path, data)

    @takes(EditError)
    def export_gguf(self, path: File, *, strength: Strength = 1.0) -> None:
        """Write llama.cpp's control-vector format (needs `pip install 'alignblind-mi[gguf]'`): `direction.L`, added after layer L.

        llama.cpp adds a vector to every token and takes none at layer 0, which is left out. A control vector that was written here is
        replaced. Errors: EditError for vectors that replace, are not of `resid_post`, or have no layer above 0; or a file of anything else.
        """
        check_gguf(path, self.method, self.stream, self.layers)
        from gguf import GGUFWriter

        layers = [layer for layer in self.layers if layer > 0]
        with TemporaryDirectory() as scratch:
            draft = Path(scratch) / "vectors.gguf"
            writer = GGUFWriter(draft, "controlvector")
            writer.add_string("controlvector.model_hint", str(self.provenance.get("architecture", "llama")))
            writer.add_uint32("controlvector.layer_count", len(layers))
            writer.add_string(GGUF_MARK.decode(), self.method)
            for layer in layers:
                writer.add_tensor(f"direction.{layer}", np.asarray((strength * self._at(layer, "")).numpy(), dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            write_bytes(Path(path), draft.read_bytes())


def check_gguf(path: Path | str, method: str, stream: str, layers: Sequence[int]) -> None:
    """Whether a control vector could be written there, found out before any is. Errors: EditError as `SteeringVectors.export_gguf`."""
    if importlib.util.find_spec("gguf") is None:
        raise EditError("writing GGUF needs the package gguf: pip install 'alignblind-mi[gguf]'.")
    if method == "replacement" or stream != "resid_post" or not any(layer > 0 for layer in layers):
        raise EditError(f"llama.cpp adds one direction after a layer above 0; these are {method} vectors at {stream} of the layers "
                        f"{_span(layers)}.")
    refuse_taken(Path(path), mine=_is_our_gguf, kind=EditError)


def _is_our_gguf(path: Path) -> bool:
    """Whether a file is a control vector that was written here: its header bears our mark."""
    if not is_file(path):
        return False
    with path.open("rb") as file:
        head = file.read(1 << 16)
    return head.startswith(b"GGUF") and GGUF_MARK in head


def is_vectors(path: Path) -> bool:
    """Whether a file is one of steering vectors."""
    try:
        load_vectors(path)
    except EditError:
        return False
    return True


@takes(EditError)
def load_vectors(path: File) -> SteeringVectors:
    """Read what `SteeringVectors.save` wrote. Errors: EditError for a file that it did not write."""
    from safetensors import safe_open

    check_file(path, "", EditError, limit=VECTORS, advice="give a file that `alignblind steer --save` wrote")
    with foreign(f"{path} is no file of steering vectors", EditError), safe_open(str(path), "pt") as file:
        note = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}    # noqa: SIM118 - no mapping
    try:
        parsed = {name: json.loads(value) for name, value in note.items()}
        method, sense, stream = (parsed.pop(name) for name in ("method", "sense", "stream"))
        places = [(int(name.split(".")[1]), (*name.split("."), "")[2]) for name in tensors]
    except (KeyError, IndexError, ValueError, RecursionError) as error:
        raise EditError(f"{path} is no file of steering vectors: {said(error)}.") from error
    layers = tuple(sorted({layer for layer, _ in places}))
    roles = SHARED if {role for _, role in places} == {""} else ROLES
    shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors.values()}
    whole = {".".join(["layer", str(layer), *([role] if role else [])]) for layer in layers for role in roles} == set(tensors)
    if not whole or len(shapes) != 1 or not all(tensor.ndim == 1 and tensor.isfinite().all() for tensor in tensors.values()):
        raise EditError(f"{path} is no file of steering vectors: its tensors are not one finite vector of one length for each layer.")
    stacked = torch.stack([torch.stack([tensors[".".join(["layer", str(layer), *([role] if role else [])])] for role in roles])
                           for layer in layers])
    return SteeringVectors(layers, roles, stacked, method, sense, stream, parsed)


def _span(layers: Sequence[int]) -> str:
    """Layers in words: first-last where none between is left out, else a list."""
    if not layers:
        return "none"
    together = sorted(layers) == list(range(min(layers), max(layers) + 1))
    if len(layers) == 1:
        return str(layers[0])
    return f"{min(layers)}-{max(layers)}" if together else ",".join(map(str, layers))


# ---- finding vectors ---------------------------------------------------------------------------------------------------


@takes(EditError)
def steering_vectors(model: HookedModel, concept: Concept, cue: str | Cue, sense: str, method: Method | str = "mean_difference", *,
                     layers: Layers | None = None, stream: Stream = "resid_post", seed: Seed = 0) -> SteeringVectors:
    """Find the vectors of a sense at `layers` (default: all) of a model under its treatment.

    `replacement`: the identifiers' activations in the phrase of `sense` (or of a control). All others are directions from the other sense
    to `sense`: `mean_difference` of the identifiers' activations in the concept's `train` contexts; `pca`, the first principal component
    of the paired differences, as long as the mean difference along it; `probe`, the probe's direction (`train_probes`), as long as it takes
    from one class mean to the other; `contrast`, the mean difference at the last token of the awareness sentences with restatements of
    either sense; `noise`, a random direction as long as the mean difference, drawn from `seed`.

    Errors: EditError for an unknown method, a cue with several identifiers or a layer that does not exist; ConceptError for a sense that
    the concept does not have, or has no sentences for.
    """
    cue = concept.cue(cue) if isinstance(cue, str) else cue
    concept.both_senses(cue)
    if method not in get_args(Method):
        raise EditError(f"unknown method {method!r}. Known: {', '.join(get_args(Method))}.")
    if not steerable(cue):
        raise EditError(f"the cue {cue.name!r} draws from several identifiers: replacing one by another would change who is asked about. "
                        "Steer a cue with one pair of identifiers.")
    layers = tuple(range(model.n_layers)) if layers is None else many(layers)
    note = {**model.provenance(), "architecture": model.architecture, "concept": concept.name, "concept_digest": concept.digest,
            "cue": cue.name, "versions": versions()}
    if method == "replacement":
        phrase = steering_prompt(concept, cue, sense)
        sites = [Site(layer, mark, stream) for layer in layers for mark in ROLES]
        found = model.record([Row(phrase)], sites)[0].view(len(layers), len(ROLES), -1)
        encoded = model.encode([phrase])[0]
        own = {role: [encoded.ids[at] for at in encoded.positions(role)] for role in ROLES}
        return SteeringVectors(layers, ROLES, found, "replacement", sense, stream, {**note, "phrase": phrase.text, "tokens": own})
    towards, away, prompts = contrasted(model, concept, cue, sense, method, layers, stream)
    vectors = direction(method, towards, away)
    if method == "noise":
        vectors = torch.stack([random_like(vector, f"{seed}|{layer}") for layer, vector in zip(layers, vectors, strict=True)])
        note |= {"seed": str(seed)}
    return SteeringVectors(layers, SHARED, vectors[:, None], method, sense, stream, {**note, "prompts": prompts})    # type: ignore[arg-type]


# ---- treatments --------------------------------------------------------------------------------------------------------


@takes(EditError)
def sense_steering(model: HookedModel, concept: Concept, cue: str | Cue, sense: str, layers: Layers, *,
                   stream: Stream = "resid_post", protocol: ProtocolName = "best") -> Treatment:
    """The paper's treatment: the identifiers' stream, after each of `layers`, is replaced by that in the phrase of `sense`.

    `sense` is a sense or a control of the concept; `stream` may be another place in those layers (see `Site`). `protocol` "best" edits all
    mentions of the identifiers, "paper" the tokens that are exactly the phrase's, as the released script does.

    Errors: as `steering_vectors`.
    """
    vectors = steering_vectors(model, concept, cue, sense, "replacement", layers=layers, stream=stream)
    made = vectors.treatment(family="steering" if sense == concept.group_sense else "placebo", protocol=protocol)
    return made if made.family == "steering" else replace(made, details={**made.details, "placebo": "phrase"})


@takes(EditError)
def steering_grid(vectors: SteeringVectors, windows: Windows, strengths: Strengths = (1.0,), *,
                  how: How | None = None, positions: Places | None = None, protocol: ProtocolName = "best") -> Iterator[Treatment]:
    """Every window at every strength. Measured together (`ask_under`), they share what the model computes before their first edit."""
    for window in windows:
        for strength in many(strengths):
            yield vectors.treatment(window, how=how, strength=strength, positions=positions, protocol=protocol)
