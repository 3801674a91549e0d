"""The benchmarks run and compare like with like: a tiny model, one round, no statement about time."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import __main__ as command, gpu, jobs
from benchmarks.models import SIZES, make_checkpoint
from benchmarks.parts import parts
from benchmarks.rivals import environment
from benchmarks.scaling import scaling
from benchmarks.timing import run

pytestmark = pytest.mark.slow
TINY = replace(SIZES["S"], name="T", layers=4, width=32, inner=48, heads=4, kv_heads=2, vocabulary=400, std=0.2, window=2, starts=(0, 2),
               prompts=2, readings=6, answers=5, grid_layers=(0, 3), grid_step=8, every=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    grad = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    yield jobs.Bench(TINY, make_checkpoint(TINY, tmp_path_factory.mktemp("benchmark")))
    torch.set_grad_enabled(grad)


@pytest.mark.parametrize("job", jobs.JOBS)
def test_every_rival_gives_our_output(bench, job):
    records = run(jobs.JOBS[job](bench), 1, lambda line: None)
    assert len(records) >= 1
    for record in records:
        assert record["exact"], record["rival"]
        assert {"job", "size", "rival", "ratio", "floor_share", "exact", "rows"} <= set(record)
        assert record["ratio"] > 0
    assert job == "lens" or all(record["floor_share"] > 0 for record in records)


def test_each_part_of_the_engine_can_be_taken_out_without_changing_the_output(bench):
    contest = jobs.steering(bench)
    whole, seen = contest.ours(), []
    contest.ours = lambda run=contest.ours: seen.append(run())
    names = {record["without"] for record in parts(bench, contest, 1)}
    assert len(names) == 6
    assert len(seen) == 2 * 7
    assert all(out == whole for out in seen)


def test_scaling_has_a_point_per_value(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.scaling.AXES", {"rows": (1, 2), "length": (16, 20)})
    monkeypatch.setattr("benchmarks.scaling.HELD", {"rows": 2, "layers": 2, "length": 16})
    points = list(scaling(tmp_path, 1))
    assert [(p["axis"], p["value"]) for p in points] == [("rows", 1), ("rows", 2), ("length", 16), ("length", 20)]
    assert min(p["unit_cost"] for p in points) == 1.0


def test_the_command_writes_records_and_names_what_it_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.SIZES, "T", TINY)
    monkeypatch.setattr(command, "quiet_single_thread", lambda: None)
    asked = ["--size", "T", "--jobs", "patchscope", "--rounds", "1", "--json", str(tmp_path / "r.json"), "--models", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *asked])
    with torch.no_grad():
        command.main()
    assert "patchscope T" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["records"][0]["exact"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--jobs", "nothing"])
    with pytest.raises(SystemExit):
        command.main()
    assert "unknown 'nothing': choose from steering" in capsys.readouterr().err


def test_a_rival_that_does_not_install_is_left_out_with_a_message(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("benchmarks.rivals.sys.executable", "/bin/false")
    (tmp_path / "out").mkdir()

    class Failed:
        returncode, stderr, stdout = 1, "no such thing", ""

    monkeypatch.setattr("benchmarks.rivals.subprocess.run", lambda *args, **kwargs: Failed())
    assert environment("nnsight", tmp_path, said.append) is None
    assert said[-1] == "nnsight is left out: no such thing"


def test_the_gpu_script_measures_both_sides_and_writes_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEW", 4)
    monkeypatch.setattr(sys, "argv", ["gpu", "--shape", "tiny", "--device", "cpu", "--rows", "32", "--rounds", "1", "--out", str(tmp_path)])
    gpu.main()
    record, written = json.loads((tmp_path / "record.json").read_text()), (tmp_path / "table.md").read_text()
    assert set(record["tokens_per_second"]) == set(record["floor_share"]) == {"ours", "hugging_face", "ours_sweep"}
    assert record["floor_seconds"]["ours_sweep"] < record["floor_seconds"]["ours"]
    assert capsys.readouterr().out.strip() == written.strip()
    assert [line.count("|") for line in written.splitlines()[2:7]] == [5] * 5
    assert gpu.shape(32).num_key_value_heads == 8
    assert record["paper"]["new_tokens"] > 1e5


def test_the_paper_s_time_counts_prompts_beyond_those_that_the_rate_includes():
    record = {"tokens_per_second": {"ours": 10.0}, "seconds": {"prompts": 2.0}, "rows": 1}
    usual = {"prompt_tokens": 64.0, "new_tokens": 40.0}
    assert gpu.paper_seconds(usual, record) == 4.0
    assert gpu.paper_seconds({**usual, "prompt_tokens": 128.0}, record) == 6.0
