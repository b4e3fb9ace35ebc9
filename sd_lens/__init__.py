"""Where do a language model's high-norm tokens come from?

`load_model` brings a model, `find_high_norm_tokens` observes it, `singular_defects` predicts the direction
of its exploding tokens from the weights alone, `attribute` says who wrote their norm, `ablate` and `patch`
prove it, `signature` and `lineage` say which models share a base, `figures` draws, and `write_report` does all of it.
"""

from importlib.metadata import version

from sd_lens import errors, figures
from sd_lens.applications.lineage import Lineage, lineage
from sd_lens.applications.quantization import quantize
from sd_lens.applications.quantization_report import QuantizationReport, quantization_report
from sd_lens.applications.rounding_forecast import RoundingForecast, forecast_rounding
from sd_lens.applications.schemes import QuantizationScheme
from sd_lens.applications.signatures import Signature, signature
from sd_lens.applications.smoothing import SmoothingFactors, smoothing_factors
from sd_lens.applications.spare_list import SpareList, spare_list
from sd_lens.applications.sparing_search import SparingSearch, search_spared_layers
from sd_lens.applications.trajectory import SignatureTrajectory, signature_trajectory
from sd_lens.explanations.ablation import Ablation, ablate
from sd_lens.explanations.attribution import Attribution, Faithfulness, attribute
from sd_lens.explanations.components import Component
from sd_lens.explanations.contexts import ExplosionInContext, explosion_in_context
from sd_lens.explanations.corpus import CorpusAttribution, attribute_corpus
from sd_lens.explanations.decay import DefectEigenvalues, defect_eigenvalues
from sd_lens.explanations.defects import SingularDefects, SingularTriples, singular_defects
from sd_lens.explanations.drilling import (
    NeuronAttribution,
    SourceAttribution,
    attribute_neurons,
    attribute_sources,
)
from sd_lens.explanations.experts import ExpertDefects, expert_defects
from sd_lens.explanations.explosion import ExplosionPath, explosion_path
from sd_lens.explanations.faithfulness import verify
from sd_lens.explanations.forecast import Forecast, forecast
from sd_lens.explanations.interventions import ablated
from sd_lens.explanations.patching import Patching, patch
from sd_lens.explanations.prediction import PredictedNorms, predict_norms
from sd_lens.explanations.sinks import SinksWithout, sinks_without
from sd_lens.explanations.spectra import SingularSpectra, singular_spectra
from sd_lens.explanations.subspace import ExplosionSubspace, explosion_subspace
from sd_lens.explanations.super_weights import SuperWeights, super_weights
from sd_lens.explanations.sweep import AblationSweep, sweep_ablations
from sd_lens.linear.captured import Captured
from sd_lens.linear.jacobians import Jacobian
from sd_lens.linear.mixtures import RouterWeighted
from sd_lens.models.loading import load_model
from sd_lens.observations.behaviour import Behaviour, observe_behaviour
from sd_lens.observations.high_norm import HighNormTokens, TokenGroup, find_high_norm_tokens
from sd_lens.observations.linear_fits import capture_linear_maps
from sd_lens.observations.massive import MassiveActivations, massive_activations
from sd_lens.observations.norms import NormScan, TextNorms, scan_norms
from sd_lens.observations.outliers import ActivationOutliers, activation_outliers
from sd_lens.observations.perplexity import Perplexity, perplexity
from sd_lens.observations.routing import capture_router_weights
from sd_lens.observations.sinks import AttentionSinks, attention_sinks
from sd_lens.observations.texts import default_texts, read_texts
from sd_lens.report.writing import write_report

__version__ = version("sd_lens")

__all__ = [
    "Ablation",
    "AblationSweep",
    "ActivationOutliers",
    "AttentionSinks",
    "Attribution",
    "Behaviour",
    "Captured",
    "Component",
    "CorpusAttribution",
    "DefectEigenvalues",
    "ExpertDefects",
    "ExplosionInContext",
    "ExplosionPath",
    "ExplosionSubspace",
    "Faithfulness",
    "Forecast",
    "HighNormTokens",
    "Jacobian",
    "Lineage",
    "MassiveActivations",
    "NeuronAttribution",
    "NormScan",
    "Patching",
    "Perplexity",
    "PredictedNorms",
    "QuantizationReport",
    "QuantizationScheme",
    "RoundingForecast",
    "RouterWeighted",
    "Signature",
    "SignatureTrajectory",
    "SingularDefects",
    "SingularSpectra",
    "SingularTriples",
    "SinksWithout",
    "SmoothingFactors",
    "SourceAttribution",
    "SpareList",
    "SparingSearch",
    "SuperWeights",
    "TextNorms",
    "TokenGroup",
    "ablate",
    "ablated",
    "activation_outliers",
    "attention_sinks",
    "attribute",
    "attribute_corpus",
    "attribute_neurons",
    "attribute_sources",
    "capture_linear_maps",
    "capture_router_weights",
    "default_texts",
    "defect_eigenvalues",
    "errors",
    "expert_defects",
    "explosion_in_context",
    "explosion_path",
    "explosion_subspace",
    "figures",
    "find_high_norm_tokens",
    "forecast",
    "forecast_rounding",
    "lineage",
    "load_model",
    "massive_activations",
    "observe_behaviour",
    "patch",
    "perplexity",
    "predict_norms",
    "quantization_report",
    "quantize",
    "read_texts",
    "scan_norms",
    "search_spared_layers",
    "signature",
    "signature_trajectory",
    "singular_defects",
    "singular_spectra",
    "sinks_without",
    "smoothing_factors",
    "spare_list",
    "super_weights",
    "sweep_ablations",
    "verify",
    "write_report",
]
