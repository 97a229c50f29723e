"""A model with a pool of pages, copied, pickled, saved; and what exceptions and threads leave."""

import copy
import gc
import io
import pickle
import sys
import threading

import pytest
import torch
from conftest import make_model, tokens
from helpers import assert_equal

transformers = pytest.importorskip("transformers")

from pages import Boom, free, generate, paged  # noqa: E402
from test_fusion import make  # noqa: E402

import gpu_poor  # noqa: E402
from gpu_poor.kv_cache import PagedKVCache, use_paged_kv_cache_if_available  # noqa: E402


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    assert file.tell() < 5e6, "an arena is not saved"
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


COPIES = [copy.deepcopy, torch_saved, pickled]


def fused(format):
    return use_paged_kv_cache_if_available(make("llama"), format, "20MB", 16)


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "torch.save", "pickle"])
@pytest.mark.parametrize("made", [lambda f: paged("llama", f), fused], ids=["eager", "fused"])
@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_a_copied_model_has_an_empty_pool_of_its_own(made, copied, format):
    model = made(format)
    pool, expected = model._gp_kv_pool, generate(model, tokens())
    cache = PagedKVCache(pool)
    generate(model, tokens(), past_key_values=cache)
    twin = copied(model)
    other = twin._gp_kv_pool
    assert other is not pool and other.arena.data_ptr() != pool.arena.data_ptr()
    assert other.config is twin.config and other.page_bytes == pool.page_bytes
    assert other.allocator.n_pages == pool.allocator.n_pages
    assert free(twin) and not free(model)
    assert_equal(generate(twin, tokens()), expected)
    twin.generate(tokens(), max_new_tokens=2, return_dict_in_generate=True)
    assert free(twin) and isinstance(twin, type(model).__mro__[1])
    out = twin.generate(tokens(), max_new_tokens=2, return_dict_in_generate=True)
    assert out.past_key_values.pool is other


@pytest.mark.parametrize("made", [lambda: paged("gpt2", "int8", n_head=5), lambda: fused("int8")])
def test_a_saved_model_is_an_ordinary_one(made, tmp_path):
    model = made()
    with torch.no_grad():
        want = model(tokens()).logits
    model.save_pretrained(tmp_path)
    load = gpu_poor.load if hasattr(model.config, "quantization_config") else None
    load = load or transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path).eval()
    assert "_gp_kv_pool" not in loaded.__dict__
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, want, atol=1e-4, rtol=1e-4)
    expected = generate(model, tokens())
    use_paged_kv_cache_if_available(loaded, "int8", "20MB", 16)
    assert_equal(generate(loaded, tokens()), expected)


def test_unfused_and_fused_again_the_cache_stays():
    model = fused("int8")
    ids = tokens(2, 20)
    for change in (gpu_poor.unfuse, gpu_poor.fuse, gpu_poor.dequantize):
        model = change(model)
        out = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True)
        assert out.past_key_values.pool is model._gp_kv_pool, change.__name__
        del out
        assert free(model)


def test_a_copied_cache_shares_its_pages():
    """As people do with a prompt's cache: each continuation begins from a copy."""
    model = paged("llama", "int8")
    pool, cache, ids = model._gp_kv_pool, PagedKVCache(model._gp_kv_pool), tokens(2, 40)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
    held, stored = pool.allocator.n_held, cache.layers[1].gather(torch.float32)
    for _ in range(3):
        twin = copy.deepcopy(cache)
        assert pool.allocator.n_held == held and twin.get_seq_length() == 39
        assert_equal(generate(model, ids, past_key_values=twin), generate(model, ids))
        assert pool.allocator.n_held <= held + 2 * 2
        for a, b in zip(cache.layers[1].gather(torch.float32), stored, strict=True):
            assert_equal(a, b)
        del twin
        assert pool.allocator.n_held == held
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(cache)
    del cache
    assert free(model)


# -- exceptions -----------------------------------------------------------------------------------


class Raises:
    """In the n-th call; as a criterion, a processor, a streamer or a hook."""

    def __init__(self, n: int, error: type):
        self.left, self.error = n, error

    def put(self, *_):
        self.left -= 1
        if self.left < 0:
            raise self.error

    end = put

    def criterion(self, ids, scores):
        self.put()
        return torch.zeros(len(ids), dtype=torch.bool)

    def processor(self, ids, scores):
        self.put()
        return scores

    def hook(self, module, args):
        self.put()


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["stopping_criteria", "logits_processor", "streamer", "forward"])
@pytest.mark.parametrize("made", [lambda: paged("llama", "int8"), lambda: fused("int8")])
def test_an_exception_frees_the_pages_though_its_traceback_is_kept(made, where, error):
    model = made()
    for n in (0, 3):
        raises = Raises(n, error)
        options = {
            "stopping_criteria": dict(
                stopping_criteria=transformers.StoppingCriteriaList([raises.criterion])
            ),
            "logits_processor": dict(
                logits_processor=transformers.LogitsProcessorList([raises.processor])
            ),
            "streamer": dict(streamer=raises),
            "forward": {},
        }[where]
        inside = model.model.layers[1].mlp if where == "forward" else torch.nn.Identity()
        hook = inside.register_forward_pre_hook(raises.hook)
        gc.disable()
        try:
            with pytest.raises(error) as kept:
                generate(model, tokens(1, 20), max_new_tokens=12, **options)
            assert kept.tb is not None and free(model)
        finally:
            gc.enable()
            hook.remove()
        assert generate(model, tokens()).shape[0] == len(tokens())


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line that runs of the cache's own code."""

    def __init__(self, n: int):
        self.left = n

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename.replace("\\", "/")
        return self.line if name.endswith(("kv_cache/sequences.py", "gpu_poor/paging.py")) else None

    def line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("beams", [1, 3])
def test_an_interrupt_between_any_two_lines_loses_no_page(beams):
    model = paged("phi3", page_size=4, sliding_window=8)
    kept = PagedKVCache(model._gp_kv_pool)
    ids, shared = tokens(1, 14), tokens(2, 9)
    kept.activate_past_recording()
    generate(model, shared, past_key_values=kept)
    held, before = model._gp_kv_pool.allocator.n_held, sys.gettrace()
    n = 0
    while True:
        n += 1 + n // 40  # each of the first, then more thinly
        interrupt = Interrupt(n)
        sys.settrace(interrupt)
        try:
            generate(model, ids, num_beams=beams, max_new_tokens=6)
            raised = False
        except KeyboardInterrupt:
            raised = True
        finally:
            sys.settrace(before)
        if not raised:  # Python swallows it in a finalizer: they are free when they are wanted
            model._gp_kv_pool.allocator.recount()
        model._gp_kv_pool.allocator.check()
        assert model._gp_kv_pool.allocator.n_held == held, n
        if interrupt.left > 0:
            break
    assert n > 300
    del kept
    assert free(model)


def test_a_given_cache_is_its_owners_after_an_exception():
    model = paged("llama", "int8")
    cache, raises = PagedKVCache(model._gp_kv_pool), Raises(2, Boom)
    with pytest.raises(Boom):
        generate(model, tokens(1, 20), past_key_values=cache, streamer=raises)
    assert cache.get_seq_length() >= 20 and not free(model)
    del cache
    assert free(model)


def test_an_abandoned_stream_frees_the_pages():
    model = gpu_poor.QuantizedModel.from_pretrained(gpu_poor.assets.STORIES260K)
    use_paged_kv_cache_if_available(model, "int8", "20MB", 16)
    pieces = model.stream("Once upon a time", max_new_tokens=60)
    next(pieces)
    assert not free(model.model)
    pieces.close()
    assert free(model.model)


def test_two_threads_share_a_model_and_its_pool():
    model = paged("llama", "int8", page_size=16)
    prompts = [tokens(b, 20) for b in (1, 2, 3, 1)]
    expected = [generate(model, ids, max_new_tokens=24) for ids in prompts]
    model = use_paged_kv_cache_if_available(
        model, "int8", model._gp_kv_pool.page_bytes * 10, page_size=16
    )
    wrong, refused, done = [], [], []

    def work(i):
        for _ in range(6):
            try:
                got = generate(model, prompts[i], max_new_tokens=24)
            except MemoryError:
                refused.append(i)
                continue
            done.append(i)
            if not torch.equal(got, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and done and len(done) + len(refused) == 24
    assert free(model)


def test_make_model_is_left_alone_by_a_model_with_pages():
    model, plain = paged("llama"), make_model("llama")
    assert type(plain).__name__ == type(model).__name__ and type(plain) is not type(model)
    out = plain.generate(tokens(), max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, transformers.DynamicCache)
