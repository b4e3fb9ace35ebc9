"""What was found, in sentences with numbers; results in, HTML text out."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from sd_lens.explanations.defects import SingularDefects
from sd_lens.figures.style import shown_number, shown_token
from sd_lens.observations.high_norm import HighNormTokens, TokenGroup


def findings(found: HighNormTokens, defects: SingularDefects) -> list[str]:
    """The sentences of the report, in reading order; token text in them is HTML-escaped."""
    sentences = [_corpus(found)]
    if found.direction is None:
        return [*sentences, _nothing(found), _strongest_block(defects)]
    return [
        *sentences,
        _tokens(found),
        _layers(found),
        *_jumps(found.initial, "initial"),
        *_jumps(found.non_initial, "non-initial high-norm"),
        _one_direction(found),
        *_angles(found, defects),
    ]


def _corpus(found: HighNormTokens) -> str:
    scan = found.scan
    first = ", ".join(f"{quoted(t)} ({n}x)" if n > 1 else quoted(t) for t, n in list(scan.initial_tokens.items())[:5])
    cut = f"; {scan.n_truncated} of the texts were cut to the longest length" if scan.n_truncated else ""
    more = " and others" if len(scan.initial_tokens) > 5 else ""
    return (
        f"{scan.n_tokens:,} tokens of {scan.n_texts:,} texts were run, "
        f"{'with' if scan.prepend_bos else 'without'} a beginning-of-sequence token in front; "
        f"the tokens at position 0 were {first}{more}{cut}."
    )


def _nothing(found: HighNormTokens) -> str:
    if float(found.scan.ordinary_median.min()) == 0:
        return "No high-norm tokens were found: no norm exceeds the threshold."
    ratio = float((found.scan.maximum / found.scan.ordinary_median).max())
    return (
        "No high-norm tokens were found: no block has norms above its threshold, or none that a gap separates from "
        f"ordinary ones. The largest norm of any block is {ratio:.1f} times the median there."
    )


def _strongest_block(defects: SingularDefects) -> str:
    i = int(defects.block.values.argmax())
    return (
        f"From the weights alone, block {defects.layers[i]} has the largest singular value, "
        f"{shown_number(float(defects.block.values[i]))}, {float(defects.block.gap[i]):.2f} times its second."
    )


def _tokens(found: HighNormTokens) -> str:
    others = found.table[found.table.position > 0].drop_duplicates(["text", "position"])
    common = others.token.value_counts().head(5)
    which = ", ".join(f"{quoted(str(token))} ({count}x)" for token, count in common.items())
    return (
        f"Exploding norms: {found.initial.n_tokens:,} of {found.scan.n_texts:,} initial tokens, and "
        f"{found.non_initial.n_tokens:,} tokens at other positions" + (f", most often {which}." if which else ".")
    )


def _layers(found: HighNormTokens) -> str:
    explosions = named_blocks(found.explosion_layers) or "no single block"
    decays = named_blocks(found.decay_layers) or "no single block"
    return f"The norm explodes in {explosions} and decays in {decays} (0-based)."


def _jumps(group: TokenGroup, kind: str) -> list[str]:
    sentences = []
    for layer in sorted({*group.explosion_layers, *group.decay_layers}):
        factor = float(group.growth[layer])
        before = f"from {shown_number(float(group.median[layer - 1]))} " if layer else ""
        verb = f"grows {factor:,.3g}x" if factor > 1 else f"falls to {100 * factor:.0f} %"
        sentences.append(
            f"Block {layer}: the norm of the {kind} tokens {verb} (median of {group.n_tokens:,}), "
            f"{before}to {shown_number(float(group.median[layer]))} (medians before and after)."
        )
    return sentences


def _one_direction(found: HighNormTokens) -> str:
    spread = (
        f", their mean pairwise angle is {found.pairwise_angle:.1f} degrees" if found.pairwise_angle is not None else ""
    )
    return f"There are {found.n_states:,} high-norm states (token and block){spread}."


def _angles(found: HighNormTokens, defects: SingularDefects) -> list[str]:
    assert found.direction is not None
    angles = defects.angles_to(found.direction).tolist()
    gap = defects.block.gap.tolist()
    marked = {*found.explosion_layers, *found.decay_layers}
    at = [
        f"{angle:.1f} degrees at block {layer} ({'explosion' if layer in found.explosion_layers else 'decay'}; "
        f"s1 = {shown_number(value)}, {ratio:.1f} times s2)"
        for layer, angle, value, ratio in zip(defects.layers, angles, defects.block.values.tolist(), gap, strict=True)
        if layer in marked
    ]
    elsewhere = sorted(a for layer, a in zip(defects.layers, angles, strict=True) if layer not in marked)
    sentences = []
    if at:
        sentences.append(
            "The singular direction of a block, computed from the weights alone, makes an angle with the "
            f"empirical direction of the high-norm tokens of {'; '.join(at)}."
        )
    if elsewhere:
        sentences.append(
            f"In the other {len(elsewhere)} blocks that angle is {elsewhere[0]:.1f} to {elsewhere[-1]:.1f} degrees, "
            f"median {median(elsewhere):.1f}."
        )
    return sentences


def quoted(token: str) -> str:
    """A token for a sentence, HTML-escaped."""
    return f"'{shown_token(token)}'"


def named_blocks(layers: Sequence[int]) -> str:
    """`block 2`, or `blocks 2, 11 and 28`; empty for none."""
    if not layers:
        return ""
    if len(layers) == 1:
        return f"block {layers[0]}"
    return f"blocks {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
