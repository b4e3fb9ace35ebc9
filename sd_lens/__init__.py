"""Where do a language model's high-norm tokens come from?

`load_model` brings a model, `find_high_norm_tokens` observes it, `singular_defects` predicts the direction
of its exploding tokens from the weights alone, `figures` draws, and `write_report` does all of it.
"""

from importlib.metadata import version

from sd_lens import errors, figures
from sd_lens.explanations.defects import SingularDefects, SingularTriples, singular_defects
from sd_lens.models.loading import load_model
from sd_lens.observations.high_norm import HighNormTokens, TokenGroup, find_high_norm_tokens
from sd_lens.observations.norms import NormScan, TextNorms, scan_norms
from sd_lens.observations.texts import default_texts, read_texts
from sd_lens.report.writing import write_report

__version__ = version("sd_lens")

__all__ = [
    "HighNormTokens",
    "NormScan",
    "SingularDefects",
    "SingularTriples",
    "TextNorms",
    "TokenGroup",
    "default_texts",
    "errors",
    "figures",
    "find_high_norm_tokens",
    "load_model",
    "read_texts",
    "scan_norms",
    "singular_defects",
    "write_report",
]
