"""The slow, obvious twin of the routers' weights: transformers' own router, a text at a time, a token at a time."""

import torch


@torch.no_grad()
def weights_of_tokens(hf_model, texts, layer):
    """What each token of each text gives each expert, `[token, expert]`; a shared expert is the last."""
    mlp = hf_model.model.layers[layer].mlp
    routed, shared = [], []
    handles = [mlp.gate.register_forward_hook(lambda module, args, output: routed.append(output))]
    if hasattr(mlp, "shared_expert_gate"):
        handles.append(mlp.shared_expert_gate.register_forward_hook(lambda module, args, out: shared.append(out)))
    for text in texts:
        hf_model(text[None])
    for handle in handles:
        handle.remove()
    rows = []
    for text, (logits, values, indices) in enumerate(routed):
        for token in range(len(logits)):
            row = [0.0] * logits.shape[1]
            for value, expert in zip(values[token].tolist(), indices[token].tolist(), strict=True):
                row[expert] = value
            if shared:
                row.append(float(shared[text].flatten()[token].double().sigmoid()))
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)
