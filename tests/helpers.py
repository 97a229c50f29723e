"""Comparators and oracles for the kernel tests, proven in test_helpers.py to reject wrong answers.

Two ways to compare, and no others: :func:`assert_equal` (integers, and floats that must have the
same bits) and :func:`assert_within` (every element within its own derived bound). No relative
error of a whole tensor and no cosine: both let one wrong row, or a wrong scale, through.

Oracles use int64 and float64 NumPy, never the code under test. Letters: M rows (tokens), N out
features, K in features.
"""

import subprocess
import sys

import numpy as np
import torch
from torch import Tensor

EPS32 = float(np.finfo(np.float32).eps)  # spacing at 1: a rounding errs by half of it, relatively

# Unit roundoff of each dtype an operator may return.
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def run_python(code: str) -> str:
    """What a program prints in a process of its own, which must end well."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def to_numpy(x) -> np.ndarray:
    """Any tensor or array as NumPy; floats become float64, which holds every other exactly."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.double() if x.is_floating_point() else x).numpy()
    return np.asarray(x)


def _first(wrong: np.ndarray, actual: np.ndarray, expected: np.ndarray) -> str:
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    share = f"{int(wrong.sum())} of {wrong.size} elements"
    return f"{share}, first at {at}: got {actual[at]!r}, expected {expected[at]!r}"


def _same_shape(actual: np.ndarray, expected: np.ndarray) -> None:
    # No broadcasting: a [1, N] result against an [M, N] oracle is a wrong answer.
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"


def assert_equal(actual, expected) -> None:
    """Same shape, same dtype (of two tensors), same values; NaN equals NaN and nothing else.

    ``-0.0`` equals ``0.0``: a kernel may not depend on the sign of a zero.
    """
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    actual, expected = to_numpy(actual), to_numpy(expected)
    _same_shape(actual, expected)
    wrong = actual != expected
    if np.issubdtype(actual.dtype, np.floating) and np.issubdtype(expected.dtype, np.floating):
        wrong &= ~(np.isnan(actual) & np.isnan(expected))
    assert not wrong.any(), f"not equal: {_first(wrong, actual, expected)}"


def assert_within(actual, expected, bound) -> None:
    """``|actual - expected| <= bound`` for every element; NaN exactly where NaN is expected.

    Args:
        bound: float or array that broadcasts to the shape; must be finite and >= 0, so that a
            bound spoilt by a NaN or an infinity cannot accept everything.
    """
    actual, expected = to_numpy(actual).astype(np.float64), to_numpy(expected).astype(np.float64)
    _same_shape(actual, expected)
    bound = np.broadcast_to(np.asarray(to_numpy(bound), np.float64), expected.shape)
    assert np.isfinite(bound).all() and (bound >= 0).all(), "the bound is not finite and >= 0"
    nan = np.isnan(expected)
    wrong = np.isnan(actual) != nan
    assert not wrong.any(), f"NaN in the wrong places: {_first(wrong, actual, expected)}"
    with np.errstate(invalid="ignore"):  # inf - inf: the equality below settles it
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
    wrong = ~nan & ~(error <= bound)
    if wrong.any():
        worst = np.unravel_index(np.nanargmax(np.where(wrong, error - bound, -1)), wrong.shape)
        raise AssertionError(
            f"out of bound: {_first(wrong, actual, expected)}; worst at "
            f"{tuple(int(i) for i in worst)}: error {error[worst]:.3g} > bound {bound[worst]:.3g}"
        )


# -- oracles -----------------------------------------------------------------------------------


def quantize_rows(x, q_max: int) -> tuple[np.ndarray, np.ndarray]:
    """The specification of row quantization, op for op in float32, as csrc's reference has it.

    ``scale = absmax / q_max``; ``q = round_to_even(x * (q_max / absmax))`` clipped to +-q_max. A
    row whose absmax is <= 1e-30 is zero with scale 0; a non-finite row has q 0 and scale NaN.

    Returns:
        int64 ``[..., K]`` and float32 ``[...]``.
    """
    x = to_numpy(x).astype(np.float32)
    if x.shape[-1] == 0:
        return x.astype(np.int64), np.zeros(x.shape[:-1], np.float32)
    absmax = np.abs(x).max(-1)
    finite = np.isfinite(absmax)
    live = finite & (absmax > np.float32(1e-30))
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(live, np.float32(q_max) / absmax, np.float32(0)).astype(np.float32)
        q = np.rint(np.where(live[..., None], x, np.float32(0)) * inverse[..., None])
        scale = np.where(live, absmax / np.float32(q_max), np.float32(0)).astype(np.float32)
    q = np.clip(q, -q_max, q_max).astype(np.int64)
    return q, np.where(finite, scale, np.float32(np.nan)).astype(np.float32)


def quantize_weight_rows(x) -> tuple[np.ndarray, np.ndarray]:
    """The specification of weight quantization: the clip of least squared error, in integers.

    Returns:
        int64 ``[N, K]`` in [-127, 127] and float32 ``[N]``.
    """
    x = to_numpy(x).astype(np.float32)
    fixed, step = quantize_rows(x, 127 * 256)
    q, scale = np.zeros_like(fixed), step.copy()
    for row in np.flatnonzero(step > 0):
        best = -1.0
        for clip in range(16):
            candidate = np.clip((fixed[row] * (128 + clip) + 2**14) >> 15, -127, 127)
            xq = float((fixed[row] * candidate).sum())
            ratio = xq / float((candidate * candidate).sum())
            if ratio * xq > best:
                best, q[row] = ratio * xq, candidate
                scale[row] = np.float32(ratio * float(np.abs(x[row]).max()) / 32512.0)
    return q, scale


def weight_error(rows: Tensor) -> Tensor:
    """Bound on the Euclidean error of int8 rows ``[..., K]``: float64 ``[...]``.

    The plain grid absmax / 127 errs by half a step per weight, and the search never does worse;
    1 % more for its fixed point. Single weights may move further: clipped, or by the refit scale.
    """
    return 0.505 * rows.double().abs().amax(-1) / 127 * rows.shape[-1] ** 0.5


def dequantize(weight, scale) -> np.ndarray:
    """``weight * scale`` per row in float64: ``[..., K]``."""
    return to_numpy(weight).astype(np.float64) * to_numpy(scale).astype(np.float64)[..., None]


def integer_dot(x_q: np.ndarray, weight) -> np.ndarray:
    """Exact int64 products: x_q ``[M, K]``, weight ``[N, K]`` -> ``[M, N]``."""
    return x_q.astype(np.int64) @ to_numpy(weight).astype(np.int64).T


def linear(
    x, weight, scale, bias=None, q_max: int | None = None, out: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray]:
    """``x @ (weight * scale).T + bias`` and how far a correct kernel may be from it.

    With ``q_max`` (127 for a8, 32384 for a16) the activations are quantized first, the products
    are exact integers, and only the epilogue rounds: converting the integer to float32, two
    multiplications by scales, the bias addition: 4 roundings, of which each errs by at most half
    an ulp of an intermediate no larger than ``|y| + |bias|``; one more converts to ``out``.
    Without ``q_max`` (a32) a float32 sum of K products in any order errs by at most
    ``K * EPS32 * sum |x w|``.

    Args:
        x: ``[M, K]``; weight: int8 ``[N, K]``; scale: float32 ``[N]``; bias: ``[N]`` or None.

    Returns:
        float64 ``[M, N]`` and the bound ``[M, N]`` for :func:`assert_within` (0 where NaN).
    """
    x = to_numpy(x).astype(np.float64)
    w, s = to_numpy(weight).astype(np.int64), to_numpy(scale).astype(np.float64)
    b = np.zeros(len(w)) if bias is None else to_numpy(bias).astype(np.float64)
    k = x.shape[-1]
    if q_max is None:
        product = (x @ w.T.astype(np.float64)) * s
        with np.errstate(invalid="ignore"):
            size = (np.abs(x) @ np.abs(w).T.astype(np.float64)) * np.abs(s)
        rounding = (k + 4) * EPS32 * (size + np.abs(b))
    else:
        q, x_scale = quantize_rows(x, q_max)
        scales = x_scale.astype(np.float64)[:, None] * s
        product = integer_dot(q, w) * scales
        size = np.abs(product)
        if q_max > 127:  # a16 joins two planes in float32; they may cancel, their roundings do not
            high = np.rint(q / 254).astype(np.int64)
            planes = 254 * np.abs(integer_dot(high, w)) + np.abs(integer_dot(q - 254 * high, w))
            size = planes * np.abs(scales)
        rounding = 5 * EPS32 * (size + np.abs(b))
    y = product + b
    tiny = float(torch.finfo(out).smallest_normal) * 2.0**-7  # results may be subnormal
    bound = rounding + ROUNDOFF[out] * (np.abs(y) + rounding) + tiny
    return y, np.where(np.isnan(y), 0.0, bound)


def embedding(indices, weight, scale) -> np.ndarray:
    """Rows gathered and dequantized in float64: ``[*indices.shape, K]``."""
    return dequantize(weight, scale)[to_numpy(indices)]


def channel_stats(x) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """absmax, min, max and mean square of each channel of ``[M, K]`` in float64; M >= 1."""
    x = to_numpy(x).astype(np.float64)
    return np.abs(x).max(0), x.min(0), x.max(0), np.square(x).mean(0)


def gram(x) -> tuple[np.ndarray, np.ndarray]:
    """``x.T @ x`` of ``[M, K]`` in float64, and the bound of a float32 sum in any order."""
    x = to_numpy(x).astype(np.float64)
    return x.T @ x, (len(x) + 1) * EPS32 * (np.abs(x).T @ np.abs(x))


# -- inputs --------------------------------------------------------------------------------------


def heavy_tailed(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Student-t noise (3 degrees of freedom): with outliers, as real weights and activations."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(3, size=shape).astype(np.float32)).to(dtype)


def random_int8(*shape: int, seed: int = 0) -> Tensor:
    """Uniform int8 in [-127, 127]."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-127, 128, size=shape).astype(np.int8))


def wrong_answers(y: np.ndarray) -> dict[str, np.ndarray]:
    """What a plausible bug returns instead of ``y`` [M >= 2, N >= 32]; all must be rejected."""
    one_group, one_element = y.copy(), y.copy()
    one_group[-1, 16:32] = 0
    one_element[-1, -1] *= 1.01
    return {
        "all zeros": np.zeros_like(y),
        "twice the scale": 2 * y,
        "shifted by a row": np.roll(y, 1, axis=0),
        "shifted by a column": np.roll(y, 1, axis=1),
        "sign flipped": -y,
        "one bad group": one_group,
        "one element 1 % off": one_element,
        "one NaN": np.where(np.arange(y.size).reshape(y.shape) == y.size - 1, np.nan, y),
        "one row only": y[:1],
        "transposed": y.T,
    }
