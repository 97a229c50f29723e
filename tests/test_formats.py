"""Formats: what they store is what they say, and every one can do all that a module asks."""

import math

import pytest
import torch
from helpers import assert_equal, assert_within, heavy_tailed

from gpu_poor import formats
from gpu_poor.formats import FORMATS
from gpu_poor.nn.base import Stored

each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def test_names_are_the_keys():
    assert all(form.name == name and formats.find(name) is form for name, form in FORMATS.items())
    with pytest.raises(ValueError, match="int4_g64.*got 'int3'"):
        formats.find("int3")


def test_defaults_exist():
    assert all(name in FORMATS for pair in formats.DEFAULTS.values() for name in pair)


@each_format
@pytest.mark.parametrize("shape", [(20, 70), (16, 64), (1, 1), (3, 20, 40)])
def test_stores_what_it_says(form, shape):
    rows = heavy_tailed(*shape)
    stored = form.quantize(rows)
    said = form.storage(*shape)
    assert [t if t is None else (tuple(t.shape), t.dtype) for t in stored] == list(said)
    n_bytes = sum(t.nbytes for t in stored if t is not None)
    assert n_bytes == formats.stored_bytes(form, *shape)
    assert len(formats.tensors(form, "w", shape)) == 2 - said.count(None)
    y = form.dequantize(*stored, shape, torch.float32)
    error = (y - rows).norm() / rows.norm()
    assert y.shape == shape and error < {4: 0.2, 8: 0.02, 16: 0.003}[form.bits]
    assert form.dequantize(*stored, shape, torch.bfloat16).dtype == torch.bfloat16


@each_format
def test_linear_and_embedding_use_the_dequantized_weight(form, isa):
    rows, x, bias = heavy_tailed(50, 70), heavy_tailed(4, 70, seed=1), heavy_tailed(50, seed=2)
    stored = form.quantize(rows)
    w = form.dequantize(*stored, (50, 70), torch.float32)
    exact = x.double() @ w.double().T + bias
    size = float((x.abs() @ w.abs().T).max())
    assert_within(form.linear(x, *stored, bias, 50, 32), exact, 1e-5 * size)
    assert_within(form.linear(x, *stored, bias, 50, 16), exact, 3e-4 * size)
    assert_within(form.linear(x, *stored, bias, 50, 8), exact, 5e-2 * size)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert_equal(form.embedding(ids, *stored, (50, 70), torch.float32), w[ids])


@each_format
def test_bits_are_near_those_promised(form):
    n_bits = 8 * formats.stored_bytes(form, 4096, 4096) / math.prod((4096, 4096))
    assert form.bits <= n_bits <= form.bits + 1.0
    assert (n_bits == form.bits) == (form.storage(1, 1)[1] is None)


@each_format
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(form, value):
    rows = heavy_tailed(20, 70)
    assert Stored(*form.quantize(rows), form, rows.shape).is_finite()
    rows[7, 11] = value
    assert not Stored(*form.quantize(rows), form, rows.shape).is_finite()
