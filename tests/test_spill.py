"""spill: a list of tensors, wherever they lie; files that are gone when they are not needed."""

import os
import tempfile

import pytest
import torch
from helpers import assert_equal

from gpu_poor import spill
from gpu_poor.spill import Spilled


@pytest.mark.parametrize("limit", [0, 3000, 10**9], ids=["file", "both", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_list(limit, dtype, monkeypatch):
    monkeypatch.setattr(spill, "IN_MEMORY", limit)
    tensors = [torch.randn(shape).to(dtype) for shape in ((3, 5, 7), (2, 500), (1,), (0, 4))]
    tensors.append(torch.randn(6, 8).to(dtype).t())  # not contiguous
    found = Spilled(tensors)
    assert len(found) == len(tensors)
    for _ in range(2):
        for a, b in zip(found, tensors, strict=True):
            assert_equal(a, b)
    for i in (1, 0, 4):
        tensors[i] = tensors[i] * 2 + 1
        found[i] = tensors[i]
    tensors[2] = torch.randn(40, 50)  # larger, and of another dtype
    found[2] = tensors[2]
    for i, expected in enumerate(tensors):
        assert_equal(found[i], expected)


def test_beyond_the_limit_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(spill, "IN_MEMORY", 1000)
    found = Spilled(torch.ones(200) for _ in range(5))
    assert found[0] is found[0] and found[4] is not found[4]
    assert sum(isinstance(item, torch.Tensor) for item in found._items) == 1


def test_the_file_is_where_it_is_asked_for_and_leaves_no_trace(monkeypatch, tmp_path):
    monkeypatch.setattr(spill, "IN_MEMORY", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert spill.temporary_folder() == str(tmp_path)
    found = Spilled([torch.ones(2**20)])
    found._file.flush()
    assert not list(tmp_path.iterdir())
    assert os.fstat(found._file.fileno()).st_size == 2**22
    monkeypatch.delenv("TMPDIR")
    assert spill.temporary_folder() in ("/var/tmp", tempfile.gettempdir())
