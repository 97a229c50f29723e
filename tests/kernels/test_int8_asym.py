"""int8 rows with a scale and an offset, on every instruction set."""

import numpy as np
import pytest
import torch
from helpers import (
    EPS32,
    ROUNDOFF,
    assert_equal,
    assert_within,
    heavy_tailed,
    linear,
    quantize_rows,
)

from gpu_poor import isa, ops

C_ISAS = [name for name in isa.available() if name != isa.TORCH]
KS = (1, 15, 16, 33, 64, 65, 130, 257)


def case(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.integers(-128, 128, (n, k), dtype=np.int8))
    scale = torch.from_numpy(rng.standard_normal((2, n)).astype(np.float32)) / 100
    return heavy_tailed(m, k, seed=seed), weight, scale, heavy_tailed(n, seed=seed + 2)


def expected_linear(x, weight, scale, bias, bits, out=torch.float32):
    """float64 result and bound: those without offsets, and what the offsets add to both."""
    q_max = ops.Q_MAX.get(bits)
    y, bound = linear(x, weight, scale[0], bias, q_max)
    xq, x_scale = x.double().numpy(), 1.0
    if q_max:
        xq, x_scale = quantize_rows(x, q_max)
        x_scale = x_scale.astype(np.float64)[:, None]
    offset = scale[1].double().numpy()
    high = np.rint(xq / 254)
    sums = np.abs(xq.sum(1)) if bits != 16 else 254 * np.abs(high.sum(1))
    sums = sums + (np.abs((xq - 254 * high).sum(1)) if bits == 16 else 0)
    y = y + xq.sum(1)[:, None] * x_scale * offset
    bound = bound + 7 * EPS32 * (np.abs(y) + sums[:, None] * np.abs(x_scale * offset))
    return y, bound + ROUNDOFF[out] * (np.abs(y) + bound) + 1e-30


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("k", KS)
def test_int8_quantize_asymmetric_spans_the_range(isa, k, dtype):
    x = heavy_tailed(3, 12, k, seed=k, dtype=dtype) + 2
    x[0, 1], x[1, 2] = 0, -3
    q, scale = ops.int8_quantize(x, asymmetric=True)
    assert q.shape == x.shape and scale.shape == (3, 2, 12)
    y, rows = ops.int8_dequantize(q, scale), x.float()
    assert (y[0, 1] == 0).all() and (y[1, 2] == -3).all()
    step = (rows.amax(-1) - rows.amin(-1)) / 255
    bound = step[..., None] * 0.501 + 1e-6 * rows.abs().amax(-1, keepdim=True)
    assert_within(y, rows, bound.expand_as(y))
    if k > 1:
        live = step > 0
        assert (q.amin(-1)[live] == -128).all() and (q.amax(-1)[live] == 127).all()


def test_int8_quantize_asymmetric_marks_what_is_not_finite(isa):
    x = heavy_tailed(5, 20)
    x[1, 3], x[2, 0], x[3, 4] = float("nan"), float("inf"), float("-inf")
    q, scale = ops.int8_quantize(x, asymmetric=True)
    assert scale[0].isnan().tolist() == [False, True, True, True, False]
    assert q.dtype == torch.int8


@pytest.mark.parametrize("k", KS)
def test_int8_dequantize_adds_the_offset(isa, k):
    _, weight, scale, _ = case(1, 20, k, seed=k)
    y = ops.int8_dequantize(weight, scale)
    exact = weight.double() * scale[0, :, None].double() + scale[1, :, None].double()
    size = weight.double().abs() * scale[0, :, None].abs() + scale[1, :, None].abs()
    assert_within(y, exact, EPS32 * size)
    for dtype in (torch.bfloat16, torch.float16):
        assert_equal(ops.int8_dequantize(weight, scale, dtype), y.to(dtype))
    ids = torch.tensor([[19, 0, 7]], dtype=torch.int32)
    assert_equal(ops.int8_embedding(ids, weight, scale), y[ids.long()])
    cubes = weight.view(2, 10, k), scale.view(2, 2, 10).transpose(0, 1)
    assert_equal(ops.int8_dequantize(*cubes).view(20, k), y)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("k", KS)
def test_int8_linear_with_offsets_matches_the_oracle(isa, k, bits):
    for m, n in ((1, 33), (5, 17), (17, 50)):
        x, weight, scale, bias = case(m, n, k, seed=k)
        y = ops.int8_linear(x, weight, scale, bias, bits)
        expected, bound = expected_linear(x, weight, scale, bias, bits)
        if isa == "torch":  # sums the dequantized weight in float32
            w = weight.double().abs() * scale[0, :, None].abs() + scale[1, :, None].abs()
            bound = bound + (k + 6) * EPS32 * (x.double().abs() @ w.T).numpy()
        assert_within(y, expected, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_int8_linear_with_offsets_rounds_half_types_once(isa, dtype, bits):
    if isa == "torch":
        pytest.skip("the plain torch path rounds the weight to the half type")
    x, weight, scale, bias = case(9, 37, 130)
    x, bias = x.to(dtype), bias.to(dtype)
    y = ops.int8_linear(x, weight, scale, bias, bits)
    assert y.dtype == dtype
    assert_within(y, *expected_linear(x, weight, scale, bias, bits, dtype))


@pytest.mark.parametrize("bits", [8, 16])
def test_int8_linear_with_offsets_has_the_same_bits_on_every_isa(bits):
    for m in (1, 2, 5, 16, 33):
        for n, k in ((1, 1), (33, 65), (100, 257)):
            x, weight, scale, bias = case(m, n, k, seed=m + n)
            with isa.cap("ref"):
                expected = ops.int8_linear(x, weight, scale, bias, bits)
            for name in C_ISAS[1:]:
                with isa.cap(name):
                    assert_equal(ops.int8_linear(x, weight, scale, bias, bits), expected)
                    parts = [ops.int8_linear(p, weight, scale, bias, bits) for p in x.split(3)]
                    assert_equal(torch.cat(parts), expected)


def test_int8_linear_with_offsets_special_cases(isa):
    x, weight, scale, bias = case(6, 20, 40)
    assert ops.int8_linear(x[:0], weight, scale, bias).shape == (0, 20)
    assert_equal(ops.int8_linear(x[:, :0], weight[:, :0], scale, bias), bias.expand(6, 20))
    x[2, 3] = float("inf")
    y = ops.int8_linear(x, weight, scale, bias)
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()
    # Zeros stand for the offset of their row.
    flat = ops.int8_linear(x[:1], torch.zeros_like(weight), scale)
    assert_within(flat, x[:1].double().sum() * scale[1:].double(), 1e-3)
