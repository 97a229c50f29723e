"""Calibration statistics on every instruction set."""

import pytest
import torch
from helpers import assert_equal, assert_within, channel_stats, gram, heavy_tailed

from gpu_poor import ops

SHAPES = [(1, 1), (1, 70), (3, 16), (50, 17), (33, 64), (130, 200)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
def test_channel_stats(isa, shape, dtype):
    x = heavy_tailed(*shape, dtype=dtype)
    absmax, low, high, mean_square = ops.channel_stats(x)
    expected = channel_stats(x)
    for got, want in zip((absmax, low, high), expected[:3], strict=True):
        assert_equal(got.double().numpy(), want)
    assert_within(mean_square, expected[3], 1e-6 * expected[3])


def test_channel_stats_nan_and_empty(isa):
    x = torch.randn(9, 20)
    x[4, 3] = float("nan")
    stats = ops.channel_stats(x)
    assert all(s.isnan().nonzero().tolist() == [[3]] for s in stats)
    assert all((s == 0).all() and s.shape == (20,) for s in ops.channel_stats(x[:0]))


def test_channel_stats_accepts_leading_dimensions_and_strides(isa):
    x = heavy_tailed(24, 10)
    for got, want in zip(ops.channel_stats(x.view(2, 12, 10)), ops.channel_stats(x), strict=True):
        assert_equal(got, want)
    columns = x.t().contiguous().t()
    for got, want in zip(ops.channel_stats(columns), ops.channel_stats(x), strict=True):
        assert_equal(got, want)


@pytest.mark.parametrize("shape", [*SHAPES, (1100, 100)], ids=str)
@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
def test_gram_adds_to_what_is_there(isa, shape, dtype):
    x = heavy_tailed(*shape, dtype=dtype)
    acc = torch.ones(shape[1], shape[1])
    assert ops.gram_(acc, x) is acc
    expected, bound = gram(x)
    assert_within(acc, expected + 1, bound + 1e-6)
    assert_equal(acc, acc.T.contiguous())
    before = acc.clone()
    assert_equal(ops.gram_(acc, x[:0]), before)
