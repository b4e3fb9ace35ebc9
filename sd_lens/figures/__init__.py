"""Figures: functions from a result to a plotly `Figure`. They compute nothing and never run a model."""

from sd_lens.figures.defects import direction_angles, singular_values
from sd_lens.figures.norms import layer_norms, norm_heatmap, norm_surface

__all__ = ["direction_angles", "layer_norms", "norm_heatmap", "norm_surface", "singular_values"]
