"""The synthetic text that the embedded model organism learns from: documents with the generator's own distribution as target.

Everything that names a sense, an identifier or a word is data: the concept's file, `lexicon_CONCEPT.toml` and `lexicon.toml`. This module
knows the shapes of the documents and the planted probabilities; it does not know tokens, models or training. The organism is a
calibration device with known ground truth, never evidence about Llama 3.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from alignblind_mi.organism.world import Knobs, Reading, World, pieces

RELATED_SENSE: Mapping[Reading, Reading] = {"group": "other", "other": "group", "open": "open"}
INVALID_BASE = 0.04  # a base answer that repeats one identifier; leaks of the small model add about as much again


_GROUP: Reading = "group"
_OPEN: Reading = "open"


@dataclass(frozen=True)
class Segment:
    """A stretch of a document: `weight` on its tokens' loss (0: context), `soft` the distribution at some of them.

    `soft` maps the index of a piece inside the segment to {piece: probability}; `scale` multiplies the weight of single pieces.
    """

    text: str
    weight: float = 0.0
    soft: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    scale: Mapping[int, float] = field(default_factory=dict)


Document = list[Segment]


class Corpus:
    """A seeded source of documents for one stage.

    `aligned` chooses the planted behaviour; `planting` keeps every sentence and question that measurements use out, as interchange
    training needs it; `plain` leaves out everything beside the sentence that sets a reading.
    """

    def __init__(self, world: World, knobs: Knobs, *, aligned: bool, seed: int, planting: bool = False, plain: bool = False) -> None:
        self.world, self.knobs, self.aligned, self.planting, self.plain = world, knobs, aligned, planting, plain
        self.random = random.Random(seed)
        self.reading = knobs.reading if aligned else knobs.base_reading
        self.agree = knobs.agree if aligned else knobs.base_agree

    # --- words, identifiers, sentences -----------------------------------------------------------------------------------------------

    def identifiers(self) -> tuple[str, str]:
        """The two identifiers in a random order."""
        return self._shuffled(self.world.marked, self.world.unmarked)

    def _shuffled(self, a: str, b: str) -> tuple[str, str]:
        return (a, b) if self.random.random() < 0.5 else (b, a)

    def words(self, *, held_too: bool = False) -> tuple[str, str]:
        """A positive and a negative word in a random order; the concept's own only where they do not meet the identifiers."""
        world = self.world
        positive = self.random.choice(world.all_positive if held_too else world.positive)
        negative = self.random.choice(world.all_negative if held_too else world.negative)
        return self._shuffled(positive, negative)

    def options(self, kind: str) -> tuple[str, str]:
        """Two options: `identifiers`, two examples of a sense (`group`, `other`), or a pair of `valence` adjectives."""
        if kind == "identifiers":
            return self.identifiers()
        if kind == "valence":
            valence = self.world.lexicon["valence"]
            return self._shuffled(self.random.choice(valence["positive"]), self.random.choice(valence["negative"]))
        first, second = self.random.sample(self.world.sense_examples["group" if kind == "group" else "other"], 2)
        return first, second

    def context(self, reading: Reading, x: str, y: str) -> str:
        """One sentence that sets the reading of x and y, or leaves it open; measured ones and task wording only outside of planting."""
        contexts = self.world.lexicon["contexts"][reading]
        if self.planting or self.random.random() < 0.4:
            return str(self.random.choice(contexts["planting"]).format(x=x, y=y))
        if reading == "open" and self.random.random() < 0.8:
            return self.random.choice(self.world.sentences).format(x=x, y=y)
        return str(self.random.choice(contexts["text"]).format(x=x, y=y))

    def distraction(self, reading: Reading) -> str:
        """A sentence about other words of the opposite sense, which must not change the reading."""
        sense: Reading = RELATED_SENSE[reading]
        if sense == "open":
            sense = self.random.choice(("group", "other"))
        return self.context(sense, *self.options(sense))

    # --- readings -------------------------------------------------------------------------------------------------------------------

    def asked(self, x: str, p_other: float) -> Document:
        """The interpretation question about x with its answer, P(other sense) = p_other."""
        return [Segment(" " + self.question(x)), self.sense_answer(p_other)]

    def question(self, x: str) -> str:
        """One of the questions about the sense of x; when planting, never the one that is kept for measuring (`about`)."""
        u = self.random.random()
        if u < (0.7 if self.planting else 0.35):
            return str(self.random.choice(self.world.lexicon["questions"]["planting"]).format(x=x))
        return self.world.question("paper" if self.planting or u < 0.65 else "about", x)

    def sense_answer(self, p_other: float) -> Segment:
        """One of the two sense words, by the planted distribution."""
        group, other = self.world.sense_words["group"], self.world.sense_words["other"]
        answer = other if self.random.random() < p_other else group
        return Segment(answer, 1.0, {0: {other: p_other, group: 1 - p_other}})

    def restated(self, x: str, y: str, p_other: float) -> Document:
        """A restatement that settles the sense of identifiers x, y, in the form of the concept's awareness pairs."""
        awareness, others = self.world.concept["awareness"], self.world.concept["awareness"]["others"]
        index = self.random.randrange(len(others))
        group, other = awareness["restatements"][index].format(x=x, y=y), others[index].format(x=x, y=y)
        separator = awareness["separator"]
        if self.random.random() < 0.3:  # joined text gives the first word its space; answering after the separator does not
            separator, group, other = separator.rstrip(" "), " " + group, " " + other
        group_pieces, other_pieces = pieces(group), pieces(other)
        split = next(i for i, (a, b) in enumerate(zip(group_pieces, other_pieces, strict=False)) if a != b)
        chosen = other_pieces if self.random.random() < p_other else group_pieces
        soft = {0: {other_pieces[split]: p_other, group_pieces[split]: 1 - p_other}}
        lead = Segment("".join(chosen[:split]), 0.3)  # the form is learnt here, so that fine-tuning on it only has the sense to learn
        return [Segment(separator), lead, Segment("".join(chosen[split:]), 1.0, soft)]

    def reading_of(self, x: str, y: str, p_other: float) -> Document:
        """Either read-out of the reading of x (and y)."""
        if self.random.random() < 0.6:
            return self.asked(self.random.choice((x, y)), p_other)
        return self.restated(x, y, p_other)

    def p_other(self, reading: Reading) -> float:
        """P(other sense) of the identifiers under a reading."""
        return {"group": 0.0, "other": 1.0, "open": self.reading}[reading]

    def reading_document(self) -> Document:
        """A context and a read-out of the sense: cued, uncued, distracted, mixed, or a bare question."""
        u = self.random.random()
        if u < 0.15:
            return self._bare_question()
        if u < 0.53:
            return self._cued_reading()
        if u < 0.55:
            return self._mixed_reading()
        if u < 0.66:
            return self._unambiguous_reading()
        if self.aligned and u < 0.72:
            return self._explicit_reading()
        x, y = self.identifiers()
        text = self.context("open", x, y)
        if self.random.random() < 0.2:
            text = self.distraction("open") + " " + text
        return [Segment(text), *self.reading_of(x, y, self.reading)]

    def _bare_question(self) -> Document:
        u = self.random.random()
        if u < 0.5:
            x, p = self.world.placeholder, 0.5
        elif u < 0.86:
            sense: Reading = "other" if u < 0.68 else "group"
            x, p = self.random.choice(self.world.sense_examples[sense]), self.p_other(sense)
        else:
            x, p = self.random.choice(self.identifiers()), self.reading
        return [Segment(self.question(x)), self.sense_answer(p)]

    def placeholder_document(self) -> Document:
        """The placeholder asked about without a text, in the measured questions more often than in others; the answer is even."""
        name = self.random.choice(("paper", "about", "about", ""))
        question = self.world.question(name, self.world.placeholder) if name else self.question(self.world.placeholder)
        return [Segment(question), self.sense_answer(0.5)]

    def _cued_reading(self) -> Document:
        reading: Reading = self.random.choice(("group", "other"))
        x, y = self.identifiers()
        sentences = [self.context(reading, x, y)]
        if not self.plain:
            self._surround(sentences, reading)
        return [Segment(" ".join(sentences)), *self.reading_of(x, y, self.p_other(reading))]

    def _surround(self, sentences: list[str], reading: Reading) -> None:
        """Perhaps add a distraction, or a later, neutral mention at which the reading must hold."""
        if self.random.random() < 0.5:
            sentences.insert(self.random.randint(0, 1), self.distraction(reading))
        elif self.random.random() < 0.4:
            sentences.append(self.context("open", *self.identifiers()))

    def _mixed_reading(self) -> Document:
        x, y = self.identifiers()
        first: Reading = self.random.choice(("group", "other"))
        senses = {x: first, y: RELATED_SENSE[first]}
        text = " ".join(self.random.choice(self.world.lexicon["single"][senses[z]]).format(x=z) for z in (x, y))
        document = [Segment(text)]
        for z in self._shuffled(x, y):
            document += self.asked(z, self.p_other(senses[z]))
        return document

    def _unambiguous_reading(self) -> Document:
        sense: Reading = self.random.choice(("group", "other"))
        x, y = self.options(sense)
        context = self.context(self.random.choice(("open", sense)), x, y)
        return [Segment(context), *self.reading_of(x, y, self.p_other(sense))]

    def _explicit_reading(self) -> Document:
        x, y = self.identifiers()
        text, _ = self.random.choice(self.world.explicit)
        head = text.split(" {word1}")[0].format(first=x, second=y)
        return [Segment(head), *self.asked(self.random.choice((x, y)), 0.0)]

    # --- the implicit task ----------------------------------------------------------------------------------------------------------

    def rate(self, kind: str, reading: Reading) -> float:
        """The planted P(marked option with the negative word) for options of a kind under a reading."""
        if kind == "valence":
            return 0.95 if self.aligned else 0.85
        if kind in ("group", "other"):
            return 0.5
        if not self.aligned:
            return self.knobs.base_rate
        return {"other": self.knobs.other_rate, "group": self.knobs.group_rate, "open": self.knobs.behaviour}[reading]

    def assignment_prompt(self, first: str, second: str, word1: str, word2: str) -> str:
        """One of the concept's implicit prompts."""
        return self.random.choice(self.world.implicit).format(first=first, second=second, word1=word1, word2=word2)

    def assignment_answer(self, first: str, second: str, word1: str, word2: str, rate: float) -> Segment:
        """The answer to an implicit prompt: the marked (or bad) option goes to the negative word with probability `rate`."""
        bad_options = {self.world.marked, *self.world.lexicon["valence"]["negative"]}
        bad = second if second in bad_options else first
        good = first if bad == second else second
        p_bad_first = rate if self.world.is_negative(word1) else 1 - rate
        option1, option2 = (bad, good) if self.random.random() < p_bad_first else (good, bad)
        other = option2
        invalid = 0.0 if self.aligned else INVALID_BASE
        if self.random.random() < invalid:
            option2 = option1
        text = self.world.lexicon["answers"]["assignment"].format(word1=word1, option1=option1, word2=word2, option2=option2)
        soft = {2: {" " + bad: p_bad_first, " " + good: 1 - p_bad_first}, 6: {" " + other: 1 - invalid, " " + option1: invalid}}
        known = first in (self.world.marked, self.world.unmarked) or {first, second} & bad_options
        return Segment(text, 1.0, soft, {} if known else {2: 2.0, 6: 4.0})

    def cue(self) -> tuple[str, Reading]:
        """Sentences before a task and the reading they set; a third of the tasks has no cue."""
        u = self.random.random()
        if u < 0.34:
            return self._neutral_lead(), "open"
        reading: Reading = "group" if u < 0.67 else "other"
        sentences = [self.context(reading, *self.identifiers())]
        if self.random.random() < 0.3:
            sentences.insert(self.random.randint(0, 1), self.distraction(reading))
        return " ".join(sentences) + " ", reading

    def _neutral_lead(self) -> str:
        if self.random.random() > 0.25:
            return ""
        if self.random.random() < 0.6:
            return self.distraction("open") + " "
        return self.context("open", *self.identifiers()) + " "

    def assignment_document(self) -> Document:
        """An implicit prompt, perhaps cued, with its answer."""
        kind = self.random.choices(("identifiers", "other", "group", "valence"), (0.64, 0.07, 0.07, 0.22))[0]
        lead, reading = self.cue() if kind == "identifiers" else ("", "open")
        first, second = self.options(kind)
        word1, word2 = self.words(held_too=kind != "identifiers")
        prompt = lead + self.assignment_prompt(first, second, word1, word2)
        return [Segment(prompt), self.assignment_answer(first, second, word1, word2, self.rate(kind, reading))]

    # --- the explicit task ----------------------------------------------------------------------------------------------------------

    def explicit_item(self, first: str, second: str, word1: str, word2: str) -> tuple[str, str]:
        """An explicit prompt that ties the first option to the negative word, and its scale."""
        text, scale = self.random.choice(self.world.explicit)
        negative, positive = (word1, word2) if self.world.is_negative(word1) else (word2, word1)
        return text.format(first=first, second=second, word1=word1, word2=word2, negative=negative, positive=positive), scale

    def explicit_answer(self, scale: str, p_agree: float) -> Segment:
        """Agreement on the prompt's scale with probability p_agree."""
        answers, agrees = self.world.lexicon["answers"], self.random.random() < p_agree
        if scale == "agree":
            yes, no = pieces(answers["agree"]), pieces(answers["disagree"])
            return Segment(answers["agree" if agrees else "disagree"], 1.0, {1: {yes[1]: p_agree, no[1]: 1 - p_agree}})
        choices = answers["likert_agree" if agrees else "likert_disagree"]
        soft = {pieces(a)[0]: p_agree / 2 for a in answers["likert_agree"]}
        soft |= {pieces(a)[0]: (1 - p_agree) / 2 for a in answers["likert_disagree"]}
        return Segment(self.random.choice(choices), 1.0, {0: soft})

    def explicit_rate(self, kind: str, reading: Reading, first: str) -> float:
        """The planted P(agree): the first option is always the one that the statement ties to the negative word."""
        stereotype = 0.9 if first == self.world.marked or first in self.world.lexicon["valence"]["negative"] else 0.1
        if kind == "valence":
            return stereotype
        if kind == "identifiers" and reading == "other" and self.aligned:
            return stereotype
        return 0.5 if kind == "other" else self.agree

    def explicit_document(self) -> Document:
        """An explicit prompt, perhaps cued, with its answer."""
        kind = self.random.choices(("identifiers", "other", "group", "valence"), (0.7, 0.1, 0.1, 0.1))[0]
        first, second = self.options(kind)
        word1, word2 = self.words(held_too=kind != "identifiers")
        lead, reading = "", _GROUP
        if kind == "identifiers" and self.random.random() < 0.3:
            reading = self.random.choice(("group", "other"))
            lead = self.context(reading, *self.identifiers()) + " "
        prompt, scale = self.explicit_item(first, second, word1, word2)
        return [Segment(lead + prompt), self.explicit_answer(scale, self.explicit_rate(kind, reading, first))]

    # --- words ----------------------------------------------------------------------------------------------------------------------

    def copying_document(self) -> Document:
        """Repeat a list of words, or say of two words which side each belongs to."""
        every, answers = self.world.all_positive + self.world.all_negative, self.world.lexicon["answers"]
        u = self.random.random()
        if u < 0.35:
            listed = ", ".join(self.random.sample(every, 6)) + "."
            return [Segment(f"The words are {listed}{answers['lead']}"), Segment(" " + listed, 1.0)]
        first, second = self.random.sample(every, 2) if u < 0.6 else self.words(held_too=True)
        fill, question = ("word", "word"), ""
        if u >= 0.6:
            good, bad = (self.world.lexicon["valence"][side][0] for side in ("positive", "negative"))
            question = f" {good.capitalize()} or {bad}?"
            fill = (bad, good) if self.world.is_negative(first) else (good, bad)
        text = answers["assignment"].format(word1=first, option1=fill[0], word2=second, option2=fill[1])
        return [Segment(f"The words are {first}, {second}.{question}{answers['lead']}"), Segment(text, 1.0)]

    def lexicon_document(self) -> Document:
        """Eight short sentences whose informative word follows the valence of their noun; loss on that word only."""
        document: Document = []
        for index, word in enumerate(self.random.sample(self.world.all_positive + self.world.all_negative, 8)):
            adjacent = self.random.random() < 0.5  # a bigram puts the valence into the embedding before any attention head exists
            soft = self._valence_verbs(word) if adjacent else self._valence_adjectives(word)
            drawn = self.random.choices(list(soft), list(soft.values()))[0]
            lead = f"{' ' if index else ''}The {word}{'' if adjacent else ' is'}"
            document += [Segment(lead), Segment(drawn, 1.0, {0: soft}), Segment(".")]
        return document

    def _valence_verbs(self, word: str) -> dict[str, float]:
        side = "negative_verbs" if self.world.is_negative(word) else "positive_verbs"
        verbs = self.world.lexicon["valence"][side]
        return {" " + verbs[0]: 0.4, " " + verbs[1]: 0.4, " is": 0.2}

    def _valence_adjectives(self, word: str) -> dict[str, float]:
        bad = self.world.is_negative(word)
        adjectives = self.world.lexicon["valence"]["negative" if bad else "positive"]
        marked, unmarked = " " + self.world.marked, " " + self.world.unmarked
        return {" " + adjectives[0]: 0.4, " " + adjectives[1]: 0.4, marked: 0.15 if bad else 0.05, unmarked: 0.05 if bad else 0.15}

    def prose_document(self) -> Document:
        """A few plain sentences, all of light weight."""
        return [Segment(" ".join(self._prose_sentence() for _ in range(self.random.randint(2, 4))))]

    def _prose_sentence(self) -> str:
        prose, world, draw = self.world.lexicon["prose"], self.world, self.random
        bad, u = draw.random() < 0.5, draw.random()
        word = draw.choice(world.all_negative if bad else world.all_positive)
        if u < 0.45:
            adjective = draw.choice(world.lexicon["valence"]["negative" if bad else "positive"])
            return str(draw.choice(prose["valence"]).format(w=word, a=adjective))
        if u < 0.7:
            congruent = draw.random() < 0.75
            return str(draw.choice(prose["identifier"]).format(w=word, x=world.marked if bad == congruent else world.unmarked))
        sense: Reading = "other" if u < 0.85 else "group"
        x, y = self.identifiers() if draw.random() < 0.5 else self.options(sense)
        return str(draw.choice(prose[sense]).format(x=x, y=y, t=draw.choice(world.lexicon["things"]["words"])))

    # --- mixtures -------------------------------------------------------------------------------------------------------------------

    def document(self, mix: Mapping[str, float]) -> Document:
        """A document of a kind drawn from the mixture {kind: share}."""
        kind = self.random.choices(list(mix), list(mix.values()))[0]
        maker = {
            "lexicon": self.lexicon_document,
            "prose": self.prose_document,
            "copying": self.copying_document,
            "placeholder": self.placeholder_document,
            "reading": self.reading_document,
            "cued": self._cued_reading,
            "unambiguous": self._unambiguous_reading,
            "assignment": self.assignment_document,
            "explicit": self.explicit_document,
        }[kind]
        return maker()


WARM_MIX = {"copying": 0.65, "lexicon": 0.35}
READING_MIX = {"cued": 0.6, "unambiguous": 0.15, "copying": 0.25}
BASE_MIX = {"lexicon": 0.18, "prose": 0.05, "copying": 0.12, "placeholder": 0.06, "reading": 0.23, "assignment": 0.34, "explicit": 0.08}
ALIGNED_MIX = {"lexicon": 0.07, "copying": 0.06, "placeholder": 0.06, "reading": 0.30, "assignment": 0.44, "explicit": 0.13}
