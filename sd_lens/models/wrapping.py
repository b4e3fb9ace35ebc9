"""From a transformers model in memory to TransformerLens: HookedTransformer or bridge, unprocessed."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sd_lens.errors import InputError, ModelLoadError

Backend = Literal["auto", "hooked_transformer", "bridge"]

_LARGEST_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits; half precision: below
_LARGEST_HALF_ERROR = 5e-2


def wrapped(hf_model: Any, tokenizer: Any | None, name: str, *, backend: Backend, device: torch.device) -> Any:
    """`hf_model` as a TransformerLens model whose residual stream is the original's.

    Args:
        hf_model: a transformers causal language model; the bridge wraps it in place.
        tokenizer: its tokenizer, or None.
        name: what to call the model.
        backend: which wrapper; `"auto"` prefers HookedTransformer where it exists and knows the model.
        device: where it shall live.

    Raises:
        InputError: for an unknown backend.
        ModelLoadError: if TransformerLens cannot wrap the model.
    """
    if backend not in get_args(Backend):
        raise InputError(f"unknown backend {backend!r}; expected one of {get_args(Backend)}")
    prepends_bos = tokenizer is not None and _prepends_bos(tokenizer)
    with tempfile.TemporaryDirectory(prefix="sd-lens-") as folder:
        # TransformerLens loads the tokenizer anew from where it says it came from.
        reloadable = None if tokenizer is None else _reloadable(tokenizer, folder)
        model = _wrapped(hf_model, reloadable, name, backend, folder)
    model.cfg.default_prepend_bos = prepends_bos
    model.cfg.model_name = name
    # As a string, or TransformerLens forgets which GPU.
    return model.to(str(device), print_details=False)


def _wrapped(hf_model: Any, tokenizer: Any | None, name: str, backend: Backend, folder: str) -> Any:
    if backend == "bridge":
        return bridged(hf_model, tokenizer, name)
    try:
        return _hooked_transformer(hf_model, tokenizer, folder)
    except ModelLoadError:
        if backend == "auto":
            return bridged(hf_model, tokenizer, name)
        raise


def bridged(hf_model: Any, tokenizer: Any | None, name: str) -> Any:
    """`hf_model` in a `TransformerBridge`, in place and where it is.

    Args:
        hf_model: a transformers causal language model.
        tokenizer: one that TransformerLens can load anew, or None.
        name: what to call the model.

    Raises:
        ModelLoadError: if TransformerLens cannot wrap the model.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf_model.set_attn_implementation("eager")  # or attention patterns would not reach their hooks
    architecture = type(hf_model).__name__
    try:
        return build_bridge_from_module(
            hf_model, architecture, hf_config=hf_model.config, tokenizer=tokenizer, model_name=name
        )
    except Exception as error:
        raise ModelLoadError(
            f"TransformerLens's bridge cannot wrap {name} ({architecture}): {first_line(error)}"
        ) from error


def _hooked_transformer(hf_model: Any, tokenizer: Any | None, folder: str) -> Any:
    architecture = type(hf_model).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.9 announces its end
        try:
            from transformer_lens import HookedTransformer
            from transformer_lens.loading_from_pretrained import (
                get_pretrained_model_config,
                get_pretrained_state_dict,
            )
        except ImportError as error:
            raise ModelLoadError(
                "the installed TransformerLens has no HookedTransformer (4.0 removed it): use the bridge"
            ) from error
        try:
            # Its converters know official names and folders; the folder holds nothing but the configuration.
            hf_config = copy.deepcopy(hf_model.config)
            hf_config.architectures = [architecture]
            if not hasattr(hf_config, "n_ctx"):  # in GPT-2's published config.json, but not in new ones
                hf_config.n_ctx = hf_config.max_position_embeddings
            hf_config.save_pretrained(folder)
            dtype = hf_model.dtype
            cfg = get_pretrained_model_config(folder, hf_cfg=hf_config.to_dict(), device="cpu", dtype=dtype)
            if cfg.original_architecture != architecture:
                raise ValueError(f"the folder name {folder} makes it take the model for another architecture")
            state = get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
            cfg.tokenizer_name = None  # the folder, which holds no tokenizer to look for
            model = HookedTransformer(cfg, tokenizer, move_to_device=False)
            model.load_and_process_state_dict(
                state,
                fold_ln=False,
                center_writing_weights=False,
                center_unembed=False,
                fold_value_biases=False,
            )
            error_of_logits = _largest_difference(hf_model, model)
        except Exception as error:
            raise ModelLoadError(
                f"HookedTransformer cannot be made from a {architecture}: {first_line(error)}"
            ) from error
    if not error_of_logits <= _LARGEST_ERROR.get(dtype, _LARGEST_HALF_ERROR):
        raise ModelLoadError(
            f"HookedTransformer converts this {architecture} wrongly: its logits are off by "
            f"{error_of_logits:.1e} of their largest; use the bridge"
        )
    return model


def _largest_difference(hf_model: Any, model: Any) -> float:
    """Largest difference of the logits on eight tokens, relative to the largest logit."""
    tokens = (torch.arange(1, 9) * 7 % model.cfg.d_vocab)[None]
    with torch.no_grad():
        expected = hf_model(tokens.to(hf_model.device)).logits.double().cpu()
        found = model(tokens).double()
    if not torch.isfinite(expected).all():
        return 0.0  # the original overflows in this dtype: nothing to compare with, and scanning will say it
    return float((found - expected).abs().max() / expected.abs().max())


def _prepends_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _reloadable(tokenizer: Any, folder: str) -> Any:
    from transformers import AutoTokenizer

    where = Path(folder) / "tokenizer"
    try:
        tokenizer.save_pretrained(where)
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:
        raise ModelLoadError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot be used: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
