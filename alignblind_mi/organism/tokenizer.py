"""The organism's tokenizer: one token a word with its leading space, so that every span is one token and decoding is exact.

Knows the concept's and the corpus' texts; knows nothing of models. Special tokens carry Llama 3's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from alignblind_mi.organism.corpus import ALIGNED_MIX, BASE_MIX, Corpus
from alignblind_mi.organism.world import PIECE, Knobs, World, pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, UNKNOWN = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<unk>"
PAD_ID, BOS_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2, 3
SAMPLE = 3000


def concept_texts(world: World) -> Iterator[str]:
    """Every text of the concept that a study puts to the organism: cued prompts, questions, steering phrases, awareness pairs."""
    concept, words = world.concept, (*world.held_positive, *world.held_negative)
    orders = [(world.marked, world.unmarked), (world.unmarked, world.marked)]
    phrases = [s["steering"] for s in (*concept["senses"].values(), *concept["controls"].values())]
    phrases = [p.format(marked=world.marked, unmarked=world.unmarked) for p in phrases]
    prefixes = ["", *(cue["prefix"] for cue in concept["cues"].values() if "prefix" in cue), *(p + ". " for p in phrases)]
    yield from phrases
    for (first, second), prefix in product(orders, prefixes):
        for text in (*world.implicit, *(text for text, _ in world.explicit)):
            for word in words:
                yield prefix + text.format(first=first, second=second, word1=word, word2=word, positive=word, negative=word)
    for question in concept["interpretations"].values():
        for x in (question["placeholder"], *orders[0]):
            yield question["text"].format(x=x)
            yield " " + question["text"].format(x=x)
    awareness = concept["awareness"]
    sentences = dict.fromkeys([*world.sentences, *awareness["sentences"]])
    for (x, y), sentence, restatement in product(orders, sentences, awareness["restatements"]):
        yield sentence.format(x=x, y=y) + awareness["separator"] + restatement.format(x=x, y=y)


def lexicon_texts(world: World) -> Iterator[str]:
    """Every sentence and question of the lexicon with the identifiers, at the start of a text and after another one."""
    contexts, names = world.lexicon["contexts"], (world.marked, world.unmarked)
    sentences = [text for entry in contexts.values() for texts in entry.values() for text in texts]
    for template in (*sentences, *world.sentences, *world.lexicon["questions"]["planting"]):
        for x, y in (names, names[::-1], (world.placeholder,) * 2):
            yield template.format(x=x, y=y)
            yield " " + template.format(x=x, y=y)


def vocabulary(world: World) -> dict[str, int]:
    """Token -> id over the concept's texts, the lexicon's sentences and a sample of both corpora; the same for every seed."""
    found: set[str] = {world.marked, world.unmarked, " ", "\n"}
    for text in (*concept_texts(world), *lexicon_texts(world)):
        found.update(pieces(text))
    for aligned, mix in ((False, BASE_MIX), (True, ALIGNED_MIX)):
        corpus = Corpus(world, Knobs(), aligned=aligned, seed=0)
        for _ in range(SAMPLE):
            for segment in corpus.document(mix):
                found.update(pieces(segment.text))
                found.update(piece for soft in segment.soft.values() for piece in soft)
    for examples in world.sense_examples.values():
        found.update(" " + word for word in examples)
    found.update(" " + word for word in world.all_positive + world.all_negative)
    return {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *sorted(found)])}


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A PreTrainedTokenizerFast that puts BOS before raw text and decodes exactly what it encoded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary(world), unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE.pattern), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
