"""Random-weight models and prompts for the benchmarks. Knows sizes and words; does NOT know what is measured."""

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignblind_mi.stimuli.prompts import Prompt, Span

WORDS = ("black", "white", "race", "color", "x", "refer")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class Size:
    """A model's shape, and how much of each job is run on it: `prompts` of the sweep, `share` of the rows that slow rivals are timed on."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    std: float
    window: int
    starts: tuple[int, ...]
    prompts: int
    readings: int
    answers: int
    grid_layers: tuple[int, ...]
    grid_tokens: int
    grid_step: int
    every: int = 1


SIZES = {
    "S": Size("S", 8, 256, 704, 8, 2, 2000, 0.06, 3, tuple(range(6)), 8, 256, 64, tuple(range(8)), 64, 1),
    "D": Size("D", 32, 256, 896, 8, 2, 2000, 0.04, 10, (0, 4, 8, 13, 17, 22), 8, 256, 64, (0, 7, 15, 23, 31), 64, 4, every=6),
    "M": Size("M", 16, 1024, 2816, 16, 4, 32000, 0.03, 5, (0, 5, 10), 8, 192, 128, (1, 6, 11, 15), 40, 4, every=8),
}


def config_of(size: Size) -> LlamaConfig:
    """The Llama configuration of a size."""
    return LlamaConfig(vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
                       num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=2048,
                       rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, initializer_range=size.std,
                       tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def make_checkpoint(size: Size, folder: Path) -> Path:
    """Write a random model of a size and its word-level tokenizer, once."""
    if (folder / "tokenizer.json").is_file():
        return folder
    torch.manual_seed(0)
    LlamaForCausalLM(config_of(size)).save_pretrained(folder)
    words = [*SPECIAL, *WORDS, *(f"w{i}" for i in range(size.vocabulary - len(SPECIAL) - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
                            ).save_pretrained(folder)
    return folder


def text_prompt(size: Size, length: int, seed: int, places: dict[int, str] | None = None, marks: dict[str, list[int]] | None = None
                ) -> Prompt:
    """A prompt of `length` tokens (BOS included): random words, given words at some positions, marks at some positions."""
    generator = torch.Generator().manual_seed(seed)
    usable = size.vocabulary - len(SPECIAL) - len(WORDS)
    words = [f"w{i}" for i in torch.randint(usable, (length - 1,), generator=generator).tolist()]
    for position, word in (places or {}).items():
        words[position - 1] = word
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    spans = {name: tuple(Span(starts[p - 1], starts[p - 1] + len(words[p - 1])) for p in at) for name, at in (marks or {}).items()}
    return Prompt(" ".join(words), spans)


def question_prompts(size: Size, count: int, begin: float = 0.54) -> list[Prompt]:
    """Questions as a study asks them: four templates of 59 to 68 tokens, which two words behind their beginning (0.54 of them) tell apart.

    0.54 is what the paper's templates share before their words.
    """
    generator = torch.Generator().manual_seed(11)
    usable = size.vocabulary - len(SPECIAL) - len(WORDS)
    templates = [text_prompt(size, 59 + 3 * k, 200 + k).text.split(" ") for k in range(4)]
    out = []
    for i in range(count):
        words = list(templates[i % 4])
        at = int(begin * len(words))
        words[at], words[at + 2] = (f"w{j}" for j in torch.randint(usable, (2,), generator=generator).tolist())
        out.append(Prompt(" ".join(words)))
    return out


def quiet_single_thread() -> None:
    """One thread and no messages: times are compared, not the scheduler."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
