"""What makes ``generate`` of a model use pages: of the model's pool, or of one of its own dtype.

Such a model is an object of a subclass of its class (:func:`generating_class`), with two methods
more, and where its head is known a forward (gpu_poor/fusion/heads.py). The class has the name of
the one it was made from; copies and pickles have it again.
"""

import functools
import math
import warnings
from contextvars import ContextVar

from torch import Tensor, nn
from transformers import DynamicCache

from gpu_poor import attention, memory
from gpu_poor.fusion import company
from gpu_poor.fusion.binding import original
from gpu_poor.fusion.blocks import subclass
from gpu_poor.fusion.heads import head_methods
from gpu_poor.kv_cache.cache import PagedKVCache
from gpu_poor.kv_cache.pool import FORMATS, SHARE_OF_AVAILABLE, PagePool, pages_needed
from gpu_poor.modules import checked

#: Tokens to a page of the cache that a fused model without a pool makes.
PAGE_SIZE = 64
#: The caches that the running call of generate has made.
_made: ContextVar[list[PagedKVCache]] = ContextVar("_made")


def use_paged_kv_cache_if_available(
    model: nn.Module, format: str = "int8", kv_memory: int | str | None = None, page_size: int = 64
) -> nn.Module:
    """Make a cache in pages the default of ``model.generate``; the model itself is returned.

    The model's attention becomes ours where it can (see
    :func:`gpu_poor.attention.use_flash_attention_if_available`); another kind of attention goes on
    working, on keys and values gathered from the pages. Before that both are tried on four tokens.
    Copies and pickles of the model have an empty pool of their own, of the same settings.

    Args:
        model: a transformers causal language model on the CPU.
        format, kv_memory, page_size: of :class:`PagePool`. Calling it again changes them.

    Raises:
        TypeError: no model.
        ValueError: a wrong format, size or page_size. A model that can't use pages is no error: it
            is returned as it was, with a warning that says why.
    """
    held, model = model, checked(model, "use_paged_kv_cache_if_available")
    options = dict(format=format, page_size=page_size)
    reason = attention.unsuitable(model)
    if reason is None:
        pool = PagePool(model, kv_memory=kv_memory, **options)
        with warnings.catch_warnings(record=True):
            attention.use_flash_attention_if_available(model)
        reason = attention.differs(model, PagedKVCache(pool.small(1, 4)), "with its own cache")
    if reason is not None:
        warnings.warn(f"{type(model).__name__} keeps its own cache: {reason}", stacklevel=2)
        return held
    if format == "int8":
        pool.center_keys(model)
    setattr(model, memory.KV_POOL, pool)
    model.__class__ = generating_class(original(type(model)))
    return held


@functools.cache
def generating_class(cls: type) -> type:
    """The subclass that a model of class ``cls`` becomes whose ``generate`` uses pages."""
    methods = {"generate": generate, "_prepare_cache_for_generation": _prepare_cache}
    wrapped = {name: functools.wraps(getattr(cls, name))(new) for name, new in methods.items()}
    return subclass(cls, wrapped | head_methods(cls))


def generate(self, *args, **kwargs):
    """The model's own. If it raises, the pages that it took are free again at once, although the
    traceback, which a notebook keeps, holds the cache."""
    made = []
    token = _made.set(made)
    try:
        with company.followed():
            return original(type(self)).generate(self, *args, **kwargs)
    except BaseException:
        for cache in made:
            with cache.pool.allocator.lock:
                cache.sequences.rows.clear()
                cache.pool.allocator.recount()
            cache.reset()
        raise
    finally:
        _made.reset(token)


def _prepare_cache(
    self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *rest
):
    """Pages where the model would make a dynamic cache; a given or another one stays.

    Raises:
        MemoryError: the model's pool may have too few of them, before work starts.
    """
    given = model_kwargs.get("past_key_values") is not None
    args = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *rest
    original(type(self))._prepare_cache_for_generation(self, *args)
    if given or not generation_config.use_cache or generation_config.cache_implementation:
        return
    rows = batch_size * max(
        generation_config.num_beams or 1, generation_config.num_return_sequences or 1
    )
    longest = max_cache_length
    lengths = longest, *_prefill(generation_config, model_kwargs, generation_mode, longest)
    pool = self.__dict__.get(memory.KV_POOL)
    if pool is not None:
        pages = rows * pages_needed(pool.config, pool.page_size, *lengths)
        pool.require(pages, f"generating {rows} sequences of up to {longest} tokens")
    elif (pool := _exact_pool(self, model_kwargs.get("past_key_values"), rows, *lengths)) is None:
        return
    cache = PagedKVCache(pool)
    if generation_config.is_assistant:  # which is set back
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache
    if (made := _made.get(None)) is not None:
        made.append(cache)


def _prefill(config, model_kwargs: dict, mode, longest: int) -> tuple[int | None, int | None]:
    """Tokens of the prompt, and how many of them come at once; None: not known, and all of them."""
    if config.is_assistant or getattr(mode, "value", None) == "assisted_generation":
        return None, None  # several come at once, and some are taken back
    if config.max_new_tokens:
        return longest + 1 - config.max_new_tokens, config.prefill_chunk_size
    given = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
    lengths = [t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() == 2]
    return (max(lengths) if lengths else None), config.prefill_chunk_size


def _exact_pool(
    model: nn.Module, made, rows: int, tokens: int, prompt: int | None, chunk: int | None
) -> PagePool | None:
    """A pool of the model's own dtype, for one cache: nothing is rounded. None: it can't have one.

    It is for the longest sequences the model was made for, so that a conversation may go on in it;
    memory that is not written to is not taken.

    Args:
        made: the cache that the model would have.
        tokens, prompt, chunk: of :func:`pages_needed`.
    """
    formats = {dtype: name for name, dtype in FORMATS.items()}
    # None: transformers before 5.10 leaves it to the model's forward to make one.
    usual = made is None or type(made) is DynamicCache
    if not usual or model.dtype not in formats or attention.unsuitable(model):
        return None
    config = model.config.get_text_config(decoder=True)
    room = int(SHARE_OF_AVAILABLE * memory.available())
    heads, head_dim = memory.kv_shape(config)
    token = len(memory.layer_windows(config)) * 2 * heads * head_dim * model.dtype.itemsize
    page = PAGE_SIZE * token
    needed = rows * pages_needed(config, PAGE_SIZE, tokens, prompt, chunk) * page
    if not 0 < needed <= room:
        return None
    longest = max(tokens, getattr(config, "max_position_embeddings", None) or 0)
    wanted = rows * math.ceil(longest / PAGE_SIZE) * page
    return PagePool(model, formats[model.dtype], min(wanted, room), PAGE_SIZE)
