import pytest
import torch

from sd_lens import default_texts, read_texts
from sd_lens.errors import InputError
from sd_lens.observations.texts import batches, split_passages, token_rows, token_strings
from tests import tiny


def rows(model, texts, **options):
    return [row.tolist() for row in token_rows(model, texts, **options)]


def test_prepending_is_explicit_and_none_is_the_models_habit(tiny_llama):
    assert rows(tiny_llama, "w0 w1") == [[3, 4]]
    assert rows(tiny_llama, "w0 w1", prepend_bos=True) == [[1, 3, 4]]
    tiny_llama.cfg.default_prepend_bos = True
    assert rows(tiny_llama, "w0 w1") == [[1, 3, 4]]
    assert rows(tiny_llama, "w0 w1", prepend_bos=False) == [[3, 4]]


def test_texts_and_token_tensors_mix_lazily(tiny_llama):
    def endless():
        yield "w0"
        yield torch.tensor([5, 6, 7])
        yield torch.tensor([[8, 9], [10, 11]])
        raise AssertionError("read too far")

    lazy = token_rows(tiny_llama, endless())
    assert [next(lazy).tolist() for _ in range(4)] == [[3], [5, 6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("bad", [3, None, torch.ones(2), ["w0"]])
def test_other_elements_are_named(tiny_llama, bad):
    with pytest.raises(InputError, match="text 1 is neither a string nor a tensor of token ids"):
        list(tiny.unchecked(token_rows)(tiny_llama, ["w0", bad]))


def test_text_without_tokenizer_is_an_error():
    model = tiny.wrap(tiny.llama(), "auto")
    with pytest.raises(InputError, match="the model has no tokenizer: pass token ids"):
        rows(model, "w0")
    assert rows(model, torch.tensor([4, 5])) == [[4, 5]]
    assert token_strings(model, [4, 5]) == ["4", "5"]


def test_batches_cover_every_real_token_once_and_stay_small(tiny_llama):
    lengths = [3, 17, 1, 8, 8, 30, 2, 2, 2, 5]
    texts = [torch.arange(n) + 3 for n in lengths]
    seen = []
    for batch in batches(tiny_llama, texts, batch_tokens=32, progress=False):
        assert batch.tokens.numel() <= 32 or len(batch.tokens) == 1
        assert batch.first_text == len(seen)
        for row, real in zip(batch.tokens, batch.real, strict=True):
            seen.append(row[real].tolist())
    assert seen == [text.tolist() for text in texts]


@pytest.mark.parametrize("max_length", [5, 1000, None])
def test_long_texts_are_cut_and_counted(tiny_llama, max_length):
    texts = [torch.full((100,), 4), torch.full((3,), 4), torch.full((100,), 4)]
    found = list(batches(tiny_llama, texts, max_length=max_length, batch_tokens=8, progress=False))
    longest = min(max_length or 64, 64)
    assert max(b.tokens.shape[1] for b in found) == longest
    assert sum(b.n_truncated for b in found) == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there are no texts"),
        (["w0", ""], "text 1 has no tokens"),
        (torch.empty(1, 0).long(), "has no tokens"),
    ],
)
def test_empty_input_is_named(tiny_llama, texts, message):
    with pytest.raises(InputError, match=message):
        list(batches(tiny_llama, texts, progress=False))


def test_max_length_must_leave_a_token(tiny_llama):
    with pytest.raises(InputError, match="max_length=0: a text needs at least one token"):
        list(batches(tiny_llama, ["w0"], max_length=0, progress=False))


def test_passages_are_separated_by_blank_lines():
    assert split_passages("a\nb\n\n \nc\r\n\r\n\n") == ["a\nb", "c"]


def test_default_texts_are_forty_passages_with_different_beginnings():
    texts = default_texts()
    assert len(texts) == 40
    assert sum(len(text.split()) for text in texts) == 3421
    assert len({text.split()[0] for text in texts}) >= 36


def test_text_files_are_read_and_bad_ones_named(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("One.\n\nTwo, \u00e9.\n", encoding="utf-8")
    assert read_texts(path) == ["One.", "Two, \u00e9."]
    for content, message in ((b"\xff\xfe1", r"is not UTF-8 text \(byte 0\)"), (b" \n\n", "holds no text")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_texts(path)
    with pytest.raises(InputError, match=r"cannot read the texts of .*none\.txt: No such file"):
        read_texts(tmp_path / "none.txt")


def test_a_tokenizer_without_bos_is_named(tiny_llama):
    tiny_llama.tokenizer.bos_token = "no such token"
    with pytest.raises(InputError, match="has no beginning-of-sequence token: pass prepend_bos=False"):
        rows(tiny_llama, "w0 w1", prepend_bos=True)
    assert rows(tiny_llama, "w0 w1", prepend_bos=False) == [[3, 4]]
