"""The whole study: behaviour -> awareness -> steering -> LoRA -> comparison, in parts that are saved as soon as they are finished.

A part is one Parquet file of rows with its provenance; a run that is killed and started again computes only the missing ones, and each
part is the same whichever run computes it. This module does NOT know how results are shown.
"""

import gc
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

from alignblind_mi.borders import ranks
from alignblind_mi.borders.reading import is_file, is_folder, named
from alignblind_mi.borders.settings import File, Names, many, takes
from alignblind_mi.borders.texts import say
from alignblind_mi.errors import ResultError
from alignblind_mi.mitigations.lora import awareness_examples, train_lora
from alignblind_mi.mitigations.lora_settings import check_modules, choose_layers, layer_group
from alignblind_mi.models.configs import depth_of, load_tokenizer
from alignblind_mi.models.loading import token_count
from alignblind_mi.models.model import HookedModel, load_model
from alignblind_mi.models.spec import ModelError
from alignblind_mi.progress import Advance, Progress, interruptible
from alignblind_mi.results import PIECES, Result, StudyFolder, check_parts, load_result, stamp
from alignblind_mi.stimuli.concept import Concept, load_concept
from alignblind_mi.stimuli.prompts import implicit_prompts
from alignblind_mi.stimuli.protocol import PROTOCOLS
from alignblind_mi.studies.config import StudyConfig, as_begun, organism_record
from alignblind_mi.studies.jobs import Execute, Job, serially, share_of, shares_of
from alignblind_mi.studies.part import Compute, Part, Parts
from alignblind_mi.studies.parts import lora_groups, study_parts
from alignblind_mi.studies.pieces import cost_of, divided, piece_name, pieces_of, put_together
from alignblind_mi.studies.thinning import kept_model, thinned_to_fit

log = logging.getLogger(__name__)


class Models:
    """Holds one model at a time: a study of two 70B models must not need both in memory."""

    def __init__(self, config: StudyConfig, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.key: tuple[str, tuple[Path, ...]] | None = None
        self.model: HookedModel | None = None

    def get(self, role: str, adapters: Sequence[Path] = ()) -> HookedModel:
        """The untreated model of a role (`base`; any other is the aligned one) with these adapters on it, in the chat of the study."""
        if self.model is None or self.key != (role, tuple(adapters)):
            if self.model is not None:
                self.model = None
                gc.collect()    # before the next is loaded: a model is freed with the cycles that hold it
            spec = self.config.base if role == "base" else self.config.aligned
            loaded = kept_model(None if adapters else spec)
            loaded = load_model(spec, adapters=adapters) if loaded is None else loaded
            self.model = loaded if self.config.chat is None else loaded.in_chat(self.config.chat)
            self.key = (role, tuple(adapters))
            self.say(f"note: {spec.name} runs on the {self.model.engine.name} engine, in batches of at most {self.model.engine.budget}.")
        return self.model


def adapter_folders(config: StudyConfig, folder: Path) -> list[Path]:
    """Where the study's adapters are."""
    return [folder / "adapters" / f"lora_{group}" for group in lora_groups(config)]


@takes(ModelError)
def run_study(config: StudyConfig, out: File, *, skip: Names = (), execute: Execute = serially) -> Path:
    """Run or resume a study in `out`. Returns `out`. `skip`: what is left out by name ("qualification", see `study_parts`); `execute` runs
    the jobs (see `studies/jobs.py`).

    Errors: ModelError, ConceptError or ResultError before anything is computed where the input allows to see it; finished parts stay.
    """
    config = as_begun(config, Path(out))
    config = thinned_to_fit(config, Path(out), lambda tried: study_parts(tried, load_concept(tried.concept), skip=skip))
    return run_parts(config, out, list(study_parts(config, load_concept(config.concept), skip=skip)), execute=execute)


@takes(ModelError)
def run_parts(config: StudyConfig, out: File, parts: Parts, *, execute: Execute = serially) -> Path:
    """Run or resume some parts of a study, or parts of one's own, in the folder `out`. Returns `out`. Errors: as `run_study`."""
    from alignblind_mi.organism.build import one_thread

    if config.minutes is not None and config.amounts is None:
        raise ModelError(f"what fits into {config.minutes:g} minutes is not chosen yet: choose it by `within(config, "
                         f"{config.minutes:g}, parts)`, and make the parts of what it returns.")
    # An organism's matrices gain nothing from more threads, and one gives the same bits on every machine.
    config = as_begun(config, Path(out))
    with one_thread() if organism_record(config.aligned) else nullcontext():
        return _run(config, Path(out), many(parts), execute)


def _run(config: StudyConfig, out: Path, parts: Sequence[Part], execute: Execute) -> Path:
    check_parts(part.name for part in parts)
    parts = _without_training(config, out, parts)
    concept = load_concept(config.concept)
    injected = {part.role for part in parts if part.injects_at is not None}
    check_fits(config, injected, lora=any(part.adapters for part in parts))
    split = check_vocabulary(config, concept, openly=any(part.name.startswith("reading_selfie") for part in parts))
    identity, begun = config.identity(), StudyFolder(out)
    finished = begun.holds(identity, [part.name for part in parts])    # then nothing is written, and nobody is kept out
    with interruptible(out), nullcontext(begun) if finished else StudyFolder.claim(out, identity, share_of(execute)) as folder:
        folder.refuse_taken(part.name for part in parts)
        trainings = _trainings(config, concept, out) if any(part.adapters for part in parts) else []
        costs = {part.name: cost_of(part) for part in parts} if shares_of(execute) > 1 else {}    # else nothing depends on it
        pieces = {} if finished else divided(folder, parts, shares_of(execute), costs)
        here = {part.name for part in parts}
        asked = [part for part in parts if not part.same_as or not (part.same_as in here or folder.has(part.same_as))]
        progress = Progress(sum(pieces.get(part.name, 1) for part in asked) + len(trainings))
        models = Models(config, progress.note)
        for model, words in split.items():
            said = ", ".join(f"{word!r} is {n}" for word, n in words.items())
            progress.note(f"note: identifiers of several tokens in {model} ({said} tokens): edits and readings use the last one.")
        execute(_jobs(config, models, asked, trainings, split, pieces, costs), folder, progress)
        put_together(folder, pieces)
        for part in parts:
            if part not in asked and folder.has(part.same_as):
                folder.part(part.name, partial(_copied, part, folder))
    return out


def _without_training(config: StudyConfig, out: Path, parts: Sequence[Part]) -> Sequence[Part]:
    """The parts that can be run: with tensor parallelism nothing is trained, so that those behind adapters wait until these are there."""
    kept = [part for part in parts if not part.adapters]
    if not config.aligned.tensor_parallel or len(kept) == len(parts):
        return parts
    if ranks.agreed(all((folder / "training.json").is_file() for folder in adapter_folders(config, out))):
        return parts
    say(f"note: {len(parts) - len(kept)} parts with adapters are left out, as nothing is trained with tensor parallelism: the same command "
        "in one process adds them.", err=True)
    return kept


def _jobs(config: StudyConfig, models: Models, parts: Sequence[Part], trainings: Sequence[Job], split: dict[str, dict[str, int]],
          pieces: Mapping[str, int], costs: Mapping[str, float]) -> list[Job]:
    """A job per part, or per piece of one, in their order; the trainings stand before the first part that needs them. `costs`: what parts
    ask, where that matters."""
    trained = tuple(job.name for job in trainings)
    before, after = list[Job](), list[Job]()
    for part in parts:
        n = pieces.get(part.name, 1)
        cost = costs.get(part.name, 1.0) / n
        made = [_job(config, models, part, trained if part.adapters else (), split, i, n, cost) for i in range(n)]
        (after if after or part.adapters else before).extend(made)
    return [*before, *trainings, *after]


def _job(config: StudyConfig, models: Models, part: Part, after: tuple[str, ...], split: dict[str, dict[str, int]], i: int, n: int,
         cost: float) -> Job:
    """A part, or the i-th of its n pieces."""
    name = part.name if n == 1 else piece_name(part.name, i, n)
    compute = part.compute if part.piece is None or n == 1 else partial(part.piece, i, n)

    def run(folder: StudyFolder, advance: Advance) -> None:
        model = models.get(part.role, adapter_folders(config, folder.path) if part.adapters else ())
        (folder if n == 1 else pieces_of(folder)).part(name, partial(_result, config, model, part, compute, advance, split))

    def done(folder: StudyFolder) -> bool:
        return folder.has(part.name) or (n > 1 and pieces_of(folder).has(name))

    return Job(part.name.replace("_", " ") + (f" {i + 1}/{n}" if n > 1 else ""), run, done,
               f"{'base' if part.role == 'base' else 'aligned'}{' with adapters' if part.adapters else ''}", after,
               (name if n == 1 else f"{PIECES}/{name}",), cost)


def _copied(part: Part, folder: StudyFolder) -> Result:
    found = load_result(folder.path / f"{part.same_as}.parquet")
    return Result(found.rows.assign(role=part.role), {**found.provenance, "part": part.name, "copied_from": part.same_as})


def _result(config: StudyConfig, model: HookedModel, part: Part, compute: Compute, advance: Advance, split: dict[str, dict[str, int]]
            ) -> Result:
    rows = compute(model, advance).assign(role=part.role)
    return Result(rows, {**model.provenance(), "part": part.name, "split_identifiers": split.get(model.spec.name, {}),
                         "config": asdict(config), **stamp()})


def check_fits(config: StudyConfig, injected: Collection[str], *, lora: bool) -> None:
    """Before any weights are loaded: do the models have the layer that vectors are put into, and the projections that are trained, and the
    concept the open prompt?

    `injected` are the roles whose models vectors are put into. Errors: ModelError for a layer, LoraError for a projection, ConceptError for
    a prompt.
    """
    concept = load_concept(config.concept)
    if concept.has_senses(config.cue) and concept.selfie:
        concept.selfie_prompt(config.selfie)
    for spec in (config.base if role == "base" else config.aligned for role in sorted({*injected})):
        depth = depth_of(spec)
        if config.target_layer >= depth:
            raise ModelError(f"target_layer {config.target_layer} does not exist: {spec.name} has the layers 0 to {depth - 1}.")
    if lora:
        check_modules(config.aligned, config.lora.modules)
        choose_layers(config.lora.activation_layers or [0], depth_of(config.aligned))


def check_vocabulary(config: StudyConfig, concept: Concept, *, openly: bool = False) -> dict[str, dict[str, int]]:
    """Before any weights are loaded: does each tokenizer know every word that will be asked, `openly` (by SelfIE) as well?

    Returns, per model, the identifiers that are several tokens and how many (edits and readings use the last one). Errors: ModelError
    naming a word that a tokenizer does not know, or a sense of several tokens.
    """
    lead = PROTOCOLS[config.protocol].lead.strip() if openly else ""
    cue, split = concept.cue(config.cue), dict[str, dict[str, int]]()
    senses = [sense.word for sense in concept.both_senses(cue)] if concept.has_senses(cue) else []
    words = {prompt.labels[name] for prompt in implicit_prompts(concept, cue, design="published")
             for name in ("marked", "unmarked", "positive", "negative")}
    for spec in (config.base, config.aligned):
        tokenizer = load_tokenizer(spec)
        if lead and not token_count(tokenizer, lead):
            raise ModelError(f"the tokenizer of {spec.name} does not know {lead!r}, with which the prompts of SelfIE begin under the "
                             f"protocol {config.protocol!r}: choose the protocol 'best' (--protocol best), or another model.")
        for word in (*senses, *(f" {word}" for word in sorted(words))):
            n = token_count(tokenizer, word)
            if n == 0:
                raise ModelError(f"the tokenizer of {spec.name} does not know {word.strip()!r}: this model cannot be asked with the cue "
                                 f"{cue.name!r} of {concept.name!r}; choose another cue or model.")
            if word in senses and n > 1:
                raise ModelError(f"the sense {word.strip()!r} is {n} tokens in the tokenizer of {spec.name}: its probability as the "
                                 "next token cannot be read; give the sense another word in the concept file.")
            if word.strip() in {*cue.marked, *cue.unmarked} and n > 1:
                split.setdefault(spec.name, {})[word.strip()] = n
    return split


def _trainings(config: StudyConfig, concept: Concept, out: Path) -> list[Job]:
    """A job per adapter."""
    n_layers = depth_of(config.aligned)
    examples = awareness_examples(concept)

    def job(group: str, adapter: Path) -> Job:
        def run(folder: StudyFolder, advance: Advance) -> None:
            train_lora(config.aligned, examples, layer_group(group, n_layers), adapter, settings=config.lora,
                       protocol=config.protocol)

        return Job(f"train lora {group}", run, lambda folder: (folder.path / "adapters" / adapter.name / "training.json").is_file(),
                   makes=(f"adapters/{adapter.name}",))

    return [job(group, adapter) for group, adapter in zip(lora_groups(config), adapter_folders(config, out), strict=True)]


@takes(ResultError)
def load_study(folder: File) -> dict[str, Result]:
    """All finished parts of a study folder, by name; none where the study has just begun.

    Errors: ResultError for anything that is no folder, for one with neither parts nor a study's note, and for a damaged part.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise ResultError(f"{named('', folder)} is no folder: give the folder of a study.")
    files = sorted(folder.glob("*.parquet"))
    if not files and not is_file(folder / "study.json"):
        raise ResultError(f"{named('', folder)} holds no study (neither finished parts nor a study.json): give the folder of a study.")
    return {file.stem: load_result(file) for file in files}
