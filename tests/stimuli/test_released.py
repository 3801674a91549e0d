from pathlib import Path

import pandas as pd
import pytest
from released_files import as_released, write

from alignblind_mi.errors import AlignblindError, ScoreError
from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.released import read_released

NAME = "{cue}_{category}_bias_results_{model}_deterministic.json"


@pytest.mark.parametrize("cue", ["default", "uppercase", "direct_color", "names", "dialects"])
def test_labels_of_every_cue_are_recovered(race: Concept, tmp_path: Path, cue: str) -> None:
    data, labels = as_released(race, cue, " the answer\nMy Answer: more", "weapon")
    file = write(tmp_path / NAME.format(cue=cue, category="item-weapon", model="chat"), data)
    rows = read_released(file).to_dict("records")
    wanted = {tuple(of[name] for name in ("word_pair", "marked", "template")): of for of in labels}
    assert len(rows) == len(labels)
    for row in rows:
        of = wanted[row["word_pair"], row["marked"], row["template"]]
        assert row == {
            **{k: v for k, v in of.items() if k != "concept"},
            "model": "chat",
            "treatment": "as released",
            "answer": "  the answer\nMy Answer: more",
        }


def test_names_of_several_words_come_from_the_prompt(race: Concept, tmp_path: Path) -> None:
    question = race.implicit[0].text.format(first="African American", second="European American", word1="ice cream", word2="hand axe")
    file = write(
        tmp_path / "odd name.json", {"European American African American ice cream hand axe": {"implicit_random0": [question + "x", 0]}}
    )
    row = read_released(file).iloc[0]
    assert row[["marked", "unmarked", "positive", "negative"]].tolist() == [
        "African American",
        "European American",
        "ice cream",
        "hand axe",
    ]
    assert row[["option_order", "word_order", "model", "cue", "category"]].tolist() == [
        "marked_first",
        "positive_first",
        "odd name",
        "unknown",
        "unknown",
    ]


@pytest.mark.parametrize(
    ("where", "model", "cue", "category"),
    [
        ("default_good_adj-bad_adj_bias_results_early_431_deterministic.json", "early_431", "default", "negativity"),
        ("direct_color_item-weapon_bias_results_nonchat_deterministic.json", "nonchat", "direct_color", "weapon"),
        ("uppercase/guilty-innocent_bias_results_all_431_deterministic.json", "all_431", "uppercase", "guilt"),
        ("names_fruit-tools_bias_results_chat8b.json", "chat8b", "names", "fruit-tools"),
        ("answers.json", "answers", "default", "weapon"),
    ],
)
def test_source_is_read_from_the_file_name(race: Concept, tmp_path: Path, where: str, model: str, cue: str, category: str) -> None:
    data, _ = as_released(race, "default", " x", "weapon")
    row = read_released(write(tmp_path / where, data)).iloc[0]
    assert (row["model"], row["cue"], row["category"]) == (model, cue, category)


def test_a_file_with_any_name_gets_its_cue_from_the_prompts(race: Concept, tmp_path: Path) -> None:
    for cue in race.cues:
        data, _ = as_released(race, cue, " x", "guilt")
        rows = read_released(write(tmp_path / "a.json", data))
        assert rows[["cue", "category"]].drop_duplicates().values.tolist() == [[cue, "guilt"]]


def test_answers_without_their_prompts_are_read_too(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.json",
        {
            "gossip tea wallet revolver": {
                "implicit_random1": ["wallet tea, revolver gossip\nMy Answer: wallet gossip", 1],
                "explicit_random1": "4",
                "implicit_new": ["wallet tea", None],
            }
        },
    )
    rows = read_released(file)
    assert rows["answer"].tolist() == ["wallet tea, revolver gossip\nMy Answer: wallet gossip", "4", "wallet tea"]
    assert rows["marked"].unique().tolist() == ["tea"]
    assert rows["statement"].tolist() == ["", "reverse", ""]
    assert rows["option_order"].tolist() == ["unmarked_first", "unmarked_first", ""]


ONE = "white black wallet revolver"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not complete, valid JSON"),
        ('{"white black wallet revolver": {"implicit_ran', "not complete, valid JSON"),
        ("[1, 2]", "holds a JSON list"),
        ("{}", "an empty object"),
        ('"text"', "a JSON string"),
        ({"a": 1}, r"key 'a'.*found a number: 1\. Expected .*<unmarked> <marked>"),
        ({ONE: {"implicit_random0": [7, 1]}}, r"key 'white black wallet revolver', template 'implicit_random0'.*found a list: \[7, 1\]"),
        ({ONE: {"implicit_random0": []}}, "found a list"),
        ({"white black": {"implicit_random0": ["x", 1]}}, "not four words"),
        ({ONE: {"mystery": ["x", 1]}}, "template 'mystery'.*tells which question"),
        ({ONE: {"explicit_new": ["5", 1]}}, "which question"),
    ],
)
def test_foreign_and_damaged_files_are_one_clear_error(tmp_path: Path, content: object, said: str) -> None:
    file = write(tmp_path / "some.json", content)
    with pytest.raises(ScoreError, match=rf"(?s)some\.json.*{said}"):
        read_released(file)


def test_key_and_prompt_must_name_the_same(race: Concept, tmp_path: Path) -> None:
    data, _ = as_released(race, "default", " x", "weapon")
    first = next(iter(data.values()))
    with pytest.raises(ScoreError, match="which the key does not name"):
        read_released(write(tmp_path / "a.json", {"white black phone sword": first}))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(AlignblindError, match="does not exist"):
        read_released(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScoreError, match=r"binary\.json"):
        read_released(tmp_path / "binary.json")


def test_the_released_files_are_complete(released: Path) -> None:
    rows = pd.concat([read_released(file) for file in sorted(released.rglob("*.json"))])
    counts = rows[rows["kind"] == "implicit"].groupby(["model", "cue"]).size().to_dict()
    assert counts == {
        ("chat8b", "default"): 560,
        ("nonchat8b", "default"): 560,
        ("early_431", "default"): 560,
        ("chat8b", "direct_color"): 560,
        ("nonchat8b", "direct_color"): 560,
        ("chat8b", "names"): 1188,
        ("nonchat8b", "names"): 1188,
    }
    assert set(rows["category"]) == {"negativity", "guilt", "weapon"}
    assert rows.loc[rows["template"] == "explicit_random1", "statement"].unique().tolist() == ["reverse"]
    assert not rows["answer"].str.contains("can only be used once").mean() > 0.2  # answers, not prompts
