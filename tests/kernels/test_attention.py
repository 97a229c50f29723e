"""Attention over pages on every instruction set, against float64 and against itself."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_equal, assert_within, heavy_tailed

from gpu_poor import isa as instruction_sets
from gpu_poor import ops

FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


def empty_pages(n, kv_heads, page_size, d, dtype):
    """Pages and scales full of NaN (int8: 127 times NaN): what is not written must not be read.

    The second of three layers, which lie together page by page.
    """
    shape = (n, 3, 2, kv_heads, page_size, d)
    if dtype != torch.int8:
        return torch.full(shape, float("nan"), dtype=dtype)[:, 1], None
    scales = torch.full(shape[:5], float("nan"), dtype=torch.float16)
    return torch.full(shape, 127, dtype=dtype)[:, 1], scales[:, 1]


def block_table(batch, length, page_size):
    """Pages in a random order, none shared; unused entries name no page."""
    per_row = -(-length // page_size)
    order = torch.randperm(batch * per_row, generator=torch.Generator().manual_seed(batch))
    table = torch.full((batch, per_row + 1), -1, dtype=torch.int32)
    table[:, :per_row] = order.view(batch, per_row)
    return table


def store(k, v, page_size, dtype, split=None):
    """Keys and values [B, L, kv_heads, D] in pages, appended in two parts; also the block table."""
    batch, length, kv_heads, d = k.shape
    table = block_table(batch, length, page_size)
    pages, scales = empty_pages(int(table.max()) + 1, kv_heads, page_size, d, dtype)
    split = length // 3 if split is None else split
    for begin, end in ((0, split), (split, length)):
        before = torch.full((batch,), begin, dtype=torch.int32)
        ops.paged_append(pages, scales, k[:, begin:end], v[:, begin:end], table, before)
    return pages, scales, table


def full(batch, value):
    return torch.full((batch,), value, dtype=torch.int32)


def oracle(q, k, v, scale, starts=None, window=0):
    """float64 [B, T, H, D], the last T tokens of L attending to k, v [B, kv_heads, L, D]."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    batch, tokens, heads, d = q.shape
    length, group = k.shape[2], heads // k.shape[1]
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(tokens):
            end = length - tokens + t + 1
            begin = max(int(starts[b]) if starts is not None else 0, end - window if window else 0)
            if begin >= end:
                continue
            for h in range(heads):
                s = k[b, h // group, begin:end] @ q[b, t, h] * scale
                p = np.exp(s - s.max())
                out[b, t, h] = p @ v[b, h // group, begin:end] / p.sum()
    return out


def words_bound(size, length, v_max):
    """What 16 bits of q and of the weights add to the error, on int8 pages.

    An element of q is off by half a step, 2^-15.99 of the largest, so a score by 2^-15.99
    ``size``, and the softmax relatively by twice that; no result is further off than the values
    reach. A weight p v_scale is off by 2^-15.99 of the largest of its chunk, times 127 at most, of
    256 tokens; and the largest p of a chunk is at most the chunk's share of the result. v_scale is
    6 % above absmax / 127 at most, and what is stored 1 % below absmax.
    """
    scores = torch.expm1(2 * size * 2.0**-15.99).clamp(max=2)
    return (scores + min(length, 256) * 1.08 * 2.0**-15.99) * 1.01 * v_max


def fits(dtype, page_size=16, d=4):
    """Whether pages may have these sizes: those of int8 come in tiles."""
    return dtype != torch.int8 or (page_size % 16 == 0 and d % 4 == 0)


CASES = [  # batch, tokens, heads, kv_heads, D, length
    (1, 1, 1, 1, 1, 1),
    (1, 1, 8, 2, 64, 300),
    (2, 3, 4, 4, 24, 70),
    (3, 1, 6, 2, 80, 257),
    (1, 2, 10, 2, 17, 33),
    (2, 5, 6, 2, 20, 47),
    (2, 1, 7, 1, 128, 520),
]


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged_attention(isa, case, dtype):
    batch, tokens, heads, kv_heads, d, length = case
    if not fits(dtype, d=d):
        pytest.skip("int8 heads are multiples of 4")
    k, v = heavy_tailed(2, batch, length, kv_heads, d)
    q = heavy_tailed(batch, tokens, heads, d, seed=1)
    pages, scales, table = store(k, v, 16, dtype)
    stored = ops.paged_gather(pages, scales, table, length)
    y = ops.paged_attention(q, pages, scales, table, full(batch, length))
    # Scores are within 2 (D + 2) eps sum |q k| (rounding of q and of the sum), probabilities within
    # e of that, relatively; then the sum over the tokens.
    size = (q.abs().amax((1, 3)) * d**0.5)[:, None, :, None] * stored[0].abs().max()
    bound = (2 * (d + 2) * size + length + 20) * 2.0**-23 * 2 * stored[1].abs().max()
    if dtype == torch.int8:
        bound = bound + words_bound(size, length, stored[1].abs().max())
    assert_within(y, oracle(q, *stored, d**-0.5), bound.double().numpy())


@pytest.mark.parametrize("window", [0, 1, 5, 40, 300])
def test_padding_and_window(isa, window):
    k, v = torch.randn(2, 3, 290, 2, 16)
    q = torch.randn(3, 2, 4, 16)
    pages, scales, table = store(k, v, 16, torch.float32)
    starts = torch.tensor([0, 7, 289], dtype=torch.int32)
    stored = ops.paged_gather(pages, scales, table, 290)
    y = ops.paged_attention(q, pages, scales, table, full(3, 290), starts, 0.5, window)
    assert_within(y, oracle(q, *stored, 0.5, starts, window), 1e-5)
    assert (y[2, 0] == 0).all(), "a query before the start sees nothing"


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_pages_outside_of_the_window_are_not_read(isa, dtype):
    """Nor is what the table says of them, which names no page, on any instruction set."""
    k, v = torch.randn(2, 2, 290, 2, 24)
    q = torch.randn(2, 3, 4, 24)
    pages, scales, table = store(k, v, 16, dtype)
    length, first = full(2, 290), (290 - 3 + 1 - 40) // 16
    want = ops.paged_attention(q, pages, scales, table, length, window=40)
    stored = ops.paged_gather(pages, scales, table, 290)
    gone = table[:, :first].flatten().long()
    poison, _ = empty_pages(len(gone), 2, 16, 24, dtype)
    pages[gone] = poison
    if scales is not None:
        scales[gone] = float("nan")
    table[:, :first] = -1
    assert_equal(ops.paged_attention(q, pages, scales, table, length, window=40), want)
    for got, all_of_it in zip(
        ops.paged_gather(pages, scales, table, 290, first=16 * first), stored, strict=True
    ):
        assert_equal(got[:, :, 16 * first :], all_of_it[:, :, 16 * first :])
        assert not got[:, :, : 16 * first].any()
    if isa == "torch":
        return  # which checks shapes only
    table[1, first] = -1
    with pytest.raises(RuntimeError, match="sequence 1 has page -1"):
        ops.paged_attention(q, pages, scales, table, length, window=40)
    with pytest.raises(RuntimeError, match="sequence 1 has page -1"):
        ops.paged_gather(pages, scales, table, 290, first=16 * first)
    with pytest.raises(RuntimeError, match="slots 291 to 290"):
        ops.paged_gather(pages, scales, table, 290, first=291)


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_bits_depend_on_the_sequence_only(isa, dtype):
    """Not on page size, batch, padding, how tokens were appended, threads or instruction set."""
    k, v = heavy_tailed(2, 1, 700, 2, 40)
    q = heavy_tailed(1, 3, 6, 40, seed=2)

    def attend(page_size=64, batch=1, padding=0, split=None, window=0, tokens=3):
        pad = torch.zeros(batch, padding, 2, 40)
        keys, values = (torch.cat((pad, x.expand(batch, -1, -1, -1)), 1) for x in (k, v))
        pages, scales, table = store(keys, values, page_size, dtype, split)
        return ops.paged_attention(
            q[:, 3 - tokens :].expand(batch, -1, -1, -1),
            pages,
            scales,
            table,
            full(batch, 700 + padding),
            full(batch, padding),
            window=window,
        )

    if instruction_sets.uses_torch():
        pytest.skip("torch's own sums have no fixed order")
    for window in (0, 300):
        expected = attend(window=window)
        for page_size in (1, 16, 48, 256, 1024):
            if not fits(dtype, page_size):
                continue
            assert_equal(attend(page_size=page_size, window=window), expected)
        for batch in (2, 5):
            assert_equal(attend(batch=batch, window=window), expected.expand(batch, -1, -1, -1))
        assert_equal(attend(padding=37, window=window), expected)
        assert_equal(attend(split=699, window=window), expected)
        assert_equal(attend(tokens=1, window=window), expected[:, 2:])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert_equal(attend(window=window), expected)
        finally:
            torch.set_num_threads(threads)
        with instruction_sets.cap("ref"):
            assert_equal(attend(window=window), expected)


@pytest.mark.parametrize("d", [8, 64, 128])
def test_sixteen_bits_are_far_finer_than_the_pages(isa, d):
    """On ordinary keys and values their error is a hundredth of what storing int8 costs."""
    k, v = torch.randn(2, 8, 1000, 2, d)
    q = torch.randn(8, 1, 8, d)
    pages, scales, table = store(k, v, 64, torch.int8)
    stored = ops.paged_gather(pages, scales, table, 1000)
    y = ops.paged_attention(q, pages, scales, table, full(8, 1000)).double().numpy()
    rounded = oracle(q, *stored, d**-0.5)
    exact = oracle(q, k.transpose(1, 2), v.transpose(1, 2), d**-0.5)
    ours, theirs = (np.sqrt(np.square(rounded - other).mean()) for other in (y, exact))
    print(f"heads of {d}: {ours:.1e} of the integers, {theirs:.1e} of the pages")
    assert ours < 0.02 * theirs


def test_a_query_of_zeros_sees_all_alike(isa):
    k, v = torch.randn(2, 1, 300, 1, 24)
    pages, scales, table = store(k, v, 16, torch.int8)
    q = torch.zeros(1, 1, 2, 24)
    q[..., 1, :] = 1e-35
    y = ops.paged_attention(q, pages, scales, table, full(1, 300))
    mean = ops.paged_gather(pages, scales, table, 300)[1].double().mean(2, keepdim=True)
    assert_within(y, mean.expand(1, 1, 2, 24).numpy(), 2.0**-16 * 256 * float(v.abs().max()))


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_query_that_is_no_number_spoils_its_own_row_only(isa, dtype, bad):
    k, v = torch.randn(2, 1, 40, 1, 24)
    pages, scales, table = store(k, v, 16, dtype)
    q = torch.randn(1, 2, 5, 24)
    q[0, 1, 3, 7] = bad
    y = ops.paged_attention(q, pages, scales, table, full(1, 40))
    expected = torch.ones(1, 2, 5, 24, dtype=torch.bool)
    expected[0, 1, 3] = False
    assert_equal(y.isfinite(), expected)


def test_int8_rows_are_within_half_a_step(isa):
    x = heavy_tailed(1, 50, 2, 36)
    x[0, 3] *= 1e-4  # where float16 has few bits left
    x[0, 4] = 0
    x[0, 5] = 1e-9
    pages, scales, table = store(x, -x, 16, torch.int8)
    k, v = ops.paged_gather(pages, scales, table, 50)
    assert_equal(k, -v)
    absmax = x.abs().amax(-1, keepdim=True).transpose(1, 2).double()
    # The largest scale is 60 float16 numbers above absmax / 127: 6 %, or 60 of the smallest ones.
    step = absmax / 127 * 1.06 + 60 * 2.0**-24
    # What is clamped is off by no more than the rounding of the first scale.
    assert_within(k, x.transpose(1, 2).double().numpy(), step * 0.5 + absmax * 2.0**-11)
    assert (k[0, :, 4:6] == 0).all()


@pytest.mark.parametrize("d", [8, 64, 128])
def test_int8_scales_are_the_best_of_sixteen(isa, d):
    x = torch.randn(1, 400, 1, d)
    pages, scales, table = store(x, x, 16, torch.int8)
    k, _ = ops.paged_gather(pages, scales, table, 400)
    rows = x[0, :, 0].double()
    first = (x[0, :, 0].abs().amax(-1) / 127).half()
    errors = []
    for i in range(16):
        scale = (first.view(torch.int16) + 4 * i).view(torch.float16).double()[:, None]
        q = (rows / scale).round().clamp(-127, 127)
        errors.append((rows - q * scale).square().sum(-1))
    found = (rows - k[0, 0].double()).square().sum(-1)
    assert_within(found, torch.stack(errors).amin(0).numpy(), 1e-5 * found.numpy() + 1e-12)
    ratio = found.sum() / errors[0].sum()
    print(f"rows of {d}: {float(ratio):.3f} of the squared error of absmax / 127")
    assert ratio < {8: 0.7, 64: 0.95, 128: 0.98}[d]


def test_a_shift_of_all_keys_changes_no_attention(isa):
    k, v = torch.randn(2, 2, 300, 2, 16)
    k += 20  # where int8 has few bits left for the rest
    q = torch.randn(2, 1, 4, 16)
    length, table = full(2, 300), block_table(2, 300, 64)
    exact = oracle(q, k.transpose(1, 2), v.transpose(1, 2), 0.25)
    errors = {}
    for dtype in (torch.float32, torch.int8):
        for shift in (None, torch.full((2, 16), 20.0)):
            pages, scales = empty_pages(10, 2, 64, 16, dtype)
            ops.paged_append(pages, scales, k, v, table, full(2, 0), shift)
            if shift is not None and dtype == torch.float32:
                stored, _ = ops.paged_gather(pages, scales, table, 300)
                assert_equal(stored, (k - 20).transpose(1, 2))
            y = ops.paged_attention(q, pages, scales, table, length, softmax_scale=0.25)
            errors[dtype, shift is None] = np.abs(y.double().numpy() - exact).max()
    assert errors[torch.float32, False] < 5e-5 and errors[torch.float32, True] < 5e-4
    assert errors[torch.int8, False] < 0.2 * errors[torch.int8, True]


def test_formats_round_once(isa):
    x = heavy_tailed(1, 20, 2, 33)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for given in ops.FLOATS:
            pages, _, table = store(x.to(given), x.to(given), 16, dtype)
            for wanted in ops.FLOATS:
                k, v = ops.paged_gather(pages, None, table, 20, wanted)
                expected = x.to(given).to(dtype).to(wanted).transpose(1, 2)
                assert_equal(k.float(), expected.float())
                assert_equal(v.float(), expected.float())


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
def test_queries_of_every_float_dtype(isa, dtype):
    k, v = torch.randn(2, 1, 40, 2, 16)
    q = torch.randn(1, 2, 4, 16).to(dtype)
    pages, scales, table = store(k, v, 16, torch.int8)
    y = ops.paged_attention(q, pages, scales, table, full(1, 40))
    wide = ops.paged_attention(q.float(), pages, scales, table, full(1, 40))
    assert y.dtype == dtype
    assert_within(y.float(), wide.double().numpy(), 1e-5 + 2.0**-8 * wide.abs().double().numpy())


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_not_a_number_reaches_who_sees_it_only(isa, dtype):
    k, v = torch.randn(2, 2, 40, 1, 16)
    k[0, 38] = float("nan")
    v[1, 39] = float("inf")
    pages, scales, table = store(k, v, 16, dtype)
    y = ops.paged_attention(torch.randn(2, 3, 2, 16), pages, scales, table, full(2, 40))
    finite = y.isfinite().all(-1).all(-1)
    assert finite.tolist() == [[True, False, False], [True, True, False]]


def test_large_scores_do_not_overflow(isa):
    k, v = torch.randn(2, 1, 40, 1, 16)
    pages, scales, table = store(k * 1e15, v, 16, torch.float32)
    q = torch.randn(1, 1, 2, 16) * 1e15
    stored = ops.paged_gather(pages, scales, table, 40)
    y = ops.paged_attention(q, pages, scales, table, full(1, 40))
    assert_within(y, oracle(q, *stored, 0.25), 1e-6)


@pytest.mark.parametrize("d", [4, 20, 64])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 46, 65])
def test_int8_pages_hold_what_their_order_says(isa, d, length):
    """q + 128 in tiles of 16 keys and in fours: csrc/gpu_poor.h. Nothing else is written."""
    size, heads = 32, 2
    k, v = (heavy_tailed(1, length, heads, d, seed=i) for i in (3, 4))
    pages, scales, table = store(k, v, size, torch.int8)
    wanted, seen = torch.full_like(pages, 127), torch.full_like(scales, float("nan"))
    for part, x in enumerate((k, v)):
        for slot, head in itertools.product(range(length), range(heads)):
            page, at = int(table[0, slot // size]), slot % size
            scale = scales[page, part, head, at]
            q = (x[0, slot, head] * (1 / scale.float())).round().clamp(-127, 127).to(torch.int8)
            seen[page, part, head, at] = scale
            whole = wanted[page, part, head].view(-1)
            if part == 0:
                tile = whole.view(size // 16, d // 4, 16, 4)
                tile[at // 16, :, at % 16] = (q ^ -128).view(-1, 4)
            else:
                whole.view(size // 4, d, 4)[at // 4, :, at % 4] = q ^ -128
    assert_equal(pages, wanted)
    assert_equal(scales.view(torch.int16), seen.view(torch.int16))
    for x, got in zip((k, v), ops.paged_gather(pages, scales, table, length), strict=True):
        expected = x.transpose(1, 2)
        assert_within(got, expected.double().numpy(), 0.6 / 127 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "start, length, window", [(5, 70, 0), (37, 330, 0), (0, 40, 7), (3, 300, 21)]
)
def test_what_int8_pages_held_before_counts_for_nothing(isa, start, length, window):
    """Slots in front of what is seen, and beyond the end, with any bytes and scales."""
    k, v = heavy_tailed(2, 2, length, 2, 24)
    q = heavy_tailed(2, 3, 6, 24, seed=1)
    pages, scales, table = store(k, v, 48, torch.int8)
    starts = torch.tensor([start, 0], dtype=torch.int32)
    args = (table, full(2, length), starts, None, window)
    expected = ops.paged_attention(q, pages, scales, *args)
    assert expected.isfinite().all()
    used = scales.clone()
    for b in range(2):
        first = max(int(starts[b]), length - 2 - window if window else 0)
        for slot in [*range(first), *range(length, 48 * (table.shape[1] - 1))]:
            used[table[b, slot // 48], :, :, slot % 48] = float("nan")
    assert_equal(ops.paged_attention(q, pages, used, *args), expected)
    used.nan_to_num_(nan=6e4)
    assert_equal(ops.paged_attention(q, pages, used, *args), expected)


@pytest.mark.parametrize("size, d", [(8, 16), (24, 16), (16, 6)])
def test_sizes_that_int8_pages_cannot_have(isa, size, d):
    pages, scales = empty_pages(2, 1, size, d, torch.int8)
    table, x = block_table(1, size, size), torch.randn(1, 3, 1, d)
    with pytest.raises(RuntimeError, match=f"multiple of 16 .*got {size} and {d}"):
        ops.paged_append(pages, scales, x, x, table, full(1, 0))
    with pytest.raises(RuntimeError, match=f"got {size} and {d}"):
        ops.paged_attention(x, pages, scales, table, full(1, 3))


BAD = {
    "page_size or D": (lambda a: a.update(pages=a["pages"][..., :0]), "head_dim"),
    "scales are missing": (lambda a: a.update(scales=None), "scales"),
    "strided pages": (lambda a: a.update(pages=a["pages"].transpose(2, 3)), "contiguous"),
    "heads": (lambda a: a.update(q=a["q"][:, :, :3]), "multiple of 2 heads"),
    "batch": (lambda a: a.update(block_table=a["block_table"][:1]), "block_table"),
    "int64": (lambda a: a.update(lengths=a["lengths"].long()), "lengths"),
    "window": (lambda a: a.update(window=-1), "window"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(isa, bad):
    k, v = torch.randn(2, 2, 20, 2, 16)
    pages, scales, table = store(k, v, 16, torch.int8)
    args = dict(q=torch.randn(2, 1, 4, 16), pages=pages, scales=scales)
    args |= dict(block_table=table, lengths=full(2, 20))
    change, message = BAD[bad]
    change(args)
    with pytest.raises(RuntimeError, match=message):
        ops.paged_attention(**args)


def test_no_slot_outside_the_pages_is_touched():
    k, v = torch.randn(2, 2, 20, 2, 16)
    pages, scales, table = store(k, v, 16, torch.float32)
    q = torch.randn(2, 1, 4, 16)
    for lengths, error in (
        (full(2, 40), "page -1"),
        (full(2, 60), "room for 48"),
        (full(2, 0), "-1"),
    ):
        with pytest.raises(RuntimeError, match=error):
            ops.paged_attention(q, pages, scales, table, lengths)
    with pytest.raises(RuntimeError, match="start"):
        ops.paged_attention(q, pages, scales, table, full(2, 20), full(2, 21))
    with pytest.raises(RuntimeError, match="page -1"):
        ops.paged_append(pages, scales, k[:, :2], v[:, :2], table, full(2, 31))
    with pytest.raises(RuntimeError, match="room for 48"):
        ops.paged_append(pages, scales, k, v, table, full(2, 31))
    with pytest.raises(RuntimeError, match="page -1"):
        ops.paged_gather(pages, scales, table, 33)
