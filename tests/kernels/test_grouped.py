"""Grouped weights on every instruction set: one order of every rounding, so the same bits."""

from itertools import product

import numpy as np
import pytest
import torch
from helpers import EPS32, ROUNDOFF, assert_equal, assert_within, heavy_tailed, quantize_rows

from gpu_poor import isa, ops

C_ISAS = [name for name in isa.available() if name != isa.TORCH]
GROUPS = (32, 64, 96, 128)
# Around blocks of 32, vectors of 64, and every group.
KS = (1, 16, 31, 32, 33, 63, 64, 65, 97, 128, 130, 200, 257)
NS = (1, 15, 16, 17, 33, 64, 100, 150)

# Bits of a weight, and whether its groups have minima.
each_kind = pytest.mark.parametrize(
    "wbits, asymmetric", [(4, False), (4, True), (8, False), (8, True)], ids=str
)


def unpacked(weight, scale, group, n, k):
    """q, scale and minimum of each weight ``[n, k]``, by the layout in csrc/gpu_poor.h."""
    w, s = weight.view(torch.uint8).numpy(), scale.float().numpy().astype(np.float64)
    row, column = np.ix_(np.arange(n), np.arange(k))
    i, wbits = column % 32, w.shape[2] // 64
    byte = w[row // 16, column // 32, i // 4 % wbits * 64 + row % 16 * 4 + i % 4].astype(int)
    q = byte if wbits == 8 else np.where(i < 16, byte & 15, byte >> 4)
    value = np.zeros((2, n, k))
    for part in range(s.shape[2]):
        value[part] = s[row // 16, column // group, part, row % 16]
    return q, *value


def oracle(weight, scale, group, n, k):
    """The weight ``[n, k]`` in float64."""
    q, s, m = unpacked(weight, scale, group, n, k)
    return s * q + m if scale.shape[2] == 2 else s * (q - zero_of(weight))


def zero_of(weight):
    """The q that stands for 0 in a symmetric weight."""
    return 8 if weight.shape[2] == 256 else 128


def random_weight(n, k, group, wbits, asymmetric, seed=0):
    """Any bytes and finite halves, of either sign, in panels; not only what a quantizer makes."""
    rng = np.random.default_rng(seed)
    panels, blocks, groups = -(-n // 16), -(-k // 32), -(-k // group)
    weight = rng.integers(0, 256, (panels, blocks, 64 * wbits), dtype=np.uint8)
    scale = rng.standard_normal((panels, groups, 1 + asymmetric, 16)) / 100
    return torch.from_numpy(weight).view(torch.int8), torch.from_numpy(scale).half()


def case(m, n, k, group, wbits, asymmetric, seed=0):
    x, bias = heavy_tailed(m, k, seed=seed), heavy_tailed(n, seed=seed + 2)
    return x, *random_weight(n, k, group, wbits, asymmetric, seed + 1), bias


def expected_linear(x, weight, scale, bias, group, bits, out=torch.float32):
    """float64 result and bound: a rounding for each group's two sums, the scale and the bias."""
    n, k = len(bias), x.shape[1]
    q, s, m = unpacked(weight, scale, group, n, k)
    asymmetric = scale.shape[2] == 2
    xq, x_scale = x.double().numpy(), 1.0
    if bits != 32:
        xq, x_scale = quantize_rows(xq, ops.Q_MAX[bits])
        x_scale = x_scale.astype(np.float64)[:, None]
    zero = zero_of(weight)
    w = s * q + m if asymmetric else s * (q - zero)
    y = (xq @ w.T) * x_scale + bias.double().numpy()
    size = (np.abs(xq) @ (np.abs(s) * np.maximum(q, zero) + np.abs(m)).T) * x_scale
    size = size + np.abs(bias.double().numpy())
    roundings = 2 * -(-k // group) + 6 + (k if bits == 32 else 0)
    bound = roundings * EPS32 * size
    return y, bound + ROUNDOFF[out] * (np.abs(y) + bound) + 1e-30


@each_kind
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("k", KS)
def test_grouped_dequantize_follows_the_layout(isa, k, group, wbits, asymmetric):
    for n in (1, 17, 33):
        weight, scale = random_weight(n, k, group, wbits, asymmetric, seed=k)
        y = ops.grouped_dequantize(weight, scale, group, n, k)
        assert_equal(y, torch.from_numpy(oracle(weight, scale, group, n, k)).float())
        for dtype in (torch.bfloat16, torch.float16):
            assert_equal(ops.grouped_dequantize(weight, scale, group, n, k, dtype), y.to(dtype))
        ids = torch.tensor([[n - 1, 0, n // 2]], dtype=torch.int32)
        assert_equal(ops.grouped_embedding(ids, weight, scale, group, n, k), y[ids.long()])


@each_kind
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_quantize_has_the_same_bits_on_every_isa(group, search, wbits, asymmetric):
    for n, k in ((1, 1), (17, 33), (20, 130), (33, 257)):
        x = heavy_tailed(n, k, seed=k)
        x[n // 2, : k // 2] = 0
        importance = torch.rand(k) if k % 2 else None
        with isa.cap("ref"):
            expected = ops.grouped_quantize(x, group, asymmetric, search, importance, wbits)
        for name in C_ISAS[1:]:
            with isa.cap(name):
                got = ops.grouped_quantize(x, group, asymmetric, search, importance, wbits)
            for a, b in zip(got, expected, strict=True):
                assert_equal(a.view(torch.uint8), b.view(torch.uint8))
        halves, same = (
            ops.grouped_quantize(y, group, asymmetric, search, importance, wbits)
            for y in (x.bfloat16(), x.bfloat16().float())
        )
        assert_equal(halves[0], same[0])


@each_kind
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_quantize_rounds_to_the_nearest(isa, group, wbits, asymmetric):
    """No other q is nearer, for the stored scale; padding stands for 0."""
    n, k = 19, 200
    x = heavy_tailed(n, k, seed=group)
    for search in (False, True):
        weight, scale = ops.grouped_quantize(x, group, asymmetric, search, bits=wbits)
        q, s, m = unpacked(weight, scale, group, n, k)
        zero = 0 if asymmetric else zero_of(weight)
        grid = s[..., None] * (np.arange(2**wbits) - zero) + m[..., None]
        errors = np.abs(grid - x.double().numpy()[..., None])
        chosen = np.take_along_axis(errors, q[..., None], -1)[..., 0]
        assert (chosen <= errors.min(-1) + 1e-6 * np.abs(s)).all()
        padded, *_ = unpacked(weight, scale, group, 32, 224)
        assert (padded[:, k:] == zero).all() and (padded[n:] == zero).all()


@each_kind
@pytest.mark.parametrize("group", [32, 128])
def test_grouped_search_beats_the_plain_grid(isa, group, wbits, asymmetric):
    x = heavy_tailed(64, 300, seed=3)
    importance = torch.rand(300) ** 4

    def error(search, h):
        stored = ops.grouped_quantize(x, group, asymmetric, search, h, wbits)
        y = ops.grouped_dequantize(*stored, group, 64, 300)
        return ((y - x).square() * (1.0 if h is None else h)).sum()

    limit = 0.95 if wbits == 8 else 0.8 if asymmetric else 0.75
    assert error(True, None) < limit * error(False, None)
    stored = ops.grouped_quantize(x, group, asymmetric, True, bits=wbits)
    y = ops.grouped_dequantize(*stored, group, 64, 300)
    assert error(True, importance) < 0.97 * ((y - x).square() * importance).sum()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_grouped_search_is_near_the_best_of_a_fine_one(asymmetric):
    """Of 4 bits: within 1.5 % of the best of 4000 grids for each group, on the whole."""
    x = heavy_tailed(400, 32, seed=9)
    stored = ops.grouped_quantize(x, 32, asymmetric)
    ours = (ops.grouped_dequantize(*stored, 32, 400, 32) - x).square().sum(1)
    low, high = x.amin(1), x.amax(1)
    best = torch.full((400,), float("inf"))
    for width in np.linspace(0.4, 1.1, 100 if asymmetric else 2000):
        for at in np.linspace(-0.1, 0.6, 40) if asymmetric else (-1, 1):
            if asymmetric:
                m, s, top = low + (high - low) * at, (high - low) * width / 15, 15
            else:
                m, s, top = torch.zeros(400), at * x.abs().amax(1) * width / 7.0, 7
            q = ((x - m[:, None]) / s[:, None]).round().clamp(top - 15, top)
            best = torch.minimum(best, (q * s[:, None] + m[:, None] - x).square().sum(1))
    assert ours.sum() <= 1.015 * best.sum()


@pytest.mark.parametrize("wbits", [4, 8])
def test_grouped_search_far_from_zero(isa, wbits):
    """Sums of values that are not centred would lose what the search compares: 0.932 at 8 bits."""
    x = 1 + torch.rand(64, 256)
    errors = []
    for search in (True, False):
        stored = ops.grouped_quantize(x, 128, True, search, bits=wbits)
        errors.append((ops.grouped_dequantize(*stored, 128, 64, 256) - x).square().sum())
    assert errors[0] < 0.92 * errors[1]


@pytest.mark.parametrize("wbits", [4, 8])
def test_grouped_quantize_special_groups(isa, wbits):
    x = heavy_tailed(8, 70)
    x[1] = 0
    x[2, 40] = float("nan")
    x[3, 0] = float("-inf")
    x[4] = 0.25
    x[5] = 1e-30
    x[6, :32] = 3e38
    for asymmetric in (False, True):
        for search in (False, True):
            weight, scale = ops.grouped_quantize(x, 32, asymmetric, search, bits=wbits)
            y = ops.grouped_dequantize(weight, scale, 32, 8, 70)
            assert (y[1] == 0).all() and (y[5] == 0).all()
            nan = scale[0, :, 0, :8].isnan().T  # [row, group]
            expected = torch.zeros(8, 3, dtype=torch.bool)
            expected[2, 1] = expected[3, 0] = expected[6, 0] = True
            assert_equal(nan, expected)
            assert_within(y[4], x[4], 0.25 / 128)


@pytest.mark.parametrize("bits", [8, 16, 32])
@each_kind
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_linear_matches_the_oracle(isa, group, wbits, asymmetric, bits):
    for m, n, k in ((1, 33, 65), (5, 17, 200), (17, 50, 96), (2, 1, 1)):
        x, weight, scale, bias = case(m, n, k, group, wbits, asymmetric, seed=k)
        y = ops.grouped_linear(x, weight, scale, bias, group, n, bits)
        expected, bound = expected_linear(x, weight, scale, bias, group, bits)
        if isa == "torch":  # sums over all of K in float32
            bound = bound + 2 * expected_linear(x, weight, scale, bias, group, 32)[1]
        assert_within(y, expected, bound)


@pytest.mark.parametrize("bits", [8, 16, 32])
@each_kind
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 8, 9, 17])
def test_grouped_linear_has_the_same_bits_on_every_isa(m, wbits, asymmetric, bits):
    for n in NS:
        for k, group in ((1, 32), (33, 32), (64, 64), (130, 128), (257, 96)):
            x, weight, scale, bias = case(m, n, k, group, wbits, asymmetric, seed=n + k)
            with isa.cap("ref"):
                expected = ops.grouped_linear(x, weight, scale, bias, group, n, bits)
            for name in C_ISAS[1:]:
                with isa.cap(name):
                    y = ops.grouped_linear(x, weight, scale, bias, group, n, bits)
                assert_equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 16, 32])
@each_kind
def test_grouped_linear_half_types(isa, dtype, wbits, asymmetric, bits):
    x, weight, scale, bias = case(9, 37, 128, 32, wbits, asymmetric)
    x, bias = x.to(dtype), bias.to(dtype)
    y = ops.grouped_linear(x, weight, scale, bias, 32, 37, bits)
    assert y.dtype == dtype
    expected, bound = expected_linear(x, weight, scale, bias, 32, bits, dtype)
    if isa == "torch":  # its weight, too, is rounded to the half type before the product
        w = np.abs(oracle(weight, scale, 32, 37, 128))
        bound = bound + 4 * torch.finfo(dtype).eps * (np.abs(x.double().numpy()) @ w.T)
    assert_within(y, expected, bound)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("wbits", [4, 8])
def test_grouped_linear_does_not_depend_on_threads_or_the_split_of_tokens(isa, wbits, bits):
    if isa == "torch":
        pytest.skip("torch's own matmul: its sums depend on M")
    x, weight, scale, bias = case(37, 1000, 200, 64, wbits, True)
    whole = ops.grouped_linear(x, weight, scale, bias, 64, 1000, bits)
    for size in (1, 2, 3, 5, 16, 20):
        parts = [ops.grouped_linear(p, weight, scale, bias, 64, 1000, bits) for p in x.split(size)]
        assert_equal(torch.cat(parts), whole)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_equal(ops.grouped_linear(x, weight, scale, bias, 64, 1000, bits), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_linear_extremes_do_not_overflow(isa, group, bits):
    """Largest weights times largest activations, which are where int16 and int32 come closest."""
    k = 2 * group
    for wbits, byte, asymmetric in product((4, 8), (-1, 0), (False, True)):
        weight = torch.full(
            (1, k // 32, 64 * wbits), byte, dtype=torch.int8
        )  # every q largest, or 0
        scale = torch.full((1, 2, 1 + asymmetric, 16), 0.5, dtype=torch.float16)
        for sign in (1, -1):
            x, bias = torch.full((3, k), sign * 3.0), torch.zeros(16)
            y = ops.grouped_linear(x, weight, scale, bias, group, 16, bits)
            expected, bound = expected_linear(x, weight, scale, bias, group, bits)
            slack = 1e-6 * k * 3 * 128 if isa == "torch" else 0
            assert_within(y, expected, bound + slack)


@pytest.mark.parametrize("bits", [8, 16])
def test_grouped_linear_non_finite_tokens_give_nan_rows_only(isa, bits):
    x, weight, scale, bias = case(9, 40, 100, 32, 4, True)
    good = ops.grouped_linear(x, weight, scale, bias, 32, 40, bits)
    x[2, 50], x[8, 0] = float("inf"), float("nan")
    y = ops.grouped_linear(x, weight, scale, bias, 32, 40, bits)
    good[2], good[8] = float("nan"), float("nan")
    assert_within(y, good, 1e-4 if isa == "torch" else 0)


def test_grouped_linear_shapes_and_strides(isa):
    x, weight, scale, bias = case(24, 10, 40, 32, 4, False)
    tolerance = 1e-5 if isa == "torch" else 0
    flat = ops.grouped_linear(x, weight, scale, bias, 32, 10)
    cubes = ops.grouped_linear(x.view(2, 3, 4, 40), weight, scale, bias, 32, 10)
    assert_within(cubes.view(24, 10), flat, tolerance)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert_within(ops.grouped_linear(strided, weight, scale, bias, 32, 10), flat, tolerance)
    assert_within(ops.grouped_linear(x[0], weight, scale, bias, 32, 10), flat[0], tolerance)
    assert ops.grouped_linear(x[:0], weight, scale, bias, 32, 10).shape == (0, 10)
    none = ops.grouped_quantize(torch.zeros(10, 0), 32)
    assert_equal(ops.grouped_linear(x[:, :0], *none, bias, 32, 10), bias.expand(24, 10))
    nobody = ops.grouped_quantize(torch.zeros(0, 40), 32)
    assert ops.grouped_linear(x, *nobody, None, 32, 0).shape == (24, 0)
    buffer = torch.empty(weight.numel() + 1, dtype=torch.int8)[1:].view(weight.shape)
    moved = buffer.copy_(weight)  # at an odd address
    assert_within(ops.grouped_linear(x, moved, scale, bias, 32, 10), flat, tolerance)


def test_grouped_holds_q8_0_exactly(isa):
    """GGUF's Q8_0: w = d q for 32 columns, d float16, q int8, -128 included."""
    rng = np.random.default_rng(3)
    q = torch.from_numpy(rng.integers(-128, 128, (30, 90), dtype=np.int8))
    d = torch.from_numpy(rng.standard_normal((30, 3))).half()
    weight, scale = ops.grouped_pack((q.int() + 128).to(torch.uint8), d, None, 8)
    expected = q.double() * d.double().repeat_interleave(32, 1)[:, :90]
    assert_equal(ops.grouped_dequantize(weight, scale, 32, 30, 90), expected.float())


@each_kind
def test_grouped_pack_is_undone_by_unpack(isa, wbits, asymmetric):
    for n, k, group in ((1, 1, 32), (20, 70, 64), (32, 96, 32)):
        rows = heavy_tailed(n, k, seed=k)
        stored = ops.grouped_quantize(rows, group, asymmetric, bits=wbits)
        q, scale, minimum = (torch.from_numpy(part) for part in unpacked(*stored, group, n, k))
        assert_equal(ops.grouped_unpack(stored[0], n, k), q.to(torch.uint8))
        scale, minimum = scale[:, ::group].half(), minimum[:, ::group].half()
        again = ops.grouped_pack(q.to(torch.uint8), scale, minimum if asymmetric else None, wbits)
        for a, b in zip(again, stored, strict=True):
            assert_equal(a, b)


X = heavy_tailed(4, 40)
