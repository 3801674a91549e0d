import re

import pytest
from inspect_ai import eval as inspect_eval
from inspect_ai.model import ModelOutput, ModelUsage, get_model
from typer.testing import CliRunner

import alignblind_mi as ab
from alignblind_mi.__main__ import app
from alignblind_mi.errors import ResultError
from alignblind_mi.exchange import inspect_tasks as tasks
from alignblind_mi.pages.served_page import served_tables
from alignblind_mi.stimuli.prompts import assignments


def served(said: dict[str, str], name: str):
    def outputs(messages, tools, tool_choice, config):
        text = next(answer for prompt, answer in said.items() if messages[-1].text.endswith(prompt))
        found = ModelOutput.from_content("mock", text)
        found.usage = ModelUsage(output_tokens=3)
        return found
    return get_model(f"mockllm/{name}", custom_outputs=outputs, memoize=False)


@pytest.fixture(scope="module")
def logs(race, tmp_path_factory):
    """Two models of opposite leanings, one of them also under an instruction; neither can do the task."""
    prompts = ab.implicit_prompts(race, "default", max_word_pairs=1)
    yes, no = ({prompt.text: assignments(race, prompt)[side] for prompt in prompts} for side in (0, 1))
    folder, name = tmp_path_factory.mktemp("logs"), next(iter(race.instructions))
    given = {"log_dir": str(folder), "display": "none"}
    inspect_eval(tasks.implicit_bias(max_word_pairs=1), model=served(yes, "one"), **given)
    inspect_eval(tasks.implicit_bias(max_word_pairs=1, instruction=name), model=served(no, "one"), **given)
    inspect_eval(tasks.implicit_bias(max_word_pairs=1), model=served(no, "two"), **given)
    inspect_eval(tasks.competence(), model=served({"": "I refuse to answer."}, "one"), **given)
    return folder


def test_the_page_of_logs_says_what_their_rows_say(logs, race, tmp_path):
    out = tmp_path / "page"
    for _ in range(2):    # drawn anew
        done = CliRunner().invoke(app, ["report", str(logs), "--out", str(out)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    rows = ab.read_inspect_logs(sorted(logs.glob("*.eval")))
    tables = served_tables(rows)
    rates = tables["rates"].set_index(["model", "treatment"])["rate"]
    treatment = f"prompt_{next(iter(race.instructions))}"
    assert rates.to_dict() == {("mockllm/one", "untreated"): 1, ("mockllm/one", treatment): 0, ("mockllm/two", "untreated"): 0}
    differences = tables["differences"].set_index("between")["difference"]
    assert differences.to_dict() == {treatment: -1, "mockllm/two": -1}
    assert set(tables["competence"]["verdict"]) == {"cannot"}
    page = re.sub(r"<[^>]+>", " ", (out / "report.html").read_text("utf-8"))
    for said in ("mockllm/one cannot do the implicit task", treatment, "-100.0", "Provenance"):
        assert said in page
    assert (out / "tables" / "rates.csv").is_file()


def test_the_verb_compare_takes_logs_and_no_model_beside_them(logs, tmp_path):
    out = tmp_path / "page"
    done = CliRunner().invoke(app, ["compare", str(logs), "--out", str(out)], catch_exceptions=False)
    assert f"The page is {out / 'report.html'}" in done.output
    assert CliRunner().invoke(app, ["report", str(logs), "--out", str(tmp_path / "other")]).exit_code == 0
    assert (out / "tables" / "differences.csv").read_text() == (tmp_path / "other" / "tables" / "differences.csv").read_text()
    done = CliRunner().invoke(app, ["compare", str(logs), "--base", "one"])
    assert "--base was given beside Inspect's logs" in str(done.exception)


def test_the_verb_power_plans_from_logs(logs):
    done = CliRunner().invoke(app, ["power", "--pilot", str(logs)])
    assert done.exit_code == 0, done.exception
    assert "100.0% -> 0.0%, discordant 100.0%" in done.stderr
    assert re.search(r"1 -> 0 needs \d+ word pairs x 3 templates", done.stdout)


def test_a_page_of_logs_goes_into_no_foreign_folder(logs, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ResultError, match="no results folder"):
        ab.write_served(logs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_out_is_for_logs_alone(tmp_path):
    with pytest.raises(ab.AlignblindError, match="leave it out"):
        CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "x")], catch_exceptions=False)
