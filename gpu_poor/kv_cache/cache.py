"""A transformers cache whose keys and values lie in pages."""

import copy

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from gpu_poor import attention, memory, ops
from gpu_poor.kv_cache.pool import PagePool
from gpu_poor.kv_cache.sequences import Sequences


class PagedLayer(CacheLayerMixin):
    """One layer of a :class:`PagedKVCache`. ``stored``: tokens of each sequence in the pages."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, sequences: Sequences, index: int):
        super().__init__()
        self.sequences, self.index, self.stored = sequences, index, 0
        self.pages, self.scales = sequences.pool.layer(index)
        self.window = sequences.pool.windows[index]
        shift = sequences.pool.shift
        self.shift = None if shift is None else shift[index]
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing: the arena is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Store keys and values ``[B, kv_heads, T, D]``.

        Returns:
            With our attention the same two tensors, marked as this layer's (it reads the pages);
            with any other all that is stored, ``[B, kv_heads, L, D]`` in the dtype given.
        """
        self._check(key_states, value_states)
        batch, _, tokens, _ = key_states.shape
        sequences = self.sequences
        if sequences.handed_out is not None:
            other, sequences.handed_out = sequences.handed_out, None
            raise RuntimeError(
                f"the attention of layer {other} never asked for its cached keys: it does not "
                'run through the attention function "gpu_poor" of the model\'s config'
            )
        sequences.reserve(batch, self.stored, self.stored + tokens)
        ops.paged_append(
            self.pages,
            self.scales,
            key_states.detach().transpose(1, 2),
            value_states.detach().transpose(1, 2),
            sequences.table,
            sequences.lengths(self.stored),
            self.shift,
        )
        self.stored += tokens
        if sequences.pool.config._attn_implementation != attention.NAME:
            return self.gather(key_states.dtype)
        sequences.handed_out, key_states._gp_layer = self.index, self
        return key_states, value_states

    def _check(self, k: Tensor, v: Tensor) -> None:
        pool = self.sequences.pool
        for name, x in (("keys", k), ("values", v)):
            if x.shape[1] != pool.kv_heads or x.shape[3] != pool.head_dim:
                raise ValueError(
                    f"layer {self.index}: {name} {tuple(x.shape)} are not [B, {pool.kv_heads}, T, "
                    f"{pool.head_dim}], which the config says"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    "a cache in pages keeps no gradients: use torch.no_grad(), or use_cache=False"
                )

    def gather(self, dtype: torch.dtype, shifted: bool = False) -> tuple[Tensor, Tensor]:
        """All keys and values as they are stored, ``[B, kv_heads, stored, D]``.

        0 where the pages have been given back: no mask lets a token see that.
        ``shifted``: without adding again what keys are stored less, for a softmax.
        """
        table, begin = self.sequences.table, self.sequences.left * self.sequences.pool.page_size
        k, v = ops.paged_gather(self.pages, self.scales, table, self.stored, dtype, begin)
        if self.shift is not None and not shifted:
            k += self.shift[:, None]
        return k, v

    def attend(self, query: Tensor, starts: Tensor | None, scale: float | None) -> Tensor:
        """Attention ``[B, T, H, D]`` of the last T tokens, query ``[B, H, T, D]``, on the pages."""
        return ops.paged_attention(
            query.transpose(1, 2),
            self.pages,
            self.scales,
            self.sequences.table,
            self.sequences.lengths(self.stored),
            starts,
            scale,
            self.window,
        )

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers < 5.5 gives the positions of the queries
        tokens = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.stored + tokens, 0

    def get_seq_length(self) -> int:
        return self.stored

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class PagedKVCache(Cache):
    """A transformers cache whose keys and values are pages of a :class:`PagePool`.

    Args:
        pool: a pool, shared by any number of caches; a model, whose pool is taken if
            ``use_paged_kv_cache_if_available`` has made one; or the model or config to make one
            for, with the ``options`` of PagePool.

    Its pages are free again when it is gone, those that all windows have left (of a model all of
    whose layers have one) when the next tokens come. For code that runs a whole block itself:
    :meth:`reserve` once for each forward, before the first layer stores anything;
    ``block_table``, ``lengths`` and ``starts``, with ``layers[i].pages``, ``.scales``, ``.window``
    and ``.shift``, are what the operators take; then :meth:`advance` (or ``layers[i].stored += T``,
    if other layers call ``update``, which does both for its own layer).
    """

    def __init__(self, pool, **options):
        pool = getattr(pool, memory.KV_POOL, pool)
        if not isinstance(pool, PagePool):
            pool = PagePool(pool, **options)
        elif options:
            raise ValueError(f"the pool is made already: {', '.join(options)} can't be changed")
        self.pool, self.sequences = pool, Sequences(pool)
        super().__init__(layers=[PagedLayer(self.sequences, i) for i in range(len(pool.windows))])

    @property
    def block_table(self) -> Tensor:
        """int32 ``[B, max_pages]``; -1 where a sequence has no page, or has given it back."""
        return self.sequences.table

    @property
    def lengths(self) -> Tensor:
        """int32 ``[B]``: tokens stored of each sequence (of the first layer)."""
        return self.sequences.lengths(self.layers[0].stored)

    @property
    def starts(self) -> Tensor | None:
        """int32 ``[B]``: the first slot that counts, as the last mask said; None: 0."""
        return self.sequences.starts

    @starts.setter
    def starts(self, starts: Tensor | None) -> None:
        self.sequences.starts = starts

    def reserve(self, tokens: int, batch: int | None = None) -> None:
        """Pages for so many more tokens of each sequence; ``batch`` is needed by an empty cache.

        Raises:
            MemoryError: there are too few; the cache is as it was.
        """
        stored = self.layers[0].stored
        batch = len(self.sequences.rows) if batch is None else batch
        self.sequences.reserve(batch, stored, stored + tokens)

    def advance(self, tokens: int) -> None:
        """Every layer has stored so many more tokens."""
        for layer in self.layers:
            layer.stored += tokens

    def _set_stored(self, tokens: int) -> None:
        self.sequences.keep(tokens)
        self.sequences.handed_out = None
        for layer in self.layers:
            layer.stored = tokens

    def reset(self) -> None:
        self._set_stored(0)

    def crop(self, max_length: int) -> None:
        """Negative: remove so many tokens; positive: keep so many; 0: nothing.

        Raises:
            ValueError: the next token would see what has left all windows and was given back.
        """
        stored = min(layer.stored for layer in self.layers)
        keep = stored + max_length if max_length <= 0 else min(max_length, stored)
        self._set_stored(max(keep, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.sequences.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = range(len(self.sequences.rows))
        self.sequences.select([i for i in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(len(self.sequences.rows))
        self.sequences.select(rows[indices].tolist())

    def activate_past_recording(self) -> None:
        """From now on pages that all windows have left are kept until :meth:`crop` is called.

        Without it no more can be undone than the last call of the model stored.
        """
        self.sequences.keeps_past = True

    def share_prefix(self, input_ids: Tensor) -> int:
        """Take over published pages that begin ``input_ids`` ``[B, L]``, into an empty cache.

        Returns:
            How many tokens of each sequence are stored now: whole pages, the fewest that any of the
            sequences has, and never all of L. ``generate(input_ids, past_key_values=cache)`` goes
            on from there.
        """
        if self.sequences.rows:
            raise ValueError("only an empty cache can share a prefix")
        _check_ids(input_ids)
        size, allocator = self.pool.page_size, self.pool.allocator
        wanted = _pages_of(input_ids, input_ids.shape[1] - 1, size)
        with allocator.lock:
            rows = [allocator.find(pages) for pages in wanted]
            n = min(map(len, rows), default=0)
            self.sequences.take_over([row[:n] for row in rows] if n else [])
        self._set_stored(n * size)
        return n * size

    def publish(self, input_ids: Tensor) -> None:
        """Let other caches of the pool share the complete pages that hold these tokens.

        Args:
            input_ids: ``[B, L]``, what is stored: of its beginning (a prompt) or all of it (what
                ``generate`` returned, whose last token is not stored yet).

        Raises:
            ValueError: not as many sequences as are stored, padding on the left, or pages that have
                been given back (:meth:`activate_past_recording` keeps them).
        """
        _check_ids(input_ids)
        stored, size = min(layer.stored for layer in self.layers), self.pool.page_size
        if input_ids.shape[0] != len(self.sequences.rows) or not stored:
            raise ValueError(
                f"{len(self.sequences.rows)} sequences of {stored} tokens are stored, got tokens "
                f"{tuple(input_ids.shape)}"
            )
        if self.starts is not None and bool(self.starts.any()):
            raise ValueError("padded sequences can't be published: their pages begin with padding")
        if self.sequences.left:
            raise ValueError(
                f"the first {self.sequences.left * size} of {stored} tokens have left all windows, "
                "and their pages are given back: activate_past_recording() before keeps them"
            )
        with self.pool.allocator.lock:
            for tokens, row in zip(
                _pages_of(input_ids, min(stored, input_ids.shape[1]), size),
                self.sequences.rows,
                strict=True,
            ):
                self.pool.allocator.publish(tokens, row[: len(tokens)])

    def __deepcopy__(self, memo) -> "PagedKVCache":
        """A cache of the same pool that shares all pages until one of both writes to them."""
        twin = PagedKVCache(self.pool)
        memo[id(self)] = twin
        twin.sequences = copy.deepcopy(self.sequences)
        for layer, mine in zip(twin.layers, self.layers, strict=True):
            layer.sequences, layer.stored = twin.sequences, mine.stored
        return twin


def _check_ids(input_ids) -> None:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        shape = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else None
        raise ValueError(
            f"input_ids must be a tensor [B, L], got {shape or type(input_ids).__name__}"
        )


def _pages_of(input_ids: Tensor, length: int, size: int) -> list[list[tuple[int, ...]]]:
    """Of each sequence the tokens of its complete pages within ``length``."""
    return [
        [tuple(row[i : i + size]) for i in range(0, length // size * size, size)]
        for row in input_ids.tolist()
    ]
