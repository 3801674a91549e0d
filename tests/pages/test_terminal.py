"""Tables on a terminal: at any width every number, interval and name stands whole, and nothing is left out."""

import io
import json
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.pages import terminal
from alignblind_mi.pages.scoring import render
from alignblind_mi.pages.terminal import print_table

WIDTHS = (20, 40, 80, 120, 200)
LONG = "meta-llama/" + "A-model-with-a-very-long-name-" * 6 + "end"
NAMED = "a folder with blanks/李雷 and another name"
ADVICE = "give the model more memory, or ask for bfloat16 (--dtype bfloat16), and read docs/what-fits.md before the next run begins"
NUMBERS = {"n": "48", "valid": "47", "difference": "-0.455", "95 %": "-0.577 to -0.332", "p_holm": "0.00054", "log-odds": "-2.74",
           "95 % of log-odds": "-2.83 to -2.69", "bounds %": "88.9–99.9"}


def shown(width: int, *given: object, **named: object) -> str:
    out = io.StringIO()
    print_table(*given, console=Console(file=out, width=width, force_terminal=True, color_system=None), **named)
    return out.getvalue()


def rows(*names: str) -> list[dict[str, str]]:
    return [{"treatment": name, **NUMBERS, "difference": f"-0.45{i}", "95 %": f"-0.57{i} to -0.33{i}", "what to do": ADVICE if i else ""}
            for i, name in enumerate(names)]


TABLES = {"one row": rows("untreated"), "short names": rows("untreated", "steer_race_1-3", "noise"), "a long name": rows("untreated", LONG),
          "blanks": rows(NAMED, "untreated", NAMED * 2), "one long row": rows(LONG), "all the same": [*rows("x"), *rows("x")],
          "one column": [{"treatment": LONG}, {"treatment": "b"}], "no sentence": rows("untreated", "steer", "noise")[:1] * 3}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_number_and_name_stands_whole(table, width):
    found = shown(width, "Paired difference from the untreated model", table, said=[f"model {NAMED}", "concept x"],
                  prose=("what to do",), note=[("organism:aligned", f"rows in {NAMED}", "vectors in " + "x" * 100)])
    lines = found.splitlines()
    for row in table:
        for name, text in row.items():
            if name != "what to do":
                assert any(name in line for line in lines), name
                assert any(text in line for line in lines), text
    for part in (f"model {NAMED}", "concept x", "organism:aligned", f"rows in {NAMED}", "x" * 100):
        assert any(part in line for line in lines), part
    assert "…" not in found
    if any(row.get("what to do") for row in table):
        words = re.findall(r"\S+", found)
        assert all(word in words for word in ADVICE.split())
    parts = [f"{name}: {text}" for row in table for name, text in row.items() if name != "what to do"]
    wide = max(map(cell_len, (*parts, f"(model {NAMED},", f"treatment {LONG},", "vectors in " + "x" * 100))) + 8
    assert all(cell_len(line.rstrip()) <= max(width, wide) for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_is_not_wider_than_its_place(width):
    found = shown(width, "Paired difference", TABLES["short names"], prose=("what to do",), note="One sentence of several words. Another.")
    assert max(map(cell_len, found.splitlines())) <= max(width, len("95 % of log-odds: -2.83 to -2.69") + 2)


def test_what_fits_is_shown_whole_and_what_is_the_same_in_every_row_is_said_once_where_it_does_not():
    table = [{"treatment": name, **NUMBERS, "difference": f"-0.45{i}"} for i, name in enumerate(("untreated", "steer"))]
    wide, narrow, least = (shown(width, "Title", table) for width in (120, 79, 20))
    assert wide.splitlines()[0] == "Title"
    assert wide.count("-2.83 to -2.69") == 2
    assert narrow.count("-2.83 to -2.69") == narrow.count("n 48") == 1
    assert [line.split() for line in narrow.splitlines() if "-0.45" in line] == [["untreated", "-0.450"], ["steer", "-0.451"]]
    assert least.endswith("\n\ntreatment: untreated\n  difference: -0.450\n\ntreatment: steer\n  difference: -0.451\n\n")


def test_a_row_alone_keeps_its_numbers_as_lines():
    found = shown(40, "Title", [{"treatment": "untreated", **NUMBERS}], once=("treatment",))
    assert found.startswith("Title (treatment untreated)\n\nn: 48\n  valid: 47\n")


def test_sentences_wrap_at_blanks_in_their_column():
    table = [{"check": "engine", "status": "fail", "what to do": ADVICE}, {"check": "memory", "status": "ok", "what to do": ""}]
    found = shown(60, "Checks", table, prose=("what to do",), styles={"fail": "red"})
    body = [line for line in found.splitlines() if line.strip()][3:]
    assert " ".join(" ".join(line.split()) for line in body) == f"engine fail {ADVICE} memory ok"
    assert len(body) > 2
    out = io.StringIO()
    for width in (60, 20):
        print_table("Checks", table, styles={"fail": "red"}, console=Console(file=out, width=width, force_terminal=True,
                                                                             color_system="standard"))
    assert out.getvalue().count("\x1b[31m") == 2


@pytest.mark.parametrize("width", WIDTHS)
def test_scores_stand_whole(width):
    share = {"invalid_share": 1 / 3, "rate": 0.5, "low": 0.889, "high": 0.999, "template_min": 0.123, "template_max": 1.0, "worst": 0.333,
             "best": 0.667}
    records = [{"model": LONG, "cue": "default", "category": category, "kind": kind, "treatment": "a b" * 20, "rule": "robust", "n": 36,
                "stereotyped": 12, "reversed": 12, "invalid": 12, **share}
               for category in ("difference", "weapon") for kind in ("implicit", "explicit")]
    senses = {f"{name}_{end}": 0.889 for name in ("group", "other") for end in ("share", "low", "high")}
    records += [{"model": model, "kind": "interpretation", "rule": "lexicon", "n": 36, "group": 30, "other": 6, **senses}
                for model in (LONG, "b")]
    out = io.StringIO()
    render(records, Console(file=out, width=width, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    for text in (LONG, "a b" * 20, "difference", "weapon", "implicit", "explicit", "12 (33 %)", "88.9–99.9", "12.3–100.0", "33.3–66.7",
                 "88.9 [88.9–88.9]", "cue default"):
        assert any(text in line for line in lines), text
    assert "…" not in out.getvalue()


def test_a_pipe_has_the_width_that_columns_gives_it(monkeypatch, capsys):
    table = rows("untreated", "steer")
    for columns, wide in ((None, True), ("abc", True), ("200", True), ("60", False)):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        print_table("Title", table, prose=("what to do",))
        assert ("treatment: steer" not in capsys.readouterr().out) is wide, columns
    assert terminal.WIDTH == 160


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_verbs_cut_nothing(width, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.getbasetemp() / "shown by verbs"
    for verb, line in (("bias", ["--model", str(tiny_folder), "--quick", "--out", str(out)]), ("doctor", [str(tiny_folder), "--no-drift"])):
        done = CliRunner().invoke(app, [verb, *line], env={"COLUMNS": str(width)})
        assert done.exit_code in (0, 1), done.exception
        records = CliRunner().invoke(app, [verb, *line, "--json"])
        assert "…" not in done.stdout
        lines = done.stdout.splitlines()
        for record in json.loads(records.stdout):
            for name in ("category", "template", "check"):
                if name in record:
                    assert any(record[name] in line for line in lines), record[name]
            if record.get("table") == "log_odds":
                assert any(f"{record['low']:.3g} to {record['high']:.3g}" in line for line in lines)
