"""Files as users give them, sound ones and every way in which they can be damaged, made in a folder for the attack table."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from doubles import TINY_CHAT, make_adapter, study_texts, tiny_llama

from alignblind_mi.stimuli.concept import load_concept
from alignblind_mi.stimuli.prompts import behaviour_prompts

DEEP = 100_000
DIGITS = "9" * 5000

Damage = Callable[[Path], None]  # does something to a file that is there


# ---- damages -------------------------------------------------------------------------------------------------------------


def _bytes(make: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        data = make(path.read_bytes())
        path.unlink()  # it may be a hard link
        path.write_bytes(data)

    return damage


def _instead(make: Callable[[Path], None]) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


MISSING: dict[str, Damage] = {"missing": lambda path: path.unlink()}
# What is wrong with a file whatever it holds.
ANY: dict[str, Damage] = {
    "empty": _bytes(lambda data: b""),
    "directory": _instead(Path.mkdir),
    "binary noise": _bytes(lambda data: bytes(range(256)) * 64),
    "truncated": _bytes(lambda data: data[: len(data) // 2]),
    "FIFO": _instead(os.mkfifo),
    "symlink loop": _instead(lambda path: path.symlink_to(path.name)),
    "dangling symlink": _instead(lambda path: path.symlink_to("nowhere")),
    "zeros": _bytes(lambda data: bytes(len(data))),
}
TEXT: dict[str, Damage] = {
    **ANY,
    "invalid UTF-8": _bytes(lambda data: data[:-3] + b"\xff\xfe" + data[-3:]),
    "UTF-16": _bytes(lambda data: data.decode("latin-1").encode("utf-16")),
    "one huge line": _bytes(lambda data: b"x" * 3_000_000),
}
JSON: dict[str, Damage] = {
    **TEXT,
    "deep nesting": _bytes(lambda data: b"[" * DEEP + b"]" * DEEP),
    "deep objects": _bytes(lambda data: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "a list": _bytes(lambda data: b"[1, 2]"),
    "a text": _bytes(lambda data: b'"abc"'),
    "a number": _bytes(lambda data: b"7"),
    "null": _bytes(lambda data: b"null"),
    "NaN": _bytes(lambda data: b"NaN"),
    "5,000 digits": _bytes(lambda data: DIGITS.encode()),
}


def damaged(folder: Path, good: Path, name: str, damage: Damage) -> Path:
    """A copy of a folder (hard links) with one file damaged."""
    folder.mkdir(parents=True)
    for file in good.iterdir():
        if file.is_file():
            os.link(file, folder / file.name)
    damage(folder / name)
    return folder


def with_fields(**fields: Any) -> Damage:
    """A JSON object with other values of some fields (None as null; Ellipsis: without the field)."""

    def change(data: bytes) -> bytes:
        found = json.loads(data)
        for key, value in fields.items():
            if value is ...:
                found.pop(key, None)
            else:
                found[key] = value
        return json.dumps(found).encode()

    return _bytes(change)


def replacing(old: str, new: str) -> Damage:
    """A text file with a text in it replaced, everywhere."""

    def change(data: bytes) -> bytes:
        text = data.decode("utf-8")
        assert old in text, old
        return text.replace(old, new).encode("utf-8")

    return _bytes(change)


def with_tensors(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Damage:
    """A safetensors file with other tensors."""

    def damage(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
        save_file(dict(change(tensors)), path, {"format": "pt"})

    return damage


def _first(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def every(tensors: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in sorted(tensors) if tensors[name].ndim == 2 and "embed" not in name)
        return {**tensors, name: change(tensors[name])}

    return every


TENSORS: dict[str, Damage] = {
    **ANY,
    "all NaN": with_tensors(lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()}),
    "one NaN": with_tensors(_first(lambda tensor: tensor.index_fill(0, tensor.new_zeros(1).long(), float("nan")))),
    "one infinite": with_tensors(_first(lambda tensor: tensor.index_fill(0, tensor.new_zeros(1).long(), float("inf")))),
    "no tensors": with_tensors(lambda tensors: {}),
    "half of the tensors": with_tensors(lambda tensors: {name: tensors[name] for name in sorted(tensors)[::2]}),
    "other names": with_tensors(lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()}),
    "another shape": with_tensors(_first(lambda tensor: tensor[:-1].contiguous())),
    "empty tensor": with_tensors(_first(lambda tensor: tensor[:0].contiguous())),
    "huge header": _bytes(lambda data: (1 << 62).to_bytes(8, "little") + data[8:]),
    "a pickle": _bytes(lambda data: b"\x80\x04cos\nsystem\n(S'false'\ntR."),
}

CONFIG_FIELDS: dict[str, dict[str, Any]] = {
    "hidden_size": {"nan": float("nan"), "-1": -1, "0": 0, "huge": 10**12, "abc": "abc", "null": None, "other": 40},
    "num_hidden_layers": {"nan": float("nan"), "-1": -1, "0": 0, "huge": 10**9, "abc": "abc", "null": None, "one more": 5, "half": 2},
    "vocab_size": {"-1": -1, "0": 0, "huge": 10**11, "abc": "abc", "smaller": 10},
    "num_attention_heads": {"0": 0, "-1": -1, "huge": 10**9, "3": 3, "abc": "abc"},
    "num_key_value_heads": {"0": 0, "3": 3, "huge": 10**9},
    "intermediate_size": {"huge": 10**12, "-1": -1},
    "max_position_embeddings": {"0": 0, "-1": -1, "abc": "abc"},
    "rms_norm_eps": {"nan": float("nan"), "inf": float("inf"), "abc": "abc"},
    "hidden_act": {"abc": "abc", "null": None},
    "model_type": {"abc": "abc", "list": ["llama"], "null": None, "gone": ..., "bert": "bert", "surrogate": "\ud800"},
    "dtype": {"abc": "abc", "7": 7},
    "eos_token_id": {"abc": "abc", "-5": -5, "huge": 10**9},
    "rope_parameters": {"abc": "abc", "unknown": {"rope_type": "abc"}, "nan": {"rope_type": "default", "rope_theta": float("nan")}},
    "quantization_config": {"abc": {"quant_method": "abc"}, "list": [1]},
    "architectures": {"abc": ["abc"], "number": 7},
    "auto_map": {"own code": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
}
TEMPLATES = {
    "endless loop": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}x",
    "a gigabyte": "{{ 'x' * 3000000000 }}",
    "gigabyte by doubling": "{% set x = namespace(t='xxxxxxxx') %}{% for i in range(30) %}{% set x.t = x.t + x.t %}{% endfor %}{{ x.t }}",
    "huge power": "{{ 10 ** 10 ** 9 }}",
    "syntax error": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
    "raises": "{{ raise_exception('no') }}",
    "drops the text": "{{ bos_token }}hello",
    "writes twice": "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
    "upper case": "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    "no template": "",
    "divides by zero": "{{ 1 // 0 }}",
    "wrong type": "{{ 'a' + 1 }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "includes": "{% include '/etc/passwd' %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


# ---- sound files ---------------------------------------------------------------------------------------------------------


def make_inputs(root: Path) -> Path:
    """Sound files of every kind, tiny: models, an adapter, a concept, a study file, BBQ, released answers and interpretations."""
    race = load_concept("race")
    small = resources.files("alignblind_mi.stimuli") / "template.toml"
    (root / "small.toml").write_text(small.read_text("utf-8"), "utf-8")
    texts = [text for concept in (race, load_concept(root / "small.toml")) for text in study_texts(concept)]
    words = sorted({w for text in texts for w in re.findall(r"\[MASK\]|\w+|[^\w\s]", text)})
    words += ["user", "assistant", "system"]
    tiny_llama(root / "tiny", words)
    tiny_llama(root / "chatty", words, chat_template=TINY_CHAT)
    make_adapter(root / "tiny", root / "adapter", 0)
    sharded(root / "tiny", root / "sharded")
    text = (resources.files("alignblind_mi.stimuli") / "concepts" / "race.toml").read_text("utf-8")
    (root / "mine.toml").write_text(text, "utf-8")
    (root / "study.yaml").write_text(study_yaml(root / "tiny"), "utf-8")
    (root / "bbq.jsonl").write_text("\n".join(json.dumps(item) for item in bbq_items()) + "\n", "utf-8")
    (root / "released.json").write_text(json.dumps(released()), "utf-8")
    (root / "read.jsonl").write_text("\n".join(json.dumps(line) for line in interpretations()) + "\n", "utf-8")
    (root / "nothing.eval").write_text("no log\n", "utf-8")
    (root / "text.txt").write_text("a text\n", "utf-8")
    return root


def sharded(good: Path, folder: Path) -> Path:
    """A checkpoint whose weights are a shard that an index names."""
    from safetensors import safe_open

    folder.mkdir()
    for file in good.iterdir():
        shutil.copy(file, folder / ("model-00001-of-00001.safetensors" if file.suffix == ".safetensors" else file.name))
    with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as weights:
        names = dict.fromkeys(weights.keys(), "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": (good / "model.safetensors").stat().st_size}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def study_yaml(model: Path, *lines: str) -> str:
    """A study file for a tiny model."""
    return "\n".join([f"base: {model}", f"aligned: {model}", "quick: true", *lines, ""])


def bbq_items() -> list[dict[str, Any]]:
    """Two items as BBQ writes them."""
    common = {
        "category": "Race_ethnicity",
        "question_index": "1",
        "question": "Who was late?",
        "context": "A man and a woman met.",
        "ans0": "The man",
        "ans1": "The woman",
        "ans2": "Unknown",
        "additional_metadata": {"stereotyped_groups": ["Black"]},
        "answer_info": {"ans0": ["man", "Black"], "ans1": ["woman", "White"], "ans2": ["unknown", "unknown"]},
    }
    return [
        {**common, "example_id": 0, "question_polarity": "neg", "context_condition": "ambig", "label": 2},
        {**common, "example_id": 1, "question_polarity": "nonneg", "context_condition": "disambig", "label": 1},
    ]


def released() -> dict[str, Any]:
    """Two stored answers in the layout that the paper released."""
    race = load_concept("race")
    found: dict[str, Any] = {}
    for prompt in behaviour_prompts(race, race.cue("default"), "implicit", design="published")[:2]:
        names = (prompt.labels[name] for name in ("unmarked", "marked", "positive", "negative"))
        found.setdefault(" ".join(names), {})[prompt.labels["template"]] = [f"{prompt.text} an answer", 1]
    return found


def interpretations() -> list[dict[str, Any]]:
    """Two interpretations in the layout that the paper released."""
    return [
        {"prompt": "a prompt", "interpretation": f"people of the {word}", "layer": 1, "token": 2, "token_decoded": "x"}
        for word in ("race", "colour")
    ]
