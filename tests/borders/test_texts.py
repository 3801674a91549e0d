"""Texts are data everywhere: what formulas, markup, escapes, half characters and very long names become on every way out."""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import click
import pandas as pd
import pytest
import typer
from released_files import as_released
from rich.console import Console
from typer.testing import CliRunner

from alignblind_mi.__main__ import app
from alignblind_mi.borders.texts import csv_text, encodable, json_text, label, say, script_json, shortened, visible
from alignblind_mi.commands.concept import cue_records
from alignblind_mi.pages import figures, scoring, terminal
from alignblind_mi.pages.page import LONGEST, LONGEST_TITLE, page_text
from alignblind_mi.progress import Progress

MARKUP = ("[/red]", "[bold]x", "a[quantized]", "[link=file:///x]y[/link]", ":bomb:", r"\[x]", "[red", "[/]")
CONTROLS = {"\x1b[31mred": r"\x1b[31mred", "a\rb": r"a\rb", "a\x00b": r"a\x00b", "\x9b2J": r"\x9b2J", "\x7f": r"\x7f",
            "\u202egnp.exe": r"\u202egnp.exe", "\ud800x": r"\ud800x", "a\u2028b": r"a\u2028b", "\uffff": r"\uffff"}
FORMULAS = ("=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "=HYPERLINK(\"http://x\",\"y\")", "\ufeff=1", "＝1")


# ---- the functions themselves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "shown"), CONTROLS.items())
def test_controls_are_written_out(text, shown):
    assert visible(text) == shown
    assert visible(f"{text}\tblank\n") == f"{shown}\tblank\n"
    assert visible("a\nb\tc", lines=False) == r"a\nb\tc"


def test_ordinary_texts_stay_as_they_are():
    for text in ("Zoë 李雷 😀 e\u0301 \U0001f468\u200d\U0001f469", "a–b − “c”", "[x] $y$ <z> &amp;"):
        assert visible(text) == encodable(text) == label(text) == text


def test_long_texts_stay_different():
    first, second = (shortened("x" * 100_000 + end, 60) for end in "ab")
    assert first != second
    assert len(first) == len(second) == 60
    assert shortened("x" * 60, 60) == "x" * 60
    assert shortened("\ud800" * 100, 60)[0] == "\ud800"


@pytest.mark.parametrize("text", ["</script><script>", "<!--<script>", "]]>", "\u2028\u2029", "\ud800", "&lt;", "a'b\"c`", "\x7f"])
def test_json_in_a_script_is_ascii_and_cannot_end_it(text):
    written = script_json({"tokens": [text]})
    assert json.loads(written) == {"tokens": [text]}
    assert re.fullmatch(r"[ -~]+", written)
    assert not set("<>&") & set(written)
    assert json.loads(json_text([text])) == [text]
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))


# ---- CSV ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_or_title_of_a_csv_is_a_formula(text):
    written = csv_text(pd.DataFrame({text: [text, "plain"], "number": [-1.5, 2.0]}))
    read = pd.read_csv(io.StringIO(written))
    assert read.columns[0] == "'" + visible(text)
    assert read.iloc[0, 0] == "'" + visible(text)
    assert read.iloc[1, 0] == "plain"
    assert read["number"].tolist() == [-1.5, 2.0]


def test_numbers_and_gaps_of_a_csv_stay_what_they_are():
    objects = pd.Series([-1, -2.5, None, "-3", True, pd.NA], dtype=object)
    mixed = pd.DataFrame({"object": objects, "n": [-1, 2, 3, 4, 5, 6], "b": [True] * 6})
    assert csv_text(mixed) == "object,n,b\n-1,-1,True\n-2.5,2,True\n,3,True\n'-3,4,True\nTrue,5,True\n,6,True\n"
    assert csv_text(pd.DataFrame({"a": [0.1, float("nan")]})) == pd.DataFrame({"a": [0.1, float("nan")]}).to_csv(index=False)
    twice = pd.DataFrame([["=1", 2]], columns=["a", "a"])
    assert csv_text(twice) == "a,a\n'=1,2\n"
    assert csv_text(pd.DataFrame(columns=["a"])) == "a\n"


def test_a_cell_cannot_begin_a_row():
    read = pd.read_csv(io.StringIO(csv_text(pd.DataFrame({"a": ["x\ry", 'q"\r\n=1', "a,b", "\x00z"], "b": [1, 2, 3, 4]}))))
    assert read["b"].tolist() == [1, 2, 3, 4]
    assert read["a"].tolist() == [r"x\ry", 'q"\\r\n=1', "a,b", r"\x00z"]


def test_the_table_that_is_written_is_not_changed():
    table = pd.DataFrame({"a": ["=1"], "b": [1]})
    csv_text(table)
    assert table.to_dict("list") == {"a": ["=1"], "b": [1]}


# ---- the terminal ------------------------------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return found.out + found.err


WIDE = "w" * 60    # a title is as wide as its table


@pytest.mark.parametrize("text", MARKUP)
def test_tables_show_markup_as_it_is(capsys, text):
    terminal.print_table(text, [{"name": text, f"{text} ": "ok", "c": WIDE}], note=text, styles={"ok": "green"})
    assert printed(capsys).count(text) == 4
    record = {"kind": "implicit", "rule": text, "model": text, "n": 1, "stereotyped": 1, "reversed": 0, "invalid": 0, "invalid_share": 0.0,
              "rate": 1.0, **dict.fromkeys(("low", "high", "template_min", "template_max", "worst", "best"), 1.0)}
    scoring.render([record, record | {"model": f"{text}2"}])
    assert printed(capsys).count(text) == 3
    shares = {f"{text}{end}": 0.5 for end in ("_share", "_low", "_high")}
    scoring.render([{"kind": "interpretation", "rule": "lexicon", "model": WIDE, "n": 1, text: 1, **shares}])
    assert printed(capsys).count(text) == 2


@pytest.mark.parametrize(("text", "shown"), CONTROLS.items())
def test_tables_and_lines_show_controls_written_out(capsys, text, shown):
    terminal.print_table(text, [{"name": text, "c": WIDE}], note=text)
    say(text)
    say(text, err=True)
    Progress(1).note(text)
    found = printed(capsys)
    assert found.count(shown) == 6
    assert text not in found


@pytest.mark.parametrize("text", [*MARKUP, *CONTROLS])
def test_progress_on_a_terminal(text):
    out, progress = io.StringIO(), Progress(1)
    progress.console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with progress.part(text) as advance:
        advance(1)
    assert out.getvalue().count(visible(text)) >= 2
    assert text in out.getvalue() or text in CONTROLS


def test_a_cue_s_identifiers_are_shown_as_they_are(race, capsys):
    cue = replace(race.cues["default"], marked=("[/red]",), unmarked=(":bomb:",))
    terminal.print_table("race", cue_records(replace(race, cues={"default": cue})))
    assert "[/red] / :bomb:" in capsys.readouterr().out


class Ascii(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


def test_an_encoding_without_the_letters_gets_them_written_out(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Ascii())
        say("Zoë – \ud800", err=stream == "stderr")
        assert getattr(sys, stream).buffer.getvalue() == rb"Zo\xeb \u2013 \ud800" + b"\n"


ARGUMENTS = [["concept", "check", "[/red]\udcff.toml"], ["score", "[bold]\udcff\x1b[31m"], ["report", ":bomb:\udcff"], ["concept", "list"],
             ["concept", "template"], ["score", "--help"], ["concept", "check", "race"], ["power", "--untreated", ".9", "--treated", ".5"],
             ["[/red]\udcff"], ["study", "--seed", "[/red]\udcff"], ["--help"]]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_output_fails_for_its_encoding(encoding):
    """In one process that is given each command line in turn, as the shell gives undecodable bytes: by surrogates."""
    code = (f"import sys\nfrom alignblind_mi.__main__ import main\nfor given in {ARGUMENTS!r}:\n    sys.argv = ['alignblind', *given]\n"
            "    try:\n        main()\n    except SystemExit as end:\n        print('ended', end.code)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=dict(os.environ, PYTHONIOENCODING=encoding))
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    ends = re.findall(r"^ended (\S+)", done.stdout.decode(), re.MULTILINE)
    assert ends == ["2", "2", "2", "0", "0", "0", "0", "0", "2", "2", "0"]
    assert b"Traceback" not in done.stderr
    assert rb"\udcff" in done.stderr


def commands(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    below = getattr(command, "commands", {})
    return [(path, command), *(found for name, one in below.items() for found in commands(one, (*path, name)))]


COMMANDS = commands(typer.main.get_command(app))


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=["-".join(path) for path, _ in COMMANDS])
def test_help_shows_every_bracket_that_is_written(path, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    shown = " ".join(CliRunner().invoke(app, [*path, "--help"]).stdout.split())
    texts = [command.help or "", *(getattr(one, "help", None) or "" for one in command.params)]
    brackets = {found.replace("\\[", "[") for text in texts for found in re.findall(r"\S*\[[^\]]*\]", text)}
    for bracket in brackets:
        assert " ".join(bracket.split()) in shown
    if path == ("study",):
        assert any("alignblind-mi[quantized]" in bracket for bracket in brackets)


# ---- figures and pages -----------------------------------------------------------------------------------------------------------


HOSTILE = [r"$\frac{", "$x$ and $y^2$", "</text><script>alert(1)</script>", "--><script>", "_hidden", "x" * 100_000, "a\x00\x1b[31m\uffffb",
           "a\nb", "[bold]x", "", "%s %(x)s {y}", "\\n\\"]


@pytest.fixture
def treatments() -> pd.DataFrame:
    ends = dict.fromkeys(("implicit", "low", "high", "template_min", "template_max", "worst", "best", "invalid_share"), 0.5)
    return pd.DataFrame([{"label": name, "n": 4, **ends} for name in HOSTILE])


def test_a_name_in_a_figure_is_no_formula_no_tag_and_short(treatments):
    figure = figures.comparison_figure(treatments)
    labels = [one.get_text() for one in figure.axes[0].get_yticklabels()]
    assert labels[0] == r"$\frac{ (n = 4)"
    assert len(set(labels)) == len(HOSTILE)
    assert max(map(len, labels)) < 70
    svg = figures.to_svg(figure)
    assert len(svg) < 1_000_000
    assert len(figures.to_png(figure)) < 1_000_000
    tags = {element.tag.split("}")[-1] for element in ElementTree.fromstring(svg).iter()}
    assert not tags & {"script", "foreignObject", "image", "a", "iframe", "text"}
    assert "path" in tags


def test_the_settings_of_a_user_do_not_turn_names_into_formulas(treatments):
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": True, "text.usetex": True}):
        figures.to_svg(figures.comparison_figure(treatments))


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(treatments):
    rates = pd.DataFrame([{"family": "steering", "sense": sense, "start": start, "n": 4, "rate": 0.5, "low": 0.4, "high": 0.6,
                           "template_min": 0.3, "template_max": 0.7, "invalid_share": 0.1}
                          for sense in HOSTILE for start in range(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.steering_figure(rates)
        figures.to_png(figure)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert " _hidden" in texts
    assert r"$\frac{" in texts


def test_a_long_text_on_a_page_is_shortened_and_has_more_where_it_is_pointed_at():
    page = page_text("macros.html.j2", pictures={}, tables={}, columns={})
    assert page.strip() == ""
    column = type("Column", (), {"title": "<i>" + "t" * 100_000, "numeric": False, "cell": staticmethod(lambda row: row["name"])})
    from alignblind_mi.pages.page import environment

    template = environment().from_string('{% from "macros.html.j2" import table with context %}'
                                          '{% call table("x", "y") %}{{ note }}{% endcall %}')
    long = "<b onclick='x'>\"" + "n" * 100_000
    made = template.render(pictures={}, tables={"x": [{"name": long}, {"name": "short"}]}, columns={"x": [column]}, note=long)
    assert len(made) < 4 * (LONGEST + LONGEST_TITLE) + 2000
    assert made.count("<span title=") == 3
    assert "<b" not in made
    assert "<i>" not in made
    assert "<td>short</td>" in made


# ---- half characters in files ----------------------------------------------------------------------------------------------------


def test_answers_and_interpretations_with_half_characters_are_scored(race, tmp_path, capsys):
    """JSON's \\ud800, and a file name that is not UTF-8: no table can hold them."""
    import itertools

    data, _ = as_released(race, "default", " \ud800 5 [/red]=\x1b[31m", "weapon")
    file = tmp_path / os.fsdecode(b"default_item-weapon_bias_results_\xff[bold]x_deterministic.json")
    file.write_text(json.dumps(data), "ascii")
    lines = [{"prompt": "p\ud800", "interpretation": f"\ud800 {text}", "layer": 0, "token": 1, "token_decoded": "\ud800"}
             for text in ("race", "color")]
    readings = tmp_path / os.fsdecode(b"\xff[red]_readings.json")
    readings.write_text("\n".join(map(json.dumps, lines)), "ascii")
    for path, paths in itertools.product((file, readings), ((), ("--json",))):
        done = CliRunner().invoke(app, ["score", str(path), *paths])
        assert done.exit_code == 0, done.exception
        assert r"\udcff" in done.stdout
        assert json.loads(done.stdout) if paths else True
