"""The independent oracle: plain transformers, one row at a time, no padding, no shared work; edits by hand on the layers' parts."""

import contextlib
from pathlib import Path
from types import MethodType

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.models.edits import Edit, Row
from alignblind_mi.stimuli.prompts import Prompt


def changed(x: torch.Tensor, edit: Edit) -> torch.Tensor:
    """One vector after one edit, in its own words."""
    v = edit.vector
    if edit.how == "replace":
        return v
    return x + edit.strength * v if edit.how == "add" else x - edit.strength * (x @ v) * v / (v @ v)


class Oracle:
    """A checkpoint (perhaps with one adapter merged in by PEFT's own forward) that runs rows one by one."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if adapter is not None:
            from peft import PeftModel
            self.model = PeftModel.from_pretrained(self.model, adapter).eval()

    def layers(self):
        return next(m for n, m in self.model.named_modules() if n.endswith("layers"))

    @contextlib.contextmanager
    def edited(self, row: Row, columns: dict[tuple, list[int]]):
        """Every layer runs as x + attention(norm(x)), then + mlp(norm(.)), with the row's edits at the prompt's columns in between.

        Heads and neurons are edited by hooks of their own, before the projection that mixes them.
        """
        before = [0]    # how many columns the cache holds

        def here(edit: Edit, n: int) -> list[int]:
            """Which of `n` new columns an edit is at."""
            return [column - before[0] for column in columns[site_key(edit)] if 0 <= column - before[0] < n]

        def place(layer: int, stream: str, value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            for edit in row.edits:
                where = (layer, stream) if stream != "resid_post" else (layer + 1, "resid_pre")
                at = (edit.site.layer, edit.site.stream) if edit.site.stream != "resid_post" else (edit.site.layer + 1, "resid_pre")
                for column in here(edit, value.shape[1]) if at == where else ():
                    value[0, column] = changed(value[0, column].clone(), edit)
            return value

        def forward(layer, index):
            def run(self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, **kwargs):
                before[0] = 0 if past_key_values is None else past_key_values.get_seq_length(index)
                x = place(0, "resid_pre", hidden_states) if index == 0 else hidden_states
                out, _ = layer.self_attn(layer.input_layernorm(x), attention_mask=attention_mask, position_embeddings=position_embeddings,
                                         past_key_values=past_key_values)
                x = place(index, "resid_mid", x + place(index, "attn_out", out))
                x = x + place(index, "mlp_out", layer.mlp(layer.post_attention_layernorm(x)))
                return place(index, "resid_post", x)
            return run

        def mixing(edit):
            def before(module, args):
                x = args[0].clone()
                units = x.view(*x.shape[:2], self.units(edit.site.stream), -1)
                chosen = list(edit.site.units) or list(range(units.shape[2]))
                for column in here(edit, x.shape[1]):
                    units[0, column, chosen] = changed(units[0, column, chosen].flatten(), edit).view(len(chosen), -1)
                return (x, *args[1:])

            return before

        layers = self.layers()
        hooks = [{"z": layers[e.site.layer].self_attn.o_proj, "post": layers[e.site.layer].mlp.down_proj}[e.site.stream]
                 .register_forward_pre_hook(mixing(e)) for e in row.edits if e.site.stream in ("z", "post")]
        originals = [layer.forward for layer in layers]
        for index, layer in enumerate(layers):
            layer.forward = MethodType(forward(layer, index), layer)
        try:
            yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.forward = original
            for hook in hooks:
                hook.remove()

    def units(self, stream: str) -> int:
        return {"z": self.model.config.num_attention_heads, "post": self.model.config.intermediate_size}[stream]

    def ids(self, prompt: Prompt) -> torch.Tensor:
        special = not prompt.text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(prompt.text, return_tensors="pt", add_special_tokens=special).input_ids

    def columns(self, row: Row) -> dict[tuple, list[int]]:
        """Tokens of every edit's site, found by going through the offsets one by one."""
        special = not row.prompt.text.startswith(self.tokenizer.bos_token)
        offsets = self.tokenizer(row.prompt.text, return_offsets_mapping=True, add_special_tokens=special)["offset_mapping"]
        found, n = {}, len(offsets)
        text = [i for i, (a, b) in enumerate(offsets) if b > a]
        everywhere = {"prompt": text, "last": text[-1:], "generated": range(n, n + 100)}
        for edit in row.edits:
            if edit.site.mark in everywhere:
                found[site_key(edit)] = everywhere[edit.site.mark]
                continue
            spans = row.prompt.marks[edit.site.mark]
            spans = spans if edit.site.occurrence is None else [spans[edit.site.occurrence]]
            every = [[i for i, (a, b) in enumerate(offsets) if a < span.end and b > span.start] for span in spans]
            found[site_key(edit)] = [i for tokens in every for i in (tokens if edit.site.tokens == "all" else tokens[-1:])]
        return found

    @torch.no_grad()
    def next_log_probs(self, row: Row) -> torch.Tensor:
        with self.edited(row, self.columns(row)):
            return self.model(self.ids(row.prompt), use_cache=False).logits[0, -1].log_softmax(-1)

    def greedy(self, row: Row, n: int, stop: set[int], *, cached: bool = True) -> list[int]:
        """Greedy tokens, with a key-value cache or by reading everything again at every step."""
        return self.answer(row, n, stop, cached=cached)[1]

    @torch.no_grad()
    def answer(self, row: Row, n: int, stop: set[int], *, cached: bool = True) -> tuple[torch.Tensor, list[int]]:
        """Log-probabilities of the next token, and greedy tokens, with a key-value cache or by reading everything again at every step."""
        ids, made = self.ids(row.prompt), []
        with self.edited(row, self.columns(row)):
            out = self.model(ids, use_cache=cached)
            log_probs = out.logits[0, -1].log_softmax(-1)
            for _ in range(n):
                made.append(int(out.logits[0, -1].argmax()))
                if made[-1] in stop:
                    break
                if cached:
                    out = self.model(torch.tensor([[made[-1]]]), past_key_values=out.past_key_values, use_cache=True)
                else:
                    out = self.model(torch.cat([ids, torch.tensor([made])], 1), use_cache=False)
        return log_probs, made

    @torch.no_grad()
    def log_prob_of(self, row: Row, continuation: str) -> float:
        """Log-probability of a continuation by teacher forcing."""
        ids = self.ids(row.prompt)
        more = self.tokenizer(continuation, add_special_tokens=False).input_ids
        with self.edited(row, self.columns(row)):
            log_probs = self.model(torch.cat([ids, torch.tensor([more])], 1), use_cache=False).logits[0].log_softmax(-1)
        return float(sum(log_probs[ids.shape[1] - 1 + i, token] for i, token in enumerate(more)))


def site_key(edit: Edit) -> tuple:
    """What the tokens of a site depend on."""
    return (edit.site.mark, edit.site.tokens, edit.site.occurrence)
