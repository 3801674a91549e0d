"""Weights that must not be measured are refused by name: unpickled, from elsewhere, not fitting, not finite; sound ones are not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from doubles import make_adapter, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from alignblind_mi.errors import AlignblindError
from alignblind_mi.mitigations.trainer import GENERATORS, OPTIMIZER, STATE, WHOLE, checkpoints
from alignblind_mi.models.edits import Treatment
from alignblind_mi.models.loading import check_model, load_huggingface
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError, ModelSpec
from alignblind_mi.models.weights import files_of, is_finite
from alignblind_mi.studies.config import StudyConfig
from alignblind_mi.studies.doctor import check_up

WORDS = ["a", "b"]
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sound") / "model", WORDS, layers=3)


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture(autouse=True)
def nothing_is_unpickled(request, monkeypatch):
    if request.function is not test_pickles_are_read_if_asked_for:
        monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a file is unpickled"))


def loaded(folder: Path, **options):
    return load_huggingface(ModelSpec(str(folder), **options).resolved())[0]


def change(file: Path, changed) -> None:
    tensors = load_file(file)
    save_file(changed({key: tensor.clone() for key, tensor in tensors.items()}), file, metadata={"format": "pt"})


def configure(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder: Path, name: str, *, pickled: bool = False) -> None:
    """The checkpoint's weights in one shard of this name."""
    tensors = load_file(folder / "model.safetensors")
    if pickled:
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))


# ---- files -------------------------------------------------------------------------------------------------------------


def test_an_index_that_names_a_pickle_is_refused(folder):
    shard(folder, "pytorch_model-00001.bin", pickled=True)
    for ask in (loaded, lambda f: check_model(ModelSpec(str(f))), lambda f: StudyConfig.create(str(f), str(f))):
        with pytest.raises(ModelError, match=r"pytorch_model-00001\.bin.*--allow-pickle"):
            ask(folder)


@pytest.mark.parametrize("name", ["../away.safetensors", "{out}/away.safetensors", "..\\away.safetensors", "sub/away.safetensors", ""])
def test_an_index_that_names_a_file_elsewhere_is_refused(folder, name, tmp_path):
    save_file(load_file(folder / "model.safetensors"), tmp_path / "away.safetensors", metadata={"format": "pt"})
    shard(folder, "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1.safetensors", json.dumps(name.format(out=tmp_path))[1:-1]))
    with pytest.raises(ModelError, match="no plain name of a file in its folder"):
        loaded(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}',
                                  "[" * 9999])
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json (is no index|names no weights|names the weights 1)"):
        loaded(folder)


def test_a_shard_that_is_not_there_is_refused_by_name_and_a_whole_index_is_read(folder):
    expected = loaded(folder).state_dict()
    shard(folder, "part.safetensors")
    assert all(torch.equal(expected[key], tensor) for key, tensor in loaded(folder).state_dict().items())
    (folder / "part.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'part\.safetensors', which is not in the folder"):
        check_model(ModelSpec(str(folder)))


def test_a_configuration_that_names_other_weights_is_refused(folder, tmp_path):
    torch.save({}, folder / "adapter_model.bin")
    configure(folder, transformers_weights="adapter_model.bin")
    with pytest.raises(ModelError, match=r"'adapter_model\.bin', which is no safetensors file"):
        loaded(folder)
    configure(folder, transformers_weights="../x.safetensors")
    with pytest.raises(ModelError, match="no plain name"):
        loaded(folder)


def test_an_adapter_in_the_model_s_folder_is_refused(folder, sound, tmp_path):
    """transformers would put it on the model without a word, from a pickle too."""
    for file in make_adapter(sound, tmp_path / "one", 0).iterdir():
        shutil.copy(file, folder / file.name)
    with pytest.raises(ModelError, match="give the base model as the model"):
        loaded(folder)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"weights\.pt"):
        load_model(str(tmp_path / "weights.pt"))


@pytest.fixture
def hub(folder, monkeypatch):
    """The folder as if it were a repository on the hub."""
    def cached_file(name, file, **options):
        assert name == "somebody/model"
        return str(folder / file) if (folder / file).is_file() else None

    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    monkeypatch.setattr("alignblind_mi.models.weights.load_config", lambda spec: config)
    monkeypatch.setattr("alignblind_mi.models.loading.load_tokenizer", lambda spec: pytest.fail("the weights come first"))
    return folder


def test_an_index_on_the_hub_that_names_a_pickle_is_refused(hub):
    shard(hub, "weights.bin", pickled=True)
    with pytest.raises(ModelError, match=r"weights\.bin"):
        loaded(Path("somebody/model"))
    shutil.copy(hub / "config.json", hub / "adapter_config.json")
    with pytest.raises(ModelError, match="holds a LoRA adapter"):
        loaded(Path("somebody/model"))


def test_pickles_are_read_if_asked_for(folder, sound, tmp_path):
    expected = loaded(folder).state_dict()
    shard(folder, "weights.bin", pickled=True)
    same = loaded(folder, allow_pickle=True).state_dict()
    assert all(torch.equal(expected[key], same[key]) for key in expected)
    adapter = make_adapter(sound, tmp_path / "one", 0)
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert load_model(ModelSpec(str(sound), allow_pickle=True), adapters=[adapter]).adapters == ("one",)
    with pytest.raises(ModelError, match=r"adapter_model\.bin instead, which would be unpickled.*--allow-pickle"):
        load_model(str(sound), adapters=[adapter])
    (folder / "model.safetensors.index.json").unlink()
    torch.save({**expected, "model.norm.weight": torch.full((32,), torch.nan)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"not finite.*model\.norm\.weight"):
        loaded(folder, allow_pickle=True)


def test_a_pickle_beside_an_adapter_s_weights_is_never_read(sound, tmp_path):
    adapter = make_adapter(sound, tmp_path / "one", 0)
    (adapter / "adapter_model.bin").write_bytes(b"no pickle")
    assert load_model(str(sound), adapters=[adapter]).adapters == ("one",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "training_args.bin", "sub/rng_state.pth"])
def test_pickles_in_a_training_that_goes_on_are_refused_by_name(name, tmp_path):
    whole = tmp_path / "checkpoint-3"
    whole.mkdir()
    for file in ("adapter_model.safetensors", OPTIMIZER, GENERATORS, STATE, WHOLE):
        (whole / file).touch()
    assert checkpoints(tmp_path) == [whole]
    (whole / name).parent.mkdir(exist_ok=True)
    (whole / name).touch()
    with pytest.raises(AlignblindError, match=name):
        checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", OPTIMIZER, GENERATORS, STATE])
def test_a_training_s_checkpoint_that_lacks_a_file_is_refused_by_name(name, tmp_path):
    whole = tmp_path / "checkpoint-3"
    whole.mkdir()
    for file in {"adapter_model.safetensors", OPTIMIZER, GENERATORS, STATE, WHOLE} - {name}:
        (whole / file).touch()
    with pytest.raises(AlignblindError, match=name):
        checkpoints(tmp_path)


def test_a_study_without_the_flag_is_what_it_was_before_it():
    config = StudyConfig.create("organism:base", "organism:aligned")
    assert "allow_pickle" not in json.dumps(config.identity())
    asked = StudyConfig.create("organism:base", "organism:aligned", allow_pickle=True).identity()
    assert asked["base"].pop("allow_pickle") is asked["aligned"].pop("allow_pickle") is True
    assert asked == config.identity()


# ---- what was loaded ---------------------------------------------------------------------------------------------------

MISFITS = {
    "other names": (lambda t: {f"_orig_mod.{key}": value for key, value in t.items()}, {}, r"lacks weights.*in all"),
    "some missing": (lambda t: {key: value for key, value in t.items() if ".layers.1.mlp" not in key}, {},
                     r"lacks weights.*layers\.1\.mlp.*\(3 in all\)"),
    "one more": (lambda t: {**t, "model.extra.weight": torch.ones(2)}, {}, r"no place for: model\.extra\.weight"),
    "a layer too many": (dict, {"num_hidden_layers": 4}, r"lacks weights.*layers\.3\..*\(9 in all\)"),
    "a layer too few": (dict, {"num_hidden_layers": 2}, r"no place for: .*layers\.2\..*\(9 in all\)"),
    "wider": (dict, {"intermediate_size": 64}, r"other shapes.*down_proj\.weight \(shape 32x48, the model's is 32x64\)"),
    "no head": (dict, {"tie_word_embeddings": False}, r"lacks weights.*lm_head\.weight"),
}
BROKEN = {"nan": torch.nan, "infinite": torch.inf, "minus infinite": -torch.inf}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_belong_to_the_model_are_refused_by_name(case, folder):
    changed, config, said = MISFITS[case]
    change(folder / "model.safetensors", changed)
    configure(folder, **config)
    with pytest.raises(ModelError, match=said):
        loaded(folder)


def spoilt(key: str, number: float):
    def spoil(tensors):
        tensors[key].view(-1)[3] = number
        return tensors
    return spoil


@pytest.mark.parametrize("number", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_refused_by_name(number, dtype, folder):
    change(folder / "model.safetensors", spoilt("model.layers.1.mlp.up_proj.weight", number))
    with pytest.raises(ModelError, match=r"not finite.*layers\.1\.mlp\.up_proj\.weight"):
        loaded(folder, dtype=dtype)


def test_numbers_that_these_bits_cannot_hold_are_refused(folder):
    change(folder / "model.safetensors", spoilt("model.norm.weight", 1e6))
    loaded(folder)
    with pytest.raises(ModelError, match=r"not finite.*in float16: model\.norm\.weight.*float32, bfloat16"):
        loaded(folder, dtype="float16")


def test_offloaded_weights_are_looked_at_in_their_file(folder, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": str(tmp_path / "away")}
    assert any(p.is_meta for p in loaded(folder, **options).parameters())
    change(folder / "model.safetensors", spoilt("model.layers.1.mlp.up_proj.weight", torch.nan))
    with pytest.raises(ModelError, match=r"not finite.*layers\.1\.mlp\.up_proj\.weight"):
        loaded(folder, **options)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights_are_looked_at_in_their_file(quantization, tmp_path):
    """Packed bits are always finite. A checkpoint that was saved quantised fits as well."""
    folder = tiny_llama(tmp_path / "model", WORDS)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(AutoTokenizer.from_pretrained(folder)), hidden_size=64, intermediate_size=64,
                                 num_hidden_layers=1, num_attention_heads=4, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    model = loaded(folder, quantization=quantization)
    saved = Path(shutil.copytree(folder, tmp_path / "saved"))
    model.save_pretrained(saved)
    assert loaded(saved).is_quantized
    change(folder / "model.safetensors", spoilt("model.layers.0.mlp.up_proj.weight", torch.nan))
    with pytest.raises(ModelError, match=r"not finite.*layers\.0\.mlp\.up_proj\.(weight|SCB)"):
        loaded(folder, quantization=quantization)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_kind_of_number_can_be_looked_at(dtype):
    assert is_finite(torch.ones(3, 2).to(dtype))
    assert not is_finite(torch.tensor([1.0, torch.nan]).to(dtype))
    assert is_finite(torch.ones(3, dtype=torch.uint8))
    assert is_finite(torch.empty(0))


def test_what_transformers_itself_passes_over_is_no_fault(folder):
    """Rotary frequencies that older versions saved, and a head that is tied."""
    change(folder / "model.safetensors", lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    model = loaded(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [file.name for file in files_of(ModelSpec(str(folder)), model.config)] == ["model.safetensors"]


def test_the_doctor_says_what_is_wrong_with_weights(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    change(folder / "model.safetensors", spoilt("model.norm.weight", torch.nan))
    found = check_up(str(folder), drift=False).set_index("check")
    assert found.loc["weights", "status"] == "fail"
    assert "model.norm.weight" in found.loc["weights", "found"]
    assert found.loc["engine", "status"] == "skipped"
    shard(folder, "weights.bin", pickled=True)
    assert "weights.bin" in check_up(str(folder), drift=False).set_index("check").loc["weights", "found"]


def test_the_doctor_says_what_is_wrong_with_an_adapter(tiny_folder, tmp_path):
    adapter = make_adapter(tiny_folder, tmp_path / "one", 0)
    change(adapter / "adapter_model.safetensors", spoilt(f"{QUERY}.lora_A.weight", torch.nan))
    found = check_up(str(tiny_folder), adapter=adapter, drift=False).set_index("check")
    assert found.loc["adapter", "status"] == "fail"
    assert "not finite" in found.loc["adapter", "found"]


# ---- adapters ----------------------------------------------------------------------------------------------------------


def adapter_of(sound: Path, out: Path, **settings) -> Path:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings})
    get_peft_model(AutoModelForCausalLM.from_pretrained(sound), config).save_pretrained(out)
    return out


ADAPTERS = {
    "empty": (lambda t: {}, "holds no weights"),
    "renamed": (lambda t: {key.replace("model.model.", "model."): value for key, value in t.items()}, r"no place for .*in all"),
    "half renamed": (lambda t: {key.replace("layers.0", "blocks.0"): value for key, value in t.items()}, r"no place for .*blocks\.0"),
    "one more": (lambda t: {**t, f"{QUERY}.lora_C.weight": torch.ones(2)}, r"no place for .*lora_C"),
    "one less": (lambda t: {key: value for key, value in t.items() if key != f"{QUERY}.lora_B.weight"}, r"lacks .*q_proj\.lora_B"),
    "nan": (spoilt(f"{QUERY}.lora_A.weight", torch.nan), r"not finite.*q_proj\.lora_A"),
    "infinite": (spoilt(f"{QUERY}.lora_B.weight", torch.inf), r"not finite.*q_proj\.lora_B"),
    "other shape": (lambda t: {**t, f"{QUERY}.lora_A.weight": torch.ones(4, 31)}, r"does not fit .*q_proj\.lora_A"),
}


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_do_not_fit_are_refused_by_name(case, place, sound, tmp_path):
    changed, said = ADAPTERS[case]
    good, bad = adapter_of(sound, tmp_path / "good"), adapter_of(sound, tmp_path / "bad")
    change(bad / "adapter_model.safetensors", changed)
    with pytest.raises(ModelError, match=said):
        load_model(str(sound), adapters=[bad] if place == "first" else [good, bad])


SOUND = {
    "plain": {}, "two ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}}, "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"}, "norms too": {"modules_to_save": ["norm"]}, "head too": {"modules_to_save": ["lm_head"]},
    "some layers": {"layers_to_transform": [1]}, "all": {"target_modules": "all-linear"}, "embedding": {"target_modules": ["embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_adapters_are_loaded(case, sound, tmp_path):
    first, second = adapter_of(sound, tmp_path / "first", **SOUND[case]), adapter_of(sound, tmp_path / "second")
    model = load_model(str(sound), adapters=[first, second] if not {"modules_to_save", "trainable_token_indices"} & set(SOUND[case])
                       else [first])
    assert model.adapters[0] == "first"
    assert model.under(Treatment("x", adapter="first")).treatment.adapter == "first"


@pytest.mark.parametrize(("stored", "said"), [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
                                              ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"), ({"quant_method": "mxfp4"}, "mxfp4")])
def test_a_checkpoint_that_is_quantised_already_is_said_and_not_quantised_again(stored, said, tiny_folder, tmp_path, caplog):
    folder = shutil.copytree(tiny_folder, tmp_path / "stored")
    edit = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**edit, "quantization_config": stored}))
    check_model(ModelSpec(str(folder)))
    assert f"is quantised in its checkpoint ({said})" in caplog.text
    with pytest.raises(ModelError, match=rf"quantised already in its checkpoint \({said}\).*8bit"):
        check_model(ModelSpec(str(folder), quantization="8bit"))
