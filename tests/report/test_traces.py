from dataclasses import replace

import pytest

import sd_lens.report.writing as writing
from sd_lens import find_high_norm_tokens
from sd_lens.figures.style import shown_number
from sd_lens.report.traces import Traces, trace_figures, trace_sentences
from tests import planted, tiny


@pytest.fixture(scope="module")
def traces():
    model = tiny.wrap(planted.llama().hf_model, "auto", with_tokenizer=True)
    found = find_high_norm_tokens(model, planted.llama().texts, progress=False)
    return writing._traces(model, found, list(planted.llama().texts[:8]), False)


def test_sentences_carry_the_results_numbers(traces):
    sinks, massive, neurons = trace_sentences(traces)
    rate = 100 * traces.sinks.before.sink_rate
    assert sinks.startswith(f"{rate:.1f} % of the heads have an attention sink at the first token")
    assert "without what the MLPs of block 2 write along the direction" in sinks
    largest = shown_number(float(traces.massive.largest.max()))
    assert f"the largest is {largest}" in massive
    (found,) = traces.super_weights
    assert "exploding tokens (mean of 1): 1 of 48." in neurons
    assert f"Zeroing the single weight {found.entries.component[0]} takes their norm from 3,468 to" in neurons
    assert len(trace_figures(traces)) == 5


def test_what_is_not_there_is_not_drawn(traces):
    massive = replace(traces.massive, table=traces.massive.table.head(0))
    less = Traces(traces.sinks, traces.explosion_layers, massive, [])
    assert trace_sentences(less)[1].startswith("No single coordinate")
    assert len(trace_sentences(less)) == 2
    assert len(trace_figures(less)) == 3


def test_tokens_that_explode_elsewhere_are_taken_where_initial_ones_do_not():
    """Only the planted token explodes, and it stands at position 1 of the texts."""
    model = tiny.wrap(planted.llama().hf_model, "auto", with_tokenizer=True)
    texts = planted.llama().texts[1::12, :]
    found = find_high_norm_tokens(model, texts, 1000.0, progress=False)
    assert found.initial.explosion_layers == ()
    (supers,) = writing._traces(model, found, list(texts), False).super_weights
    assert supers.before["norm"] > 3000
