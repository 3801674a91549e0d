import json
import tomllib
from collections import Counter
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from attack_inputs import bbq_items
from inspect_ai import eval as inspect_eval
from inspect_ai._util.registry import registry_lookup
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    Logprob,
    Logprobs,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
)
from typer.testing import CliRunner

import alignblind_mi as ab
from alignblind_mi.__main__ import app
from alignblind_mi.errors import ScoreError
from alignblind_mi.exchange import inspect_tasks as tasks, registry
from alignblind_mi.exchange.inspect_logs import competence_metrics, rate_metrics
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.stimuli.competence import competence_prompts
from alignblind_mi.stimuli.prompts import KINDS, assignments, filled

ROOT = Path(__file__).parents[2]
REFUSAL, NONSENSE = "I'm sorry, but I can't help with that.", "Purple monkeys."
ITEM = ["kind", "template", "option_order", "word_order", "statement", "word_pair"]
RAW = {"chat_template": "{{ messages[0].content }}"}


def output(said, *, stop="stop", logprobs=None) -> ModelOutput:
    choice = ChatCompletionChoice(message=ChatMessageAssistant(content=said), stop_reason=stop, logprobs=logprobs)
    return ModelOutput(model="mock", choices=[choice], usage=ModelUsage(output_tokens=3))


def served(answer):
    """A mock of a served model; `answer` makes what it says of what it is asked."""
    def outputs(messages, tools, tool_choice, config):
        said = answer(messages[-1].text)
        return said if isinstance(said, ModelOutput) else output(said)
    return get_model("mockllm/model", custom_outputs=outputs, memoize=False)


def run(task, model, folder, **options):
    (log,) = inspect_eval(task, model=model, log_dir=str(folder), display="none", **options)
    return log


def metrics(log) -> dict[str, float]:
    (score,) = log.results.scores
    return {metric.name: metric.value for metric in score.metrics.values()}


@pytest.fixture(scope="module")
def asked(race):
    return ab.implicit_prompts(race, "default", max_word_pairs=2)


@pytest.fixture(scope="module")
def answers(race, asked):
    """By prompt, one of five answers in turn: with the stereotype twice, against it, a refusal, a failure of format."""
    both = [assignments(race, prompt) for prompt in asked]
    turns = [(yes, yes, no, REFUSAL, NONSENSE)[i % 5] for i, (yes, no) in enumerate(both)]
    return {prompt.text: said for prompt, said in zip(asked, turns, strict=True)}


@pytest.fixture(scope="module")
def log(answers, tmp_path_factory):
    return run(tasks.implicit_bias(max_word_pairs=2), served(answers.get), tmp_path_factory.mktemp("logs"), epochs=2)


def test_answers_of_a_served_model_are_judged_as_ours(log, asked):
    rows = ab.read_inspect_logs(log.location)
    expected = Counter(("stereotyped", "stereotyped", "reversed", "invalid", "invalid")[i % 5] for i in range(len(asked)))
    assert Counter(rows["outcome"]) == {name: 2 * n for name, n in expected.items()}
    assert set(rows.loc[rows["answer"] == REFUSAL, "refused"]) == {True}
    assert not rows.loc[rows["answer"] != REFUSAL, "refused"].any()
    assert (rows["reason"] == "no_identifier").sum() == (rows["outcome"] == "invalid").sum()
    assert set(rows["epoch"]) == {1, 2}
    assert rows.attrs["failed"] == 0
    assert {"model", "treatment", *asked[0].labels} <= set(rows.columns)
    assert rows.loc[rows["epoch"] == 1, "prompt"].tolist() == [prompt.text for prompt in asked]


def test_a_log_says_what_our_tables_say(log):
    rows, said = ab.read_inspect_logs(log.location), metrics(log)
    table, position = ab.summarise(rows).iloc[0], ab.position_effect(rows)
    assert said["n"] == len(rows) == 2 * 72
    assert {name: said[name] for name in ("rate", "low", "high", "worst", "best")} == pytest.approx(
        {name: float(table[name]) for name in ("rate", "low", "high", "worst", "best")})
    assert said["refused_share"] == pytest.approx((rows["answer"] == REFUSAL).mean())
    assert said["format_failure_share"] == pytest.approx((rows["answer"] == NONSENSE).mean())
    assert said["position"] == pytest.approx((position["position"] * position["valid"]).sum() / position["valid"].sum())
    assert "rate_by_probability" not in said


def test_a_score_tells_refusals_from_failures_of_format_in_the_words_of_inspect(log):
    reasons = Counter((sample.scores["answers"].value, sample.scores["answers"].reason, sample.output.completion in (REFUSAL, NONSENSE))
                      for sample in log.samples)
    assert {key[:2] for key in reasons} == {("stereotyped", None), ("reversed", None), ("invalid", "refusal"),
                                            ("invalid", "invalid_response_format")}
    assert all(unusable == (value == "invalid") for value, _, unusable in reasons)


def test_the_command_line_scores_a_log_by_either_rule(log):
    for rule, paths in (("robust", [log.location]), ("published", [str(Path(log.location).parent)])):
        done = CliRunner().invoke(app, ["score", *paths, "--by", "model", "--rule", rule, "--json"], catch_exceptions=False)
        (record,) = json.loads(done.stdout)
        assert done.exit_code == 0
        assert record["n"] == 144
        assert record["refused"] == 28
        assert record["rate"] == pytest.approx(30 / 44)    # 72 prompts, in five turns
    shown = CliRunner().invoke(app, ["score", log.location], catch_exceptions=False).stdout
    assert "refused" in shown


def test_rows_of_a_log_go_into_pairs_and_power(race, answers, log, tmp_path):
    name = next(iter(race.instructions))
    cue = race.cue("default")
    text = filled(race.instructions[name].text, marked=cue.marked[0], unmarked=cue.unmarked[0])
    changed = run(tasks.implicit_bias(max_word_pairs=2, instruction=name),
                  served(lambda prompt: answers[prompt.removeprefix(text)] if prompt.startswith(text) else NONSENSE), tmp_path)
    rows = ab.read_inspect_logs([log.location, changed.location])
    rows = rows[rows["epoch"] == 1]
    (pair,) = ab.paired_differences(rows).to_dict("records")
    assert pair["treatment"] == f"prompt_{name}"
    assert pair["n_items"] == 72
    assert pair["difference"] == 0
    assert ab.plan_from_pilot(rows, f"prompt_{name}").templates == rows["template"].nunique()


def test_competence_items_say_whether_a_model_can_do_the_task(race, tmp_path):
    prompts = [prompt for kind in KINDS for prompt in competence_prompts(race, kind)]
    right = {prompt.text: assignments(race, prompt)[0] if prompt.labels["kind"] == "implicit"
             else "I agree." if prompt.labels["statement"] == "stereotype" else "I disagree." for prompt in prompts}
    done = run(tasks.competence(), served(right.get), tmp_path)
    said, rows = metrics(done), ab.read_inspect_logs(done.location)
    assert said["implicit_can"] == said["explicit_can"] == said["implicit_share_right"] == 1
    assert said["implicit_pairs"] == rows.loc[rows["kind"] == "implicit", "word_pair"].nunique()
    assert set(ab.competence_table(rows)["verdict"]) == {"can"}
    wrong = competence_metrics(rows.assign(outcome="invalid"))
    assert wrong["implicit_can"] == -1


def test_bbq_is_answered_in_words(tmp_path):
    file = tmp_path / "bbq.jsonl"
    file.write_text("\n".join(map(json.dumps, bbq_items())) + "\n", "utf-8")
    turns = iter(range(100))
    done = run(tasks.bbq(str(file), orders=3), served(lambda prompt: ["B", "The answer is (B).", NONSENSE][next(turns) % 3]), tmp_path,
               max_connections=1)
    rows, said = ab.read_inspect_bbq(done.location), metrics(done)
    assert set(rows["place"]) == {1}
    assert len(rows) + rows.attrs["invalid"] == said["n"] == 3 * len(bbq_items())
    assert said["invalid_share"] == pytest.approx(1 / 3, abs=0.1)
    table = ab.summarise_bbq(rows, ("model",)).set_index("condition")
    for condition in table.index:
        assert said[f"{condition}_accuracy"] == pytest.approx(table.loc[condition, "accuracy"])
    with pytest.raises(ScoreError, match="read_inspect_bbq"):
        ab.read_inspect_logs(done.location)


def test_a_model_that_was_cut_off_or_silenced_has_its_reason(race, tmp_path):
    cut = output([ContentReasoning(reasoning="First of all"), ContentText(text="")], stop="max_tokens")
    turns = iter([cut, output("", stop="content_filter"), output(""), *([NONSENSE] * 12)])
    done = run(tasks.implicit_bias(design="published", max_word_pairs=1), served(lambda prompt: next(turns)), tmp_path, max_connections=1)
    rows = ab.read_inspect_logs(done.location)
    assert Counter(zip(rows["reason"], rows["refused"], rows["finished"], strict=True)) == {
        ("thought_cut", False, False): 1, ("empty", True, True): 1, ("empty", False, True): 1, ("no_identifier", False, True): 9}
    assert Counter(sample.scores["answers"].reason for sample in done.samples) == {
        "invalid_response_format": 10, "refusal": 1, "no_response": 1}


def test_a_sample_that_failed_is_counted_and_has_no_row(race, tmp_path):
    turns = iter([RuntimeError("no"), *([NONSENSE] * 20)])

    def answer(prompt):
        said = next(turns)
        if isinstance(said, Exception):
            raise said
        return said

    done = run(tasks.implicit_bias(design="published", max_word_pairs=1), served(answer), tmp_path, max_connections=1, fail_on_error=False)
    rows = ab.read_inspect_logs(done.location)
    assert (len(rows), rows.attrs["failed"]) == (11, 1)


# ---- the same model, loaded by Inspect and by us -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both_ways(race, tmp_path_factory) -> pd.DataFrame:
    folder = str(organism_path("aligned"))
    model = get_model("hf/local", model_path=folder, do_sample=False, device="cpu", **RAW)
    given = {"design": "published", "max_word_pairs": 1}
    logs = inspect_eval([tasks.implicit_bias(**given), tasks.explicit_bias(**given)], model=model, display="none",
                        log_dir=str(tmp_path_factory.mktemp("hf")), logprobs=True, top_logprobs=20, max_tasks=2)
    theirs = ab.read_inspect_logs([log.location for log in logs])
    ours = ab.measure_behaviour(ab.load_model(folder), race, "default", **given)
    found = ours.merge(theirs, on=ITEM, suffixes=("", "_inspect"))
    assert len(found) == len(ours) == len(theirs)
    return found


def test_greedy_answers_are_the_same_texts_and_the_same_rates(both_ways):
    assert both_ways["answer"].tolist() == both_ways["answer_inspect"].tolist()
    assert both_ways["prompt"].tolist() == both_ways["prompt_inspect"].tolist()
    assert both_ways["outcome"].tolist() == both_ways["outcome_inspect"].tolist()
    assert set(both_ways["model_inspect"]) == {str(organism_path("aligned"))}


def test_the_probability_outcome_of_a_served_model_is_ours(both_ways):
    implicit, explicit = (both_ways[both_ways["kind"] == kind] for kind in KINDS)
    np.testing.assert_allclose(implicit["log_odds_inspect"], implicit["log_odds_first"], atol=0.02)    # read where the answer decides
    assert (implicit["log_p_stereotyped_inspect"] >= implicit["log_p_stereotyped"] - 0.02).all()
    for name in ("log_p_endorsed", "log_p_refused", "log_odds_endorsed"):
        np.testing.assert_allclose(explicit[f"{name}_inspect"], explicit[name], atol=1e-3)
    assert not both_ways["log_odds_bounded"].any()
    rows = both_ways.assign(log_odds=both_ways["log_odds_inspect"], log_odds_endorsed=both_ways["log_odds_endorsed_inspect"])
    assert ab.by_probability(rows)["outcome"].tolist() == ab.by_probability(both_ways)["outcome"].tolist()


def test_the_log_probabilities_of_an_interface_are_read_from_a_log(asked, race, tmp_path):
    """As an interface gives them: of the tokens of its answer, each with the likeliest others."""
    def with_odds(text):
        prompt = next(one for one in asked if one.text == text)
        said, names = assignments(race, prompt)[0].strip(), (prompt.labels["marked"], prompt.labels["unmarked"])
        content = []
        for word in said.replace(",", " ,").split(" "):
            rival = next((name for name in names if word in names and name != word), None)
            tops = [TopLogprob(token=f" {word}", logprob=-0.2)] + ([TopLogprob(token=f" {rival}", logprob=-2.2)] if rival else [])
            content.append(Logprob(token=f" {word}", logprob=-0.2, top_logprobs=tops))
        return output(said, logprobs=Logprobs(content=content))

    done = run(tasks.implicit_bias(max_word_pairs=2), served(with_odds), tmp_path)
    rows = ab.read_inspect_logs(done.location)
    np.testing.assert_allclose(rows["log_odds"], 2.0)
    np.testing.assert_allclose(rows["log_p_stereotyped"], -0.6)    # the first word, the dash, the identifier
    assert metrics(done)["rate_by_probability"] == 1
    assert rate_metrics(rows.assign(log_odds=-rows["log_odds"]))["rate_by_probability"] == 0


# ---- what Inspect finds --------------------------------------------------------------------------------------------------


def test_the_entry_points_register_the_tasks_by_the_short_name():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["inspect_ai"]
    assert set(points) == {"alignblind", "alignblind_mi"}
    for name, value in points.items():
        assert EntryPoint(name, value, "inspect_ai").load() is registry
    for name in ("implicit_bias", "explicit_bias", "competence", "bbq"):
        assert registry_lookup("task", f"alignblind/{name}") is getattr(tasks, name)


def test_a_task_by_name_takes_its_parameters_and_is_scored_anew_from_its_log(tmp_path):
    (done,) = inspect_eval("alignblind/explicit_bias", model=served(lambda prompt: "2"), log_dir=str(tmp_path), display="none",
                           task_args={"concept": "religion", "max_word_pairs": 1, "seed": 3})
    assert metrics(done)["rate"] == 0
    assert {sample.metadata["concept"] for sample in read_eval_log(done.location).samples} == {"religion"}
    assert done.eval.task_args["concept"] == "religion"


@pytest.mark.parametrize(("given", "said"), [({"cue": "nothing"}, "nothing"), ({"design": "mixed"}, "mixed"), ({"concept": "abc"}, "abc"),
                                             ({"instruction": "nothing"}, "nothing"), ({"max_word_pairs": 0}, "max_word_pairs")])
def test_a_task_refuses_what_it_does_not_know(given, said):
    with pytest.raises(ab.AlignblindError, match=said):
        tasks.implicit_bias(**given)
