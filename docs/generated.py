"""What the documentation says that is known elsewhere, put in when it is built: numbers, commands, public names, modules, notebooks.

A hook of MkDocs (see mkdocs.yml). Pages are Jinja templates with the functions in `FUNCTIONS`; what a page asks for and is not there stops
the build. Nothing here is written down twice: numbers come from the JSON files in docs/, commands from Typer, names
from the package, floors from the list that tests/test_floors.py keeps, and notebooks are shown as they were run (docs/executed.py).
"""

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from executed import NOTEBOOKS, executed  # beside this file: MkDocs looks there while it loads a hook
from jinja2 import Environment, StrictUndefined
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "alignblind_mi"


# ---- numbers -----------------------------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    """The records of docs/calibration.json."""
    return json.loads((ROOT / "docs" / "calibration.json").read_text("utf-8"))


def record(instrument: str) -> dict[str, Any]:
    """The record of one instrument; KeyError for one that was not calibrated."""
    return {one["instrument"]: one for one in records()}[instrument]


def calibrated(*instruments: str) -> str:
    """How far instruments can be trusted on organisms with known truth, as a table, and what follows from it."""
    header = [""] + [f"**{name.replace('_', ' ')}**" for name in instruments]
    rows = [[what, *(write(record(name)) for name in instruments)] for what, write in SAID.items()]
    return f"{_table([header, *rows])}\n\n{advice(*instruments)}"


def calibration_table() -> str:
    """All instruments of the calibration, one a row."""
    names = [one["instrument"] for one in records()]
    return _table([["instrument", *SAID], *([name.replace("_", " "), *(write(record(name)) for write in SAID.values())] for name in names)])


def honesty_table() -> str:
    """What qualification says of organisms, of random weights and of shuffled senses, from docs/qualified.json."""
    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f}"

    def alarms(one: dict[str, Any], key: str) -> str:
        if not one[f"{key}_n"]:
            return "–"
        return f"{100 * one[f'{key}_reads']:.1f} [{100 * one[f'{key}_low']:.1f}–{100 * one[f'{key}_high']:.1f}] of {one[f'{key}_n']}"

    header = ["instrument", "setting", "organisms", "reads %", "rank correlation", "distance", "held %", "random weights %",
              "shuffled senses %"]
    found = json.loads((ROOT / "docs" / "qualified.json").read_text("utf-8"))
    return _table([header, *([one["instrument"].replace("_", " "), one["setting"], str(one["organisms"]), share(one["reads"]),
                              f"{one['spearman']:.2f}", f"{one['error']:.2f}", share(one["held"]), alarms(one, "random"),
                              alarms(one, "shuffled")] for one in found)])


def advice(*instruments: str) -> str:
    """The verdicts of the calibration, from its records alone: on all instruments, or on some."""
    from alignblind_mi.studies.verdicts import advice

    return "\n".join(f"* {line}" for line in advice([record(name) for name in instruments] or records()))


def error_rates() -> dict[str, Any]:
    """What tests/error_rates.py simulated."""
    return json.loads((ROOT / "docs" / "error_rates.json").read_text("utf-8"))


def coverage_table() -> str:
    """Coverage of rates in every simulated world, by procedure."""
    found = error_rates()
    rows = [["world", "templates differ by", *next(iter(found["rates"].values()))]]
    for world, procedures in found["rates"].items():
        rows += [[world if not i else "", f"{spread:g}", *(f"{points[i][0]:.0%}" for points in procedures.values())]
                 for i, spread in enumerate(found["spreads"])]
    return _table(rows)


def size_table() -> str:
    """How often no difference was taken for one, and p and interval disagreed."""
    found = error_rates()
    rows = [["world", "effect differs by", "p < .05: former", "p < .05: ours", "disagreed: former", "disagreed: ours"]]
    for world, by in found["nulls"].items():
        rows += [[world if not i else "", f"{spread:g}", *(f"{by[name][i][k]:.1%}" for k in (1, 2) for name in ("former", "ours"))]
                 for i, spread in enumerate(found["effects"])]
    return _table(rows)


def difference_table() -> str:
    """Coverage of true differences."""
    found = error_rates()
    rows = [["world", "effect differs by", "former", "ours"]]
    for world, by in found["differences"].items():
        rows += [[world if not i else "", f"{spread:g}", *(f"{by[name][i][0]:.0%}" for name in ("former", "ours"))]
                 for i, spread in enumerate(found["effects"])]
    return _table(rows)


def readings_table() -> str:
    """Coverage of means of readings and patches."""
    found = error_rates()["readings"]
    return _table([["values", "contexts or word pairs alone", "with templates"],
                   *([name, f"{by['one unit']:.0%}", f"{by['ours']:.0%}"] for name, by in found.items())])


def _table(rows: list[list[str]]) -> str:
    lines = [" | ".join(["", *row, ""]).strip() for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _by_seed(one: dict[str, Any]) -> str:
    return f"{_number(one['spearman'])} ({', '.join(_number(value, 1) for value in one['spearman_by_seed'].values())})"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _error(one: dict[str, Any]) -> str:
    first, last = (("–" if one[name] is None else f"{one[name]:.0f}") for name in ("depth_error", "last_error"))
    return f"{first} / {last}"


def _causal(one: dict[str, Any]) -> str:
    if one["causal_separated"] is None:
        return "–"
    share = "" if one["decodable_share"] is None else f" ({_number(one['decodable_share'])})"
    return ("yes" if one["causal_separated"] else "no") + share


def _alarms(one: dict[str, Any]) -> str:
    return f"{one['false_alarm_rate']:.0%} [{one['false_alarm_low']:.0%}–{one['false_alarm_high']:.0%}] ({one['false_alarm_n']})"


SAID: dict[str, Callable[[dict[str, Any]], str]] = {
    "follows": lambda one: one["measures"],
    "rank correlation with what was planted (by seed)": _by_seed,
    "with the other knob": lambda one: _number(one["spearman_other_knob"]),
    "error of the first / last layer": _error,
    "tells a used sense from an unused one (share shown)": _causal,
    "false alarms (n)": _alarms,
    "coverage of 95 % intervals": lambda one: "–" if one["coverage"] is None else f"{one['coverage']:.1%}",
}


# ---- commands and names ------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its options, as Typer documents them."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from alignblind_mi.__main__ import app

    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="alignblind")
    return text.split("\n", 2)[2]    # the page has a title of its own


def floors() -> tuple[str, ...]:
    """The floors, top down, from tests/floors.py."""
    tree = ast.parse((ROOT / "tests" / "floors.py").read_text("utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "FLOORS")


def folders() -> list[str]:
    """The floors that are folders, top down."""
    return [name for name in floors() if (PACKAGE / name).is_dir()]


def floor_table() -> str:
    """The floors, top down, and what each says of itself."""
    rows = [["floor", "what lives there, what it knows and does not know"]]
    rows += [[f"[`{name}/`](reference/{name}.md)" if name in folders() else f"`{name}.py`", _said(name)] for name in floors()]
    return _table(rows)


def protocol_table() -> str:
    """What the two protocols do in different ways, and why, by the package's own list."""
    from alignblind_mi.stimuli.protocol import DIFFERENCES

    rows = [["", "`paper`", "`best`", "why `best` does it otherwise"]]
    return _table(rows + [[one.topic, one.paper, one.best, one.why] for one in DIFFERENCES])


def protocol_stays() -> str:
    """In what neither protocol is the paper's."""
    from alignblind_mi.stimuli.protocol import STAYS

    return "\n".join(f"* {line}" for line in STAYS)


def _said(name: str) -> str:
    """The docstring of a folder or of a module at the root, on one line."""
    said = ast.get_docstring(ast.parse(_file(f"alignblind_mi.{name}").read_text("utf-8"))) or ""
    return " ".join((said if name in folders() else said.split("\n\n")[0]).split()).replace("|", r"\|")


def public() -> dict[str, str]:
    """Public name -> the module that it is imported from, by the package's list of them."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8"))
    return {alias.name: f"alignblind_mi.{node.module}" for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


def public_names() -> str:
    """Every name of `alignblind_mi`, linked to where it is described."""
    import alignblind_mi

    rows, where = [["name", "defined in", "what it is"]], public()
    for name in alignblind_mi.__all__:
        module, said = _defined(where[name], name)
        rows.append([f"[`{name}`][{module}.{name}]", f"`{module.removeprefix('alignblind_mi.')}`", said.replace("|", r"\|")])
    return _table(rows)


def _defined(module: str, name: str) -> tuple[str, str]:
    """The module that defines a name, which another may pass on, and the first sentence said of it."""
    tree = ast.parse(_file(module).read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return module, (ast.get_docstring(node) or "").split("\n")[0]
        if isinstance(node, ast.ImportFrom) and node.module and name in [alias.asname or alias.name for alias in node.names]:
            return _defined(node.module, name)
    return module, ""


def _file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules(name: str) -> Iterator[str]:
    """The module of a floor, or all of a folder."""
    if name in folders():
        for file in sorted((PACKAGE / name).rglob("*.py")):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    else:
        yield f"alignblind_mi.{name}"


def _folder_page(name: str) -> str:
    return "\n\n".join([f"# {name}", *(f"::: {module}" for module in modules(name))]) + "\n"


def _root_page() -> str:
    roots = [module for name in floors() if name not in folders() and not name.startswith("__") for module in modules(name)]
    return "\n\n".join(["# Results, progress, errors", *(f"::: {module}" for module in roots)]) + "\n"


# ---- the hook ----------------------------------------------------------------------------------------------------------

FUNCTIONS = {"calibrated": calibrated, "calibration_table": calibration_table,
             "honesty_table": honesty_table, "advice": advice, "record": record, "records": records,
             "commands": commands, "public_names": public_names,
             "floor_table": floor_table, "protocol_table": protocol_table, "protocol_stays": protocol_stays, "error_rates": error_rates,
             "coverage_table": coverage_table, "size_table": size_table, "difference_table": difference_table,
             "readings_table": readings_table}


@event_priority(100)    # before the plugins, which take notebooks from the list
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks with their outputs, and a page of the reference for each folder."""
    for notebook in reversed(NOTEBOOKS):    # tests that run beside a build begin with the first
        kept = executed(notebook).parents[1]
        files.append(File(f"notebooks/{notebook.name}", str(kept), config.site_dir, config.use_directory_urls))
    for name in folders():
        files.append(File.generated(config, f"reference/{name}.md", content=_folder_page(name)))
    files.append(File.generated(config, "reference/root.md", content=_root_page()))
    return files


@event_priority(100)
def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what a page asks for."""
    written = page.file.src_uri.endswith(".md") and page.file.generated_by is None
    return Environment(undefined=StrictUndefined, autoescape=False).from_string(markdown).render(FUNCTIONS) if written else markdown
