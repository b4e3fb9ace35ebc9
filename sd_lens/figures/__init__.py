"""Figures: functions from a result to a plotly `Figure`. They compute nothing and never run a model."""

from sd_lens.figures.attribution import contribution_heatmap, contribution_waterfall, neuron_bars, source_map
from sd_lens.figures.decay import eigenvalues
from sd_lens.figures.defects import direction_angles, singular_values
from sd_lens.figures.interventions import ablation_heatmap, faithfulness_scatter, patching_heatmap
from sd_lens.figures.norms import layer_norms, norm_heatmap, norm_surface

__all__ = [
    "ablation_heatmap",
    "contribution_heatmap",
    "contribution_waterfall",
    "direction_angles",
    "eigenvalues",
    "faithfulness_scatter",
    "layer_norms",
    "neuron_bars",
    "norm_heatmap",
    "norm_surface",
    "patching_heatmap",
    "singular_values",
    "source_map",
]
