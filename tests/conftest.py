import gc
import os
import re
from importlib.resources import files
from pathlib import Path

# Before anything is imported. No test needs a hub, and without a network each try takes 20 seconds; the tests fill all processors, so that
# a second thread of one (of its children, too) only waits.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import checked  # noqa: F401 - before the package is imported
import pytest
import torch
from doubles import llama3_double, study_texts, tiny_llama

from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.stimuli.concept import Concept, load_concept

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 50)    # the libraries' hundreds of thousands of objects stay anyway, and are not looked through so often
# The files that take longest, begun first: a long one begun last would keep one processor alone.
LONGEST = ("test_docs.py", "test_comparison.py", "test_experiments.py", "test_engine.py", "test_study.py", "test_real_model.py",
           "test_attack.py", "test_calibration.py", "test_reliability.py", "test_acceptance.py")
RELEASED = Path(__file__).parents[2] / "shared" / "data" / "released"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order (`--no-loadscope-reorder` keeps it)."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What is there when a file begins, libraries above all, is not looked through by each collection of garbage in it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def race() -> Concept:
    return load_concept("race")


@pytest.fixture(scope="session")
def brief(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A concept file: race with fewer names, words and sentences, for what asks whether all is there and not how large it is."""
    text = files("alignblind_mi.stimuli.concepts").joinpath("race.toml").read_text("utf-8")
    text = re.sub(r"^((?:marked|unmarked|positive|negative) = \[)(.*)\]", lambda m: f"{m[1]}{', '.join(m[2].split(', ')[:2])}]", text,
                  flags=re.MULTILINE)
    for key, kept in {"train": 6, "test": 6, "settled": 6, "sentences": 3}.items():
        text = re.sub(rf"^({key} = \[\n)((?:  .*\n)+)\]", lambda m, kept=kept: "".join([m[1], *m[2].splitlines(True)[:kept], "]"]), text,
                      flags=re.MULTILINE)
    path = tmp_path_factory.mktemp("concepts") / "brief.toml"
    path.write_text(text, "utf-8")
    return str(path)


@pytest.fixture(scope="session")
def released() -> Path:
    if not RELEASED.is_dir():
        pytest.skip(f"the released answers are not at {RELEASED} (they have no licence and are not part of the project)")
    return RELEASED


@pytest.fixture(scope="session")
def texts(race: Concept) -> list[str]:
    return study_texts(race)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    words = sorted({w for text in texts for w in re.findall(r"\[MASK\]|\w+|[^\w\s]", text)})
    return tiny_llama(tmp_path_factory.mktemp("tiny"), words)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> HookedModel:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str], race: Concept) -> Path:
    """The double of Llama 3; its tokenizer has not seen the names, so that they are several tokens."""
    names = {*race.cue("names").marked, *race.cue("names").unmarked}
    return llama3_double(tmp_path_factory.mktemp("llama3"), [text for text in texts if not names & set(re.findall(r"\w+", text))])


@pytest.fixture(scope="session")
def llama3(llama3_folder: Path) -> HookedModel:
    return load_model(str(llama3_folder))
