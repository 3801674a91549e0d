"""The six jobs: what we do through the public functions, what published code and other libraries' users do, and what it must cost."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignblind_mi import Edit, HookedModel, ModelSpec, Row, Site, load_model, patchscope_rows
from alignblind_mi.models.blocks import log_probs_of
from alignblind_mi.stimuli.prompts import Prompt
from benchmarks.memory import peak_bytes
from benchmarks.models import Size, question_prompts, text_prompt
from benchmarks.timing import Contest, close, same_tokens

NEW = 20
TARGET_LAYER = 2
PUBLISHED = "published way (bridge, one by one, no KV cache)"


class Bench:
    """One loaded size: our model, the plain transformers model, the bridge, and helpers that the rivals share."""

    def __init__(self, size: Size, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.size, self.folder = size, folder
        self.libraries: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Callable[[], Any] | None]] = {}
        loaded = load_model(ModelSpec(str(folder), dtype="float32", device="cpu", engine="fast"))
        self.ours: HookedModel = replace(loaded, stop_ids=frozenset())
        self.bridge = self.ours.bridge
        self.hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.hf.generation_config.eos_token_id = None
        self.layers = self.hf.model.layers

    def ids(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask."""
        found = [self.ours.tokenizer(p.text)["input_ids"] for p in prompts]
        width = max(map(len, found))
        return (torch.tensor([[0] * (width - len(i)) + i for i in found]),
                torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in found]))

    def tokens(self, texts: Sequence[Any]) -> list[list[int]]:
        """Generated texts as ids again (the tokenizer has one word a token; special tokens are left out of texts)."""
        return [[self.ours.tokenizer.convert_tokens_to_ids(w) for w in one.text.split()] for one in texts]

    def plain_tokens(self, ids: Tensor) -> list[list[int]]:
        """Ids of a tensor without the special ones, to be compared with texts."""
        special = set(self.ours.tokenizer.all_special_ids)
        return [[i for i in row if i not in special] for row in ids.tolist()]

    @contextmanager
    def hooks(self, edits: dict[int, Callable[[Tensor], None]], *, before: bool = False) -> Iterator[None]:
        """Hooks on the plain model's layers that edit prompts in place (not single tokens of decoding)."""
        handles = []
        for layer, act in edits.items():
            if before:
                def enter(module: Any, args: tuple[Any, ...], act: Callable[[Tensor], None] = act) -> Any:
                    if args[0].shape[1] > 1:
                        act(args[0])
                handles.append(self.layers[layer].register_forward_pre_hook(enter))
            else:
                def leave(module: Any, args: Any, output: Tensor, act: Callable[[Tensor], None] = act) -> Tensor:
                    if output.shape[1] > 1:
                        act(output)
                    return output
                handles.append(self.layers[layer].register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def generate(self, ids: Tensor, mask: Tensor, n: int = NEW) -> Tensor:
        """transformers' greedy generation."""
        return self.hf.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]

    def prefill(self, ids: Tensor, mask: Tensor) -> Callable[[], Any]:
        """One plain forward pass over prompts."""
        return lambda: self.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    def decoding(self, ids: Tensor, mask: Tensor, n: int = NEW) -> Callable[[], dict[str, Any]]:
        """n - 1 plain decode steps; the prefill before them is not timed."""
        import time

        def act() -> dict[str, Any]:
            past = self.hf(ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
            token, grown = ids[:, -1:], mask
            start = time.perf_counter()
            for _ in range(n - 1):
                grown = torch.cat([grown, torch.ones_like(grown[:, :1])], 1)
                token = self.hf(token, attention_mask=grown, past_key_values=past, use_cache=True).logits[:, -1:].argmax(-1)
            return {"timed": (time.perf_counter() - start, token)}

        return act


def steering(bench: Bench) -> Contest:
    """Windows x prompts: identifiers replaced in a window of layers, then 20 tokens (figure 4's sweep)."""
    size = bench.size
    prompts = []
    for k in range(size.prompts):
        d, at = 2 * k, {"marked": (20, 45), "unmarked": (18, 47)}
        marks = {name: [p + d for p in where] for name, where in at.items()}
        places = {p: "black" if name == "marked" else "white" for name, where in marks.items() for p in where}
        prompts.append(text_prompt(size, 60 + d, k, places, marks))
    generator = torch.Generator().manual_seed(3)
    vectors = {(layer, name): 2 * torch.randn(size.width, generator=generator) for layer in range(size.layers) for name in
               ("marked", "unmarked")}
    windows = [range(start, start + size.window) for start in size.starts]
    rows = [Row(p, tuple(Edit(Site(layer, name), vectors[layer, name]) for layer in w for name in ("marked", "unmarked")))
            for w in windows for p in prompts]
    ids, mask = bench.ids([row.prompt for row in rows])
    single = [bench.ids([row.prompt])[0] for row in rows]

    def where(row: Row, shift: int) -> dict[int, list[tuple[int, Tensor]]]:
        columns = {name: [row.prompt.text[: span.start].count(" ") + 1 + shift for span in row.prompt.spans(name)]
                   for name in ("marked", "unmarked")}
        found: dict[int, list[tuple[int, Tensor]]] = {}
        for edit in row.edits:
            found.setdefault(edit.site.layer, []).extend((column, edit.vector) for column in columns[edit.site.mark])
        return found

    timed_rows = list(range(0, len(rows), size.every))

    def published() -> list[list[int]]:
        out = []
        for i in timed_rows:
            hooks = []
            for layer, edits in where(rows[i], 0).items():
                def hook(value: Tensor, hook: Any, edits: Any = edits) -> Tensor:
                    for column, vector in edits:
                        value[0, column] = vector
                    return value
                hooks.append((f"blocks.{layer}.hook_out", hook))
            with bench.bridge.hooks(fwd_hooks=hooks):
                made = bench.bridge.generate(single[i], max_new_tokens=NEW, do_sample=False, stop_at_eos=False, verbose=False,
                                             use_past_kv_cache=False, return_type="tokens")
            out.append(made[0, -NEW:])
        return bench.plain_tokens(torch.stack(out))

    grouped: dict[int, tuple[list[int], list[int], list[Tensor]]] = {}
    for i, row in enumerate(rows):
        for layer, edits in where(row, ids.shape[1] - single[i].shape[1]).items():
            for column, vector in edits:
                r, c, v = grouped.setdefault(layer, ([], [], []))
                r.append(i), c.append(column), v.append(vector)
    stacked = {layer: (torch.tensor(r), torch.tensor(c), torch.stack(v)) for layer, (r, c, v) in grouped.items()}

    def batched() -> list[list[int]]:
        def edit(parts: Any) -> Callable[[Tensor], None]:
            return lambda value: value.__setitem__((parts[0], parts[1]), parts[2])

        with bench.hooks({layer: edit(parts) for layer, parts in stacked.items()}):
            return bench.plain_tokens(bench.generate(ids, mask))

    first = 18
    needed = sum(len(s[0]) * (max(size.starts) + 1) + (first + 2 * k) * (size.layers - max(size.starts) - 1)
                 for k, s in enumerate(single[: size.prompts]))
    needed += sum((single[i].shape[1] - first - 2 * (i % size.prompts)) * (size.layers - w[0] - 1)
                  for i, w in enumerate(w for w in windows for _ in prompts))
    share = needed / (ids.numel() * size.layers)
    return Contest(
        "steering", size.name, len(rows), lambda: bench.tokens(bench.ours.generate(rows, NEW)),
        {PUBLISHED: published, "Hugging Face batched": batched},
        lambda ours, theirs, rival: same_tokens([ours[i] for i in timed_rows] if rival == PUBLISHED else ours, theirs),
        {PUBLISHED: len(timed_rows) / len(rows)}, {"prefill": bench.prefill(ids, mask), "decode": bench.decoding(ids, mask)},
        lambda t: share * t["prefill"] + t["decode"])


def _question(size: Size, length: int, at: list[int]) -> Prompt:
    return text_prompt(size, length, 50, dict.fromkeys(at, "x"), {"placeholder": at})


def _sources(bench: Bench) -> Tensor:
    size = bench.size
    prompts = [text_prompt(size, 64, 60 + k, {}, {"here": [10 + k]}) for k in range(size.readings // (size.layers - 1) + 1)]
    resid = bench.ours.record([Row(p) for p in prompts], [Site(layer, "here") for layer in range(size.layers - 1)])
    return resid.flatten(0, 1)[: size.readings]


def patchscope(bench: Bench) -> Contest:
    """Recorded residuals into a placeholder of a short question; the next token's probabilities (the race-blind score)."""
    size, at = bench.size, 9
    question, vectors = _question(bench.size, 20, [9]), _sources(bench)
    rows, words = patchscope_rows(vectors, question, TARGET_LAYER), ["race", "color"]
    targets = [bench.ours.token_id(w) for w in words]
    ids = bench.ids([question])[0]
    many = ids.expand(len(rows), -1)

    def one_by_one() -> Tensor:
        out = []
        for vector in vectors[:: size.every]:
            def hook(value: Tensor, hook: Any, vector: Tensor = vector) -> Tensor:
                value[:, at] = vector
                return value
            logits = bench.bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{TARGET_LAYER}.hook_out", hook)])
            out.append(logits[:, -1].softmax(-1)[:, targets])
        return torch.cat(out)

    def batched() -> Tensor:
        with bench.hooks({TARGET_LAYER: lambda value: value[:, at].copy_(vectors)}):
            return bench.hf(many, use_cache=False, logits_to_keep=1).logits[:, -1].softmax(-1)[:, targets]

    needed = ids.shape[1] * (TARGET_LAYER + 1) + at * (size.layers - TARGET_LAYER - 1)
    needed += len(rows) * (ids.shape[1] - at) * (size.layers - TARGET_LAYER - 1)
    share = needed / (many.numel() * size.layers)
    name = "bridge, one by one"
    timed = len(vectors[:: size.every])
    job = {"layer": TARGET_LAYER, "position": at, "targets": targets}
    libraries = {f"{library}, batched": start(job, {"ids": ids, "vectors": vectors}) for library, start in bench.libraries.items()}
    return Contest("patchscope", size.name, len(rows), lambda: bench.ours.next_probs(rows, words),
                   {name: one_by_one, "Hugging Face batched": batched, **{n: run for n, run in libraries.items() if run is not None}},
                   lambda ours, theirs, rival: close(ours[:: size.every] if rival == name else ours, theirs),
                   {name: timed / len(rows)}, {"prefill": bench.prefill(many, torch.ones_like(many))}, lambda t: share * t["prefill"])


def selfie(bench: Bench) -> Contest:
    """The same residuals into five placeholders at once, 20 tokens. The published method runs 8 at a time."""
    size, at = bench.size, [3, 4, 5, 6, 7]
    question, vectors = _question(bench.size, 22, at), _sources(bench)
    rows = patchscope_rows(vectors, question, TARGET_LAYER)
    ids = bench.ids([question])[0]
    many = ids.expand(len(rows), -1)
    eager = copy.deepcopy(bench.hf, {id(t): t for t in (*bench.hf.parameters(), *bench.hf.buffers())})
    eager.set_attn_implementation("eager")

    def fill(value: Tensor, part: Tensor) -> None:
        for i, vector in enumerate(part):
            value[i, at] = vector

    timed_rows = 64 if size.every > 1 else len(rows)

    def published(batch: int, *, relevancy: bool) -> list[list[int]]:
        out = []
        for part in vectors[:timed_rows].split(batch):
            prompts = ids.expand(len(part), -1)

            def hook(module: Any, args: Any, output: Tensor, part: Tensor = part) -> Tensor:
                if output.shape[1] > 1:
                    fill(output, part)
                return output

            handle = eager.model.layers[TARGET_LAYER].register_forward_hook(hook)
            made = eager.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            if relevancy:
                with_patch = eager(made[:, :-1], output_attentions=True, output_hidden_states=True).logits.softmax(-1)
            handle.remove()
            if relevancy:
                without = eager(made[:, :-1], output_attentions=True, output_hidden_states=True).logits.softmax(-1)
                (with_patch - without).abs().gather(2, made[:, 1:, None])
            out.append(made[:, ids.shape[1] :])
        return bench.plain_tokens(torch.cat(out))

    def batched() -> list[list[int]]:
        with bench.hooks({TARGET_LAYER: lambda value: fill(value, vectors)}):
            return bench.plain_tokens(bench.generate(many, torch.ones_like(many)))

    needed = ids.shape[1] * (TARGET_LAYER + 1) + at[0] * (size.layers - TARGET_LAYER - 1)
    needed += len(rows) * (ids.shape[1] - at[0]) * (size.layers - TARGET_LAYER - 1)
    share = needed / (many.numel() * size.layers)
    ways = {"published method (eager, batches of 8, relevancy)": (8, True), "the same in batches of 64": (64, True),
            "the same without relevancy": (8, False)}
    return Contest("selfie", size.name, len(rows), lambda: bench.tokens(bench.ours.generate(rows, NEW)),
                   {**{name: (lambda way=way: published(way[0], relevancy=way[1])) for name, way in ways.items()},
                    "Hugging Face batched": batched},
                   lambda ours, theirs, rival: same_tokens(ours[: len(theirs)], theirs), dict.fromkeys(ways, timed_rows / len(rows)),
                   {"prefill": bench.prefill(many, torch.ones_like(many)), "decode": bench.decoding(many, torch.ones_like(many))},
                   lambda t: share * t["prefill"] + t["decode"])


def patching(bench: Bench) -> Contest:
    """Layers x positions: a clean run's residual stream into a corrupt run, one place a row; difference of two log-probabilities."""
    size, n = bench.size, bench.size.grid_tokens
    places, layers = list(range(0, n, size.grid_step)), size.grid_layers
    marks = {f"t{p}": [max(p, 1)] for p in places}
    clean = text_prompt(size, n, 1, {}, marks)
    corrupt = text_prompt(size, n, 1, {12: "black", 30: "white", 31: "refer"}, marks)
    sites = [Site(layer, f"t{p}", "resid_pre") for layer in layers for p in places]
    resid = bench.ours.record([Row(clean)], sites)[0]
    rows = [Row(corrupt, (Edit(site, vector),)) for site, vector in zip(sites, resid, strict=True)]
    words = ["race", "color"]
    targets = [bench.ours.token_id(w) for w in words]
    ids = bench.ids([corrupt])[0]
    columns = [max(p, 1) for _ in layers for p in places]

    def ours() -> Tensor:
        log_probs = bench.ours.next_probs(rows, words).log()
        return log_probs[:, 0] - log_probs[:, 1]

    def difference(logits: Tensor) -> Tensor:
        return logits[:, targets[0]] - logits[:, targets[1]]

    def one_by_one() -> Tensor:
        out = []
        for i in range(0, len(sites), size.every):
            def hook(value: Tensor, hook: Any, i: int = i) -> Tensor:
                value[:, columns[i]] = resid[i]
                return value
            logits = bench.bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{sites[i].layer}.hook_in", hook)])
            out.append(difference(logits[:, -1]))
        return torch.cat(out)

    def batched() -> Tensor:
        out = []
        for k, layer in enumerate(layers):
            part = slice(k * len(places), (k + 1) * len(places))
            where = (torch.arange(len(places)), torch.tensor(columns[part]))
            with bench.hooks({layer: lambda value, where=where, part=part: value.index_put_(where, resid[part])}, before=True):
                out.append(difference(bench.hf(ids.repeat(len(places), 1), use_cache=False, logits_to_keep=1).logits[:, -1]))
        return torch.cat(out)

    needed = ids.numel() * size.layers + sum((size.layers - layer) * (n - max(p, 1)) for layer in layers for p in places)
    many = ids.repeat(len(places), 1)
    share = needed / (many.numel() * size.layers)
    name = "bridge, one by one"
    timed = len(range(0, len(sites), size.every))
    return Contest("patching", size.name, len(rows), ours, {name: one_by_one, "Hugging Face batched by layer": batched},
                   lambda a, b, rival: close(a[:: size.every] if rival == name else a, b), {name: timed / len(rows)},
                   {"prefill": bench.prefill(many, torch.ones_like(many))}, lambda t: share * t["prefill"])


def behaviour(bench: Bench) -> Contest:
    """Questions of four templates, answered in up to 40 tokens; a random share of the vocabulary ends answers, so that some end early."""
    size, most = bench.size, 40
    prompts = question_prompts(size, size.answers)
    generator = torch.Generator().manual_seed(7)
    ends = torch.randperm(size.vocabulary - 10, generator=generator)[: size.vocabulary // 28] + 10
    stops = frozenset(ends.tolist())
    model = replace(bench.ours, stop_ids=stops)
    rows = [Row(p) for p in prompts]
    ids, mask = bench.ids(prompts)
    timed_rows = range(0, len(rows), size.every)

    def one_by_one() -> list[list[int]]:
        out = []
        for i in timed_rows:
            own = ids[i : i + 1, mask[i] == 1]
            made = bench.hf.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=most, do_sample=False, pad_token_id=0,
                                     eos_token_id=list(stops))[0, own.shape[1] :]
            out.append([t for t in made.tolist() if t not in stops and t > 3])
        return out

    def batched() -> list[list[int]]:
        made = bench.hf.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0,
                                 eos_token_id=list(stops))[:, ids.shape[1] :].tolist()
        return [[t for t in row[: next((k for k, t in enumerate(row) if t in stops), most)] if t > 3] for row in made]

    answers = model.generate(rows, most)
    lengths = [answer.n_tokens + answer.finished for answer in answers]
    name = "Hugging Face, one by one, stopping equally"
    return Contest("behaviour", size.name, len(rows), lambda: bench.tokens(model.generate(rows, most)),
                   {name: one_by_one, "Hugging Face batched": batched},
                   lambda ours, theirs, rival: same_tokens([ours[i] for i in timed_rows] if rival == name else ours, theirs),
                   {name: len(timed_rows) / len(rows)}, {"prefill": bench.prefill(ids, mask), "decode": bench.decoding(ids, mask, most)},
                   lambda t: t["prefill"] + t["decode"] * (sum(lengths) - len(lengths)) / (len(lengths) * (most - 1)),
                   {"mean_answer_tokens": sum(lengths) / len(lengths)})


def lens(bench: Bench) -> Contest:
    """Exact probabilities of two words at every layer and position of some prompts; the vocabulary at all of them is the rival."""
    size, n = bench.size, 64
    prompts = [text_prompt(size, n, 300 + i, {}, {f"t{p}": [p] for p in range(1, n)}) for i in range(4 if size.name == "M" else 16)]
    sites = [Site(layer, f"t{p}") for layer in range(size.layers - 1) for p in range(1, n)]
    rows, words = [Row(p) for p in prompts], ["race", "color"]
    targets = [bench.ours.token_id(w) for w in words]
    ids = bench.ids(prompts)[0]

    def full() -> Tensor:
        states = bench.hf(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states[1:-1]
        resid = torch.stack([h[:, 1:] for h in states], 1).flatten(1, 2)
        return bench.hf.lm_head(bench.hf.model.norm(resid)).log_softmax(-1)[..., targets]

    def ours() -> Tensor:
        return bench.ours.lens_log_probs(rows, sites, words)

    model, ids_of = bench.ours.engine.model, torch.tensor(targets)
    resid = bench.ours.record(rows, sites).flatten(0, 1)
    extra = {"memory_full_vocabulary": peak_bytes(lambda: model.lm_head(model.model.norm(resid)).log_softmax(-1)[..., targets]),
             "memory_ours": peak_bytes(lambda: log_probs_of(model, resid, ids_of, bench.ours.engine.budget.lens_block)),
             "memory_share_with_the_run": peak_bytes(ours) / peak_bytes(full)}
    return Contest("lens", size.name, len(rows) * len(sites), ours, {"full vocabulary at all places": full},
                   lambda a, b, rival: close(a, b), notes={**extra, "memory_share": extra["memory_ours"] / extra["memory_full_vocabulary"]})


JOBS: dict[str, Callable[[Bench], Contest]] = {"steering": steering, "patchscope": patchscope, "selfie": selfie, "patching": patching,
                                               "behaviour": behaviour, "lens": lens}
