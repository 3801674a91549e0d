"""alignblind_mi: how aligned language models hide bias from themselves ("Aligned but Blind", ACL 2025), measured and mitigated.

The names below are imported when they are first used, so that `import alignblind_mi` stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "concept": ("Concept", "load_concept"),
    "chat": ("Chat",),
    "concept_check": ("concept_problems",),
    "prompts": ("Prompt", "behaviour_prompts", "explicit_prompts", "implicit_prompts", "interpretation_prompt", "mark", "steering_prompt"),
    "edits": ("UNTREATED", "Edit", "Row", "Site", "Treatment", "combine"),
    "answers": ("Outcome", "judge", "judge_explicit", "judge_implicit"),
    "results": ("Result", "load_result", "save_result"),
    "statistics": ("position_effect", "summarise"),
    "paired": ("corrected", "difference_draws", "item_slopes", "paired_differences", "paired_means", "summarise_slopes"),
    "mixed": ("mixed_logistic",),
    "power": ("Plan", "items_needed", "plan_from_pilot", "power_of", "smallest_difference"),
    "frontier": ("equal_damage", "pareto"),
    "errors": ("AlignblindError",),
    "loading": ("ModelSpec",),
    "model": ("HookedModel", "load_model"),
    "bbq": ("measure_bbq", "read_bbq", "summarise_bbq"),
    "organism": ("organism_info", "organism_path"),
    "patchscope": ("description_prompt", "fit_affine", "norm_matched", "patchscope_rows", "run_patchscope", "token_identity_prompt"),
    "lens": ("lens_contrast", "logit_lens", "train_translators"),
    "probes": ("train_probes",),
    "readings": ("classify", "read_interpretations"),
    "steering": ("SteeringVectors", "layer_windows", "load_vectors", "noise_like", "sense_steering", "steering_grid", "steering_vectors"),
    "contrast": ("Pair", "contrast_pairs"),
    "patching": ("grid_sites", "head_sites", "patch_grid", "summarise_patching"),
    "attribution": ("attribution_patching", "screen_agreement", "top_neuron_sites", "unit_attribution"),
    "path_patching": ("path_patch",),
    "adapters": ("merge_adapter", "unmerge_adapter"),
    "finetuning": ("choose_layers", "trained_treatment"),
    "lora": ("PAPER", "LoraSettings", "awareness_examples", "blindness_examples", "layer_group", "lora_sweep", "placebo_examples",
             "train_lora"),
    "unlearning": ("UnlearningSettings", "train_unlearning"),
    "studies.behaviour": ("Decoding", "ask_under", "measure_behaviour"),
    "studies.awareness": ("blind_score", "measure_awareness", "measure_lens", "measure_probes", "measure_selfie", "reading_reduction",
                          "readings_of", "selfie_table", "summarise_readings"),
    "studies.comparison": ("run_comparison",),
    "studies.comparison_verdicts": ("comparison_tables", "read_comparison"),
    "studies.mitigation": ("compare_treatments", "early_window", "late_window"),
    "studies.side_effects": ("measure_side_effects",),
    "studies.patching": ("depth_profile", "effect_span", "measure_patching"),
    "studies.doctor": ("check_up",),
    "studies.single": ("awareness_parts", "awareness_tables", "bias_parts", "bias_tables", "measure_parts", "patch_parts", "patch_tables"),
    "studies.study_file": ("read_study_file",),
    "studies.study": ("Part", "StudyConfig", "load_study", "recommended_lora", "run_parts", "run_study", "study_parts"),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE)

if TYPE_CHECKING:
    from alignblind_mi.adapters import merge_adapter, unmerge_adapter
    from alignblind_mi.answers import Outcome, judge, judge_explicit, judge_implicit
    from alignblind_mi.attribution import attribution_patching, screen_agreement, top_neuron_sites, unit_attribution
    from alignblind_mi.bbq import measure_bbq, read_bbq, summarise_bbq
    from alignblind_mi.chat import Chat
    from alignblind_mi.concept import Concept, load_concept
    from alignblind_mi.concept_check import concept_problems
    from alignblind_mi.contrast import Pair, contrast_pairs
    from alignblind_mi.edits import UNTREATED, Edit, Row, Site, Treatment, combine
    from alignblind_mi.errors import AlignblindError
    from alignblind_mi.finetuning import choose_layers, trained_treatment
    from alignblind_mi.frontier import equal_damage, pareto
    from alignblind_mi.lens import lens_contrast, logit_lens, train_translators
    from alignblind_mi.loading import ModelSpec
    from alignblind_mi.lora import (
        PAPER,
        LoraSettings,
        awareness_examples,
        blindness_examples,
        layer_group,
        lora_sweep,
        placebo_examples,
        train_lora,
    )
    from alignblind_mi.mixed import mixed_logistic
    from alignblind_mi.model import HookedModel, load_model
    from alignblind_mi.organism import organism_info, organism_path
    from alignblind_mi.paired import corrected, difference_draws, item_slopes, paired_differences, paired_means, summarise_slopes
    from alignblind_mi.patching import grid_sites, head_sites, patch_grid, summarise_patching
    from alignblind_mi.patchscope import (
        description_prompt,
        fit_affine,
        norm_matched,
        patchscope_rows,
        run_patchscope,
        token_identity_prompt,
    )
    from alignblind_mi.path_patching import path_patch
    from alignblind_mi.power import Plan, items_needed, plan_from_pilot, power_of, smallest_difference
    from alignblind_mi.probes import train_probes
    from alignblind_mi.prompts import (
        Prompt,
        behaviour_prompts,
        explicit_prompts,
        implicit_prompts,
        interpretation_prompt,
        mark,
        steering_prompt,
    )
    from alignblind_mi.readings import classify, read_interpretations
    from alignblind_mi.results import Result, load_result, save_result
    from alignblind_mi.statistics import position_effect, summarise
    from alignblind_mi.steering import (
        SteeringVectors,
        layer_windows,
        load_vectors,
        noise_like,
        sense_steering,
        steering_grid,
        steering_vectors,
    )
    from alignblind_mi.studies.awareness import (
        blind_score,
        measure_awareness,
        measure_lens,
        measure_probes,
        measure_selfie,
        reading_reduction,
        readings_of,
        selfie_table,
        summarise_readings,
    )
    from alignblind_mi.studies.behaviour import Decoding, ask_under, measure_behaviour
    from alignblind_mi.studies.comparison import run_comparison
    from alignblind_mi.studies.comparison_verdicts import comparison_tables, read_comparison
    from alignblind_mi.studies.doctor import check_up
    from alignblind_mi.studies.mitigation import compare_treatments, early_window, late_window
    from alignblind_mi.studies.patching import depth_profile, effect_span, measure_patching
    from alignblind_mi.studies.side_effects import measure_side_effects
    from alignblind_mi.studies.single import (
        awareness_parts,
        awareness_tables,
        bias_parts,
        bias_tables,
        measure_parts,
        patch_parts,
        patch_tables,
    )
    from alignblind_mi.studies.study import Part, StudyConfig, load_study, recommended_lora, run_parts, run_study, study_parts
    from alignblind_mi.studies.study_file import read_study_file
    from alignblind_mi.unlearning import UnlearningSettings, train_unlearning


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"alignblind_mi.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'alignblind_mi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
