"""The page itself: sentences, figures and tables into one self-contained HTML file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sd_lens.figures.style import shown_number, shown_token

_MOST_ROWS = 200


@dataclass(frozen=True)
class Page:
    """What a report shows.

    Attributes:
        title: plain text.
        subtitle: plain text.
        findings: HTML sentences.
        figures: caption (plain text) and figure.
        tokens: `HighNormTokens.table`.
        settings: name and value, plain text.
    """

    title: str
    subtitle: str
    findings: Sequence[str]
    figures: Sequence[tuple[str, go.Figure]]
    tokens: pd.DataFrame
    settings: Mapping[str, str]

    def to_html(self) -> str:
        """The page; plotly's script is in it once, and nothing is loaded from anywhere."""
        template = Template(files("sd_lens.report").joinpath("template.html").read_text(encoding="utf-8"))
        return template.substitute(
            title=html.escape(self.title),
            subtitle=html.escape(self.subtitle),
            plotly=get_plotlyjs(),
            findings="\n".join(f"<li>{sentence}</li>" for sentence in self.findings),
            figures="\n".join(
                f"<figure>{_figure(figure, number)}<figcaption>{html.escape(caption)}</figcaption></figure>"
                for number, (caption, figure) in enumerate(self.figures)
            ),
            table=_token_table(self.tokens),
            settings=_table(("setting", "value"), [(html.escape(k), html.escape(v)) for k, v in self.settings.items()]),
        )


def _figure(figure: go.Figure, number: int) -> str:
    markup: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{number}",
        config={"displaylogo": False, "responsive": True},
    )
    return markup


def _token_table(tokens: pd.DataFrame) -> str:
    if tokens.empty:
        return "<p>None.</p>"
    per_token = (
        tokens.groupby(["text", "position", "token"], sort=False)
        .agg(layers=("layer", list), peak=("norm", "max"))
        .reset_index()
        .sort_values("peak", ascending=False)
    )
    shown = per_token.head(_MOST_ROWS)
    rows = [
        (str(text), str(position), f"<code>{shown_token(token)}</code>", _ranges(layers), shown_number(peak))
        for text, position, token, layers, peak in shown.to_numpy().tolist()
    ]
    left_out = len(per_token) - len(rows)
    note = f"<p>The {left_out:,} tokens with smaller norms are left out here.</p>" if left_out else ""
    return _table(("text", "position", "token", "high after blocks", "largest norm"), rows) + note


def _ranges(layers: Sequence[int]) -> str:
    """`2-8, 11-29` for ascending layers."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        numeric = [' class="number"' if v.replace(",", "").replace(".", "").isdigit() else "" for v in values]
        return "".join(f"<{tag}{c}>{v}</{tag}>" for v, c in zip(values, numeric, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'
