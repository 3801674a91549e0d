"""Progress: silent unless somebody looks, on standard error, with totals and the time that is left; an interrupt says what is kept."""

import io
import os
import subprocess
import sys
import threading

import forked
import pytest
from rich.console import Console

from alignblind_mi import progress
from alignblind_mi.measures.patching import measure_patching
from alignblind_mi.progress import Progress, counted, interruptible, is_shown
from alignblind_mi.results import load_result
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies import single
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.single import measure_parts, patch_parts, patch_tables

CODE = """
import alignblind_mi as ab
from alignblind_mi import progress
progress.WAIT = 0.0
model, race = ab.load_model("organism:aligned"), ab.load_concept("race")
rows = ab.measure_patching(model, race, "default", parts=("residual",), controls=("random",), layers=range(2), max_word_pairs=1)
ab.measure_behaviour(model, race, "default", max_word_pairs=4, decoding=ab.Decoding(3))
print(len(rows))
"""


@pytest.fixture
def looked_at(monkeypatch):
    """Somebody looks, and nothing is too short to be shown."""
    monkeypatch.setenv(progress.SWITCH, "1")
    monkeypatch.setattr(progress, "WAIT", 0.0)


def fresh(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", progress.SWITCH)}
    done = forked.run(["-c", CODE], env={**inherited, **environment})
    done.check_returncode()
    return done


def test_nothing_is_shown_where_nobody_looks():
    done = fresh()
    assert (done.stderr, len(done.stdout.split())) == ("", 1)


def test_what_is_shown_has_totals_and_a_time_left_and_is_not_on_standard_output():
    done = fresh(ALIGNBLIND_PROGRESS="1")
    assert len(done.stdout.split()) == 1
    for part in ("patching", "pairs/s", "asking organism:aligned", "00:00<"):
        assert part in done.stderr, done.stderr


@pytest.mark.parametrize(("switch", "terminal", "shown"), [("", True, False), ("0", True, False), ("1", False, True)])
def test_the_switch(monkeypatch, switch, terminal, shown):
    monkeypatch.setenv(progress.SWITCH, switch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert is_shown() is shown    # "" and a terminal would show, but this is a test
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert is_shown() is (shown or (not switch and terminal))


def test_a_short_run_is_silent(monkeypatch, capsys):
    monkeypatch.setenv(progress.SWITCH, "1")
    with counted("short", 3) as advance:
        advance(2)
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_a_run_within_one_of_its_unit_counts_for_it(looked_at, capsys):
    with counted("outer", 4, "pairs") as outer:
        with counted("inner", 2, "pairs") as inner:
            inner(2)
        with counted("rows of it", 7, "rows") as other:
            other(1)
        assert (outer.done, other.done) == (2, 1)
    with counted("next", 1) as following:
        assert following is not outer
    shown = capsys.readouterr().err
    assert "outer" in shown
    assert "2/4" in shown
    assert "inner" not in shown
    assert "1/7" in shown


def test_a_thread_has_counters_of_its_own(looked_at):
    found = []
    with counted("here", 2) as mine:
        def work() -> None:
            with counted("there", 2) as other:
                found.append(other)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found[0] is not mine


def test_a_run_is_a_line_of_the_display_that_it_stands_in(looked_at):
    out, shown = io.StringIO(), Progress(1)
    shown.console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with shown.part("[part]"), counted("rows of [it]", 9) as advance:
        advance(4)
    assert "rows of [it]" in out.getvalue()
    assert "4 of 9 rows" in out.getvalue()


def test_an_interrupt_says_what_is_kept(tmp_path, capsys):
    def asking() -> None:
        with counted("asking", 9) as advance:
            advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asking()
    said = capsys.readouterr().err
    assert "interrupted after 4 of 9 rows (asking): nothing is kept" in said
    assert "run_parts" in said
    with pytest.raises(KeyboardInterrupt), interruptible(tmp_path):
        asking()
    assert "nothing is kept" not in (said := capsys.readouterr().err)
    assert f"finished parts are kept in {tmp_path}" in said
    with counted("after", 1) as advance:
        assert advance.what == "after"


def test_patching_that_is_interrupted_keeps_its_finished_parts(tmp_path, tiny_folder, tiny, brief, monkeypatch, capsys):
    config = StudyConfig.create(str(tiny_folder), str(tiny_folder), concept=brief, quick=True)
    parts = patch_parts(config, ["residual", "heads"])
    assert [part.name.split("_")[2:4] for part in parts] == [[way, part] for way in ("denoise", "noise") for part in ("residual", "heads")]
    real, calls = single.measure_patching, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["parts"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(single, "measure_patching", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_parts(config, tmp_path / "out", parts)
    assert "finished parts are kept" in capsys.readouterr().err
    assert [file.stem for file in (tmp_path / "out").glob("*.parquet")] == [parts[0].name]
    calls.clear()
    monkeypatch.setattr(single, "measure_patching", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    results = measure_parts(config, tmp_path / "out", parts)
    assert len(calls) == 3
    assert load_result(tmp_path / "out" / f"{parts[0].name}.parquet").rows.equals(results[0].rows)
    whole = measure_patching(tiny, load_concept(brief), "default", parts=("residual", "heads"), controls=single.FEW_CONTROLS,
                             marks=single.HEAD_MARKS["context"], max_word_pairs=1)
    places = patch_tables(results)["places"]
    assert places.drop(columns="model").equals(patch_tables(whole)["places"].drop(columns="model"))
