"""Whatever is typed or lies on the disk: a refusal in one sentence, before any work, and no file changed (see attack.py)."""

import json
import subprocess
import sys
import time
from pathlib import Path

import attack
import attack_python
import pytest
from attack_harness import Case, Place, Stream, attempt, replaced

HERE = Path(__file__).parent
MEBIBYTES, FEWEST = 2048, 400


@pytest.fixture(scope="module", params=["attack.py", "attack_python.py"])
def table(request) -> dict:
    """Every third case of a script's table, run as one process of its own."""
    done = subprocess.run([sys.executable, str(HERE / request.param), "--json", "--third"], capture_output=True, text=True, timeout=1800)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_case_ends_as_expected(table):
    failing = [f"{one['group']} | {one['option']} | {one['value']}: {'; '.join(one['faults'])}" for one in table["cases"] if one["faults"]]
    assert not failing, f"{len(failing)} of {len(table['cases'])}\n" + "\n".join(failing)


def test_a_table_is_large_and_needs_little_memory(table):
    found = table["summary"]
    assert found["cases"] >= FEWEST
    assert found["memory_mib"] < MEBIBYTES
    assert sum(one["expect"] == "succeed" for one in table["cases"]) >= 10


def test_every_option_of_every_verb_has_bad_values():
    tried = {(case.group, case.option) for case in attack.all_cases() if case.expect == "refuse"}
    for verb, option in attack.options():
        assert (verb or "alignblind", option.opts[0]) in tried, f"{verb} {option.opts[0]} has no bad values in tests/attack.py"
    assert {case.group for case in attack.all_cases()} >= set(attack.verbs())


def test_every_setting_of_a_study_file_has_bad_values():
    from alignblind_mi import StudyConfig

    tried = {case.value.split(":")[0] for case in attack.yaml_cases() if case.expect == "refuse"}
    assert {name for name, _ in attack.settings(StudyConfig)} <= tried


def test_no_case_stands_there_twice():
    for make in (attack.all_cases, attack_python.all_cases):
        keys = [case.key for case in make()]
        assert len(keys) == len(set(keys)), sorted({key for key in keys if keys.count(key) > 1})


REFUSAL = "alignblind: the seed -1 is negative: give 0 or more."


def ended(tmp_path: Path, act, **settings):
    """How a case ends whose act is given here; its folder holds a file `mine.txt`."""

    def run(place: Place) -> Place:
        (place.folder / "mine.txt").write_text("mine")
        return place

    case = Case("verb", "--seed", "-1", run, **{"named": ("-1",), "limit": 0.3, **settings})
    with replaced(sys, "stdout", Stream(sys.stdout)), replaced(sys, "stderr", Stream(sys.stderr)):
        return attempt(case, Place(tmp_path, tmp_path / "case"), act, [])


def say(text: str, code: int, stream: str = "stderr"):
    def act(place: Place) -> int:
        getattr(sys, stream).write(f"{text}\n")
        return code

    return act


def write(name: str, code: int = 2):
    def act(place: Place) -> int:
        (place.folder / name).write_text("other")
        return say(REFUSAL, code)(place)

    return act


def raise_(error: BaseException):
    def act(place: Place) -> int:
        raise error

    return act


def swallow(place: Place) -> int:
    """Endless, and it does not want to hear of it."""
    begun = time.monotonic()
    while time.monotonic() - begun < 5:
        try:
            time.sleep(5)
        except Exception:  # noqa: BLE001 - what is shown is that this does not help
            continue
    return 0


def load(place: Place) -> int:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("nothing")
    return 0


def connect(place: Place) -> int:
    import socket

    socket.socket().connect(("192.0.2.1", 80))
    return 0


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (say(REFUSAL, 2), ""),
        (say(f"note: something.\n{REFUSAL}", 2), ""),
        (say(REFUSAL, 0), "silent"),
        (say(REFUSAL, 1), "code"),
        (say("Traceback\nalignblind: no", 2), "sentence"),
        (say("alignblind: the seed -1 is negative", 2), "sentence"),
        (say("alignblind: something is wrong.", 2), "unnamed"),
        (say("\u256d\u2500 Error \u2500\u256e\n Invalid value", 2), "unnamed by typer"),
        (say("alignblind: -1 " + "x" * 5000 + ".", 2), "sentence"),
        (say("alignblind: -1 \x1b[31m.", 2), "sentence"),
        (write("mine.txt"), "files"),
        (write("new.txt"), "files"),
        (write("out"), "files"),
        (raise_(RuntimeError("x")), "traceback"),
        (raise_(MemoryError()), "traceback"),
        (swallow, "hang"),
        (load, "work"),
        (connect, "network"),
    ],
)
def test_the_table_sees_what_is_wrong(act, kind, tmp_path):
    assert ended(tmp_path, act).kind == kind


def test_a_case_that_must_succeed_may_write_and_not_be_refused(tmp_path):
    assert ended(tmp_path / "a", write("out", 0), expect="succeed").kind == ""
    assert ended(tmp_path / "b", say(REFUSAL, 2), expect="succeed").kind == "refused"
    assert ended(tmp_path / "c", write("mine.txt", 0), expect="succeed").kind == "files"
