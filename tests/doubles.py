"""Small checkpoints made for the tests: tiny random models, and a double of Llama 3 with its configuration and form of tokenizer."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignblind_mi.stimuli.concept import Concept
from alignblind_mi.stimuli.prompts import behaviour_prompts

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
           "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
           *(f"<|reserved_special_token_{i}|>" for i in range(5, 251))]
BASE_VOCABULARY, VOCABULARY = 128_000, 128_256


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of Llama 3's form: its split, its special tokens at its ids, its BOS, its chat template."""
    small = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    small.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    small.train_from_iterator(texts, trainer)
    learned = small.get_vocab()
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(small.to_str())["model"]["merges"]]
    vocab = learned | {f"\u0120unused{i}": i for i in range(len(learned), BASE_VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    bos = tokenizer.token_to_id(SPECIAL[0])
    assert bos == BASE_VOCABULARY
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{SPECIAL[0]}:0 $A:0", special_tokens=[(SPECIAL[0], bos)])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token="<|eot_id|>", chat_template=CHAT,
                                   clean_up_tokenization_spaces=False)


def llama3_double(folder: Path, texts: list[str]) -> Path:
    """Write a sharded checkpoint with Llama 3 Instruct's fields (GQA, RoPE with scaling, untied, two EOS ids, sampling by default)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=131_072, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=128_000, eos_token_id=128_009,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=128_000, eos_token_id=[128_001, 128_009], do_sample=True, temperature=0.6,
                                               top_p=0.9)
    model.save_pretrained(folder, max_shard_size="12MB")
    byte_level_tokenizer(texts).save_pretrained(folder)
    return folder


def study_texts(race: Concept) -> list[str]:
    """Every kind of text that a study on the concept needs a tokenizer for."""
    prompts = [p.text for cue in race.cues for kind in ("implicit", "explicit") for p in behaviour_prompts(race, cue, kind)[::7]]
    assert race.awareness is not None
    sentences = [s.format(x="black", y="white") for s in (*race.awareness.sentences, *race.awareness.restatements)]
    words = [w for c in race.categories.values() for w in (*c.positive, *c.negative)]
    asked = [q.text.format(x=q.placeholder) for q in race.interpretations.values()]
    phrases = [race.steering_phrase(n).format(marked="black", unmarked="white") for n in (*race.senses, *race.controls)]
    asked += [q.text.format(x=q.placeholder) for q in race.selfie.values()]
    sentences += [s.format(x="black", y="white") for c in race.contexts.values() for s in (*c.train, *c.test)]
    words += [w for sense in race.senses.values() for w in (*sense.words, *sense.lexicon)]
    often = [f"{name}: black and white." for name in ("Race", "Color", "Random")] * 20    # single tokens, as in Llama 3
    return [*prompts, *sentences, *asked, *phrases, *often, " ".join(words), "race color black white - , . I agree disagree 1 2 3 4 5",
            "Question:"]


# As Llama 3's: the BOS first, the content trimmed, the system prompt a turn of its own.
TINY_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)


def tiny_llama(folder: Path, words: list[str], *, layers: int = 4, kv_heads: int = 2, tied: bool = True, seed: int = 0,
               chat_template: str | None = None) -> Path:
    """Write a tiny random Llama with a word-level tokenizer that knows `words` (each with and without a leading space)."""
    torch.manual_seed(seed)
    every = dict.fromkeys(["<pad>", "<bos>", "<eos>", "<unk>", " ", "\n", *words, *(f" {w}" for w in words)])
    vocab = {word: i for i, word in enumerate(every)}
    config = LlamaConfig(vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=kv_heads, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                         initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\[MASK\]| ?\w+| ?[^\w\s]|\s"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                            chat_template=chat_template).save_pretrained(folder)
    return folder


def make_adapter(folder: Path, out: Path, seed: int) -> Path:
    """Write a random LoRA adapter for a checkpoint."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder),
                           LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(out)
    return out
