"""What can go wrong, in sentences.

Every exception that sd_lens raises on purpose derives from `SdLensError`; its message says what was
given, what was expected and what to do. The command line prints the message alone.
"""


class SdLensError(Exception):
    """Base of all exceptions of this package."""


class ModelLoadError(SdLensError):
    """A model could not be loaded from the source that was given."""


class CacheError(ModelLoadError):
    """The packaged model's cache is damaged or could not be filled."""


class NotSupportedError(SdLensError):
    """The model is fine, but its architecture is not covered yet."""


class HookError(SdLensError):
    """A hook point does not exist in the model, or did not fire."""


class InputError(SdLensError, ValueError):
    """An argument, a text or a file that the caller gave cannot be used."""


class NumericalError(SdLensError, ArithmeticError):
    """A NaN, an overflow, or an iteration that did not converge."""


class SmallGapWarning(UserWarning):
    """A leading singular value is barely above the second: its direction is not determined."""
