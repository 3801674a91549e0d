"""The public names of alignblind_mi and where each is defined; `__init__.py` reads this list."""

from .errors import AlignblindError as AlignblindError
from .exchange.harness import export_steered as export_steered, write_harness as write_harness
from .exchange.inspect_logs import read_inspect_bbq as read_inspect_bbq, read_inspect_logs as read_inspect_logs
from .instruments.attribution import (
    attribution_patching as attribution_patching,
    screen_agreement as screen_agreement,
    top_neuron_sites as top_neuron_sites,
    unit_attribution as unit_attribution,
)
from .instruments.contrast import Pair as Pair, contrast_pairs as contrast_pairs
from .instruments.lens import lens_contrast as lens_contrast, logit_lens as logit_lens, train_translators as train_translators
from .instruments.patching import (
    grid_sites as grid_sites,
    head_sites as head_sites,
    patch_grid as patch_grid,
    summarise_patching as summarise_patching,
)
from .instruments.patchscope import (
    description_prompt as description_prompt,
    fit_affine as fit_affine,
    norm_matched as norm_matched,
    patchscope_rows as patchscope_rows,
    run_patchscope as run_patchscope,
    token_identity_prompt as token_identity_prompt,
)
from .instruments.path_patching import path_patch as path_patch
from .instruments.probes import train_probes as train_probes
from .measures.anchored import scale_table as scale_table
from .measures.awareness import (
    blind_score as blind_score,
    measure_awareness as measure_awareness,
    measure_lens as measure_lens,
    measure_probes as measure_probes,
    measure_selfie as measure_selfie,
    reading_reduction as reading_reduction,
    readings_of as readings_of,
    selfie_table as selfie_table,
    summarise_readings as summarise_readings,
)
from .measures.bbq import measure_bbq as measure_bbq, read_bbq as read_bbq, summarise_bbq as summarise_bbq
from .measures.behaviour import Decoding as Decoding, ask_under as ask_under, measure_behaviour as measure_behaviour
from .measures.competence import competence_table as competence_table, measure_competence as measure_competence
from .measures.mitigation import compare_treatments as compare_treatments, early_window as early_window, late_window as late_window
from .measures.patching import depth_profile as depth_profile, effect_span as effect_span, measure_patching as measure_patching
from .measures.qualification import instrument_table as instrument_table, measure_instruments as measure_instruments
from .measures.side_effects import measure_side_effects as measure_side_effects
from .mitigations.finetuning import trained_treatment as trained_treatment
from .mitigations.lora import (
    PAPER as PAPER,
    LoraSettings as LoraSettings,
    awareness_examples as awareness_examples,
    blindness_examples as blindness_examples,
    layer_group as layer_group,
    lora_sweep as lora_sweep,
    placebo_examples as placebo_examples,
    train_lora as train_lora,
)
from .mitigations.lora_settings import choose_layers as choose_layers
from .mitigations.placebos import (
    noise_like as noise_like,
    noise_placebos as noise_placebos,
    treatment_effects as treatment_effects,
    with_effects as with_effects,
)
from .mitigations.steering import (
    SteeringVectors as SteeringVectors,
    layer_windows as layer_windows,
    load_vectors as load_vectors,
    sense_steering as sense_steering,
    steering_grid as steering_grid,
    steering_vectors as steering_vectors,
)
from .mitigations.unlearning import UnlearningSettings as UnlearningSettings, train_unlearning as train_unlearning
from .models.adapters import merge_adapter as merge_adapter, unmerge_adapter as unmerge_adapter
from .models.chat import Chat as Chat
from .models.edits import UNTREATED as UNTREATED, Edit as Edit, Row as Row, Site as Site, Treatment as Treatment, combine as combine
from .models.embedded import organism_info as organism_info, organism_path as organism_path
from .models.model import HookedModel as HookedModel, load_model as load_model
from .models.spec import ModelSpec as ModelSpec
from .pages.served_page import write_served as write_served
from .results import Result as Result, load_result as load_result, save_result as save_result
from .statistics.frontier import equal_damage as equal_damage, pareto as pareto
from .statistics.log_odds import (
    by_probability as by_probability,
    judged as judged,
    leading as leading,
    outcomes_table as outcomes_table,
)
from .statistics.mixed import mixed_logistic as mixed_logistic
from .statistics.paired import (
    corrected as corrected,
    difference_draws as difference_draws,
    item_slopes as item_slopes,
    paired_differences as paired_differences,
    paired_means as paired_means,
    summarise_slopes as summarise_slopes,
)
from .statistics.placebos import placebo_bands as placebo_bands
from .statistics.power import (
    Plan as Plan,
    items_needed as items_needed,
    plan_from_pilot as plan_from_pilot,
    power_of as power_of,
    smallest_difference as smallest_difference,
)
from .statistics.rates import position_effect as position_effect, summarise as summarise
from .stimuli.agreement import judge_explicit as judge_explicit
from .stimuli.answers import judge as judge, judge_implicit as judge_implicit
from .stimuli.concept import Concept as Concept, load_concept as load_concept
from .stimuli.concept_check import concept_problems as concept_problems
from .stimuli.outcome import Outcome as Outcome
from .stimuli.prompts import (
    Prompt as Prompt,
    behaviour_prompts as behaviour_prompts,
    explicit_prompts as explicit_prompts,
    implicit_prompts as implicit_prompts,
    interpretation_prompt as interpretation_prompt,
    mark as mark,
    steering_prompt as steering_prompt,
)
from .stimuli.readings import classify as classify, read_interpretations as read_interpretations
from .stimuli.shots import with_shots as with_shots
from .studies.comparison import run_comparison as run_comparison
from .studies.comparison_verdicts import comparison_tables as comparison_tables, read_comparison as read_comparison
from .studies.config import StudyConfig as StudyConfig, recommended_lora as recommended_lora
from .studies.doctor import check_up as check_up
from .studies.on_ray import run_on_ray as run_on_ray
from .studies.on_slurm import submit_shares as submit_shares
from .studies.part import Part as Part
from .studies.parts import study_parts as study_parts
from .studies.qualified import Qualification as Qualification
from .studies.qualify import qualify as qualify
from .studies.running import load_study as load_study, run_parts as run_parts, run_study as run_study
from .studies.shares import Share as Share, merge as merge, missing_jobs as missing_jobs
from .studies.single import (
    awareness_parts as awareness_parts,
    awareness_tables as awareness_tables,
    bias_parts as bias_parts,
    bias_tables as bias_tables,
    measure_parts as measure_parts,
    patch_parts as patch_parts,
    patch_tables as patch_tables,
)
from .studies.study_file import read_study_file as read_study_file
from .studies.thinning import within as within

__version__: str
