"""The suite checks the package's shape annotations while it runs, and shares small models."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("sd_lens", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import planted, tiny  # noqa: E402


@pytest.fixture(autouse=True)
def _threads(request):
    """Tiny models are faster on one thread, much so when the machine is busy; the real one wants them all."""
    every = torch.get_num_threads()
    torch.set_num_threads(every if request.node.get_closest_marker("real_model") else 1)
    yield
    torch.set_num_threads(every)


@pytest.fixture(scope="session", params=tiny.BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=tiny.FAMILIES)
def tiny_hf(request):
    """A random transformers model of each supported architecture."""
    return tiny.family(request.param)


@pytest.fixture
def tiny_model(tiny_hf, backend):
    return tiny.wrap(tiny_hf, backend)


@pytest.fixture
def tiny_llama():
    return tiny.wrap(tiny.llama(), "auto", with_tokenizer=True)


@pytest.fixture(params=["llama", "gpt2"])
def planted_defect(request):
    return {"llama": planted.llama, "gpt2": planted.gpt2}[request.param]()


@pytest.fixture(scope="session")
def smollm2():
    """The packaged model, in the wrapper that `backend="auto"` chooses."""
    from sd_lens import load_model

    return load_model("smollm2-135m")
