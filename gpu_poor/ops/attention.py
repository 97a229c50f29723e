"""Keys and values in pages: append, attention of a few tokens, gather (csrc/attention.c).

``pages`` ``[n, 2 (k, v), kv_heads, page_size, D]`` are float32, bfloat16, float16 or int8; int8
ones have ``scales``, float16 ``[n, 2, kv_heads, page_size]``, one for each token and head. Their
bytes lie in an order of their own (``gp_pages`` in csrc/gpu_poor.h), for which page_size is a
multiple of :data:`SLOTS` and D one of :data:`FOUR`. Slot s of sequence b lies in page
``block_table[b, s // page_size]``. Letters: B sequences, T new tokens, H query heads, D head dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_poor import isa
from gpu_poor.ops import common

HEAD_DIM_MAX = 512
#: Of int8 pages: slots of a key's tile, and elements or slots that lie beside each other.
SLOTS, FOUR = 16, 4


def _dense_pages(t: Tensor) -> bool:
    """Only the pages themselves may lie apart: other layers' parts of them lie between."""
    return len(t) == 0 or t[0].is_contiguous()


def _check_layer(op: str, pages: Tensor, scales: Tensor | None) -> None:
    torch._check(
        pages.dim() == 5 and pages.shape[1] == 2,
        lambda: f"{op}: pages must be [n, 2, kv_heads, page_size, D], got {tuple(pages.shape)}",
    )
    torch._check(
        1 <= pages.shape[4] <= HEAD_DIM_MAX and pages.shape[2] >= 1 and pages.shape[3] >= 1,
        lambda: (
            f"{op}: head_dim must be 1 to {HEAD_DIM_MAX}, and no size 0, got {tuple(pages.shape)}"
        ),
    )
    torch._check(_dense_pages(pages), lambda: f"{op}: each page must be contiguous")
    int8 = pages.dtype == torch.int8
    if not int8:
        common.check_float(op, "pages", pages.dtype)
    torch._check(
        not int8 or (pages.shape[3] % SLOTS == 0 and pages.shape[4] % FOUR == 0),
        lambda: (
            f"{op}: int8 pages need a page_size that is a multiple of {SLOTS} and a head_dim that "
            f"is one of {FOUR}, got {pages.shape[3]} and {pages.shape[4]}"
        ),
    )
    torch._check(
        scales is None
        if not int8
        else scales is not None
        and scales.dtype == torch.float16
        and scales.shape == pages.shape[:4]
        and _dense_pages(scales),
        lambda: f"{op}: int8 pages need float16 scales [n, 2, kv_heads, page_size], others none",
    )


def _check_integers(op: str, name: str, t: Tensor, batch: int, dim: int = 1) -> None:
    torch._check(
        t.dtype == torch.int32 and t.dim() == dim and t.shape[0] == batch and t.is_contiguous(),
        lambda: (
            f"{op}: {name} must be a contiguous int32 {'[B]' if dim == 1 else '[B, max_pages]'} "
            f"with B = {batch}, got {t.dtype} {tuple(t.shape)}"
        ),
    )


def _check_heads(op: str, name: str, x: Tensor, pages: Tensor, grouped: bool = False) -> None:
    heads = pages.shape[2]
    torch._check(
        x.dim() == 4
        and x.shape[3] == pages.shape[4]
        and (x.shape[2] > 0 and x.shape[2] % heads == 0 if grouped else x.shape[2] == heads),
        lambda: (
            f"{op}: {name} must be [B, T, heads, D] with D = {pages.shape[4]} and "
            f"{'a multiple of ' if grouped else ''}{heads} heads, got {tuple(x.shape)}"
        ),
    )
    common.check_float(op, name, x.dtype)


def _check_append(pages, scales, k, v, block_table, lengths, shift) -> None:
    op = "paged_append"
    _check_layer(op, pages, scales)
    for name, x in (("k", k), ("v", v)):
        _check_heads(op, name, x, pages)
    torch._check(k.shape == v.shape, lambda: f"{op}: k and v differ: {k.shape}, {v.shape}")
    _check_integers(op, "block_table", block_table, k.shape[0], 2)
    _check_integers(op, "lengths", lengths, k.shape[0])
    torch._check(
        shift is None
        or (shift.dtype == torch.float32 and shift.shape == (pages.shape[2], pages.shape[4])),
        lambda: f"{op}: shift must be float32 [kv_heads, D], got {shift.dtype} {shift.shape}",
    )


def _check_attention(q, pages, scales, block_table, lengths, starts, window) -> None:
    op = "paged_attention"
    _check_layer(op, pages, scales)
    _check_heads(op, "q", q, pages, grouped=True)
    torch._check(window >= 0, lambda: f"{op}: window must be >= 0, got {window}")
    _check_integers(op, "block_table", block_table, q.shape[0], 2)
    _check_integers(op, "lengths", lengths, q.shape[0])
    if starts is not None:
        _check_integers(op, "starts", starts, q.shape[0])


def _check_gather(pages, scales, block_table, length, dtype, first) -> None:
    _check_layer("paged_gather", pages, scales)
    _check_integers("paged_gather", "block_table", block_table, block_table.shape[0], 2)
    torch._check(
        0 <= first <= length, lambda: f"paged_gather: slots {first} to {length} can't be gathered"
    )
    common.check_float("paged_gather", "dtype", dtype)


def _rows(x: Tensor, pages: Tensor) -> tuple[Tensor, Tensor | None]:
    """What page_store_row makes of x [..., D]: values of the pages' dtype, and scales for int8."""
    if pages.dtype != torch.int8:
        return x.to(pages.dtype), None
    x = x.float()
    absmax = x.abs().amax(-1)
    first = (absmax / torch.full_like(absmax, 127)).half()
    # float16 numbers in order are their bits in order: csrc/attention.h has these candidates.
    bits = first.view(torch.int16)[..., None] + 4 * torch.arange(16, device=x.device)
    scales = bits.to(torch.int16).view(torch.float16).float()
    live = ((first > 0) & first.isfinite())[..., None] & scales.isfinite()
    inverse = torch.where(live, 1 / scales, 0.0)
    q = (x[..., None, :] * inverse[..., None]).round().clamp(-127, 127)
    q = torch.where(live[..., None], q, 0.0)
    error = (x[..., None, :] - q * scales[..., None]).square().sum(-1)
    best = torch.where(live, error, math.inf).argmin(-1, keepdim=True)
    q = q.gather(-2, best[..., None].expand(*best.shape, x.shape[-1])).squeeze(-2)
    scale = torch.where(absmax.isfinite(), scales.gather(-1, best).squeeze(-1), math.nan)
    return q.to(torch.int8), scale.half()


def _slots(pages: Tensor, block_table: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Page and place within it of slots ``at`` [B, n]; any page beyond a sequence's end."""
    size = pages.shape[3]
    page = block_table.long().gather(1, at // size)
    return page.clamp(0, max(len(pages) - 1, 0)), at % size


def _tiles(pages: Tensor, part: int) -> Tensor:
    """int8 keys ``[n, kv_heads, page_size / 16, D / 4, 16, 4]``, or values ``[.., / 4, D, 4]``."""
    n, _, heads, size, d = pages.shape
    if part:
        return pages[:, 1].view(n, heads, size // FOUR, d, FOUR)
    return pages[:, 0].view(n, heads, size // SLOTS, d // FOUR, SLOTS, FOUR)


def _place(tiles: Tensor, page: Tensor, place: Tensor) -> tuple:
    """The index of slots ``[B, n]``: rows ``[B, n, kv_heads, D]``, of keys with D in fours."""
    slots = tiles.shape[4]
    return page, slice(None), place // slots, slice(None), place % slots


def _append_torch(pages, scales, k, v, block_table, lengths, shift) -> None:
    _check_append(pages, scales, k, v, block_table, lengths, shift)
    k = k.float() if shift is None else k.float() - shift
    at = lengths.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    page, place = _slots(pages, block_table, at)
    for part, x in enumerate((k, v)):
        rows, scale = _rows(x, pages)
        if scale is None:
            pages[page, part, :, place] = rows
            continue
        tiles = _tiles(pages, part)
        rows = rows.view(*rows.shape[:3], *tiles.shape[3:4], *tiles.shape[5:])
        tiles[_place(tiles, page, place)] = rows ^ -128  # q + 128, unsigned
        scales[page, part, :, place] = scale


def _gather_torch(pages, scales, block_table, length, dtype, first=0) -> tuple[Tensor, Tensor]:
    _check_gather(pages, scales, block_table, length, dtype, first)
    at = torch.arange(first, length, device=pages.device)
    page, place = _slots(pages, block_table, at.expand(block_table.shape[0], -1))
    parts = []
    for part in range(2):
        if scales is None:
            x = pages[page, part, :, place].float()  # [B, L, kv_heads, D]
        else:
            tiles = _tiles(pages, part)
            q = (tiles[_place(tiles, page, place)] ^ -128).float()
            scale = scales[page, part, :, place].float()
            x = q.view(*scale.shape, pages.shape[4]) * scale[..., None]
        parts.append(F.pad(x.to(dtype).transpose(1, 2), (0, 0, first, 0)).contiguous())
    return parts[0], parts[1]


def _attention_torch(
    q, pages, scales, block_table, lengths, starts, softmax_scale, window
) -> Tensor:
    _check_attention(q, pages, scales, block_table, lengths, starts, window)
    batch, tokens, heads, d = q.shape
    length = int(lengths.max()) if batch else 0
    first = max(0, int(lengths.min()) - tokens + 1 - window) if batch and window else 0
    k, v = _gather_torch(pages, scales, block_table, length, torch.float32, first)
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    query = lengths[:, None] - tokens + torch.arange(tokens, device=q.device)  # [B, T]
    slot = torch.arange(length, device=q.device)
    seen = slot <= query[..., None]
    if window:
        seen &= slot > query[..., None] - window
    if starts is not None:
        seen &= slot >= starts[:, None, None]
    seen = seen[:, None]
    s = q.float().transpose(1, 2) @ k.transpose(2, 3) * softmax_scale
    # Padding sees nothing: zeros. Values as well, for what a token can't see may be a NaN.
    p = torch.where(seen, torch.where(seen, s, -math.inf).softmax(-1), 0.0)
    y = torch.empty_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    for t in range(tokens):
        y[:, t] = (p[:, :, t, None] @ torch.where(seen[:, :, t, :, None], v, 0.0))[:, :, 0]
    return y.to(q.dtype)


common.register(
    {
        "paged_append": _append_torch,
        "paged_attention": _attention_torch,
        "paged_gather": _gather_torch,
    }
)


@torch.library.register_fake("gpu_poor::paged_append")
def _(pages, scales, k, v, block_table, lengths, shift):
    _check_append(pages, scales, k, v, block_table, lengths, shift)


@torch.library.register_fake("gpu_poor::paged_attention")
def _(q, pages, scales, block_table, lengths, starts, softmax_scale, window):
    _check_attention(q, pages, scales, block_table, lengths, starts, window)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.register_fake("gpu_poor::paged_gather")
def _(pages, scales, block_table, length, dtype, first):
    _check_gather(pages, scales, block_table, length, dtype, first)
    shape = (block_table.shape[0], pages.shape[2], length, pages.shape[4])
    return pages.new_empty(shape, dtype=dtype), pages.new_empty(shape, dtype=dtype)


def paged_append(
    pages: Tensor,
    scales: Tensor | None,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    shift: Tensor | None = None,
) -> None:
    """Store T tokens after the ``lengths`` that each sequence has, in place.

    Args:
        pages, scales: of one layer, as above; each page contiguous.
        k, v: ``[B, T, kv_heads, D]`` of a float dtype, any strides. An int8 row is
            ``q = rint(x / scale)``, with the float16 scale of least squared error of 16 between
            ``absmax / 127`` and 6 % more; one with a NaN or an infinity, or
            too large for float16, makes every attention that sees it NaN.
        block_table: int32 ``[B, max_pages]``, contiguous; read from the first new slot's entry on.
        lengths: int32 ``[B]``.
        shift: float32 ``[kv_heads, D]`` that keys are stored less. The softmax does not see it, if
            all keys of a sequence have it: it takes from all scores of a query the same.

    Raises:
        RuntimeError: a shape or dtype, a full block table, or a page that does not exist.
    """
    if isa.uses_torch():
        _append_torch(pages, scales, k, v, block_table, lengths, shift)
    else:
        torch.ops.gpu_poor.paged_append(pages, scales, k, v, block_table, lengths, shift)


def paged_attention(
    q: Tensor,
    pages: Tensor,
    scales: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """Attention of the last T of each sequence's tokens, which are in the pages already.

    Args:
        q: ``[B, T, H, D]`` of a float dtype, H a multiple of the pages' kv_heads.
        lengths: int32 ``[B]``, tokens of each sequence, the T included.
        starts: int32 ``[B]``, the first slot that counts (left padding); None: 0.
        softmax_scale: None: ``D ** -0.5``. window: slots seen, itself included; 0: all. What the
            block table says of slots that none of the tokens sees is not read.

    Returns:
        ``[B, T, H, D]`` of q's dtype, float32 inside; zeros for a token that sees nothing. Query
        token i sees slots up to ``lengths - T + i``. The bits depend neither on the batch, T, page
        size, threads nor instruction set: chunks of 256 slots from the start are combined in order.
    """
    common.refuse_tangent("paged_attention", q)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    args = (q, pages, scales, block_table, lengths, starts, softmax_scale, window)
    return (
        _attention_torch(*args) if isa.uses_torch() else torch.ops.gpu_poor.paged_attention(*args)
    )


def paged_gather(
    pages: Tensor,
    scales: Tensor | None,
    block_table: Tensor,
    length: int,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """The first ``length`` keys and values of each sequence as they are stored, in ``dtype``.

    Args:
        first: the first slot that there is; before it the tables are not read.

    Returns:
        k, v ``[B, kv_heads, length, D]``, contiguous; 0 before slot ``first``.

    Raises:
        RuntimeError: a shape or dtype, a short block table, or a page that does not exist.
    """
    args = (pages, scales, block_table, length, dtype, first)
    run = _gather_torch if isa.uses_torch() else torch.ops.gpu_poor.paged_gather
    return run(*args)
