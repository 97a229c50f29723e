"""A cache of keys and values in pages, for transformers' ``generate`` and for fused blocks.

    use_paged_kv_cache_if_available(model, "int8", kv_memory="2GB")
    model.generate(...)                                     # uses it

Pages of ``page_size`` tokens, each with all layers' keys and values, lie in one arena whose memory
the system commits when it is first written. Sequences have block tables; they share pages (of
beams, of a common prefix), and who writes to a shared page copies it first. See docs/kv_cache.md.
"""

import math
import types
import warnings
import weakref
from collections import Counter

import torch
from torch import Tensor, nn

from gpu_poor import _needs_transformers, attention, memory, ops
from gpu_poor.metrics_input import n_positions
from gpu_poor.modules import evaluating, unwrap
from gpu_poor.paging import PageAllocator

with _needs_transformers("gpu_poor.kv_cache"):
    from transformers import Cache
    from transformers.cache_utils import CacheLayerMixin

FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
#: Without kv_memory the arena may grow to this share of what is available when it is made.
SHARE_OF_AVAILABLE = 0.8
#: Sequences and tokens of each that the mean of the keys is taken of.
CENTER_ON = 4, 128


class PagePool:
    """The arena of one model, and who holds which page of it.

    Args:
        config: of a transformers language model; or the model.
        format: what keys and values are stored as: "fp32", "bf16", "fp16" or "int8" (a float16
            scale for each token and head).
        kv_memory: bytes, or "2GB"; no more is ever used. None: :data:`SHARE_OF_AVAILABLE` of what
            system and memory cgroup have left.
        page_size: tokens to a page.

    Raises:
        ValueError: an unknown format, a malformed size, one in which no page fits, or layers that
            are not keys and values of tokens.
    """

    def __init__(self, config, format="int8", kv_memory=None, page_size: int = 64):
        config = getattr(config, "config", config).get_text_config(decoder=True)
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if not isinstance(page_size, int) or not 1 <= page_size <= 2**16:
            raise ValueError(f"page_size must be a number of tokens up to 65536, got {page_size!r}")
        self.config, self.format, self.page_size = config, format, page_size
        self.kv_heads, self.head_dim = memory.kv_shape(config)
        if self.head_dim > ops.HEAD_DIM_MAX:
            raise ValueError(f"heads of {self.head_dim} are larger than {ops.HEAD_DIM_MAX}")
        #: Of each layer how many tokens it sees; 0: all.
        self.windows = [
            window if kind == "sliding_attention" else 0
            for kind, window in memory.layer_windows(config)
        ]
        self.kv_memory = _as_bytes(kv_memory)
        n_pages = min(self.kv_memory // self.page_bytes, 2**31 - 1)
        if n_pages < 1:
            raise ValueError(
                f"kv_memory={kv_memory!r} is {self.kv_memory:,} bytes: less than a page of "
                f"{self.page_bytes:,} ({page_size} tokens, {format})"
            )
        self.allocator = PageAllocator(n_pages)
        shape = (n_pages, len(self.windows), 2, self.kv_heads, page_size)
        # Not zeros: nothing is read that was not written, and what is not written costs nothing.
        self.arena = torch.empty(*shape, self.head_dim, dtype=FORMATS[format])
        self.scales = torch.empty(shape, dtype=torch.float16) if format == "int8" else None
        #: float32 ``[layers, kv_heads, D]`` that keys are stored less; None: 0. See center_keys.
        self.shift: Tensor | None = None
        # Decoding reads pages from all over it: 2 MB ones are 20 % faster at 8192 tokens of int8.
        memory.prefer_huge_pages(self.arena)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, all layers."""
        scale = 2 if self.format == "int8" else 0
        row = self.head_dim * FORMATS[self.format].itemsize + scale
        return len(self.windows) * 2 * self.kv_heads * row

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.token_bytes

    def bytes_of(self, context: int) -> int:
        """What a sequence of so many tokens takes: whole pages."""
        return math.ceil(context / self.page_size) * self.page_bytes

    def layer(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Pages ``[n, 2, kv_heads, page_size, D]`` and scales of layer i, views of the arena."""
        return self.arena[:, i], None if self.scales is None else self.scales[:, i]

    @torch.no_grad()
    def center_keys(self, model: nn.Module) -> None:
        """Store keys less their mean, which takes from all scores of a query the same.

        int8 then has its steps for what tells keys apart. The mean is over :data:`CENTER_ON` tokens
        that the model predicts at every place of as many random ones, the same ones always: nearly
        as good as its own text, and two passes in place of a generation.

        Raises:
            ValueError: something is stored already.
        """
        if self.allocator.n_free < self.allocator.n_pages:
            raise ValueError("keys are stored already: they can't be centred any more")
        rows, tokens = CENTER_ON[0], min(CENTER_ON[1], n_positions(model))
        generator = torch.Generator().manual_seed(0)
        means = []
        with evaluating(model):
            for _ in range(rows):
                ids = torch.randint(self.config.vocab_size, (1, tokens), generator=generator)
                chances = model(input_ids=ids, use_cache=False).logits[0, :-1].float().softmax(-1)
                ids[0, 1:] = torch.multinomial(chances, 1, generator=generator)[:, 0]
                cache = PagedKVCache(self.small(1, tokens))
                model(input_ids=ids, past_key_values=cache, use_cache=True)
                keys = [layer.gather(torch.float32)[0] for layer in cache.layers]
                means.append(torch.stack([k.mean((0, 2)) for k in keys]))
        self.shift = torch.stack(means).mean(0)

    def small(self, rows: int, tokens: int) -> "PagePool":
        """Another pool for so much, in float32."""
        token = len(self.windows) * 2 * self.kv_heads * self.head_dim * 4
        n_bytes = rows * math.ceil(tokens / self.page_size) * self.page_size * token
        return PagePool(self.config, "fp32", n_bytes, self.page_size)

    def copy(self, source: list[int], target: list[int]) -> None:
        for tensor in (self.arena, self.scales):
            if tensor is not None and source:
                tensor[target] = tensor[source]

    def require(self, n_pages: int, what: str) -> None:
        """Raises MemoryError unless so many pages can be had."""
        free, pages = self.allocator.n_free, self.allocator.n_pages
        if n_pages > free:
            raise MemoryError(
                f"{what} needs {n_pages} pages of {self.page_size} tokens "
                f"({n_pages * self.page_bytes:,} bytes as {self.format}), but {free} of {pages} "
                f"are free: kv_memory is {self.kv_memory:,} bytes. Give more of it, use a smaller "
                "format, or fewer or shorter sequences"
            )

    def __deepcopy__(self, memo):
        """A copied model gets a pool of its own, not gigabytes of pages nobody holds."""
        pool = PagePool(self.config, self.format, self.kv_memory, self.page_size)
        pool.shift = self.shift
        return pool


def _as_bytes(kv_memory: int | str | None) -> int:
    if kv_memory is None:
        return int(SHARE_OF_AVAILABLE * memory.available())
    value = memory.size_of(kv_memory) if isinstance(kv_memory, str) else kv_memory
    known = isinstance(value, int | float) and not isinstance(kv_memory, bool | float)
    if not known or not 1 <= value <= memory.LARGEST:
        raise ValueError(
            f'kv_memory must be bytes (an int) or a size like "2GB", got {kv_memory!r}'
        )
    return int(value)


class Sequences:
    """The block tables of a batch. All sequences have the same number of tokens, padding included.

    Cache and layers have it in common, and nothing that it holds refers back to it: when the last
    of them is gone, its pages are free again, whatever exception was on the way.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.rows: list[list[int]] = []  # always this object: the finalizer has it
        self.table = torch.zeros(0, 0, dtype=torch.int32)
        self.starts: Tensor | None = None
        self.handed_out: int | None = None  # layer whose keys its attention has not asked for yet
        self._lengths: dict[int, Tensor] = {}
        weakref.finalize(self, _release_all, pool.allocator, self.rows).atexit = False

    def lengths(self, tokens: int) -> Tensor:
        """int32 ``[B]`` of that number; the last ones are kept."""
        found = self._lengths.get(tokens)
        if found is None or len(found) != len(self.rows):
            if len(self._lengths) > 8:
                self._lengths.clear()
            found = torch.full((len(self.rows),), tokens, dtype=torch.int32)
            self._lengths[tokens] = found
        return found

    def reserve(self, batch: int, begin: int, end: int) -> None:
        """Pages for slots [begin, end) of ``batch`` sequences, which nobody else holds.

        Raises:
            ValueError: another batch than before. MemoryError: too few pages; nothing has changed.
        """
        if self.rows and batch != len(self.rows):
            raise ValueError(f"the cache holds {len(self.rows)} sequences, got {batch}")
        pool, size = self.pool, self.pool.page_size
        first, last = begin // size, math.ceil(end / size)
        rows = self.rows or [[] for _ in range(batch)]
        missing = sum(max(0, last - len(row)) for row in rows)
        written = [(row, i) for row in rows for i in range(first, min(last, len(row)))]
        copies = self._copies(written)
        if missing + copies == 0 and rows is self.rows:
            return
        what = f"a cache of {batch} sequences of {end} tokens"
        pool.require(missing + copies, what)
        self._copy_shared(written)
        for row in rows:
            row += pool.allocator.allocate(max(0, last - len(row)))
        self.rows[:] = rows
        self.refresh()

    def _copies(self, written: list[tuple[list[int], int]]) -> int:
        """How many of these pages will be copied. The last holder of a page needs no copy."""
        allocator, n = self.pool.allocator, 0
        for page, ours in Counter(row[i] for row, i in written).items():
            kept = not allocator.published(page) and allocator.owners(page) == ours
            n += ours - kept
        return n

    def _copy_shared(self, written: list[tuple[list[int], int]]) -> None:
        allocator = self.pool.allocator
        for row, i in written:
            if not allocator.writable(row[i]):
                (page,) = allocator.allocate(1)
                self.pool.copy([row[i]], [page])
                allocator.release([row[i]])
                row[i] = page

    def keep(self, tokens: int) -> None:
        """Release the pages beyond so many tokens."""
        n = math.ceil(tokens / self.pool.page_size)
        for row in self.rows:
            self.pool.allocator.release(row[n:])
            del row[n:]
        if tokens == 0:
            self.rows.clear()
            self.starts = None
        self.refresh()

    def select(self, indices: list[int]) -> None:
        """Row i becomes what row ``indices[i]`` was; only tables move."""
        if not self.rows:
            return
        if not all(-len(self.rows) <= i < len(self.rows) for i in indices):
            raise IndexError(f"rows {indices} of a cache of {len(self.rows)} sequences")
        chosen = [list(self.rows[i]) for i in indices]
        for row in chosen:
            self.pool.allocator.hold(row)
        for row in self.rows:
            self.pool.allocator.release(row)
        self.rows[:] = chosen
        if self.starts is not None:
            self.starts = self.starts[indices].contiguous()
        self.refresh()

    def refresh(self) -> None:
        """Write the tables. Their width doubles, so that a new page seldom makes a new tensor."""
        batch, width = len(self.rows), max(map(len, self.rows), default=0)
        if self.table.shape[0] != batch or self.table.shape[1] < width:
            width_of_table = 1 << max(3, (width - 1).bit_length())
            self.table = torch.zeros(batch, width_of_table, dtype=torch.int32)
        if width:
            self.table[:, :width] = torch.tensor(self.rows, dtype=torch.int32)


def _release_all(allocator: PageAllocator, rows: list[list[int]]) -> None:
    for row in rows:
        allocator.release(row)
    rows.clear()


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

        ``shifted``: without adding again what keys are stored less, for a softmax.
        """
        table = self.sequences.table
        k, v = ops.paged_gather(self.pages, self.scales, table, self.stored, dtype)
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
        pool: a pool, shared by any number of caches; or the model (or config) to make one for, with
            the ``options`` of PagePool.

    Its pages are free again when it is gone. For code that runs a whole block itself:
    :meth:`reserve` once for each forward, before the first layer stores anything;
    ``block_table``, ``lengths`` and ``starts``, with ``layers[i].pages``, ``.scales``, ``.window``
    and ``.shift``, are what the operators take; then :meth:`advance` (or ``layers[i].stored += T``,
    if other layers call ``update``, which does both for its own layer).
    """

    def __init__(self, pool, **options):
        if not isinstance(pool, PagePool):
            pool = PagePool(pool, **options)
        elif options:
            raise ValueError(f"the pool is made already: {', '.join(options)} can't be changed")
        self.pool, self.sequences = pool, Sequences(pool)
        super().__init__(layers=[PagedLayer(self.sequences, i) for i in range(len(pool.windows))])

    @property
    def block_table(self) -> Tensor:
        """int32 ``[B, max_pages]``; entries beyond a sequence's pages mean nothing."""
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
        self.sequences.handed_out = None
        self.sequences.keep(tokens)
        for layer in self.layers:
            layer.stored = tokens

    def reset(self) -> None:
        self._set_stored(0)

    def crop(self, max_length: int) -> None:
        """Negative: remove so many tokens; positive: keep so many; 0: nothing."""
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
        """Nothing: the past is kept, windows only hide it."""

    def share_prefix(self, input_ids: Tensor) -> int:
        """Take over published pages that begin ``input_ids`` ``[B, L]``, into an empty cache.

        Returns:
            How many tokens of each sequence are stored now: whole pages, the fewest that any of the
            sequences has, and never all of L. ``generate(input_ids, past_key_values=cache)`` goes
            on from there.
        """
        if self.sequences.rows:
            raise ValueError("only an empty cache can share a prefix")
        size, allocator = self.pool.page_size, self.pool.allocator
        rows = [
            allocator.find(pages) for pages in _pages_of(input_ids, input_ids.shape[1] - 1, size)
        ]
        n = min(map(len, rows), default=0)
        if n:
            self.sequences.rows[:] = [row[:n] for row in rows]
            for row in self.sequences.rows:
                allocator.hold(row)
            self.sequences.refresh()
            self._set_stored(n * size)
        return n * size

    def publish(self, input_ids: Tensor) -> None:
        """Let other caches of the pool share what is stored: the tokens of it, ``[B, >= stored]``.

        Raises:
            ValueError: fewer tokens than are stored, or padding on the left.
        """
        stored, size = min(layer.stored for layer in self.layers), self.pool.page_size
        if input_ids.shape[0] != len(self.sequences.rows) or input_ids.shape[1] < stored:
            raise ValueError(
                f"{len(self.sequences.rows)} sequences of {stored} tokens are stored, got tokens "
                f"{tuple(input_ids.shape)}"
            )
        if self.starts is not None and bool(self.starts.any()):
            raise ValueError("padded sequences can't be published: their pages begin with padding")
        for tokens, row in zip(
            _pages_of(input_ids, stored, size), self.sequences.rows, strict=True
        ):
            self.pool.allocator.publish(tokens, row[: len(tokens)])


def _pages_of(input_ids: Tensor, length: int, size: int) -> list[list[tuple[int, ...]]]:
    """Of each sequence the tokens of its complete pages within ``length``."""
    return [
        [tuple(row[i : i + size]) for i in range(0, length // size * size, size)]
        for row in input_ids.tolist()
    ]


def use_paged_kv_cache_if_available(
    model: nn.Module, format: str = "int8", kv_memory: int | str | None = None, page_size: int = 64
) -> nn.Module:
    """Make a cache in pages the default of ``model.generate``; the model itself is returned.

    The model's attention becomes ours where it can (see
    :func:`gpu_poor.attention.use_flash_attention_if_available`); another kind of attention goes on
    working, on keys and values gathered from the pages. Before that both are tried on four tokens.

    Args:
        model: a transformers causal language model on the CPU.
        format, kv_memory, page_size: of :class:`PagePool`. Calling it again changes them.

    Raises:
        ValueError: a wrong format, size or page_size. A model that can't use pages is no error: it
            is returned as it was, with a warning that says why.
    """
    held, model = model, unwrap(model)
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
    model._gp_kv_pool = pool
    model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)
    return held


def _prepare_cache(
    self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *rest
):
    """Stands in for the model's method of this name: pages where it would make a dynamic cache.

    Refuses before work starts what may not fit at its longest.
    """
    given = model_kwargs.get("past_key_values") is not None
    if given or not generation_config.use_cache or generation_config.cache_implementation:
        original = type(self)._prepare_cache_for_generation
        return original(
            self,
            generation_config,
            model_kwargs,
            generation_mode,
            batch_size,
            max_cache_length,
            *rest,
        )
    pool = self._gp_kv_pool
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    rows = batch_size * copies
    pages = rows * math.ceil(max_cache_length / pool.page_size)
    pool.require(pages, f"generating {rows} sequences of up to {max_cache_length} tokens")
    model_kwargs["past_key_values"] = PagedKVCache(pool)
