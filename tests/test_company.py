"""torch's operators go on alone while our loops do: gpu_poor/fusion/company.py."""

import pytest
import torch
from conftest import make_model, tokens

import gpu_poor
from gpu_poor import isa

pytest.importorskip("transformers")
from gpu_poor.fusion import company  # noqa: E402 - needs transformers


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_follows_and_comes_back(monkeypatch):
    beside = [True]
    monkeypatch.setattr(isa, "alone", lambda: beside[0])
    company.follow()
    assert torch.get_num_threads() == 2  # outside nothing changes
    with pytest.raises(RuntimeError, match="within"), company.followed():
        company.follow()
        assert torch.get_num_threads() == 1
        beside[0] = False
        company.follow()
        assert torch.get_num_threads() == 2
        beside[0] = True
        company.follow()
        raise RuntimeError("within")
    assert torch.get_num_threads() == 2


def test_generate_follows(monkeypatch):
    model = gpu_poor.quantize(make_model("llama"), verbose=False, fuse=True)
    monkeypatch.setattr(isa, "alone", lambda: True)
    seen = []

    def look(ids, scores):
        seen.append(torch.get_num_threads())
        return scores

    ids = tokens(1, 3)
    model.generate(ids, max_new_tokens=3, do_sample=False, logits_processor=[look])
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 2
