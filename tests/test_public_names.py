import subprocess
import sys

import pytest

import sd_lens


def test_public_names_are_sorted_documented_and_there():
    assert sd_lens.__all__ == sorted(sd_lens.__all__)
    for name in sd_lens.__all__:
        assert getattr(sd_lens, name).__doc__, name


@pytest.mark.parametrize("module", ["sd_lens.cli", "sd_lens"])
def test_transformer_lens_is_loaded_only_when_a_model_is(module):
    code = f"import sys, {module}; print([m for m in ('transformer_lens', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
