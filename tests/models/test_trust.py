"""Nothing that a checkpoint brings along is executed or unpickled unless that was asked for; nothing here writes or reads pickles."""

import ast
import json
from pathlib import Path

import pytest
import torch
from doubles import make_adapter, tiny_llama
from transformers import AutoModelForCausalLM

from alignblind_mi.models.configs import load_tokenizer
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.studies.config import StudyConfig

ROOT = Path(__file__).parents[2]
OWN = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path(__file__).parent / "ran").touch()
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path):
    """A checkpoint with code of its own, and the file that is there once the code has run."""
    folder, marker = tiny_llama(tmp_path / "own", ["a", "b"]), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(OWN.format(marker=str(marker)))
    return folder, marker


def test_code_of_a_checkpoint_runs_only_if_asked_for(own_code, monkeypatch, tmp_path):
    folder, ran = own_code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("nobody is asked on the way"))
    with pytest.raises(ModelError, match=r"brings Python code of its own.*trust_remote_code=True"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="brings Python code"):
        StudyConfig.create(str(folder), str(folder))
    assert not ran.exists()
    model = load_model(ModelSpec(str(folder), trust_remote_code=True))
    assert ran.exists()
    assert model.provenance()["trust_remote_code"] is True
    assert load_tokenizer(model.spec).bos_token == "<bos>"


def test_provenance_says_that_no_code_was_trusted(tiny):
    assert tiny.provenance()["trust_remote_code"] is False


def test_pickled_weights_are_refused(tmp_path):
    folder = tiny_llama(tmp_path / "pickled", ["a", "b"])
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights in safetensors files"):
        load_model(str(folder))


def test_pickled_adapters_are_refused(tmp_path):
    folder = tiny_llama(tmp_path / "base", ["a", "b"])
    adapter = make_adapter(folder, tmp_path / "adapter", 0)
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        load_model(str(folder), adapters=[adapter])


WRITES_PICKLES = {("harness.py", "torch.save")}    # the only form in which lm-evaluation-harness takes vectors; nothing reads one


def test_no_module_uses_pickles():
    forbidden = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for file in [f for folder in ("alignblind_mi", "experiments", "benchmarks") for f in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, f"{file}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                unsafe = called in ("torch.load", "torch.save", "pd.read_pickle", "np.load")
                assert not unsafe or (file.name, called) in WRITES_PICKLES, f"{file}:{node.lineno} calls {called}"
                assert not called.endswith(".to_pickle"), f"{file}:{node.lineno}"
                decided = {keyword.arg for keyword in node.keywords if ast.unparse(keyword.value) != keyword.arg}
                assert "allow_pickle" not in decided, f"{file}:{node.lineno}: only what the user's own flag says is passed on"
