"""Where do a language model's high-norm tokens come from?

`load_model` brings a model, `find_high_norm_tokens` observes it, `singular_defects` predicts the direction
of its exploding tokens from the weights alone, `attribute` says who wrote their norm, `ablate` and `patch`
prove it, `signature` and `lineage` say which models share a base, `figures` draws, and `write_report` does all of it.
"""

from importlib.metadata import version

from sd_lens import errors, figures
from sd_lens.applications.lineage import Lineage, lineage
from sd_lens.applications.signatures import Signature, signature
from sd_lens.applications.trajectory import SignatureTrajectory, signature_trajectory
from sd_lens.explanations.ablation import Ablation, ablate
from sd_lens.explanations.attribution import Attribution, Faithfulness, attribute
from sd_lens.explanations.components import Component
from sd_lens.explanations.corpus import CorpusAttribution, attribute_corpus
from sd_lens.explanations.decay import DefectEigenvalues, defect_eigenvalues
from sd_lens.explanations.defects import SingularDefects, SingularTriples, singular_defects
from sd_lens.explanations.drilling import (
    NeuronAttribution,
    SourceAttribution,
    attribute_neurons,
    attribute_sources,
)
from sd_lens.explanations.faithfulness import verify
from sd_lens.explanations.forecast import Forecast, forecast
from sd_lens.explanations.interventions import ablated
from sd_lens.explanations.patching import Patching, patch
from sd_lens.explanations.prediction import PredictedNorms, predict_norms
from sd_lens.explanations.spectra import SingularSpectra, singular_spectra
from sd_lens.explanations.sweep import AblationSweep, sweep_ablations
from sd_lens.linear.captured import Captured
from sd_lens.linear.jacobians import Jacobian
from sd_lens.models.loading import load_model
from sd_lens.observations.behaviour import Behaviour, observe_behaviour
from sd_lens.observations.high_norm import HighNormTokens, TokenGroup, find_high_norm_tokens
from sd_lens.observations.linear_fits import capture_linear_maps
from sd_lens.observations.norms import NormScan, TextNorms, scan_norms
from sd_lens.observations.texts import default_texts, read_texts
from sd_lens.report.writing import write_report

__version__ = version("sd_lens")

__all__ = [
    "Ablation",
    "AblationSweep",
    "Attribution",
    "Behaviour",
    "Captured",
    "Component",
    "CorpusAttribution",
    "DefectEigenvalues",
    "Faithfulness",
    "Forecast",
    "HighNormTokens",
    "Jacobian",
    "Lineage",
    "NeuronAttribution",
    "NormScan",
    "Patching",
    "PredictedNorms",
    "Signature",
    "SignatureTrajectory",
    "SingularDefects",
    "SingularSpectra",
    "SingularTriples",
    "SourceAttribution",
    "TextNorms",
    "TokenGroup",
    "ablate",
    "ablated",
    "attribute",
    "attribute_corpus",
    "attribute_neurons",
    "attribute_sources",
    "capture_linear_maps",
    "default_texts",
    "defect_eigenvalues",
    "errors",
    "figures",
    "find_high_norm_tokens",
    "forecast",
    "lineage",
    "load_model",
    "observe_behaviour",
    "patch",
    "predict_norms",
    "read_texts",
    "scan_norms",
    "signature",
    "signature_trajectory",
    "singular_defects",
    "singular_spectra",
    "sweep_ablations",
    "verify",
    "write_report",
]
