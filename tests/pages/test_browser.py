"""Every page in a real browser, with hostile texts wherever a text comes from somewhere else: none runs, and what is harmless is drawn.

A payload that ran would set the document's id and write to the console; both words are put together at run time, so that they stand nowhere
else. Chromium is driven by its own options: what it makes of the page is read from its printed DOM, its console and a picture.
"""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from calibrated_rows import perfect
from matplotlib.image import imread
from test_report import VERSIONS, answers, config_of, instrument_readings, make_study, readings

from alignblind_mi.organism.family import calibration_family
from alignblind_mi.pages import figures
from alignblind_mi.pages.calibration_page import write_calibration
from alignblind_mi.pages.comparison_page import write_comparison
from alignblind_mi.pages.report import write_report
from alignblind_mi.pages.views import as_page, pattern_view, token_view
from alignblind_mi.results import Result, save_result
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies import calibration

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install -y chromium")

RUN = "document.documentElement.id='PW'+'NED';console.log('PW'+'NED')"
RAN = "PWNED"
ELEMENT = "<b id=OWNED>x</b>"
PAYLOADS = (f"</script><script>{RUN}</script>", f'<img src=x onerror="{RUN}">', f'"><svg onload="{RUN}">',
            f"'><iframe srcdoc=\"<script>{RUN}</script>\">",
            f"<!--<script>{RUN}</script>-->", f"</title></style><script>{RUN}</script>", f'"); {RUN}; ("', f"\u2028{RUN}\u2029", ELEMENT,
            f"{{{{ {RUN} }}}}", f"javascript:{RUN}", "&nbsp;&lt;i&gt;", "<|begin_of_text|>", " harmless")
EVIL = "".join(PAYLOADS[:6]) + ELEMENT
NAME = f'<img src=x onerror="{RUN}">' + ELEMENT.replace("/", "")    # as a file can be called


STILL = ("--dump-dom", "--virtual-time-budget=300")    # of pages that have no script of their own


class Shown(NamedTuple):
    """What the browser made of a page: its DOM as HTML and its console."""

    dom: str
    console: str

    @property
    def body(self) -> str:
        """The DOM without the scripts that belong there."""
        return re.sub(r"<script type=\"module\">.*?</script>", "", self.dom, flags=re.DOTALL)


@pytest.fixture
def chromium(tmp_path):
    """Run the browser on a file. Frames without rights share its process, so that a picture waits for them."""
    def run(file: Path, *options: str) -> Shown:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-3d-apis", "--enable-logging=stderr",
                   "--virtual-time-budget=2500", "--disable-features=IsolateSandboxedIframes", "--disable-site-isolation-trials",
                   f"--user-data-dir={tmp_path / 'profile'}", *options, file.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        return Shown(done.stdout.decode("utf-8"), done.stderr.decode("utf-8", "replace"))
    return run


@pytest.fixture(scope="module", autouse=True)
def no_bitmaps():
    """Pages have their figures as SVG; the bitmaps beside them take most of the time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "to_png", lambda figure: b"png")
        yield


def check(shown: Shown, *said: str) -> None:
    """Nothing ran or became an element, nothing was fetched, and what is harmless is there."""
    assert RAN not in shown.dom
    assert RAN not in shown.console
    assert "OWNED" in shown.body
    assert not re.search(r"<b [^>]*OWNED", shown.body)
    assert not re.search(r"<(img|svg|iframe)[^>]*(onerror|onload|src=.?x\b)", shown.body)
    assert "Content Security Policy" not in shown.console    # nothing even came to the point of being refused
    for text in said:
        assert text in shown.body


def inked(picture: Path, parts: int) -> list[int]:
    """Pixels that are not white in each of so many equal bands of a picture."""
    pixels = (imread(picture)[..., :3] < 0.9).any(-1)
    return [int(band.sum()) for band in np.array_split(pixels, parts)]


def attention(tokens: tuple[str, ...] = PAYLOADS) -> pd.DataFrame:
    return pd.DataFrame([{"layer": 1, "head": head, "query": q, "key": k, "token": tokens[q], "weight": 1 / (q + 1)}
                         for head in range(2) for q in range(len(tokens)) for k in range(q + 1)])


def lens(tokens: tuple[str, ...] = PAYLOADS) -> pd.DataFrame:
    return pd.DataFrame([{"position": i, "token": token, "layer": layer, "log_odds": i - layer}
                         for i, token in enumerate(tokens) for layer in range(2)])


# ---- views -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "tokens"])
def test_a_view_shows_tokens_and_runs_none(chromium, tmp_path, name):
    view = pattern_view(attention()) if name == "attention" else token_view(lens())
    (tmp_path / "view.html").write_text(as_page(view, EVIL), "utf-8")
    shown = chromium(tmp_path / "view.html", "--dump-dom")
    drawn = re.findall(r"<button style[^>]*>(.*?)</button>" if name == "attention" else r"<span><span style[^>]*>(.*?)</span></span>",
                       shown.body, re.DOTALL)
    as_text = [token.replace("&nbsp;", " ").replace("\u2028", " ").replace("\u2029", " ") for token in drawn]
    wanted = [token.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\u2028", " ").replace("\u2029", " ")
              for token in PAYLOADS]
    assert as_text == wanted
    check(shown, "Head 1" if name == "attention" else "layer 1")


def test_a_view_alone_stands_in_a_page_of_somebody_else(chromium, tmp_path):
    """Without the page's own policy: what is escaped is escaped."""
    html = pattern_view(attention()).html + token_view(lens()).html
    (tmp_path / "page.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{html}</body>', "utf-8")
    check(chromium(tmp_path / "page.html", "--dump-dom"), "Head 1", "layer 1", "&lt;|begin_of_text|&gt;")


def test_a_notebook_s_views_are_drawn_and_run_nothing(chromium, tmp_path):
    cells = [view._repr_html_() for view in (pattern_view(attention()), token_view(lens()))]
    assert all(cell.startswith('<iframe sandbox="allow-scripts" ') and cell.count("<") == 2 for cell in cells)
    (tmp_path / "notebook.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{"".join(cells)}</body>', "utf-8")
    picture = tmp_path / "notebook.png"
    shown = chromium(tmp_path / "notebook.html", "--window-size=1000,850", f"--screenshot={picture}")
    assert RAN not in shown.console
    assert min(inked(picture, 2)) > 2000


def test_a_page_runs_no_other_script_even_where_one_got_in(chromium, tmp_path):
    """The second wall: a page whose escaping failed. The first test of a payload, too: without the policy it does run."""
    page = as_page(token_view(lens((" harmless", "OWNED"))), "title").replace("</body>", f"{PAYLOADS[1]}<script>{RUN}</script></body>")
    (tmp_path / "walled.html").write_text(page, "utf-8")
    shown = chromium(tmp_path / "walled.html", "--dump-dom")
    assert f'id="{RAN}"' not in shown.dom
    assert "layer 1" in shown.body
    (tmp_path / "open.html").write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page), "utf-8")
    assert f'id="{RAN}"' in chromium(tmp_path / "open.html", "--dump-dom").dom


# ---- pages -------------------------------------------------------------------------------------------------------------------------


def hostile_concept(folder: Path) -> Path:
    """The built-in concept with payloads in its descriptions, questions and phrases."""
    concept = (Path(__file__).parents[2] / "alignblind_mi" / "stimuli" / "concepts" / "race.toml").read_text("utf-8")
    for field in ("description", "text"):
        concept = re.sub(rf'^({field} = ")', lambda found: found.group() + json.dumps(EVIL.replace("{", "(").replace("}", ")"))[1:-1] + " ",
                         concept, flags=re.MULTILINE)
    file = folder / f"{NAME}.toml".replace("/", "")
    file.write_text(concept, "utf-8")
    load_concept(str(file))
    return file


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    out = make_study(folder / NAME, base=EVIL, aligned=EVIL + " 2", concept=str(hostile_concept(folder)),
                     without=("steering",), base_revision=EVIL, chat={"system": EVIL, "date": EVIL})
    for role in ("base", "aligned"):
        for name, rows in (("attention", attention()), ("tokens", lens())):
            about = {"model": EVIL, "role": role, "treatment": "untreated", "family": "untreated", "sense": "", "layers": ""}
            note = {"versions": VERSIONS | {EVIL: EVIL}, "made": "2025-01-02T03:04:05+00:00", "model": EVIL, "engine": EVIL,
                    "split_identifiers": {EVIL: 2}}
            save_result(Result(rows.assign(**about), note), out / f"view_{name}_{role}.parquet")
    return write_report(out)


def test_the_report_of_a_study(chromium, study, tmp_path):
    shown = chromium(Path(shutil.copy(study, tmp_path)), *STILL)    # without its frames, which the next test draws
    check(shown, "Position versus association", "data:image/svg+xml;base64", "&lt;img src=x onerror=", "r_blind")
    assert shown.dom.count('sandbox="allow-scripts"') == 4


def test_the_frames_of_a_report_are_drawn_and_run_nothing(chromium, study, tmp_path):
    page = study.read_text("utf-8")
    policy, frames = re.findall(r"<meta http-equiv=[^>]*>", page), re.findall(r"<iframe [^>]*>", page)
    assert len(frames) == 4
    body = "".join(f'{frame.replace("lazy", "eager")}</iframe>' for frame in frames[:2])    # the others are of the other model
    style = "<style>* { margin: 0; border: 0 } iframe { display: block; width: 100%; height: 400px }</style>"
    (study.parent / "frames.html").write_text(f'<!DOCTYPE html><meta charset="utf-8">{policy[0]}{style}<body>{body}</body>', "utf-8")
    shown = chromium(study.parent / "frames.html", "--window-size=1000,800", f"--screenshot={tmp_path / 'frames.png'}")
    assert RAN not in shown.console
    assert "Content Security Policy" not in shown.console
    assert min(inked(tmp_path / "frames.png", 2)) > 2000


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """A comparison of made rows: the untreated pair and a treatment, a placebo and an unlearned model of hostile names."""
    folder, concept = tmp_path_factory.mktemp("browser_comparison"), load_concept("race")
    names = ["untreated", "steer" + NAME, "placebo" + NAME, "unlearn" + ELEMENT.replace("/", "")]
    families = ["untreated", "steering", "placebo", "unlearning"]
    planned = list(zip(names, families, strict=True))
    rivals = [{"treatment": name, "family": family, "curve": family if family in ("steering", "unlearning") else "", "dose": 1.0,
               "placebos": [names[2]] if family == "steering" else []} for name, family in planned]
    config = config_of(base=EVIL, aligned=EVIL) | {"comparison": True, "data": [], "quick": True}
    (folder / "study.json").write_text(json.dumps(config), "utf-8")
    plan = {"rivals": rivals, "left_out": {EVIL: EVIL}, "trained": []}
    (folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    random = np.random.default_rng(0)
    for name, role, family in [("untreated", "base", "untreated"), *((name, "aligned", family) for name, family in planned)]:
        treatment = {"treatment": name, "family": family, "sense": "", "layers": ""}
        given = answers(concept, role, treatment, design="balanced", invalid=0.1, rate=0.9 if name == "untreated" else 0.6)
        effects = pd.DataFrame([{"measure": measure, "item": f"i{i}", "value": float(random.random()), "weight": 1.0} for i in range(4)
                                for measure in ("kl_neutral", "kl_mentions", "surprise", "copying", "judging", "other_questions",
                                                "group_questions")]).assign(**treatment)
        parts = {"answers": given, "readings": pd.concat([readings(role, treatment, "paper"),
                                                          instrument_readings("selfie", role, treatment).assign(instrument=EVIL)]),
                 "effects": effects, "elsewhere": given[given["kind"] == "implicit"].assign(concept=EVIL, cue=EVIL)}
        note = {"revision": EVIL, "dtype": "float32", "versions": VERSIONS | {EVIL: "1"}, "made": EVIL, "details": EVIL, "prefix": EVIL,
                "cost": {"parameters": 1, "seconds": 1.0, "latency": 1.0}}
        for part, rows in parts.items():
            save_result(Result(rows, note), folder / f"{role}_{name}_{part}.parquet")
    return write_comparison(folder)


def test_the_page_of_a_comparison(chromium, comparison):
    check(chromium(comparison, *STILL), "Benefit and damage", "data:image/svg+xml;base64", "&lt;img src=x onerror=")
    assert len(list((comparison.parent / "figures").glob("*.svg"))) == 3


def test_a_figure_opened_by_itself(chromium, comparison):
    for name in ("comparison", "frontier"):
        shown = chromium(comparison.parent / "figures" / f"{name}.svg", *STILL)
        assert RAN not in shown.dom + shown.console
        assert not re.search(r"<(img|script|b)\b", re.sub(r"<!--.*?-->", "", shown.dom, flags=re.DOTALL))
        assert "<path" in shown.dom


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser_calibration")
    (folder / "study.json").write_text(json.dumps({"calibration": True}), "utf-8")
    few = [member for member in calibration_family((0,)) if member.kind in ("null", "decodable", "depth") or member.reading == 0.95][:3]
    for member in few:
        rows = pd.concat([perfect(member, name) for name in calibration.INSTRUMENTS])
        note = {"member": {**asdict(member), "kind": EVIL}, "failed_gates": [EVIL], "config": {"quick": True}, "made": EVIL,
                "versions": VERSIONS | {EVIL: EVIL}}
        save_result(Result(rows, note), folder / f"{member.name}.parquet")
    return write_calibration(folder)


def test_the_page_of_a_calibration(chromium, calibrated):
    check(chromium(calibrated, *STILL), "Which instrument to believe", "data:image/svg+xml;base64", "&lt;img src=x onerror=")


def test_tables_beside_the_pages_have_no_formulas(comparison, study):
    files = [*comparison.parent.glob("tables/*.csv"), *study.parent.glob("tables/*.csv")]
    assert len(files) > 15
    for file in files:
        cells = pd.read_csv(file, dtype=object).select_dtypes(object).stack()
        assert not [cell for cell in cells if re.match(r"[=@]|[+-](?!\d|inf)", str(cell))]
