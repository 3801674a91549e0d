"""Runs small studies in forked processes and kills them (SIGKILL) at random moments; each is begun again where it was, until all is done.

Usage: python kill_driver.py MODEL CONCEPT OUT KILLS SEED. Writes OUT/undisturbed/KIND and OUT/killed/KIND-N (N: how often that kind was
finished before), and prints JSON: kills and finished runs by kind. Forking spares every run the imports, which take longer than all the
rest.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from forked import import_everything

from alignblind_mi import (
    AlignblindError,
    Decoding,
    LoraSettings,
    StudyConfig,
    awareness_examples,
    load_concept,
    run_parts,
    run_study,
    study_parts,
    train_lora,
)
from alignblind_mi.studies import comparison, rival_loads
from alignblind_mi.studies.parts import Part
from alignblind_mi.studies.rivals import Plan, plan_rivals
from alignblind_mi.studies.single import SteeringPlan, awareness_parts, bias_parts, measure_parts, steer_parts

torch.set_num_threads(1)
import_everything()    # before any fork


def config_of(model: str, concept: str) -> StudyConfig:
    config = StudyConfig.create(model, model, concept=concept, quick=True, protocol="best")
    return replace(config, balanced_pairs=1, published_pairs=1, target_layer=1, decoding=Decoding(max_new_tokens=3, temperature=1.0),
                   lora=LoraSettings(epochs=2, batch_size=8, accumulation=1))


def patched(config: StudyConfig) -> list[Part]:
    """A few patches a part: what a kill may leave is the same as for many."""
    from alignblind_mi import measure_patching

    def part(layer: int) -> Part:
        return Part(f"patching_{layer}", "model", False, lambda model, advance: measure_patching(
            model, load_concept(config.concept), config.cue, parts=["residual"], layers=[layer], marks=["last_token"], controls=["random"],
            categories=["guilt"], max_word_pairs=1, seed=config.seed, progress=advance))

    return [part(layer) for layer in range(2)]


def run(kind: str, config: StudyConfig, out: Path) -> None:
    if kind == "bias":
        measure_parts(config, out, [*bias_parts(config), *bias_parts(config, "published")])
    elif kind == "awareness":
        measure_parts(config, out, awareness_parts(config, ["patchscope", "selfie", "lens"]))
    elif kind == "patch":
        run_parts(config, out, patched(config))
    elif kind == "lora":
        run_parts(config, out, [part for part in study_parts(config, load_concept(config.concept)) if part.name.startswith("lora_early")])
    elif kind == "steer":
        measure_parts(config, out, steer_parts(config, SteeringPlan.create(config, method="mean_difference", strengths="0.5,1"), out))
    elif kind == "compare":
        compare(config, out)
    elif kind == "adapter":
        train(config, out)
    else:
        run_study(config, out)


def compare(config: StudyConfig, out: Path) -> None:
    """A comparison of two rivals, one of them trained, by their answers: a tiny model does not know the texts of side effects."""
    def few(*args: Any, **options: Any) -> Plan:
        plan = plan_rivals(*args, **options)
        names = ("steer_early", "lora_early")
        return Plan([rival for rival in plan.rivals if rival.name in names], [one for one in plan.trainings if one.name in names], {})

    rival_loads.plan_rivals, comparison.MEASURED = few, ("answers",)
    comparison.run_comparison(config, out)


def train(config: StudyConfig, out: Path) -> None:
    """An adapter in the folder `out/mine/early`, which stands beside files of the user, and one that is to stand where such files are."""
    mine = out / "mine"
    if not mine.exists():    # a killed run has not got as far as any training
        scratch = out.with_name(f"{out.name}.making-{os.getpid()}")
        for name in FOREIGN:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(f"the user's own {name}")
        out.mkdir(exist_ok=True)
        scratch.rename(mine)
    examples = awareness_examples(load_concept(config.concept))
    train_lora(config.aligned, examples, "early", mine / "early", settings=config.lora)
    for taken in ("taken", "half"):    # a folder of the user's; a folder beside it that bears the name of an unfinished training
        try:
            train_lora(config.aligned, examples, "late", mine / taken, settings=config.lora)
        except AlignblindError:
            continue
        sys.exit(f"{taken} was trained over")


FOREIGN = ("taken/thesis.txt", "taken/deep/data.csv", ".half.part/notes.txt", "early.txt", ".early.part.txt")
KINDS = ("bias", "awareness", "patch", "steer", "lora", "adapter", "compare", "study")


def begin(kind: str, config: StudyConfig, out: Path) -> int:
    """Start a run in a process of its own; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run(kind, config, out)
        code = 0
    except BaseException:    # noqa: BLE001 - whatever it is, the parent is to see it
        (out.parent / f"{out.name}.failed").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def finish(kind: str, config: StudyConfig, out: Path) -> float:
    start = time.monotonic()
    _, status = os.waitpid(begin(kind, config, out), 0)
    if status:
        sys.exit(f"{kind}: {(out.parent / f'{out.name}.failed').read_text()}")
    return time.monotonic() - start


def main() -> None:
    model, concept, out, kills, moments = *sys.argv[1:3], Path(sys.argv[3]), int(sys.argv[4]), random.Random(int(sys.argv[5]))
    config = config_of(model, concept)
    (out / "undisturbed").mkdir(parents=True)
    (out / "killed").mkdir()
    seconds = {kind: finish(kind, config, out / "undisturbed" / kind) for kind in KINDS}
    killed, finished = Counter(), Counter()
    while killed.total() < kills:
        kind = KINDS[killed.total() % len(KINDS)]
        folder = out / "killed" / f"{kind}-{finished[kind]}"
        pid = begin(kind, config, folder)
        time.sleep(moments.uniform(0.0, min(0.8 * seconds[kind], 0.8)))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed[kind] += 1
        elif status == 0:
            finished[kind] += 1
        else:
            sys.exit(f"{kind}: {(folder.parent / f'{folder.name}.failed').read_text()}")
    for kind in KINDS:
        finish(kind, config, out / "killed" / f"{kind}-{finished[kind]}")
        finished[kind] += 1
    print(json.dumps({"killed": killed, "finished": finished, "seconds": seconds}))


if __name__ == "__main__":
    main()
