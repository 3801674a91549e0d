"""The embedded pairs: their texts, tokenizers, what was kept out of their planting, their shipped checkpoints and their build."""

import itertools
import json

import pytest
import torch

from alignblind_mi.models.embedded import ROLES, OrganismError, organism_info, organism_names, organism_pairs, organism_path
from alignblind_mi.organism.build import DEFAULT_SEED, RECIPE, RECOMMENDED_LORA, Recipe, build_organism, knows
from alignblind_mi.organism.corpus import ALIGNED_MIX, BASE_MIX, Corpus, Segment
from alignblind_mi.organism.gates import check, load_subject, measure
from alignblind_mi.organism.interchange import ALL, FIRST, SECOND, PatchRows, Planting, identifier_positions
from alignblind_mi.organism.tokenizer import BOS, BOS_ID, UNKNOWN_ID, build_tokenizer, concept_texts
from alignblind_mi.organism.training import batch_loss, collate, encode, make_model, orthogonalised, run_blocks
from alignblind_mi.organism.world import Knobs, lexicon_names, load_lexicon, load_world, pieces
from alignblind_mi.stimuli.concept import former_digests, load_concept
from alignblind_mi.stimuli.prompts import assignments, explicit_prompts, implicit_prompts, interpretation_prompt, steering_prompt

PAIRS = {organism_info(pair)["concept"]: pair for pair in organism_pairs()}


@pytest.fixture(scope="module", params=sorted(PAIRS))
def world(request):
    return load_world(request.param)


@pytest.fixture(scope="module")
def concept(world):
    return load_concept(world.concept["name"])


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


def of_pair(concept, role):
    """The name of the shipped model of a role that was trained on the concept."""
    return "-".join(part for part in (PAIRS[concept.name], role) if part)


def prefixed(concept):
    """The concept's cue that asks for the other sense."""
    return next(name for name, cue in concept.cues.items() if cue.prefix)


def study_texts(concept):
    """What a study asks, built by the project's own prompt makers."""
    for cue in ("default", prefixed(concept)):
        for design in ("published", "balanced"):
            for prompt in implicit_prompts(concept, cue, design=design):
                yield prompt.text
                yield from (prompt.text + answer + "." for answer in assignments(concept, prompt))
            yield from (prompt.text for prompt in explicit_prompts(concept, cue, design=design))
    yield from (interpretation_prompt(question).text for question in concept.interpretations.values())
    names = [*concept.senses, *concept.controls]
    yield from (steering_prompt(concept, concept.cue("default"), name).text for name in names)


def text_of(document):
    return "".join(segment.text for segment in document)


# --- tokenizer -------------------------------------------------------------------------------------------------------------------------


def test_every_study_text_has_no_unknown_word_and_decodes_exactly(concept, tokenizer):
    texts = sorted(set(study_texts(concept)))
    assert len(texts) > 2000
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == BOS_ID
        assert UNKNOWN_ID not in ids
        assert tokenizer.decode(ids) == BOS + text


def test_awareness_pairs_and_answers_have_no_unknown_word(world, tokenizer):
    answers = world.lexicon["answers"]
    texts = [*concept_texts(world), *answers["likert_agree"], *answers["likert_disagree"], answers["agree"], answers["disagree"]]
    assert not [text for text in texts if UNKNOWN_ID in tokenizer(text)["input_ids"]]


def test_offsets_cover_the_text_and_identifiers_are_single_tokens(world, concept, tokenizer):
    prompt = implicit_prompts(concept, prefixed(concept))[0]
    encoded = tokenizer(prompt.text, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"][1:]
    assert "".join(prompt.text[a:b] for a, b in offsets) == prompt.text
    for mark, word in (("marked", world.marked), ("unmarked", world.unmarked)):
        for span in prompt.spans(mark):
            inside = [prompt.text[a:b] for a, b in offsets if a < span.end and b > span.start]
            assert [piece.strip() for piece in inside] == [word]


def test_prompt_and_answer_tokenise_as_they_are_generated(concept, tokenizer):
    prompt = implicit_prompts(concept, "default")[0]
    answer = assignments(concept, prompt)[0]
    joined = tokenizer(prompt.text + answer)["input_ids"]
    assert joined == tokenizer(prompt.text)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]


def test_refused_identifiers_are_unknown(concept, tokenizer):
    for name in ("uppercase", "names"):
        for identifier in concept.cue(name).marked:
            assert UNKNOWN_ID in tokenizer(" " + identifier)["input_ids"]


# --- corpus ----------------------------------------------------------------------------------------------------------------------------


def test_a_lexicon_has_its_tables_and_shares_the_text_without_a_sense():
    lexicons = [load_lexicon(name) for name in lexicon_names()]
    assert all(list(lexicon) == list(lexicons[0]) for lexicon in lexicons)
    assert all(lexicon["contexts"]["open"] == lexicons[0]["contexts"]["open"] for lexicon in lexicons)
    assert len({str(lexicon["contexts"]["group"]) for lexicon in lexicons}) == len(lexicons)


@pytest.mark.parametrize(("aligned", "mix"), [(False, BASE_MIX), (True, ALIGNED_MIX)])
def test_held_out_words_never_meet_the_identifiers_in_a_task(world, aligned, mix):
    corpus, held = Corpus(world, Knobs(), aligned=aligned, seed=3), set(world.held_positive + world.held_negative)
    tasks, seen = 0, set()
    for _ in range(4000):
        words = [piece.strip() for piece in pieces(text_of(corpus.document(mix)))]
        seen |= held & set(words)
        if "Answer" in words and {world.marked, world.unmarked} & set(words):
            tasks += 1
            assert not held & set(words), " ".join(words)
    assert tasks > 500
    assert seen == held  # they are taught, as words


def test_interchange_rows_keep_measured_texts_and_words_out(world):
    contexts, concept = world.lexicon["contexts"], world.concept
    measured = [entry["steering"].split(":")[0] + ":" for entry in (*concept["senses"].values(), *concept["controls"].values())]
    orders = [{"x": world.marked, "y": world.unmarked}, {"x": world.unmarked, "y": world.marked}]
    measured += [t.format(**order) for reading in contexts.values() for t in reading["text"] for order in orders]
    about = concept["interpretations"]["about"]["text"].split(" {x} ")[1]
    held = set(world.held_positive + world.held_negative)
    for aligned in (False, True):
        rows = PatchRows(world, Knobs(), Planting(), aligned=aligned, seed=1)
        drawn = [rows.identifiers(effect=k % 2 == 0) for k in range(800)] + [rows.placeholder() for _ in range(400)]
        for row in drawn:
            full = row.source + "\n" + text_of(row.document)
            assert not [phrase for phrase in measured if phrase in full]
            assert about not in full
            assert not held & {piece.strip() for piece in pieces(full)}
            assert not [t for t in world.implicit if t.split("{first}")[0] in row.source]


def test_a_pair_of_mentions_is_patched_in_uncued_tasks_only(world, tokenizer):
    vocabulary = tokenizer.get_vocab()
    tokens = {vocabulary[lead + name]: name for name in (world.marked, world.unmarked) for lead in ("", " ")}
    rows = PatchRows(world, Knobs(), Planting(), aligned=True, seed=1)
    drawn = [row for row in (rows.identifiers(effect=True) for _ in range(800)) if row.mentions != ALL]
    assert {row.mentions for row in drawn} == {FIRST, SECOND}
    for row in drawn:
        found = identifier_positions(encode(row.document, vocabulary, 0.0), tokens)
        assert len(found) == 4
        assert {name for _, name in found[slice(*row.mentions)]} == {world.marked, world.unmarked}


def test_planting_sentences_are_neither_measured_nor_awareness_sentences(world):
    contexts = world.lexicon["contexts"]
    planting = {t for reading in contexts.values() for t in reading["planting"]}
    assert not planting & {t for reading in contexts.values() for t in reading["text"]}
    assert not planting & {*world.sentences, *world.concept["awareness"]["sentences"]}


def test_planted_rates_are_the_generators_own(world):
    corpus = Corpus(world, Knobs(), aligned=False, seed=0)
    stereotyped = invalid = total = 0
    for _ in range(6000):
        first, second = corpus.identifiers()
        word1, word2 = corpus.words()
        answer = corpus.assignment_answer(first, second, word1, word2, corpus.rate("identifiers", "open")).text
        given = [piece.strip() for piece in pieces(answer)]
        options = {given[0]: given[2], given[4]: given[6]}
        negative = word1 if world.is_negative(word1) else word2
        invalid += len(set(options.values())) == 1
        stereotyped += len(set(options.values())) == 2 and options[negative] == world.marked
        total += 1
    assert invalid / total == pytest.approx(0.04, abs=0.01)
    assert stereotyped / (total - invalid) == pytest.approx(0.64, abs=0.02)


def test_soft_targets_are_distributions_that_contain_what_was_written(world):
    for aligned, mix in ((False, BASE_MIX), (True, ALIGNED_MIX)):
        corpus = Corpus(world, Knobs(), aligned=aligned, seed=5)
        for segment in itertools.chain.from_iterable(corpus.document(mix) for _ in range(1500)):
            written = pieces(segment.text)
            for index, soft in segment.soft.items():
                assert sum(soft.values()) == pytest.approx(1)
                assert soft.get(written[index], 0) > 0


def test_knobs_are_probabilities():
    with pytest.raises(OrganismError, match=r"reading is 1\.5"):
        Knobs(reading=1.5)


# --- training --------------------------------------------------------------------------------------------------------------------------


def test_run_blocks_is_the_models_own_forward_and_padding_is_harmless(world, tokenizer):
    torch.manual_seed(0)
    model = make_model(len(tokenizer))
    texts = (f"Random: {world.marked} and {world.unmarked}", "The words are for each of them.")
    short, long = (tokenizer(text)["input_ids"] for text in texts)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(short), torch.tensor(long)], batch_first=True)
    with torch.no_grad():
        ours = model.lm_head(model.model.norm(run_blocks(model, ids)))
        for row, one in enumerate((short, long)):
            torch.testing.assert_close(ours[row, : len(one)], model(torch.tensor([one])).logits[0], atol=1e-5, rtol=1e-4)


def test_loss_is_the_cross_entropy_against_the_soft_target(world, tokenizer):
    torch.manual_seed(0)
    model, vocabulary = make_model(len(tokenizer)), tokenizer.get_vocab()
    soft = {world.sense_words["group"]: 0.25, world.sense_words["other"]: 0.75}
    document = [Segment(world.question("about", world.placeholder)), Segment(world.sense_words["group"], 1.0, {0: soft})]
    encoded = encode(document, vocabulary, 0.0)
    ids = encoded.ids[: encoded.context_length]
    with torch.no_grad():
        full = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        wanted = -sum(p * full[len(ids) - 1, vocabulary[w]] for w, p in soft.items()) - full[len(ids), tokenizer.eos_token_id]
        assert float(batch_loss(model, collate([encoded]))) == pytest.approx(float(wanted) / 2, rel=1e-4)


def test_identifier_positions_are_those_of_the_context_only(world, tokenizer):
    vocabulary = tokenizer.get_vocab()
    encoded = encode([Segment(f"Pick {world.marked} ({world.unmarked})."), Segment(" " + world.marked, 1.0)], vocabulary, 0.0)
    tokens = {vocabulary[lead + name]: name for name in (world.marked, world.unmarked) for lead in ("", " ")}
    assert [name for _, name in identifier_positions(encoded, tokens)] == [world.marked, world.unmarked]


@pytest.mark.parametrize("shape", [(3, 32, 96), (3, 96, 32)])
def test_orthogonalised_matrices_keep_directions_and_level_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3
    torch.testing.assert_close(u.mT @ orthogonalised(matrices) @ v.mT, torch.diag_embed((u.mT @ orthogonalised(matrices) @ v.mT).diagonal(dim1=1, dim2=2)), atol=1e-3, rtol=0)  # noqa: E501


@pytest.mark.slow
def test_smoke_build_is_complete_and_deterministic(tmp_path):
    recipe = Recipe().shortened(3)
    reports = [build_organism(tmp_path / name, seed=5, recipe=recipe, pairs=1) for name in "ab"]
    for name in ROLES:
        a, b = ((tmp_path / run / name / "model.safetensors").read_bytes() for run in "ab")
        assert a == b
    assert (tmp_path / "a/base/model.safetensors").read_bytes() != (tmp_path / "a/aligned/model.safetensors").read_bytes()
    assert reports[0].info == reports[1].info
    assert json.loads((tmp_path / "a/organism.json").read_text())["gates"] == reports[0].info["gates"]
    assert not reports[0].passed  # three steps plant nothing, and the gates say so
    assert "another seed" in str(reports[0])


# --- the shipped pair ------------------------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused_and_the_known_ones_named():
    with pytest.raises(OrganismError, match="there is no embedded model 'instruct'") as caught:
        organism_path("instruct")
    assert {f"organism:{name}" for name in organism_names()} <= {word.strip(",.") for word in str(caught.value).split()}
    with pytest.raises(OrganismError, match="there is no embedded pair 'instruct'"):
        organism_info("instruct")
    with pytest.raises(OrganismError, match=r"no organism can be trained on the concept 'instruct'.*Known: .*race"):
        load_world("instruct")


def test_a_pair_is_shipped_for_every_lexicon():
    assert sorted(PAIRS) == lexicon_names()
    assert set(organism_names()) == {"-".join(filter(None, (pair, role))) for pair in organism_pairs() for role in ROLES}


def test_record_tells_what_a_reader_needs(world, concept):
    info = organism_info(PAIRS[concept.name])
    assert "never evidence" in info["note"]
    assert info["decoding"] == "sample"
    assert info["target_layer"] == Planting().target
    assert (info["recipe"], info["seed"]) == (RECIPE, DEFAULT_SEED)
    assert info["lora"] == RECOMMENDED_LORA
    assert info["cues"]["accepted"] == ["default", prefixed(concept)]
    assert set(info["cues"]["refused"]) == {name for name in concept.cues if not knows(world, name)} == {
        *concept.cues} - {"default", prefixed(concept)}
    assert info["concept"] == concept.name
    assert info["concept_digest"] in former_digests(concept.name), "the version that it was built from: only contexts are new since"


def test_shipped_tokenizer_is_the_recipes(concept, tokenizer):
    from transformers import AutoTokenizer

    for role in ROLES:
        assert AutoTokenizer.from_pretrained(organism_path(of_pair(concept, role))).get_vocab() == tokenizer.get_vocab()


@pytest.fixture(scope="module")
def shipped(concept):
    torch.set_num_threads(1)
    subjects = {role: load_subject(organism_path(of_pair(concept, role))) for role in ROLES}
    assert all(subject.concept == concept for subject in subjects.values())
    return {role: measure(subject, Planting(), pairs=6, subset=3, windows=False) for role, subject in subjects.items()}


def test_shipped_pair_passes_every_gate(shipped, concept):
    info = organism_info(PAIRS[concept.name])
    gates = check(shipped["base"], shipped["aligned"], Knobs(**info["knobs"]), Planting(), concept)
    assert [gate.name for gate in gates] == [gate["name"] for gate in info["gates"]]
    assert not [gate for gate in gates if not gate.passed]
    assert info["gates_passed"]


def test_gates_notice_an_exchanged_pair(shipped, concept):
    failed = {gate.name for gate in check(shipped["aligned"], shipped["base"], Knobs(), Planting(), concept) if not gate.passed}
    assert {"base implicit rate", "aligned implicit rate", "base r_blind, paper", "aligned r_blind, about"} <= failed
