"""Options that several verbs share: one help text each, and the kinds of them that come together. Does NOT know what a verb does.

A verb takes a kind as one parameter (`loading: Loading`), and `with_options` puts the kind's options in its place on the command line.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from alignblind_mi.borders.texts import say
from alignblind_mi.errors import AlignblindError
from alignblind_mi.stimuli.concept import DEFAULT_CONCEPT

if TYPE_CHECKING:
    from alignblind_mi.models.spec import ModelSpec
    from alignblind_mi.studies.config import StudyConfig

Model = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, organism:base or organism:aligned.")]
Base = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:base.")]
Aligned = Annotated[str, typer.Option(help="Hugging Face id, checkpoint folder, or organism:aligned.")]
ConceptName = Annotated[str, typer.Option(help="A built-in concept or a .toml file.")]
CueName = Annotated[str, typer.Option(help="A cue of the concept (default: its first).")]
Quick = Annotated[bool, typer.Option("--quick", help="A small share of the prompts: to see that it works.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: by device).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")]
DeviceMap = Annotated[str | None, typer.Option(help="Passed to transformers, e.g. auto for a model on several GPUs.")]
TensorParallel = Annotated[bool, typer.Option("--tensor-parallel", help="One model on several GPUs: each process of torchrun holds a "
                                                                        "part of every layer.")]
Quantized = Annotated[str | None, typer.Option(help="8bit or 4bit (bitsandbytes; pip install 'alignblind-mi\\[quantized]').")]
Chatting = Annotated[bool, typer.Option("--chat", help="Ask in the models' own chat templates (default: raw text, as the paper).")]
System = Annotated[str, typer.Option(help="A system prompt before every prompt of the chat.")]
ChatOptions = Annotated[str, typer.Option(help="Options of the chat template, such as enable_thinking=false (several with commas).")]
ProtocolOption = Annotated[str | None, typer.Option(help="paper (steering, LoRA and SelfIE as its released code does) or best (as we hold "
                                                      "better); default: paper for a pair, best for one model and for organisms.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy, above it answers are sampled (default: 0; 1 for an organism).")]
EngineOption = Annotated[str, typer.Option(help="fast, plain (transformers' own forward pass), or auto: fast where both agree.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings along (read it first).")]
Unpickling = Annotated[bool, typer.Option("--allow-pickle", help="Unpickle weights that lie in .bin files (torch, weights_only): only from "
                                                           "makers whom you trust.")]
Minutes = Annotated[float | None, typer.Option(help="Measure as much as fits into so many minutes here (not with --quick): what is thinned "
                                                    "is said, and kept in OUT.")]
ShotsCount = Annotated[int, typer.Option("--shots", help="Worked examples of neutral items before every bias prompt.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn, sampled answers among it.")]
Out = Annotated[Path, typer.Option(help="Results folder; what is in it already is not computed again.")]
StudyFile = Annotated[Path | None, typer.Argument(help="A YAML file with all settings (instead of options).", show_default=False)]
Skipped = Annotated[str, typer.Option("--skip", help="Leave out: qualification (whether the models can do the task, and what reads them).")]
OutcomeName = Annotated[str, typer.Option("--outcome", help="text, probability (the more probable answer), or both: text leads where most "
                                                            "answers are valid.")]
Shard = Annotated[str | None, typer.Option("--shard", help="One share of the run alone, as 1/3: several processes in one folder, or each "
                                                           "in its own (then alignblind merge).")]
RayAddress = Annotated[str | None, typer.Option("--ray", metavar="[ADDRESS]", help="Run on a Ray cluster: local (this machine; the same as "
                                                "no word at all), auto (the one it is in), or an address.")]
Actors = Annotated[int | None, typer.Option(help="With --ray: models in memory at the same time (default: as many as have room).")]
GpusEach = Annotated[float | None, typer.Option("--gpus-each", help="With --ray: GPUs of each (default: 1, if there are any).")]
CpusEach = Annotated[int | None, typer.Option("--cpus-each", help="With --ray: CPUs of each (default: 1).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON records and nothing else.")]

AsOneJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

VERDICTS = {"can": "green", "cannot tell": "yellow", "cannot": "bold red",
            "reads": "green", "doubtful": "yellow", "does not read": "bold red"}    # how rows of a qualification are shown


# ---- kinds of options ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class One:
    """The model that a verb asks, and about what."""

    model: Model = "organism:aligned"
    concept: ConceptName = DEFAULT_CONCEPT
    cue: CueName = ""

    @property
    def models(self) -> tuple[str, str]:
        """The models of a study: this one in both places."""
        return self.model, self.model


@dataclass(frozen=True)
class Pair:
    """The two models that a verb asks, and about what."""

    base: Base = "organism:base"
    aligned: Aligned = "organism:aligned"
    concept: ConceptName = DEFAULT_CONCEPT
    cue: CueName = ""

    @property
    def models(self) -> tuple[str, str]:
        """The models of a study."""
        return self.base, self.aligned


@dataclass(frozen=True)
class Asking:
    """How a model is asked."""

    quick: Quick = False
    minutes: Minutes = None
    chat: Chatting = False
    system: System = ""
    chat_options: ChatOptions = ""
    temperature: Temperature = None
    shots: ShotsCount = 0
    protocol: ProtocolOption = None
    seed: Seed = 0


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and run: the fields of a `ModelSpec`."""

    dtype: Dtype = None
    device: Device = None
    device_map: DeviceMap = None
    quantization: Quantized = None
    engine: EngineOption = "auto"
    trust_remote_code: RemoteCode = False
    allow_pickle: Unpickling = False
    tensor_parallel: TensorParallel = False

    def spec(self, name: str, *, revision: str | None = None) -> "ModelSpec":
        """A model that is loaded so. Errors: ModelError for a value that does not exist."""
        from alignblind_mi.models.spec import ModelSpec

        return ModelSpec(name, revision=revision, **asdict(self))


class Verb(TyperCommand):
    """A verb whose `--ray` needs no value: alone it is `--ray local`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's, which knows no option that may have a value or none."""
        given = list[str]()
        for one, after in zip(args, [*args, "--"][1:], strict=True):
            given += [one, "local"] if one == "--ray" and after.startswith("-") else [one]
        return super().parse_args(ctx, given)


@dataclass(frozen=True)
class Spread:
    """Where a run is carried out: here, as one share of several, or on a Ray cluster."""

    shard: Shard = None
    ray: RayAddress = None
    actors: Actors = None
    cpus_each: CpusEach = None
    gpus_each: GpusEach = None

    @property
    def divides(self) -> bool:
        """Whether it is more than this process."""
        return self.shard is not None or self.ray is not None

    def check(self, config: "StudyConfig | None" = None) -> None:
        """Errors: AlignblindError for options that do not go together, ShareError for a share that does not exist."""
        from alignblind_mi.studies.shares import Share

        given = [name for name in ("actors", "cpus_each", "gpus_each") if getattr(self, name) is not None]
        if given and self.ray is None:
            raise AlignblindError(f"--{given[0].replace('_', '-')} belongs to --ray: give that as well (--ray local for this machine).")
        if self.shard is not None and self.ray is not None:
            raise AlignblindError("--shard and --ray are two ways to divide a run: give one of them.")
        way = "--ray" if self.ray is not None else "--shard"
        if config is not None and self.divides and config.minutes is not None:
            raise AlignblindError(f"{config.minutes:g} minutes are those of one process on this machine, which measures what fits: "
                                  f"leave out {way}, or the minutes.")
        if config is not None and self.divides and config.aligned.tensor_parallel:
            raise AlignblindError(f"--tensor-parallel and {way} are two ways to use several GPUs: give one of them ({way} with "
                                  "--device-map auto, for a model that needs several GPUs).")
        if self.shard is not None:
            Share.of(self.shard)

    def carry_out(self, run: Callable[..., Any], out: Path) -> bool:
        """Do a run that lacks its folder alone (after `check`); whether it is whole now. What is missing is said."""
        from alignblind_mi.studies.on_ray import run_on_ray
        from alignblind_mi.studies.shares import Share, missing_jobs

        if self.ray is not None:
            run_on_ray(run, out, address=self.ray, actors=self.actors, gpus=self.gpus_each,
                       cpus=1 if self.cpus_each is None else self.cpus_each)
        elif self.shard is not None:
            run(out=out, execute=Share.of(self.shard))
        else:
            run(out=out)
        left = missing_jobs(out) if self.shard is not None else []
        if left:
            say(f"Share {self.shard} is finished; {said_missing(left)} Run the other shares, into {out} or into folders that alignblind "
                "merge brings together; then the same command without --shard makes the page.")
        return not left


def said_missing(jobs: Sequence[str]) -> str:
    """How many jobs are missing, and the first of them, as a sentence."""
    are = "job is" if len(jobs) == 1 else "jobs are"
    return f"{len(jobs)} {are} missing yet ({', '.join(jobs[:3])}{', ...' if len(jobs) > 3 else ''})."


KINDS = (One, Pair, Asking, Loading, Spread)
SPREAD = tuple(option.name for option in fields(Spread))    # may stand beside a study file: they are no settings of its rows


class Without:
    """Names of a kind's options that a verb does not have: `Annotated[Loading, Without("engine")]`; they keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


def with_options(act: Callable[..., None]) -> Callable[..., None]:
    """The verb `act` with the options of each kind that it takes in the kind's place: so typer reads it, and so Python may call it."""
    parts = {one.name: (one, *_kind(one.annotation)) for one in inspect.signature(act).parameters.values()}
    flat = [own for one, kind, options in parts.values() for own in ([_parameter(option) for option in options] if kind else [one])]
    signature = inspect.Signature([one.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for one in flat])

    @wraps(act)
    def verb(*given: Any, **named: Any) -> None:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        values = bound.arguments
        act(**{name: kind(**{option.name: values[option.name] for option in options}) if kind else values[name]
               for name, (_, kind, options) in parts.items()})

    verb.__dict__["__signature__"] = signature
    verb.__annotations__ = {one.name: one.annotation for one in flat}
    return verb


def _kind(annotation: Any) -> "tuple[type[Any] | None, list[Field[Any]]]":
    """The kind of options that a parameter stands for, if any, and those of its options that the verb has."""
    kind, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if kind not in KINDS:
        return None, []
    left_out = {name for mark in marks for name in mark.names}
    return kind, [option for option in fields(kind) if option.name not in left_out]


def _parameter(option: "Field[Any]") -> inspect.Parameter:
    return inspect.Parameter(option.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=option.default, annotation=option.type)


def configured(asked: One | Pair, asking: Asking, loading: Loading) -> "StudyConfig":
    """The configuration of a study that is asked for by options. Errors: as `StudyConfig.create`."""
    from alignblind_mi.studies.config import StudyConfig

    base, aligned = asked.models
    usual = "best" if isinstance(asked, One) else None    # of a pair: that of its models
    asks = asdict(asking) | {"chat_options": template_options(asking.chat_options),
                             "protocol": usual if asking.protocol is None else asking.protocol}
    return StudyConfig.create(base, aligned, concept=asked.concept, cue=asked.cue, **asks, **asdict(loading))


def template_options(text: str) -> dict[str, bool | int | float | str]:
    """The options of a chat template as they are typed: true, false, numbers, and texts. Errors: AlignblindError for one without a value
    or given twice."""
    found: dict[str, bool | int | float | str] = {}
    for part in listed(text):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value or name in found:
            raise AlignblindError(f"{part!r} is no option of a chat template, or stands there twice: write name=value, such as "
                                  "enable_thinking=false.")
        plain = {"true": True, "false": False}.get(value.lower())
        found[name] = plain if plain is not None else _number_or_text(value)
    return found


def _number_or_text(value: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


# ---- what is given -------------------------------------------------------------------------------------------------------


def listed(text: str) -> list[str]:
    """The names of a comma-separated option; none where it is not given. Errors: AlignblindError for commas without names."""
    names = [name.strip() for name in text.split(",")] if text else []
    if not all(names):
        raise AlignblindError(f"{text!r} has commas without a name: give names with one comma between them, or leave the option out.")
    return names


def from_file(file: Path, context: Any, *, allowed: Sequence[str]) -> "StudyConfig":
    """The configuration in a study file; no option but those `allowed` is given beside it.

    Errors: as `refuse_beside` and `read_study_file`.
    """
    from alignblind_mi.studies.study_file import read_study_file

    refuse_beside(file, context, allowed=allowed)
    return read_study_file(file)


def refuse_beside(file: Path, context: Any, *, allowed: Sequence[str]) -> None:
    """Errors: AlignblindError for an option that is given beside a study file: a study's settings stand in one place."""
    given = typed(context, [name for name in context.params if name not in ("file", *allowed)])
    if given:
        raise AlignblindError(f"{given[0]} was given beside the study file {file}, which holds all settings: write it into the file, or "
                              "give options alone.")


def typed(context: Any, names: Iterable[str]) -> list[str]:
    """Those of some options that stand on the command line, as they are typed there; the others have their defaults.

    `context` is typer's (of a class of its own that is not the one it documents, so that functions which take one are not type-checked).
    """
    sources = {name: context.get_parameter_source(name) for name in names}
    return [f"--{name.replace('_', '-')}" for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
