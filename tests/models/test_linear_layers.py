"""Names and parameters of linear layers, in every architecture and wrapper, against transformers' modules."""

import pytest
import torch

from sd_lens.errors import InputError, NotSupportedError
from sd_lens.models.blocks import MIXTURES, SUPPORTED
from sd_lens.models.hooks import run_with_hooks
from sd_lens.models.linear_layers import _NAMES, linear_groups
from tests import tiny
from tests.oracles.quantized import linear_modules


@pytest.fixture(params=tiny.BOOTING, ids="-".join)
def pair(request):
    name, backend = request.param
    return tiny.ARCHITECTURES[name](), tiny.wrap(tiny.ARCHITECTURES[name](), backend)


def test_every_supported_architecture_has_names():
    assert set(_NAMES) == set(SUPPORTED) - set(MIXTURES)


def test_the_layers_are_transformers_linear_modules_and_their_parts_hold_all_weights(pair):
    hf_model, model = pair
    modules = linear_modules(hf_model)
    linears = {linear.name: linear for group in linear_groups(model) for linear in group.linears}
    assert set(linears) == set(modules)
    for name, linear in linears.items():
        assert linear.n_parameters == modules[name].weight.numel()
        values = torch.cat([weight.parameter.detach().flatten() for weight in linear.weights])
        torch.testing.assert_close(values.sort().values, modules[name].weight.detach().flatten().sort().values)


def test_inputs_are_those_of_transformers_modules(pair):
    hf_model, model = pair
    tokens = torch.tensor([[3, 4, 5, 6]])
    expected, seen = {}, {}
    for name, module in linear_modules(hf_model).items():
        module.register_forward_pre_hook(lambda _, args, n=name: expected.__setitem__(n, args[0].detach()))
    with torch.no_grad():
        hf_model(tokens)
    groups = linear_groups(model)
    handles = []
    for group in groups:
        for point in group.points:
            key = (group.layer, group.reads, id(point))
            handles.append(point.edited(lambda x, k=key: seen.setdefault(k, x.detach())))
    run_with_hooks(model, tokens, {f"blocks.{model.cfg.n_layers - 1}.hook_resid_post": lambda _: None})
    for handle in handles:
        handle.remove()
    for group in groups:
        for point in group.points:
            found = seen[group.layer, group.reads, id(point)].reshape(4, -1)
            for linear in group.linears:
                if "falcon" not in type(hf_model).__name__.lower():  # with alibi the bridge's attention differs
                    torch.testing.assert_close(found, expected[linear.name].reshape(4, -1), rtol=1e-3, atol=1e-4)
            sizes = [[w.parameter.shape[a] for a in w.input_axes] for linear in group.linears for w in linear.weights]
            assert all(torch.tensor(size).prod() == found.shape[1] for size in sizes)


def test_input_axes_are_the_weights_that_an_input_is_multiplied_with(backend):
    """Input j of a layer silenced, or its weights: the same logits."""
    tokens = torch.tensor([[3, 4, 5, 6]])
    for build in (tiny.gpt2, tiny.mistral):
        model = tiny.wrap(build(), backend)
        for group in linear_groups(model, [1]):
            silenced = torch.ones(_n_inputs(group))
            silenced[3:7] = 0

            def edit(x, point=group.points[0], s=silenced):
                return x * s.reshape(x.shape[-len(point.axes) :])

            handles = [point.edited(edit) for point in group.points]
            with torch.no_grad():
                by_input = model(tokens)
            for handle in handles:
                handle.remove()
            stored = []
            for weight in (w for linear in group.linears for w in linear.weights):
                data = weight.parameter.data
                stored.append((weight.parameter, data))
                shape = [n if axis in weight.input_axes else 1 for axis, n in enumerate(data.shape)]
                weight.parameter.data = data * silenced.reshape(shape)
            with torch.no_grad():
                torch.testing.assert_close(model(tokens), by_input, rtol=1e-4, atol=1e-4)
            for parameter, data in stored:
                parameter.data = data
            with torch.no_grad():
                assert (model(tokens) - by_input).abs().max() > 1e-2


def _n_inputs(group):
    weight = group.linears[0].weights[0]
    return int(torch.tensor([weight.parameter.shape[axis] for axis in weight.input_axes]).prod())


def test_some_blocks_can_be_asked_for(tiny_llama):
    assert [(group.layer, group.reads) for group in linear_groups(tiny_llama, [2, 0])] == [
        (layer, reads) for layer in (2, 0) for reads in ("attention", "heads", "mlp", "neurons")
    ]
    with pytest.raises(InputError, match="block 3 does not exist"):
        linear_groups(tiny_llama, [3])


def test_experts_are_refused(backend):
    with pytest.raises(NotSupportedError, match="the linear layers of MixtralForCausalLM; supported are FalconFor"):
        linear_groups(tiny.wrap(tiny.mixtral(), backend))
