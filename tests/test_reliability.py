"""Whatever happens to a run (killed, a full or read-only disk, a damaged file, two processes), nothing is lost and the error is clear."""

import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from doubles import tiny_llama

from alignblind_mi import results
from alignblind_mi.borders.writing import one_process, write_text
from alignblind_mi.errors import AlignblindError, ResultError
from alignblind_mi.results import Result, StudyFolder, load_result, save_result
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.parts import Part
from alignblind_mi.studies.running import load_study, run_parts

TESTS = Path(__file__).parent
FOREIGN = ("taken/thesis.txt", "taken/deep/data.csv", ".half.part/notes.txt", "early.txt", ".early.part.txt")    # as in kill_driver.py
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
OF_THE_MOMENT = {"made": "", "batches": "", "cost": ""}    # provenance that may differ: when, free memory, times
ROWS = pd.DataFrame({"n": range(2000), "text": [f"row {i}" for i in range(2000)], "x": np.linspace(0, 1, 2000)})


@pytest.fixture(scope="module")
def small(tmp_path_factory, texts) -> Path:
    words = sorted({w for text in texts for w in re.findall(r"\[MASK\]|\w+|[^\w\s]", text)})
    return tiny_llama(tmp_path_factory.mktemp("small") / "model", words, layers=2)


# ---- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_no_row(small, brief, tmp_path):
    command = [sys.executable, str(TESTS / "kill_driver.py"), str(small), brief, str(tmp_path), "50", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert sum(said["killed"].values()) == 50
    for number in range(said["finished"].pop("adapter")):
        mine = tmp_path / "killed" / f"adapter-{number}" / "mine"
        there = [str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file() and path.parent != mine / "early"]
        assert sorted(there) == sorted(FOREIGN)
        assert all((mine / name).read_text() == f"the user's own {name}" for name in FOREIGN)
        weights = tmp_path / "undisturbed" / "adapter" / "mine" / "early" / "adapter_model.safetensors"
        assert (mine / "early" / weights.name).read_bytes() == weights.read_bytes()
    for kind, times in said["finished"].items():
        expected = load_study(tmp_path / "undisturbed" / kind)
        for number in range(times):
            folder = tmp_path / "killed" / f"{kind}-{number}"
            found = load_study(folder)
            assert list(found) == list(expected), folder
            for name, result in expected.items():
                pd.testing.assert_frame_equal(found[name].rows, result.rows)
                assert {**found[name].provenance, **OF_THE_MOMENT} == {**result.provenance, **OF_THE_MOMENT}
            assert not [file for file in folder.iterdir() if file.name.endswith(".part")], "what was left half written is cleared away"


def _die_at(moment: int) -> None:
    """Kill this process at its n-th step that changes a folder, before the step or after it."""
    count = [0]

    def dying(step):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            made = step(*args, **kwargs)
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return made
        return run

    steps = ((Path, "mkdir"), (Path, "write_text"), (Path, "replace"), (Path, "unlink"), (os, "fsync"), (pd.DataFrame, "to_parquet"))
    for owner, name in steps:
        setattr(owner, name, dying(getattr(owner, name)))


def _study(path: Path, parts: int = 2) -> None:
    with StudyFolder.claim(path, {"seed": 1}) as folder:
        for i in range(parts):
            folder.part(f"part_{i}", lambda i=i: Result(ROWS.assign(i=i), {"part": i}))


def test_a_kill_at_every_single_step_of_writing_leaves_a_folder_that_goes_on(tmp_path):
    moment, killed = 0, 0
    while True:
        moment += 1
        out = tmp_path / str(moment)
        pid = os.fork()
        if pid == 0:
            _die_at(moment)
            _study(out)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
        killed += 1
        for part in out.glob("*.parquet"):
            pd.testing.assert_frame_equal(load_result(part).rows, ROWS.assign(i=int(part.stem[-1])))
        _study(out)
        assert sorted(file.name for file in out.iterdir()) == [".lock", "part_0.json", "part_0.parquet", "part_1.json", "part_1.parquet",
                                                              "study.json"]
        assert [load_result(out / f"part_{i}.parquet").rows["i"].unique().tolist() for i in range(2)] == [[0], [1]]
    assert killed > 30


# ---- a full disk, a folder that cannot be written in -------------------------------------------------------------------


def in_child(work) -> str:
    """Run a function in a process of its own; what it says, or the sentence of its error."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = str(work() or "")
        except AlignblindError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException as error:    # noqa: BLE001 - it is what the test is about
            said = f"not caught: {error!r}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.mark.parametrize("room", [0, 100, 4096])
def test_a_file_system_without_room_is_one_sentence_and_what_was_finished_stays(room, tmp_path):
    out = tmp_path / "out"
    with StudyFolder.claim(out, {"seed": 1}) as folder:
        folder.part("first", lambda: Result(ROWS, {"part": 1}))
    before = (out / "first.parquet").read_bytes()

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))    # no file may grow larger
        with StudyFolder.claim(out, {"seed": 1}) as folder:
            folder.part("second", lambda: Result(ROWS, {"part": 2}))

    said = in_child(full)
    assert said.startswith("ResultError: cannot write")
    assert "File too large" in said
    assert "Nothing that was there before has changed" in said
    assert (out / "first.parquet").read_bytes() == before
    with StudyFolder.claim(out, {"seed": 1}) as folder:
        folder.part("second", lambda: Result(ROWS, {"part": 2}))
    assert set(load_study(out)) == {"first", "second"}


def test_a_disk_that_is_full_at_any_moment_leaves_what_was_finished(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    _study(tmp_path / "s")
    for owner, name in ((pd.DataFrame, "to_parquet"), (Path, "write_text"), (Path, "replace"), (os, "fsync")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, full)
            with pytest.raises(ResultError, match="No space left on device"):
                _study(tmp_path / "s", parts=3)
        assert set(load_study(tmp_path / "s")) == {"part_0", "part_1"}
        assert not [file for file in (tmp_path / "s").iterdir() if file.name.endswith(".part")]


@pytest.fixture
def read_only():
    """A finished study that an ordinary user cannot write in."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    _study(folder / "s")
    for path in (*(folder / "s").iterdir(), folder / "s", folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder / "s"
    for path in (folder, folder / "s"):
        path.chmod(0o755)
    shutil.rmtree(folder)


def as_nobody() -> None:
    if os.geteuid() == 0:    # to whom permissions do not apply
        os.setgid(65534)
        os.setuid(65534)


def test_a_folder_that_cannot_be_written_in_is_one_sentence(read_only):
    def more() -> None:
        as_nobody()
        with StudyFolder.claim(read_only, {"seed": 1}) as folder:
            folder.part("more", lambda: Result(ROWS, {}))

    assert in_child(more).startswith("ResultError: cannot write in")

    def new() -> None:
        as_nobody()
        with StudyFolder.claim(read_only / "deeper" / "s", {"seed": 1}):
            pass

    assert "Permission denied" in in_child(new)

    def look() -> str:
        as_nobody()
        return f"{StudyFolder(read_only).holds({'seed': 1}, ['part_0', 'part_1'])} {len(load_study(read_only))}"

    assert in_child(look) == "True 2", "what is finished can be shown"
    read_only.chmod(stat.S_IRWXU)

    def closed() -> None:
        os.chmod(read_only, 0o700)    # noqa: PTH101 - before the user is changed
        as_nobody()
        StudyFolder.open(read_only, {"seed": 1})

    if os.geteuid() == 0:
        assert "cannot be looked into: Permission denied" in in_child(closed)


def test_a_finished_study_in_a_folder_that_nobody_writes_in_is_read_as_ever(small, tmp_path, monkeypatch):
    config = StudyConfig.create(str(small), str(small), quick=True)
    parts = [Part("depth", "base", False, lambda model, advance: pd.DataFrame({"layers": [model.n_layers]}))]
    run_parts(config, tmp_path / "out", parts)
    monkeypatch.setattr(results, "write_whole", None)
    monkeypatch.setattr(results, "one_process", None)
    assert run_parts(config, tmp_path / "out", parts) == tmp_path / "out"


# ---- damaged files -----------------------------------------------------------------------------------------------------


def test_a_damaged_part_is_named_whatever_the_damage(tmp_path):
    file, draw = tmp_path / "part.parquet", random.Random(0)
    save_result(Result(ROWS, {}), file)
    whole, said = file.read_bytes(), []
    for _ in range(60):
        at = draw.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :])
        try:
            found = load_result(file)
        except ResultError as error:
            said.append(str(error))
        else:
            pd.testing.assert_frame_equal(found.rows, ROWS)    # a bit that says nothing
    assert len(said) > 40
    assert all(str(file) in one and "compute this part anew" in one for one in said)


def test_damage_is_named_when_a_study_is_read(tmp_path):
    _study(tmp_path / "s")
    file = tmp_path / "s" / "part_1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ResultError, match=r"part_1\.parquet .*Delete both files to compute this part anew"):
        load_study(tmp_path / "s")
    file.unlink()
    _study(tmp_path / "s")
    assert len(load_study(tmp_path / "s")) == 2


# ---- two processes -----------------------------------------------------------------------------------------------------


def holding(path: Path) -> subprocess.Popen:
    """A process that is at work in a folder until it is told to end."""
    code = f"""
import sys
from pathlib import Path
from alignblind_mi.results import StudyFolder
with StudyFolder.claim(Path({str(path)!r}), {{"seed": 1}}):
    print("holds", flush=True)
    sys.stdin.readline()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_second_process_is_told_which_one_is_at_work_and_nothing_is_touched(tmp_path):
    out = tmp_path / "s"
    first = holding(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ResultError, match=rf"another process \({first.pid} on .*, since 20.*\) is at work in .*give another --out"):
        _study(out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    first.communicate("\n", timeout=30)
    _study(out)
    assert len(load_study(out)) == 2


def test_a_killed_process_holds_nothing(tmp_path):
    first = holding(tmp_path / "s")
    first.kill()
    first.wait()
    _study(tmp_path / "s")
    assert len(load_study(tmp_path / "s")) == 2
    assert not (tmp_path / "s" / ".running").exists()


def test_many_processes_at_once_finish_one_study(tmp_path):
    def work() -> str:
        for _ in range(400):
            try:
                _study(tmp_path / "s")
            except ResultError as error:
                if "another process" not in str(error):
                    return str(error)
                time.sleep(0.01)
            else:
                return "finished"
        return "never"

    read, children = [], []
    for _ in range(4):
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(into, work().encode())
            except BaseException as error:    # noqa: BLE001 - it is what the test is about
                os.write(into, repr(error).encode())
            os._exit(0)
        os.close(into)
        read.append(out)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert [os.read(end, 1000).decode() for end in read] == ["finished"] * 4
    for i in range(2):
        pd.testing.assert_frame_equal(load_result(tmp_path / "s" / f"part_{i}.parquet").rows, ROWS.assign(i=i))


def test_a_folder_of_something_else_gets_no_lock(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match="holds no study"), StudyFolder.claim(tmp_path, {}):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    write_text(tmp_path / "s" / "study.json", "{}")
    with pytest.raises(ResultError, match="another configuration"), StudyFolder.claim(tmp_path / "s", {"seed": 2}):
        pass
    assert [file.name for file in (tmp_path / "s").iterdir()] == ["study.json"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def none(self, *args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    with one_process(tmp_path / ".lock", ResultError("busy")):
        pass
    assert "has no locks" in caplog.text
