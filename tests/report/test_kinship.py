import copy
from dataclasses import replace

import pytest
import torch

from sd_lens import lineage, signature, write_report
from sd_lens.errors import InputError
from sd_lens.report.kinship import THIS_MODEL, kinship_figures, kinship_sentences
from tests import planted, tiny


@pytest.fixture(scope="module")
def own(model, found):
    return signature(model, found, progress=False)


@torch.no_grad()
def noised(seed):
    """A close relative: every weight moved by a thousandth."""
    relative = copy.deepcopy(planted.llama().hf_model)
    generator = torch.Generator().manual_seed(seed)
    for weight in relative.parameters():
        weight *= 1 + 1e-3 * torch.randn(weight.shape, generator=generator)
    return signature(tiny.wrap(relative, "bridge"), planted.llama().texts, progress=False)


def test_sentences_carry_the_results_numbers(found, own):
    other = planted.llama(seed=3)
    stranger = signature(tiny.wrap(other.hf_model, "bridge"), other.texts, progress=False)
    narrow = replace(own, d_model=32, direction=own.direction[:32])
    shorter = replace(stranger, spectrum=stranger.spectrum[:3])
    named = {"kin": noised(0), "stranger": stranger, "<shorter>": shorter, "narrow": narrow}
    kinship = lineage({THIS_MODEL: own, **named})
    itself, kin, unrelated, blocks, incomparable = kinship_sentences(found.direction, kinship)
    channel = int(found.direction.abs().argmax())
    share = 100 * float(found.direction[channel] ** 2)
    assert itself.startswith(f"As a signature: {share:.1f} % of the direction's square is channel {channel};")
    assert "shares 4 or more of its 8 largest channels" in itself
    row = kinship.table.iloc[0]
    assert kin.startswith(f"kin is related: its direction is {row.angle:.2f} degrees away and shares {row.shared} of")
    assert f"by chance once in 10^{-row.log10_p:.1f}); singular values differ by 0." in kin
    assert unrelated.startswith("stranger is unrelated: ")
    assert blocks.startswith("&lt;shorter&gt; is unrelated: ")
    assert blocks.endswith("their numbers of blocks differ.")
    assert incomparable == "narrow cannot be compared with this model: another width, or no high-norm tokens."
    assert len(kinship_figures(kinship)) == 1


def test_without_a_direction_nothing_is_a_signature():
    assert kinship_sentences(None, None) == []


def test_a_narrow_model_has_no_signature_by_channels():
    narrow = torch.zeros(4, dtype=torch.float64)
    narrow[2] = -1
    assert "too narrow" in kinship_sentences(narrow, None)[0]


def test_a_report_compares_on_request(model, own, tmp_path):
    sentences = write_report(
        model, tmp_path / "r.html", planted.llama().texts, compare={"kin": noised(1)}, progress=False
    )
    assert sum(sentence.startswith("kin is related") for sentence in sentences) == 1
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count("<figure>") == 24
    with pytest.raises(InputError, match="no other model can be called 'this model'"):
        write_report(model, tmp_path / "s.html", planted.llama().texts, compare={THIS_MODEL: own}, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
