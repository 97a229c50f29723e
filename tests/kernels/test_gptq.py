"""ops.gptq against float64: every level, scale and sweep is what the algorithm says it is."""

import numpy as np
import pytest
import torch
from helpers import assert_equal, heavy_tailed, to_numpy

from gpu_poor import isa, ops
from gpu_poor.ops.gptq import GROUP_MAX

C_ISAS = [name for name in isa.available() if name != isa.TORCH]
#: ``{bits: {asymmetric: levels}}`` of groups.
LEVELS = {4: {False: (-8, 7), True: (0, 15)}, 8: {False: (-128, 127), True: (0, 255)}}
#: A whole row, whose scale is no half.
ROW = (10**6, (-127, 127), False)
#: Of a step: float32 feedback over K columns against float64.
TIE = 2e-3


def problem(n, k, seed=0):
    """A weight, the Gram matrix H of correlated inputs, and U with U^T U = H^-1."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    x = rng.standard_normal((3 * k + 8, k)) @ mix * np.exp(rng.standard_normal(k) / 2)
    gram = x.T @ x / len(x)
    gram += 0.01 * gram.diagonal().mean() * np.eye(k)
    factor = np.linalg.cholesky(np.linalg.inv(gram)).T
    weight = heavy_tailed(n, k, seed=seed) / 50
    return weight, torch.tensor(gram).float(), torch.tensor(factor).float()


def solve(case, group, levels, asymmetric, sweeps=0):
    half = group <= GROUP_MAX
    return ops.gptq(*case, group, levels, asymmetric, half_scales=half, sweeps=sweeps)


def columns(scale, group, k):
    """Scale and minimum of every column, float64 ``[N, K]`` each."""
    each = np.repeat(to_numpy(scale), group, axis=1)[:, :k]
    return each[..., 0], each[..., 1] if each.shape[-1] == 2 else np.zeros(each.shape[:2])


def objective(case, q, scale, group):
    """tr(dW H dW^T) of each row."""
    weight, gram, _ = map(to_numpy, case)
    s, m = columns(scale, group, weight.shape[1])
    delta = weight - (to_numpy(q) * s + m)
    return ((delta @ gram) * delta).sum(-1)


def fed_back(case, q, scale, group):
    """What GPTQ rounds at each column, the levels before it being ``q``: float64 ``[N, K]``."""
    weight, _, factor = map(to_numpy, case)
    w, s_m = weight.copy(), columns(scale, group, weight.shape[1])
    for k in range(w.shape[1]):
        error = w[:, k] - (to_numpy(q)[:, k] * s_m[0][:, k] + s_m[1][:, k])
        w[:, k + 1 :] -= np.outer(error / factor[k, k], factor[k, k + 1 :])
    return w


SHAPES = ((1, 1), (5, 33), (17, 130), (33, 257))
GRIDS = [
    (g, LEVELS[bits][a], a) for bits in (4, 8) for g in (32, 64, 96, 128) for a in (False, True)
]
GRIDS += [ROW]
IDS = [f"g{g}-{levels[1] - levels[0] + 1}{'-asym' * a}" for g, levels, a in GRIDS]


@pytest.mark.parametrize("group, levels, asymmetric", GRIDS, ids=IDS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_gptq_rounds_what_the_errors_before_have_left(n, k, group, levels, asymmetric):
    case = problem(n, k, seed=k)
    q, scale = solve(case, group, levels, asymmetric)
    s, m = columns(scale, group, k)
    v = fed_back(case, q, scale, group)
    assert (np.abs(v - m)[s == 0] <= 2.0**-11 * np.abs(m)[s == 0]).all()  # one value: a minimum
    wanted = np.clip((v - m) / np.where(s == 0, 1, s), *levels)
    off = np.abs(wanted - to_numpy(q)) * (s != 0)
    assert off.max() <= 0.5 + TIE, np.unravel_index(off.argmax(), off.shape)


def test_gptq_spans_a_row():
    case = problem(19, 130)
    for asymmetric, (low, high) in LEVELS[8].items():
        _, scale = ops.gptq(*case, 130, (low, high), asymmetric, half_scales=False, sweeps=0)
        weight = case[0]
        if asymmetric:
            assert_equal(scale[:, 0, 1], weight.amin(-1))
            assert_equal(scale[:, 0, 0], (weight.amax(-1) - weight.amin(-1)) / 255)
        else:
            assert_equal(scale[:, 0, 0], weight.abs().amax(-1) / 127)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_gptq_searches_groups_by_what_an_error_will_cost(group, bits, asymmetric):
    """The first group's scales are those of the plain search, weighed by 1 / U_kk^2."""
    case = problem(18, 150)
    importance = case[2].diagonal()[:group].square().reciprocal()
    _, scale = solve(case, group, LEVELS[bits][asymmetric], asymmetric)
    first = case[0][:, :group].contiguous()
    _, expected = ops.grouped_quantize(first, group, asymmetric, True, importance, bits=bits)
    rows = expected[:, 0].movedim(-1, -2).reshape(-1, 1 + asymmetric)[:18]
    assert_equal(scale[:, 0], rows.float())


@pytest.mark.parametrize("group, levels, asymmetric", GRIDS, ids=IDS)
def test_gptq_sweeps_lower_the_objective(group, levels, asymmetric):
    case = problem(33, 257, seed=3)
    plain = solve((case[0], torch.eye(257), torch.eye(257)), group, levels, asymmetric)
    errors = [objective(case, *plain, group)]
    errors += [objective(case, *solve(case, group, levels, asymmetric, sweeps=i), group)
               for i in (0, 1, 2, 4, 8)]  # fmt: skip
    totals = [error.sum() for error in errors]
    assert totals[1] < 0.9 * totals[0]  # the feedback is worth it
    for before, after in zip(errors[1:], errors[2:], strict=False):
        assert (after <= before * (1 + 1e-4)).all()
    assert totals[2] < totals[1]


@pytest.mark.parametrize("group, levels, asymmetric", GRIDS, ids=IDS)
def test_gptq_ends_where_no_single_level_can_be_improved(group, levels, asymmetric):
    case = problem(7, 65, seed=5)
    q, scale = solve(case, group, levels, asymmetric, sweeps=200)
    s, m = columns(scale, group, 65)
    weight, gram, _ = map(to_numpy, case)
    levels_now = to_numpy(q)
    square = gram.diagonal() * s**2
    slope = 2 * (levels_now * s + m - weight) @ gram
    for step in (-1, 1):
        within = (levels_now + step >= levels[0]) & (levels_now + step <= levels[1])
        change = slope * step * s + square
        # The gradient is kept in float32 through all sweeps: off by a hundredth of a step of
        # 4 bits, and a tenth of one of 8.
        tolerance = 0.03 if levels[1] - levels[0] == 15 else 0.25
        assert (change >= -tolerance * square)[within].all()


def test_gptq_without_correlations_rounds_to_the_nearest():
    weight = heavy_tailed(20, 70)
    q, scale = ops.gptq(weight, torch.eye(70), torch.eye(70), 1000, (-127, 127), False,
                        half_scales=False, sweeps=0)  # fmt: skip
    expected = (weight / scale[:, 0]).round()
    assert_equal(scale[:, 0, 0], weight.abs().amax(-1) / 127)
    assert (to_numpy(q) - to_numpy(expected) == 0).mean() > 0.999  # ties of float32 apart
    assert_equal(q.abs().amax(-1), torch.full((20,), 127, dtype=torch.int16))


@pytest.mark.parametrize("group, levels, asymmetric", GRIDS, ids=IDS)
def test_gptq_has_the_same_bits_everywhere(group, levels, asymmetric):
    case = problem(50, 130, seed=1)
    with isa.cap("ref"):
        expected = solve(case, group, levels, asymmetric, sweeps=3)
    threads = torch.get_num_threads()
    try:
        for name in C_ISAS:
            for n_threads in (1, 2, 3):
                torch.set_num_threads(n_threads)
                with isa.cap(name):
                    got = solve(case, group, levels, asymmetric, sweeps=3)
                for a, b in zip(got, expected, strict=True):
                    assert_equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_gptq_rows_do_not_know_of_each_other(n):
    weight, gram, factor = problem(40, 70)
    expected = solve((weight, gram, factor), 32, (0, 15), True, 2)
    got = solve((weight[:n], gram, factor), 32, (0, 15), True, 2)
    for a, b in zip(got, expected, strict=True):
        assert_equal(a, b[:n])


def test_gptq_degenerate_rows():
    weight, gram, factor = problem(4, 70)
    weight[0], weight[1, 40] = 0, float("nan")
    for group, levels, asymmetric in GRIDS:
        q, scale = solve((weight, gram, factor), group, levels, asymmetric, sweeps=2)
        value = to_numpy(q)[0] * columns(scale, group, 70)[0][0] + columns(scale, group, 70)[1][0]
        assert (value == 0).all()
        assert scale[1].isnan().any() and scale[2:].isfinite().all()


@pytest.mark.parametrize("n, k", [(0, 8), (3, 0)])
def test_gptq_nothing_to_round(n, k):
    q, scale = ops.gptq(torch.zeros(n, k), torch.eye(k), torch.eye(k), 32, (0, 15), True,
                        half_scales=True, sweeps=1)  # fmt: skip
    assert q.shape == (n, k) and scale.shape == (n, -(-k // 32), 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(weight=torch.zeros(4, 8, dtype=torch.float64)), "weight must be float32"),
        (dict(weight=torch.zeros(8)), "weight must be float32"),
        (dict(gram=torch.eye(9)), "gram and factor"),
        (dict(factor=torch.eye(8).double()), "gram and factor"),
        (dict(factor=torch.zeros(8)), "gram and factor"),
        (dict(group=0), "group must be"),
        (dict(group=129), "group must be"),
        (dict(levels=(1, 16)), "levels must be"),
        (dict(levels=(-8, 248)), "levels must be"),
        (dict(levels=(0, 127)), "16 or 256 levels"),
        (dict(sweeps=-1), "sweeps must be"),
    ],
)
def test_gptq_refuses(changes, message):
    arguments = dict(weight=torch.zeros(4, 8), gram=torch.eye(8), factor=torch.eye(8), group=32,
                     levels=(0, 15), asymmetric=True, half_scales=True, sweeps=0)  # fmt: skip
    ops.gptq(**arguments)
    with pytest.raises(RuntimeError, match=message):
        ops.gptq(**(arguments | changes))
    on_meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v
               for n, v in (arguments | changes).items()}  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops.gptq(**on_meta)
