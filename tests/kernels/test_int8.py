"""The int8 operators on every instruction set: exact where they promise it, bounded elsewhere."""

import numpy as np
import pytest
import torch
from helpers import (
    assert_equal,
    assert_within,
    dequantize,
    embedding,
    heavy_tailed,
    linear,
    quantize_weight_rows,
    random_int8,
)

from gpu_poor import isa, ops

DTYPES = ops.FLOATS
C_ISAS = [name for name in isa.available() if name != isa.TORCH]
# Around every vector width (8, 16, 32, 64) and the tiles of four and sixteen rows.
KS = (1, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 257)
MS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 40)
NS = (1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 50, 100)


def case(m, n, k, dtype=torch.float32, seed=0):
    x = heavy_tailed(m, k, seed=seed, dtype=dtype)
    weight = random_int8(n, k, seed=seed + 1)
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed)) / 100
    bias = heavy_tailed(n, seed=seed + 2, dtype=dtype)
    return x, weight, scale, bias


def test_dispatch_reports_what_runs():
    assert isa.available()[:2] == ("torch", "ref")
    for name in isa.available():
        with isa.cap(name):
            assert isa.current() == name
            assert set(isa.kernels().values()) <= set(isa.available())
            assert isa.kernels()["int8_linear"] == name
    with pytest.raises(ValueError, match="mmx"), isa.cap("mmx"):
        pass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", KS)
def test_int8_quantize_is_exact(isa, k, dtype):
    x = heavy_tailed(12, k, seed=k, dtype=dtype)
    x[1] = 0
    x[2] = 1e-32
    x[3, -1] = float("nan")
    x[4, 0] = float("-inf")
    x[5] = torch.finfo(dtype).max
    x[6] = -x[7]
    q, scale = ops.int8_quantize(x)
    expected_q, expected_scale = quantize_weight_rows(x)
    assert_equal(q.long(), torch.from_numpy(expected_q))
    assert_equal(scale, torch.from_numpy(expected_scale))
    assert q[:5].abs().sum() == q[0].abs().sum()  # zero, tiny and non-finite rows hold zeros
    assert scale[3:5].isnan().all() and (scale[1:3] == 0).all()


@pytest.mark.parametrize("k", [33, 257, 5000])
def test_int8_quantize_beats_the_plain_grid(k):
    """The squared error never exceeds that of absmax / 127, and is clearly less on real tails."""
    x = heavy_tailed(40, k)
    q, scale = ops.int8_quantize(x)
    plain_scale = x.abs().amax(1, keepdim=True) / 127
    plain = ((x / plain_scale).round() * plain_scale - x).square().sum(1)
    ours = (q.float() * scale[:, None] - x).square().sum(1)
    assert (ours <= plain * 1.002).all()  # the fixed point of 1/256 step may cost that much
    assert ours.sum() < 0.995 * plain.sum()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("k", KS)
def test_int8_linear_integer_modes_match_the_oracle(isa, k, bits):
    for m, n in ((1, 33), (5, 17), (17, 50)):
        x, weight, scale, bias = case(m, n, k, seed=m)
        y = ops.int8_linear(x, weight, scale, bias, bits)
        expected, bound = linear(x, weight, scale, bias, ops.Q_MAX[bits])
        if isa == "torch":  # sums the quantized activations in float32
            bound = bound + 2 * linear(x, weight, scale, bias)[1]
        assert_within(y, expected, bound)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", MS)
def test_int8_linear_has_the_same_bits_on_every_isa(m, bits):
    for n in NS:
        for k in (1, 33, 64, 130, 257):
            x, weight, scale, bias = case(m, n, k, seed=n + k)
            weight[0] = -128  # not produced by our quantizer, but exact all the same
            with isa.cap("ref"):
                expected = ops.int8_linear(x, weight, scale, bias, bits)
            for name in C_ISAS[1:]:
                with isa.cap(name):
                    assert_equal(ops.int8_linear(x, weight, scale, bias, bits), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_int8_linear_half_types(isa, dtype, bits):
    for m, n, k in ((1, 20, 70), (19, 37, 128)):
        x, weight, scale, bias = case(m, n, k, dtype)
        y = ops.int8_linear(x, weight, scale, bias, bits)
        assert y.dtype == dtype
        expected, bound = linear(x, weight, scale, bias, ops.Q_MAX.get(bits), dtype)
        if isa == "torch":  # its weight, too, is rounded to the half type before the product
            size = np.abs(dequantize(weight, scale)) @ np.abs(x.double().numpy()).T
            bound = bound + 3 * torch.finfo(dtype).eps * size.T
        assert_within(y, expected, bound)


@pytest.mark.parametrize("k", KS)
def test_int8_linear_a32_is_within_its_bound(isa, k):
    for m, n in ((1, 7), (2, 33), (9, 17)):
        x, weight, scale, bias = case(m, n, k, seed=k)
        y = ops.int8_linear(x, weight, scale, bias, 32)
        assert_within(y, *linear(x, weight, scale, bias))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_int8_linear_does_not_depend_on_the_split_of_tokens(isa, bits):
    if isa == "torch" and bits == 32:
        pytest.skip("torch's own matmul: its sums depend on M")
    x, weight, scale, bias = case(37, 70, 200)
    whole = ops.int8_linear(x, weight, scale, bias, bits)
    for size in (1, 2, 3, 5, 16, 20):
        parts = [ops.int8_linear(p, weight, scale, bias, bits) for p in x.split(size)]
        if isa == "torch":
            assert_within(torch.cat(parts), whole, 1e-4)
        else:
            assert_equal(torch.cat(parts), whole)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_int8_linear_does_not_depend_on_threads(isa, bits):
    x, weight, scale, bias = case(20, 1000, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.int8_linear(x, weight, scale, bias, bits))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        if isa == "torch":
            assert_within(result, results[0], 1e-4)
        else:
            assert_equal(result, results[0])


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("k", [64, 4096, 66311, 66312])
def test_int8_linear_extremes_do_not_overflow(isa, k, bits):
    """The largest products of one sign: 127 * 127 * K, past int32's range from K = 133,144 on."""
    for sign in (1, -1):
        x = torch.full((9, k), sign * 3.0)
        weight = torch.full((18, k), 127, dtype=torch.int8)
        weight[1::2] = -127
        scale = torch.full((18,), 1e-3)
        y = ops.int8_linear(x, weight, scale, None, bits)
        assert_within(y, *linear(x, weight, scale, None, ops.Q_MAX[bits]))


def test_int8_linear_longer_than_int32_can_hold(isa):
    k = 140_000
    x, weight = torch.ones(1, k), torch.full((2, k), 127, dtype=torch.int8)
    y = ops.int8_linear(x, weight, torch.ones(2), None, 8)
    assert_within(y, *linear(x, weight, torch.ones(2), None, 127))


@pytest.mark.parametrize("bits", [8, 16])
def test_int8_linear_non_finite_tokens_give_nan_rows_only(isa, bits):
    x, weight, scale, bias = case(20, 40, 100)
    good = ops.int8_linear(x, weight, scale, bias, bits)
    x[2, 50], x[19, 0] = float("inf"), float("nan")
    y = ops.int8_linear(x, weight, scale, bias, bits)
    good[2], good[19] = float("nan"), float("nan")
    if isa == "torch":
        assert_within(y, good, 1e-4)
    else:
        assert_equal(y, good)


def test_int8_linear_shapes_and_strides(isa):
    x, weight, scale, bias = case(24, 10, 30)
    if isa == "torch":  # its float sums depend on M: small integers sum exactly in any order
        x, scale = x.round().clamp(-127, 127), torch.full((10,), 2.0**-7)
        x[:, 0], bias = 32384.0, bias.round()
    flat = ops.int8_linear(x, weight, scale, bias)
    assert_equal(ops.int8_linear(x.view(2, 3, 4, 30), weight, scale, bias).view(24, 10), flat)
    assert_equal(ops.int8_linear(x[0], weight, scale, bias), flat[0])
    strided = torch.stack([x, x], -1).transpose(0, 1)[..., 0].transpose(0, 1)
    assert not strided.is_contiguous()
    assert_equal(ops.int8_linear(strided, weight, scale, bias), flat)
    columns = weight.t().contiguous().t()
    assert not columns.is_contiguous()
    assert_equal(ops.int8_linear(x, columns, scale, bias), flat)
    assert ops.int8_linear(x[:0], weight, scale, bias).shape == (0, 10)
    assert ops.int8_linear(x, weight[:0], scale[:0]).shape == (24, 0)
    empty = ops.int8_linear(x[:, :0], weight[:, :0], scale, bias)
    assert_equal(empty, bias.expand(24, 10))
    unaligned = torch.empty(24 * 30 + 1)[1:].view(24, 30).copy_(x)
    assert_equal(ops.int8_linear(unaligned, weight, scale, bias), flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", KS)
def test_int8_dequantize(isa, k, dtype):
    weight, scale = random_int8(9, k), torch.rand(9)
    y = ops.int8_dequantize(weight, scale, dtype)
    assert_equal(y, (weight.float() * scale[:, None]).to(dtype))
    assert_equal(
        ops.int8_dequantize(weight.view(3, 3, k), scale.view(3, 3), dtype), y.view(3, 3, k)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_int8_embedding(isa, dtype, index_dtype):
    weight, scale = random_int8(50, 70), torch.rand(50)
    indices = torch.tensor([[0, 49, 7], [7, 1, 0]], dtype=index_dtype)
    y = ops.int8_embedding(indices, weight, scale, dtype)
    assert y.dtype == dtype and y.shape == (2, 3, 70)
    expected = torch.from_numpy(embedding(indices.long(), weight, scale)).float().to(dtype)
    assert_equal(y, expected)
    assert ops.int8_embedding(indices[:0], weight, scale, dtype).shape == (0, 3, 70)


def test_conversions_of_every_half_value(isa):
    """All 65536 bit patterns in, and their neighbourhood out, agree with torch's own rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(65536).to(torch.uint16).view(dtype)
        finite = values[values.isfinite()]
        # One row each: its single element quantizes to +-127 with scale |x| / 127, rounded once.
        q, scale = ops.int8_quantize(finite[:, None])
        live = finite.float().abs() > 1e-30
        expected = (finite.double().abs() * (32512 / 127) / 32512).float()
        assert_equal(scale, torch.where(live, expected, 0.0))
        assert_equal(q[:, 0].float(), torch.where(live, finite.float().sign() * 127, 0.0))
        ones = torch.ones(1, 1, dtype=torch.int8)
        for nudge in (0.0, 0.25, 0.5, 0.75, 1.0):  # ulps of the half type
            wide = finite.float() * (1 + nudge * torch.finfo(dtype).eps)
            y = ops.int8_dequantize(ones.expand(len(wide), 1), wide, dtype)
            assert_equal(y[:, 0], wide.to(dtype))


def test_no_columns_are_no_error(isa):
    none = torch.zeros(3, 0)
    assert ops.int8_quantize(none)[1].tolist() == [0, 0, 0]
    assert ops.channel_stats(none)[0].shape == (0,)
    assert ops.gram_(torch.zeros(0, 0), none).shape == (0, 0)
