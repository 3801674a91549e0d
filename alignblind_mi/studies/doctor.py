"""Before an expensive run: is this model one that the instruments can be trusted on, and if not, what is to be done?

Checks of configuration and tokenizer come first and need no weights; then the model is loaded and compared with itself, computed in other
ways (one row at a time by transformers' own forward pass, without a cache, by transformer-lens, in other numbers). Every check says what
was measured, what it may be at most (or at least), and what to do. It does NOT change anything, nor judge a model's answers.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from alignblind_mi.borders.settings import File, takes
from alignblind_mi.errors import AlignblindError
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.models.adapters import check_folders, with_adapters
from alignblind_mi.models.blocks import text_config
from alignblind_mi.models.budget import release
from alignblind_mi.models.chat import Chat, in_chat, render, rendered
from alignblind_mi.models.configs import load_config, load_generation_config, load_tokenizer
from alignblind_mi.models.edits import Edit, Row, Site, Treatment
from alignblind_mi.models.loading import check_config, end_tokens, token_count
from alignblind_mi.models.model import HookedModel, Twin, load_model, share_weights, tolerance
from alignblind_mi.models.plain import PlainEngine
from alignblind_mi.models.spec import AnySpec, ModelError, ModelSpec, as_spec
from alignblind_mi.models.tokens import Encoded, TokenRow, encode
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT, Concept, Cue, load_concept
from alignblind_mi.stimuli.prompts import KINDS, Prompt, Span, assignments, behaviour_prompts, implicit_prompts, interpretation_prompt
from alignblind_mi.studies.forecast import model_fits
from alignblind_mi.studies.study import organism_record, questions

STATUSES = ("ok", "warn", "fail", "skipped")
TRIAL_PROMPTS, DRIFT_PROMPTS, STEPS = 6, 24, 8    # prompts run one by one; prompts in other numbers; tokens decoded
FLIPS = 0.05    # share of answers that other numbers may change
UNCHANGED, CHANGED = 1e-5, 1e-4    # nats: an adapter that is off must not change more, one that is on must change at least so much
PROBLEMS = (AlignblindError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Check:
    """One check. `measured` in `unit` is held against `rule` ("<=" or ">=") `bound`; NaN where nothing could be measured.

    status: ok; warn (numbers can be trusted, but know this); fail (they cannot, or a study would stop); skipped (`found` says why).
    """

    check: str
    status: str
    found: str
    measured: float = float("nan")
    rule: str = "<="
    bound: float = float("nan")
    unit: str = ""
    advice: str = ""


def _at_most(check: str, measured: float | int, bound: float | int, unit: str, found: str, advice: str, *, worse: str = "fail") -> Check:
    good = measured <= bound
    return Check(check, "ok" if good else worse, found, float(measured), "<=", float(bound), unit, "" if good else advice)


def _at_least(check: str, measured: float | int, bound: float | int, unit: str, found: str, advice: str, *, worse: str = "fail") -> Check:
    good = measured >= bound
    return Check(check, "ok" if good else worse, found, float(measured), ">=", float(bound), unit, "" if good else advice)


@takes(ModelError)
def check_up(model: AnySpec, concept: Concept | str | Path = DEFAULT_CONCEPT, *, cue: str | Cue = "", adapter: File | None = None,
             drift: bool = True, progress: Callable[[str], None] | None = None) -> pd.DataFrame:
    """Check a model for a concept and a cue (default: its first), perhaps with a LoRA adapter; one row per check, in their order.

    Columns: check, status (ok, warn, fail or skipped), found, measured, rule, bound, unit, advice: see `Check`. Weights are loaded only if
    no check before fails. `drift`: also load the model in other numbers (bfloat16 against float32), if they fit. `progress` is told what
    was checked.

    Errors: ModelError, ConceptError for a model, adapter or concept that cannot be reached or does not exist.
    """
    spec = as_spec(model).resolved()
    concept = concept if isinstance(concept, Concept) else load_concept(concept)
    check_config(spec)
    if adapter is not None:
        check_folders([adapter], spec.allow_pickle)
    subject = Subject(spec, concept, cue if isinstance(cue, Cue) else concept.cue(cue or concept.first_cue), adapter)
    found: list[Check] = []
    for check in _checks(subject, drift):
        found.append(check)
        if progress is not None:
            progress(f"{check.check}: {check.status}")
    return pd.DataFrame.from_records([asdict(check) for check in found])


@dataclass(frozen=True)
class Subject:
    """What is checked: a model by its specification, and what will be asked of it."""

    spec: ModelSpec
    concept: Concept
    cue: Cue
    adapter: Path | str | None = None

    @cached_property
    def config(self) -> Any:
        """transformers' configuration."""
        return load_config(self.spec)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as it comes."""
        return load_tokenizer(self.spec)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """What will be asked: all behaviour prompts of the paper's design, and the questions about a placeholder."""
        asked = [prompt for kind in KINDS for prompt in behaviour_prompts(self.concept, self.cue, kind, design="published")]
        return [*asked, *self.questions]

    @cached_property
    def questions(self) -> list[Prompt]:
        """The questions about a placeholder; none for a cue without senses."""
        return [interpretation_prompt(self.concept.interpretation(name)) for name in questions(self.concept, self.cue.name)]

    @property
    def senses(self) -> list[str]:
        """The words of the two senses (group, other); none for a cue without senses."""
        return [sense.word for sense in self.concept.both_senses(self.cue)] if self.concept.has_senses(self.cue) else []

    def sample(self, n: int) -> list[Prompt]:
        """Implicit prompts, evenly spread over those of the paper's design."""
        every = implicit_prompts(self.concept, self.cue, design="published")
        return [every[i * len(every) // n] for i in range(min(n, len(every)))]

    @cached_property
    def trial(self) -> list[Prompt]:
        """Prompts of different lengths: some implicit ones, and the shorter questions about a placeholder."""
        return [*self.sample(TRIAL_PROMPTS), *self.questions]



def _checks(subject: Subject, drift: bool) -> Iterator[Check]:
    failed: list[str] = []
    for name, check in BEFORE.items():
        for made in [_skipped(name, failed)] if "tokenizer" in failed else _tried(name, check, subject):
            failed += [made.check] * (made.status == "fail")
            yield made
    if failed:
        yield from (_skipped(name, failed) for name in (*LOADED, "adapter", "drift"))
        return
    try:
        model = load_model(subject.spec)
    except ModelError as error:
        yield Check("weights", "fail", str(error), advice="nothing can be measured on them: see what was found")
        yield from (_skipped(name, ["weights"]) for name in (*LOADED, "adapter", "drift"))
        return
    loaded = Loaded(subject, model)
    for name, of_model in LOADED.items():
        yield from _tried(name, of_model, loaded)
    before = _answers(loaded.model, subject, DRIFT_PROMPTS) if drift else None
    if subject.adapter is None:
        yield Check("adapter", "skipped", "no adapter was given")
    else:
        yield from _tried("adapter", _adapter, loaded)
    del model, loaded
    release()
    if before is None:
        yield Check("drift", "skipped", "not asked for")
    else:
        yield from _tried("drift", lambda asked: _drift(asked, before), subject)


def _skipped(name: str, failed: Sequence[str]) -> Check:
    return Check(name, "skipped", f"{' and '.join(failed)} failed: see there first")


def _tried(name: str, check: Callable[[Any], Iterator[Check]], subject: Any) -> list[Check]:
    """What a check found; an error on the way is a finding too."""
    try:
        return list(check(subject))
    except ModelError as error:
        return [Check(name, "fail", str(error), advice="see what was found")]
    except PROBLEMS as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Check(name, "fail", f"{type(error).__name__}: {said}", advice="this could not be run: report it with the model's name")]


# ---- configuration and tokenizer ---------------------------------------------------------------------------------------


def _tokenizer(subject: Subject) -> Iterator[Check]:
    """Character offsets at all, and no id beyond the model's vocabulary."""
    tokenizer, size = subject.tokenizer, int(subject.config.get_text_config().vocab_size)
    if not tokenizer.is_fast:
        yield Check("tokenizer", "fail", "it gives no character offsets (it is not a fast one): marks cannot be placed",
                    advice="use a checkpoint with a tokenizer.json")
        return
    largest = max(tokenizer.get_vocab().values())
    yield _at_most("tokenizer", largest, size - 1, "largest id", f"{len(tokenizer)} tokens, {size} rows of the embedding",
                   "tokens were added without resize_token_embeddings: resize, and save the checkpoint again")


def _bos(subject: Subject) -> Iterator[Check]:
    """BOS before raw prompts, exactly once."""
    tokenizer, bos = subject.tokenizer, subject.tokenizer.bos_token_id
    if bos is None:
        yield Check("bos", "skipped", "the tokenizer has no BOS: prompts begin without one")
        return
    encoded = encode(tokenizer, subject.trial)
    counts = [item.ids.count(bos) for item in encoded]
    first = all(item.ids[0] == bos for item in encoded)
    if max(counts) == 0:
        yield Check("bos", "warn", f"{tokenizer.bos_token!r} is not put before prompts", 0.0, ">=", 1.0, "times",
                    "as its tokenizer does by itself; if the model was trained with a BOS, set add_bos_token in its tokenizer_config.json")
        return
    yield _at_most("bos", max(counts) if first and min(counts) else max(2, *counts), 1, "times",
                   f"{tokenizer.bos_token!r} {'at the start' if first else 'not at the start'} of raw prompts",
                   "mend the tokenizer's post-processor (tokenizer.json): every activation depends on one BOS, at the start")


def _bos_in_chat(subject: Subject) -> Iterator[Check]:
    """BOS in texts of the chat template: never twice as this project encodes them; and twice as a bare tokenizer call does?"""
    tokenizer, bos = subject.tokenizer, subject.tokenizer.bos_token_id
    if not tokenizer.chat_template:
        yield Check("bos in chat", "skipped", "the tokenizer has no chat template")
        return
    try:
        text = render(subject.trial[0].text, tokenizer, Chat(), subject.spec.name)
        ours, bare = encode(tokenizer, [Prompt(text)])[0].ids.count(bos), list(tokenizer(text)["input_ids"]).count(bos)
        twice = "; a bare tokenizer(text) would double it" if bare > 1 >= ours else ""
        yield _at_most("bos in chat", ours, 1, "times", f"{ours} in a text of the chat template{twice}",
                       "the template writes a BOS that does not stand at the very start: take it out of the template")
        in_chat(subject.trial, tokenizer, Chat(), subject.spec.name)
    except AlignblindError as error:
        yield Check("chat template", "fail", str(error), advice="ask this model raw (without chat), or mend the template")


def _padding(subject: Subject) -> Iterator[Check]:
    tokenizer, size = subject.tokenizer, int(subject.config.get_text_config().vocab_size)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        yield Check("padding token", "warn", "neither a padding nor an end token", advice="rows need none (they are padded by position), "
                    "but LoRA training does: set tokenizer.pad_token and save the tokenizer")
        return
    own = f"{tokenizer.pad_token!r}" if tokenizer.pad_token_id is not None else f"none of its own: the end token {tokenizer.eos_token!r}"
    yield _at_most("padding token", pad, size - 1, "id", f"{own}; rows are padded on the left and masked, whatever padding_side says "
                   f"({tokenizer.padding_side})", "its embedding does not exist: resize the embedding, or name another padding token")


def _words(subject: Subject) -> Iterator[Check]:
    """Identifiers, senses and all texts that will be asked: known, and how many tokens each."""
    tokenizer, cue, concept = subject.tokenizer, subject.cue, subject.concept
    tokens = {word: token_count(tokenizer, f" {word}") for word in dict.fromkeys((*cue.marked, *cue.unmarked))}
    unknown, most = [word for word, n in tokens.items() if n == 0], max(tokens.values())
    if unknown:
        yield Check("identifiers", "fail", f"unknown to the tokenizer: {', '.join(map(repr, unknown))}", float(len(unknown)), "<=", 0.0,
                    "unknown", f"choose another cue than {cue.name!r} (known: {', '.join(concept.cues)}), or another model")
    else:
        split = [f"{word!r} is {n}" for word, n in tokens.items() if n > 1]
        yield _at_most("identifiers", most, 1, "tokens", ", ".join(split) if split else f"all {len(tokens)} are single tokens",
                       "edits and readings use the last token of each; say so, or choose a cue of single tokens", worse="warn")
    yield _unknown_texts("texts", tokenizer, subject.prompts, "choose another cue, concept or model: an unknown word is read as nothing")
    if not subject.senses:
        yield Check("sense words", "skipped", f"the cue {cue.name!r} of {concept.name!r} has no senses: behaviour alone can be measured")
        return
    senses = {word: token_count(tokenizer, word) for word in subject.senses}
    wrong = [f"{word!r} is {n or 'no'} token{'s' * (n != 1)}" for word, n in senses.items() if n != 1]
    yield _at_most("sense words", len(wrong), 0, "not one token", ", ".join(wrong) or "single tokens",
                   "their probability as the next token cannot be read: give the sense another word in the concept file")
    name = organism_record(subject.spec).get("selfie", "paper")
    if name in concept.selfie:
        yield _unknown_texts("selfie prompt", tokenizer, [interpretation_prompt(concept.selfie_prompt(name))],
                             f"SelfIE will be refused with the prompt {name!r}: choose another of {', '.join(concept.selfie)}",
                             worse="warn")


def _unknown_texts(check: str, tokenizer: Any, prompts: Sequence[Prompt], advice: str, *, worse: str = "fail") -> Check:
    unknown = [item for item in encode(tokenizer, prompts) if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in item.ids]
    words = dict.fromkeys(item.prompt.text[slice(*item.offsets[item.ids.index(tokenizer.unk_token_id)])].strip() for item in unknown)
    said = f"unknown: {', '.join(map(repr, list(words)[:5]))}" if words else f"all {len(prompts)} known"
    return _at_most(check, len(unknown), 0, "with unknown words", said, advice, worse=worse)


def _round_trip(subject: Subject) -> Iterator[Check]:
    """Words and texts come back from their tokens: answers are judged as they are decoded."""
    tokenizer, cue = subject.tokenizer, subject.cue
    valenced = [word for category in subject.concept.categories.values() for word in (*category.positive, *category.negative)]
    words = dict.fromkeys((*cue.marked, *cue.unmarked, *valenced))
    lost = [word for word in words if tokenizer.decode(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]).strip() != word]
    yield _at_most("round trip of words", len(lost), 0, "not coming back", ", ".join(map(repr, lost[:5])) or f"all {len(words)} come back",
                   "answers would not be recognised: the tokenizer changes these words (lower case, accents?); use another model")
    changed = [p.text for p in subject.trial
               if tokenizer.decode(encode(tokenizer, [p])[0].ids, skip_special_tokens=True).strip() != p.text.strip()]
    yield _at_most("round trip of texts", len(changed), 0, "changed", f"{len(changed)} of {len(subject.trial)} texts are decoded otherwise",
                   "look at how decoding changes spaces and punctuation: answers are judged by the robust rule, which bears that",
                   worse="warn")


def _offsets(subject: Subject) -> Iterator[Check]:
    """The tokens that are edited and read are those of the marked words."""
    wrong, wide, total = [], [], 0
    for item in encode(subject.tokenizer, subject.trial):
        for mark, spans in item.prompt.marks.items():
            for span in spans:
                total += 1
                tokens, word = item.tokens_of(span), item.prompt.text[span.start : span.end]
                decoded = subject.tokenizer.decode([item.ids[i] for i in tokens])
                wrong += [f"{mark} {word!r} is {decoded!r}"] * (word not in decoded)
                wide += [f"{mark} {word!r} is {decoded!r}"] * (word in decoded and _beyond(item, tokens) != word)
    yield _at_most("offsets", len(wrong), 0, "wrong marks", f"of {total}{': ' + wrong[0] if wrong else ''}",
                   "the tokenizer's offsets do not lead to its tokens: edits would go astray; use the model's own fast tokenizer")
    if not wrong:
        yield _at_most("tokens of marks", len(wide), 0, "marks with more in their token", f"of {total}{': ' + wide[0] if wide else ''}",
                       "the token that is edited holds more than the word: read results of these templates with that in mind", worse="warn")


def _beyond(item: Encoded, tokens: Sequence[int]) -> str:
    """The text of some tokens by their offsets, spaces around it aside."""
    return item.prompt.text[item.offsets[tokens[0]][0] : item.offsets[tokens[-1]][1]].strip()


def _context(subject: Subject) -> Iterator[Check]:
    most = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        yield Check("context length", "skipped", "the configuration names none")
        return
    longest = max(len(item.ids) for item in encode(subject.tokenizer, subject.prompts)) + Decoding().max_new_tokens
    yield _at_most("context length", longest, int(most), "tokens", "the longest prompt and its answer",
                   "prompts would be longer than the model was made for: use another model")


def _generation(subject: Subject) -> Iterator[Check]:
    """End tokens, the one that ends a turn of the chat template among them; what is sampled by default."""
    tokenizer, said = subject.tokenizer, load_generation_config(subject.spec, subject.config)
    ends = end_tokens(said, tokenizer)
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends))
    own = " (its own default is to sample: answers here are greedy unless a temperature is asked for)" if said.do_sample else ""
    yield _at_least("end tokens", len(ends), 1, "tokens", (names or "none") + own,
                    "answers never end by themselves: name eos_token_id in generation_config.json")
    turn = _turn(tokenizer, subject.spec.name) if tokenizer.chat_template else ""
    if not turn:
        return    # no template, or one that cannot be rendered, which another check says
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.bos_token_id}
    after = [i for i in encode(tokenizer, [Prompt(turn)])[0].ids if i in special]
    if after:
        yield _at_least("end of turn", float(after[0] in ends), 1, "named", f"{tokenizer.convert_ids_to_tokens(after[0])!r} ends a turn",
                        "add it to eos_token_id in generation_config.json: answers in chat form would run on", worse="warn")


def _turn(tokenizer: Any, name: str) -> str:
    """What a chat template writes after an answer "B"; empty for one that refuses, which another check says."""
    try:
        text = rendered([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], tokenizer, name)
    except ModelError:
        return ""
    return text[text.rindex("B") + 1 :] if "B" in text else ""


def _memory(subject: Subject) -> Iterator[Check]:
    spec = subject.spec
    total, free, fits = model_fits(spec, subject.config)
    chosen = next(one for one in fits if one.numbers == (spec.quantization or spec.dtype))
    others = [one.numbers for one in fits if one.fits and one.weights < chosen.weights]
    said = f"{total / 1e9:.3g} billion parameters in {chosen.numbers}; batches of at most {chosen.rows} rows"
    advice = (f"use {others[0]}" if others else "use a smaller model or a larger machine") + ", or --device-map auto over several devices"
    check = _at_most("memory", chosen.weights / 2**30, free / 2**30, "GiB", said, advice)
    yield check if chosen.fits or check.status == "fail" else replace(check, status="fail", advice=advice)


BEFORE: dict[str, Callable[[Subject], Iterator[Check]]] = {
    "tokenizer": _tokenizer, "bos": _bos, "bos in chat": _bos_in_chat, "padding token": _padding, "words": _words,
    "round trip": _round_trip, "offsets": _offsets, "context length": _context, "end tokens": _generation, "memory": _memory}


# ---- the model against itself ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Loaded:
    """The model, and the same weights run by transformers alone: eager attention, one row at a time, no padding, no cache."""

    subject: Subject
    model: HookedModel

    @cached_property
    def reference(self) -> Any:
        """A copy of the model's modules on the same weights, with transformers' eager attention."""
        module = share_weights(self.model.engine.model)
        module.set_attn_implementation("eager")
        return module

    @cached_property
    def rows(self) -> list[TokenRow]:
        """The trial prompts in tokens."""
        return self.model.token_rows([Row(prompt) for prompt in self.subject.trial])

    @cached_property
    def found(self) -> Float[Tensor, "row vocabulary"]:
        """Next-token log-probabilities of the trial by the model's engine, in a batch."""
        return next_log_probs(self.model.engine, self.rows)

    def alone(self, ids: Sequence[int]) -> Float[Tensor, "token vocabulary"]:
        """Log-probabilities after every token of one row, by the reference."""
        with torch.no_grad():
            out = self.reference(torch.tensor([list(ids)], device=self.model.engine.device), use_cache=False)
        return out.logits[0].float().log_softmax(-1).cpu()

    @property
    def bound(self) -> float:
        """How far rounding may take two computations apart, in nats."""
        return tolerance(self.model.engine.model)


def next_log_probs(engine: Any, rows: Sequence[TokenRow]) -> Float[Tensor, "row vocabulary"]:
    """Next-token log-probabilities of rows by an engine, adapters as they are."""
    out = torch.empty(len(rows), text_config(engine.model).vocab_size)
    with torch.no_grad():
        for batch in engine.batches(rows, None):
            out[batch.index] = batch.logits().log_softmax(-1).cpu()
    return out


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


WRONG_ENGINE = "choose the plain engine (--engine plain) and check again; report the model's name"


def _engine(loaded: Loaded) -> Iterator[Check]:
    model = loaded.model
    alone = torch.stack([loaded.alone(row.ids)[-1] for row in loaded.rows])
    check = _at_most("engine", _apart(loaded.found, alone), loaded.bound, "nats",
                     f"the {model.engine.name} engine against transformers, one row at a time", WRONG_ENGINE)
    if check.status == "ok" and model.engine.name == "plain" and model.spec.engine != "plain":
        check = replace(check, status="warn", advice="the fast engine cannot run this model: expect several times the time")
    yield check
    if model.engine.name == "plain":
        yield Check("engine with edits", "skipped", "the plain engine has nothing to be compared with")
        return
    plain = PlainEngine(loaded.reference, model.engine.budget)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.d_model, generator=generator)
    edits = [(Edit(Site(layer, "marked"), vector, how),) for layer in {0, model.n_layers // 2, model.n_layers - 1}
             for how in ("replace", "add", "ablate")]
    rows = model.token_rows([Row(loaded.subject.trial[0], edit) for edit in edits])
    yield _at_most("engine with edits", _apart(next_log_probs(model.engine, rows), next_log_probs(plain, rows)), loaded.bound, "nats",
                   f"{len(rows)} edited rows, fast against plain", WRONG_ENGINE)


def _padding_parity(loaded: Loaded) -> Iterator[Check]:
    one_by_one = torch.cat([next_log_probs(loaded.model.engine, [row]) for row in loaded.rows])
    lengths = [len(row.ids) for row in loaded.rows]
    yield _at_most("padding", _apart(loaded.found, one_by_one), loaded.bound, "nats",
                   f"a batch of rows of {min(lengths)} to {max(lengths)} tokens against each alone", WRONG_ENGINE)


def _cache(loaded: Loaded) -> Iterator[Check]:
    """Greedy decoding with the key-value cache, against reading everything anew."""
    worst, model = 0.0, loaded.model
    with torch.no_grad():
        for batch in model.engine.batches(loaded.rows, STEPS):
            made, said = [], [batch.logits().log_softmax(-1).cpu()]
            for _ in range(STEPS):
                made.append(said[-1].argmax(-1))
                said.append(batch.extend(made[-1][:, None], torch.ones(len(batch.index), 1, dtype=torch.bool))[:, -1].log_softmax(-1).cpu())
            for k, i in enumerate(batch.index):
                ids = [*loaded.rows[i].ids, *(int(step[k]) for step in made)]
                worst = max(worst, _apart(torch.stack([step[k] for step in said]), loaded.alone(ids)[len(loaded.rows[i].ids) - 1 :]))
    yield _at_most("key-value cache", worst, loaded.bound, "nats", f"{STEPS} tokens decoded with the cache against a full forward pass",
                   WRONG_ENGINE)


def _lens(loaded: Loaded) -> Iterator[Check]:
    """The logit lens at the last layer is the model's own answer."""
    model = loaded.model
    if not loaded.subject.senses:
        yield Check("logit lens", "skipped", "there are no senses to be read")
        return
    words = loaded.subject.senses
    prompts = [replace(prompt, marks={**prompt.marks, "end": (_last_span(model, prompt),)}) for prompt in loaded.subject.trial]
    try:
        read = model.lens_log_probs([Row(prompt) for prompt in prompts], [Site(model.n_layers - 1, "end")], words)[:, 0]
    except AlignblindError as error:
        yield Check("logit lens", "fail", str(error),
                    advice="a study would stop at its lens part: run bias, awareness (without the lens) and patch one by one instead")
        return
    ids = torch.tensor([model.token_id(word) for word in words])
    yield _at_most("logit lens", _apart(read, loaded.found[:, ids]), loaded.bound, "nats", "at the last layer against the model's answer",
                   "do not read the logit lens on this model")


def _last_span(model: HookedModel, prompt: Prompt) -> Span:
    return Span(*model.encode([prompt])[0].offsets[-1])


def _bridge(loaded: Loaded) -> Iterator[Check]:
    """transformer-lens' view of the same weights. Studies need it for nothing but the view of attention."""
    model, advice = loaded.model, "studies run; hook points, attention views and path patching would not be those of the model"
    try:
        with torch.no_grad(), model.edited_bridge(loaded.rows) as (bridge, ids, mask):
            logits = bridge.forward(ids, attention_mask=mask)[:, -1].float().log_softmax(-1).cpu()
    except AlignblindError as error:
        yield Check("transformer-lens", "warn", str(error), advice=advice)
        return
    yield _at_most("transformer-lens", _apart(logits, loaded.found), loaded.bound, "nats", "its bridge against the engine", advice,
                   worse="warn")


LOADED: dict[str, Callable[[Loaded], Iterator[Check]]] = {
    "engine": _engine, "padding": _padding_parity, "key-value cache": _cache, "logit lens": _lens, "transformer-lens": _bridge}


def _adapter(loaded: Loaded) -> Iterator[Check]:
    """Off is the base model, on is another, merged is on. Done last: merging changes the weights."""
    model, subject, base = loaded.model, loaded.subject, loaded.found
    assert subject.adapter is not None
    peft = with_adapters(model.engine.model, [subject.adapter], subject.spec)
    carried = replace(model, peft=peft, twin=Twin(model.spec, peft, model.tokenizer))
    rows, (name,) = [Row(prompt) for prompt in subject.trial], carried.adapters
    yield _at_most("adapter off", _apart(carried.next_log_probs(rows), base), UNCHANGED, "nats",
                   f"{name} loaded and off, against the model without it",
                   "the adapter changes the model even when it is off: do not use it for comparisons")
    on = carried.under(Treatment(name, adapter=name)).next_log_probs(rows)
    yield _at_least("adapter on", _apart(on, base), CHANGED, "nats", f"{name} on, against the model without it",
                    "it does nothing on these prompts: was it trained, and for this model's modules?")
    if subject.spec.quantization is not None:
        yield Check("adapter merged", "skipped", "merging into quantised weights rounds them")
        return
    peft.base_model.enable_adapter_layers()
    peft.set_adapter(name, inference_mode=True)
    peft.merge_adapter([name])
    yield _at_most("adapter merged", _apart(next_log_probs(model.engine, loaded.rows), on), max(loaded.bound, UNCHANGED), "nats",
                   f"{name} merged into the weights, against {name} on", "export the adapter unmerged, or merge it in float32")


# ---- other numbers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """Of some prompts: the next token, and the log-odds (nats) of the two complete assignments."""

    next_token: Tensor
    log_odds: Float[Tensor, " prompt"]


def _answers(model: HookedModel, subject: Subject, n: int) -> Answers:
    prompts = subject.sample(n)
    rows = [Row(prompt) for prompt in prompts]
    both = model.continuation_log_probs(rows, [assignments(subject.concept, prompt) for prompt in prompts])
    return Answers(model.next_log_probs(rows).argmax(-1), both[:, 0] - both[:, 1])


def _drift(subject: Subject, before: Answers) -> Iterator[Check]:
    """The same prompts in float32, or in bfloat16 where float32 is what was asked for."""
    spec = subject.spec
    plain_float = spec.dtype == "float32" and spec.quantization is None
    other = replace(spec, dtype="bfloat16" if plain_float else "float32", quantization=None)
    gc.collect()
    _, free, fits = model_fits(other, subject.config)
    wanted = next(one for one in fits if one.numbers == other.dtype)
    if not wanted.fits:
        yield Check("drift", "skipped", f"in {other.dtype} it does not fit here ({wanted.weights / 2**30:.1f} of {free / 2**30:.1f} GiB)")
        return
    after, n = _answers(load_model(other), subject, DRIFT_PROMPTS), len(before.log_odds)
    numbers = f"{spec.quantization or spec.dtype} against {other.dtype}, {n} prompts"
    tokens = float((before.next_token != after.next_token).float().mean())
    signs = float(((before.log_odds > 0) != (after.log_odds > 0)).float().mean())
    shift = float((before.log_odds - after.log_odds).abs().mean())
    advice = (f"run the study in float32, as now: {other.dtype} would change answers" if plain_float
              else "run in float32, or compare rates of many answers, never single ones")
    yield _at_most("drift of next tokens", tokens, FLIPS, "share changed", numbers, advice, worse="warn")
    yield _at_most("drift of log-odds", signs, FLIPS, "share of signs changed", f"{numbers}; shifted by {shift:.2g} nats on average",
                   advice, worse="warn")
