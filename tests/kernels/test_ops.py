"""The operators as torch sees them: opcheck, autograd, compilation, other devices' path."""

import pytest
import torch
from blocks import angles, block, normed, step
from helpers import assert_equal, assert_within, heavy_tailed, random_int8

from gpu_poor import isa, ops

W, S = random_int8(20, 30), torch.rand(20) / 100
SO = torch.stack((S, heavy_tailed(20, seed=7) / 10))  # and offsets
X = heavy_tailed(6, 30)

H = heavy_tailed(20, 30, seed=2).bfloat16()

W4, S4 = ops.grouped_quantize(heavy_tailed(20, 30, seed=1), 32)
A4, M4 = ops.grouped_quantize(heavy_tailed(20, 30, seed=1), 32, asymmetric=True)
W8, S8 = ops.grouped_quantize(heavy_tailed(20, 30, seed=1), 32, bits=8)

PAGES = torch.randint(-128, 128, (5, 2, 2, 16, 8), dtype=torch.int8)
SCALES = torch.rand(5, 2, 2, 16).half() / 100
TABLE = torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=torch.int32)
LENGTHS = torch.tensor([19, 5], dtype=torch.int32)
Q, KV = heavy_tailed(2, 3, 4, 8), heavy_tailed(2, 3, 2, 8)

SAMPLES = {
    "int8_quantize": [(X,), (X.bfloat16(),), (X.view(2, 3, 30),), (X[:0],)],
    "int8_dequantize": [(W, S, torch.float32), (W, SO, torch.bfloat16)],
    "int8_linear": [
        (X, W, S, None, 16),
        (X.half(), W, S, torch.randn(20).half(), 8),
        (X.view(2, 3, 30), W, S, torch.randn(20), 32),
        (X[:0], W, S, None, 16),
        (X, W, SO, torch.randn(20), 16),
        (X.clone().requires_grad_(), W, S, torch.randn(20, requires_grad=True), 16),
    ],
    "int8_embedding": [
        (torch.tensor([[0, 19]]), W, S, torch.float32),
        (torch.tensor([3], dtype=torch.int32), W, S, torch.bfloat16),
    ],
    "half_linear": [
        (X, H, None),
        (X.half(), H.half(), torch.randn(20).half()),
        (X.view(2, 3, 30).bfloat16(), H, torch.randn(20)),
        (X[:0], H, None),
        (X.clone().requires_grad_(), H, torch.randn(20, requires_grad=True)),
    ],
    "grouped_quantize": [
        (X, 32, False, True, None, 4),
        (X.bfloat16(), 64, True, False, torch.rand(30), 8),
        (X[:0], 32, False, True, None, 4),
    ],
    "grouped_dequantize": [
        (W4, S4, 32, 20, 30, torch.float32),
        (A4, M4, 32, 20, 30, torch.float16),
        (W8, S8, 32, 20, 30, torch.float32),
    ],
    "grouped_linear": [
        (X, W4, S4, None, 32, 20, 16),
        (X.half(), A4, M4, torch.randn(20).half(), 32, 20, 8),
        (X.view(2, 3, 30), A4, M4, torch.randn(20), 32, 20, 32),
        (X, W8, S8, None, 32, 20, 16),
        (X[:0], W4, S4, None, 32, 20, 16),
        (X.clone().requires_grad_(), W4, S4, torch.randn(20, requires_grad=True), 32, 20, 16),
    ],
    "grouped_embedding": [
        (torch.tensor([[0, 19]]), W4, S4, 32, 20, 30, torch.float32),
        (torch.tensor([3], dtype=torch.int32), A4, M4, 32, 20, 30, torch.bfloat16),
    ],
    "decoder_qkv": [
        (X.view(2, 3, 30), *block(), *angles(3), 4, 2, 8),
        (X.view(2, 3, 30).bfloat16(), *block(), None, None, 4, 2, 8),
        (X.view(2, 3, 30)[:, :0], *block(), None, None, 4, 2, 8),
    ],
    "decoder_out": [
        (X.view(2, 3, 30), torch.randn(2, 3, 32), *block()),
        (X.view(2, 3, 30).half(), torch.randn(2, 3, 32).half(), *block()),
    ],
    "decoder_step": [
        step(X.view(2, 3, 30)),
        step(X.view(6, 1, 30), 1, int8=True),
        normed(step(X.view(2, 3, 30)), 1),
        normed(step(X.view(2, 3, 30).bfloat16()), 2),
    ],
    "gptq": [
        (H.float(), torch.eye(30), torch.eye(30), 32, 0, 15, True, True, 2),
        (X, torch.eye(30), torch.eye(30), 30, -127, 127, False, False, 0),
        (X[:0], torch.eye(30), torch.eye(30), 8, -8, 7, False, True, 1),
    ],
    "paged_append": [
        (PAGES, SCALES, KV, KV, TABLE, LENGTHS, torch.rand(2, 8)),
        (PAGES.bfloat16(), None, KV.half(), KV.half(), TABLE, LENGTHS, None),
        (PAGES, SCALES, KV[:, :0], KV[:, :0], TABLE, LENGTHS, None),
    ],
    "paged_attention": [
        (Q, PAGES, SCALES, TABLE, LENGTHS, None, 0.3, 0),
        (Q.bfloat16(), PAGES.half(), None, TABLE, LENGTHS, LENGTHS - 4, 1.0, 3),
        (Q[:, :0], PAGES, SCALES, TABLE, LENGTHS, None, 0.3, 0),
    ],
    "paged_gather": [
        (PAGES, SCALES, TABLE, 40, torch.float32, 0),
        (PAGES, SCALES, TABLE, 40, torch.float32, 18),
        (PAGES.float(), None, TABLE, 0, torch.bfloat16, 0),
    ],
    "channel_stats": [(X,), (X.view(2, 3, 30).bfloat16(),)],
    "gram_": [(torch.zeros(30, 30), X)],
}


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n.split("::")[1] for n in names if n.startswith("gpu_poor::"))


def test_every_registered_operator_has_samples():
    assert registered() == sorted(SAMPLES)


@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_opcheck(op):
    for args in SAMPLES[op]:
        torch.library.opcheck(getattr(torch.ops.gpu_poor, op).default, args)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("scale", [S, SO], ids=["sym", "asym"])
def test_int8_linear_gradient_is_that_of_the_dequantized_weight(isa, scale, bits):
    x = X.clone().requires_grad_()
    bias = torch.zeros(20, requires_grad=True)
    grad = heavy_tailed(6, 20, seed=5)
    ops.int8_linear(x, W, scale, bias, bits).backward(grad)
    dense = ops.int8_dequantize(W, scale).double()
    assert_within(x.grad, grad.double() @ dense, 1e-5)
    assert_within(bias.grad, grad.double().sum(0), 1e-5)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("weight, scale", [(W4, S4), (A4, M4), (W8, S8)], ids=["4", "asym", "8"])
def test_grouped_linear_gradient_is_that_of_the_dequantized_weight(isa, weight, scale, bits):
    x = X.clone().requires_grad_()
    bias = torch.zeros(20, requires_grad=True)
    grad = heavy_tailed(6, 20, seed=5)
    ops.grouped_linear(x, weight, scale, bias, 32, 20, bits).backward(grad)
    dense = ops.grouped_dequantize(weight, scale, 32, 20, 30).double()
    assert_within(x.grad, grad.double() @ dense, 1e-5)
    assert_within(bias.grad, grad.double().sum(0), 1e-5)


def test_half_linear_gradient_is_that_of_the_weight(isa):
    x = X.clone().requires_grad_()
    bias = torch.zeros(20, requires_grad=True)
    grad = heavy_tailed(6, 20, seed=5)
    ops.half_linear(x, H, bias).backward(grad)
    assert_within(x.grad, grad.double() @ H.double(), 1e-5)
    assert_within(bias.grad, grad.double().sum(0), 1e-5)


def test_int8_linear_saves_only_the_quantized_weight():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.dtype, tuple(t.shape))), lambda t: t
    ):
        ops.int8_linear(X.clone().requires_grad_(), W, S)
    assert sorted(saved, key=str) == [(torch.float32, (20,)), (torch.int8, (20, 30))]


def test_operators_compile_without_a_graph_break():
    def block(x, ids):
        h = ops.int8_embedding(ids, W.view(30, 20), torch.ones(30))
        return ops.int8_linear(x, W, S).sum() + h.sum()

    ids = torch.tensor([0, 29])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(X, ids), block(X, ids))


def test_meta_tensors_need_no_data():
    y = ops.int8_linear(X.to("meta"), W.to("meta"), S.to("meta"))
    assert y.shape == (6, 20) and y.device.type == "meta"


def test_the_plain_torch_path_agrees_with_the_kernels():
    for args in SAMPLES["int8_linear"][:1]:
        with isa.cap("torch"):
            plain = ops.int8_linear(*args)
        assert_within(plain, ops.int8_linear(*args), 1e-5)


def test_forward_mode_is_refused_not_zero():
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: ops.int8_linear(x, W, S), (X,), (torch.ones_like(X),))
    with torch.autograd.forward_ad.dual_level():
        ops.int8_linear(X, W, S)  # no tangent, no objection


def test_fakes_refuse_what_the_kernels_refuse():
    meta = [t.to("meta") for t in (X, W, S)]
    for bad in (
        (meta[0].double(), *meta[1:], None, 16),
        (*meta, meta[2][:3], 16),
        (*meta, None, 4),
    ):
        with pytest.raises(RuntimeError, match="int8_linear"):
            torch.ops.gpu_poor.int8_linear(*bad)
