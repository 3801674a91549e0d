"""The attack table: every verb, every option and every kind of file, with bad values, in one process; how each ended.

    python tests/attack.py [--csv | --json] [--failing] [--only TEXT] [--every | --third]

Expected of a bad value: exit code 2 with one sentence that names it, before any work, and no file changed. Options are taken from the
program itself: one that has no bad values here fails the table. The verbs that share an option share out its values (--every: each verb
takes all of them, in about four times the time; --third: every third case, as the tests do). A few cases must succeed, so that nothing is
right that refuses everything.
"""

import csv
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "160",
    "NO_COLOR": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
}

from attack_harness import Case, Ending, Place, bound_memory, caught, command, names_of, run_all, shown, stand_in  # noqa: E402

BIG, DIGITS = "99999999999999999999", "9" * 5000
NOT_NUMBERS = ("", "abc", "0-99999999999", "5-3", "1,5", "[bold]7[/bold]", "1\n2", "7\0")
WHOLE = ("nan", "inf", "-inf", "-1", "1e400", BIG, DIGITS, "1.5", *NOT_NUMBERS)  # 0 is bad for some
REAL = ("nan", "inf", "-inf", "-1", "1e400", DIGITS, *NOT_NUMBERS)
SHARE = (*REAL, "2", "1e300")
TEXTS = ("abc", "a\0b", "\ud800x", "a\nb", "[bold]x[/bold]", "[/]", "../x", "x" * 5000, "=1+1", "\x1b[31mred", "; rm -rf x", "{x}", "%s")
NAMES = (*TEXTS, "", " ", "None", "ALL")
MODELS = (*TEXTS, "", "organism:", "organism:abc", "organism:../base", "organism:a\0b", "/", "//", "a/b/c/d", "-x", "~")
DEVICES = (*TEXTS, "", "cuda", "cuda:99", "cuda:-1", "cpu:7", "meta", "mps", "99", "xpu", "cpu,cuda")
DEVICE_MAPS = (*TEXTS, "", "meta", "disk", "cuda:99", '{"": 0}', "99")
LAYERS = (
    "nan",
    "-1",
    "1e400",
    BIG,
    DIGITS,
    "abc",
    "0-99999999999",
    "5-3",
    "99",
    "1.5",
    "1-",
    "-",
    "0,,1",
    "\u00b2",
    "0-1-2",
    "[/]",
    "a\0b",
    " ",
    ",",
    "0-" + DIGITS,
    "0;1",
    "early,late",
    "0x1",
)
LISTS = (*TEXTS, "None")

# Bad values of each option, by name; by (verb, name) where a verb has others. Flags are found by themselves.
BAD: dict[str | tuple[str, str], Sequence[str]] = {
    "model": MODELS,
    "base": MODELS,
    "aligned": MODELS,
    "concept": (*NAMES, "race.toml", "/dev/null", "concepts/race", "a\0b.toml", "x" * 5000 + ".toml", "\ud800.toml"),
    "cue": (*TEXTS, " "),
    "system": (*TEXTS,),
    "chat_options": ("abc", "=1", "a=", "a=1,a=2", ",", "a b=1", "messages=1", "enable_thinkin=false", "[/]=1", "\x1b[31m=1"),
    "temperature": (*REAL, "1e300"),
    "seed": WHOLE,
    "shots": (*WHOLE, "65"),
    "minutes": (*REAL, "0", "1e300"),
    "dtype": (*NAMES, "float64", "Float32", "int8", "torch.float32"),
    "device": DEVICES,
    "device_map": DEVICE_MAPS,
    "quantization": (*NAMES, "16bit", "4", "8BIT"),
    "engine": (*NAMES, "FAST", "slow"),
    "protocol": (*NAMES, "PAPER", "published", "paper,best"),
    "design": (*NAMES, "mixed", "BALANCED"),
    "instruments": (*LISTS, "patchscope,abc", "tarot", "patchscope,patchscope"),
    "reading": (*NAMES, "palm"),
    "skip": (*LISTS, "behaviour", "qualification,abc", "qualification,qualification"),
    "outcome": (*NAMES, "TEXT", "text,probability", "log_odds"),
    "parts": (*NAMES, ",", "residual,abc", "residual,residual"),
    "swap": (*NAMES, "sides"),
    "max_word_pairs": (*(value for value in WHOLE if value != BIG), "0"),
    "bbq_items": (*(value for value in WHOLE if value != BIG), "0"),
    "sense": (*TEXTS, " "),
    "method": (*NAMES, "MEAN"),
    "how": (*TEXTS, " ", "add,ablate"),
    "positions": (*LISTS, "identifiers,identifiers", "prompt,last"),
    "layers": LAYERS,
    "strengths": (*(v for v in REAL if v not in ("-1", "1,5")), "1,,2", "1,nan", "1,inf", "1e300", "1,1", "1;2", ",", "1e39"),
    "rank": (*WHOLE, "0", "100000"),
    "epochs": (*WHOLE, "0"),
    "learning_rate": (*REAL, "0", "1e300"),
    "modules": (*NAMES, ",", "q_proj,abc", "q_proj,q_proj", "q_proj,,v_proj", "lm_head", "embed_tokens"),
    "activation_weight": (*REAL, "1e300"),
    "validation_share": (*SHARE, "1"),
    "patience": WHOLE,
    "kind": (*NAMES, "AWARE", "aware,blind"),
    "revision": (*NAMES, "nothing"),
    ("power", "treatment"): tuple(value for value in NAMES if value),
    "untreated": SHARE,
    "treated": SHARE,
    "discordant": SHARE,
    "icc": SHARE,
    "template_icc": SHARE,
    "templates": (*WHOLE, "0"),
    "orders": (*WHOLE, "0"),
    "word_pairs": WHOLE,
    "wanted": (*SHARE, "0", "1"),
    "alpha": (*SHARE, "0", "1"),
    ("export steered", "how"): (*NAMES, "replace", "ADD", "add,ablate"),
    "strength": (*(value for value in REAL if value != "-1"), "1e300", "1e39"),
    "hookpoint": (*NAMES, "layers", "layers.{}", "{layers}"),
    "seeds": (*(value for value in WHOLE if value != "1,5"), ",", "1,,2", "\u00b2", "0,-1", "0;1", "0x1"),
    "jobs": WHOLE,
    "shard": (*NAMES, "0/3", "4/3", "1/0", "-1/3", "1/2/3", "1 / 3", f"1/{DIGITS}", "1/\uff13"),
    "ray": (*NAMES, "host", ":6379", "ray://", "http://127.0.0.1:1"),
    "actors": (*WHOLE, "0"),
    "cpus_each": (*WHOLE, "0"),
    "gpus_each": (*REAL, "0", "-1"),
    "rule": (*NAMES, "ROBUST"),
    "by": (*LISTS, "model,abc", "answer"),
    ("organism build", "reading"): SHARE,
    ("organism build", "behaviour"): SHARE,
    ("organism build", "concept"): (*NAMES, "religion", "age"),
    "source": (*NAMES, "/dev/null"),
    ("concept show", "name"): (*NAMES, "/dev/null", "race.toml"),
    ("doctor", "model"): tuple(value for value in MODELS if value != "-x"),
}
PATHS = ("missing", "", "NUL", "surrogate", "newline", "markup", "long", "directory", "FIFO", "loop", "under a file", "tilde")
FILES = ("file", "bbq", "adapter", "folder", "folders", "paths", "vectors", "pilot")  # arguments and options that name something to read
OUTS = ("out", "merge", "gguf")  # those that name something to write
RARE: dict[tuple[str, str], tuple[str, ...]] = {  # what a value needs beside it to be looked at
    ("steer", "strengths"): ("--method", "mean_difference"),
    ("steer", "positions"): ("--method", "mean_difference"),
    ("lora", "patience"): ("--validation-share", "0.2"),
    ("power", "template_icc"): ("--icc", "0.1"),
    **{(verb, name): ("--ray", "local") for verb in ("study", "compare", "calibrate", "qualify") for name in ("actors", "cpus_each",
                                                                                                             "gpus_each")},
}
# Values that are sound after all, for one option.
SOUND = {
    ("system", value)
    for value in ("abc", "a\nb", "[bold]x[/bold]", "[/]", "../x", "=1+1", "\x1b[31mred", "; rm -rf x", "{x}", "%s", "a\0b", "x" * 5000)
}
LATE = {"system", "chat_options", "modules"}  # what can be wrong with them is seen by the tokenizer or the model


def options() -> list[tuple[str, Any]]:
    """Every (verb, option or argument) of the program, as typer has them."""
    from typer.main import get_command

    from alignblind_mi.__main__ import app

    def walk(node: Any, verb: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, child in getattr(node, "commands", {}).items():
            yield from walk(child, (*verb, name))
        yield from ((" ".join(verb), option) for option in node.params)

    return list(walk(get_command(app), ()))


def verbs() -> list[str]:
    """Every verb of the program."""
    from typer.main import get_command

    from alignblind_mi.__main__ import app

    return [
        " ".join([name, *sub])
        for name, node in get_command(app).commands.items()
        for sub in ([[one] for one in node.commands] if hasattr(node, "commands") else [[]])
    ]


def sound(verb: str, place: Place, without: str = "") -> list[str]:
    """A command line of a verb with which nothing is wrong; `without` an argument that a case gives itself."""
    tiny, out = str(place.inputs / "chatty"), ["--out", str(place.out)]
    small = ["--concept", str(place.inputs / "small.toml")]
    pair, one = ["--base", tiny, "--aligned", tiny, "--quick", *small], ["--model", tiny, "--quick", *small]
    lines = {
        "study": [*pair, *out],
        "forecast": [*pair, "--no-rate"],
        "compare": [*pair, *out],
        "bias": [*one, *out],
        "awareness": [*one, *out],
        "qualify": [*one, *out],
        "patch": [*one, *out],
        "steer": [*one, *out],
        "lora": ["--model", tiny, *small, *out],
        "doctor": [tiny, "--no-drift", *small],
        "power": ["--untreated", ".9", "--treated", ".5"],
        "report": [str(place.inputs / "studied")],
        "calibrate": ["--quick", *out],
        "score": [str(place.inputs / "released.json")],
        "merge": [str(place.inputs / "shared"), *out],
        "organism build": out,
        "export harness": [*small, "--max-word-pairs", "1", *out],
        "export steered": [str(next((place.inputs / "steered").glob("vectors_*"), "missing")), "--out", f"{place.out}.pt"],
        "concept check": [str(place.inputs / "small.toml")],
        "concept list": [],
        "concept template": [],
        "concept show": ["race"],
        "": [],
    }
    line = [] if without == "pilot" else lines[verb]
    if without in ("model", "folder", "folders", "paths", "source", "file", "name", "vectors") and line and not line[0].startswith("-"):
        line = line[1:]
    return [*verb.split(), *line]


# ---- options x values ----------------------------------------------------------------------------------------------------


SHARED = 4  # an option of several verbs: each verb takes every so many of its values


def option_cases() -> Iterator[Case]:
    """Every option of every verb with its bad values."""
    turns: Counter[str | tuple[str, str]] = Counter()
    known = options()
    having = Counter(_key(verb, option.name) for verb, option in known)
    for verb, option in known:
        if option.param_type_name == "option" and (option.is_flag or verb == ""):
            yield _case(verb, option, "abc", named=(option.opts[0],))
        elif option.name in FILES:
            yield from _read_cases(verb, option)
        elif option.name in OUTS:
            yield from _out_cases(verb, option)
        else:
            key = _key(verb, option.name)
            step = 1 if "--every" in sys.argv else min(SHARED, having[key])
            mine = BAD.get(key, ())[turns[key] % step :: step]
            refused = [value for value in BAD.get(key, ()) if (option.name, value) not in SOUND]
            yield from (_case(verb, option, value) for value in dict.fromkeys((*mine, *refused[:1])))
            turns[key] += 1


def _key(verb: str, name: str) -> str | tuple[str, str]:
    """Where the bad values of an option stand in BAD."""
    return (verb, name) if (verb, name) in BAD else name


def _case(verb: str, option: Any, value: str, *, named: tuple[str, ...] = ()) -> Case:
    given = [f"{option.opts[0]}={value}"] if option.param_type_name == "option" else ["--", value]
    extra = [*RARE.get((verb, option.name), ()), *(["--chat"] if option.name in ("system", "chat_options") else [])]
    fine = (option.name, value) in SOUND

    def run(place: Place) -> list[str]:
        line = sound(verb, place, option.name)
        return [*line, *extra, *given]

    flag = option.opts[0]
    if option.name == "chat_options":
        named = names_of(value.partition("=")[0] or value)
    what = named or (*names_of(value), *((flag,) if not value.strip() else ()))
    return Case(
        verb or "alignblind",
        flag,
        value,
        run,
        "either" if fine else "refuse",
        "load" if option.name in LATE else "check",
        what,
        on_stdout=verb == "concept check",
    )


# ---- files to read -------------------------------------------------------------------------------------------------------


def odd_path(kind: str, folder: Path, suffix: str = "") -> str:
    """A path of an odd kind in a folder."""
    from attack_inputs import DIGITS as LONG

    path = folder / f"odd{suffix}"
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "under a file":
        path.write_text("a text\n", "utf-8")
        return f"{path}/below{suffix}"
    return {
        "": "",
        "NUL": f"{folder}/odd\0{suffix}",
        "surrogate": f"{folder}/odd\ud800{suffix}",
        "newline": f"{folder}/odd\nline{suffix}",
        "markup": f"{folder}/odd[/bold][red]{suffix}",
        "long": f"{folder}/odd{LONG}{suffix}",
        "tilde": f"~nobody/odd{suffix}",
    }.get(kind, str(path))


SUFFIXES = {"file": ".yaml", "bbq": ".jsonl", "paths": ".json", "folder": "", "folders": "", "adapter": "", "vectors": ".safetensors",
            "pilot": ".parquet"}


def _read_cases(verb: str, option: Any) -> Iterator[Case]:
    for kind in PATHS:

        def run(place: Place, kind: str = kind) -> list[str]:
            value = odd_path(kind, place.folder, SUFFIXES[option.name])
            if option.param_type_name == "option":
                return [*sound(verb, place, option.name), f"{option.opts[0]}={value}"]
            beside = ["--out", f"{place.out}.pt"] if verb == "export steered" else (
                ["--out", str(place.out)] if verb in ("study", "compare") else [])
            return [*verb.split(), *beside, "--", value]

        said = ("odd",) if kind else (".",)  # no path is the working folder
        yield Case(verb, option.opts[0], f"path: {kind or 'empty'}", run, named=said)


# ---- folders to write ----------------------------------------------------------------------------------------------------


def _fill(folder: Path) -> Path:
    """Somebody's own files."""
    (folder / "data").mkdir(parents=True)
    (folder / "notes.txt").write_text("my notes\n", "utf-8")
    (folder / "data" / "rows.csv").write_text("a,b\n1,2\n", "utf-8")
    (folder / ".hidden").write_text("hidden\n", "utf-8")
    return folder


def _only(name: str, text: str) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        path.mkdir(parents=True)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, "utf-8")
        return str(path)

    return make


def _link_to_foreign(path: Path) -> str:
    path.symlink_to(_fill(path.with_name("foreign")))
    return str(path)


def _made(make: Callable[[Path], Any]) -> Callable[[Path], str]:
    def run(path: Path) -> str:
        make(path)
        return str(path)

    return run


def _beside(path: Path) -> str:
    _fill(path.with_name(f".{path.name}.part"))
    return str(path)


FOREIGN: dict[str, Callable[[Path], str]] = {  # made where --out is to be; refused
    "foreign folder": _made(_fill),
    "a file": _made(lambda path: path.write_text("mine\n", "utf-8")),
    "symlink to a foreign folder": _link_to_foreign,
    "symlink loop": _made(lambda path: path.symlink_to(path.name)),
    "FIFO": _made(os.mkfifo),
    "under a file": lambda path: (path.write_text("mine\n", "utf-8"), f"{path}/below")[1],
    "under a symlink loop": lambda path: (path.symlink_to(path.name), f"{path}/below")[1],
    "NUL": lambda path: f"{path}\0x",
    "over-long name": lambda path: f"{path}{'x' * 5000}",
    "over-long by little": lambda path: f"{path}{'x' * 253}",
    "lone surrogate": lambda path: f"{path}\ud800",
    "empty text": lambda path: "",
    "only a hidden file": _only(".git/config", "mine\n"),
    "a note of another kind": _only("study.json", '{"mine": 1}\n'),
    "a note that is a list": _only("study.json", "[1, 2]\n"),
    "a note cut off": _only("study.json", '{"base": {"na'),
    "an empty note": _only("study.json", ""),
    "a deep note": _only("study.json", "[" * 100_000 + "]" * 100_000),
    "a note of 5,000 digits": _only("study.json", DIGITS),
    "a foreign training.json": _only("training.json", '{"mine": 1}\n'),
    "a foreign organism.json": _only("organism.json", '{"mine": 1}\n'),
    "a foreign adapter": _only("adapter_config.json", '{"peft_type": "LORA"}\n'),
    "foreign rows": _only("balanced_model.parquet", "mine\n"),
    "a foreign .part file": _only(".mine.1.part", "mine\n"),
    "a note that is a folder": _only("study.json/mine.txt", "mine\n"),
    "a foreign lock": _only(".lock/mine.txt", "mine\n"),
}
ALLOWED: dict[str, Callable[[Path], str]] = {  # may begin the work, but harm nothing
    "foreign .NAME.part beside": _beside,
    "brackets": lambda path: f"{path}[/bold][red]x",
    "newline": lambda path: f"{path}\nx",
    "empty folder": _made(Path.mkdir),
    "dangling symlink": _made(lambda path: path.symlink_to("nowhere")),
    "a name that begins with =": lambda path: str(path.with_name("=1+1")),
    "blanks": lambda path: f"{path} x ",
}
INTO_FILES = {("steer", "gguf"), ("export steered", "out")}  # options that name a file, not a folder
GGUF_REFUSED = (
    "foreign folder",
    "symlink loop",
    "FIFO",
    "under a file",
    "under a symlink loop",
    "NUL",
    "over-long name",
    "over-long by little",
    "lone surrogate",
    "empty text",
    "symlink to a foreign folder",
)


def _out_cases(verb: str, option: Any) -> Iterator[Case]:
    file = (verb, option.name) in INTO_FILES
    refused = {name: FOREIGN[name] for name in GGUF_REFUSED} if file else FOREIGN
    if file:
        refused = {**refused, "a missing folder": lambda path: f"{path}/no/such/folder/vectors.gguf"}
    named = "target" if option.name != "out" else "out"
    extra = ["--method", "mean_difference", "--layers", "1-2"] if option.name == "gguf" else []
    for expect, table in (("refuse", refused), ("either", ALLOWED)):
        for kind, make in table.items():

            def run(place: Place, make: Callable[[Path], str] = make) -> list[str]:
                return [*sound(verb, place), *extra, f"{option.opts[0]}={make(place.folder / named)}"]

            taken = expect if kind not in ("empty text", "a missing folder") else "either"  # the working folder; one that is made
            writes = () if taken == "refuse" else (named, "=1+1", ".lock", ".running", "study.json")
            here = (".lock", "study.json") if kind == "empty text" else ()
            if here and verb == "merge":    # at once, what it brings together
                here += ("shares.json", *(f"{part}_base.{kind}" for part in ("behaviour", "balanced") for kind in ("json", "parquet")))
            yield Case(verb, option.opts[0], kind, run, taken, named=(named, ".", "=1+1"), writes=writes, here=here)


# ---- damaged files -------------------------------------------------------------------------------------------------------

ASKS = {  # verbs that read a whole model, with their options; `check` reads its tokenizer alone
    "bias": "--model",
    "awareness": "--model",
    "qualify": "--model",
    "patch": "--model",
    "steer": "--model",
    "lora": "--model",
    "study": "--base",
    "compare": "--aligned",
    "forecast": "--aligned",
    "doctor": "",
}


def _on_model(verb: str, model: Path, place: Place, *more: str) -> list[str]:
    line = sound(verb, place, "model")
    return [*line, *more, *([f"{ASKS[verb]}={model}"] if ASKS[verb] else [str(model)])]


def model_cases() -> Iterator[Case]:
    """Every file of a checkpoint, damaged in every way; the verbs take turns."""
    from attack_inputs import CONFIG_FIELDS, JSON, MISSING, TEMPLATES, TENSORS, TEXT, Damage, replacing, with_fields

    turns = list(ASKS)
    counter = iter(range(10**6))

    def case(
        good: str,
        file: str,
        label: str,
        damage: Damage,
        stage: str = "check",
        expect: str = "refuse",
        more: Sequence[str] = (),
        pool: Sequence[str] = (),
    ) -> Case:
        from attack_inputs import damaged

        verb = (pool or turns)[next(counter) % len(pool or turns)]

        def run(place: Place) -> list[str]:
            return _on_model(verb, damaged(place.folder / "themodel", place.inputs / good, file, damage), place, *more)

        return Case(verb, f"model/{file}", label, run, expect, stage, ("themodel", file), (1, 2) if verb == "doctor" else (2,))

    loads = [verb for verb in turns if verb != "forecast"]  # forecast reads no weights
    asks = [verb for verb in loads if verb != "lora"]  # training generates nothing
    links = ("FIFO", "symlink loop", "dangling symlink", "empty")  # as if the file were not there, which is optional
    for label, damage in {**MISSING, **JSON}.items():
        yield case("tiny", "config.json", label, damage)
        yield case("tiny", "tokenizer.json", label, damage)
        if label != "missing":
            yield case("tiny", "tokenizer_config.json", label, damage, expect="either" if label in links else "refuse")
            yield case(
                "tiny",
                "generation_config.json",
                label,
                damage,
                "load",
                pool=asks,
                expect="either" if label in links else "refuse",
            )
        yield case("sharded", "model.safetensors.index.json", label, damage, "load", pool=loads)
    for label, damage in {**MISSING, **TENSORS}.items():
        yield case("tiny", "model.safetensors", label, damage, "load", pool=loads)
        yield case("sharded", "model-00001-of-00001.safetensors", label, damage, "load", pool=loads)
    for name, values in CONFIG_FIELDS.items():
        for label, value in values.items():
            expect = "either" if name in ("architectures", "auto_map", "dtype", "quantization_config") else "refuse"
            yield case("tiny", "config.json", f"{name}: {label}", with_fields(**{name: value}), "load", expect, pool=loads)
            if label in ("huge", "nan", "abc", "-1"):  # a size that does not fit is what a forecast is for
                yield case("tiny", "config.json", f"{name}: {label}", with_fields(**{name: value}), "check", "either", pool=["forecast"])
    shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    for label, other in {
        "above the folder": "../outside.safetensors",
        "absolute": "/etc/passwd",
        "a pickle": "pytorch_model.bin",
        "not there": "model-7.safetensors",
        "NUL": "a\\u0000b",
        "long": "x" * 5000,
        "empty name": "",
    }.items():
        yield case("sharded", index, f"shard: {label}", replacing(shard, other), "load", pool=loads)
    for label, map_ in {"null": None, "list": [1], "numbers": {"model.norm.weight": 7}, "gone": ..., "empty": {}}.items():
        yield case("sharded", index, f"weight_map: {label}", with_fields(weight_map=map_), "load", pool=loads)
    for label, change in {
        "class: abc": {"tokenizer_class": "abc"},
        "class: number": {"tokenizer_class": 7},
        "class: own": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        "length: abc": {"model_max_length": "abc"},
    }.items():
        yield case(
            "tiny",
            "tokenizer_config.json",
            label,
            with_fields(**change),
            "load",
            pool=loads,
            expect="either" if label in ("length: abc", "class: abc") else "refuse",
        )
    for label, change in {
        "model: abc": {"model": "abc"},
        "model: null": {"model": None},
        "no words": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}},
        "ids beyond": {
            "model": {
                "type": "WordLevel",
                "vocab": {word: 10**6 + i for i, word in enumerate(("<unk>", " black", " white"))},
                "unk_token": "<unk>",
            }
        },
        "version: 9": {"version": "9.0"},
        "type: abc": {"model": {"type": "abc"}},
        "pre_tokenizer: bad pattern": {
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
        },
    }.items():
        yield case("tiny", "tokenizer.json", label, with_fields(**change), "load", pool=loads)
    for label, change in {
        "eos: abc": {"eos_token_id": "abc"},
        "eos: -5": {"eos_token_id": -5},
        "eos: huge": {"eos_token_id": 10**9},
        "eos: nested": {"eos_token_id": [[1]]},
    }.items():
        yield case("tiny", "generation_config.json", label, with_fields(**change), "load", pool=asks)
    chats = [verb for verb in turns if verb not in ("lora", "doctor")]
    for label, template in TEMPLATES.items():
        stage = "load" if label == "upper case" else "check"  # what it does to a prompt is seen when one is asked
        for turn in ("", " (again)"):
            pool = [verb for verb in chats if verb != "forecast"] if stage == "load" else chats
            yield case("chatty", "chat_template.jinja", label + turn, _text(template), stage, more=("--chat",), pool=pool)
    for label, damage in TEXT.items():
        yield case(
            "chatty",
            "chat_template.jinja",
            label,
            damage,
            more=("--chat",),
            pool=chats,
            expect="either" if label == "truncated" else "refuse",
        )


def _text(text: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.write_text(text, "utf-8")

    return damage


def tokenizer_cases() -> Iterator[Case]:
    """`concept check --model`: a tokenizer alone."""
    from attack_inputs import JSON, MISSING, damaged

    for label, damage in {**MISSING, **JSON}.items():

        def run(place: Place, damage: Callable[[Path], None] = damage) -> list[str]:
            return [
                "concept",
                "check",
                str(place.inputs / "small.toml"),
                "--model",
                str(damaged(place.folder / "themodel", place.inputs / "tiny", "tokenizer.json", damage)),
            ]

        yield Case("concept check", "model/tokenizer.json", label, run, named=("themodel", "tokenizer.json"))


def adapter_cases() -> Iterator[Case]:
    """Every file of an adapter folder, damaged in every way (`doctor` is the verb that takes one)."""
    from attack_inputs import JSON, MISSING, TENSORS, Damage, damaged, with_fields

    def case(file: str, label: str, damage: Damage) -> Case:
        def run(place: Place) -> list[str]:
            folder = damaged(place.folder / "theadapter", place.inputs / "adapter", file, damage)
            return [*sound("doctor", place), "--adapter", str(folder)]

        return Case("doctor", f"adapter/{file}", label, run, stage="load", named=("theadapter", file), codes=(1, 2))

    for label, damage in {**MISSING, **JSON}.items():
        yield case("adapter_config.json", label, damage)
    for label, damage in {**MISSING, **TENSORS}.items():
        yield case("adapter_model.safetensors", label, damage)
    for name, values in {
        "r": {"0": 0, "-1": -1, "huge": 10**9, "abc": "abc", "other": 8, "null": None},
        "peft_type": {"abc": "abc", "null": None, "IA3": "IA3", "list": []},
        "lora_alpha": {"nan": float("nan"), "abc": "abc", "inf": float("inf")},
        "target_modules": {"abc": ["abc"], "empty": [], "number": 7},
        "task_type": {"abc": "abc"},
        "layers_to_transform": {"99": [99], "abc": "abc"},
        "base_model_name_or_path": {"number": 7},
    }.items():
        for label, value in values.items():
            if (name, label) not in {("task_type", "abc"), ("base_model_name_or_path", "number")}:
                yield case("adapter_config.json", f"{name}: {label}", with_fields(**{name: value}))


CONCEPT_EDITS: dict[str, tuple[str, str]] = {  # in race.toml: (a text of it, what stands there instead)
    "name with ..": ('name = "race"', 'name = "../../race"'),
    "name with a newline": ('name = "race"', 'name = "ra\\nce"'),
    "name: NUL": ('name = "race"', 'name = "ra\\u0000ce"'),
    "name: empty": ('name = "race"', 'name = ""'),
    "name: 5,000": ('name = "race"', f'name = "{"x" * 5000}"'),
    "name: markup": ('name = "race"', 'name = "[/bold]"'),
    "name: script": ('name = "race"', 'name = "</script><script>"'),
    "name: number": ('name = "race"', "name = 7"),
    "question named by a path": ("[interpretations.paper]", '[interpretations."x/../../victim/package"]'),
    "question: absolute": ("[interpretations.about]", '[interpretations."/tmp/x"]'),
    "question: empty name": ("[interpretations.about]", '[interpretations.""]'),
    "question: NUL": ("[interpretations.about]", '[interpretations."a\\u0000b"]'),
    "question: long": ("[interpretations.about]", f"[interpretations.{'x' * 300}]"),
    "question: dots": ("[interpretations.about]", '[interpretations.".."]'),
    "question: newline": ("[interpretations.about]", '[interpretations."a\\nb"]'),
    "cue named by a path": ("[cues.default]", '[cues."../../x"]'),
    "cue: empty name": ("[cues.default]", '[cues.""]'),
    "cue: markup": ("[cues.default]", '[cues."[/red]"]'),
    "cue: comma": ("[cues.default]", '[cues."a,b"]'),
    "cue: surrogate": ("[cues.default]", '[cues."\\ud800"]'),
    "sense named by a path": ("[senses.race]", '[senses."../race"]'),
    "category by a path": ("[categories.", '[categories."../x'),
    "selfie by a path": ("[selfie.paper]", '[selfie."../../x"]'),
    "instruction by a path": ("[instructions.", '[instructions."../x'),
    "field repr": ("{word1}", "{word1!r}"),
    "field width": ("{first}", "{first:>99999999}"),
    "field digits": ("{second}", "{second:d}"),
    "field attribute": ("{first}", "{first.__class__}"),
    "field index": ("{first}", "{first[0]}"),
    "field nested": ("{first}", "{first:{second}}"),
    "field by number": ("{first}", "{0}"),
    "field without a name": ("{first}", "{}"),
    "open brace": ("{first}", "{first"),
    "option width": ("{option1}", "{option1:>99999999}"),
    "x by repr": ("{x}", "{x!r}"),
    "x digits": ("{x}", "{x:d}"),
    "marked width": ("{marked}", "{marked:>99999999}"),
    "huge number": ('name = "race"', f'name = "race"\nextra = {DIGITS}'),
    "nan": ('name = "race"', 'name = "race"\nextra = nan'),
    "key twice": ('name = "race"', 'name = "race"\nname = "race"'),
    "NUL in a word": ('"', '"\\u0000'),
}


def concept_cases() -> Iterator[Case]:
    """A concept file damaged, or with names and fields that mean something else where they are used."""
    from attack_inputs import DEEP, TEXT, _bytes

    text = (resources.files("alignblind_mi.stimuli") / "concepts" / "race.toml").read_text("utf-8")
    takes = ("concept check", "bias", "study", "score", "lora", "awareness", "qualify", "forecast", "doctor", "steer", "patch", "compare")
    damages = {
        **TEXT,
        "deep arrays": _bytes(lambda data: b"a = " + b"[" * DEEP + b"]" * DEEP),
        "deep tables": _bytes(lambda data: b"a = " + b"{b=" * 5000 + b"1" + b"}" * 5000),
        "deep keys": _bytes(lambda data: b".".join([b"a"] * DEEP) + b" = 1"),
        "BOM": _bytes(lambda data: b"\xef\xbb\xbf" + data),
        "a number": _bytes(lambda data: b"7"),
        "JSON": _bytes(lambda data: b"{}"),
        "YAML": _bytes(lambda data: b"name: race"),
        "digits": _bytes(lambda data: b"a = " + DIGITS.encode()),
    }

    def case(verb: str, label: str, change: Callable[[Path], None], expect: str = "refuse") -> Case:
        def run(place: Place) -> list[str]:
            file = place.folder / "theconcept.toml"
            shutil.copy(place.inputs / "mine.toml", file)
            change(file)
            if verb == "concept check":
                return ["concept", "check", str(file)]
            return [*sound(verb, place), f"--concept={file}"]

        return Case(verb, "concept.toml", label, run, expect, named=("theconcept",), on_stdout=verb == "concept check")

    turn = 1
    for label, damage in damages.items():
        expect = "either" if label in ("BOM", "truncated") else "refuse"
        yield case("concept check", label, damage, expect)
        yield case(takes[turn], label, damage, expect)
        turn = turn % (len(takes) - 1) + 1
    for label, (old, new) in CONCEPT_EDITS.items():
        if old not in text:
            raise ValueError(f"race.toml has no {old!r} any more: the case {label!r} attacks nothing")
        number = -1 if "{" in old or label == "NUL in a word" else 1  # the first field stands in a comment

        def edit(path: Path, old: str = old, new: str = new, number: int = number) -> None:
            path.write_text(path.read_text("utf-8").replace(old, new, number), "utf-8")

        yield case("concept check", label, edit)
        yield case(takes[turn], label, edit)
        turn = turn % (len(takes) - 1) + 1


# ---- study files ---------------------------------------------------------------------------------------------------------

YAML_VALUES: dict[type, Sequence[str]] = {
    int: (".nan", ".inf", "-1", BIG, DIGITS, "abc", "[]", "{}", "1.5", '"7"', "true"),
    float: (".nan", ".inf", "-.inf", "-1", "1e400", "abc", "[]", "{}", '""', "true"),
    str: ("[]", "{}", "7", "abc", '"a\\0b"', '"\\ud800"', '"a\\nb"', '""', "[1, 2]", "!!python/name:os.system", "x" * 5000),
    bool: ("abc", "7", "[]", '"yes"', "{}"),
    tuple: ("abc", "7", "[[]]", "[.nan]", "[-1]", '[""]', "[abc]", "{}", "[7]"),
    Mapping: ("abc", "7", "[]", "{a: null}", "{a: .nan}", "{a: [1]}", "{7: 1}", "{messages: 1}", "{enable_thinkin: false}"),
}
YAML_EXTRA = {
    "decoding.max_new_tokens": ("0",),
    "lora.rank": ("0",),
    "lora.epochs": ("0",),
    "lora.learning_rate": ("0",),
    "lora.alpha": ("0",),
    "lora.batch_size": ("0",),
    "lora.max_length": ("0",),
    "balanced_pairs": ("0",),
    "published_pairs": ("0",),
    "shots": ("65",),
    "minutes": ("0", "1e300"),
    "lora.modules": ("[q_proj, abc]", "[q_proj, q_proj]", "[]"),
    "lora.dropout": ("1",),
    "decoding.temperature": ("1e300",),
    "target_layer": ("99",),
    "lora.activation_layers": ("[99]",),
    "protocol": ("PAPER", "published"),
}
YAML_SOUND = {  # values that are well after all
    *((key, value) for key in ("balanced_pairs", "published_pairs", "lora.warmup_share") for value in ()),
    ("chat.system", "abc"),
    ("chat.system", '"a\\nb"'),
    ("chat.system", '""'),
    ("chat.system", '"a\\0b"'),
    ("chat.system", "x" * 5000),
    ("base.offload_folder", "abc"),
    ("aligned.offload_folder", "abc"),
    ("base.offload_folder", "x" * 5000),
    ("aligned.offload_folder", "x" * 5000),
    ("base.offload_folder", '"a\\nb"'),
    ("aligned.offload_folder", '"a\\nb"'),
    ("cue", '""'),
    *((f"{role}.offload_folder", value) for role in ("base", "aligned") for value in ('""', '"a\\0b"', '"\\ud800"')),
    ("base.device_map", "{}"),
    ("aligned.device_map", "{}"),
}


def settings(kind: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a study: its place in the file and its type."""
    from types import UnionType
    from typing import Union, get_args, get_origin

    hints = get_type_hints(kind)
    for one in fields(kind):
        types = [
            t
            for t in (get_args(hints[one.name]) if get_origin(hints[one.name]) in (Union, UnionType) else (hints[one.name],))
            if t is not type(None)
        ]
        if is_dataclass(types[0]):
            yield from settings(types[0], f"{where}{one.name}.")
        else:
            yield f"{where}{one.name}", get_origin(types[0]) or types[0]


def yaml_cases() -> Iterator[Case]:
    """A study file with a bad value of every setting, and files that are none."""
    from attack_inputs import DEEP, MISSING, TEXT, study_yaml

    from alignblind_mi.studies.config import StudyConfig

    def case(
        verb: str, label: str, write: Callable[[Place], str | bytes], expect: str = "refuse", named: tuple[str, ...] = ("thestudy",)
    ) -> Case:
        def run(place: Place) -> list[str]:
            made = write(place)
            file = place.folder / "thestudy.yaml"
            file.write_bytes(made if isinstance(made, bytes) else made.encode("utf-8"))
            return [*verb.split(), str(file), *(["--out", str(place.out)] if verb != "forecast" else ["--no-rate"])]

        value = label.partition(": ")[2].strip('[]"').rpartition(", ")[2].replace("\\0", "\\x00")
        return Case(verb, "study.yaml", label, run, expect, named=(*named, *names_of(value)))

    turns, counter = ("study", "compare", "forecast"), iter(range(10**6))
    for name, kind in settings(StudyConfig):
        for value in (*YAML_VALUES[kind], *YAML_EXTRA.get(name, ())):
            head, _, tail = name.partition(".")

            def write(place: Place, head: str = head, tail: str = tail, value: str = value) -> str:
                model = place.inputs / "chatty"
                lines = {"base": str(model), "aligned": str(model), "quick": "true", "concept": str(place.inputs / "small.toml")}
                if head in ("base", "aligned"):
                    lines[head] = f"{{name: {value}}}" if tail == "name" else f"{{name: {model}, {tail}: {value}}}"
                else:
                    lines[head] = f"{{{tail}: {value}}}" if tail else value
                return "".join(f"{key}: {text}\n" for key, text in lines.items())

            fine = (name, value) in YAML_SOUND or (name == "seed" and value == "0")
            last = name.split(".")[-1]
            yield case(
                turns[next(counter) % 3], f"{name}: {value}", write, "either" if fine else "refuse", (last, "thestudy", *names_of(value))
            )

    files = {**MISSING, **TEXT}
    for label, damage in files.items():
        for verb in turns[:2] if label != "FIFO" else turns:

            def run(place: Place, damage: Callable[[Path], None] = damage, verb: str = verb) -> list[str]:
                file = place.folder / "thestudy.yaml"
                shutil.copy(place.inputs / "study.yaml", file)
                damage(file)
                return [verb, str(file), "--out", str(place.out)]

            yield Case(verb, "study.yaml", label, run, "either" if label in ("truncated", "dangling") else "refuse", named=("thestudy",))
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
    )
    texts: dict[str, str | bytes] = {
        "deep lists": "a: " + "[" * DEEP + "]" * DEEP,
        "deep mappings": "a: " + "{a: " * 5000 + "1" + "}" * 5000,
        "billion laughs": bomb,
        "in itself": "a: &a [*a]\n",
        "unknown alias": "a: *nothing\n",
        "a list": "- 1\n- 2\n",
        "a text": "abc\n",
        "a number": "7\n",
        "null": "null\n",
        "digits": DIGITS,
        "two documents": "base: organism:base\n---\naligned: organism:aligned\n",
        "code": "!!python/object/apply:os.system ['x']\n",
        "code inside": "base: !!python/object/apply:os.system ['x']\n",
        "a key that is a list": "? [1, 2]\n: 3\n",
        "tabs": "base:\n\t- x\n",
        "a key that is a mapping": "? {a: 1}\n: 3\n",
        "a date": "base: 2020-01-01\naligned: 2020-01-01\n",
        "binary": "base: !!binary aGVsbG8=\n",
        "merge key": "base: &b {name: organism:base}\naligned:\n  <<: *b\n  <<: *b\n",
        "a key with markup": '"[/bold]": 1\n',
        "a key that is a number": "7: 1\n",
        "a key of 5,000": f"{'x' * 5000}: 1\n",
        "NUL": b"base: a\0b\n",
        "set": "!!set {base, aligned}\n",
        "omap": "!!omap [base: 1]\n",
        "a key twice": "base: organism:base\nbase: organism:base\naligned: organism:aligned\n",
        "timestamp key": "2020-01-01: 1\n",
        "sexagesimal": "base: organism:base\naligned: organism:aligned\nseed: 1:30:99999\n",
    }
    for label, content in texts.items():
        for verb in turns[:2]:
            yield case(verb, label, lambda place, content=content: content)  # type: ignore[misc]
    yield case("study", "BOM", lambda place: b"\xef\xbb\xbf" + study_yaml(place.inputs / "tiny").encode(), "either")


# ---- data files ----------------------------------------------------------------------------------------------------------


def data_cases() -> Iterator[Case]:
    """BBQ, released answers, interpretations and results."""
    from attack_inputs import JSON, Damage, bbq_items, interpretations, released

    def case(verb: str, good: str, name: str, label: str, damage: Damage, expect: str = "refuse") -> Case:
        def run(place: Place) -> list[str]:
            file = place.folder / name
            shutil.copy(place.inputs / good, file)
            damage(file)
            return [*sound(verb, place), f"--bbq={file}"] if verb == "compare" else [verb, str(file)]

        return Case(verb, good, label, run, expect, named=(name,))

    for label, damage in JSON.items():
        yield case("compare", "bbq.jsonl", "thebbq.jsonl", label, damage)
        yield case("score", "released.json", "thereleased.json", label, damage)
        yield case("score", "read.jsonl", "theread.jsonl", label, damage, "either" if label == "truncated" else "refuse")
        yield case("score", "rows.parquet", "therows.parquet", label, damage)
    item = bbq_items()[0]
    changes: dict[str, dict[str, Any]] = {
        "label: 7": {"label": 7},
        "label: nan": {"label": float("nan")},
        "label: 1.0": {"label": 1.0},
        "label: true": {"label": True},
        "label: text": {"label": "1"},
        "label: null": {"label": None},
        "label: list": {"label": []},
        "context: number": {"context": 7},
        "context: null": {"context": None},
        "context: surrogate": {"context": "\ud800"},
        "context: empty": {"context": ""},
        "question: list": {"question": []},
        "answer_info: null": {"answer_info": None},
        "answer_info: list": {"answer_info": [1]},
        "polarity: abc": {"question_polarity": "abc"},
        "polarity: list": {"question_polarity": []},
        "condition: 7": {"context_condition": 7},
        "no metadata": {"additional_metadata": None},
        "groups: text": {"additional_metadata": {"stereotyped_groups": "Black"}},
        "groups: numbers": {"additional_metadata": {"stereotyped_groups": [7]}},
        "ans0: null": {"ans0": None},
        "ans0: list": {"ans0": [1]},
        "category: list": {"category": []},
        "category: surrogate": {"category": "\ud800"},
        "example_id: null": {"example_id": None},
        "context: 1 MB": {"context": "x " * 500_000},
    }
    for label, change in changes.items():
        expect = "either" if label in ("context: empty", "context: 1 MB") else "refuse"
        yield case("compare", "bbq.jsonl", "thebbq.jsonl", label, _text(json.dumps({**item, **change}) + "\n"), expect)
    line = interpretations()[0]
    for label, entry in {
        "interpretation: number": {**line, "interpretation": 7},
        "interpretation: deep": {**line, "interpretation": [["x"]]},
        "interpretation: mapping": {**line, "interpretation": {}},
        "prompt: list": {**line, "prompt": [1]},
        "layer: nan": {**line, "layer": float("nan")},
        "layer: -1": {**line, "layer": -1},
        "no interpretation": {"prompt": "x"},
        "an empty list": {**line, "interpretation": []},
    }.items():
        expect = "either" if label in ("layer: nan", "layer: -1") else "refuse"
        yield case("score", "read.jsonl", "theread.jsonl", label, _text(json.dumps(entry) + "\n"), expect)
    ((key, answers),) = list(released().items())[:1]
    for label, data in {
        "empty object": {},
        "key: empty": {"": answers},
        "key: one word": {"a": answers},
        "answer: number": {key: {"implicit_random0": 7}},
        "answer: list of lists": {key: {"implicit_random0": [["x"]]}},
        "templates: list": {key: []},
        "templates: null": {key: None},
        "template: empty": {"a b c d": {"": ["x", 1]}},
        "answer: null": {key: {"implicit_random0": None}},
    }.items():
        yield case("score", "released.json", "thereleased.json", label, _text(json.dumps(data)))
    for label, data in {"key twice": '{"a b c d": {"implicit_random0": ["x", 1]}, "a b c d": {"implicit_random0": ["y", 1]}}'}.items():
        yield case("score", "released.json", "thereleased.json", label, _text(data))


def result_cases() -> Iterator[Case]:
    """Result folders whose files are damaged, of another verb, or of nobody."""
    from attack_inputs import JSON, MISSING, Damage

    def case(verb: str, good: str, file: str, label: str, damage: Damage, expect: str = "refuse") -> Case:
        def run(place: Place) -> list[str]:
            folder = place.folder / "theresults"
            shutil.copytree(place.inputs / good, folder)
            damage(folder / file)
            if verb in ("report", "score"):
                return [verb, str(folder)]
            return [*sound(verb, place), "--out", str(folder)]

        drawn = ("written", "tables", "figures", "views", "report")
        writes = tuple(f"theresults/{name}" for name in drawn) if verb == "report" else ()
        return Case(verb, f"results/{file}", label, run, expect, named=("theresults",), writes=writes)

    for label, damage in {**MISSING, **JSON}.items():
        yield case("report", "studied", "study.json", label, damage)
        yield case("report", "studied", "behaviour_base.json", label, damage)
        yield case("report", "studied", "behaviour_base.parquet", label, damage, "either" if label == "missing" else "refuse")
        yield case("bias", "biased", "study.json", label, damage)
        yield case("bias", "biased", "balanced_model.json", label, damage)
        if label != "missing":
            yield case("bias", "biased", "balanced_model.parquet", label, damage)
            yield case("score", "biased", "balanced_model.parquet", label, damage)
    rows: dict[str, Callable[[Any], Any]] = {
        "half of the rows": lambda frame: frame.iloc[: len(frame) // 2],
        "no rows": lambda frame: frame.iloc[:0],
        "no answers": lambda frame: frame.drop(columns="answer"),
        "other outcomes": lambda frame: frame.assign(outcome="stereotyped"),
        "log-odds NaN": lambda frame: frame.assign(log_odds=float("nan")),
        "numbers for texts": lambda frame: frame.assign(outcome=7),
        "twice": lambda frame: frame.loc[frame.index.repeat(2)],
    }
    for label, change in rows.items():
        yield case("bias", "biased", "balanced_model.parquet", label, _with_rows(change))
        yield case("report", "studied", "behaviour_base.parquet", label, _with_rows(change))
    notes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "another model": lambda note: {**note, "model": "other"},
        "another revision": lambda note: {**note, "revision": "sha256:0"},
        "no config": lambda note: {key: value for key, value in note.items() if key != "config"},
        "empty": lambda note: {},
        "another seed": lambda note: {**note, "config": {**note["config"], "seed": 7}},
    }
    for label, change in notes.items():
        yield case("bias", "biased", "balanced_model.json", f"note: {label}", _with_note(change))
        yield case("report", "studied", "behaviour_base.json", f"note: {label}", _with_note(change))
    for good in ("biased", "steered", "adapter", "tiny"):
        yield case("report", good, "", f"a folder of another verb: {good}", lambda path: None)
    for verb in ("awareness", "qualify", "patch", "steer", "study", "compare", "calibrate", "lora", "organism build"):
        one = verb in ("awareness", "qualify", "patch", "steer", "study")  # of the same configuration: they may share a folder
        yield case(verb, "biased", "", "a folder of another verb", lambda path: None, "either" if one else "refuse")
    for good in ("adapter", "tiny"):
        yield case("score", good, "", f"a folder without answers: {good}", lambda path: None)


def _with_rows(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        import pandas as pd

        change(pd.read_parquet(path)).to_parquet(path, index=False, write_page_checksum=True)

    return damage


def _with_note(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")

    return damage


# ---- what fits together badly, and what must succeed -----------------------------------------------------------------------


def odd_lines() -> Iterator[Case]:
    """Options each of which is well, together not; words that are no options."""

    def case(verb: str, label: str, *more: str, named: tuple[str, ...] = (), expect: str = "refuse", stage: str = "check") -> Case:
        return Case(
            verb,
            "together",
            label,
            lambda place: [*sound(verb, place), *(one.format(out=place.out, inputs=place.inputs) for one in more)],
            expect,
            stage,
            named,
        )

    for verb in verbs():
        yield case(verb, "an unknown option", "--nothing=7", named=("--nothing",))
        yield (
            case(verb, "a word too many", "abc\x1b[31m", named=("abc",))
            if verb not in ("score", "concept check", "report", "doctor")
            else case(verb, "an unknown short option", "-z", named=("-z",))
        )
    yield case("lora", "merge into the adapter", "--merge", "{out}", named=("out",))
    yield case("lora", "merge inside the adapter", "--merge", "{out}/merged", named=("out",))
    yield case("lora", "merge over the model", "--merge", "{inputs}/chatty", named=("chatty",))
    yield case("lora", "adapter over the model", "--out", "{inputs}/chatty", named=("chatty",))
    yield case("lora", "adapter over an adapter of others", "--out", "{inputs}/adapter", named=("adapter",))
    yield case("lora", "merge quantised", "--merge", "{out}2", "--quantization", "4bit", named=("4bit",))
    yield case("lora", "patience alone", "--patience", "2", named=("patience",))
    yield case("lora", "concept without senses", "--concept", "religion", named=("religion",))
    yield case("export steered", "strength of ablation", "--how", "ablate", "--strength", "2", named=("strength",))
    yield case("export steered", "another ending", "--out", "{out}.safetensors", named=("out",))
    yield case("report", "a log of nothing", "{inputs}/nothing.eval", named=("nothing",))
    yield case("score", "a log of nothing", "{inputs}/nothing.eval", named=("nothing",))
    yield case("steer", "strength of a replacement", "--strengths", "2", named=("strength",))
    yield case("steer", "replace by a direction", "--method", "pca", "--how", "replace", named=("pca",))
    yield case("steer", "add a replacement", "--how", "add", named=("replacement", "add"))
    yield case("steer", "gguf of a replacement", "--gguf", "{out}.gguf", named=("gguf", "GGUF", "llama.cpp"))
    yield case("steer", "gguf of layer 0", "--method", "pca", "--layers", "0", "--gguf", "{out}.gguf", named=("layer",))
    yield case("steer", "positions of a replacement", "--positions", "prompt", named=("positions", "prompt"))
    yield case("steer", "a control for another method", "--method", "pca", "--sense", "random", named=("random",))
    yield case("bias", "system without chat", "--system", "x", named=("system",))
    yield case("bias", "chat without a template", "--concept", "race", "--chat", "--model", "organism:aligned", named=("organism:aligned",))
    yield case("bias", "organism on another concept", "--model", "organism:aligned", "--concept", "religion", named=("religion",))
    yield case(
        "bias",
        "quantised organism",
        "--concept",
        "race",
        "--model",
        "organism:aligned",
        "--quantization",
        "8bit",
        named=("8bit", "quantiz", "quantis"),
    )
    yield case(
        "forecast",
        "quantised organism",
        "--concept",
        "race",
        "--base",
        "organism:base",
        "--aligned",
        "organism:aligned",
        "--quantization",
        "4bit",
        named=("4bit", "quantiz", "quantis"),
    )
    yield case("power", "no difference", "--untreated", ".5", "--treated", ".5", named=("0.5", ".5"))
    yield case("power", "impossible share", "--discordant", "0.01", named=("0.01",))
    yield case("power", "shares above one", "--icc", ".9", "--template-icc", ".9", named=("0.9",))
    yield case("power", "beside a pilot", "--pilot", "{inputs}/steered", named=("--untreated", "steered"))
    yield case("power", "one word pair", "--word-pairs", "1", named=("1",))
    yield case("study", "option beside a file", "--seed", "7", "--", "{inputs}/study.yaml", named=("--seed", "--base"))
    yield case("doctor", "revision of a folder", "--revision", "main", named=("revision", "main"))
    yield case("awareness", "concept without senses", "--concept", "age", named=("age",))
    yield case("score", "the same path twice", "{inputs}/released.json", expect="succeed", stage="full")
    yield Case("study", "together", "no verb", lambda place: ["nothing"], named=("nothing",))
    yield Case("study", "together", "a verb with markup", lambda place: ["[/bold]"], named=("[/bold]",))
    yield Case("study", "together", "a verb with a surrogate", lambda place: ["\ud800"], named=("ud800",))


def sound_cases() -> Iterator[Case]:
    """What must succeed, so that the table is not passed by refusing everything."""

    def case(verb: str, label: str, *line: str, writes: tuple[str, ...] = ("out",)) -> Case:
        return Case(
            verb,
            "sound",
            label,
            lambda place: [one.format(out=place.out, inputs=place.inputs) for one in (*verb.split(), *line)],
            "succeed",
            "full",
            writes=writes,
        )

    def at_results(verb: str, good: str, label: str, writes: tuple[str, ...]) -> Case:
        def run(place: Place) -> list[str]:
            shutil.copytree(place.inputs / good, place.folder / "theresults")
            return (
                [verb, str(place.folder / "theresults")]
                if verb in ("report", "score")
                else [*sound(verb, place), "--out", str(place.folder / "theresults")]
            )

        return Case(verb, "sound", label, run, "succeed", "full", writes=writes)

    yield case("concept list", "alone")
    yield case("concept template", "alone")
    yield case("concept show", "race", "race")
    for name in ("race", "{inputs}/small.toml"):
        yield case("concept check", name, name)
    yield case("concept check", "with a tokenizer", "{inputs}/mine.toml", "--model", "{inputs}/tiny")
    yield case("power", "needed", "--untreated", ".95", "--treated", ".6")
    yield case("power", "at hand", "--untreated", ".95", "--treated", ".6", "--word-pairs", "20", "--icc", "0.1", "--json")
    yield case("score", "released", "{inputs}/released.json")
    yield case("score", "interpretations", "{inputs}/read.jsonl", "--json")
    yield case("score", "rows", "{inputs}/biased", "--by", "model,template")
    yield case("forecast", "tiny", "--base", "{inputs}/tiny", "--aligned", "{inputs}/tiny", "--no-rate", "--quick")
    yield case("forecast", "organism, JSON", "--quick", "--no-rate", "--json")
    yield case("doctor", "tiny", "{inputs}/tiny", "--no-drift", "--engine", "plain")
    yield at_results("bias", "biased", "what is there already", ("theresults/.",))
    yield at_results("report", "studied", "a study", ("theresults",))
    yield at_results("score", "studied", "a study", ())
    yield case(
        "bias",
        "resumed where it was",
        "--model",
        "{inputs}/chatty",
        "--quick",
        "--temperature",
        "0",
        "--concept",
        "{inputs}/small.toml",
        "--out",
        "{inputs}/biased",
    )
    yield Case("alignblind", "sound", "version", lambda place: ["--version"], "succeed", "full")
    yield Case("alignblind", "sound", "help", lambda place: ["--help"], "succeed", "full")


def all_cases() -> list[Case]:
    """The whole table."""
    return [
        case
        for some in (
            sound_cases,
            option_cases,
            odd_lines,
            model_cases,
            tokenizer_cases,
            adapter_cases,
            concept_cases,
            yaml_cases,
            data_cases,
            result_cases,
        )
        for case in some()
    ]


# ---- running -------------------------------------------------------------------------------------------------------------


def make_results(inputs: Path) -> None:
    """Results of a bias, a steering and the beginning of a study on the tiny model, for the verbs that read them."""
    from alignblind_mi import Decoding, StudyConfig, load_concept, run_parts, study_parts
    from alignblind_mi.results import load_result

    tiny = str(inputs / "chatty")
    quick = ["--model", tiny, "--quick", "--temperature", "0", "--concept", str(inputs / "small.toml")]
    _done(["bias", *quick, "--out", str(inputs / "biased")])
    _done(["steer", *quick, "--method", "mean_difference", "--layers", "1-2", "--out", str(inputs / "steered")])
    shutil.copy(inputs / "biased" / "balanced_model.parquet", inputs / "rows.parquet")
    assert len(load_result(inputs / "biased" / "balanced_model.parquet").rows)
    config = replace(StudyConfig.create(tiny, tiny, quick=True), balanced_pairs=1, published_pairs=1, decoding=Decoding(max_new_tokens=3))
    with caught():
        run_parts(config, inputs / "studied", list(islice(study_parts(config, load_concept("race"), skip=["qualification"]), 2)))
        shutil.copytree(inputs / "studied", inputs / "shared")
        (inputs / "shared" / "shares.json").write_text("{}", "utf-8")


def _done(line: Sequence[str]) -> None:
    """Run a sound command whose results other cases read."""
    with caught() as (_, err):
        code = command(line)
    assert code == 0, (line, err.buffer.getvalue())  # type: ignore[attr-defined]


def prepare() -> Path:
    """Everything that is imported once, and the folder in which the table runs: inputs/, home/, work/ (the working directory), cases/."""
    import pkgutil
    from importlib import import_module

    os.environ.update(ENVIRONMENT)
    root = Path(tempfile.mkdtemp(prefix="attack-")).resolve()
    for name in ("inputs", "home", "work", "tmp", "cache"):
        (root / name).mkdir()
    os.environ.update(
        HOME=str(root / "home"),
        HF_HOME=str(root / "home"),
        ALIGNBLIND_CACHE=str(root / "cache"),
        TMPDIR=str(root / "tmp"),
        MPLCONFIGDIR=str(root / "home"),
        XDG_CACHE_HOME=str(root / "home"),
    )
    tempfile.tempdir = str(root / "tmp")
    os.chdir(root / "work")
    import torch
    import transformers  # noqa: F401
    from peft import PeftModel  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import alignblind_mi

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(alignblind_mi.__path__, "alignblind_mi."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    return root


def main() -> int:
    """Run the table and print it; the exit code is 1 if a case did not end as expected."""
    return run_table(all_cases, command)


def run_table(make: Callable[[], list[Case]], act: Callable[[Any], int]) -> int:
    """Prepare, run and print a table as the command line asks."""
    arguments = sys.argv[1:]
    only = arguments[arguments.index("--only") + 1] if "--only" in arguments else ""
    stand_in()
    started = _spent()
    root = prepare()
    try:
        from attack_inputs import make_inputs

        inputs = make_inputs(root / "inputs")
        make_results(inputs)
        bound_memory()
        cases = [case for case in make() if only in case.key]
        if "--third" in arguments:
            cases = third(cases)
        ready = _spent() - started
        endings = run_all(
            cases,
            inputs,
            root,
            act,
            [root / name for name in ("inputs", "work", "cache", "home")],
            lambda ending: _progress(ending, "--progress" in arguments),
        )
    finally:
        os.chdir("/")
        shutil.rmtree(root, ignore_errors=True)
    _print(endings, arguments, ready, _spent() - started)
    return int(any(ending.kind for ending in endings))


def third(cases: Sequence[Case]) -> list[Case]:
    """Every third case of each option and file of each verb, and all that must succeed."""
    seen = Counter[tuple[str, str]]()
    kept = []
    for case in cases:
        seen[case.group, case.option] += 1
        if case.expect == "succeed" or seen[case.group, case.option] % 3 == 1:
            kept.append(case)
    return kept


def _spent() -> float:
    """Seconds of a processor that this process and its forks have taken."""
    return sum(os.times()[:4])


def _peak() -> int:
    """KiB that this program held at most. `ru_maxrss` would be wrong: it survives `exec`, so it counts what the caller held."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM"))


def _progress(ending: Ending, wanted: bool) -> None:
    if wanted:
        print(f"{ending.kind or 'ok':<12}{ending.seconds:6.2f} {ending.case.key}", file=sys.__stderr__, flush=True)


def _print(endings: Sequence[Ending], arguments: Sequence[str], ready: float, seconds: float) -> None:
    import resource

    memory = max(_peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) >> 10
    records = [ending.record() for ending in endings if ending.kind or "--failing" not in arguments]
    summary = {
        "cases": len(endings),
        "verbs": len({ending.case.group for ending in endings}),
        "pairs": len({(ending.case.group, ending.case.option) for ending in endings}),
        "failing": sum(bool(e.kind) for e in endings),
        "kinds": dict(Counter(ending.kind for ending in endings if ending.kind)),
        "memory_mib": memory,
        "ready_s": round(ready, 1),
        "seconds": round(seconds, 1),
    }
    if "--json" in arguments:
        print(json.dumps({"summary": summary, "cases": records}, indent=1))
    elif "--csv" in arguments:
        table = csv.DictWriter(
            sys.stdout, ["group", "option", "value", "expect", "stage", "code", "seconds", "verdict", "sentence", "faults"]
        )
        table.writeheader()
        table.writerows({**record, "faults": "; ".join(record["faults"])} for record in records)
    else:
        for record in records:
            code = "-" if record["code"] is None else record["code"]
            print(
                f"{record['verdict']:<12} {code} {record['seconds']:6.2f}s {record['group']} | {record['option']} | {record['value']} | "
                f"{record['sentence'][:110]}" + "".join(f"\n    {shown(fault, 220)}" for fault in record["faults"])
            )
        print("\n".join(f"{key}: {value}" for key, value in summary.items()))


if __name__ == "__main__":
    sys.exit(main())
