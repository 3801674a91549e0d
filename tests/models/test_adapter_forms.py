"""Every form of adapter that PEFT writes: off is the base model, on is what PEFT computes, and so are merged, unmerged and scaled; or it is
refused."""

from pathlib import Path

import pytest
import torch
from doubles import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from alignblind_mi.models.adapters import merge_adapter, scaled_adapter, unmerge_adapter
from alignblind_mi.models.edits import Row, Treatment
from alignblind_mi.models.model import load_model
from alignblind_mi.models.spec import ModelError
from alignblind_mi.stimuli.prompts import mark

ROW = Row(mark("w1 w2 w3 w4", here="w2"))
ALIKE = 1e-4
# A form, and what is refused of it: "load", "merge", "unmerge", "scale".
FORMS = {
    "plain": ({}, ""),
    "biases_of_none": ({"bias": "all"}, "unmerge scale"),
    "saves_lm_head": ({"modules_to_save": ["lm_head"]}, "unmerge scale"),
    "saves_embed_tokens": ({"modules_to_save": ["embed_tokens"]}, "unmerge scale"),
    "saves_both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "unmerge scale"),
    "saves_norm": ({"modules_to_save": ["norm"]}, "unmerge scale"),
    "saves_tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "unmerge scale"),
    "on_lm_head": ({"target_modules": ["q_proj", "lm_head"]}, "unmerge"),
    "on_embed_tokens": ({"target_modules": ["q_proj", "embed_tokens"]}, "unmerge"),
    "on_both_tied": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, "unmerge"),
    "patterns": ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}, ""),
    "dora": ({"use_dora": True}, "unmerge scale"),
    "rslora": ({"use_rslora": True}, ""),
    "tokens": ({"trainable_token_indices": [6, 8]}, "unmerge scale"),
    "tokens_of_both": ({"trainable_token_indices": [6, 8], "ensure_weight_tying": True}, "unmerge scale"),
    "bias_of_lora": ({"lora_bias": True}, "merge unmerge"),
    "pissa": ({"init_lora_weights": "pissa"}, "load unmerge scale"),
    "olora": ({"init_lora_weights": "olora"}, "load unmerge scale"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, ""),
    "layers": ({"layers_to_transform": [1]}, ""),    # its folder has the name of a module
    "all_linear": ({"target_modules": "all-linear"}, ""),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "load merge unmerge scale"),
    "behind_a_token": ({"alora_invocation_tokens": [7]}, "load merge unmerge scale"),
    "dropout": ({"lora_dropout": 0.5}, ""),
}
OTHERS = {
    "qwen2": {"biases": ({"bias": "all"}, "load unmerge scale"), "biases_of_lora": ({"bias": "lora_only"}, "load unmerge scale")},
    "mixtral": {"parameters": ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, ""),
                "parameters_alone": ({"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, "")},
}
CASES = [(base, form) for base in ("tied", "untied") for form in FORMS] + [(base, form) for base in OTHERS for form in OTHERS[base]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root, words = tmp_path_factory.mktemp("bases"), [f"w{i}" for i in range(20)]
    made = {name: tiny_llama(root / name, words, layers=2, tied=name == "tied") for name in ("tied", "untied", *OTHERS)}
    sizes = {"vocab_size": AutoConfig.from_pretrained(made["tied"]).vocab_size, "hidden_size": 32, "intermediate_size": 24,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
             "initializer_range": 0.2}
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for name, parameter in qwen.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    qwen.save_pretrained(made["qwen2"])
    MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **sizes)).save_pretrained(made["mixtral"])
    return made


def write(base: Path, out: Path, settings: dict, seed: int = 1) -> Path:
    """An adapter of which every trained weight is random."""
    torch.manual_seed(seed)
    usual = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**usual, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return out


def answers(model, ids):
    with torch.no_grad():
        return model(ids).logits[0, -1].float().log_softmax(-1)


def peft_answers(base: Path, folder: Path, ids):
    return answers(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval(), ids)


def apart(a, b) -> float:
    """The largest difference, in nats; of log-probabilities below -10, in tenths of themselves."""
    return float(((a - b).abs() / (b.abs() / 10).clamp(min=1)).max())


@pytest.mark.parametrize(("base", "form"), CASES, ids=lambda case: str(case))
def test_equal_to_peft_or_refused(bases, base, form, tmp_path):
    settings, refused = (OTHERS.get(base) or FORMS)[form]
    folder = write(bases[base], tmp_path / form, settings)
    other = write(bases[base], tmp_path / "other", {}, 7)
    ids = torch.tensor([load_model(str(bases[base])).encode([ROW.prompt])[0].ids])
    off, on = answers(AutoModelForCausalLM.from_pretrained(bases[base]).eval(), ids), peft_answers(bases[base], folder, ids)
    assert apart(off, on) > 0.01, "it does something"

    for adapters in ([folder, other], [other, folder]):
        if "load" in refused:
            with pytest.raises(ModelError, match=f"{form} (changes .* even while it is off|cannot be used on)"):
                load_model(str(bases[base]), adapters=adapters)
            continue
        model = load_model(str(bases[base]), adapters=adapters)
        assert sorted(model.adapters) == sorted(one.name for one in adapters)
        for name, expected in ((None, off), (form, on), (None, off)):
            assert apart(model.under(Treatment("t", adapter=name)).next_log_probs([ROW])[0], expected) < ALIKE, (adapters, name)

    merged, back, half = tmp_path / "merged", tmp_path / "back", tmp_path / "half"
    if "merge" in refused.split():
        with pytest.raises(ModelError, match=r"PEFT cannot merge|cannot be written"):
            merge_adapter(str(bases[base]), folder, merged)
        assert not merged.exists()
    else:
        assert apart(load_model(str(merge_adapter(str(bases[base]), folder, merged))).next_log_probs([ROW])[0], on) < ALIKE
    if "unmerge" in refused:
        with pytest.raises(ModelError, match=r"cannot be taken out of|PEFT cannot unmerge"):
            unmerge_adapter(str(bases[base]), folder, back)
        assert not back.exists()
    else:
        assert apart(load_model(str(unmerge_adapter(str(merged), folder, back))).next_log_probs([ROW])[0], off) < ALIKE
    if "scale" in refused:
        with pytest.raises(ModelError, match="has no doses"):
            scaled_adapter(folder, 0.5, half)
        assert not half.exists()
        return
    scaled = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[base]), str(folder)).eval()
    for module in scaled.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 0.5
    model = load_model(str(bases[base]), adapters=[scaled_adapter(folder, 0.5, half)])
    assert apart(model.under(Treatment("t", adapter="half")).next_log_probs([ROW])[0], answers(scaled, ids)) < ALIKE
