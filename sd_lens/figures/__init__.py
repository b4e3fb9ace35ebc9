"""Figures: functions from a result to a plotly `Figure`. They compute nothing and never run a model."""

from sd_lens.figures.attribution import contribution_heatmap, contribution_waterfall, neuron_bars, source_map
from sd_lens.figures.decay import eigenvalues
from sd_lens.figures.defects import direction_angles, singular_spectra, singular_values
from sd_lens.figures.explosion import (
    coefficient_distributions,
    coefficient_sources,
    context_norms,
    subspace_curve,
    subspace_dimensions,
    vocabulary_scatter,
)
from sd_lens.figures.forecast import forecast_norms, predicted_norms
from sd_lens.figures.interventions import ablation_heatmap, faithfulness_scatter, patching_heatmap
from sd_lens.figures.massive import massive_channels, write_sparsity, zeroed_norms
from sd_lens.figures.norms import layer_norms, norm_heatmap, norm_surface
from sd_lens.figures.quantization import outlier_ratios, quantization_bars, rounding_sensitivity
from sd_lens.figures.signatures import lineage_dendrogram, lineage_heatmap, signature_trajectory
from sd_lens.figures.sinks import key_value_norms, sink_map, sinks_before_and_after

__all__ = [
    "ablation_heatmap",
    "coefficient_distributions",
    "coefficient_sources",
    "context_norms",
    "contribution_heatmap",
    "contribution_waterfall",
    "direction_angles",
    "eigenvalues",
    "faithfulness_scatter",
    "forecast_norms",
    "key_value_norms",
    "layer_norms",
    "lineage_dendrogram",
    "lineage_heatmap",
    "massive_channels",
    "neuron_bars",
    "norm_heatmap",
    "norm_surface",
    "outlier_ratios",
    "patching_heatmap",
    "predicted_norms",
    "quantization_bars",
    "rounding_sensitivity",
    "signature_trajectory",
    "singular_spectra",
    "singular_values",
    "sink_map",
    "sinks_before_and_after",
    "source_map",
    "subspace_curve",
    "subspace_dimensions",
    "vocabulary_scatter",
    "write_sparsity",
    "zeroed_norms",
]
