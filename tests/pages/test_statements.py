"""Pages say first what they do not say: models that cannot do the task, instruments that do not read; greyed, and in no claim."""

import pytest
from test_report import Page, competence_rows, make_study, qualified_rows

from alignblind_mi.pages import figures
from alignblind_mi.pages.report import draw, summary_tables, write_report
from alignblind_mi.pages.saved_study import read_study
from alignblind_mi.pages.statements import headline, mute_figures, muted_rows
from alignblind_mi.results import Result, load_result, save_result

UNTREATED = {"treatment": "untreated", "family": "untreated", "sense": "", "layers": ""}


@pytest.fixture
def unsaved(monkeypatch):
    monkeypatch.setattr(figures, "to_png", lambda figure: b"png")
    monkeypatch.setattr(figures, "to_svg", lambda figure: b"<svg/>")


def change(folder, name, rows):
    save_result(Result(rows, load_result(folder / f"{name}.parquet").provenance), folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study whose base model is at chance, and whose base model no instrument reads."""
    folder = make_study(tmp_path_factory.mktemp("statements") / "study")
    change(folder, "competence_base", competence_rows("base", UNTREATED, 0.5))
    change(folder, "qualified_base", qualified_rows("base", {"treatment": "untreated"}, 0.0))
    return folder


@pytest.mark.usefixtures("unsaved")
def test_the_first_lines_say_what_is_no_statement(studied):
    page = Page(write_report(studied))
    said = page.words("summary")
    for kind in ("implicit", "explicit"):
        assert f"No statement about {kind} bias: some/base (base) cannot do the {kind} task: 50 % right" in said
    assert "No statement by the patchscope in its own setting: it does not surely read some/base (base)." in said
    assert said.index("No statement") < said.index("This study asked")
    assert "Implicit bias, base (no statement)" in said
    assert "Implicit bias, aligned:" in said
    assert 'class="muted"' in (studied / "report.html").read_text("utf-8")


def test_only_what_reads_and_can_enters_claims(studied):
    audit = summary_tables(read_study(studied))["audit"].set_index("claim")["verdict"]
    alignment = audit[audit.index.str.startswith("Alignment")]
    assert alignment.str.startswith("cannot be told (base: ").all()
    assert "cannot do the implicit task" in alignment.iloc[0]
    assert not audit[audit.index.str.contains("lowers implicit bias")].str.contains("cannot do").any(), "the aligned model can"


def test_rows_and_panels_of_the_one_model_are_muted(studied):
    study = read_study(studied)
    muted = muted_rows(study.qualified)
    assert muted("behaviour", {"role": "base", "kind": "implicit"})
    assert not muted("behaviour", {"role": "aligned", "kind": "implicit"})
    assert muted("instruments", {"role": "base", "panel": "logit lens"})
    assert not muted("instruments", {"role": "aligned", "panel": "logit lens"})
    assert not muted("steering", {"treatment": "steer_race_1-3"})
    tables = summary_tables(study)
    drawn = draw(tables)
    mute_figures(drawn, study.qualified)
    said = {name: [text.get_text() for axis in figure.axes for text in axis.texts] for name, figure in drawn.items()}
    assert all("no statement" in said[name] for name in ("behaviour", "position", "awareness", "instruments"))
    assert "no statement" not in said["steering"]


@pytest.mark.usefixtures("unsaved")
def test_a_study_without_qualification_says_so(tmp_path):
    folder = make_study(tmp_path / "study", without=("competence", "qualified", "lora"))
    page = Page(write_report(folder))
    assert "Not qualified: whether these models can do the task" in page.words("summary")
    assert "competence" not in " ".join(read_study(folder).missing), "it was skipped, and is not missing"
    assert page.cells["audit"][1][page.cells["audit"][0].index("controls")].endswith("the models were not qualified")


@pytest.mark.usefixtures("unsaved")
def test_an_adapter_that_loses_the_task_has_not_reduced_bias(tmp_path):
    folder = make_study(tmp_path / "study")
    about = {"treatment": "lora_early", "family": "lora", "sense": "", "layers": ""}
    change(folder, "lora_early_competence", competence_rows("aligned", about, 0.5))
    audit = summary_tables(read_study(folder))["audit"].set_index("claim")["verdict"]
    (verdict,) = audit[audit.index.str.startswith("LoRA early")]
    assert verdict.startswith("lost the task (cannot do the implicit task: 50 % right")
    (other,) = audit[audit.index.str.startswith("LoRA late")]
    assert not other.startswith("lost")


def test_nothing_is_said_of_models_that_pass(tmp_path):
    study = read_study(make_study(tmp_path / "study", without=("steering", "lora", "noise")))
    assert headline(study.qualified, {"base": "a", "aligned": "b"}) == []
