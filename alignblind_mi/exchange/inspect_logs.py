"""Inspect's logs as this project's rows: what a served model answered, judged by the rules for a model that is loaded.

Source: Inspect (UK AI Security Institute), https://inspect.aisi.org.uk. Needs the extra `inspect` to read a log. Does NOT know how the
tasks were made: a sample brings its labels along. Scores in a log are not read; its answers are judged anew.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from alignblind_mi.borders.reading import check_file, foreign
from alignblind_mi.borders.settings import Files, many, takes
from alignblind_mi.borders.texts import encodable_row
from alignblind_mi.errors import ScoreError
from alignblind_mi.exchange.served import Token, probability_columns
from alignblind_mi.intervals.clustered import StatisticsError
from alignblind_mi.measures.bbq import Asked, BBQItem, chosen_rows
from alignblind_mi.measures.competence import competence_table, right_answers
from alignblind_mi.models.edits import UNTREATED
from alignblind_mi.statistics.log_odds import outcomes_table
from alignblind_mi.statistics.rates import CLUSTERS, position_rates, summarise
from alignblind_mi.stimuli.answers import judge
from alignblind_mi.stimuli.outcome import Outcome
from alignblind_mi.stimuli.refusals import is_refusal

ENDING = ".eval"
LIMIT = 8 << 30    # bytes of the largest log that is read
POSITIONS, BBQ, ORDER = "positions", "bbq", "order"    # of a sample's metadata, beside the labels
ADVICE = "give a log that `inspect eval alignblind/...` wrote"
_CUT = ("max_tokens", "model_length")


@takes(ScoreError)
def read_inspect_logs(logs: Files) -> pd.DataFrame:
    """The answers in Inspect's logs (.eval), a row an answer, with the columns of `measure_behaviour` as far as a served model tells them.

    `model` is the one that the log names, or the folder that it was loaded from (`-M model_path=`); `prompt` what the user's turn said.
    Beside them: `refused` (see `stimuli/refusals.py`; of a model whose provider cut the answer out, too), `stop_reason`, `epoch`, `sample`,
    `log`, and `log_odds_bounded` (see `exchange/served.py`); of competence items `competence` and `right`. A sample that failed has no
    answer and no row: `.attrs["failed"]` counts them.

    Errors: ScoreError for a file that is no log, or one without answers to this project's prompts; without the package inspect-ai.
    """
    paths: tuple[Path | str, ...] = many(logs)
    if not paths:
        raise ScoreError(f"no log was given: {ADVICE}.")
    parts = [_answers(Path(path)) for path in paths]
    for path, rows in zip(paths, parts, strict=True):
        if rows.empty and not rows.attrs["failed"]:
            raise ScoreError(f"{path} holds no answers to prompts of this project: {ADVICE} (`read_inspect_bbq` reads those of BBQ).")
    failed = sum(rows.attrs["failed"] for rows in parts)
    found = pd.concat([rows for rows in parts if len(rows)], ignore_index=True) if any(map(len, parts)) else pd.DataFrame()
    if found.empty:
        raise ScoreError(f"all {failed} samples of {', '.join(map(str, paths))} failed: there is no answer to judge; run them again "
                         "(`inspect eval-retry LOG`).")
    found.attrs["failed"] = failed
    return found


def inspect_rows(path: Path) -> pd.DataFrame | None:
    """The rows of one log; None where it holds no answers to prompts of this project. Errors: as `read_inspect_logs`."""
    rows = _answers(path)
    return rows if len(rows) else None


def _answers(path: Path) -> pd.DataFrame:
    """The rows of one log, without any for a log of other tasks; `.attrs["failed"]`: its samples that have no answer."""
    records, failed = list[dict[str, Any]](), 0
    for sample, about in _samples(path):
        metadata = sample.metadata or {}
        if not {"kind", "word_pair"} <= set(metadata):
            continue
        if sample.error is not None or not sample.output.choices:
            failed += 1
        else:
            records.append(encodable_row(_row(sample, metadata, about)))
    rows = pd.DataFrame.from_records(records)
    if "competence" in rows:
        rows["right"] = right_answers(rows)
    rows.attrs["failed"] = failed
    return rows


@takes(ScoreError)
def read_inspect_bbq(logs: Files) -> pd.DataFrame:
    """The answers to BBQ in Inspect's logs, with the columns of `measure_bbq`: `summarise_bbq` takes them. An answer that names none of its
    options, or several, is left out and counted in `.attrs["invalid"]`. The log_prob_* are NaN: what was said counts.

    Errors: ScoreError as `read_inspect_logs`, and where no answer names an option.
    """
    asked, answers, models = list[Asked](), list[str](), list[str]()
    paths: tuple[Path | str, ...] = many(logs)
    for path in paths:
        for sample, about in _samples(Path(path)):
            metadata = sample.metadata or {}
            if BBQ in metadata and sample.error is None and sample.output.choices:
                asked.append(asked_bbq(metadata))
                answers.append(sample.output.completion)
                models.append(about["model"])
    if not asked:
        raise ScoreError(f"{', '.join(map(str, paths)) or 'no log'}: there are no answers to BBQ there; {ADVICE}.")
    rows = chosen_rows(asked, answers)
    if rows.empty:
        raise ScoreError(f"none of the {len(asked)} answers to BBQ names an option: nothing can be scored.")
    named = rows.assign(model=[models[i] for i in rows.index], treatment=UNTREATED.name).reset_index(drop=True)
    named.attrs["invalid"] = len(asked) - len(named)
    return named


def asked_bbq(metadata: Mapping[str, Any]) -> Asked:
    """The item of a sample's metadata, in its order."""
    said, (a, b, c) = dict(metadata[BBQ]), (int(one) for one in metadata[ORDER])
    return Asked(BBQItem(**{**said, "answers": tuple(said["answers"])}), (a, b, c))


def check_inspect() -> None:
    """Errors: ScoreError where Inspect is not installed."""
    if importlib.util.find_spec("inspect_ai") is None:
        raise ScoreError("logs of Inspect need the package inspect-ai: pip install 'alignblind-mi[inspect]'.")


def _samples(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The samples of a log, each with what the log says of all of them."""
    check_inspect()
    check_file(path, "", ScoreError, limit=LIMIT, advice=ADVICE)
    from inspect_ai.log import read_eval_log

    with foreign(f"{path} is no log of Inspect", ScoreError, ADVICE):
        log = read_eval_log(str(path))
    config = log.plan.config.merge(log.eval.model_generate_config)
    about = {"model": str(log.eval.model_args.get("model_path", log.eval.model)), "log": path.name,
             "decoding_max_new_tokens": config.max_tokens, "decoding_temperature": config.temperature, "decoding_seed": config.seed}
    yield from ((sample, about) for sample in log.samples or [])


def _row(sample: Any, metadata: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    labels = {name: value for name, value in metadata.items() if name != POSITIONS}
    output = sample.output
    n_tokens = output.usage.output_tokens if output.usage is not None else None
    most, stop = about["decoding_max_new_tokens"], str(output.stop_reason)
    cut = stop in _CUT or (stop == "unknown" and None not in (n_tokens, most) and n_tokens >= most)
    return {"model": about["model"], "treatment": UNTREATED.name, **labels, "prompt": asked_text(sample.input),
            "answer": answer_text(output), "finished": not cut, "n_tokens": n_tokens, **judged(metadata, output), "stop_reason": stop,
            "epoch": sample.epoch, "sample": str(sample.id), **{name: value for name, value in about.items() if name != "model"}}


def asked_text(given: Any) -> str:
    """What the user's last turn of a sample's input says."""
    return given if isinstance(given, str) else next((message.text for message in reversed(given) if message.role == "user"), "")


def answer_text(output: Any) -> str:
    """The text of an answer; where a model thought and was cut off before it answered, its thought as one that never ends."""
    text = str(output.completion)
    content = output.choices[0].message.content if output.choices else ""
    thought = not text.strip() and not isinstance(content, str) and any(part.type == "reasoning" for part in content)
    return "<think>" if thought else text


def judged(metadata: Mapping[str, Any], output: Any) -> dict[str, Any]:
    """outcome, reason, refused and the log-probability columns of one answer, from a sample's metadata and the model's output."""
    answer = answer_text(output)
    withheld = str(output.stop_reason) == "content_filter"
    outcome = judge(answer, metadata)
    refused = is_refusal(answer, outcome, metadata) or (withheld and outcome.label == "invalid")
    return {"outcome": outcome.label, "reason": outcome.reason, "refused": refused,
            **probability_columns(_tokens(output), answer, metadata, [(yes, no) for yes, no in metadata.get(POSITIONS, ())])}


def _tokens(output: Any) -> list[Token]:
    found = output.choices[0].logprobs if output.choices else None
    return [] if found is None else [
        Token(one.token, one.logprob, tuple((other.token, other.logprob) for other in one.top_logprobs or (one,)))
        for one in found.content]


def standard_reason(outcome: Outcome, refused: bool) -> str | None:
    """Why an answer is not usable, in Inspect's own words for it; None for a usable one."""
    if refused:
        return "refusal"
    if outcome.label != "invalid":
        return None
    return "no_response" if outcome.reason == "empty" else "invalid_response_format"


# ---- metrics -------------------------------------------------------------------------------------------------------------


@takes(StatisticsError)
def rate_metrics(rows: pd.DataFrame) -> dict[str, float]:
    """What a table of answers of one kind says, as metrics: the rate of the stereotype with its interval over word pairs and templates,
    the counts, the shares of invalid answers, of refusals and of failures of format, the bounds, the effect of positions (implicit), and
    the rate by probability where it was scored. All epochs count, as dependent answers to one word pair.

    Errors: StatisticsError for a missing column, or for implicit and explicit answers together.
    """
    (found,) = summarise(rows, ()).to_dict("records")
    n, implicit = len(rows), bool((rows["kind"] == "implicit").all())
    failed = (rows["outcome"] == "invalid") & ~rows["refused"].astype(bool)
    said = {name: float(found[name]) for name in ("rate", "low", "high", "n", "stereotyped", "reversed", "rejected", "invalid_share",
                                                  "worst", "best") if name != "rejected" or not implicit}
    said |= {"refused_share": float(rows["refused"].astype(float).mean()), "format_failure_share": float(failed.sum()) / n}
    if implicit:
        (place,) = position_rates(rows, (), cluster=CLUSTERS).to_dict("records")
        said |= {name: float(place[name]) for name in ("position", "position_low", "position_high")}
    scored = outcomes_table(rows, ()).iloc[0]
    if scored["invalid_by_probability"] < 1:
        said |= {name: float(scored[name]) for name in ("rate_by_probability", "low_by_probability", "high_by_probability",
                                                        "invalid_by_probability")}
    return said


@takes(StatisticsError)
def competence_metrics(rows: pd.DataFrame) -> dict[str, float]:
    """The same of competence items: by kind the share of right answers with its interval over word pairs, and the share of invalid ones;
    `can` is 1 where the model can do the task, -1 where it cannot, 0 where it cannot be told (see `competence_table`)."""
    table = competence_table(rows.assign(right=right_answers(rows)), ())
    verdicts = {"can": 1.0, "cannot": -1.0}
    return {f"{row['kind']}_{name}": verdicts.get(row["verdict"], 0.0) if name == "can" else float(row[name])
            for row in table.to_dict("records") if row["n"] for name in ("share_right", "low", "high", "pairs", "invalid_share", "can")}


def table_of(scores: Iterable[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]) -> pd.DataFrame:
    """Rows of (a sample's metadata, what the scorer wrote of its answer)."""
    return pd.DataFrame.from_records([{**{name: value for name, value in (labels or {}).items() if name != POSITIONS}, **(said or {})}
                                      for labels, said in scores])
