"""The attack table of the Python functions: the same bad values given to what a notebook calls; how each call ended.

    python tests/attack_python.py [--csv | --json] [--failing] [--only TEXT]

Expected: an AlignblindError in one sentence, or a type error where a value is of another type than the signature says (types are checked as
under pytest, by beartype).
"""

import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import attack  # noqa: E402
from attack_harness import Case, Place, names_of  # noqa: E402

NAN, INF, BIG, HUGE = math.nan, math.inf, 10**20, 10**4999
WHOLE: tuple[Any, ...] = (NAN, INF, -1, BIG, HUGE, "abc", "", None, 1.5, [], b"7")
REAL: tuple[Any, ...] = (NAN, INF, -INF, -1.0, "abc", "", None, [], 1e300)
SHARE: tuple[Any, ...] = (*REAL, 2.0)
TEXT: tuple[Any, ...] = ("abc", "a\0b", "\ud800x", "a\nb", "[/]", "../x", "x" * 5000, 7, None, b"x", [])
SEED: tuple[Any, ...] = (NAN, -1, BIG, HUGE, "abc", None, 1.5)  # of settings
DRAWN: tuple[Any, ...] = (NAN, "abc", None, 1.5)  # of a function that makes a text of its seed: any whole number will do
# Where names are asked for, one text alone is a list of one (`settings.Names`), never its letters: these are right, and "abc" is not.
ALONE = {
    "by": "model",
    "kinds": "implicit",
    "parts": "residual",
    "directions": "denoise",
    "controls": "random",
    "positions": "identifiers",
}
WRONG_TYPE = 3  # what stands in the place of an exit code for a type error of the call's own

Call = Callable[[], Any]


def act(call: Call) -> int:
    """Make a call; 2 for an error of this project (its sentence on standard error), WRONG_TYPE for a type that the signature has not."""
    from jaxtyping import TypeCheckError

    from alignblind_mi.errors import AlignblindError

    try:
        call()
    except AlignblindError as error:
        print(f"alignblind: {_without_ours(str(error))}", file=sys.stderr)
        return 2
    except TypeCheckError as error:
        print(f"alignblind: {type(error).__name__}: Error in a call. Usage: see the signature.", file=sys.stderr)
        return WRONG_TYPE
    return 0


def _without_ours(said: str) -> str:
    """A message in which what we gave ourselves is harmless: an exception repeats a value as it is, whoever shows it makes it printable."""
    short = re.sub(r"(([x9])\2{11})\2{200,}", r"\1...", said)  # as much as `names_of` looks for is left
    return short.replace("odd\nline", "odd line").replace("a\nb", "a b").replace("\0", "NUL")


class Attack:
    """Collects the cases of one function."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def call(
        self,
        function: str,
        option: str,
        value: Any,
        make: Callable[[Place], Call],
        *,
        expect: str = "refuse",
        stage: str = "check",
        named: tuple[str, ...] | None = None,
        writes: tuple[str, ...] = (),
    ) -> None:
        """One case: `make` gives the call. A value that has no type of the signature may also be a type error."""
        said = (
            ((*names_of(str(value)), *names_of(repr(value))) if named is None else named)
            if not isinstance(value, int) or abs(value) < HUGE
            else ()
        )
        text = "10**4999" if isinstance(value, int) and abs(value) >= HUGE else value if isinstance(value, str) else repr(value)
        self.cases.append(Case(function, option, text, make, expect, stage, said, (2, WRONG_TYPE), writes))

    def each(
        self, function: str, option: str, values: Sequence[Any], make: Callable[[Any], Any], *, sound: Sequence[Any] = (), **more: Any
    ) -> None:
        """One case for each value; those in `sound` are well after all."""
        for value in values:
            self.call(
                function,
                option,
                value,
                lambda place, value=value: lambda: make(value),
                expect="either" if any(value is one or value == one for one in sound) else "refuse",
                **more,
            )


def settings_cases(to: Attack) -> None:
    """Everything that is a frozen set of settings, one field at a time."""
    import torch

    from alignblind_mi import (
        Chat,
        Decoding,
        Edit,
        LoraSettings,
        ModelSpec,
        Plan,
        Prompt,
        Row,
        Site,
        Treatment,
        UnlearningSettings,
        load_model,
    )

    to.each("ModelSpec", "name", (*TEXT, ""), lambda v: ModelSpec(v), sound=[value for value in (*TEXT, "") if isinstance(value, str)])
    for name in ("dtype", "quantization", "engine"):
        to.each("ModelSpec", name, (*TEXT, ""), lambda v, name=name: ModelSpec("organism:aligned", **{name: v}), sound=(None,))
    to.each(
        "ModelSpec",
        "device",
        (*(v for v in TEXT if v is not None), "", "cuda:99", "cuda:-1", "meta", "99"),
        lambda v: ModelSpec("organism:aligned", device=v).resolved(),
    )
    to.each(
        "ModelSpec",
        "revision",
        ("a\0b", "\ud800x", "x" * 5000, 7, b"x", [], ""),
        lambda v: ModelSpec("organism:aligned", revision=v),
        sound=[v for v in TEXT if isinstance(v, str)] + [""],
    )
    for name in ("trust_remote_code", "tensor_parallel", "allow_pickle"):
        to.each("ModelSpec", name, ("abc", 7, None, []), lambda v, name=name: ModelSpec("organism:aligned", **{name: v}))
    outside = (True,)    # of torchrun
    to.each("ModelSpec", "tensor_parallel", outside, lambda v: load_model(ModelSpec("organism:aligned", tensor_parallel=v)), named=())
    to.each("Decoding", "max_new_tokens", (*WHOLE, 0), lambda v: Decoding(max_new_tokens=v))
    to.each("Decoding", "temperature", REAL, lambda v: Decoding(temperature=v))
    to.each("Decoding", "seed", SEED, lambda v: Decoding(seed=v))
    for name in ("rank", "alpha", "epochs", "batch_size", "accumulation", "max_length"):
        to.each("LoraSettings", name, (*WHOLE, 0), lambda v, name=name: LoraSettings(**{name: v}))
    for name in ("learning_rate",):
        to.each("LoraSettings", name, (*REAL, 0.0), lambda v, name=name: LoraSettings(**{name: v}))
    for name in ("dropout", "validation_share", "warmup_share"):
        to.each(
            "LoraSettings",
            name,
            (*SHARE, 1.0),
            lambda v, name=name: LoraSettings(**{name: v}),
            sound=(1.0,) if name == "warmup_share" else (),
        )
    for name in ("weight_decay", "activation_weight"):
        to.each("LoraSettings", name, REAL, lambda v, name=name: LoraSettings(**{name: v}))
    to.each("LoraSettings", "patience", WHOLE, lambda v: LoraSettings(patience=v, validation_share=0.2))
    to.each("LoraSettings", "seed", SEED, lambda v: LoraSettings(seed=v))
    to.each(
        "LoraSettings",
        "modules",
        ((), ("",), ("q_proj", "q_proj"), ("a\0b",), "q_proj", 7, (7,), None),
        lambda v: LoraSettings(modules=v),
        named=(),
    )
    to.each(
        "LoraSettings",
        "activation_layers",
        ((-1,), (1, 1), (NAN,), ("abc",), 7, None),
        lambda v: LoraSettings(activation_layers=v),
        sound=(7,),
    )
    for name in ("beta", "retain_weight", "forget_bound"):
        to.each("UnlearningSettings", name, (*REAL, 0.0), lambda v, name=name: UnlearningSettings(**{name: v}))
    for name in ("retain", "retain_on"):
        to.each("UnlearningSettings", name, (*TEXT, ""), lambda v, name=name: UnlearningSettings(**{name: v}))
    to.each("Site", "layer", (NAN, -1, "abc", None, 1.5, []), lambda v: Site(v, "marked"))
    for name in ("stream", "tokens"):
        to.each("Site", name, (*TEXT, ""), lambda v, name=name: Site(0, "marked", **{name: v}))
    to.each("Site", "units", ((-1,), (1, 1), ("a",), (NAN,), 7), lambda v: Site(0, "marked", "z", units=v), sound=(7,))
    to.each("Site", "occurrence", (NAN, "abc", 1.5, []), lambda v: Site(0, "marked", occurrence=v))
    to.each("Site", "mark", ("", 7, None), lambda v: Site(0, v))
    site, vector = Site(0, "marked"), torch.ones(32)
    to.each("Edit", "how", (*TEXT, ""), lambda v: Edit(site, vector, v))
    to.each("Edit", "strength", (NAN, INF, -INF, "abc", None, 1e300), lambda v: Edit(site, vector, "add", v))
    for label, bad in {
        "NaN": vector * NAN,
        "infinite": vector * INF,
        "empty": vector[:0],
        "matrix": torch.ones(2, 2),
        "whole": torch.ones(32).long(),
        "list": [1.0],
        "zero, ablated": vector * 0,
    }.items():
        to.call(
            "Edit",
            "vector",
            label,
            lambda place, bad=bad, label=label: lambda: Edit(site, bad, "ablate" if "abl" in label else "replace"),
            named=(),
        )
    to.each("Row", "prompt", ("abc", None, 7, []), lambda v: Row(v), named=(), sound=("abc",))
    to.each("Row", "edits", (7, ["abc"], None, (None,)), lambda v: Row(Prompt("x"), v), named=())
    to.each("Treatment", "name", (7, None, b"x"), lambda v: Treatment(v), named=())
    to.each("Treatment", "adapter", (7, [], b"x"), lambda v: Treatment("t", adapter=v), named=())
    to.each("Chat", "date", (*TEXT, ""), lambda v: Chat(date=v))
    to.each(
        "Chat",
        "options",
        ({"a": None}, {"a": NAN}, {"a b": 1}, {"messages": 1}, {"a": [1]}, 7, "abc", None),
        lambda v: Chat(options=v),
        named=(),
    )
    to.each("Chat", "system", ("\ud800x", 7, None, b"x"), lambda v: Chat(system=v))
    for name in ("untreated", "treated", "discordant", "icc", "template_icc"):
        to.each(
            "Plan",
            name,
            SHARE,
            lambda v, name=name: Plan(**{"untreated": 0.9, "treated": 0.5, name: v}),
            sound=(None,) if name == "discordant" else (),
        )
    to.each("Plan", "alpha", (*SHARE, 0.0, 1.0), lambda v: Plan(0.9, 0.5, alpha=v))
    for name in ("word_pairs", "templates", "orders"):
        to.each("Plan", name, WHOLE, lambda v, name=name: Plan(0.9, 0.5, **{name: v}))


def text_cases(to: Attack) -> None:
    """Concepts, prompts, layers, rules: what is read from texts."""
    from alignblind_mi import (
        Prompt,
        behaviour_prompts,
        choose_layers,
        implicit_prompts,
        items_needed,
        judge,
        layer_group,
        layer_windows,
        load_concept,
        mark,
        organism_path,
        power_of,
    )
    from alignblind_mi.statistics.power import Plan
    from alignblind_mi.stimuli.prompts import Span

    race = load_concept("race")
    to.each("load_concept", "source", (*TEXT, "", "race.toml", Path("x\0.toml"), Path("/")), load_concept)
    to.each("Concept.cue", "name", (*TEXT, ""), race.cue)
    for name in ("interpretation", "selfie_prompt", "steering_phrase"):
        to.each(f"Concept.{name}", "name", (*TEXT, ""), getattr(race, name))
    to.each("behaviour_prompts", "kind", (*TEXT, ""), lambda v: behaviour_prompts(race, "default", v))
    to.each("implicit_prompts", "design", (*TEXT, ""), lambda v: implicit_prompts(race, "default", design=v))
    to.each(
        "implicit_prompts",
        "max_word_pairs",
        (NAN, INF, -1, 0, "abc", 1.5, []),
        lambda v: implicit_prompts(race, "default", max_word_pairs=v),
    )
    to.each("implicit_prompts", "seed", DRAWN, lambda v: implicit_prompts(race, "default", seed=v))
    to.each("implicit_prompts", "cue", (*TEXT, ""), lambda v: implicit_prompts(race, v))
    to.each("mark", "word", ("", "absent", "a\0b", "\ud800", 7, None), lambda v: mark("black and white", marked=v))
    for label, span in {"beyond": Span(0, 99), "turned": Span(3, 1), "negative": Span(-2, 1), "empty": Span(1, 1)}.items():
        to.call("Prompt", "marks", label, lambda place, span=span: lambda: Prompt("black", {"marked": (span,)}), named=())
    for value in (
        "0-99999999999",
        "5-3",
        "-1",
        "99",
        "abc",
        "1-",
        "",
        "\u00b2",
        "9" * 5000,
        "0-" + "9" * 5000,
        "1.5",
        "0-1-2",
        [],
        [99],
        [-1],
        [NAN],
        ["a"],
        None,
        7,
        range(10**12),
        [1, 1],
        [True, 1.5],
    ):
        to.call(
            "choose_layers",
            "which",
            value,
            lambda place, value=value: lambda: choose_layers(value, 4),
            named=None if isinstance(value, str) and value else (),
            expect="either" if value == [1, 1] else "refuse",
        )
    to.each("choose_layers", "n_layers", (0, -1, NAN, BIG, None), lambda v: choose_layers("early", v), named=())
    to.each("layer_group", "name", (*TEXT, ""), lambda v: layer_group(v, 4))
    to.each("layer_windows", "n_layers", (0, -1, NAN, None, "abc"), lambda v: layer_windows(v), named=())
    to.each("layer_windows", "size", (0, -1, 99, NAN, "abc"), lambda v: layer_windows(4, v), named=())
    to.each("organism_path", "name", (*TEXT, "", "../checkpoints/base", "base/../base"), organism_path)
    labels = {"kind": "implicit", "marked": "a", "unmarked": "b", "positive": "c", "negative": "d"}
    to.each("judge", "rule", (*TEXT, ""), lambda v: judge("a", labels, v))
    to.each("judge", "kind", (*TEXT, ""), lambda v: judge("a", {**labels, "kind": v}))
    to.each("judge", "answer", (7, None, b"x", []), lambda v: judge(v, labels), named=())
    to.each("judge", "labels", ({}, {"kind": "implicit"}, {"kind": "explicit"}), lambda v: judge("a", v), named=())
    to.each("items_needed", "power", (*SHARE, 0.0, 1.0), lambda v: items_needed(Plan(0.9, 0.5), v))
    to.each("power_of", "word_pairs", (0, 1), lambda v: power_of(Plan(0.9, 0.5, word_pairs=v)), named=("0", "1"))


def statistics_cases(to: Attack) -> None:
    """Tables: rows that lack what is needed, levels, draws and seeds that make no sense."""
    import numpy as np
    import pandas as pd

    from alignblind_mi import (
        by_probability,
        corrected,
        difference_draws,
        equal_damage,
        item_slopes,
        leading,
        mixed_logistic,
        outcomes_table,
        paired_differences,
        paired_means,
        pareto,
        position_effect,
        summarise,
        summarise_readings,
    )
    from alignblind_mi.intervals.clustered import change_test, exact_interval, mean_interval, mean_test, rate_interval

    rows = pd.DataFrame(
        [
            {
                "model": "m",
                "treatment": t,
                "kind": "implicit",
                "template": f"t{i % 2}",
                "word_pair": f"w{i // 2}",
                "outcome": o,
                "option_order": "marked_first",
                "word_order": "negative_first",
                "category": "c",
                "log_odds": 0.5,
                "seed": 0,
            }
            for t in ("untreated", "treated")
            for i in range(8)
            for o in (("stereotyped", "reversed")[i % 2],)
        ]
    )
    tables: dict[str, Any] = {
        "empty": rows.iloc[:0],
        "no rows or columns": pd.DataFrame(),
        "no outcome": rows.drop(columns="outcome"),
        "unknown outcome": rows.assign(outcome="abc"),
        "outcome NaN": rows.assign(outcome=NAN),
        "outcome number": rows.assign(outcome=7),
        "kind abc": rows.assign(kind="abc"),
        "kind NaN": rows.assign(kind=NAN),
        "a column twice": pd.concat([rows, rows[["outcome"]]], axis=1),
        "no frame": [1, 2],
        "None": None,
        "log-odds NaN": rows.assign(log_odds=NAN),
        "log-odds infinite": rows.assign(log_odds=INF),
        "log-odds text": rows.assign(log_odds="abc"),
        "rows twice": pd.concat([rows, rows]),
        "word pair NaN": rows.assign(word_pair=NAN),
    }
    well = {
        ("summarise", "log-odds NaN"),
        ("summarise", "log-odds infinite"),
        ("summarise", "log-odds text"),
        ("summarise", "rows twice"),
        ("position_effect", "log-odds NaN"),
        ("position_effect", "log-odds infinite"),
        ("position_effect", "log-odds text"),
        ("position_effect", "rows twice"),
        ("mixed_logistic", "log-odds NaN"),
        ("mixed_logistic", "log-odds infinite"),
        ("mixed_logistic", "log-odds text"),
        ("mixed_logistic", "rows twice"),
        ("paired_differences", "log-odds NaN"),
        ("item_slopes", "log-odds NaN"),
        ("position_effect", "word pair NaN"),
        *((name, label) for name in ("position_effect", "paired_differences", "item_slopes") for label in ("kind abc", "kind NaN")),
        *(("item_slopes", label) for label in ("no outcome", "unknown outcome", "outcome NaN", "outcome number", "log-odds infinite")),
        ("paired_differences", "log-odds infinite"),
        *((name, label) for name in ("by_probability", "leading", "outcomes_table") for label in ("log-odds NaN", "log-odds infinite")),
        *((name, label) for name in ("by_probability", "leading", "outcomes_table") for label in ("rows twice", "kind NaN")),
        *((name, "word pair NaN") for name in ("by_probability", "leading")),
    }
    functions: dict[str, Callable[..., Any]] = {
        "summarise": summarise,
        "position_effect": position_effect,
        "paired_differences": paired_differences,
        "item_slopes": item_slopes,
        "mixed_logistic": mixed_logistic,
        "by_probability": by_probability,
        "leading": leading,
        "outcomes_table": outcomes_table,
    }
    for name, function in functions.items():
        for label, table in tables.items():
            to.call(
                name,
                "rows",
                label,
                lambda place, function=function, table=table: lambda: function(table),
                named=(),
                expect="either" if (name, label) in well or label == "empty" else "refuse",
            )
    for name, function in {
        "pareto": pareto,
        "equal_damage": equal_damage,
        "corrected": corrected,
        "paired_means": paired_means,
        "summarise_readings": summarise_readings,
    }.items():
        for label in ("no rows or columns", "no frame", "None", "unknown outcome"):
            to.call(name, "rows", label, lambda place, function=function, table=tables[label]: lambda: function(table), named=())
    for name in ("summarise", "position_effect", "paired_differences"):
        to.each(name, "level", (NAN, INF, 0.0, 1.0, -1.0, 2.0, "abc", None), lambda v, name=name: functions[name](rows, level=v))
        to.each(
            name,
            "by",
            (("abc",), "abc", 7, ("outcome", "outcome"), (7,)),
            lambda v, name=name: functions[name](rows, by=v),
            named=(),
            sound=(("outcome", "outcome"),),
        )
    to.each("leading", "outcome", ("abc", "", 7, None, "TEXT"), lambda v: leading(rows, v))
    to.each("difference_draws", "draws", (NAN, 0, -1, HUGE, "abc", 10**12), lambda v: difference_draws(rows, draws=v))
    to.each("difference_draws", "seed", SEED, lambda v: difference_draws(rows, seed=v))
    to.each("summarise", "cluster", (("abc",), "abc", 7), lambda v: summarise(rows, cluster=v), named=())
    to.each("paired_differences", "baseline", ("abc", "[/]", "", 7), lambda v: paired_differences(rows, baseline=v))
    to.each("paired_differences", "between", ("abc", "[/]", "", 7), lambda v: paired_differences(rows, between=v))
    for level in (NAN, 0.0, 1.0, -1.0, 2.0, "abc"):
        for name, call in {
            "exact_interval": lambda v: exact_interval(3, 5, v),
            "mean_interval": lambda v: mean_interval(np.arange(4.0), [np.array(list("abab"))], level=v),
            "mean_test": lambda v: mean_test(np.arange(4.0), [np.array(list("abab"))], level=v),
            "rate_interval": lambda v: rate_interval(np.ones(4), [np.array(list("abab"))], level=v),
            "change_test": lambda v: change_test(np.ones(4), [np.array(list("abab"))], level=v),
        }.items():
            to.call(name, "level", level, lambda place, call=call, level=level: lambda: call(level))
    for pair in ((5, 3), (-1, 3), (1, -1), (NAN, 3), ("a", 3), (1, BIG), (1.5, 3)):
        to.call(
            "exact_interval",
            "counts",
            repr(pair),
            lambda place, pair=pair: lambda: exact_interval(*pair),
            named=(),
            expect="either" if pair == (1, BIG) else "refuse",
        )
    values: dict[str, Any] = {
        "NaN": np.array([1.0, NAN]),
        "infinite": np.array([1.0, INF]),
        "empty": np.array([]),
        "texts": np.array(["a", "b"]),
        "another length": np.arange(3.0),
    }
    for label, bad in values.items():
        expect = "refuse" if label in ("texts", "another length") else "either"  # of no number there is no interval
        for name, call in {
            "mean_interval": lambda v: mean_interval(v, [np.array(list("ab"))]),
            "mean_test": lambda v: mean_test(v, [np.array(list("ab"))]),
            "rate_interval": lambda v: rate_interval(v, [np.array(list("ab"))]),
            "change_test": lambda v: change_test(v, [np.array(list("ab"))]),
        }.items():
            to.call(name, "values", label, lambda place, call=call, bad=bad: lambda: call(bad), named=(), expect=expect)
    for label, p in {"nan alone": [NAN], "negative": [-0.1], "above one": [1.1], "text": ["a"], "infinite": [INF]}.items():
        to.call(
            "corrected",
            "p",
            label,
            lambda place, p=p: lambda: corrected(pd.DataFrame({"p": p})),
            named=(),
            expect="either" if label == "nan alone" else "refuse",
        )
    points = {
        "damage NaN": {"damage": [NAN], "benefit": [1.0]},
        "benefit NaN": {"damage": [1.0], "benefit": [NAN]},
        "damage negative": {"damage": [-1.0], "benefit": [1.0]},
        "texts": {"damage": ["a"], "benefit": ["b"]},
    }
    for label, point in points.items():
        to.call(
            "pareto",
            "points",
            label,
            lambda place, point=point: lambda: pareto(pd.DataFrame({**point, "family": ["f"]})),
            named=(),
            expect="either" if label == "benefit NaN" else "refuse",
        )


def file_cases(to: Attack) -> None:
    """Functions that read or write files."""
    import pandas as pd
    from attack_inputs import JSON, MISSING, TENSORS, damaged

    from alignblind_mi import (
        Result,
        load_result,
        load_study,
        load_vectors,
        merge_adapter,
        read_bbq,
        read_comparison,
        read_inspect_bbq,
        read_inspect_logs,
        read_interpretations,
        read_study_file,
        run_comparison,
        run_study,
        save_result,
        trained_treatment,
        unmerge_adapter,
    )
    from alignblind_mi.borders.writing import write_bytes, write_text
    from alignblind_mi.pages.report import write_report
    from alignblind_mi.pages.scoring import score
    from alignblind_mi.pages.served_page import write_served
    from alignblind_mi.studies.config import StudyConfig

    frame = pd.DataFrame({"a": [1]})
    readers: dict[str, Callable[[Path], Any]] = {
        "load_result": load_result,
        "load_vectors": load_vectors,
        "read_bbq": read_bbq,
        "read_study_file": read_study_file,
        "read_inspect_bbq": read_inspect_bbq,
        "read_inspect_logs": read_inspect_logs,
        "read_interpretations": read_interpretations,
        "load_study": load_study,
        "read_comparison": read_comparison,
        "write_report": write_report,
        "write_served": lambda path: write_served(path, path.with_name("page")),
        "trained_treatment": trained_treatment,
        "score": lambda path: score([path]),
    }
    for name, read in readers.items():
        for kind in attack.PATHS:

            def reading(place: Place, read: Callable[[Path], Any] = read, kind: str = kind, name: str = name) -> Call:
                path = Path(attack.odd_path(kind, place.folder, ".json" if name == "score" else ""))
                return lambda: read(path)

            if kind != "":
                to.call(name, "path", kind, reading, named=("odd",))
    for name, read in (("read_inspect_logs", read_inspect_logs), ("read_inspect_bbq", read_inspect_bbq)):
        for value in (None, 7, (), [None]):
            to.call(name, "logs", value, lambda place, read=read, value=value: lambda: read(value), named=())
        for label, data in {"empty": b"", "a text": b"no log\n", "a zip cut off": b"PK\x03\x04abc", "JSON": b'{"version": 2}'}.items():

            def log(place: Place, read: Callable[[Path], Any] = read, data: bytes = data) -> Call:
                (place.folder / "thelog.eval").write_bytes(data)
                return lambda: read(place.folder / "thelog.eval")

            to.call(name, "damage", label, log, named=("thelog",))
    for value in (*TEXT, ""):
        to.call("write_served", "outcome", value, lambda place, value=value: lambda: write_served(place.inputs / "tiny", place.out, value))
    for value in (None, 7, (), [None]):
        to.call("write_served", "logs", value, lambda place, value=value: lambda: write_served(value, place.out), named=())
    for label, damage in {**MISSING, **TENSORS}.items():

        def load(place: Place, damage: Callable[[Path], None] = damage) -> Call:
            source = next((place.inputs / "steered").glob("vectors_*.safetensors"))
            folder = place.folder / "vectors"
            folder.mkdir()
            shutil.copy(source, folder / "thevectors.safetensors")
            damage(folder / "thevectors.safetensors")
            return lambda: load_vectors(folder / "thevectors.safetensors")

        if label not in ("one NaN", "one infinite", "another shape", "empty tensor"):  # they look for matrices
            to.call("load_vectors", "damage", label, load, named=("thevectors",))
    for file in ("balanced_model.parquet", "balanced_model.json"):
        for label, damage in {**MISSING, **JSON}.items():

            def result(place: Place, damage: Callable[[Path], None] = damage, file: str = file) -> Call:
                shutil.copytree(place.inputs / "biased", place.folder / "theresults")
                damage(place.folder / "theresults" / file)
                return lambda: load_result(place.folder / "theresults" / "balanced_model.parquet")

            to.call("load_result", file, label, result, named=("theresults",))
    for label, make in {**attack.FOREIGN, "a directory": attack._made(Path.mkdir)}.items():
        for name, write in {
            "save_result": lambda path: save_result(Result(frame, {}), path.with_suffix(".parquet") if not path.name else path),
            "write_text": lambda path: write_text(path, "x"),
            "write_bytes": lambda path: write_bytes(path, b"x"),
        }.items():
            if (
                label not in ("a file", "FIFO", "empty text", "symlink to a foreign folder", "symlink loop", "only a hidden file")
                and "note" not in label
                and "foreign" not in label
            ):
                to.call(
                    name,
                    "path",
                    label,
                    lambda place, make=make, write=write: (lambda path: lambda: write(path))(Path(make(place.folder / "target"))),
                    named=("target",),
                )
    for label, bad in {
        "mixed column": pd.DataFrame({"a": [1, "b", None, object()]}),
        "a column twice": pd.DataFrame([[1, 2]], columns=["a", "a"]),
    }.items():
        to.call(
            "save_result",
            "rows",
            label,
            lambda place, bad=bad: lambda: save_result(Result(bad, {}), place.folder / "target.parquet"),
            named=(),
        )
    for name, merge in {"merge_adapter": merge_adapter, "unmerge_adapter": unmerge_adapter}.items():
        for label, make in attack.FOREIGN.items():
            to.call(
                name,
                "out",
                label,
                lambda place, make=make, merge=merge: (
                    lambda path: lambda: merge(str(place.inputs / "chatty"), place.inputs / "adapter", path)
                )(Path(make(place.folder / "target"))),
                named=("target",) if label != "empty text" else (),
                stage="check",
            )
        for label, damage in {**MISSING, **JSON}.items():
            to.call(
                name,
                "adapter",
                label,
                lambda place, damage=damage, merge=merge: (lambda folder: lambda: merge(str(place.inputs / "tiny"), folder, place.out))(
                    damaged(place.folder / "theadapter", place.inputs / "adapter", "adapter_config.json", damage)
                ),
                named=("theadapter",),
                stage="load",
            )
        for label, damage in {**MISSING, **TENSORS}.items():
            to.call(
                name,
                "weights",
                label,
                lambda place, damage=damage, merge=merge: (lambda folder: lambda: merge(str(place.inputs / "tiny"), folder, place.out))(
                    damaged(place.folder / "theadapter", place.inputs / "adapter", "adapter_model.safetensors", damage)
                ),
                named=("theadapter",),
                stage="load",
            )
    for name, values in {
        "categories": (("abc",), ("",), "abc", 7),
        "max_items": (0, -1, NAN, "abc", 1.5),
        "seed": DRAWN,
        "metadata": ("missing.csv", "a\0b", "", "x" * 5000),
    }.items():
        for value in values:
            more = {"max_items": 1} if name == "seed" else {}
            to.call(
                "read_bbq",
                name,
                value,
                lambda place, name=name, value=value, more=more: lambda: read_bbq(place.inputs / "bbq.jsonl", **{name: value}, **more),
                named=() if isinstance(value, tuple) else None,
            )
    for label, paths in {"empty": [], "a text": "abc", "None": None, "numbers": [7]}.items():
        to.call("score", "paths", label, lambda place, paths=paths: lambda: score(paths), named=())
        to.call("read_bbq", "paths", label, lambda place, paths=paths: lambda: read_bbq(paths), named=())
    for name, values in {"rule": (*TEXT, ""), "by": (("abc",), ("answer",), "model", 7, (7,))}.items():
        for value in values:
            to.call(
                "score",
                name,
                value,
                lambda place, name=name, value=value: lambda: score([place.inputs / "released.json"], **{name: value}),
                named=() if not isinstance(value, str) else None,
                expect="either" if (name, value) == ("by", ALONE["by"]) else "refuse",
            )
    _config_cases(to, StudyConfig, {"run_study": run_study, "run_comparison": run_comparison})


def share_cases(to: Attack) -> None:
    """Functions that divide a run and bring it together."""
    from alignblind_mi import Share, merge, missing_jobs, run_on_ray, submit_shares

    def run(**given: Any) -> None:
        raise AssertionError("the run has begun")

    for value in (*WHOLE, 0):
        named = () if value in ("", None, []) or not isinstance(value, (int, float, str)) else None
        to.call("Share", "number", value, lambda place, value=value: lambda: Share(value, 3), named=named)
        for name in ("actors", "cpus"):
            if (name, value) != ("actors", None):

                def on_ray(place: Place, name: str = name, value: Any = value) -> Call:
                    return lambda: run_on_ray(run, place.out, **{name: value})

                to.call("run_on_ray", name, value, on_ray, named=named)

        def submitted(place: Place, value: Any = value) -> Call:
            return lambda: submit_shares(run, place.out, shares=value, executor=None)

        to.call("submit_shares", "shares", value, submitted, named=())
    for value in TEXT:
        named = None if isinstance(value, str) else ()
        to.call("Share.of", "text", value, lambda place, value=value: lambda: Share.of(value), named=named)
        to.call("run_on_ray", "address", value, lambda place, value=value: lambda: run_on_ray(run, place.out, address=value), named=named)
    for kind in attack.PATHS:
        if kind != "":

            def merged(place: Place, kind: str = kind) -> Call:
                path = Path(attack.odd_path(kind, place.folder, ""))
                return lambda: merge([path], place.out)

            to.call("merge", "folders", kind, merged, named=("odd",))
    for value in ([], None, 7, [7]):
        to.call("merge", "folders", value, lambda place, value=value: lambda: merge(value, place.out), named=())
        if value != []:
            to.call("missing_jobs", "folder", value, lambda place, value=value: lambda: missing_jobs(value), named=())


def _config_cases(to: Attack, kind: Any, runs: Mapping[str, Callable[..., Any]]) -> None:
    """`StudyConfig.create`, and a configuration changed afterwards and then run."""
    from alignblind_mi import within

    values: dict[str, tuple[Any, ...]] = {
        "concept": TEXT,
        "cue": TEXT,
        "quick": ("abc", 7, None),
        "seed": SEED,
        "chat": ("abc", 7),
        "temperature": tuple(v for v in REAL if v is not None),
        "dtype": tuple(v for v in TEXT if v is not None),
        "device": (*(v for v in TEXT if v is not None), "cuda:99", "meta"),
        "engine": TEXT,
        "quantization": tuple(v for v in TEXT if v is not None),
        "base": (*TEXT, "", "organism:", "organism:abc"),
        "system": ("x",),
        "protocol": ("abc", "", 7),
    }
    for name, each in values.items():
        for value in each:

            def create(place: Place, name: str = name, value: Any = value) -> Call:
                tiny = str(place.inputs / "tiny")
                options = {"base": tiny, "aligned": tiny, name: value}
                return lambda: kind.create(options.pop("base"), options.pop("aligned"), **options)

            to.call("StudyConfig.create", name, value, create, named=None if isinstance(value, (str, float)) else ())
    wrong: dict[str, tuple[Any, ...]] = {
        "minutes": (0, -1, NAN, BIG, "abc", None),
        "parts": (7, "abc", None, lambda config: 7, lambda config: []),
    }
    for name, each in wrong.items():
        for value in each:

            def thinned(place: Place, name: str = name, value: Any = value) -> Call:
                tiny = str(place.inputs / "tiny")
                return lambda: within(kind.create(tiny, tiny), **{"minutes": 1.0, name: value})

            to.call("within", name, value, thinned, named=())
    changes: dict[str, tuple[Any, ...]] = {
        "target_layer": (99, -1, BIG, NAN, "abc", 1.5),
        "balanced_pairs": (0, -1, NAN, "abc", 1.5),
        "published_pairs": (0, -1, NAN, "abc"),
        "shots": (-1, 65, NAN, "abc", 1.5),
        "minutes": (0, -1, NAN, BIG, "abc", 1.5),
        "selfie": ("abc", "", 7),
        "protocol": ("abc", "", 7, None),
        "cue": ("abc", "", 7),
        "concept": ("abc", "", 7),
        "seed": SEED,
        "chat": ("abc", True),
        "decoding": (None, 7),
        "lora": (None, 7),
        "base": ("abc", None),
    }
    assert set(changes) <= {field.name for field in fields(kind)}
    for name, each in changes.items():
        for value in each:
            for run_name, run in runs.items():

                def changed(place: Place, name: str = name, value: Any = value, run: Callable[..., Any] = run) -> Call:
                    tiny = str(place.inputs / "tiny")
                    return lambda: run(replace(kind.create(tiny, tiny, quick=True), **{name: value}), place.out)

                to.call(f"StudyConfig, then {run_name}", name, value, changed, named=())


MODEL: list[Any] = []  # the tiny model, loaded once


def model_cases(to: Attack) -> None:
    """A model that is loaded, asked in ways that mean nothing."""
    import torch

    from alignblind_mi import (
        UNTREATED,
        Decoding,
        Edit,
        Row,
        Site,
        Treatment,
        ask_under,
        awareness_examples,
        check_up,
        combine,
        compare_treatments,
        export_steered,
        implicit_prompts,
        interpretation_prompt,
        load_concept,
        load_model,
        load_vectors,
        logit_lens,
        lora_sweep,
        mark,
        measure_awareness,
        measure_behaviour,
        measure_competence,
        measure_instruments,
        measure_lens,
        measure_patching,
        measure_selfie,
        noise_like,
        noise_placebos,
        qualify,
        run_patchscope,
        sense_steering,
        steering_vectors,
        train_lora,
        train_translators,
        train_unlearning,
        write_harness,
    )
    from alignblind_mi.mitigations.lora_settings import LoraSettings

    race = load_concept("race")
    prompts = implicit_prompts(race, "default", max_word_pairs=1)[:2]
    question = interpretation_prompt(race.interpretation("paper"))

    empty = {  # (function, option) whose empty list is an empty table
        *((f"measure_{one}", option) for one in ("awareness", "lens", "patching") for option in ("layers", "mentions", "marks")),
        ("ask_under", "prompts"),
        ("logit_lens", "words"),
        ("logit_lens", "layers"),
        ("combine", "treatments"),
        ("lora_sweep", "settings"),
    }

    def on(
        function: str,
        option: str,
        values: Sequence[Any],
        make: Callable[[Any, Any, Place], Any],
        *,
        sound: Sequence[Any] = (),
        stage: str = "check",
        named: tuple[str, ...] | None = (),
        writes: tuple[str, ...] = (),
    ) -> None:
        well = [*sound, *([(), []] if (function, option) in empty else [])]
        for value in values:

            def run(place: Place, value: Any = value) -> Call:
                if not MODEL:
                    MODEL.append(load_model(str(place.inputs / "tiny")))
                return lambda: make(MODEL[0], value, place)

            to.call(
                function,
                option,
                value,
                run,
                stage=stage,
                named=named,
                writes=writes,
                expect="either" if any(value is one or value == one for one in well) else "refuse",
            )

    rows = [Row(prompt) for prompt in prompts]
    on("load_model", "spec", (*TEXT, "", "organism:abc"), lambda m, v, p: load_model(v), named=None)
    for label, adapters in {
        "missing": ["missing"],
        "NUL": ["a\0b"],
        "twice": ["{}", "{}"],
        "number": [7],
        "a text": "abc",
        "empty": [""],
    }.items():
        on(
            "load_model",
            f"adapters: {label}",
            [adapters],
            lambda m, v, p: load_model(
                str(p.inputs / "tiny"),
                adapters=[str(p.inputs / "adapter") if one == "{}" else one for one in v] if isinstance(v, list) else v,
            ),
            stage="load",
        )
    on("generate", "max_new_tokens", WHOLE, lambda m, v, p: m.generate(rows, v), stage="full")
    on("generate", "temperature", REAL, lambda m, v, p: m.generate(rows, 1, temperature=v), stage="full")
    on("generate", "seed", DRAWN, lambda m, v, p: m.generate(rows, 1, temperature=1.0, seed=v), stage="full")
    on("generate", "stop", ([""], [7], 7, "abc"), lambda m, v, p: m.generate(rows, 1, stop=v), stage="full", sound=("abc",))
    on("generate", "draws", ([], ["a"], 7, ["a", "a"]), lambda m, v, p: m.generate(rows, 1, draws=v), stage="full", sound=(["a", "a"],))
    on(
        "generate",
        "continuations",
        ([], [["a"]], [[""], [""]], [[], []], 7),
        lambda m, v, p: m.generate(rows, 1, continuations=v),
        stage="full",
    )
    on(
        "next_probs",
        "targets",
        ([""], ["Zebra"], ["black white"], ["\ud800"], ["a\0b"], [7], "abc"),
        lambda m, v, p: m.next_probs(rows, v),
        stage="full",
    )
    on(
        "record",
        "sites",
        (
            [Site(99, "marked")],
            [Site(0, "nothing")],
            [Site(0, "marked", occurrence=99)],
            [Site(0, "marked", "z", units=(99,))],
            [Site(0, "generated")],
            [7],
            "abc",
        ),
        lambda m, v, p: m.record(rows, v),
        stage="full",
    )
    edits: dict[str, Callable[[], Edit]] = {
        "layer 99": lambda: Edit(Site(99, "marked"), torch.ones(32)),
        "no mark": lambda: Edit(Site(0, "nothing"), torch.ones(32)),
        "another size": lambda: Edit(Site(0, "marked"), torch.ones(7)),
        "NaN": lambda: Edit(Site(0, "marked"), torch.ones(32) * NAN),
        "units beyond": lambda: Edit(Site(0, "marked", "z", units=(99,)), torch.ones(8)),
        "overflow": lambda: Edit(Site(0, "marked"), torch.ones(32), "add", 1e39),
    }
    for label, make_edit in edits.items():
        on(
            "next_log_probs",
            f"edit: {label}",
            [label],
            lambda m, v, p, make_edit=make_edit: m.next_log_probs([Row(prompts[0], (make_edit(),))]),
            stage="full",
        )
    on("next_log_probs", "rows", (["abc"], 7, [None]), lambda m, v, p: m.next_log_probs(v), stage="full", sound=(["abc"],))
    on("token_id", "word", ("", "Zebra", "black white", "\ud800", "a\0b", 7), lambda m, v, p: m.token_id(v))
    on("HookedModel.under", "treatment", (Treatment("t", adapter="nothing"), "abc", None), lambda m, v, p: m.under(v))
    on(
        "measure_behaviour",
        "kinds",
        ("implicit", (), ("abc",), ("implicit", "implicit"), 7),
        lambda m, v, p: measure_behaviour(m, race, "default", kinds=v, max_word_pairs=1, decoding=Decoding(max_new_tokens=1)),
        stage="full",
        sound=(ALONE["kinds"],),
    )
    on("measure_behaviour", "design", ("abc", "", 7), lambda m, v, p: measure_behaviour(m, race, "default", design=v, max_word_pairs=1))
    on("measure_behaviour", "max_word_pairs", (0, -1, NAN, "abc"), lambda m, v, p: measure_behaviour(m, race, "default", max_word_pairs=v))
    on("measure_behaviour", "cue", ("abc", "", 7, None), lambda m, v, p: measure_behaviour(m, race, v, max_word_pairs=1))
    on(
        "ask_under",
        "treatments",
        ([], [UNTREATED, UNTREATED], ["abc"], [Treatment("a"), Treatment("a", prefix="x ")]),
        lambda m, v, p: ask_under(m, race, prompts, v, Decoding(max_new_tokens=1)),
        stage="full",
    )
    on("ask_under", "prompts", ([], ["abc"]), lambda m, v, p: ask_under(m, race, v, [UNTREATED], Decoding(max_new_tokens=1)), stage="full")
    on(
        "compare_treatments",
        "treatments",
        ([], [UNTREATED, UNTREATED], ["abc"]),
        lambda m, v, p: compare_treatments(m, race, "default", v, decoding=Decoding(max_new_tokens=1), max_word_pairs=1),
        stage="full",
    )
    on("measure_competence", "pairs", (0, -1, 0.5, "abc", True), lambda m, v, p: measure_competence(m, race, pairs=v))
    on("qualify", "quick", ("abc", 7, None), lambda m, v, p: qualify(m, race, "default", quick=v))
    on("qualify", "cue", ("abc", "", 7), lambda m, v, p: qualify(m, race, v))
    on(
        "measure_instruments",
        "instruments",
        (("abc",), "tarot", 7),
        lambda m, v, p: measure_instruments(m, race, "default", instruments=v),
        sound=("probe",),
    )
    on(
        "measure_instruments",
        "layers",
        ((99,), (-1,), ("a",)),
        lambda m, v, p: measure_instruments(m, race, "default", instruments=["probe"], layers=v),
        stage="full",
    )
    on(
        "measure_instruments",
        "target_layer",
        (-1, NAN, "abc", None),
        lambda m, v, p: measure_instruments(m, race, "default", instruments=["patchscope"], target_layer=v),
        stage="full",
    )
    on("measure_awareness", "reading", ("abc", "", 7), lambda m, v, p: measure_awareness(m, race, "default", reading=v))
    on(
        "measure_awareness",
        "target_layer",
        (99, -1, NAN, "abc", None),
        lambda m, v, p: measure_awareness(m, race, "default", target_layer=v),
        stage="full",
    )
    on(
        "measure_awareness",
        "controls",
        (("abc",), "random", 7),
        lambda m, v, p: measure_awareness(m, race, "default", controls=v),
        stage="full",
        sound=(ALONE["controls"],),
    )
    on(
        "measure_awareness",
        "mentions",
        ((99,), (), (NAN,), 7),
        lambda m, v, p: measure_awareness(m, race, "default", mentions=v, controls=()),
        stage="full",
    )
    on(
        "measure_awareness",
        "layers",
        ((99,), (), (-1,), 7),
        lambda m, v, p: measure_awareness(m, race, "default", layers=v, controls=()),
        stage="full",
    )
    on(
        "measure_selfie",
        "temperature",
        REAL,
        lambda m, v, p: measure_selfie(m, race, "default", temperature=v, controls=(), layers=(1,)),
        stage="full",
    )
    on(
        "measure_selfie",
        "max_new_tokens",
        (0, -1, NAN, "abc"),
        lambda m, v, p: measure_selfie(m, race, "default", max_new_tokens=v, controls=(), layers=(1,)),
        stage="full",
    )
    on("measure_selfie", "prompt", ("abc", "", 7), lambda m, v, p: measure_selfie(m, race, "default", prompt=v))
    on("measure_selfie", "protocol", ("abc", "", 7, None), lambda m, v, p: measure_selfie(m, race, "default", protocol=v))
    on("sense_steering", "protocol", ("abc", "", 7, None), lambda m, v, p: sense_steering(m, race, "default", "race", [1], protocol=v))
    on(
        "measure_lens",
        "layers",
        ((99,), (), (-1,), 7),
        lambda m, v, p: measure_lens(m, race, "default", layers=v, controls=()),
        stage="full",
    )
    for name, values in {
        "parts": (("abc",), (), "residual", 7),
        "swap": ("abc", "", 7),
        "directions": (("abc",), (), "denoise"),
        "controls": (("abc",), "random"),
        "layers": ((99,), (), (-1,)),
        "marks": (("abc",), ()),
        "categories": (("abc",), "abc"),
        "max_word_pairs": (0, -1, NAN),
    }.items():
        on(
            "measure_patching",
            name,
            values,
            lambda m, v, p, name=name: measure_patching(
                m, race, "default", **{"parts": ("residual",), "max_word_pairs": 1, "layers": (0,), "controls": (), name: v}
            ),
            stage="full",
            sound=(ALONE[name],) if name in ALONE else (),
        )
    for name, values in {
        "layer": (99, -1, NAN),
        "words": (["Zebra"], [""], "abc"),
        "max_new_tokens": (-1, NAN),
        "temperature": (NAN, -1, INF),
    }.items():
        more = {"max_new_tokens": 1} if name == "temperature" else {}
        on(
            "run_patchscope",
            name,
            values,
            lambda m, v, p, name=name, more=more: run_patchscope(
                m, prompts, [Site(0, "marked", occurrence=0)], question, **{"layer": 1, "words": ["race"], **more, name: v}
            ),
            stage="full",
        )
    on("logit_lens", "words", ([""], ["Zebra"], [], "abc"), lambda m, v, p: logit_lens(m, prompts, v), stage="full")
    on("logit_lens", "layers", ((99,), (), (-1,)), lambda m, v, p: logit_lens(m, prompts, [" race"], layers=v), stage="full")
    for name, values in {"steps": (-1, NAN), "batch": (0, -1), "learning_rate": (NAN, INF, -1.0), "seed": (NAN, BIG)}.items():
        on(
            "train_translators",
            name,
            values,
            lambda m, v, p, name=name: train_translators(m, prompts, **{"steps": 1, name: v}),
            stage="full",
        )
    for name, values in {
        "method": ("abc", "", 7),
        "layers": ((99,), (), (-1,), (1, 1)),
        "stream": ("abc", ""),
        "sense": ("abc", "", 7),
        "seed": (NAN, "abc"),
    }.items():
        on(
            "steering_vectors",
            name,
            values,
            lambda m, v, p, name=name: steering_vectors(
                m, race, "default", **{"sense": "race", "method": "noise" if name == "seed" else "mean_difference", name: v}
            ),
            stage="full",
        )
    on("sense_steering", "layers", ((99,), (), (-1,), "early"), lambda m, v, p: sense_steering(m, race, "default", "race", v), stage="full")

    def vectors(place: Place) -> Any:
        return load_vectors(next((place.inputs / "steered").glob("vectors_*.safetensors")))

    for name, values in {
        "layers": ((), (99,), (-1,), (1, 1), "abc"),
        "how": ("abc", "replace", 7),
        "strength": (NAN, INF, -INF, "abc", None, 1e300, 1e39),
        "positions": (("abc",), ("identifiers", "identifiers"), ("prompt", "last"), "identifiers", ("",)),
    }.items():
        on(
            "SteeringVectors.treatment",
            name,
            values,
            lambda m, v, p, name=name: vectors(p).treatment(**{name: v}),
            sound=(ALONE[name],) if name in ALONE else (),
        )
    for name, values in {
        "how": ("abc", "replace", "", 7, None),
        "strength": (NAN, INF, "abc", None, 1e300),
        "hookpoint": ("abc", "layers.{}", "", 7, None),
    }.items():
        on("export_steered", name, values, lambda m, v, p, name=name: export_steered(vectors(p), p.folder / "steered.pt", **{name: v}))
    for name, values in {
        "cue": ("abc", " ", 7, None),
        "design": ("abc", "", 7, None),
        "max_word_pairs": (0, -1, NAN, "abc", 1.5),
        "seed": (NAN, -1, "abc", None, 1.5),
        "concept": ("race", 7, None),
    }.items():
        on(
            "write_harness",
            name,
            values,
            lambda m, v, p, name=name: write_harness(**{"concept": race, "out": p.folder / "tasks", name: v}),
        )
    for label in ("under a file", "NUL", "over-long name", "foreign folder", "lone surrogate", "a file"):
        for name in ("write_harness", "export_steered"):

            def exporting(place: Place, name: str = name, label: str = label) -> Call:
                path = Path(attack.FOREIGN[label](place.folder / "target.pt"))
                return lambda: write_harness(race, path) if name == "write_harness" else export_steered(vectors(place), path)

            to.call(name, "out", label, exporting, named=("target",))
    asked = [mark("Here are some words. Each word is black or white.", marked="black", unmarked="white")]
    on("noise_like", "seed", DRAWN, lambda m, v, p: noise_like(m, vectors(p).treatment(), asked, seed=v))
    on("noise_placebos", "n", WHOLE, lambda m, v, p: noise_placebos(m, vectors(p).treatment(), asked, n=v))
    on("noise_placebos", "seed", DRAWN, lambda m, v, p: noise_placebos(m, vectors(p).treatment(), asked, seed=v))
    on("combine", "treatments", ((Treatment("a", adapter="x"), Treatment("b", adapter="y")), ("abc",), ()), lambda m, v, p: combine(*v))
    for label in ("under a file", "NUL", "over-long name", "foreign folder", "lone surrogate"):
        for name in ("save", "export_gguf"):

            def saving(place: Place, name: str = name, label: str = label) -> Call:
                path, found = Path(attack.FOREIGN[label](place.folder / "target")), vectors(place)
                return lambda: getattr(found, name)(path)

            to.call(f"SteeringVectors.{name}", "path", label, saving, named=("target",))
    examples = awareness_examples(race)
    for name, values in {
        "layers": ("0-99999999999", "abc", "", [], [99], [-1], None),
        "examples": ([], ["abc"], 7),
        "kind": ("abc", "", 7),
        "protocol": ("abc", "", 7, None),
        "spec": ("missing", "", 7),
    }.items():
        on(
            "train_lora",
            name,
            values,
            lambda m, v, p, name=name: train_lora(
                **{"spec": str(p.inputs / "tiny"), "examples": examples, "layers": "early", "out": p.out, name: v}
            ),
            stage="load",
        )
    for label, make in attack.FOREIGN.items():

        def training(place: Place, make: Callable[[Path], str] = make) -> Call:
            path = Path(make(place.folder / "target"))
            return lambda: train_lora(str(place.inputs / "tiny"), examples, "early", path)

        to.call("train_lora", "out", label, training, named=("target",) if label != "empty text" else ())
    on(
        "train_lora",
        "modules",
        (("abc",), ("lm_head",)),
        lambda m, v, p: train_lora(str(p.inputs / "tiny"), examples, "early", p.out, settings=LoraSettings(modules=v)),
        stage="load",
    )
    on(
        "lora_sweep",
        "settings",
        ([], [LoraSettings(), LoraSettings()], ["abc"]),
        lambda m, v, p: list(lora_sweep(str(p.inputs / "tiny"), examples, "early", p.out, v)),
        stage="load",
    )
    on("train_unlearning", "method", ("abc", "", 7), lambda m, v, p: train_unlearning(str(p.inputs / "tiny"), race, p.out, method=v))
    on("check_up", "concept", ("abc", "", 7), lambda m, v, p: check_up(str(p.inputs / "tiny"), v))
    on("check_up", "cue", ("abc", 7), lambda m, v, p: check_up(str(p.inputs / "tiny"), cue=v))


def sound_cases(to: Attack) -> None:
    """What must succeed."""
    from alignblind_mi import (
        Decoding,
        LoraSettings,
        ModelSpec,
        Plan,
        StudyConfig,
        load_concept,
        load_result,
        load_vectors,
        read_bbq,
        read_study_file,
    )
    from alignblind_mi.pages.scoring import score

    calls: dict[str, Callable[[Place], Any]] = {
        "ModelSpec": lambda place: ModelSpec("organism:aligned", dtype="float32"),
        "Decoding": lambda place: Decoding(5, 0.7, 3),
        "LoraSettings": lambda place: LoraSettings(rank=8, patience=1, validation_share=0.2),
        "Plan": lambda place: Plan(0.9, 0.5, word_pairs=7),
        "load_concept": lambda place: load_concept(place.inputs / "mine.toml"),
        "read_bbq": lambda place: read_bbq(place.inputs / "bbq.jsonl", max_items=1),
        "load_result": lambda place: load_result(place.inputs / "biased" / "balanced_model.parquet"),
        "load_vectors": lambda place: load_vectors(next((place.inputs / "steered").glob("vectors_*"))).treatment([1, 2], strength=-0.5),
        "read_study_file": lambda place: read_study_file(place.inputs / "study.yaml"),
        "StudyConfig.create": lambda place: StudyConfig.create(
            str(place.inputs / "tiny"), str(place.inputs / "tiny"), seed=3, temperature=0.5
        ),
        "score": lambda place: score([place.inputs / "released.json"]),
    }
    for name, make in calls.items():
        to.cases.append(Case(name, "sound", "a sound call", lambda place, make=make: lambda: make(place), "succeed", "full"))


def all_cases() -> list[Case]:
    """The whole table."""
    to = Attack()
    for some in (sound_cases, settings_cases, text_cases, statistics_cases, file_cases, share_cases, model_cases):
        some(to)
    return to.cases


def main() -> int:
    """Run the table and print it; the exit code is 1 if a case did not end as expected."""
    import checked  # the hook's decorator
    from jaxtyping import install_import_hook

    checked.ALWAYS = sys.maxsize    # here every call is about its types
    with install_import_hook("alignblind_mi", "beartype.beartype"):
        return attack.run_table(all_cases, act)


if __name__ == "__main__":
    sys.exit(main())
