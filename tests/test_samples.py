"""sample_inputs in every form that people have them, and every way to get them wrong."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_model
from torch import nn

from gpu_poor import assets
from gpu_poor.samples import token_rows

VOCAB = 512  # that of the tokenizer
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=VOCAB)  # 64 positions


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(assets.STORIES260K)


def lists(rows):
    assert all(r.dtype == torch.int64 and r.dim() == 2 and len(r) == 1 for r in rows)
    return [row[0].tolist() for row in rows]


PADDED = {
    "input_ids": torch.tensor([[0, 3, 4], [5, 6, 0], [7, 8, 9]]),
    "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1]]),
}
RAGGED = {"input_ids": [[3, 4], [5, 6, 7]], "attention_mask": [[1, 1], [0, 1, 1]]}


@pytest.mark.parametrize(
    "given, expected",
    {
        "tensor": (IDS, IDS.tolist()),
        "int32": (IDS.int(), IDS.tolist()),
        "one row": (IDS[0], [[3, 4, 5, 6]]),
        "numpy": (IDS.numpy(), IDS.tolist()),
        "ids": ([3, 4, 5], [[3, 4, 5]]),
        "lists of ids": ([[3, 4], [5, 6, 7]], [[3, 4], [5, 6, 7]]),
        "tensors": ([IDS, IDS[0, :2]], [*IDS.tolist(), [3, 4]]),
        "generator": ((row for row in IDS), IDS.tolist()),
        "dict": ({"input_ids": IDS}, IDS.tolist()),
        "padded": (PADDED, [[3, 4], [5, 6], [7, 8, 9]]),
        "ragged": (RAGGED, [[3, 4], [6, 7]]),
        "dicts": ([PADDED, {"input_ids": [3]}], [[3, 4], [5, 6], [7, 8, 9], [3]]),
    }.values(),
)
def test_forms(model, given, expected):
    assert lists(token_rows(model, given)) == expected


def test_texts_become_rows_of_a_length(model, tokenizer):
    text = assets.calib_text()[:2000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = lists(token_rows(model, text, tokenizer, length=50))
    assert [len(row) for row in rows[:-1]] == [50] * (len(ids) // 50)
    assert list(itertools.chain(*rows)) == ids
    # 64 positions bound the rows too; each text of several starts a row of its own.
    rows = token_rows(model, [text, "Once upon a time"], tokenizer)
    assert rows[0].shape == (1, 64)
    assert lists(rows)[-1] == tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    assert len(tokenizer("Once")["input_ids"]) > len(lists(token_rows(model, "Once", tokenizer))[0])


def test_the_tokenizer_is_found_with_the_model():
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K)
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.STORIES260K)
    text = "Once upon a time"
    assert lists(token_rows(model, text)) == lists(token_rows(model, text, tokenizer))


def test_a_loader_is_read_no_further_than_needed(model):
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield IDS

    rows = token_rows(model, endless(), n_tokens=10)
    assert lists(rows) == [[3, 4, 5, 6], [7, 8, 9, 10], [3, 4]]
    assert read == [0, 1]


def test_rows_are_no_views_of_what_was_given(model):
    ids = IDS.clone()
    rows = token_rows(model, ids)
    ids.zero_()
    assert lists(rows) == IDS.tolist()


@pytest.mark.parametrize(
    "given, message",
    {
        "none": ([], "sample_inputs is empty"),
        "an empty one": ([[3], []], r"sample_inputs\[1\] is empty"),
        "no text": ("  ", "sample_inputs: text is empty"),
        "no tokens": (torch.empty(1, 0, dtype=torch.int64), "sample_inputs has no tokens"),
        "all padding": (
            [IDS, {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 4, [0] * 4])}],
            r"sample_inputs\[1\], row 1 has no tokens",
        ),
        "floats": ([IDS, IDS.float()], r"sample_inputs\[1\] must hold integer token ids.*float32"),
        "list of floats": ([0.5, 1.5], "sample_inputs must hold integer token ids.*float32"),
        "bools": (IDS > 4, "sample_inputs must hold integer token ids.*bool"),
        "too large": ([IDS, [3, VOCAB]], rf"sample_inputs\[1\] has the token id {VOCAB}, not in"),
        "negative": (torch.tensor([3, -100]), "sample_inputs has the token id -100"),
        "too long": (torch.ones(2, 65).long(), "row 0 has 65 tokens; the model takes at most 64"),
        "3-D": (IDS[None, None], r"sample_inputs must be token ids \[T\] or \[B, T\].*\(1, 1, 2"),
        "no ids": ({"pixel_values": IDS}, "sample_inputs has no 'input_ids', only pixel_values"),
        "mask": ({"input_ids": IDS, "attention_mask": IDS[:1]}, r"\(1, 4\) does not fit.*\(2, 4\)"),
        "masks": ({**RAGGED, "attention_mask": [[1, 1]]}, "1 attention masks for 2 rows"),
        "hole": (
            {"input_ids": IDS[0], "attention_mask": torch.tensor([1, 0, 1, 1])},
            "hole between tokens",
        ),
    }.values(),
)
def test_mistakes_are_named(model, tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        token_rows(model, given, tokenizer)


def test_other_things_are_type_errors(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once")
    with pytest.raises(TypeError, match="path.read_text"):
        token_rows(model, path)
    with pytest.raises(ValueError, match="the name of a file"):
        token_rows(model, str(path))
    with pytest.raises(TypeError, match="file.read"), path.open() as file:
        token_rows(model, file)
    with pytest.raises(TypeError, match="decode"):
        token_rows(model, b"Once")
    with pytest.raises(TypeError, match="tokenizer must be"):
        token_rows(model, "Once", tokenizer="gpt2")
    with pytest.raises(TypeError, match="got int"):
        token_rows(model, 7)


def test_text_needs_a_tokenizer(model):
    with pytest.raises(ValueError, match="tokenizer="):
        token_rows(model, "Once upon a time")


def test_a_model_without_limits_takes_any_ids():
    rows = token_rows(nn.Linear(2, 2), [10**6] * 300)
    assert rows[0].shape == (1, 300)
    with pytest.raises(ValueError, match="not 0 or more"):
        token_rows(nn.Linear(2, 2), np.array([-1]))
