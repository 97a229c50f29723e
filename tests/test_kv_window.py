"""A cache in pages of a model all of whose layers have a window: what they left is given back."""

import random

import pytest
import torch
from conftest import VOCAB, make_model, tokens
from helpers import assert_equal

pytest.importorskip("transformers")

from pages import free, generate, paged  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import gpu_poor  # noqa: E402
from gpu_poor.kv_cache import PagedKVCache, PagePool, use_paged_kv_cache_if_available  # noqa: E402
from gpu_poor.kv_cache.pool import pages_needed  # noqa: E402

WINDOW, PAGE = 24, 8
#: A window of 24 and the token after it lie in 4 pages of 8 at most.
MOST = 4


def windowed(**options):
    options = dict(page_size=PAGE, sliding_window=WINDOW) | options
    return paged("phi3", **options)


@pytest.fixture
def peak(monkeypatch) -> list[int]:
    """How many pages were held at once, at most, of the caches made from now on."""
    from gpu_poor.kv_cache.sequences import Sequences

    most, refresh = [0], Sequences.refresh

    def refreshed(self):
        refresh(self)
        most[0] = max(most[0], self.pool.allocator.n_held)

    monkeypatch.setattr(Sequences, "refresh", refreshed)
    return most


@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["phi3", "mixtral"])
def test_the_same_tokens_in_few_pages(name, format, peak):
    """Those of a cache that keeps everything: pages of one more token than there are."""
    ids = tokens(2, 20)
    page = 16 if format == "int8" else PAGE
    model = paged(name, format, page, sliding_window=WINDOW)
    whole = paged(name, format, 256, sliding_window=WINDOW)
    want = generate(whole, ids, max_new_tokens=90)
    if format == "fp32":
        plain = make_model(name, sliding_window=WINDOW)
        assert_equal(want, generate(plain, ids, max_new_tokens=90))
    peak[0] = 0
    assert_equal(generate(model, ids, max_new_tokens=90), want)
    assert peak[0] == 2 * (-(-(WINDOW - 1) // page) + 1) and free(model)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = generate(whole, ids, max_new_tokens=90, attention_mask=mask)
    assert_equal(generate(model, ids, max_new_tokens=90, attention_mask=mask), padded)


def test_layers_that_see_everything_keep_everything(peak):
    model = paged("gemma2", "fp32", PAGE, sliding_window=WINDOW)
    peak[0] = 0
    assert model._gp_kv_pool.window == 0 and 0 < WINDOW in model._gp_kv_pool.windows
    generate(model, tokens(1, 20), max_new_tokens=60)
    assert peak[0] == 79 // PAGE + 1


@pytest.mark.parametrize("fused", [False, True])
def test_what_fits_is_not_refused(fused):
    """As many pages as a sequence needs while it grows far beyond them; and not one less."""
    model = make_model("phi3", sliding_window=WINDOW)
    if fused:
        from test_fusion import make

        model = make("mistral")  # its window is 8
    pool = PagePool(model, "fp32", "20MB", PAGE)
    window = pool.window
    prompt, longest = tokens(1, 20), 59
    needed = pages_needed(model.config, PAGE, longest, 20)
    assert needed == max(-(-20 // PAGE), -(-(window - 1) // PAGE) + 1) < longest // PAGE
    use_paged_kv_cache_if_available(model, "fp32", needed * pool.page_bytes, PAGE)
    assert generate(model, prompt, max_new_tokens=40).shape == (1, 40)
    with pytest.raises(MemoryError, match="generating 2 sequences of up to 59 tokens"):
        generate(model, tokens(2, 20), max_new_tokens=40)
    with pytest.raises(MemoryError, match="generating 1 sequences"):
        generate(model, tokens(1, 50), max_new_tokens=9)
    with torch.no_grad():
        assert generate(model, tokens(1, 50), max_new_tokens=9, prefill_chunk_size=1).shape[1] == 9
    assert free(model)


@pytest.mark.parametrize("chunk", [1, 3, 8, 19])
def test_the_bound_is_kept(chunk, peak):
    model = windowed(kv_memory="2MB")
    config = model.config
    for prompt, new in ((5, 5), (24, 60), (70, 9), (20, 7)):
        peak[0] = 0
        generate(model, tokens(1, prompt), max_new_tokens=new, prefill_chunk_size=chunk)
        needed = pages_needed(config, PAGE, prompt + new - 1, prompt, chunk)
        assert needed - 1 <= peak[0] <= needed


def test_beams_and_assistants_go_back_within_what_they_did():
    plain, model = make_model("phi3", sliding_window=WINDOW), windowed()
    ids, long = tokens(1, 30), dict(max_new_tokens=60)
    for options in (dict(num_beams=4), dict(num_beams=3, num_return_sequences=3)):
        assert_equal(
            generate(model, ids, **options, **long), generate(plain, ids, **options, **long)
        )
        assert free(model)
    alone, never = generate(plain, ids, **long), dict(eos_token_id=VOCAB + 1)
    other = make_model("phi3", sliding_window=WINDOW, num_hidden_layers=1)
    for assistant in (plain, other, windowed(), paged("phi3", num_hidden_layers=1)):
        got = generate(model, ids, assistant_model=assistant, **long, **never)
        assert_equal(got, alone)
    assert_equal(generate(plain, ids, assistant_model=model, **long, **never), alone)
    assert_equal(generate(model, ids, prompt_lookup_num_tokens=3, **long), alone)
    assert free(model)


def test_operations_are_those_of_a_cache_that_keeps_everything():
    """At random. Going back further than is kept is an error that changes nothing."""
    model, rng, batch, refused = windowed(kv_memory="60MB"), random.Random(0), 2, 0
    model.config._attn_implementation = "sdpa"  # then update gathers
    pool = model._gp_kv_pool
    mine, theirs = PagedKVCache(pool), DynamicCache()
    for _ in range(300):
        kind, length = rng.choice(["tokens"] * 4 + ["reorder", "crop", "select"]), mine.layers[0]
        length = length.get_seq_length()
        if length and kind == "reorder":
            order = torch.tensor([rng.randrange(batch) for _ in range(batch)])
            mine.reorder_cache(order), theirs.reorder_cache(order)
        elif length and kind == "select":
            rows = torch.tensor([0, 0]) if batch == 1 else torch.tensor([rng.randrange(batch)])
            mine.batch_select_indices(rows), theirs.batch_select_indices(rows)
            batch = len(rows)
        elif length > 1 and kind == "crop":
            n = rng.randrange(1, min(length, 20))
            if max(0, length - n + 1 - WINDOW) < mine.sequences.left * PAGE:
                rows = [list(row) for row in mine.sequences.rows]
                with pytest.raises(ValueError, match=f"can't go back to {length - n} tokens"):
                    mine.crop(-n)
                assert mine.sequences.rows == rows and mine.get_seq_length() == length
                refused += 1
                continue
            mine.crop(-n), theirs.crop(-n)
        else:
            new = rng.randrange(1, 9)
            k, v = torch.randn(2, batch, pool.kv_heads, new, pool.head_dim)
            for layer in range(2):
                got = mine.update(k + layer, v, layer)
                want = theirs.update(k + layer, v, layer)
                seen = max(0, length + 1 - WINDOW)
                for x, y in zip(got, want, strict=True):
                    assert_equal(x[:, :, seen:], y[:, :, seen:])
                    assert not x[:, :, : mine.sequences.left * PAGE].any()
            assert mine.sequences.left == max(mine.sequences.left, seen // PAGE)
        assert mine.get_seq_length() == theirs.get_seq_length()
        pool.allocator.check()
        table, held = mine.block_table, set(sum(mine.sequences.rows, []))
        assert set(table.flatten().tolist()) - {-1} == held
        assert (table[:, : mine.sequences.left] == -1).all()
    assert refused > 5 and mine.sequences.left > 5
    mine.reset()
    assert free(model) and mine.sequences.left == 0


def test_going_back():
    """As far as the last call, always; further with activate_past_recording, until a crop."""
    model = windowed()
    cache = PagedKVCache(model._gp_kv_pool)
    with torch.no_grad():
        model(input_ids=tokens(1, 60), past_key_values=cache)
        assert cache.sequences.left == 0
        model(input_ids=tokens(1, 9), past_key_values=cache)
        assert cache.sequences.left == (60 + 1 - WINDOW) // PAGE
        cache.crop(-9)
        with pytest.raises(ValueError, match="can't go back to 51 tokens: the next one sees 23"):
            cache.crop(-9)
        assert cache.get_seq_length() == 60
        cache.activate_past_recording()
        left = cache.sequences.left
        for _ in range(30):
            model(input_ids=tokens(1, 1), past_key_values=cache)
        assert cache.sequences.left == left
        cache.crop(-29)
        assert cache.get_seq_length() == 61 and cache.sequences.left == (61 + 1 - WINDOW) // PAGE
        cache.crop(-61)
    assert cache.get_seq_length() == 0 and free(model)


def test_prefixes_are_shared_while_they_are_whole():
    model = windowed()
    pool, ids = model._gp_kv_pool, tokens(1, 41)
    want = generate(model, ids, max_new_tokens=30)
    cache = PagedKVCache(pool)
    generate(model, ids, past_key_values=cache, max_new_tokens=30)
    with pytest.raises(ValueError, match="have left all windows"):
        cache.publish(torch.cat((ids, want), 1))
    cache = PagedKVCache(pool)
    cache.activate_past_recording()
    generate(model, ids, past_key_values=cache, max_new_tokens=30)
    cache.publish(torch.cat((ids, want), 1))
    other = PagedKVCache(pool)
    assert other.share_prefix(ids) == 40
    held = pool.allocator.n_held
    assert_equal(generate(model, ids, past_key_values=other, max_new_tokens=30), want)
    assert pool.allocator.n_held <= held + MOST and other.sequences.left > 0
    del other, cache
    assert free(model) and len(pool.allocator.find([tuple(ids[0, :PAGE].tolist())])) == 1


def test_fused_steps_do_not_read_what_was_given_back():
    """NaN in all free pages, before each call."""
    from test_fusion import make, step_reason

    model, ids = make("mistral"), tokens(2, 20)
    want = model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    use_paged_kv_cache_if_available(model, "fp32", "2MB", 4)
    pool = model._gp_kv_pool

    def poison(*_):
        held = {p for p in range(pool.allocator.n_pages) if pool.allocator.owners(p)}
        pool.arena[sorted(set(range(pool.allocator.n_pages)) - held)] = torch.nan

    model.register_forward_pre_hook(poison)
    got = model.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    assert_equal(got, want)
    assert step_reason(model) is None and free(model)
    assert gpu_poor.explain(model).blocks[0].fused
