"""half_linear on every instruction set: float sums within their bound, of exact 16-bit weights."""

import numpy as np
import pytest
import torch
from helpers import ROUNDOFF, assert_equal, assert_within, heavy_tailed

from gpu_poor import ops
from gpu_poor.ops.half import HALVES

each_half = pytest.mark.parametrize("half", HALVES, ids=str)


def case(m, n, k, half, seed=0):
    x, bias = heavy_tailed(m, k, seed=seed), heavy_tailed(n, seed=seed + 2)
    return x, heavy_tailed(n, k, seed=seed + 1, dtype=half), bias


def expected_linear(x, weight, bias, out=torch.float32):
    """float64 result, and the bound of a float32 sum of K products in any order and the bias."""
    x, w, b = (t.double().numpy() for t in (x, weight, bias))
    y = x @ w.T + b
    bound = (w.shape[1] + 2) * 2.0**-24 * (np.abs(x) @ np.abs(w).T + np.abs(b))
    tiny = float(torch.finfo(out).smallest_normal) * 2.0**-7
    return y, bound + ROUNDOFF[out] * (np.abs(y) + bound) + tiny


@each_half
@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257])
def test_half_linear_matches_the_oracle(isa, k, half):
    for m, n in ((1, 33), (2, 16), (5, 17), (13, 3), (17, 50)):
        x, weight, bias = case(m, n, k, half, seed=k)
        y = ops.half_linear(x, weight, bias)
        assert_within(y, *expected_linear(x, weight, bias))
        assert_within(ops.half_linear(x, weight), *expected_linear(x, weight, 0 * bias))


@each_half
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_linear_of_half_activations(isa, dtype, half):
    x, weight, bias = case(9, 37, 130, half)
    x, bias = x.to(dtype), bias.to(dtype)
    y = ops.half_linear(x, weight, bias)
    assert y.dtype == dtype
    expected, bound = expected_linear(x, weight, bias, dtype)
    if isa == "torch":  # its matmul rounds before the bias is added
        bound = bound + ROUNDOFF[dtype] * np.abs(expected - bias.double().numpy())
    assert_within(y, expected, bound)


@each_half
def test_half_linear_does_not_depend_on_threads_or_the_split_of_tokens(isa, half):
    if isa == "torch":
        pytest.skip("torch's own matmul: its sums depend on M")
    x, weight, bias = case(37, 1000, 200, half)
    whole = ops.half_linear(x, weight, bias)
    for size in (1, 2, 3, 5, 16, 20):
        parts = [ops.half_linear(part, weight, bias) for part in x.split(size)]
        assert_equal(torch.cat(parts), whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_equal(ops.half_linear(x, weight, bias), whole)
    finally:
        torch.set_num_threads(before)


@each_half
def test_half_linear_takes_every_weight_as_it_is(isa, half):
    """Subnormals, the largest, and both zeros, one at a time: a product with 1 is exact."""
    bits = torch.arange(-(2**15), 2**15, 7, dtype=torch.int16)
    weight = bits.view(half)
    weight = weight[weight.isfinite()][:, None]
    assert_equal(ops.half_linear(torch.ones(1, 1), weight)[0], weight[:, 0].float())


@each_half
def test_half_linear_shapes_and_strides(isa, half):
    x, weight, bias = case(24, 10, 40, half)
    tolerance = 1e-4 if isa == "torch" else 0
    flat = ops.half_linear(x, weight, bias)
    assert_within(ops.half_linear(x.view(2, 3, 4, 40), weight, bias).view(24, 10), flat, tolerance)
    strided = torch.stack([x, x], -1)[..., 0]
    assert_within(ops.half_linear(strided, weight.T.contiguous().T, bias), flat, tolerance)
    assert_within(ops.half_linear(x[0], weight, bias), flat[0], tolerance)
    assert ops.half_linear(x[:0], weight, bias).shape == (0, 10)
    assert_equal(ops.half_linear(x[:, :0], weight[:, :0], bias), bias.expand(24, 10))
    assert ops.half_linear(x, weight[:0]).shape == (24, 0)
    x[3, 7] = float("nan")
    y = ops.half_linear(x, weight, bias)
    flat[3] = float("nan")
    assert_within(y, flat, tolerance)
