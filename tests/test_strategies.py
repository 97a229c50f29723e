"""The registry, recipes, and what each strategy promises of the numbers it chooses."""

import pytest
import torch
from conftest import VOCAB, assert_untouched, make_model, state
from helpers import assert_equal, heavy_tailed
from torch import nn

from gpu_poor import formats, isa, quantize
from gpu_poor.strategies import STRATEGIES, Inputs, Rounding, Smoothing, recipe
from gpu_poor.strategies.awq import Awq, output_error
from gpu_poor.strategies.base import even_out
from gpu_poor.strategies.gptq import Gptq
from gpu_poor.strategies.hqq import Hqq
from gpu_poor.strategies.smoothquant import SmoothQuant

ROUNDINGS = [name for name, cls in STRATEGIES.items() if issubclass(cls, Rounding)]
SMOOTHINGS = [name for name, cls in STRATEGIES.items() if issubclass(cls, Smoothing)]
INTEGERS = [form for form in formats.FORMATS.values() if form.levels is not None]
#: One of every kind of block.
SOME = ("llama", "gpt2", "gemma2", "mixtral", "opt", "qwen3")


def samples(batch=6, length=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def inputs_of(k, n=400, seed=0):
    """Statistics of correlated inputs with a few massive channels."""
    x = heavy_tailed(n, k, seed=seed) @ (torch.eye(k) + torch.randn(k, k) / k**0.5)
    x[:, ::17] *= 20
    return Inputs(x.T @ x / n, torch.zeros(k, k), x.abs().amax(0), n)


def white(k):
    """Statistics of inputs under which all errors count alike."""
    return Inputs(torch.eye(k), torch.zeros(k, k), torch.ones(k), k)


def rounded(name, rows, form, inputs=None):
    weight, scale = STRATEGIES[name]().quantize(rows, form, inputs)
    return form.dequantize(weight, scale, rows.shape, torch.float32)


# -- registry and recipes ----------------------------------------------------------------------


def test_the_registry_has_what_the_documents_name():
    assert set(STRATEGIES) >= {"absmax", "mse", "hqq", "gptq", "equalize", "smoothquant", "awq"}
    assert all(cls.name == name for name, cls in STRATEGIES.items())
    assert set(ROUNDINGS) | set(SMOOTHINGS) == set(STRATEGIES)


def test_defaults_depend_on_data():
    assert recipe(None, calibrated=False).names == ["equalize", "mse"]
    assert recipe(None, calibrated=True).names == ["equalize", "gptq"]
    assert recipe("hqq", calibrated=False).names == ["hqq"]
    assert recipe("awq", calibrated=True).names == ["awq", "gptq"]
    assert recipe(["mse", "smoothquant"], calibrated=True).names == ["smoothquant", "mse"]
    mine = Gptq(damp=0.1)
    assert recipe([mine, "equalize"], calibrated=True).rounding is mine


@pytest.mark.parametrize(
    "strategy, message",
    [
        ("best", "strategy must be one of absmax"),
        (3, "strategy must be one of"),
        ([None], "strategy must be one of"),
        (("mse", "gptq"), "mse and gptq exclude one another"),
        (("awq", "equalize", "mse"), "awq and equalize exclude one another"),
    ],
)
def test_a_recipe_that_is_none(strategy, message):
    model = make_model("llama")
    before = state(model)
    strategies = [strategy] if isinstance(strategy, int) else strategy
    with pytest.raises(ValueError, match=message):
        quantize(model, strategy=strategies, sample_inputs=samples(), verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", [n for n, cls in STRATEGIES.items() if cls.needs_inputs])
def test_calibration_without_data(name):
    model = make_model("llama")
    before = state(model)
    with pytest.raises(ValueError, match=f"^strategy {name} needs sample_inputs"):
        quantize(model, strategy=name, verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gptq(damp=0.0), lambda: Gptq(sweeps=-1), lambda: Gptq(correction=1.5),
        lambda: Hqq(p=0), lambda: Hqq(kappa=0.5), lambda: Hqq(rounds=-1),
        lambda: SmoothQuant(alpha=1.1), lambda: Awq(steps=0), lambda: Awq(steps=0.5),
    ],
)  # fmt: skip
def test_options_out_of_range(make):
    with pytest.raises(ValueError, match="needs"):
        make()


# -- roundings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", formats.FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_every_rounding_fills_every_format(name, form):
    n, k = 19, 150
    rows = heavy_tailed(n, k)
    stored = STRATEGIES[name]().quantize(rows, form, white(k))
    assert {(tuple(t.shape), t.dtype) for t in stored if t is not None} == {
        storage for storage in form.storage(n, k) if storage is not None
    }
    y = form.dequantize(*stored, rows.shape, torch.float32)
    # A hundredth of the energy for 8 bits, a tenth for 4: no row is lost.
    limit = 0.1 if form.bits == 4 else 0.01
    assert ((y - rows).square().sum(-1) <= limit * rows.square().sum(-1)).all()


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_degenerate_rows(name, form):
    """Zeros stay zeros, one value stays, and what is not finite is said to be."""
    rows = heavy_tailed(18, 70) / 10
    rows[3], rows[4] = 0.0, 0.25
    y = rounded(name, rows, form, white(70))
    assert y.isfinite().all() and (y[3] == 0).all()
    assert ((y[4] - 0.25).abs() < 0.05).all()
    for bad in (float("nan"), float("inf")):
        rows[5, 60] = bad
        _, scale = STRATEGIES[name]().quantize(rows, form, white(70))
        assert not scale.isfinite().all()


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
def test_absmax_errs_by_half_a_step(form):
    rows = heavy_tailed(16, 96)
    y = rounded("absmax", rows, form)
    group = form.group or 96
    groups = nn.functional.pad(rows, (0, -96 % group)).view(16, -1, group)
    low, high = form.levels
    widest = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
    step = widest / (high - low) if form.asymmetric else groups.abs().amax(-1) / high
    bound = 0.51 * step.amax(-1, keepdim=True) + 2.0**-10 * rows.abs().amax(-1, keepdim=True)
    assert ((y - rows).abs() <= bound).all()


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
@pytest.mark.parametrize("seed", range(3))
def test_mse_errs_less_than_absmax_and_hqq(form, seed):
    if form.name == "int8_asym":
        pytest.skip("takes the range of a row: no search")
    rows = heavy_tailed(32, 256, seed=seed)
    error = {name: float((rounded(name, rows, form) - rows).square().sum())
             for name in ("absmax", "mse", "hqq")}  # fmt: skip
    assert error["mse"] < error["absmax"] and error["mse"] < error["hqq"]


@pytest.mark.parametrize("form", [f for f in INTEGERS if f.bits == 4], ids=lambda form: form.name)
def test_mse_does_not_shrink_rows(form):
    """<w, d> = <w, w>, but for the rounding of scales to halves."""
    rows = heavy_tailed(40, 256) / 30
    rows[3], rows[4] = 0, 1e-9  # nothing to be unshrunk; and too small for a half
    y = rounded("mse", rows, form).double()
    kept = (rows * y).sum(-1)[5:] / rows.double().square().sum(-1)[5:]
    assert ((kept - 1).abs() < 5e-4).all()
    plain = form.dequantize(*form.quantize(rows), rows.shape, torch.float32).double()
    assert (plain[5:] * rows[5:]).sum() < (y[5:] * rows[5:]).sum()
    assert y[:5].isfinite().all() and (y[3] == 0).all() and (y[4].abs() <= 1e-7).all()


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
def test_hqq_errs_less_than_absmax_in_its_norm(form, p):
    """In every row: a group keeps the best of its rounds, of which absmax's grid is the first."""
    rows = heavy_tailed(40, 150, seed=5)
    weight, scale = Hqq(p=p).quantize(rows, form)
    y = form.dequantize(weight, scale, rows.shape, torch.float32)

    def lp(d):
        return (d - rows).abs().pow(p).sum(-1)

    before = lp(rounded("absmax", rows, form))
    assert (lp(y) <= before * (1 + 1e-4)).all()
    assert lp(y).sum() < 0.998 * before.sum()


def test_hqq_chunks_make_no_difference(monkeypatch):
    from gpu_poor.strategies import hqq

    rows, form = heavy_tailed(50, 70), formats.FORMATS["int4_g32_asym"]
    whole = Hqq().quantize(rows, form)
    monkeypatch.setattr(hqq, "CHUNK", 200)
    for a, b in zip(Hqq().quantize(rows, form), whole, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
@pytest.mark.parametrize("n, k", [(5, 31), (33, 200)])
def test_gptq_answers_better_than_mse(form, n, k):
    rows, inputs = heavy_tailed(n, k), inputs_of(k)

    def error(name):
        delta = rounded(name, rows, form, inputs) - rows
        return float(((delta @ inputs.gram) * delta).sum())

    assert error("gptq") < 0.8 * error("mse")


def test_gptq_follows_the_drift():
    """Inputs are 10 % too small: the weight that answers as before is larger."""
    rows, form, inputs = heavy_tailed(8, 64), formats.INT8, white(64)
    inputs.drift = 0.1 * inputs.gram  # x' = 1.1 x
    moved = Gptq(damp=1e-4).quantize(rows, form, inputs)
    plain = Gptq(damp=1e-4, correction=0).quantize(rows, form, inputs)
    y, z = (form.dequantize(*s, rows.shape, torch.float32) for s in (moved, plain))
    wanted, size = 1.1 * rows, rows.norm()
    assert (y - wanted).norm() < 0.02 * size and (z - wanted).norm() > 0.09 * size


@pytest.mark.parametrize("form", INTEGERS, ids=lambda form: form.name)
def test_the_search_has_the_same_bits_on_every_isa(form):
    rows = heavy_tailed(33, 150)
    with isa.cap("ref"):
        expected = STRATEGIES["mse"]().quantize(rows, form)
    for name in isa.available():
        with isa.cap(name):
            if name == isa.TORCH and form.group is not None:
                continue  # sums in another order: docs/kernels.md
            for a, b in zip(STRATEGIES["mse"]().quantize(rows, form), expected, strict=True):
                assert_equal(a.view(torch.uint8), b.view(torch.uint8))


# -- smoothings --------------------------------------------------------------------------------


def factors_of(name, k=96, inputs=None, **options):
    rows = [heavy_tailed(20, k, seed=1), heavy_tailed(12, k, seed=2)]
    form = formats.FORMATS["int4_g32"]
    gain = torch.ones(k)
    gain[::17] = 30.0
    smoothing = STRATEGIES[name](**options)
    return smoothing.factors(gain, rows, inputs or inputs_of(k), [form, form]), rows, form


@pytest.mark.parametrize("name", SMOOTHINGS)
def test_factors_are_positive_and_moderate(name):
    factors, *_ = factors_of(name)
    assert factors.shape == (96,) and factors.dtype == torch.float32
    assert (factors >= 2.0**-10).all() and (factors <= 2.0**10).all()
    assert factors[::17].median() > 2 * factors.median()  # where the massive channels are


def test_equalize_takes_powers_of_two():
    factors, *_ = factors_of("equalize")
    assert_equal(factors.log2(), factors.log2().round())
    assert (factors == 1).sum() == 96 - len(range(0, 96, 17))


def test_smoothquant_is_the_formula():
    inputs = inputs_of(96)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        factors, rows, _ = factors_of("smoothquant", inputs=inputs, alpha=alpha)
        columns = torch.cat(rows).abs().amax(0).double()
        expected = inputs.absmax.double() ** alpha / columns ** (1 - alpha)
        ratio = factors.double() / expected  # the same for all: what they share says nothing
        assert ratio.max() / ratio.min() < 1 + 1e-4
        assert abs(float(factors.log2().mean())) < 1e-4


def test_smoothquant_leaves_dead_channels():
    inputs = inputs_of(96)
    inputs.absmax[7] = 0
    factors, *_ = factors_of("smoothquant", inputs=inputs)
    assert factors[7] == 1 and factors.isfinite().all()
    inputs.absmax[:] = 0
    assert factors_of("smoothquant", inputs=inputs)[0] is None


def test_awq_lowers_the_error_it_searches():
    inputs = inputs_of(96)
    factors, rows, form = factors_of("awq", inputs=inputs)
    before = sum(output_error(matrix, form, inputs.gram) for matrix in rows)
    after = sum(output_error(matrix, form, inputs.gram, factors) for matrix in rows)
    assert after < 0.9 * before
    size = inputs.gram.diagonal().sqrt().log2()
    slope = factors.log2() - factors.log2().mean()
    exponent = float((slope * (size - size.mean())).sum() / (size - size.mean()).square().sum())
    assert 0 < exponent <= 1
    torch.testing.assert_close(slope, exponent * (size - size.mean()), atol=1e-3, rtol=0)


def test_awq_leaves_alone_what_is_best_so():
    """16-bit formats round nothing that factors could help."""
    rows, inputs = [heavy_tailed(20, 64)], inputs_of(64)
    found = Awq().factors(torch.ones(64), rows, inputs, [formats.FORMATS["bf16"]])
    assert found is None


def test_awq_looks_at_some_rows_of_a_large_weight():
    from gpu_poor.strategies import awq

    assert awq.spread(torch.zeros(awq.ROWS, 3)).shape[0] == awq.ROWS
    assert awq.ROWS // 2 < awq.spread(torch.zeros(5 * awq.ROWS + 1, 3)).shape[0] <= awq.ROWS


def test_even_out():
    factors = torch.tensor([2.0, 8.0, 5.0, 2.0**40])
    usable = torch.tensor([True, True, False, False])
    assert_equal(even_out(factors, usable), torch.tensor([0.5, 2.0, 1.0, 1.0]))
    assert even_out(factors, torch.zeros(4, dtype=torch.bool)) is None
