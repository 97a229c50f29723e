"""The arena of a model's pages: what it holds, in which format, and how much of it there is."""

import math

import torch
from torch import Tensor, nn

from gpu_poor import memory, ops
from gpu_poor.metrics_input import n_positions
from gpu_poor.modules import evaluating
from gpu_poor.paging import PageAllocator

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
        page_size: tokens to a page; of "int8" a multiple of 16.

    Raises:
        TypeError: no model, and no config of one.
        ValueError: an unknown format, a malformed size, one in which no page fits, or layers that
            are not keys and values of tokens.
        MemoryError: the system refuses a ``kv_memory`` so large.
    """

    def __init__(self, config, format="int8", kv_memory=None, page_size: int = 64):
        found = getattr(config, "config", config)
        if not hasattr(found, "get_text_config"):
            raise TypeError(
                "a pool is made for a transformers model or its config, got "
                f"{type(config).__name__}"
            )
        config = found.get_text_config(decoder=True)
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        if type(page_size) is not int or not 1 <= page_size <= 2**16:
            raise ValueError(f"page_size must be a number of tokens up to 65536, got {page_size!r}")
        self.config, self.format, self.page_size = config, format, page_size
        self._settings = config, format, kv_memory, page_size
        self.kv_heads, self.head_dim = memory.kv_shape(config)
        if self.head_dim > ops.HEAD_DIM_MAX:
            raise ValueError(f"heads of {self.head_dim} are larger than {ops.HEAD_DIM_MAX}")
        if format == "int8":
            _check_tiles(page_size, self.head_dim)
        #: Of each layer how many tokens it sees; 0: all.
        self.windows = _windows(config)
        #: Tokens that some layer sees: the pages of those before are given back. 0: all.
        self.window = _widest(self.windows)
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
        try:
            self.arena = torch.empty(*shape, self.head_dim, dtype=FORMATS[format])
            self.scales = torch.empty(shape, dtype=torch.float16) if format == "int8" else None
        except RuntimeError as error:  # torch's allocator; it names neither the size nor us
            raise MemoryError(
                f"kv_memory={kv_memory!r} is more than the system gives: {memory.available():,} "
                "bytes are available"
            ) from error
        #: float32 ``[layers, kv_heads, D]`` that keys are stored less; None: 0. See center_keys.
        self.shift: Tensor | None = None
        # Decoding reads pages from all over it: 2 MB ones are 20 % faster at 8192 tokens of int8.
        memory.prefer_huge_pages(self.arena)

    def __repr__(self) -> str:
        n_pages, n_free = self.allocator.n_pages, self.allocator.n_free
        return (
            f"PagePool({self.format}, {n_pages:,} pages of {self.page_size} tokens, "
            f"{n_free:,} free, {n_pages * self.page_bytes:,} bytes)"
        )

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
        """What a sequence of so many tokens takes, if they come at once: whole pages."""
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
        from gpu_poor.kv_cache.cache import PagedKVCache

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
        if n_pages > self.allocator.n_free:
            with self.allocator.lock:
                self.allocator.recount()
        free, pages = self.allocator.n_free, self.allocator.n_pages
        if n_pages > free:
            raise MemoryError(
                f"{what} needs {n_pages} pages of {self.page_size} tokens "
                f"({n_pages * self.page_bytes:,} bytes as {self.format}), but {free} of {pages} "
                f"are free: kv_memory is {self.kv_memory:,} bytes. Give more of it, use a smaller "
                "format, or fewer or shorter sequences"
            )

    def __reduce__(self):
        """Copied or pickled, with the model it belongs to, it is an empty one of its settings."""
        return PagePool, self._settings, {"shift": self.shift}


def _check_tiles(page_size: int, head_dim: int) -> None:
    """Raises ValueError unless int8 pages can have these sizes: csrc/gpu_poor.h has their order."""
    floats = ", ".join(name for name in FORMATS if name != "int8")
    if page_size % ops.SLOTS:
        raise ValueError(
            f"page_size={page_size}: int8 needs a multiple of {ops.SLOTS}; {floats} take any"
        )
    if head_dim % ops.FOUR:
        raise ValueError(
            f"heads of {head_dim}: int8 needs a multiple of {ops.FOUR}; {floats} take any"
        )


def _windows(config) -> list[int]:
    return [
        window if kind == "sliding_attention" else 0
        for kind, window in memory.layer_windows(config)
    ]


def _widest(windows: list[int]) -> int:
    """How many tokens back any of the layers sees; 0: one of them sees all."""
    return max(windows) if all(windows) else 0


def pages_needed(
    config, page_size: int, tokens: int, prompt: int | None = None, chunk: int | None = None
) -> int:
    """Pages that a sequence needs at most while it grows to so many tokens.

    Args:
        prompt: tokens that come first, ``chunk`` of them at a time (None: all at once); after them
            one by one. None: that is not known, and nothing is given back.
    """
    window, whole = _widest(_windows(config)), math.ceil(tokens / page_size)
    if not window or prompt is None:
        return whole

    def seen_by(new: int) -> int:
        """Pages that window - 1 + new slots in a row may lie in."""
        return math.ceil((window + new - 2) / page_size) + 1

    filled = math.ceil(prompt / page_size)
    if chunk is not None:
        filled = min(filled, seen_by(chunk))
    return min(whole, max(filled, seen_by(1)))


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
