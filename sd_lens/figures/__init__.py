"""Figures: functions from a result to a plotly `Figure`. They compute nothing and never run a model."""

from sd_lens.figures.attribution import contribution_heatmap, contribution_waterfall, neuron_bars, source_map
from sd_lens.figures.decay import eigenvalues
from sd_lens.figures.defects import direction_angles, singular_spectra, singular_values
from sd_lens.figures.forecast import forecast_norms, predicted_norms
from sd_lens.figures.interventions import ablation_heatmap, faithfulness_scatter, patching_heatmap
from sd_lens.figures.norms import layer_norms, norm_heatmap, norm_surface
from sd_lens.figures.signatures import lineage_dendrogram, lineage_heatmap, signature_trajectory

__all__ = [
    "ablation_heatmap",
    "contribution_heatmap",
    "contribution_waterfall",
    "direction_angles",
    "eigenvalues",
    "faithfulness_scatter",
    "forecast_norms",
    "layer_norms",
    "lineage_dendrogram",
    "lineage_heatmap",
    "neuron_bars",
    "norm_heatmap",
    "norm_surface",
    "patching_heatmap",
    "predicted_norms",
    "signature_trajectory",
    "singular_spectra",
    "singular_values",
    "source_map",
]
