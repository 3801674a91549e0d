import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"    # before anything is imported: no test needs a hub, and without a network each try takes 20 seconds

import pytest
import torch
from doubles import llama3_double, study_texts, tiny_llama

from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.stimuli.concept import Concept, load_concept

torch.set_num_threads(1)
RELEASED = Path(__file__).parents[2] / "shared" / "data" / "released"


@pytest.fixture(scope="session")
def race() -> Concept:
    return load_concept("race")


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
