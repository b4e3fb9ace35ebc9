"""Texts in, batches of token ids out: the one way in which sd_lens iterates a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from sd_lens.errors import InputError

Text = str | Tensor
Texts = str | Iterable[str | Tensor] | Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Some texts, padded on the right to one length.

    Attributes:
        tokens: token ids; padding repeats the text's last token, and is never counted.
        real: which of them are not padding.
        first_text: number of the first row's text in the corpus; rows follow in order.
        n_truncated: how many of the texts were cut to the longest length allowed.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    first_text: int
    n_truncated: int


def default_texts() -> list[str]:
    """The forty English passages that come with the package (written for it; 3,421 words)."""
    return split_passages(files("sd_lens.observations").joinpath("default_texts.txt").read_text(encoding="utf-8"))


def read_texts(path: str | Path) -> list[str]:
    """The passages of a UTF-8 text file: parts that blank lines separate.

    Raises:
        InputError: if the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the texts of {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    passages = split_passages(content)
    if not passages:
        raise InputError(f"{path} holds no text: write passages separated by blank lines")
    return passages


def split_passages(content: str) -> list[str]:
    """The parts of `content` between blank lines, without surrounding space."""
    lines = (line if line.strip() else "" for line in content.splitlines())
    return [part.strip() for part in "\n".join(lines).split("\n\n") if part.strip()]


def resolved_prepend_bos(model: Any, prepend_bos: bool | None) -> bool:
    """Whether texts get a beginning-of-sequence token: as asked, or the model's habit if None.

    The habit is `cfg.default_prepend_bos`. `load_model` sets it to what the tokenizer itself does;
    a model loaded with TransformerLens alone has TransformerLens's own default, True.
    """
    if prepend_bos is None:
        return bool(getattr(model.cfg, "default_prepend_bos", True))
    return prepend_bos


def token_rows(model: Any, texts: Texts, *, prepend_bos: bool | None = None) -> Iterator[Int[Tensor, " pos"]]:
    """The token ids of each text, lazily.

    Args:
        model: its tokenizer is used; without one, only token ids work.
        texts: one text; or an iterable of texts and token tensors (`[pos]`, or `[n, pos]` for n texts), or
            such a tensor. Token tensors are taken as they are.
        prepend_bos: True, False, or None for the model's habit.

    Raises:
        InputError: for an element of another kind, or a text without a tokenizer.
    """
    add_bos = resolved_prepend_bos(model, prepend_bos)
    for number, text in enumerate([texts] if isinstance(texts, str | Tensor) else texts):
        if isinstance(text, str):
            if getattr(model, "tokenizer", None) is None:
                raise InputError("the model has no tokenizer: pass token ids, or load it with a tokenizer")
            # Cutting is reported, so it is ours. The token in front too: TransformerLens would put the text
            # "<|endoftext|>" in front where the tokenizer has neither such a token nor another.
            row = model.to_tokens(text, prepend_bos=False, truncate=False)[0].cpu()
            yield torch.cat([torch.tensor([_bos(model)]), row]) if add_bos else row
        elif isinstance(text, Tensor) and text.ndim in (1, 2) and not text.is_floating_point():
            yield from (text if text.ndim == 2 else text[None]).cpu().long()
        else:
            raise InputError(
                f"text {number} is neither a string nor a tensor of token ids [pos] or [n, pos]: {type(text).__name__}"
            )


def one_row(model: Any, text: Text, *, prepend_bos: bool | None = None) -> Int[Tensor, " pos"]:
    """The token ids of a single text.

    Raises:
        InputError: as `token_rows`; if it is empty, longer than the model's context, or not one text.
    """
    if not isinstance(text, str | Tensor):
        raise InputError(f"expected one text, or a tensor of its token ids, not {type(text).__name__}")
    rows = list(token_rows(model, text, prepend_bos=prepend_bos))
    if len(rows) != 1:
        raise InputError(f"expected one text, not {len(rows)}")
    if not 0 < len(rows[0]) <= model.cfg.n_ctx:
        raise InputError(f"the text has {len(rows[0])} tokens: expected 1 to {model.cfg.n_ctx}")
    return rows[0]


def _bos(model: Any) -> int:
    tokenizer = model.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.unk_token_id or bos >= model.cfg.d_vocab:
        raise InputError("the tokenizer has no beginning-of-sequence token: pass prepend_bos=False")
    return int(bos)


def batches(
    model: Any,
    texts: Texts,
    *,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
    description: str = "texts",
) -> Iterator[Batch]:
    """Batches of a corpus, in order, each of at most `batch_tokens` padded tokens (or one text).

    Args:
        model: gives tokenizer, context length and vocabulary.
        texts: as for `token_rows`; consumed once, lazily.
        prepend_bos: as for `token_rows`.
        max_length: longest text in tokens, `cfg.n_ctx` at most (and by default); longer ones are cut.
        batch_tokens: bound on the size of a batch.
        progress: show a progress bar.
        description: its label.

    Raises:
        InputError: for unusable texts, or none at all.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length={max_length}: a text needs at least one token")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens={batch_tokens}: a batch needs at least one token")
    limit = min(max_length or model.cfg.n_ctx, model.cfg.n_ctx)
    total = len(texts) if isinstance(texts, list | tuple) else None
    rows: list[Tensor] = []
    first_text, n_truncated, longest = 0, 0, 0
    with tqdm(desc=description, total=total, unit="text", disable=not progress, leave=False) as bar:
        for row in token_rows(model, texts, prepend_bos=prepend_bos):
            if len(row) == 0:
                raise InputError(f"text {first_text + len(rows)} has no tokens: it is empty")
            longest = max(min(len(row), limit), longest)
            if rows and longest * (len(rows) + 1) > batch_tokens:
                yield _padded(rows, first_text, n_truncated)
                bar.update(len(rows))
                first_text, rows, n_truncated, longest = first_text + len(rows), [], 0, min(len(row), limit)
            n_truncated += len(row) > limit
            rows.append(row[:limit])
        if not rows:
            raise InputError("there are no texts: pass at least one")
        yield _padded(rows, first_text, n_truncated)
        bar.update(len(rows))


def token_strings(model: Any, token_ids: Int[Tensor, " n"] | list[int]) -> list[str]:
    """Each token's text, or its number where the model has no tokenizer."""
    ids = [int(i) for i in token_ids]
    tokenizer = getattr(model, "tokenizer", None)
    return [str(i) for i in ids] if tokenizer is None else [tokenizer.decode([i]) for i in ids]


def _padded(rows: list[Tensor], first_text: int, n_truncated: int) -> Batch:
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    tokens = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])
    return Batch(tokens, torch.arange(longest) < lengths[:, None], first_text, n_truncated)
