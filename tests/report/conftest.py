import pytest

from sd_lens import find_high_norm_tokens
from tests import planted, tiny


@pytest.fixture(scope="session")
def model():
    """The planted Llama, with a tokenizer."""
    return tiny.wrap(planted.llama().hf_model, "bridge", with_tokenizer=True)


@pytest.fixture(scope="session")
def found(model):
    return find_high_norm_tokens(model, planted.llama().texts, progress=False)
