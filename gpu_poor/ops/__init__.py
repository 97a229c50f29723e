"""The torch operators ``gpu_poor::*``: typed wrappers, fake kernels, autograd, plain torch paths.

Nothing else in the package calls ``torch.ops.gpu_poor``. On a CPU tensor an operator runs the C
kernels of csrc/; on any other device, or under ``GPU_POOR_ISA=torch``, the plain torch function
written here, with the same result within float rounding. A file for each family of kernels.

Letters: M rows (tokens), N out features, K in features, G group size, P panels of 16 rows.
"""

from gpu_poor.ops.attention import (
    FOUR,
    HEAD_DIM_MAX,
    SLOTS,
    paged_append,
    paged_attention,
    paged_gather,
)
from gpu_poor.ops.common import ACTIVATIONS, FLOATS, Q_MAX
from gpu_poor.ops.decoder import decoder_out, decoder_qkv, decoder_step
from gpu_poor.ops.gptq import gptq
from gpu_poor.ops.grouped import (
    grouped_dequantize,
    grouped_embedding,
    grouped_linear,
    grouped_pack,
    grouped_quantize,
    grouped_shapes,
    grouped_unpack,
)
from gpu_poor.ops.half import half_linear
from gpu_poor.ops.int8 import int8_dequantize, int8_embedding, int8_linear, int8_quantize
from gpu_poor.ops.stats import channel_stats, gram_

__all__ = [
    "ACTIVATIONS",
    "FLOATS",
    "FOUR",
    "HEAD_DIM_MAX",
    "SLOTS",
    "Q_MAX",
    "channel_stats",
    "decoder_out",
    "decoder_qkv",
    "decoder_step",
    "gptq",
    "gram_",
    "grouped_dequantize",
    "grouped_embedding",
    "grouped_linear",
    "grouped_pack",
    "grouped_quantize",
    "grouped_shapes",
    "grouped_unpack",
    "half_linear",
    "int8_dequantize",
    "int8_embedding",
    "int8_linear",
    "int8_quantize",
    "paged_append",
    "paged_attention",
    "paged_gather",
]
