"""A cache of keys and values in pages, for transformers' ``generate`` and for fused blocks.

    use_paged_kv_cache_if_available(model, "int8", kv_memory="2GB")
    model.generate(...)                                     # uses it

Pages of ``page_size`` tokens, each with all layers' keys and values, lie in one arena whose memory
the system commits when it is first written. Sequences have block tables; they share pages (of
beams, of a common prefix), and who writes to a shared page copies it first. See docs/kv_cache.md.
"""

from gpu_poor import _needs_transformers
from gpu_poor.kv_cache.pool import FORMATS, SHARE_OF_AVAILABLE, PagePool

with _needs_transformers("gpu_poor.kv_cache"):
    from gpu_poor.kv_cache.cache import PagedKVCache
    from gpu_poor.kv_cache.generating import use_paged_kv_cache_if_available

__all__ = [
    "FORMATS",
    "SHARE_OF_AVAILABLE",
    "PagePool",
    "PagedKVCache",
    "use_paged_kv_cache_if_available",
]
