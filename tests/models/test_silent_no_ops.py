"""What TransformerLens's wrappers ignore without a word: sd_lens refuses it, or gets around it.

Where a test shows what TransformerLens does by itself, its failing means that a version has mended the trap.
"""

from contextlib import ExitStack, contextmanager
from functools import cache

import pytest
import torch

from sd_lens import ablated, attribute, attribute_neurons
from sd_lens.errors import HookError, InputError, NotSupportedError
from sd_lens.models.hooks import hooked, logits_with_hooks, run_with_hooks
from tests import tiny

TOKENS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 7]])

# What TransformerLens warns of when its hooks are edited: not what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:A hook on .* returned a modified tensor"),
    pytest.mark.filterwarnings("ignore:A forward hook edited"),
]

needs_hooked_transformer = pytest.mark.skipif(
    "hooked_transformer" not in tiny.BACKENDS, reason="TransformerLens 4 has only the bridge"
)


@cache
def wrapped(name, backend):
    """A model that tests share: each of them leaves it as it was."""
    return tiny.wrap(getattr(tiny, name)(), backend)


@cache
def original(name):
    """The same, in transformers."""
    return getattr(tiny, name)()


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        found = model(tokens)
    return getattr(found, "logits", found)


def by_itself(model, edits):
    """Logits with TransformerLens's own hooks: nothing of sd_lens in between."""
    with torch.no_grad():
        return model.run_with_hooks(
            TOKENS, fwd_hooks=[(name, lambda x, hook, f=edit: f(x)) for name, edit in edits.items()]
        )


def captured(model, points, edits=None):
    """Activations, and whatever edits do to them."""
    seen = {}

    def keep(name):
        return lambda x: seen.__setitem__(name, x.detach().clone())

    logits_with_hooks(model, TOKENS, (edits or {}) | {name: keep(name) for name in points})
    return seen


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_bites(edited, plain):
    assert (edited - plain).abs().max() > 1e-2


# The same models by hand: modules of transformers, and torch's hooks on them.


class Parts:
    """Where a transformers model keeps what a component is."""

    def __init__(self, hf_model, layer=0):
        if hasattr(hf_model, "transformer"):
            inner = hf_model.transformer
            self.embed, self.blocks = inner.wte, inner.h
            self.attn, self.mlp, self.mlp_norm = (getattr(inner.h[layer], n) for n in ("attn", "mlp", "ln_2"))
            self.from_heads, self.from_neurons = self.attn.c_proj, self.mlp.c_proj
        else:
            inner = hf_model.model
            self.embed, self.blocks = inner.embed_tokens, inner.layers
            block = inner.layers[layer]
            self.attn, self.mlp, self.mlp_norm = block.self_attn, block.mlp, block.post_attention_layernorm
            self.from_heads, self.from_neurons = self.attn.o_proj, self.mlp.down_proj
        self.block = self.blocks[layer]


def output_edited(module, edit):
    def hook(_, args, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(hook)


def input_edited(module, edit):
    return module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))


@contextmanager
def by_hand(*handles):
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def without(columns):
    def edit(x):
        x = x.clone()
        x[..., columns] = 0
        return x

    return edit


# hook_resid_mid


def shortened(x):
    """A nonlinear edit of a stream."""
    return x / (1 + x.norm(dim=-1, keepdim=True)) + 0.5


def test_transformer_lens_alone_accepts_an_edit_of_the_mid_residual(backend):
    """HookedTransformer edits the stream, the bridge what the MLP reads: the stream goes on as it was."""
    model = wrapped("llama", backend)
    seen = {}
    by_itself(
        model,
        {
            "blocks.1.hook_resid_mid": lambda x: (seen.__setitem__("mid", x.clone()), 3 * x)[1],
            "blocks.1.hook_mlp_out": lambda x: seen.__setitem__("mlp", x.clone()),
            "blocks.1.hook_resid_post": lambda x: seen.__setitem__("post", x.clone()),
        },
    )
    factor = 3 if backend == "hooked_transformer" else 1
    assert_close(seen["post"] - seen["mlp"], factor * seen["mid"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_mid_residual_is_read_but_not_edited(family, backend):
    model = wrapped(family, backend)
    plain = logits_of(model)
    points = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid"]
    pre, attn, mid = captured(model, points).values()
    assert_close(mid, pre + attn)
    edits = {"blocks.1.hook_resid_mid": lambda x: 2 * x, "blocks.2.hook_resid_pre": lambda x: None}
    with pytest.raises(HookError, match=r"hook_resid_mid can be read, not edited: .* edit hook_attn_out"):
        run_with_hooks(model, TOKENS, edits)
    with pytest.raises(HookError, match="hook_resid_mid can be read"):
        logits_with_hooks(model, TOKENS, edits)
    with hooked(model, edits), pytest.raises(HookError, match="hook_resid_mid can be read"):
        model(TOKENS)
    assert torch.equal(logits_of(model), plain)


@pytest.mark.parametrize("edit", [lambda x: 2 * x, lambda x: x.double(), lambda x: x[:1]])
def test_an_edit_at_the_last_point_of_a_run_is_checked_too(edit, backend):
    with pytest.raises(HookError):
        run_with_hooks(wrapped("llama", backend), TOKENS, {"blocks.1.hook_resid_mid": edit})


def mid_recipe(layer, f):
    """Edits of the mid residual in both wrappers."""
    pre = {}

    def edit(attn_out):
        mid = pre["x"] + attn_out
        return attn_out + f(mid) - mid

    return {
        f"blocks.{layer}.hook_resid_pre": lambda x: pre.__setitem__("x", x),
        f"blocks.{layer}.hook_attn_out": edit,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_recipe_edits_the_mid_residual(family, backend):
    """In both wrappers: against the second half of the block computed by hand, and HookedTransformer's own edit."""
    hf_model = original(family)
    parts, seen = Parts(hf_model, 1), {}

    def second_half(post):
        mid = shortened(seen["pre"] + seen["attn"])
        return mid + parts.mlp(parts.mlp_norm(mid))

    with by_hand(
        input_edited(parts.block, lambda x: (seen.__setitem__("pre", x), x)[1]),
        output_edited(parts.attn, lambda x: (seen.__setitem__("attn", x), x)[1]),
        output_edited(parts.block, second_half),
    ):
        expected = logits_of(hf_model)
    found = logits_with_hooks(wrapped(family, backend), TOKENS, mid_recipe(1, shortened))
    assert_close(found, expected)
    assert_bites(found, logits_of(hf_model))
    if "hooked_transformer" in tiny.BACKENDS:
        own = by_itself(wrapped(family, "hooked_transformer"), {"blocks.1.hook_resid_mid": shortened})
        assert_close(found, own)


# Attention patterns and scores

GUARDED = ["opt", "gptj", "gpt_neo"]


@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_attn_scores"])
@pytest.mark.parametrize("family", GUARDED)
def test_transformer_lens_alone_ignores_edited_patterns(family, point, backend):
    """From 4.3 on with a warning, in 3.9 without a word."""
    model = wrapped(family, backend)
    fired = []
    edited = by_itself(model, {f"blocks.1.{point}": lambda x: (fired.append(1), 1.5 * x + 0.1)[1]})
    assert fired
    if backend == "bridge":
        assert torch.equal(edited, logits_of(model))
    else:
        assert_bites(edited, logits_of(model))


@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_attn_scores"])
@pytest.mark.parametrize("family", GUARDED)
def test_patterns_that_the_bridge_ignores_are_read_only(family, point, backend):
    """In HookedTransformer too, where an edit would do something: the same call means the same in both."""
    model = wrapped(family, backend)
    plain = logits_of(model)
    assert captured(model, [f"blocks.1.{point}"])[f"blocks.1.{point}"].shape == (2, 4, 4, 4)
    edits = {f"blocks.1.{point}": lambda x: 1.5 * x, "blocks.1.hook_resid_post": lambda x: None}
    for run in run_with_hooks, logits_with_hooks:
        with pytest.raises(HookError, match=rf"{point} can be read, not edited: .* edit attn\.hook_z"):
            run(model, TOKENS, edits)
    assert torch.equal(logits_of(model), plain)


def only_itself(pattern):
    return torch.eye(pattern.shape[-1]).expand_as(pattern)


def nothing_else(scores):
    return scores.masked_fill(~torch.eye(scores.shape[-1], dtype=torch.bool), -torch.inf)


@pytest.mark.parametrize(
    ("point", "edit"), [("attn.hook_pattern", only_itself), ("attn.hook_attn_scores", nothing_else)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edited_patterns_bite_elsewhere(family, point, edit, backend):
    """Every token looks at itself only: `z` is its own value vector."""
    model = wrapped(family, backend)
    points = ["blocks.1.attn.hook_v", "blocks.1.attn.hook_z"]
    v, z = captured(model, points, {f"blocks.1.{point}": edit}).values()
    assert_close(z, v.repeat_interleave(z.shape[2] // v.shape[2], dim=2))
    edited = logits_with_hooks(model, TOKENS, {f"blocks.1.{point}": edit})
    assert_bites(edited, logits_of(model))


# ln1


def test_transformer_lens_alone_edits_gptjs_norm_in_two_ways(backend):
    """GPT-J has one norm for attention and MLP; HookedTransformer has a copy for each."""
    model, seen = wrapped("gptj", backend), {}
    points = ["blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    plain = captured(model, points)
    edits = {name: lambda x, n=name: seen.__setitem__(n, x.clone()) for name in points}
    by_itself(model, {"blocks.1.ln1.hook_normalized": lambda x: 2 * x} | edits)
    changed = [bool((seen[name] != plain[name]).any()) for name in points]
    assert changed == [True, backend == "bridge"]


@pytest.mark.parametrize("point", ["ln1.hook_normalized", "ln1.hook_scale"])
def test_gptjs_norm_is_read_only(point, backend):
    model = wrapped("gptj", backend)
    plain = logits_of(model)
    edits = {f"blocks.1.{point}": lambda x: 2 * x, "blocks.1.hook_resid_post": lambda x: None}
    for run in run_with_hooks, logits_with_hooks:
        with pytest.raises(HookError, match=rf"{point} can be read, not edited: .* edit hook_resid_pre"):
            run(model, TOKENS, edits)
    assert captured(model, [f"blocks.1.{point}"])
    assert torch.equal(logits_of(model), plain)


def test_edited_norms_bite_elsewhere(backend):
    """At each of the three firings in HookedTransformer."""
    hf_model = original("llama")
    with by_hand(output_edited(Parts(hf_model, 1).block.input_layernorm, lambda x: 2 * x)):
        expected = logits_of(hf_model)
    edit = {"blocks.1.ln1.hook_normalized": lambda x: 2 * x}
    assert_close(logits_with_hooks(wrapped("llama", backend), TOKENS, edit), expected)
    assert_bites(expected, logits_of(hf_model))


def test_edited_norms_reach_values_within_a_run(backend):
    model, seen = wrapped("llama", backend), {}
    point = "blocks.1.attn.hook_v"
    run_with_hooks(
        model,
        TOKENS,
        {"blocks.1.ln1.hook_normalized": lambda x: 2 * x, point: lambda x: seen.__setitem__("v", x.clone())},
    )
    assert_close(seen["v"], 2 * captured(model, [point])[point])


# Mixtures of experts


def test_neurons_of_experts_are_refused(backend):
    """The bridge's `mlp.hook_post` is there, as wide as the stream: not neurons."""
    model = wrapped("mixtral", backend)
    if backend == "bridge":
        point = "blocks.0.mlp.hook_post"
        assert captured(model, [point])[point].shape == (2, 4, model.cfg.d_model)
    with (
        pytest.raises(InputError, match=r"L0N3 does not exist: block 0 has no single matrix W_out"),
        ablated(model, "L0N3"),
    ):
        pass
    found = attribute(model, TOKENS[0], layer=1)
    with pytest.raises(NotSupportedError, match="no single matrix W_out"):
        attribute_neurons(model, found, layer=0)


def test_experts_are_ablated_together(backend):
    hf_model = original("mixtral")
    with by_hand(output_edited(hf_model.model.layers[0].mlp, torch.zeros_like)):
        expected = logits_of(hf_model)
    with ablated(wrapped("mixtral", backend), "L0MLP"):
        found = logits_of(wrapped("mixtral", backend))
    assert_close(found, expected)
    assert_bites(found, logits_of(hf_model))


def test_neurons_are_counted_by_the_weights(backend):
    """`cfg.d_mlp` cannot be trusted for OPT in the bridge."""
    hf_model, model, seen = original("opt"), wrapped("opt", backend), []
    with by_hand(input_edited(hf_model.model.decoder.layers[1].fc2, lambda x: (seen.append(x), x)[1])):
        plain = logits_of(hf_model)
    neuron = int(seen[0].flatten(0, -2).amax(dim=0).nonzero().max())  # the last that fires at all
    with by_hand(input_edited(hf_model.model.decoder.layers[1].fc2, without(neuron))):
        expected = logits_of(hf_model)
    with ablated(model, f"L1N{neuron}"):
        assert_close(logits_of(model), expected)
    assert neuron > 32
    assert_bites(expected, plain)
    with ablated(model, "L1N47"):
        pass
    with pytest.raises(InputError, match="block 1 has neurons 0 to 47"), ablated(model, "L1N48"):
        pass


# Names and firings


@pytest.mark.parametrize("family", ["gpt_neox", "phi3"])
def test_names_that_the_bridge_ignores_are_errors(family, backend):
    model, name = wrapped(family, backend), "blocks.0.hook_resid_before"
    with pytest.raises(HookError, match=rf"no hook point '{name}'"):
        run_with_hooks(model, TOKENS, {name: lambda x: 0 * x, "blocks.0.hook_resid_pre": lambda x: None})
    with pytest.raises(HookError, match=rf"no hook point '{name}'"), hooked(model, {name: lambda x: 0 * x}):
        pass
    if backend == "bridge" and "hooked_transformer" in tiny.BACKENDS:
        assert torch.equal(by_itself(model, {name: lambda x: 0 * x}), logits_of(model))
    else:
        with pytest.raises(KeyError):
            by_itself(model, {name: lambda x: 0 * x})


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[(family, f"blocks.0.attn.hook_rot_{x}") for family in ("gpt_neox", "phi3", "gptj") for x in "qk"],
        *[(family, "hook_pos_embed") for family in ("gpt_neox", "phi3", "mixtral")],
        ("mixtral", "blocks.0.mlp.hook_router_scores"),
    ],
)
def test_points_that_never_fire_are_errors(family, name):
    model = wrapped(family, "bridge")
    assert name in model.hook_dict
    assert torch.equal(by_itself(model, {name: lambda x: 0 * x}), logits_of(model))
    for run in run_with_hooks, logits_with_hooks:
        with pytest.raises(HookError, match=f"'{name}' exists in the model but did not fire"):
            run(model, TOKENS, {name: lambda x: 0 * x, "blocks.0.hook_resid_pre": lambda x: None})


def test_positional_embeddings_that_are_there_are_ablated(backend):
    hf_model, model = original("gpt2"), wrapped("gpt2", backend)
    with by_hand(output_edited(hf_model.transformer.wpe, torch.zeros_like)):
        expected = logits_of(hf_model)
    with ablated(model, "pos_embed"):
        assert_close(logits_of(model), expected)
    assert_bites(expected, logits_of(hf_model))


def test_positional_embeddings_that_are_not_there_are_errors(backend):
    """Llama's are rotations; the bridge has `hook_pos_embed` for it all the same."""
    model = wrapped("llama", backend)
    with pytest.raises((HookError, InputError)), ablated(model, "pos_embed"):
        logits_of(model)


def test_points_are_known_by_the_name_that_was_asked_for(backend):
    """The bridge calls a hook with a name of its own, and has several for one point."""
    model, names = wrapped("llama", backend), []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: names.append(hook.name))]):
        logits_of(model)
    assert (names == ["blocks.1.hook_resid_pre"]) == (backend == "hooked_transformer")
    points = ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    twins = ["embed.hook_out", "blocks.1.hook_in", "blocks.1.attn.hook_out", "blocks.1.mlp.hook_out"]
    asked = points + (twins if backend == "bridge" else [])
    with hooked(model, {name: lambda x: None for name in asked}) as fired:
        assert not fired
        logits_of(model)
    assert fired == set(asked)
    seen = captured(model, asked)
    for point, twin in zip(points, asked[len(points) :], strict=False):
        assert torch.equal(seen[point], seen[twin])


def test_nothing_needs_opts_second_norm(backend):
    """The bridge flattens its batch and positions into one axis; attribution and ablation do without."""
    hf_model, model, seen = original("opt"), wrapped("opt", backend), []
    point = "blocks.1.ln2.hook_normalized"
    assert captured(model, [point])[point].shape == ((8, 32) if backend == "bridge" else (2, 4, 32))
    layer = hf_model.model.decoder.layers[1]
    with by_hand(output_edited(layer, lambda x: (seen.append(x), x)[1])):
        logits_of(hf_model)
    found = attribute(model, TOKENS[1], position=2, layer=1)
    assert found.total == pytest.approx(float(seen[0][1, 2].norm()), rel=1e-4)
    assert found.residual_error < 1e-5
    with by_hand(output_edited(layer.fc2, torch.zeros_like)):
        expected = logits_of(hf_model)
    with ablated(model, "L1MLP"):
        assert_close(logits_of(model), expected)


# Tensors of another kind


@pytest.mark.parametrize("point", ["hook_attn_out", "attn.hook_z", "mlp.hook_post"])
def test_transformer_lens_alone_repeats_what_is_too_short(point, backend):
    """One row of two comes back: both wrappers add it to both rows."""
    model, name = wrapped("llama", backend), f"blocks.1.{point}"
    short, long = (by_itself(model, {name: edit}) for edit in (lambda x: x[:1], lambda x: x[:1].expand_as(x)))
    assert_close(short, long)
    assert_bites(short, logits_of(model))


@needs_hooked_transformer
def test_hooked_transformer_alone_accepts_another_batch_and_dtype():
    model = wrapped("llama", "hooked_transformer")
    assert by_itself(model, {"blocks.1.hook_resid_pre": lambda x: x[:1]}).shape[0] == 1
    assert_close(by_itself(model, {"blocks.1.hook_resid_pre": lambda x: x.double()}), logits_of(model))


@pytest.mark.parametrize("point", ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post"])
@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda x: x.double(), "torch.float64"),
        (lambda x: x.bfloat16(), "torch.bfloat16"),
        (lambda x: x[:1], r"returned \(1, 4"),
        (lambda x: x[:, :1], r"returned \(2, 1"),
        (lambda x: x.mean(), r"returned \(\)"),
    ],
    ids=["double", "bfloat16", "row", "position", "scalar"],
)
def test_edits_keep_shape_and_dtype(point, edit, kind, backend):
    model, name = wrapped("llama", backend), f"blocks.1.{point}"
    plain = logits_of(model)
    for run in run_with_hooks, logits_with_hooks:
        with pytest.raises(HookError, match=rf"the edit of {name} .*{kind}.* shape and dtype must stay"):
            run(model, TOKENS, {name: edit, "blocks.2.hook_resid_post": lambda x: None})
    assert torch.equal(logits_of(model), plain)


# Automatic differentiation

WEIGHTS = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))


def measured(stream):
    return (WEIGHTS * stream.square()).sum()


def gradient_in_transformers(hf_model, point):
    parts, seen = Parts(hf_model, 1), {}

    def leaf(x):
        seen["leaf"] = x.detach().clone().requires_grad_()
        return seen["leaf"]

    place = {
        "hook_resid_pre": lambda: input_edited(parts.block, leaf),
        "hook_attn_out": lambda: output_edited(parts.attn, leaf),
        "hook_mlp_out": lambda: output_edited(parts.mlp, leaf),
        "attn.hook_z": lambda: input_edited(parts.from_heads, leaf),
        "attn.hook_q": lambda: output_edited(parts.attn.q_proj, leaf),
        "attn.hook_k": lambda: output_edited(parts.attn.k_proj, leaf),
        "attn.hook_v": lambda: output_edited(parts.attn.v_proj, leaf),
    }[point]
    with by_hand(place(), output_edited(parts.blocks[-1], lambda x: (seen.__setitem__("stream", x), x)[1])):
        hf_model(TOKENS)
    (gradient,) = torch.autograd.grad(measured(seen["stream"]), seen["leaf"])
    return gradient


def gradient_through_hooks(model, point, capture):
    seen = {}
    run_with_hooks(
        model,
        TOKENS,
        {
            f"blocks.1.{point}": lambda x: capture(seen, x),
            "blocks.2.hook_resid_post": lambda x: seen.__setitem__("stream", x),
        },
        gradients=True,
    )
    (gradient,) = torch.autograd.grad(measured(seen["stream"]), seen["x"], allow_unused=True)
    return gradient


def returned(seen, x):
    seen["x"] = x.clone()
    return seen["x"]


def only_kept(seen, x):
    seen["x"] = x


EVERYWHERE = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z"]
SEPARATE = ["attn.hook_q", "attn.hook_k", "attn.hook_v"]  # modules of their own in Llama only


@pytest.mark.parametrize(
    ("family", "point"), [*[(f, p) for f in ("llama", "gpt2") for p in EVERYWHERE], *[("llama", p) for p in SEPARATE]]
)
def test_gradients_with_respect_to_returned_clones(family, point, backend):
    expected = gradient_in_transformers(original(family), point)
    found = gradient_through_hooks(wrapped(family, backend), point, returned)
    torch.testing.assert_close(found.flatten(2), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("point", ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"])
def test_activations_that_are_only_kept_are_dead_in_the_bridge(point, backend):
    """Why a clone has to be returned."""
    gradient = gradient_through_hooks(wrapped("llama", backend), point, only_kept)
    assert (gradient is None) == (backend == "bridge")


# Weights


@needs_hooked_transformer
def test_hooked_transformers_grouped_weights_ignore_edits():
    model = tiny.wrap(tiny.llama(), "hooked_transformer")
    plain = logits_of(model)
    with torch.no_grad():
        for name in "W_K", "W_V":
            getattr(model.blocks[1].attn, name).zero_()
    assert torch.equal(logits_of(model), plain)


@pytest.mark.parametrize("component", ["L1H3", "L1ATTN", "L1MLP", "L1N5", "L1", "embed"])
def test_ablations_leave_the_weights_alone(component, backend):
    model = wrapped("llama", backend)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    with ablated(model, component):
        logits_of(model)
        during = model.state_dict()
        assert during.keys() == before.keys()
        assert all(torch.equal(during[name], before[name]) for name in before)


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_one_head_of_a_group_is_ablated(family, head, backend):
    """Heads that share keys and values do not share their fate."""
    hf_model = tiny.family(family)
    width = hf_model.config.hidden_size // 4 if family != "mistral" else hf_model.config.head_dim
    plain = logits_of(hf_model)
    with torch.no_grad():
        hf_model.model.layers[1].self_attn.o_proj.weight[:, width * head : width * (head + 1)] = 0
    expected, model = logits_of(hf_model), wrapped(family, backend)
    with ablated(model, f"L1H{head}"):
        assert_close(logits_of(model), expected)
    with ablated(model, f"L1H{head ^ 1}"):
        assert_bites(logits_of(model), expected)
    assert_bites(expected, plain)


# Ablations bite


def handles_of(parts, component):
    width = parts.from_heads.weight.shape[0 if "Conv1D" in type(parts.from_heads).__name__ else 1] // 4
    return {
        "H0": lambda: [input_edited(parts.from_heads, without(slice(0, width)))],
        "H3": lambda: [input_edited(parts.from_heads, without(slice(3 * width, 4 * width)))],
        "ATTN": lambda: [output_edited(parts.attn, torch.zeros_like)],
        "MLP": lambda: [output_edited(parts.mlp, torch.zeros_like)],
        "N5": lambda: [input_edited(parts.from_neurons, without(5))],
        "": lambda: [output_edited(module, torch.zeros_like) for module in (parts.attn, parts.mlp)],
    }[component]()


@pytest.mark.parametrize("component", ["H0", "H3", "ATTN", "MLP", "N5", ""], ids=lambda c: c or "block")
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ablations_do_what_they_say(family, layer, component, backend):
    hf_model, model = original(family), wrapped(family, backend)
    with by_hand(*handles_of(Parts(hf_model, layer), component)):
        expected = logits_of(hf_model)
    before = logits_of(model)
    with ablated(model, f"L{layer}{component}"):
        found = logits_of(model)
    assert_close(found, expected)
    assert_bites(found, before)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("positions", [None, [1]], ids=["everywhere", "one"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embeddings_are_ablated(family, positions, backend):
    hf_model, model = original(family), wrapped(family, backend)

    def edit(x):
        x = x.clone()
        x[:, slice(None) if positions is None else positions] = 0
        return x

    with by_hand(output_edited(Parts(hf_model).embed, edit)):
        expected = logits_of(hf_model)
    before = logits_of(model)
    with ablated(model, "embed", positions=positions):
        found = logits_of(model)
    assert_close(found, expected)
    assert_bites(found, before)
    assert torch.equal(logits_of(model), before)
