"""The comparators reject wrong answers and the oracles agree with hand-worked numbers."""

import helpers as h
import numpy as np
import pytest
import torch

X = h.heavy_tailed(6, 48, seed=1)
W, SCALE = h.random_int8(64, 48, seed=2), torch.rand(64, generator=torch.manual_seed(3)) + 0.1
BIAS = h.heavy_tailed(64, seed=4)


@pytest.mark.parametrize("q_max", [127, 32384, None])
@pytest.mark.parametrize("wrong", list(h.wrong_answers(np.ones((2, 32)))))
def test_wrong_linear_is_rejected(q_max, wrong):
    y, bound = h.linear(X, W, SCALE, BIAS, q_max)
    h.assert_within(y, y, bound)
    bad = h.wrong_answers(y)[wrong]
    with pytest.raises(AssertionError):
        h.assert_within(bad, y, bound)
    with pytest.raises(AssertionError):
        h.assert_equal(bad, y)


def test_another_activation_mode_is_rejected():
    """a8's error is far outside the bounds of a16 and a32, and a16's outside a32's."""
    a8, _ = h.linear(X, W, SCALE, BIAS, 127)
    a16, bound16 = h.linear(X, W, SCALE, BIAS, 32384)
    a32, bound32 = h.linear(X, W, SCALE, BIAS, None)
    for y, expected, bound in ((a8, a16, bound16), (a8, a32, bound32), (a16, a32, bound32)):
        with pytest.raises(AssertionError):
            h.assert_within(y, expected, bound)


@pytest.mark.parametrize("q_max", [127, 32384, None])
@pytest.mark.parametrize("dtype", list(h.ROUNDOFF))
def test_a_float32_linear_is_accepted(q_max, dtype):
    """The bounds are not so tight that an honest float32 computation fails them."""
    y, bound = h.linear(X, W, SCALE, BIAS, q_max, out=dtype)
    if q_max is None:
        got = (X @ W.float().T) * SCALE + BIAS
    else:
        q, x_scale = h.quantize_rows(X, q_max)
        dot = torch.from_numpy(h.integer_dot(q, W)).float()
        got = dot * torch.from_numpy(x_scale)[:, None] * SCALE + BIAS
    h.assert_within(got.to(dtype), y, bound)


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), -1.0])
def test_a_spoilt_bound_is_refused(bound):
    with pytest.raises(AssertionError, match="bound is not finite"):
        h.assert_within(np.ones(3), np.ones(3), bound)


def test_assert_equal_and_nan():
    h.assert_equal(np.array([1.0, np.nan]), np.array([1.0, np.nan]))
    for bad in ([1.0, 1.0], [np.nan, np.nan], [np.nan, 1.0]):
        with pytest.raises(AssertionError):
            h.assert_equal(np.array(bad), np.array([1.0, np.nan]))
        with pytest.raises(AssertionError):
            h.assert_within(np.array(bad), np.array([1.0, np.nan]), 0.5)
    with pytest.raises(AssertionError, match="dtype"):
        h.assert_equal(torch.ones(2), torch.ones(2, dtype=torch.float64))
    with pytest.raises(AssertionError, match="shape"):
        h.assert_equal(torch.ones(1, 2), torch.ones(2))


def test_one_ulp_is_not_equal():
    a = np.float32([1.0])
    with pytest.raises(AssertionError):
        h.assert_equal(np.nextafter(a, np.float32(2)), a)


def test_quantize_rows_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1.0, float("inf"), 0.0]])
    q, scale = h.quantize_rows(x, 127)
    # 63.5 goes to the even 64; 31.75 to 32.
    np.testing.assert_array_equal(q, [[64, -127, 32], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(scale, np.float32([2 / 127, 0, np.nan]))


def test_quantize_weight_rows_by_hand():
    x = np.float32([[127, -1, 0], [0, 0, 0], [1, np.inf, 0]])
    q, scale = h.quantize_weight_rows(x)
    np.testing.assert_array_equal(q, [[127, -1, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(scale, np.float32([1, 0, np.nan]))


def test_quantize_rows_errs_by_half_a_step():
    q, scale = h.quantize_rows(X, 127)
    assert np.abs(q).max(-1).tolist() == [127] * len(X)
    h.assert_within(h.dequantize(q, scale), X, 0.5001 * scale.astype(np.float64)[:, None])


def test_oracles_by_hand():
    w, s = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([0.5, 2.0])
    y, _ = h.linear(torch.tensor([[1.0, 10.0]]), w, s, torch.tensor([100.0, 0.0]))
    np.testing.assert_array_equal(y, [[90.5, 86.0]])
    np.testing.assert_array_equal(h.embedding(torch.tensor([1, 0]), w, s), [[6, 8], [0.5, -1]])
    absmax, low, high, square = h.channel_stats(torch.tensor([[1.0, -5.0], [3.0, 1.0]]))
    np.testing.assert_array_equal(absmax, [3, 5])
    np.testing.assert_array_equal(low, [1, -5])
    np.testing.assert_array_equal(high, [3, 1])
    np.testing.assert_array_equal(square, [5, 13])
    np.testing.assert_array_equal(
        h.gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))[0], [[1, 2], [2, 13]]
    )
