"""One model in several processes gives what it gives in one; what cannot run so is one sentence."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import GPT2Config

from alignblind_mi.borders import ranks
from alignblind_mi.models.loading import check_plan
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.studies.config import StudyConfig

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


def launched(*given: str, processes: int = 2) -> None:
    """Run a program, under torchrun where it is for several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, *given], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and what each of two did."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    out = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(ModelSpec("organism:aligned").source)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(plain, lora).save_pretrained(out / "adapter")
    for processes in (1, 2):
        launched(str(WORKER), str(out), str(out / "adapter"), processes=processes)
    return [torch.load(out / f"{name}.pt") for name in ("one", 0, 1)]


def test_two_processes_find_what_one_finds_on_both_engines_with_adapters_on_and_off(found):
    one, first, second = found
    assert one.keys() == first.keys() == second.keys()
    assert len(one) > 50
    for name, value in one.items():
        if name.endswith("refused"):
            continue
        if isinstance(value, list):
            assert value == first[name] == second[name], name
        else:
            assert torch.equal(first[name], second[name]), name    # or they would not stay together
            assert torch.allclose(value, first[name], atol=1e-4), (name, float((value - first[name]).abs().max()))


def test_treatments_and_adapters_act_there(found):
    _, first, _ = found
    for engine in ("fast", "plain"):
        for other in (f"{engine}, adapter: plain", *(f"{engine}: edited {stream}" for stream in ("resid_post", "attn_out", "z", "post"))):
            assert (first[f"{engine}: plain"] - first[other]).abs().max() > 0.01, other


def test_what_needs_whole_layers_is_refused_in_a_sentence(found):
    for said in (found[1]["fast: refused"], found[1]["plain: refused"]):
        assert len(said) == 3
        assert all("tensor parallelism" in sentence and "one process" in sentence for sentence in said)


def test_a_folder_begun_in_two_processes_holds_what_one_finds_and_is_gone_on_with(tmp_path):
    def verb(out: Path, *more: str, processes: int) -> pd.DataFrame:
        launched("-m", "alignblind_mi", "bias", "--quick", "--temperature", "0", "--out", str(out), *more, processes=processes)
        return pd.read_parquet(out / "balanced_model.parquet")

    both = verb(tmp_path / "two", "--tensor-parallel", processes=2)
    alone = verb(tmp_path / "one", processes=1)
    numbers = both.select_dtypes("number").columns
    pd.testing.assert_frame_equal(both[numbers], alone[numbers], atol=1e-4, rtol=1e-4)
    pd.testing.assert_frame_equal(both.drop(columns=numbers), alone.drop(columns=numbers))
    assert json.loads((tmp_path / "one" / "study.json").read_text()) == json.loads((tmp_path / "two" / "study.json").read_text())
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == sorted(file.name for file in (tmp_path / "one").iterdir())


# ---- what is refused before weights are read ---------------------------------------------------------------------------


@pytest.fixture
def two(monkeypatch):
    """As if torchrun had started two processes, none of which has joined."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)


def test_without_torchrun_it_is_a_sentence():
    with pytest.raises(ModelError, match="torchrun --nproc-per-node N"):
        StudyConfig.create("organism:base", "organism:aligned", tensor_parallel=True)


@pytest.mark.parametrize("beside", [{"device_map": "auto"}, {"quantization": "4bit"}])
def test_other_ways_to_spread_weights_exclude_it(beside):
    with pytest.raises(ModelError, match=f"tensor parallelism and a {next(iter(beside))}"):
        ModelSpec("organism:aligned", tensor_parallel=True, **beside)


def test_a_single_device_excludes_it(two):
    with pytest.raises(ModelError, match="leave out the device"):
        ModelSpec("organism:aligned", tensor_parallel=True, device="mps").resolved()


def test_a_family_without_a_plan_and_heads_that_cannot_be_cut_are_refused(two, monkeypatch):
    from transformers import LlamaConfig

    spec = ModelSpec("some/model", tensor_parallel=True)
    with pytest.raises(ModelError, match="no plan of tensor parallelism for 'gpt2'"):
        check_plan(spec, GPT2Config())
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ModelError, match="cannot be cut among 3 processes: its num_attention_heads is 32"):
        check_plan(spec, LlamaConfig())


def test_a_study_is_the_same_with_and_without_it():
    assert "tensor_parallel" not in json.dumps(StudyConfig.create("organism:base", "organism:aligned").identity())


def test_alone_a_process_leads_and_agrees_with_itself():
    assert ranks.leads()
    assert (ranks.together(), ranks.agreed("x"), ranks.least(3)) == (1, "x", 3)
