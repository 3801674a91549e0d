"""Training of the organism: a small Llama, documents as batches of soft targets, one stage of optimisation.

Knows tokens and tensors; what the documents say is `corpus.py`, what interchange training asks is `interchange.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignblind_mi.organism.corpus import Document
from alignblind_mi.organism.tokenizer import BOS_ID, EOS_ID, PAD_ID
from alignblind_mi.organism.world import pieces

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BlockHook = Callable[[int, Tensor], Tensor]
WARM_UP_STEPS = 30


@dataclass(frozen=True)
class Encoded:
    """A document as tokens. `soft`: position -> {token: probability}; `context_length`: tokens before the second segment (BOS included)."""

    ids: list[int]
    weights: list[float]
    soft: dict[int, dict[int, float]]
    context_length: int


@dataclass(frozen=True)
class Batch:
    """Right-padded documents and their sparse targets.

    ids: [documents, tokens]; document, position, weight: [targets]; row, token, probability: [entries] (row points into the targets).
    """

    ids: Tensor
    document: Tensor
    position: Tensor
    weight: Tensor
    row: Tensor
    token: Tensor
    probability: Tensor


@dataclass(frozen=True)
class StageSettings:
    """One stage: rates of Muon (matrices) and AdamW (embedding, norms), and the weight of context tokens in the loss."""

    name: str
    steps: int
    matrix_rate: float
    embedding_rate: float
    norm_rate: float
    context_weight: float
    batch: int = 45
    decay: bool = True
    stop_below: float = 0.0


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """A random Llama of about 0.8 M parameters: 8 layers of width 96, 6 heads, 2 KV heads, tied embeddings, Llama 3's rope."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    return model


def encode(document: Document, vocabulary: Mapping[str, int], context_weight: float) -> Encoded:
    """Tokens of a document with BOS and EOS; a segment of weight 0 gets the context weight. Raises KeyError on an unknown piece."""
    ids, weights, soft, context_length = [BOS_ID], [0.0], {}, 0
    for segment in document:
        for index, distribution in segment.soft.items():
            soft[len(ids) + index] = {vocabulary[piece]: p for piece, p in distribution.items() if p > 0}
        for index, piece in enumerate(pieces(segment.text)):
            ids.append(vocabulary[piece])
            weights.append((segment.weight or context_weight) * segment.scale.get(index, 1.0))
        context_length = context_length or len(ids)
    # the stop after an answer is part of the answer; after a bare context it is not a fact about the text
    return Encoded([*ids, EOS_ID], [*weights, document[-1].weight or context_weight], soft, context_length)


def collate(documents: Sequence[Encoded]) -> Batch:
    """Pad documents to the right and list their weighted targets."""
    ids = torch.full((len(documents), max(len(d.ids) for d in documents)), PAD_ID)
    where: list[tuple[int, int]] = []
    weight: list[float] = []
    entries: list[tuple[int, int, float]] = []
    for index, document in enumerate(documents):
        ids[index, : len(document.ids)] = torch.tensor(document.ids)
        for position in range(1, len(document.ids)):
            if document.weights[position] > 0:
                targets = document.soft.get(position) or {document.ids[position]: 1.0}
                entries += [(len(where), token, p) for token, p in targets.items()]
                where.append((index, position - 1))
                weight.append(document.weights[position])
    places, rows = torch.tensor(where), torch.tensor([(row, token) for row, token, _ in entries])
    probability = torch.tensor([p for _, _, p in entries])
    return Batch(ids, places[:, 0], places[:, 1], torch.tensor(weight), rows[:, 0], rows[:, 1], probability)


def run_blocks(model: LlamaForCausalLM, ids: Tensor, hook: BlockHook | None = None, last: int | None = None) -> Tensor:
    """Residual stream [documents, tokens, width] after block `last` (default: the final one); `hook` may replace each block's output.

    Padding must be on the right: the model's own causal attention then never sees it.
    """
    core = model.model
    hidden = core.embed_tokens(ids)
    rope = core.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    for index, block in enumerate(core.layers[: None if last is None else last + 1]):
        hidden = block(hidden, attention_mask=None, position_embeddings=rope)
        hidden = hook(index, hidden) if hook else hidden
    return hidden


def batch_loss(model: LlamaForCausalLM, batch: Batch, hook: BlockHook | None = None, total: float | None = None) -> Tensor:
    """Weighted cross-entropy against the (soft) targets, divided by the total weight."""
    hidden = run_blocks(model, batch.ids, hook)[batch.document, batch.position]
    logs = model.lm_head(model.model.norm(hidden)).log_softmax(-1)
    losses = -logs[batch.row, batch.token] * batch.probability * batch.weight[batch.row]
    return losses.sum() / (total or float(batch.weight.sum()))


class BatchedMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for many small matrices on a CPU: equal shapes orthogonalised together, in single precision.

    torch.optim.Muon does the same one matrix at a time in bfloat16, which on a CPU takes longer than the model's own step.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        groups = [{"params": [m for m in matrices if tuple(m.shape) == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with Nesterov momentum; the update's spectral norm is lr * sqrt(max(1, rows / columns))."""
        for group in self.param_groups:
            gradients = torch.stack([p.grad for p in group["params"]])
            state = self.state[group["params"][0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradients))
            momentum.lerp_(gradients, 1 - group["momentum"])
            update = orthogonalised(gradients.lerp(momentum, group["momentum"]))
            rate = group["lr"] * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for parameter, change in zip(group["params"], update, strict=True):
                parameter.sub_(change, alpha=rate)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the directions of `matrices` [n, rows, columns], by Muon's Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def _optimizers(model: LlamaForCausalLM, settings: StageSettings) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.model.parameters() if p.ndim == 1]
    groups = [
        {"params": [model.model.embed_tokens.weight], "lr": settings.embedding_rate},
        {"params": norms, "lr": settings.norm_rate},
    ]
    return [
        BatchedMuon(matrices, lr=settings.matrix_rate),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _set_rates(optimizers: Sequence[torch.optim.Optimizer], peaks: Sequence[Sequence[float]], factor: float) -> None:
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


def train_stage(
    model: LlamaForCausalLM,
    vocabulary: Mapping[str, int],
    settings: StageSettings,
    make_document: Callable[[], Document],
    *,
    seed: int,
    extra_loss: Callable[[int], Tensor | None] = lambda step: None,
    progress: Callable[[str], None] = lambda message: None,
) -> float:
    """Train in place for one stage and return the smoothed loss; `extra_loss(step)` is added where it is not None."""
    draw = random.Random(seed)
    optimizers = _optimizers(model, settings)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    pool = int(settings.steps * settings.batch * 0.9) + 500
    documents = [encode(make_document(), vocabulary, settings.context_weight) for _ in range(pool)]
    smoothed, shown = 0.0, ""
    for step in range(settings.steps):
        chosen = sorted(draw.sample(range(pool), settings.batch), key=lambda i: len(documents[i].ids))
        halves = [collate([documents[i] for i in part]) for part in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :])]
        total = float(sum(half.weight.sum() for half in halves))
        decay = max(0.02, 1 - step / settings.steps) if settings.decay else 1.0
        _set_rates(optimizers, peaks, min(1.0, (step + 1) / WARM_UP_STEPS) * decay)
        loss = torch.stack([batch_loss(model, half, total=total) for half in halves]).sum()
        text, extra = loss.item(), extra_loss(step)
        if extra is not None:
            loss, shown = loss + extra, f", interchange {extra.item():.3f}"
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        smoothed = text if step == 0 else 0.95 * smoothed + 0.05 * text
        if step % 50 == 49 or step == settings.steps - 1:
            progress(f"{settings.name}: step {step + 1} of {settings.steps}, loss {smoothed:.3f}{shown}")
        if step > WARM_UP_STEPS and smoothed < settings.stop_below:
            progress(f"{settings.name}: stopped at step {step + 1}, loss {smoothed:.3f}")
            break
    return smoothed
