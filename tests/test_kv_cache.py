"""The cache in pages under transformers' ``generate``: the model's own tokens, and no page lost."""

import copy
import gc
import random
import warnings

import pytest
import torch
from conftest import MODELS, VOCAB, make_model, tokens
from helpers import assert_equal

pytest.importorskip("transformers")

from pages import NEW, Boom, free, generate, paged  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

import gpu_poor  # noqa: E402
from gpu_poor import attention, memory  # noqa: E402
from gpu_poor.attention import use_flash_attention_if_available  # noqa: E402
from gpu_poor.kv_cache import (  # noqa: E402
    PagedKVCache,
    PagePool,
    use_paged_kv_cache_if_available,
)

#: Whose attention ours is not: the cache works all the same. bart's config does not tell its heads.
OWN_ATTENTION = {"bloom", "falcon", "gemma2"}


@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_tokens_of_the_models_own_cache(name):
    expected = generate(make_model(name), tokens())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = paged(name)
    assert_equal(generate(model, tokens()), expected)
    assert hasattr(model, "_gp_kv_pool") == (name != "bart")
    said = " ".join(str(warning.message) for warning in caught)
    if name == "bart":
        assert (
            "BartForCausalLM keeps its own cache: ValueError: layer 0: keys (1, 4, 3, 32)" in said
        )
        return
    assert "keeps its own" not in said and free(model)
    assert (model.config._attn_implementation != attention.NAME) == (name in OWN_ATTENTION)


@pytest.mark.parametrize(
    "name, format", [("llama", "int8"), ("llama", "fp32"), ("gpt2", "int8"), ("gpt2", "bf16")]
)
def test_greedy_tokens_depend_on_the_sequence_only(name, format):
    """Not on the page size, the batch, padding, a shared prefix or how prefill was cut."""
    ids = tokens(16, 36)
    changes = dict(n_head=5) if name == "gpt2" and format == "int8" else {}  # of 24, not 30
    expected = generate(paged(name, format, 32 if format == "int8" else 1, **changes), ids)
    model = make_model(name, **changes)
    for page_size in (16, 64, 256):
        use_paged_kv_cache_if_available(model, format, "40MB", page_size)
        for batch in (1, 16):
            assert_equal(generate(model, ids[:batch]), expected[:batch])
        padded = torch.cat((torch.zeros(16, 7, dtype=torch.long), ids), 1)
        mask = torch.cat((torch.zeros(16, 7, dtype=torch.long), torch.ones_like(ids)), 1)
        assert_equal(generate(model, padded, attention_mask=mask), expected)
        assert_equal(generate(model, ids[:2], prefill_chunk_size=10), expected[:2])
        pool = model._gp_kv_pool
        first = PagedKVCache(pool)
        generate(model, ids[:2], past_key_values=first)
        first.publish(torch.cat((ids[:2], expected[:2]), 1))
        second = PagedKVCache(model)  # of the model's pool
        assert second.pool is pool
        assert second.share_prefix(ids[:2]) == 35 // page_size * page_size
        held = pool.allocator.n_held
        assert_equal(generate(model, ids[:2], past_key_values=second), expected[:2])
        assert pool.allocator.n_held - held <= 2 * -(-(36 + NEW) // page_size)
        del first, second
        assert free(model)


@pytest.mark.parametrize("made", ["eager", "quantized", "fused"])
def test_a_trained_model_says_the_same_however_it_is_asked(made):
    """On pages of each size, in batches with padding, on shared prefixes; with an assistant."""
    name = gpu_poor.assets.STORIES260K
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    if made != "eager":
        gpu_poor.quantize(model, allow_partial=True, verbose=False, fuse=made == "fused")
    starts = "Once upon a time", "Lily and Tom", "The dog", "One day, a big red ball was"
    prompts = [tokenizer(text).input_ids for text in starts]
    longest, want = max(map(len, prompts)), None
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    for page_size in (64, 16, 256):
        use_paged_kv_cache_if_available(model, "int8", "40MB", page_size)
        alone = [generate(model, torch.tensor([p]), max_new_tokens=40) for p in prompts]
        want = alone if want is None else want
        assert_equal(torch.cat(alone), torch.cat(want))
        got = generate(model, ids.repeat(4, 1), attention_mask=mask.repeat(4, 1), max_new_tokens=40)
        assert_equal(got, torch.cat(want).repeat(4, 1))
        cache = PagedKVCache(model._gp_kv_pool)
        story = torch.cat((torch.tensor(prompts[:1]), want[0]), 1)
        with torch.no_grad():
            model(input_ids=story[:, :-1], past_key_values=cache)
        cache.publish(story)
        other = PagedKVCache(model._gp_kv_pool)
        cut = story.shape[1] - 8
        assert other.share_prefix(story[:, :cut]) == (cut - 1) // page_size * page_size
        got = generate(model, story[:, :cut], past_key_values=other)
        assert_equal(got, story[:, cut:])
        del cache, other
        assert free(model)
    got = generate(model, story[:, :-40], prompt_lookup_num_tokens=3, max_new_tokens=40)
    assert_equal(got, want[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_beams_and_assistants(name):
    plain, model, ids = make_model(name), paged(name), tokens(2, 20)
    for options in (dict(num_beams=4), dict(num_beams=3, num_return_sequences=3)):
        assert_equal(generate(model, ids, **options), generate(plain, ids, **options))
        assert free(model)
    alone = generate(plain, ids[:1])
    short = dict(eos_token_id=VOCAB + 1)
    assert_equal(generate(model, ids[:1], assistant_model=plain, **short), alone)
    assert_equal(generate(plain, ids[:1], assistant_model=model, **short), alone)
    assert_equal(generate(model, ids[:1], prompt_lookup_num_tokens=3), alone)
    assert free(model)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}], ids=["none", "window"])
@pytest.mark.parametrize("name", ["phi3", "mixtral", "gemma2", "qwen3"])
def test_windows(name, changes):
    if name == "qwen3" and changes:
        changes = changes | dict(use_sliding_window=True, max_window_layers=1)
    plain, model = make_model(name, **changes), paged(name, **changes)
    windows = model._gp_kv_pool.windows
    assert (8 in windows) == bool(changes), windows
    if name in ("gemma2", "qwen3") and changes:
        assert 0 in windows and 8 in windows, "layers differ"
    for ids in (tokens(2, 5), tokens(2, 30)):
        assert_equal(generate(model, ids), generate(plain, ids))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        want = generate(plain, ids, attention_mask=mask)
        assert_equal(generate(model, ids, attention_mask=mask), want)


@pytest.mark.parametrize("T", [1, 5, 30])
def test_logits_after_a_cache_of_some_length(T):
    """A chunk of tokens after others: on the pages, or gathered, with and without a window."""
    for name, changes in (("llama", {}), ("phi3", {"sliding_window": 8}), ("gpt2", {})):
        plain, model, ids = make_model(name, **changes), paged(name, **changes), tokens(2, 20 + T)
        caches = DynamicCache(), PagedKVCache(model._gp_kv_pool)
        with torch.no_grad():
            for part in (ids[:, :20], ids[:, 20:]):
                want, got = (
                    m(input_ids=part, past_key_values=cache, use_cache=True).logits
                    for m, cache in zip((plain, model), caches, strict=True)
                )
                torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_a_hole_in_the_mask_is_hidden():
    plain, model, ids = make_model("llama"), paged("llama"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 5:9] = mask[1, :4] = 0
    want = generate(plain, ids, attention_mask=mask)
    assert_equal(generate(model, ids, attention_mask=mask), want)


def test_cache_operations_are_those_of_the_dynamic_cache():
    model, rng = paged("llama"), random.Random(0)
    pool = model._gp_kv_pool
    mine, theirs = PagedKVCache(pool), DynamicCache()
    batch = 2
    with torch.no_grad():
        for _ in range(120):
            kind = rng.choice(["tokens", "tokens", "tokens", "reorder", "repeat", "select", "crop"])
            length = theirs.get_seq_length()
            if length and kind == "reorder":
                order = torch.tensor([rng.randrange(batch) for _ in range(batch)])
                mine.reorder_cache(order), theirs.reorder_cache(order)
            elif length and kind == "repeat" and batch < 6:
                mine.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
                batch *= 2
            elif length and kind == "select" and batch > 1:
                rows = torch.tensor(sorted(rng.sample(range(batch), batch // 2)))
                mine.batch_select_indices(rows), theirs.batch_select_indices(rows)
                batch = len(rows)
            elif length > 50 or (length > 1 and kind == "crop"):
                n = rng.randrange(1, length)
                mine.crop(-n), theirs.crop(-n)
            else:
                tokens_now = rng.randrange(1, 9)
                k, v = torch.randn(2, batch, 2, tokens_now, 32)
                model.config._attn_implementation = "sdpa"  # then update gathers
                for layer in range(2):
                    got = mine.update(k + layer, v, layer)
                    want = theirs.update(k + layer, v, layer)
                    assert_equal(torch.stack(got), torch.stack(want))
            assert mine.get_seq_length() == theirs.get_seq_length()
            pool.allocator.check()
    shared = sum(pool.allocator.owners(p) > 1 for row in mine.sequences.rows for p in row)
    print(f"{shared} pages are shared at the end")
    mine.reset()
    assert free(model) and mine.get_seq_length() == 0


def test_rows_share_pages_until_they_write():
    model = paged("llama")
    pool, cache = model._gp_kv_pool, PagedKVCache(model._gp_kv_pool)
    with torch.no_grad():
        model(input_ids=tokens(1, 40), past_key_values=cache)  # 2 1/2 pages
        cache.batch_repeat_interleave(4)
        assert pool.allocator.n_held == 3
        model(input_ids=tokens(4, 1), past_key_values=cache)
    assert pool.allocator.n_held == 2 + 4, "all but one copied the page they wrote to"
    assert len({row[2] for row in cache.sequences.rows}) == 4


def test_more_than_fits_is_refused_before_work_starts():
    model = paged(
        "llama", kv_memory=PagePool(make_model("llama"), "fp32", "9MB", 16).page_bytes * 6
    )
    pool, ids = model._gp_kv_pool, tokens(2, 20)
    assert pool.allocator.n_pages == 6
    ran = []
    hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(MemoryError, match="needs 8 pages of 16 tokens .* 6 of 6 are free"):
        generate(model, ids, max_new_tokens=40)
    hook.remove()
    assert not ran and free(model)
    assert generate(model, ids).shape == (2, NEW)
    # By hand: what is stored stays, and can be gone on with.
    cache = PagedKVCache(pool)
    with torch.no_grad():
        model(input_ids=tokens(2, 40), past_key_values=cache)
        tables = copy.deepcopy(cache.sequences.rows)
        with pytest.raises(MemoryError, match="cache of 2 sequences of 50 tokens"):
            model(input_ids=tokens(2, 10), past_key_values=cache)
        assert cache.sequences.rows == tables and cache.get_seq_length() == 40
        pool.allocator.check()
        model(input_ids=tokens(2, 8), past_key_values=cache)
    assert cache.get_seq_length() == 48


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_all_pages_are_free_after_an_exception(format):
    model = paged("llama", format)
    gc.collect()
    gc.disable()  # no cycle may keep them
    try:
        for layer in (0, 1):
            for call in (0, 2):
                module, calls = model.model.layers[layer].self_attn.o_proj, []

                def explode(*_, calls=calls, call=call):
                    calls.append(1)
                    if len(calls) > call:
                        raise Boom

                hook = module.register_forward_pre_hook(explode)
                for options in ({}, dict(num_beams=3)):
                    calls.clear()
                    with pytest.raises(Boom):
                        generate(model, tokens(), **options)
                    assert free(model)
                hook.remove()
    finally:
        gc.enable()
    assert generate(model, tokens()).shape == (2, NEW)


def test_attention_that_never_asks_for_its_keys_is_found_out():
    model = paged("llama")
    cache, k = PagedKVCache(model._gp_kv_pool), torch.randn(1, 2, 3, 32)
    cache.update(k, k, 0)
    with pytest.raises(RuntimeError, match="attention of layer 0 never asked"):
        cache.update(k, k, 1)


def test_gradients_and_foreign_shapes_are_refused():
    model = paged("llama")
    with pytest.raises(ValueError, match="keeps no gradients"):
        model(input_ids=tokens(), past_key_values=PagedKVCache(model._gp_kv_pool))
    cache, k = PagedKVCache(model._gp_kv_pool), torch.randn(1, 2, 3, 32)
    with pytest.raises(ValueError, match=r"layer 0: values .* are not \[B, 2, T, 32\]"):
        cache.update(k, torch.randn(1, 2, 3, 16), 0)
    assert free(model)
    cache.update(k.clone(), k, 0)
    cache.sequences.handed_out = None
    with pytest.raises(ValueError, match="holds 1 sequences, got 2"):
        cache.update(k.expand(2, -1, -1, -1).clone(), k.expand(2, -1, -1, -1), 0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(format="int4"), "format must be one of fp32"),
        (dict(kv_memory="lots"), "kv_memory must be bytes"),
        (dict(kv_memory=0), "kv_memory must be bytes"),
        (dict(kv_memory=2.5), "kv_memory must be bytes"),
        (dict(kv_memory="100B"), "less than a page"),
        (dict(page_size=0), "page_size"),
        (dict(page_size="64"), "page_size"),
        (dict(page_size=True, format="fp32"), "page_size must be a number of tokens"),
        (dict(page_size=24), "page_size=24: int8 needs a multiple of 16; fp32, bf16, fp16 take"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    model = make_model("llama")
    with pytest.raises(ValueError, match=message):
        use_paged_kv_cache_if_available(model, **options)
    assert not hasattr(model, "_gp_kv_pool")


def test_heads_that_int8_cannot_have():
    model = make_model("gpt2")
    with pytest.raises(ValueError, match="heads of 30: int8 needs .* 4; fp32, bf16, fp16 take any"):
        use_paged_kv_cache_if_available(model, "int8", "20MB")
    assert not hasattr(model, "_gp_kv_pool")
    use_paged_kv_cache_if_available(model, "fp16", "20MB")
    assert model._gp_kv_pool.head_dim == 30


def test_who_cannot_have_it_is_returned_as_it_was():
    layer = torch.nn.Linear(3, 3)
    for use in (use_paged_kv_cache_if_available, attention.use_flash_attention_if_available):
        with pytest.warns(UserWarning, match="no causal language model"):
            assert use(layer) is layer
    model = make_model("gemma2")
    own = model.config._attn_implementation
    with pytest.warns(UserWarning, match="keeps its own attention"):
        attention.use_flash_attention_if_available(make_model("bloom"))
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("use", [use_paged_kv_cache_if_available, use_flash_attention_if_available])
def test_what_is_no_model(use):
    with pytest.raises(TypeError, match=f"{use.__name__} takes a model, got NoneType"):
        use(None)


def test_what_is_no_input_of_a_cache():
    with pytest.raises(TypeError, match="made for a transformers model or its config, got None"):
        PagedKVCache(None)
    cache = PagedKVCache(paged("llama"))
    for method in (cache.publish, cache.share_prefix):
        with pytest.raises(ValueError, match=r"a tensor \[B, L\], got NoneType"):
            method(None)
        with pytest.raises(ValueError, match=r"a tensor \[B, L\], got \(3,\)"):
            method(torch.arange(3))


def test_gradients_of_queries_are_not_lost():
    """Keys and values of pages have none, but what asks may, as a LoRA of q_proj does."""
    plain, model, ids = make_model("llama"), paged("llama"), tokens(2, 20)
    found = []
    for m in (plain, model):
        m.requires_grad_(False)
        q = m.model.layers[1].self_attn.q_proj.weight.requires_grad_()
        cache = PagedKVCache(model) if m is model else DynamicCache()
        m(input_ids=ids, past_key_values=cache).logits.sum().backward()
        found.append(q.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3"])
def test_flash_attention_without_the_cache(name):
    plain, ids = make_model(name), tokens(2, 20)
    model = attention.use_flash_attention_if_available(make_model(name))
    assert model.config._attn_implementation == attention.NAME
    assert_equal(generate(model, ids), generate(plain, ids))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    assert_equal(
        generate(model, ids, attention_mask=mask), generate(plain, ids, attention_mask=mask)
    )
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, plain(input_ids=ids, labels=ids).loss)
    loss.backward()
    if name != "gpt2":  # which asks for them in another way, and gets None as from SDPA
        with pytest.raises(ValueError, match="keeps no attention weights"):
            model(input_ids=ids, output_attentions=True)


def test_left_padding():
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]])
    assert attention.left_padding(mask).tolist() == [0, 1, 3]
    assert attention.left_padding(torch.tensor([[1, 0, 1]])) is None
    assert attention.left_padding(torch.tensor([[1, 1, 0]])) is None
    assert attention.left_padding(None) is None


def test_memory_is_counted_and_the_planner_knows():
    model, float_model = paged("llama", "int8", 64), make_model("llama")
    pool = model._gp_kv_pool
    assert pool.arena.nbytes + pool.scales.nbytes == pool.allocator.n_pages * pool.page_bytes
    assert pool.arena.nbytes + pool.scales.nbytes <= 20_000_000
    assert memory.kv_cache_bytes(model, 65) == 2 * pool.page_bytes
    fp16 = memory.kv_cache_bytes(float_model.half(), 64)
    assert fp16 / pool.page_bytes == pytest.approx(2 * 32 / (32 + 2)), "heads of 32"
    wide = PagePool(make_model("llama", head_dim=64), "int8", "20MB")
    assert 2 * 64 * 2 * 2 * 2 * 64 / wide.page_bytes > 1.9


def test_what_is_available(monkeypatch, tmp_path):
    assert 0 < memory.available()
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    (tmp_path / "a" / "memory.max").write_text("1500\n")
    (tmp_path / "a" / "memory.current").write_text("1000\n")
    (tmp_path / "a" / "memory.stat").write_text("inactive_file 300\n")
    (tmp_path / "self").write_text("0::/a/b\n")
    monkeypatch.setattr(
        memory, "_CGROUPS", {"": (tmp_path, "memory.max", "memory.current")}, raising=True
    )
    assert list(memory._cgroup_rooms(tmp_path / "self")) == [800], "of the parent: it has a limit"
    assert list(memory._cgroup_rooms(tmp_path / "none")) == []


def test_pages_cost_nothing_before_they_are_written():
    before = memory.rss()["anon"]
    pool = PagePool(make_model("llama"), "fp32", "2GB")
    assert pool.arena.nbytes > 1.9e9
    assert memory.rss()["anon"] - before < 50e6


def test_a_prompt_alone_can_be_published_after_generate():
    model, ids = paged("llama", "fp32", 8), tokens(1, 20)
    cache = PagedKVCache(model)
    want = generate(model, ids, past_key_values=cache)
    cache.publish(ids)
    other = PagedKVCache(model)
    assert other.share_prefix(torch.cat((ids, want), 1)) == 16, "what was generated is not shared"
    with pytest.raises(ValueError, match="0 sequences of 0 tokens are stored"):
        PagedKVCache(model).publish(ids)


def test_a_size_that_the_system_refuses_is_named():
    with pytest.raises(MemoryError, match="kv_memory='999TB' is more than the system gives"):
        PagePool(make_model("llama"), "int8", "999TB")
