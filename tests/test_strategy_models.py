"""Strategies on whole models: what they promise, and that a failure changes nothing."""

import copy

import pytest
import torch
from conftest import VOCAB, assert_untouched, logits, make_model, state
from helpers import heavy_tailed

import gpu_poor
from gpu_poor import formats, quantize
from gpu_poor.plan import block_list
from gpu_poor.strategies import STRATEGIES, Inputs, Rounding, Smoothing, recipe
from gpu_poor.strategies.gptq import Gptq

ROUNDINGS = [name for name, cls in STRATEGIES.items() if issubclass(cls, Rounding)]
SMOOTHINGS = [name for name, cls in STRATEGIES.items() if issubclass(cls, Smoothing)]
#: One of every kind of block.
SOME = ("llama", "gpt2", "gemma2", "mixtral", "opt", "qwen3")


def samples(batch=6, length=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def divergence(model, expected):
    got = logits(model, samples())
    return float((got - expected).square().mean() / expected.square().mean())


@pytest.mark.parametrize("strategy", [(r,) for r in ROUNDINGS] + [
    (s, "mse") for s in SMOOTHINGS] + [("awq", "gptq"), ("smoothquant", "hqq")],
    ids=lambda s: "-".join(s))  # fmt: skip
@pytest.mark.parametrize("name", SOME)
def test_every_strategy_on_tiny_models(name, strategy):
    for form in ("int8", "int4_g64_asym", "int4_g32"):
        model = make_model(name)
        expected = logits(model, samples())
        calibrated = recipe(strategy, True).needs_inputs
        blocks = block_list(model)
        quantize(model, overrides={blocks: form}, strategy=strategy, verbose=False,
                 sample_inputs=samples() if calibrated else None, allow_partial=True)  # fmt: skip
        assert divergence(model, expected) < (1e-3 if form == "int8" else 0.1)
        first = gpu_poor.receipt(model).remarks[0]
        assert first.startswith(f"numbers chosen by {' and '.join(strategy)}")


def outliers(model):
    """The same function with massive channels: norm gains times 30 and the columns divided."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, linears in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight.data[3::17] *= 30
            for linear in linears:
                linear.weight.data[:, 3::17] /= 30
    return model


@pytest.mark.parametrize("strategy", [("equalize", "mse"), ("smoothquant", "mse"), ("awq", "mse")])
def test_smoothing_undoes_outliers(strategy):
    plain = make_model("llama")
    expected = logits(plain, samples())
    errors = {}
    for how in (("mse",), strategy):
        model = outliers(copy.deepcopy(plain))
        data = samples() if recipe(how, True).needs_inputs else None
        quantize(model, strategy=how, sample_inputs=data, verbose=False)
        errors[how] = divergence(model, expected)
    assert errors[strategy] < 0.3 * errors["mse",]


@pytest.mark.parametrize("strategy", ["gptq", ("awq", "mse"), ("smoothquant", "mse")])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_not_finite_activations_name_the_layer(name, strategy):
    model = make_model(name)
    norms = [n for n, m in model.named_modules() if "norm" in n or ".ln_" in n]
    model.get_submodule(norms[2]).weight.data[5] = 3e38  # finite, until it meets an activation
    model.get_submodule(norms[2]).weight.data[6] = -3e38
    before = state(model)
    with pytest.raises(ValueError, match=r"\.(1|layers\.1)\..*not finite"):
        quantize(model, strategy=strategy, sample_inputs=samples(), verbose=False)
    assert_untouched(model, before)


def test_inputs_that_are_all_zero_name_the_layer():
    model = make_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data.zero_()
    before = state(model)
    with pytest.raises(
        ValueError, match="layers.1.mlp.gate_proj: its inputs are all zero.*singular"
    ):
        quantize(model, strategy="gptq", sample_inputs=samples(), verbose=False)
    assert_untouched(model, before)


def test_gptq_refuses_a_gram_matrix_of_no_use():
    rows, form = heavy_tailed(4, 8), formats.INT8
    bad = torch.eye(8)
    bad[0, 1] = bad[1, 0] = 5.0  # no Gram matrix: an eigenvalue is negative
    for gram, message in ((bad, "singular even with damp"), (torch.zeros(8, 8), "all zero"),
                          (torch.full((8, 8), torch.nan), "NaN")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Gptq().quantize(rows, form, Inputs(gram, gram, gram[0], 4))


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "sample_inputs is empty"),
        (torch.zeros(1, 0, dtype=torch.int64), "no tokens"),
        (torch.rand(2, 8), "integer"),
        (torch.full((1, 8), VOCAB), f"token id {VOCAB}"),
        (torch.ones(1, 65, dtype=torch.int64), "at most 64"),
    ],
)
def test_data_of_no_use(data, message):
    model = make_model("llama")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, sample_inputs=data, verbose=False)
    assert_untouched(model, before)


def test_a_registered_strategy_is_found(monkeypatch):
    class Mine(STRATEGIES["absmax"]):
        name = "mine"

    monkeypatch.setitem(STRATEGIES, "mine", Mine)
    model = quantize(make_model("llama"), strategy="mine", verbose=False)
    assert model.gpu_poor_receipt.remarks[0] == "numbers chosen by mine"
