"""The quantized modules; :data:`KINDS` lists them all by the name that configs use."""

from gpu_poor.nn.base import KINDS, QuantizedModule, kind_of
from gpu_poor.nn.embedding import (
    QuantizedEmbedding,
    QuantizedMaskPositionEmbedding,
    QuantizedPositionEmbedding,
    QuantizedScaledEmbedding,
)
from gpu_poor.nn.experts import QuantizedExperts
from gpu_poor.nn.linear import QuantizedConv1D, QuantizedLinear

__all__ = [
    "KINDS",
    "QuantizedConv1D",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedMaskPositionEmbedding",
    "QuantizedModule",
    "QuantizedPositionEmbedding",
    "QuantizedScaledEmbedding",
    "kind_of",
]
