"""The slow, obvious twin of the attention map: autograd through the model itself."""

import torch


def attention_jacobian(model, layer, token):
    """d attn_out / d resid_pre of a lone token, with the norm's 1/scale frozen and multiplied away."""
    tokens = torch.tensor([[token]])
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, names_filter=[f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.ln1.hook_scale"]
        )
    x = cache[f"blocks.{layer}.hook_resid_pre"][0, 0].detach()
    scale = cache[f"blocks.{layer}.ln1.hook_scale"].detach().flatten()[0]
    norm, attn = model.blocks[layer].ln1, model.blocks[layer].attn
    is_layer_norm = "LN" in model.cfg.normalization_type
    gain = norm.w.detach()
    bias = getattr(norm, "b", None)

    def attention(stream):
        centred = stream - stream.mean() if is_layer_norm else stream
        normed = centred / scale * gain + (0 if bias is None else bias.detach())
        groups = model.cfg.n_heads // attn.W_V.shape[0]
        values = torch.einsum("m,hmd->hd", normed, attn.W_V.detach()).repeat_interleave(groups, dim=0)
        return torch.einsum("hd,hdm->m", values, attn.W_O.detach())

    # The formula above must be the model's own attention before its derivative means anything.
    with torch.no_grad():
        _, outputs = model.run_with_cache(tokens, names_filter=[f"blocks.{layer}.hook_attn_out"])
        biases = [b for b in (attn.b_O,) if b is not None]
        value_bias = getattr(attn, "b_V", None)
        expected = attention(x) + sum(biases)
        if value_bias is not None:
            groups = model.cfg.n_heads // value_bias.shape[0]
            expected = expected + torch.einsum("hd,hdm->m", value_bias.repeat_interleave(groups, dim=0), attn.W_O)
    torch.testing.assert_close(outputs[f"blocks.{layer}.hook_attn_out"][0, 0], expected, rtol=1e-4, atol=1e-4)
    return torch.autograd.functional.jacobian(attention, x) * scale
