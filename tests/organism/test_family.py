"""The calibration family: its members, what was kept out of their planting, their cache and their build."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from alignblind_mi.models.embedded import OrganismError, organism_path
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelSpec
from alignblind_mi.organism.checks import measure_member, member_gates, probe_accuracy
from alignblind_mi.organism.corpus import Segment
from alignblind_mi.organism.family import (
    KNOBS,
    build_family,
    cache_folder,
    calibration_family,
    family_digest,
    member_path,
    parent_path,
    planted_member,
)
from alignblind_mi.organism.gates import load_subject
from alignblind_mi.organism.interchange import PatchRows, identifier_tokens
from alignblind_mi.organism.members import (
    BLOCKS,
    FamilyRecipe,
    Member,
    MemberRows,
    SenseProbes,
    mention_states,
    probe_sources,
)
from alignblind_mi.organism.training import encode
from alignblind_mi.organism.world import Knobs, load_world, pieces
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies.config import StudyConfig, organism_record

TINY = replace(FamilyRecipe().shortened(2), probe_rows=4)
FAMILY = calibration_family()
FIRST = calibration_family((0,))


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def shipped():
    return load_subject(organism_path("aligned"))


def of_kind(kind):
    return next(member for member in FIRST if member.kind == kind)


# --- members -----------------------------------------------------------------------------------------------------------------------------


def test_names_tell_members_apart_and_are_folder_names():
    names = [member.name for member in FAMILY]
    assert len(set(names)) == len(names) == 27
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)
    member = of_kind("knobs")
    others = [replace(member, other_rate=0.9), replace(member, group_rate=0.4), replace(member, none=(6, 7)), replace(member, seed=4)]
    assert len({member.name, *(other.name for other in others)}) == 5


def test_knob_ranks_are_uncorrelated_and_quick_is_a_shorter_family():
    ranks = np.argsort(np.argsort(np.array(KNOBS), axis=0), axis=0)
    assert abs(np.corrcoef(ranks.T)[0, 1]) <= 0.11
    quick = calibration_family(quick=True)
    assert [member.kind for member in quick] == ["knobs"] * 3 + ["null", "decodable", "depth"]
    assert {replace(member, quick=False) for member in quick} < set(FIRST)
    assert len({member.name for member in (*quick, *FAMILY)}) == len(quick) + len(FAMILY)
    recipe = FamilyRecipe()
    assert all(recipe.stage_of(member).steps < recipe.stage_of(replace(member, quick=False)).steps for member in quick)


def test_members_whose_behaviour_goes_against_their_reading_train_longer():
    recipe = FamilyRecipe()
    far = [member for member in FIRST if member.kind == "knobs" and recipe.stage_of(member).steps > recipe.stage.steps]
    assert [(member.reading, member.behaviour) for member in far] == [KNOBS[1], KNOBS[3]]


def test_onset_and_blind_blocks():
    assert [of_kind(kind).onset for kind in ("knobs", "shallow", "depth", "decodable")] == [1, 1, 3, None]
    assert of_kind("knobs").blind == ()
    assert of_kind("shallow").blind == (0,)
    assert of_kind("depth").blind == (0, 1)
    assert of_kind("decodable").blind == tuple(range(BLOCKS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "unheard"}, "unknown kind 'unheard'"),
        ({"seed": -1}, "seed"),
        ({"reading": 1.2}, "reading is 1.2"),
        ({"effect": (1, 5)}, "different blocks"),
        ({"none": (5, 9)}, "different blocks"),
        ({"none": (7,)}, "without effect before block 7"),
    ],
)
def test_impossible_members_are_refused(change, message):
    with pytest.raises(OrganismError, match=message):
        replace(of_kind("knobs"), **change)


def test_a_family_needs_a_seed_and_a_job():
    with pytest.raises(OrganismError, match="at least one seed"):
        calibration_family(())
    with pytest.raises(OrganismError, match="at least one job"):
        build_family(FIRST, jobs=0)


# --- what is planted ---------------------------------------------------------------------------------------------------------------------


def drawn_rows(world, member, count=300):
    planting = FamilyRecipe().planting_of(member)
    rows = MemberRows(world, member.knobs, planting, aligned=True, seed=3)
    tasks = [row for _ in range(count // 20) for row in rows.tasks()]
    return rows, tasks, [rows.placeholder() for _ in range(count)]


@pytest.mark.parametrize("member", FIRST, ids=lambda m: m.name)
def test_planting_keeps_measured_phrases_and_words_out(world, member):
    contexts, concept = world.lexicon["contexts"], world.concept
    orders = [{"x": world.marked, "y": world.unmarked}, {"x": world.unmarked, "y": world.marked}]
    measured = [entry["steering"].split(":")[0] + ":" for entry in (*concept["senses"].values(), *concept["controls"].values())]
    measured += [t.format(**order) for reading in contexts.values() for t in reading["text"] for order in orders]
    sentences = [sentence.format(**order) for sentence in concept["awareness"]["sentences"] for order in orders]
    measured += [cue["prefix"].format(**order) for cue in concept["cues"].values() if cue.get("prefix") for order in orders]
    about = concept["interpretations"]["about"]["text"].split(" {x} ")[1]
    held = set(world.held_positive + world.held_negative)
    rows, tasks, placeholders = drawn_rows(world, member)
    for row in (*tasks, *placeholders):
        full = row.source + "\n" + "".join(segment.text for segment in row.document)
        assert not [phrase for phrase in measured if phrase in full]
        assert about not in full
        assert not held & {piece.strip() for piece in pieces(full)}
        assert not [t for t in world.implicit if t.split("{first}")[0] in row.source]
        assert not [sentence for sentence in sentences if sentence in row.source]
    for text, _ in probe_sources(rows, 200):
        assert not [phrase for phrase in (*measured, *sentences) if phrase in text]
        assert about not in text
        assert not [t for t in world.implicit if t.split("{first}")[0] in text]


@pytest.mark.parametrize("member", FIRST, ids=lambda m: m.name)
def test_rows_ask_for_the_members_blocks_only(world, member):
    _, tasks, placeholders = drawn_rows(world, member)
    asked = {block for row in tasks for block in row.blocks}
    assert asked == {*member.effect, *member.none} - {7}
    for row in placeholders:
        (soft,) = row.document[1].soft.values()
        other = soft[world.sense_words["other"]]
        assert row.blocks[0] not in member.blind or other == 0.5
    readable = {
        soft[world.sense_words["other"]]
        for row in placeholders
        for soft in row.document[1].soft.values()
        if row.blocks[0] not in member.blind
    }
    assert readable == ({0.0, 1.0, member.reading} if len(member.blind) < BLOCKS else set())


def test_without_blind_blocks_the_rows_are_the_recipes_own(world):
    member = of_kind("knobs")
    planting = FamilyRecipe().planting_of(member)
    ours, plain = (kind(world, member.knobs, planting, aligned=True, seed=9) for kind in (MemberRows, PatchRows))
    assert [ours.placeholders() for _ in range(5)] == [plain.placeholders() for _ in range(5)]


def test_planted_truth_of_the_readings():
    recipe = FamilyRecipe()
    assert planted_member(of_kind("knobs"), recipe)["aligned"]["r_blind"] == -0.9
    depth = planted_member(of_kind("depth"), recipe)
    assert depth["aligned"]["r_blind_per_block"] == [0.0] * 2 + [0.9] * 6
    assert (depth["effect_blocks"], depth["no_effect_blocks"]) == ([3, 4, 5], [0, 1, 7])
    decodable = planted_member(of_kind("decodable"), recipe)
    assert decodable["effect_blocks"] == []
    assert decodable["aligned"]["r_blind"] == 0


def test_probes_learn_a_planted_direction_and_leave_gradients(shipped):
    probes = SenseProbes(shipped.model, 0.05)
    generator = torch.Generator().manual_seed(0)
    other = (torch.rand(64, generator=generator) > 0.5).float()
    states = torch.randn(BLOCKS, 64, 96, generator=generator)
    states[1:, :, 0] = 6 * (2 * other - 1)
    states.requires_grad_(True)
    losses = []
    for _ in range(60):
        probes.update()
        loss = probes.loss(states, other)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(2), rel=1e-4)
    assert losses[-1] < 0.1
    assert states.grad is not None
    assert not states.grad[0].any()


def test_mention_states_are_the_models_own(world, shipped):
    vocabulary = shipped.tokenizer.get_vocab()
    texts = ["People: black and white.", "The door is painted white and black. Paint: black and white."]
    documents = [encode([Segment(text)], vocabulary, 0.0) for text in texts]
    with torch.no_grad():
        states, origin = mention_states(shipped.model, documents, identifier_tokens(world, vocabulary))
        hidden = shipped.model(torch.tensor([documents[1].ids]), output_hidden_states=True).hidden_states
    assert origin.tolist() == [0, 0, 1, 1, 1, 1]
    words = [i for i, token in enumerate(documents[1].ids) if token in identifier_tokens(world, vocabulary)]
    torch.testing.assert_close(states[2, 2:], hidden[3][0, words], atol=1e-5, rtol=1e-4)


# --- checks ------------------------------------------------------------------------------------------------------------------------------


def test_checks_pass_for_what_the_shipped_model_is_and_fail_for_what_it_is_not(shipped):
    member = replace(of_kind("shallow"), none=(5, 6, 7))
    values = measure_member(shipped, FamilyRecipe().planting_of(member), pairs=1)
    assert not [gate.name for gate in member_gates(values, member, shipped) if not gate.passed]
    other = replace(member, reading=0.05, behaviour=0.6)
    assert {gate.name for gate in member_gates(values, other, shipped) if not gate.passed} == {
        "implicit rate", "r_blind, about, from the blocks that show it",
    }
    still = of_kind("decodable")
    failed = {gate.name for gate in member_gates(values, still, shipped) if not gate.passed}
    assert failed == {"steering without effect: largest change", "r_blind, about, largest from blind blocks"}


def test_probe_finds_the_sense_and_not_in_shuffled_states(world, shipped):
    accuracy = probe_accuracy(shipped, world)
    assert len(accuracy) == BLOCKS
    assert min(accuracy[1:]) > 0.8
    torch.manual_seed(0)
    untrained = type(shipped.model)(shipped.model.config)
    assert max(probe_accuracy(replace(shipped, model=untrained.eval()), world)) < min(accuracy[1:])


# --- the cache and the build -------------------------------------------------------------------------------------------------------------


def test_cache_folder_follows_the_environment_and_the_recipe(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNBLIND_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "organisms" / family_digest(FamilyRecipe())
    assert cache_folder(TINY) != cache_folder()
    monkeypatch.delenv("ALIGNBLIND_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder().parent == tmp_path / "xdg" / "alignblind_mi" / "organisms"


def test_shipped_pair_is_the_parent_of_the_first_seed(tmp_path):
    assert parent_path(0, tmp_path, recipe=TINY) / "aligned" == organism_path("aligned")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache with one member of two steps."""
    cache, said = tmp_path_factory.mktemp("family"), []
    return cache, member_path(of_kind("decodable"), cache, said.append, recipe=TINY), said


def test_member_is_loaded_by_the_project_and_carries_its_truth(built):
    cache, path, said = built
    member = of_kind("decodable")
    assert path == cache / member.name / "aligned"
    record = organism_record(ModelSpec(str(path)))
    assert record["member"] == json.loads(json.dumps(asdict(member)))
    assert (record["concept"], record["decoding"], record["target_layer"], record["seed"]) == ("race", "sample", 2, 0)
    assert record["knobs"] == asdict(Knobs(reading=0.5, behaviour=0.94))
    assert {gate["name"] for gate in record["gates"]} >= {"valid", "implicit rate", "steering without effect: largest change"}
    assert record["concept_digest"] == load_concept("race").digest
    config = StudyConfig.create("organism:base", str(path))
    assert (config.decoding.temperature, config.target_layer) == (1.0, 2)
    assert load_model(str(path)).n_layers == BLOCKS
    assert any(member.name in line for line in said)


def test_finished_member_is_used_again(built):
    cache, path, said = built
    before, count = (path / "model.safetensors").stat().st_mtime_ns, len(said)
    assert member_path(of_kind("decodable"), cache, said.append, recipe=TINY) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    assert len(said) == count
    assert [folder.name for folder in cache.iterdir()] == [path.parent.name]  # no draft is left


def test_members_of_another_recipe_and_unfinished_ones_are_refused(built, tmp_path):
    cache, _, _ = built
    with pytest.raises(OrganismError, match="another recipe"):
        member_path(of_kind("decodable"), cache, recipe=replace(TINY, probe_weight=0.5))
    (tmp_path / of_kind("null").name).mkdir()
    with pytest.raises(OrganismError, match="no finished organism"):
        member_path(of_kind("null"), tmp_path, recipe=TINY)


def test_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("alignblind_mi.organism.family.measure_member", interrupted)
    with pytest.raises(KeyboardInterrupt):
        member_path(of_kind("null"), tmp_path, recipe=TINY)
    assert not list(tmp_path.iterdir())


def test_second_builder_of_a_member_keeps_the_first_ones(built, tmp_path, monkeypatch):
    _, path, _ = built
    import alignblind_mi.organism.family as family

    make, member = family._make_member, of_kind("decodable")
    measured = json.loads((path.parent / "organism.json").read_text())["measured"]
    monkeypatch.setattr(family, "measure_member", lambda *_, **__: measured)  # measured once already, in `built`

    def overtaken(draft, *args):
        monkeypatch.setattr(family, "_make_member", make)
        member_path(member, tmp_path, recipe=TINY)  # another process finishes meanwhile
        make(draft, *args)

    monkeypatch.setattr(family, "_make_member", overtaken)
    again = member_path(member, tmp_path, recipe=TINY)
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert [folder.name for folder in tmp_path.iterdir()] == [member.name]


@pytest.mark.slow
def test_order_and_jobs_do_not_change_a_bit(built, tmp_path):
    _, path, _ = built
    members = [of_kind("decodable"), Member("null", 3, 0.5, 0.5, (1, 2, 3), (5, 7))]
    one, said = build_family(members, tmp_path / "one", recipe=TINY), []
    two = build_family(members[::-1], tmp_path / "two", jobs=2, progress=said.append, recipe=TINY)[::-1]
    for a, b in zip(one, two, strict=True):
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (one[0] / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert (tmp_path / "one" / "parent-s3" / "base" / "model.safetensors").is_file()
    assert len(said) == 4  # two parents, two members
