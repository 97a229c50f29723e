"""What every kernel refuses, in the same words on the plain torch path and in C."""

import pytest
import torch
from helpers import heavy_tailed, random_int8

from gpu_poor import isa, ops

#: ``[M, K]``, ``[N, K]`` and ``[N]`` of int8; offsets beside the scales; groups; 16 bits.
X, W, S = torch.randn(4, 8), random_int8(8, 8), torch.rand(8)
WIDE, WIDE_INT8, PAIRS = heavy_tailed(4, 30), random_int8(20, 30), torch.rand(2, 20)
X40 = heavy_tailed(4, 40)
PANELS, GROUP_SCALES = ops.grouped_quantize(heavy_tailed(20, 40, seed=1), 32)
HALF = heavy_tailed(20, 40, seed=1, dtype=torch.bfloat16)

#: ``{"family: what is wrong": (call, part of the message)}``
BAD_CALLS = {
    "int8: weight not int8": (lambda: ops.int8_linear(X, W.float(), S), "int8"),
    "int8: weight a vector": (lambda: ops.int8_linear(X, W[0], S[0]), r"weight \[N, K\]|scale"),
    "int8: scale of half type": (lambda: ops.int8_linear(X, W, S.half()), "scale must be float32"),
    "int8: scale too short": (lambda: ops.int8_linear(X, W, S[:-1]), "scale must be float32"),
    "int8: K differs": (lambda: ops.int8_linear(X[:, :-1], W, S), "does not end in K"),
    "int8: x is a scalar": (lambda: ops.int8_linear(X[0, 0], W, S), "does not end in K"),
    "int8: x is integer": (lambda: ops.int8_linear(X.long(), W, S), "x must be float32"),
    "int8: x is double": (lambda: ops.int8_linear(X.double(), W, S), "x must be float32"),
    "int8: bias too long": (lambda: ops.int8_linear(X, W, S, torch.zeros(9)), "bias must be"),
    "int8: bias integer": (lambda: ops.int8_linear(X, W, S, S.long()), "bias must be"),
    "int8: bits 4": (lambda: ops.int8_linear(X, W, S, None, 4), "8, 16 or 32"),
    "int8: index too large": (lambda: ops.int8_embedding(torch.tensor([8]), W, S), "out of range"),
    "int8: index negative": (lambda: ops.int8_embedding(torch.tensor([-1]), W, S), "out of range"),
    "int8: index float": (lambda: ops.int8_embedding(torch.tensor([1.0]), W, S), "int64 or int32"),
    "int8: table 3-D": (
        lambda: ops.int8_embedding(torch.tensor([0]), W[None], S[None]),
        r"\[N, K\]",
    ),
    "int8: dequantize to int": (
        lambda: ops.int8_dequantize(W, S, torch.int32),
        "dtype must be float32",
    ),
    "int8: quantize integers": (lambda: ops.int8_quantize(W), "weight must be float32"),
    "int8: quantize a scalar": (lambda: ops.int8_quantize(S[0]), "scalar"),
    "int8: gram of wrong size": (lambda: ops.gram_(torch.zeros(3, 3), X), "acc must be"),
    "int8: gram strided": (lambda: ops.gram_(torch.zeros(16, 16)[::2, ::2], X), "acc must be"),
    "int8: stats of integers": (lambda: ops.channel_stats(X.long()), "x must be float32"),
    "int8_asym: three parts": (
        lambda: ops.int8_linear(WIDE, WIDE_INT8, torch.ones(3, 20)),
        "scale must be float32",
    ),
    "int8_asym: turned round": (
        lambda: ops.int8_linear(WIDE, WIDE_INT8, PAIRS.T.contiguous()),
        "scale must be float32",
    ),
    "int8_asym: half scale": (
        lambda: ops.int8_dequantize(WIDE_INT8, PAIRS.half()),
        "scale must be float32",
    ),
    "int8_asym: too short": (
        lambda: ops.int8_embedding(torch.tensor([0]), WIDE_INT8, PAIRS[:, :19].contiguous()),
        "scale must be float32",
    ),
    "grouped: group": (lambda: ops.grouped_quantize(X40, 48), "group must be 32"),
    "grouped: group of 0": (
        lambda: ops.grouped_linear(X40, PANELS, GROUP_SCALES, None, 0, 20),
        "group must be 32",
    ),
    "grouped: bits 5": (lambda: ops.grouped_quantize(X40, 32, bits=5), "bits must be 4 or 8"),
    "grouped: a width between": (
        lambda: ops.grouped_linear(
            X40, torch.cat((PANELS, PANELS[..., :64]), -1), GROUP_SCALES, None, 32, 20
        ),
        "256 or 512",
    ),
    "grouped: weight 1-D": (lambda: ops.grouped_quantize(X40[0], 32), r"\[N, K\]"),
    "grouped: weight integer": (
        lambda: ops.grouped_quantize(X40.long(), 32),
        "weight must be float32",
    ),
    "grouped: importance short": (
        lambda: ops.grouped_quantize(X40, 32, importance=torch.ones(3)),
        "importance must be",
    ),
    "grouped: importance half": (
        lambda: ops.grouped_quantize(X40, 32, importance=torch.ones(40).half()),
        "importance must be",
    ),
    "grouped: uint8 weight": (
        lambda: ops.grouped_linear(X40, PANELS.view(torch.uint8), GROUP_SCALES, None, 32, 20),
        "int8",
    ),
    "grouped: too few panels": (
        lambda: ops.grouped_linear(X40, PANELS[:1], GROUP_SCALES, None, 32, 20),
        "weight must be",
    ),
    "grouped: another K": (
        lambda: ops.grouped_linear(X40[:, :32], PANELS, GROUP_SCALES, None, 32, 20),
        "weight must be",
    ),
    "grouped: another group": (
        lambda: ops.grouped_linear(X40, PANELS, GROUP_SCALES, None, 64, 20),
        "scale must be",
    ),
    "grouped: float32 scale": (
        lambda: ops.grouped_linear(X40, PANELS, GROUP_SCALES.float(), None, 32, 20),
        "scale must be",
    ),
    "grouped: n negative": (
        lambda: ops.grouped_dequantize(PANELS, GROUP_SCALES, 32, -1, 40),
        "weight must be",
    ),
    "grouped: bias too long": (
        lambda: ops.grouped_linear(X40, PANELS, GROUP_SCALES, torch.ones(32), 32, 20),
        "bias must be",
    ),
    "grouped: x double": (
        lambda: ops.grouped_linear(X40.double(), PANELS, GROUP_SCALES, None, 32, 20),
        "x must be float32",
    ),
    "grouped: x a scalar": (
        lambda: ops.grouped_linear(X40[0, 0], PANELS, GROUP_SCALES, None, 32, 20),
        "scalar",
    ),
    "grouped: bits 4": (
        lambda: ops.grouped_linear(X40, PANELS, GROUP_SCALES, None, 32, 20, 4),
        "8, 16 or 32",
    ),
    "grouped: index in the padding": (
        lambda: ops.grouped_embedding(torch.tensor([20]), PANELS, GROUP_SCALES, 32, 20, 40),
        "out of range",
    ),
    "grouped: index float": (
        lambda: ops.grouped_embedding(torch.tensor([1.0]), PANELS, GROUP_SCALES, 32, 20, 40),
        "int64 or int32",
    ),
    "half: float32 weight": (
        lambda: ops.half_linear(X40, HALF.float()),
        "weight must be bfloat16 or float16",
    ),
    "half: int8 weight": (lambda: ops.half_linear(X40, HALF.char()), "weight must be"),
    "half: 3-D weight": (lambda: ops.half_linear(X40, HALF[None]), r"\[N, K\]"),
    "half: another K": (lambda: ops.half_linear(X40[:, :32], HALF), "does not end in K"),
    "half: x double": (lambda: ops.half_linear(X40.double(), HALF), "x must be float32"),
    "half: x a scalar": (lambda: ops.half_linear(X40[0, 0], HALF), "does not end in K"),
    "half: bias too long": (lambda: ops.half_linear(X40, HALF, torch.ones(32)), "bias must be"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("path", [isa.TORCH, "ref"])
def test_bad_calls_say_what_is_wrong(name, path):
    call, message = BAD_CALLS[name]
    with isa.cap(path), pytest.raises(RuntimeError, match=message):
        call()
