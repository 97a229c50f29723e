"""Choices of attention: functions registered with transformers, and models made for fewer heads."""

from gpu_poor.attention.lsh import use_lsh_attention
from gpu_poor.attention.multi_query import convert_to_multi_query

__all__ = ["convert_to_multi_query", "use_lsh_attention"]
