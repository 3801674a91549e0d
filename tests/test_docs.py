"""The documentation: it builds strictly, says every name and command there is, and shows no command or name that there is not."""

import json
import os
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from floors import FILES, PACKAGE, module
from typer.main import get_command
from typer.testing import CliRunner

import alignblind_mi
from alignblind_mi.__main__ import app
from alignblind_mi.studies.verdicts import advice

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
INSTRUMENTS = sorted(set((ROOT / "docs/instruments").glob("*.md")) - {ROOT / "docs/instruments/index.md"})


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def printed(page: Path) -> list[tuple[str, str]]:
    """(snippet, what the page says that it prints; empty where it says nothing) of a page, in order."""
    found = re.finditer(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", page.read_text("utf-8"), re.DOTALL)
    return [(match.group(1), match.group(2) or "") for match in found]


def command_lines(page: Path) -> list[list[str]]:
    """The words of every line of a page that calls the program, without comments and redirections."""
    lines = [shlex.split(line.split(">")[0], comments=True) for block in blocks(page, "sh") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "alignblind"]


def all_commands() -> list[str]:
    return [" ".join([name, *sub]) for name, command in get_command(app).commands.items()
            for sub in ([[one] for one in command.commands] if hasattr(command, "commands") else [[]])]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning of the strict build fails."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)], cwd=ROOT,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_every_public_name_and_module_is_in_the_reference(site):
    listed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    described = {line.split(" ")[0] for line in zlib.decompress(listed[4]).decode().splitlines()}
    for name in alignblind_mi.__all__:
        assert any(one.endswith(f".{name}") for one in described), f"{name} is not described"
    index = (site / "reference/index.html").read_text("utf-8")
    assert all(f"<code>{name}</code></a>" in index for name in alignblind_mi.__all__)
    assert {f"alignblind_mi.{module(file)}" for file in FILES if not file.stem.startswith("__") or file.parent != PACKAGE} <= described


@pytest.mark.slow
def test_every_command_is_described_and_every_notebook_shown(site):
    page = (site / "commands.html").read_text("utf-8")
    commands = all_commands()
    assert {"compare", "concept check", "organism build"} <= set(commands)
    for name in commands:
        assert f"<code>alignblind {name}</code>" in page, f"alignblind {name} is not described"
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / f"{notebook.stem}.html").is_file()


@pytest.mark.slow
def test_the_numbers_of_the_calibration_are_on_its_page(site):
    page = (site / "calibration.html").read_text("utf-8")
    for record in json.loads((ROOT / "docs/calibration.json").read_text("utf-8")):
        assert record["instrument"].replace("_", " ") in page
        assert f"{record['spearman']:.2f} (" in page
        assert f"{record['false_alarm_rate']:.0%} [" in page
    assert all(line.split(":")[0] in page for line in advice(json.loads((ROOT / "docs/calibration.json").read_text("utf-8"))))


@pytest.mark.slow
def test_what_pages_refer_to_nowhere_fails(tmp_path):
    """The strict build is no formality: a page with a wrong link, one with a wrong name and one with a wrong number all fail."""
    for text, said in (("[x](nowhere.md)", "nowhere.md"), ("[`x`][alignblind_mi.nothing]", "alignblind_mi.nothing")):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{text}\n", "utf-8")
        (tmp_path / "mkdocs.yml").write_text("site_name: x\ntheme: mkdocs\nplugins: [autorefs]\n"
                                             + strict_part((ROOT / "mkdocs.yml").read_text("utf-8")), "utf-8")
        done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0
        assert said in done.stderr


def strict_part(config: str) -> str:
    return config[config.index("validation:") : config.index("plugins:")]


NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e-?\d+)?")


@pytest.mark.parametrize("name", ["docs/model.md", *(pytest.param(name, marks=pytest.mark.slow)
                                                     for name in ("README.md", "docs/comparison.md", "docs/tutorial.md"))])
def test_the_python_of_a_page_runs_and_prints_what_the_page_shows(name, tmp_path, monkeypatch, capsys):
    """Snippets share their names, as for one who types them one after the other. Numbers may differ by rounding, and by an answer."""
    monkeypatch.chdir(tmp_path)
    for words in (words for words in command_lines(ROOT / name) if words[0] == "lora"):    # the adapter that the tutorial loads
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    names: dict[str, object] = {}
    capsys.readouterr()
    for code, shown in printed(ROOT / name):
        exec(compile(code, name, "exec"), names)
        said = capsys.readouterr().out
        assert NUMBER.sub("#", said).split() == NUMBER.sub("#", shown).split(), said
        assert [float(one) for one in NUMBER.findall(said)] == pytest.approx([float(one) for one in NUMBER.findall(shown)], abs=0.03), said


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"], ids=lambda p: p.stem)
def test_what_a_walk_through_the_code_names_is_there(page):
    """Files, as written from the root, from the package or from docs/, and names of lists and of private functions."""
    code = "\n".join(file.read_text("utf-8") for file in FILES)
    own = {"NAME", "mine.toml", "__init__.py"}
    names = [name for name in re.findall(r"`([\w./-]+)`", page.read_text("utf-8")) if "NAME" not in name and name not in own]
    files = [name for name in names if re.search(r"\.(pyi?|toml|md|json|txt|yml)$", name)]
    defined = [name for name in names if re.fullmatch(r"_[a-z_]+|[A-Z_]+", name)]
    assert len(files) > 8
    for name in files:
        assert any((folder / name).is_file() for folder in (ROOT, PACKAGE, ROOT / "docs")), f"there is no {name}"
    for name in defined:
        assert re.search(rf"^(?:def |\w+, )?{name}\b", code, re.MULTILINE), f"there is no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    """Files that it links to, names of `ab`, and the commands and options that it shows."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        generated = target.endswith(".ipynb") and (ROOT / "notebooks" / Path(target).name).is_file()
        assert generated or (page.parent / target).exists(), f"there is no {target}"
    for name in re.findall(r"\bab\.([A-Za-z_]+)", text):
        assert name in alignblind_mi.__all__, f"there is no ab.{name}"
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
    for words in command_lines(page):
        command, rest = get_command(app), list(words)
        while hasattr(command, "commands"):
            assert rest[0] in command.commands, f"there is no alignblind {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for option in (word for word in rest if word.startswith("--")):
            assert option in known, f"alignblind {' '.join(words)}: there is no {option}"


@pytest.mark.parametrize("page", INSTRUMENTS, ids=lambda p: p.stem)
def test_an_instrument_says_what_it_measures_when_it_misleads_and_its_source(page):
    text = page.read_text("utf-8")
    assert re.search(r"\*\*What (it|they) (measures?|estimates|shows|does)\.\*\*", text)
    for part in ("```text\n", "## When ", " mislead", "## Use", "```python\n", "**Source.**", "https://", "][alignblind_mi."):
        assert part in text, f"no {part.strip()!r}"


def test_an_instrument_that_was_calibrated_shows_its_record():
    shown = {name for page in INSTRUMENTS for call in re.findall(r"\{\{ calibrated\((.*?)\) \}\}", page.read_text("utf-8"))
             for name in re.findall(r'"(\w+)"', call)}
    assert shown == {record["instrument"] for record in json.loads((ROOT / "docs/calibration.json").read_text("utf-8"))}


@pytest.mark.slow
def test_the_quick_commands_of_the_tutorial_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = {"power": 0, "bias": 0, "score": 0, "concept": 2}    # the organism's tokenizer does not know all cues: the tutorial says so
    lines = [words for words in command_lines(ROOT / "docs/tutorial.md") if words[0] in quick]
    assert {words[0] for words in lines} == set(quick)
    for words in lines:
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == quick[words[0]], done.output
    assert (tmp_path / "tut" / "bias").is_dir()
