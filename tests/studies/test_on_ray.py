"""A run on a cluster of two nodes: rows equal a serial run's, whatever is killed meanwhile."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest

from alignblind_mi.measures.behaviour import Decoding
from alignblind_mi.mitigations.lora_settings import LoraSettings
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.on_ray import RayError, run_on_ray
from alignblind_mi.studies.part import Part
from alignblind_mi.studies.parts import study_parts
from alignblind_mi.studies.running import load_study, run_parts

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
NAMES = ("behaviour_base", "behaviour_aligned", "awareness_aligned_paper", "steering_race_01-01", "lora_early")


@pytest.fixture(scope="module")
def config(tiny_folder, brief) -> StudyConfig:
    made = StudyConfig.create(str(tiny_folder), str(tiny_folder), concept=brief, quick=True)
    few = {"balanced_pairs": 1, "published_pairs": 1, "decoding": Decoding(max_new_tokens=2)}
    return replace(made, lora=LoraSettings(epochs=1, batch_size=8), **few)


def chosen(config: StudyConfig) -> list[Part]:
    """Some parts, of both models and of adapters; none is a copy of another."""
    return [replace(part, same_as="", piece=None) for part in study_parts(config, load_concept(config.concept)) if part.name in NAMES]


@pytest.fixture(scope="module")
def serial(config, tmp_path_factory) -> dict[str, pd.DataFrame]:
    out = run_parts(config, tmp_path_factory.mktemp("serial") / "out", chosen(config))
    return {name: result.rows for name, result in load_study(out).items()}


def same(folder: Path, serial: dict[str, pd.DataFrame]) -> bool:
    found = load_study(folder)
    for name, rows in serial.items():
        pd.testing.assert_frame_equal(found[name].rows, rows, check_exact=True)
    return set(found) == set(serial)


@pytest.fixture
def cluster():
    """Two nodes of one CPU each on this machine."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def busy_actors() -> list[int]:
    """The processes of actors that are at a job now: Ray names them after the method."""
    return [one.pid for one in psutil.process_iter() if one.name().startswith("ray::_Worker.do")]


def after(folder: Path, parts: int, act) -> threading.Thread:
    """Do something once so many parts are finished."""
    def watch():
        until = time.monotonic() + 120
        while time.monotonic() < until and len(list(folder.glob("*.parquet"))) < parts:
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_killed_actor_and_a_lost_node_cost_nothing_but_time(config, serial, cluster, tmp_path, capfd):
    run = partial(run_parts, config, parts=chosen(config))
    ray.init(address=cluster.address, log_to_driver=False)
    killed = []

    def kill_actor():
        while not killed:
            killed.extend(busy_actors()[:1])
        os.kill(killed[0], signal.SIGKILL)

    watch = after(tmp_path / "out", 1, kill_actor)
    run_on_ray(run, tmp_path / "out", address=cluster.address, actors=2)
    watch.join()
    assert killed
    assert same(tmp_path / "out", serial)
    scratch = {*Path(tempfile.gettempdir()).glob("alignblind-*")}
    watch = after(tmp_path / "again", 1, lambda: cluster.remove_node(cluster.second))
    run_on_ray(run, tmp_path / "again", address=cluster.address, actors=2)
    watch.join()
    assert same(tmp_path / "again", serial)
    assert len({*Path(tempfile.gettempdir()).glob("alignblind-*")} - scratch) <= 1, "only the lost node's actor leaves something behind"
    said = capfd.readouterr().err
    assert "its actor was lost; it is done again" in said


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_on_ray import chosen, partial, replace, run_on_ray, run_parts
import pickle
config = pickle.loads(bytes.fromhex({config!r}))
run_on_ray(partial(run_parts, config, parts=chosen(config)), Path({out!r}), address={address!r}, actors=2)
"""


def test_a_killed_driver_goes_on_where_it_was(config, serial, cluster, tmp_path):
    import pickle

    out = tmp_path / "out"
    code = DRIVER.format(tests=str(Path(__file__).parent), config=pickle.dumps(config).hex(), out=str(out), address=cluster.address)
    driver = subprocess.Popen([sys.executable, "-c", code])
    after(out, 1, driver.kill).join()
    assert driver.wait() == -signal.SIGKILL
    finished = {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    assert 0 < len(finished) < len(serial)
    run_on_ray(partial(run_parts, config, parts=chosen(config)), out, address=cluster.address, actors=2)
    assert same(out, serial)
    assert all((out / name).stat().st_mtime_ns == when for name, when in finished.items())


def test_what_cannot_be_is_said(config, cluster, tmp_path):
    run = partial(run_parts, config, parts=chosen(config)[:1])
    with pytest.raises(RayError, match=r"2 CPUs .* 3 actors"):
        run_on_ray(run, tmp_path / "out", address=cluster.address, actors=3)
    ray.shutdown()
    for nowhere in ("127.0.0.1:1", "127.0.0.1:99999999"):
        with pytest.raises(RayError, match=f"no Ray cluster at '{nowhere}'"):
            run_on_ray(run, tmp_path / "out", address=nowhere)

    def fails(model, advance):
        raise ModelError("this part cannot be computed.")

    wrong = [replace(chosen(config)[0], compute=fails)]
    with pytest.raises(ModelError, match="this part cannot be computed"):
        run_on_ray(partial(run_parts, config, parts=wrong), tmp_path / "wrong", address=cluster.address)
