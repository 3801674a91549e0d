"""Figures of results, drawn from summary tables: each function takes a table and gives a matplotlib Figure.

Computes nothing but layout, so every drawn number is a number of the table. Does NOT know models, rows or files, nor how tables are made.
"""

from alignblind_mi.pages.figures.awareness import awareness_figure, qualification_figure, readings_figure, selfie_figure
from alignblind_mi.pages.figures.behaviour import behaviour_figure, position_figure
from alignblind_mi.pages.figures.calibration import convergence_figure, planted_depth_figure, recovery_figure, trust_figure
from alignblind_mi.pages.figures.mitigation import comparison_figure, dose_figure, frontier_figure, lora_figure, steering_figure
from alignblind_mi.pages.figures.patching import depth_figure, patch_heatmap
from alignblind_mi.pages.figures.style import CONTROL_NAMES, mute, number, percent, to_png, to_svg

__all__ = ["CONTROL_NAMES", "awareness_figure", "behaviour_figure", "comparison_figure", "convergence_figure", "depth_figure",
           "dose_figure", "frontier_figure", "lora_figure", "mute", "number", "patch_heatmap", "percent", "planted_depth_figure",
           "position_figure", "qualification_figure", "readings_figure", "recovery_figure", "selfie_figure", "steering_figure", "to_png",
           "to_svg", "trust_figure"]
