"""Every instrument on the same sources, held against doing it by hand, and its controls."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from alignblind_mi.instruments.lens import lens_readings, logit_lens, token_marks, train_translators
from alignblind_mi.instruments.patchscope import (
    Affine,
    NormMatched,
    description_prompt,
    fit_affine,
    norm_matched,
    patchscope_rows,
    run_patchscope,
    token_identity_prompt,
)
from alignblind_mi.instruments.probes import Probes, shuffled, train_probes
from alignblind_mi.intervals.clustered import mean_interval
from alignblind_mi.measures import awareness
from alignblind_mi.measures.awareness import (
    blind_interval,
    measure_awareness,
    measure_lens,
    measure_probes,
    measure_selfie,
    n_readings,
    reading_reduction,
    readings_of,
    selfie_table,
    summarise_readings,
)
from alignblind_mi.measures.sources import CONTROLS, control_sources, reading_sources, record_contexts, record_sources
from alignblind_mi.mitigations.steering import sense_steering
from alignblind_mi.models.edits import EditError, Row, Site
from alignblind_mi.models.model import untrained
from alignblind_mi.statistics.rates import relative_change
from alignblind_mi.stimuli.concept import ConceptError
from alignblind_mi.stimuli.prompts import Prompt, implicit_prompts, interpretation_prompt, mark


@pytest.fixture(scope="module")
def recorded(race, tiny):
    return record_sources(tiny, race, "default", controls=CONTROLS)


# ---- sources and controls ----------------------------------------------------------------------------------------------


def test_every_control_is_there_for_every_source(race, recorded):
    counts = pd.Series([source.control for source in recorded.sources]).value_counts()
    assert counts.to_dict() == dict.fromkeys(("", *CONTROLS), 12)
    assert recorded.resid.shape[:2] == (72, 4)


def test_random_vectors_have_the_norms_of_their_sources_and_nothing_else(recorded):
    where = {name: [i for i, source in enumerate(recorded.sources) if source.control == name] for name in ("", "random")}
    real, drawn = (recorded.resid[index] for index in where.values())
    assert torch.allclose(real.norm(dim=-1), drawn.norm(dim=-1), rtol=1e-4)
    assert float(torch.cosine_similarity(real, drawn, dim=-1).abs().mean()) < 0.3


def test_the_wrong_token_is_the_word_before(race, tiny):
    for source in control_sources(race, reading_sources(race, "default"), ["wrong_token"]):
        span = source.prompt.spans("before_identifier")[0]
        assert source.prompt.text[span.start : source.span.start].split() in (["either"], ["or"], ["between"], ["of"])
        (item,) = tiny.encode([source.prompt])
        assert item.positions("before_identifier")[-1] + 1 == item.positions(source.role, occurrence=0)[0]


def test_anchors_are_unambiguous_words_in_the_identifiers_place(race):
    sources = reading_sources(race, "default", mentions=(1,), max_word_pairs=1)
    for name, sense in (("anchor_group", "race"), ("anchor_other", "color")):
        for source, anchor in zip(sources, control_sources(race, sources, [name]), strict=True):
            word = anchor.prompt.text[anchor.span.start : anchor.span.end]
            assert word in race.senses[sense].words
            for role in ("marked", "unmarked", "positive", "negative"):
                old, new = (p.text[s.start : s.end] for p in (source.prompt, anchor.prompt) for s in p.spans(role)[:1])
                assert new == anchor.prompt.labels[role]
                assert (old == new) == (role in ("positive", "negative"))


def test_unknown_controls_and_senses_without_words_are_refused(race):
    with pytest.raises(ConceptError, match="unknown control 'noise'"):
        control_sources(race, reading_sources(race, "default"), ["noise"])
    bare = dataclasses.replace(race, senses={name: dataclasses.replace(sense, words=()) for name, sense in race.senses.items()})
    with pytest.raises(ConceptError, match="an anchor needs two"):
        control_sources(bare, reading_sources(race, "default"), ["anchor_group"])


def test_the_text_control_asks_about_the_identifier_in_plain_words(race, tiny):
    rows = measure_awareness(tiny, race, "default", controls=("text",))
    text = rows[rows["control"] == "text"]
    assert (text["layer"] == -1).all()
    source = reading_sources(race, "default")[0]
    asked = Prompt(f"{source.seen()}. " + race.interpretation("paper").text.format(x=text["identifier"].iloc[0]))
    assert text["p_group"].iloc[0] == pytest.approx(float(tiny.next_probs([Row(asked)], [" race"])[0, 0]), abs=1e-6)
    steered = tiny.under(sense_steering(tiny, race, "default", "race", [1]))    # its prompts may lack the other identifier
    assert len(measure_awareness(steered, race, "default", controls=CONTROLS)) == len(rows) + 12 * 4 * (len(CONTROLS) - 1)


# ---- instruments -------------------------------------------------------------------------------------------------------


def test_instruments_share_their_items(race, tiny):
    keys = ["template", "option_order", "mark", "mention", "context", "control", "layer"]
    first = measure_awareness(tiny, race, "default", controls=("random",))
    for rows in (measure_selfie(tiny, race, "default", controls=("random",), max_new_tokens=2), measure_lens(tiny, race, "default",
                 controls=("random",)), measure_probes(tiny, race, "default", controls=("random",), random_weights=False).rows):
        pd.testing.assert_frame_equal(rows[keys], first[keys])
        assert rows["blind_unchecked" if "no_reading" in rows else "blind"].dropna().between(-1, 1).all()


def test_selfie_fills_all_placeholders_and_goes_on(race, llama3):
    target = interpretation_prompt(race.selfie_prompt("paper"))
    assert len(target.spans("placeholder")) == 5
    rows = measure_selfie(llama3, race, "default", layers=[1], controls=("text",), max_new_tokens=4)
    resid = llama3.record([Row(reading_sources(race, "default")[0].prompt)], [Site(1, "marked", occurrence=0)])[0]
    by_hand = llama3.generate(patchscope_rows(resid, target, 2), 4)[0].text
    assert rows["text"].iloc[0] == by_hand
    table = selfie_table(rows, race)
    assert table["n"].tolist() == [12, 12]
    assert (table[["race", "color", "other"]].sum(axis=1) == table["n"]).all()


def test_sampled_interpretations_are_drawn_for_each_source_alone(race, tiny):
    one, two = (measure_selfie(tiny, race, "default", layers=layers, controls=(), max_new_tokens=6, temperature=1.0)
                for layers in ([1], [0, 1]))
    assert one["text"].tolist() == two.loc[two["layer"] == 1, "text"].tolist()
    assert one["text"].nunique() > 6    # rows of one target prompt do not share their random numbers


def test_the_logit_lens_is_transformer_lens_own(race, tiny):
    from transformer_lens.tools.analysis import logit_lens as theirs

    prompt = implicit_prompts(race, "default")[0]
    rows = logit_lens(tiny, [prompt], [" race", " color"])
    _, tokens = token_marks(tiny, prompt)
    assert rows["token"].drop_duplicates().tolist() == list(dict.fromkeys(tokens))
    (item,) = tiny.encode([prompt])
    ids = torch.tensor([[tiny.token_id(" race"), tiny.token_id(" color")]])
    found = theirs(tiny.bridge, torch.tensor([item.ids]), positions=None, targets=ids[0].tolist(), return_type="log_probs")
    table = rows.pivot_table(index=["layer", "position"], columns="word", values="log_prob")
    values = found.values if hasattr(found, "values") else found.logits
    last = tiny.next_log_probs([Row(prompt)])[0, ids[0]]
    assert table.loc[(3, len(tokens) - 1), [" race", " color"]].to_numpy() == pytest.approx(last.numpy(), abs=1e-4)
    shown = torch.as_tensor(values)[:, 0, 1:]    # [label, position, target], without the BOS
    for layer in range(4):
        mine = table.loc[layer, [" race", " color"]].to_numpy()
        assert min(np.abs(mine - shown[i].numpy()).max() for i in range(len(shown))) < 1e-3


def test_a_zero_translator_is_the_logit_lens_and_training_comes_nearer(race, tiny):
    prompts = implicit_prompts(race, "default", max_word_pairs=1)[:12]
    trained = train_translators(tiny, prompts, steps=60)
    assert (trained.kl_after[:-1] < trained.kl_before[:-1]).all()
    assert float(trained.kl_before[-1]) == pytest.approx(0, abs=1e-5)
    zero = dataclasses.replace(trained, weight=torch.zeros_like(trained.weight), bias=torch.zeros_like(trained.bias))
    resid = torch.randn(3, 4, tiny.d_model)
    plain = lens_readings(tiny, resid, range(4), [" race"])
    assert torch.allclose(lens_readings(tiny, resid, range(4), [" race"], zero), plain)
    assert lens_readings(tiny, resid[:, 2:], [2, 3], [" race"], zero).shape == (3, 2, 1)
    with pytest.raises(EditError, match="no translator for layer 9"):
        zero.at([9])
    again = train_translators(tiny, prompts, steps=60)
    assert torch.equal(again.weight, trained.weight)


def test_probes_find_what_is_there_and_control_tasks_do_not():
    random = torch.Generator().manual_seed(0)
    labels = np.arange(200) % 2 == 0
    resid = torch.randn(200, 2, 30, generator=random)
    resid[:, 1, 3] += torch.tensor(np.where(labels, 2.0, -2.0), dtype=torch.float)    # layer 1 has a direction, layer 0 has none
    groups = [str(i // 4) + str(label) for i, label in enumerate(labels)]
    probes = train_probes(resid[:100], labels[:100], [0, 1])
    accuracy = probes.accuracy(resid[100:], labels[100:])
    assert accuracy[1] > 0.9
    assert accuracy[0] < 0.65
    scores = probes.scores(resid[:100])
    assert scores[labels[:100]].mean(0) == pytest.approx([1, 1], abs=1e-4)
    assert scores[~labels[:100]].mean(0) == pytest.approx([-1, -1], abs=1e-4)
    between = torch.zeros(1, 2, 30)
    reading = probes.readings(between, resid[100:], labels[100:])
    assert abs(reading[0, 1]) < 0.3
    drawn = shuffled(labels, groups, 0)
    assert drawn.sum() == labels.sum()
    assert (drawn != labels).any()
    with pytest.raises(EditError, match="at least two examples"):
        train_probes(resid[:3], np.array([True, False, False]), [0, 1])


def test_probes_are_trained_and_tested_on_other_sentences(race, tiny):
    train, test = (record_contexts(tiny, race, "default", [0, 1], split) for split in ("train", "test"))
    assert not set(train.sentences) & set(test.sentences)
    assert len(train.labels) == 16 * 12
    assert train.labels.mean() == test.labels.mean() == 0.5
    found = measure_probes(tiny, race, "default")
    assert set(found.accuracy["probe"]) == {"sense", "shuffled", "untrained", "bag_of_words"}
    sense = found.accuracy[found.accuracy["probe"] == "sense"]
    controls = found.accuracy[found.accuracy["probe"] != "sense"].groupby("layer")["accuracy"].max()
    assert sense["selectivity"].to_numpy() == pytest.approx(sense["accuracy"].to_numpy() - controls.to_numpy())
    assert (found.accuracy.loc[found.accuracy["probe"] == "bag_of_words", "accuracy"] == 0.5).all()
    with pytest.raises(ConceptError, match="no sentences that settle the sense 'race'"):
        measure_probes(tiny, dataclasses.replace(race, contexts={}), "default")


def test_a_layer_that_does_not_beat_its_stronger_control_gives_no_reading(race, tiny, monkeypatch):
    found = measure_probes(tiny, race, "default", layers=[0, 1], controls=(), random_weights=False)
    assert found.rows["blind"].isna().all(), "a random model has no senses"
    assert found.rows["no_reading"].str.contains("is not above its stronger control").all()
    shown = summarise_readings(found.rows, ("layer",))
    assert shown["n"].tolist() == [0, 0]
    assert shown["mean"].isna().all(), "and not 0"
    monkeypatch.setattr(Probes, "accuracy", lambda self, resid, labels: np.ones(resid.shape[1]))
    monkeypatch.setattr(Probes, "readings", lambda self, resid, *given: np.full(resid.shape[:2], 0.5))
    monkeypatch.setattr(awareness, "bag_of_words", lambda *given: 1.0)    # as good as the words of the sentence is not better
    rows = measure_probes(tiny, race, "default", layers=[0, 1], controls=(), random_weights=False).rows
    assert rows["no_reading"].str.contains(r"the words of the sentence \(100%\)").all()
    monkeypatch.setattr(awareness, "bag_of_words", lambda *given: 0.5)
    monkeypatch.setattr(awareness, "_control_accuracy", lambda *given: np.array([0.5, 0.9]))
    rows = measure_probes(tiny, race, "default", layers=[0, 1], controls=(), random_weights=False).rows
    assert (rows.loc[rows["layer"] == 0, "no_reading"] == "").all()
    assert rows.loc[rows["layer"] == 0, "blind"].equals(rows.loc[rows["layer"] == 0, "blind_unchecked"])
    assert rows.loc[rows["layer"] == 1, "no_reading"].str.contains(r"drawn labels \(90%\)").all()


def test_an_untrained_model_has_the_architecture_and_other_weights(tiny, race):
    fresh, again = untrained(tiny, seed=1), untrained(tiny, seed=1)
    prompt = Row(implicit_prompts(race, "default")[0])
    one = fresh.next_log_probs([prompt])
    assert torch.equal(one, again.next_log_probs([prompt]))
    assert (one - tiny.next_log_probs([prompt])).abs().max() > 1e-3
    assert (fresh.n_layers, fresh.d_model) == (tiny.n_layers, tiny.d_model)


# ---- patchscopes in general --------------------------------------------------------------------------------------------


def test_ranks_are_those_of_the_whole_vocabulary(race, tiny):
    rows = [Row(p) for p in implicit_prompts(race, "default")[:5]]
    logs = tiny.next_log_probs(rows)
    ranks = tiny.next_ranks(rows, [" race", " color"])
    order = logs.argsort(-1, descending=True)
    for i in range(5):
        assert [int(order[i, rank]) for rank in ranks[i]] == [tiny.token_id(" race"), tiny.token_id(" color")]


def test_a_patchscope_reads_probabilities_ranks_and_text(race, tiny, llama3):
    prompts = implicit_prompts(race, "default")[:3]
    target = interpretation_prompt(race.interpretation("paper"))
    sites = [Site(layer, "marked", occurrence=0) for layer in (0, 2)]
    table = run_patchscope(tiny, prompts, sites, target, 1, words=[" race"], max_new_tokens=3)
    assert table["source_layer"].tolist() == [0, 2] * 3
    resid = tiny.record([Row(p) for p in prompts], sites)
    rows = patchscope_rows(resid[1], target, 1)
    assert table["p_race"].iloc[2:4].to_numpy() == pytest.approx(tiny.next_probs(rows, [" race"])[:, 0].numpy(), abs=1e-6)
    assert table["base_race"].iloc[0] == pytest.approx(float(tiny.next_probs([Row(target)], [" race"])[0, 0]), abs=1e-6)
    assert table["text"].iloc[2] == tiny.generate(rows, 3)[0].text
    for prompt in (token_identity_prompt(), description_prompt()):
        (item,) = llama3.encode([prompt])
        assert len(item.positions("placeholder")) == 1


def test_one_model_can_be_read_by_another(race, tiny):
    other = untrained(tiny, seed=3)
    prompts = implicit_prompts(race, "default")[:2]
    target = interpretation_prompt(race.interpretation("paper"))
    sites = [Site(1, "marked", occurrence=0)]
    table = run_patchscope(tiny, prompts, sites, target, 1, into=other, words=[" race"])
    resid = tiny.record([Row(p) for p in prompts], sites)[:, 0]
    by_hand = other.next_probs(patchscope_rows(resid, target, 1), [" race"])[:, 0]
    assert table["p_race"].to_numpy() == pytest.approx(by_hand.numpy(), abs=1e-6)


def test_mappings(race, tiny):
    x = torch.randn(400, 6)
    weight, bias = torch.randn(5, 6), torch.randn(5)
    fitted = fit_affine(x, x @ weight.T + bias, ridge=1e-9)
    assert isinstance(fitted, Affine)
    assert torch.allclose(fitted.weight, weight, atol=1e-3)
    assert torch.allclose(fitted(x), x @ weight.T + bias, atol=1e-3)
    with pytest.raises(EditError, match="two or more"):
        fit_affine(x[:1], x[:1])
    target = interpretation_prompt(race.interpretation("paper"))
    matched = norm_matched(tiny, target, 1)
    own = tiny.record([Row(target)], [Site(1, "placeholder")])[0, 0]
    assert isinstance(matched, NormMatched)
    assert matched(torch.randn(3, tiny.d_model)).norm(dim=-1).numpy() == pytest.approx(float(own.norm()), rel=1e-5)
    (row,) = patchscope_rows(torch.ones(1, tiny.d_model), target, 1, mapping=lambda resid: 2 * resid)
    assert torch.equal(row.edits[0].vector, torch.full((tiny.d_model,), 2.0))


# ---- summaries ---------------------------------------------------------------------------------------------------------


def test_summaries_count_readings_and_take_contexts_and_templates_as_the_units(race, tiny):
    rows = measure_awareness(tiny, race, "default")
    table = summarise_readings(rows)
    assert table["control"].tolist() == ["", *CONTROLS]
    assert (table["n"] == 12).all()
    real = readings_of(rows)
    assert n_readings(real) == 12
    low, high = mean_interval(real["blind"].to_numpy(), [real["context"].to_numpy(), real["template"].to_numpy()])
    assert (table["low"].iloc[0], table["high"].iloc[0]) == (max(low, -2), min(high, 2))
    assert real["template"].nunique() > 1
    profile = summarise_readings(real, by=("layer",))
    assert profile["mean"].mean() == pytest.approx(real["blind"].mean())


def test_texts_that_all_agree_do_not_make_an_interval_without_width():
    rows = pd.DataFrame([{"context": f"c{i}", "template": f"t{i % 2}", "mark": "x", "mention": 0, "identifier": "a", "layer": layer,
                          "blind": 1.0} for i in range(6) for layer in range(4)])
    low, high = blind_interval(rows)
    z2 = 1.959964**2
    assert (1 - low, high - 1) == pytest.approx((z2 / 6, z2 / 6))    # six readings, not 24
    assert blind_interval(rows.assign(blind=0.5)) == (0.5, 0.5)    # a number, no label: it can be exact
    wide = blind_interval(rows.assign(blind=[1.0, -1.0] * 12))
    assert wide.low < 0 < wide.high


def test_a_reduction_is_the_ratio_of_means_with_contexts_drawn_together(race, tiny):
    rows = measure_awareness(tiny, race, "default")
    half = rows.assign(p_group=rows["p_group"] / 2)
    found = reading_reduction(half, rows)
    assert found["n"] == 6    # contexts: both identifiers of a question belong together
    assert (found["estimate"], found["low"], found["high"]) == pytest.approx((-0.5, -0.5, -0.5))
    with pytest.raises(Exception, match="share no value of 'unit'"):
        relative_change(rows.assign(unit="a"), rows.assign(unit="b"), "p_group", "unit")
    assert mark("a b", x="b").text == "a b"


# ---- protocols ---------------------------------------------------------------------------------------------------------


def test_selfie_of_the_paper_reads_and_writes_what_enters_a_layer(race, llama3, llama3_folder):
    """Against plain hooks: SelfIE's code puts hidden_states[l] (0: the embedding) into what enters block k, at five placeholders."""
    from transformers import AutoModelForCausalLM

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(llama3_folder, dtype=torch.float32).eval(), llama3.tokenizer
    rows = measure_selfie(llama3, race, "default", layers=[0, 2], controls=(), max_new_tokens=3, max_word_pairs=1, protocol="paper")
    sources = reading_sources(race, "default", max_word_pairs=1, protocol="paper")
    assert len(rows) == 2 * len(sources)
    assert {source.mention for source in sources} == {0, 1}
    published = {f"Question: {p.text}" for p in implicit_prompts(race, "default", design="published", max_word_pairs=1)}
    assert {source.prompt.text for source in sources} <= published
    target = interpretation_prompt(race.selfie_prompt("paper"))
    (item,) = llama3.encode([target])
    places, ids = item.positions("placeholder", "all"), list(item.ids)
    for source in (sources[0], sources[-1]):
        row = rows[(rows["context"] == source.labels()["context"]) & (rows["mark"] == source.role) & (rows["mention"] == source.mention)]
        seen = tokenizer(source.seen())["input_ids"]    # a causal model's state there depends on nothing behind it
        with torch.no_grad():
            states = plain(torch.tensor([seen]), output_hidden_states=True).hidden_states
        for layer, text in zip(row["layer"], row["text"], strict=True):
            def put(module, args, kwargs, vector=states[layer][0, -1]):
                hidden = (args[0] if args else kwargs["hidden_states"]).clone()
                hidden[0, places] = vector
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

            hook, written = plain.model.layers[2].register_forward_pre_hook(put, with_kwargs=True), list(ids)
            with torch.no_grad():
                for _ in range(3):
                    written.append(int(plain(torch.tensor([written]), use_cache=False).logits[0, -1].argmax()))
            hook.remove()
            assert tokenizer.decode(written[len(ids) :]) == text


def test_best_reads_first_mentions_where_they_leave_a_layer(race, tiny):
    assert [s.seen() for s in reading_sources(race, "default")] == [s.seen() for s in reading_sources(race, "default", mentions=(0,))]
    best, paper = (record_sources(tiny, race, "default", layers=[1], max_word_pairs=1, protocol=name) for name in ("best", "paper"))
    assert (best.stream, paper.stream) == ("resid_post", "resid_pre")
    assert {source.mention for source in best.sources} == {0}
    assert all(source.prompt.text.startswith("Question: ") for source in paper.sources)
