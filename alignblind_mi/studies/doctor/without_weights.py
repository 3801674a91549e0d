"""What is checked of a model without its weights: tokenizer, marks, words, context, end tokens, memory. Does NOT load weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from alignblind_mi.errors import AlignblindError
from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.models.chat import Chat, chat_ids, in_chat, render, rendered
from alignblind_mi.models.configs import load_config, load_generation_config, load_tokenizer
from alignblind_mi.models.loading import end_tokens, token_count
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.models.tokens import Encoded, encode, unknown_words
from alignblind_mi.stimuli.concept import Concept, Cue
from alignblind_mi.stimuli.prompts import KINDS, Prompt, behaviour_prompts, implicit_prompts, interpretation_prompt
from alignblind_mi.studies.config import organism_record
from alignblind_mi.studies.doctor.check import Check, at_least, at_most
from alignblind_mi.studies.forecast import model_fits
from alignblind_mi.studies.parts import questions

TRIAL_PROMPTS, DRIFT_PROMPTS, STEPS = 6, 24, 8    # prompts run one by one; prompts in other numbers; tokens decoded



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


def tokenizer_checks(subject: Subject) -> Iterator[Check]:
    """Character offsets at all, and no id beyond the model's vocabulary."""
    tokenizer, size = subject.tokenizer, int(subject.config.get_text_config().vocab_size)
    if not tokenizer.is_fast:
        yield Check("tokenizer", "fail", "it gives no character offsets (it is not a fast one): marks cannot be placed",
                    advice="use a checkpoint with a tokenizer.json")
        return
    largest = max(tokenizer.get_vocab().values())
    yield at_most("tokenizer", largest, size - 1, "largest id", f"{len(tokenizer)} tokens, {size} rows of the embedding",
                   "tokens were added without resize_token_embeddings: resize, and save the checkpoint again")


def bos_checks(subject: Subject) -> Iterator[Check]:
    """BOS before raw prompts, exactly once, where the model has one that begins texts."""
    tokenizer, bos = subject.tokenizer, subject.tokenizer.bos_token_id
    if bos is None:
        yield Check("bos", "skipped", "the tokenizer has no BOS: prompts begin without one")
        return
    encoded = encode(tokenizer, subject.trial)
    counts = [item.ids.count(bos) for item in encoded]
    first = all(item.ids[0] == bos for item in encoded)
    if max(counts) == 0:
        other = "also its end token" if bos == tokenizer.eos_token_id else "a mark of turns in its chats" if _marks_turns(subject) else ""
        if other:
            yield Check("bos", "ok", f"{tokenizer.bos_token!r}, {other}, is not put before texts, as its tokenizer does by itself")
            return
        yield Check("bos", "warn", f"{tokenizer.bos_token!r} is not put before prompts", 0.0, ">=", 1.0, "times",
                    "as its tokenizer does by itself; if the model was trained with a BOS, set add_bos_token in its tokenizer_config.json")
        return
    yield at_most("bos", max(counts) if first and min(counts) else max(2, *counts), 1, "times",
                   f"{tokenizer.bos_token!r} {'at the start' if first else 'not at the start'} of raw prompts",
                   "mend the tokenizer's post-processor (tokenizer.json): every activation depends on one BOS, at the start")


def _marks_turns(subject: Subject) -> bool:
    """Whether the chat template writes the BOS at turns, not at the beginning alone."""
    tokenizer = subject.tokenizer
    if not tokenizer.chat_template:
        return False
    try:
        return render("x", tokenizer, Chat(), subject.spec.name).count(tokenizer.bos_token) > 1
    except AlignblindError:    # found by the check of the chat template
        return False


def chat_checks(subject: Subject) -> Iterator[Check]:
    """Prompts in the chat template: the ids that transformers itself gives to the same conversation."""
    tokenizer = subject.tokenizer
    if not tokenizer.chat_template:
        yield Check("chat template", "skipped", "the tokenizer has no chat template")
        return
    try:
        asked = in_chat(subject.trial, tokenizer, Chat(), subject.spec.name)
        differ = [prompt.text for prompt, item in zip(subject.trial, encode(tokenizer, asked), strict=True)
                  if list(item.ids) != chat_ids(prompt.text, tokenizer, Chat(), subject.spec.name)]
    except AlignblindError as error:
        yield Check("chat template", "fail", str(error), advice="ask this model raw (without chat), or mend the template")
        return
    twice = encode(tokenizer, asked)[0].ids[:2].count(tokenizer.bos_token_id) > 1
    yield at_most("chat template", len(differ), 0, "otherwise than transformers",
                  f"{len(asked)} prompts in the chat template, in transformers' own tokens",
                  "report the model's name: its prompts would be read otherwise than by transformers")
    if twice:
        yield Check("bos in chat", "warn", f"the template begins with {tokenizer.bos_token!r} twice", 2.0, "<=", 1.0, "times",
                    "so transformers reads it, too; take one out of the template if the model was trained with one")


def padding_checks(subject: Subject) -> Iterator[Check]:
    """Whether rows of different lengths can be padded."""
    tokenizer, size = subject.tokenizer, int(subject.config.get_text_config().vocab_size)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        yield Check("padding token", "warn", "neither a padding nor an end token", advice="rows need none (they are padded by position), "
                    "but LoRA training does: set tokenizer.pad_token and save the tokenizer")
        return
    own = f"{tokenizer.pad_token!r}" if tokenizer.pad_token_id is not None else f"none of its own: the end token {tokenizer.eos_token!r}"
    yield at_most("padding token", pad, size - 1, "id", f"{own}; rows are padded on the left and masked, whatever padding_side says "
                   f"({tokenizer.padding_side})", "its embedding does not exist: resize the embedding, or name another padding token")


def words_checks(subject: Subject) -> Iterator[Check]:
    """Identifiers, senses and all texts that will be asked: known, and how many tokens each."""
    tokenizer, cue, concept = subject.tokenizer, subject.cue, subject.concept
    tokens = {word: token_count(tokenizer, f" {word}") for word in dict.fromkeys((*cue.marked, *cue.unmarked))}
    unknown, most = [word for word, n in tokens.items() if n == 0], max(tokens.values())
    if unknown:
        yield Check("identifiers", "fail", f"unknown to the tokenizer: {', '.join(map(repr, unknown))}", float(len(unknown)), "<=", 0.0,
                    "unknown", f"choose another cue than {cue.name!r} (known: {', '.join(concept.cues)}), or another model")
    else:
        split = [f"{word!r} is {n}" for word, n in tokens.items() if n > 1]
        yield at_most("identifiers", most, 1, "tokens", ", ".join(split) if split else f"all {len(tokens)} are single tokens",
                       "edits and readings use the last token of each; say so, or choose a cue of single tokens", worse="warn")
    yield _unknown_texts("texts", tokenizer, subject.prompts, "choose another cue, concept or model: an unknown word is read as nothing")
    if not subject.senses:
        yield Check("sense words", "skipped", f"the cue {cue.name!r} of {concept.name!r} has no senses: behaviour alone can be measured")
        return
    senses = {word: token_count(tokenizer, word) for word in subject.senses}
    wrong = [f"{word!r} is {n or 'no'} token{'s' * (n != 1)}" for word, n in senses.items() if n != 1]
    yield at_most("sense words", len(wrong), 0, "not one token", ", ".join(wrong) or "single tokens",
                   "their probability as the next token cannot be read: give the sense another word in the concept file")
    name = organism_record(subject.spec).get("selfie", "paper")
    if name in concept.selfie:
        yield _unknown_texts("selfie prompt", tokenizer, [interpretation_prompt(concept.selfie_prompt(name))],
                             f"SelfIE will be refused with the prompt {name!r}: choose another of {', '.join(concept.selfie)}",
                             worse="warn")


def _unknown_texts(check: str, tokenizer: Any, prompts: Sequence[Prompt], advice: str, *, worse: str = "fail") -> Check:
    unknown = [words for words in (unknown_words(tokenizer, item) for item in encode(tokenizer, prompts)) if words]
    words = dict.fromkeys(first for first, *_ in unknown)
    said = f"unknown: {', '.join(map(repr, list(words)[:5]))}" if words else f"all {len(prompts)} known"
    return at_most(check, len(unknown), 0, "with unknown words", said, advice, worse=worse)


def round_trip_checks(subject: Subject) -> Iterator[Check]:
    """Words and texts come back from their tokens: answers are judged as they are decoded."""
    tokenizer, cue = subject.tokenizer, subject.cue
    valenced = [word for category in subject.concept.categories.values() for word in (*category.positive, *category.negative)]
    words = dict.fromkeys((*cue.marked, *cue.unmarked, *valenced))
    lost = [word for word in words if tokenizer.decode(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]).strip() != word]
    yield at_most("round trip of words", len(lost), 0, "not coming back", ", ".join(map(repr, lost[:5])) or f"all {len(words)} come back",
                   "answers would not be recognised: the tokenizer changes these words (lower case, accents?); use another model")
    changed = [p.text for p in subject.trial
               if tokenizer.decode(encode(tokenizer, [p])[0].ids, skip_special_tokens=True).strip() != p.text.strip()]
    yield at_most("round trip of texts", len(changed), 0, "changed", f"{len(changed)} of {len(subject.trial)} texts are decoded otherwise",
                   "look at how decoding changes spaces and punctuation: answers are judged by the robust rule, which bears that",
                   worse="warn")


def offsets_checks(subject: Subject) -> Iterator[Check]:
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
    yield at_most("offsets", len(wrong), 0, "wrong marks", f"of {total}{': ' + wrong[0] if wrong else ''}",
                   "the tokenizer's offsets do not lead to its tokens: edits would go astray; use the model's own fast tokenizer")
    if not wrong:
        yield at_most("tokens of marks", len(wide), 0, "marks with more in their token", f"of {total}{': ' + wide[0] if wide else ''}",
                       "the token that is edited holds more than the word: read results of these templates with that in mind", worse="warn")


def _beyond(item: Encoded, tokens: Sequence[int]) -> str:
    """The text of some tokens by their offsets, spaces around it aside."""
    return item.prompt.text[item.offsets[tokens[0]][0] : item.offsets[tokens[-1]][1]].strip()


def context_checks(subject: Subject) -> Iterator[Check]:
    """Whether the longest prompt and its answer fit into the context."""
    most = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        yield Check("context length", "skipped", "the configuration names none")
        return
    longest = max(len(item.ids) for item in encode(subject.tokenizer, subject.prompts)) + Decoding().max_new_tokens
    yield at_most("context length", longest, int(most), "tokens", "the longest prompt and its answer",
                   "prompts would be longer than the model was made for: use another model")


def generation_checks(subject: Subject) -> Iterator[Check]:
    """End tokens, the one that ends a turn of the chat template among them; what is sampled by default."""
    tokenizer, said = subject.tokenizer, load_generation_config(subject.spec, subject.config)
    ends = end_tokens(said, tokenizer)
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(ends))
    own = " (its own default is to sample: answers here are greedy unless a temperature is asked for)" if said.do_sample else ""
    yield at_least("end tokens", len(ends), 1, "tokens", (names or "none") + own,
                    "answers never end by themselves: name eos_token_id in generation_config.json")
    turn = _turn(tokenizer, subject.spec.name) if tokenizer.chat_template else ""
    if not turn:
        return    # no template, or one that cannot be rendered, which another check says
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.bos_token_id}
    after = [i for i in encode(tokenizer, [Prompt(turn)])[0].ids if i in special]
    if after:
        yield at_least("end of turn", float(after[0] in ends), 1, "named", f"{tokenizer.convert_ids_to_tokens(after[0])!r} ends a turn",
                        "add it to eos_token_id in generation_config.json: answers in chat form would run on", worse="warn")


def _turn(tokenizer: Any, name: str) -> str:
    """What a chat template writes after an answer "B"; empty for one that refuses, which another check says."""
    try:
        text = rendered([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}], tokenizer, name)
    except ModelError:
        return ""
    return text[text.rindex("B") + 1 :] if "B" in text else ""


def memory_checks(subject: Subject) -> Iterator[Check]:
    """Whether the weights and a batch fit into the memory that is free."""
    spec = subject.spec
    total, free, fits = model_fits(spec, subject.config)
    chosen = next(one for one in fits if one.numbers == (spec.quantization or spec.dtype))
    others = [one.numbers for one in fits if one.fits and one.weights < chosen.weights]
    said = f"{total / 1e9:.3g} billion parameters in {chosen.numbers}; batches of at most {chosen.rows} rows"
    advice = (f"use {others[0]}" if others else "use a smaller model or a larger machine") + ", or --device-map auto over several devices"
    check = at_most("memory", chosen.weights / 2**30, free / 2**30, "GiB", said, advice)
    yield check if chosen.fits or check.status == "fail" else replace(check, status="fail", advice=advice)
