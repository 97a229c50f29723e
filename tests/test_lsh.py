"""Attention by hashing: against Reformer's own, against exact attention, against a plain loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import logits, make_model, tokens
from helpers import assert_equal, assert_within, to_numpy

import gpu_poor
from gpu_poor import assets

transformers = pytest.importorskip("transformers")
from gpu_poor.attention import lsh, use_lsh_attention  # noqa: E402
from gpu_poor.attention.lsh import Settings, lsh_attention, n_buckets  # noqa: E402
from gpu_poor.quantization import QuantizedModel  # noqa: E402


def qkv(heads=4, kv_heads=2, length=50, dim=16, batch=2, dtype=torch.float32):
    make = lambda n: torch.randn(batch, n, length, dim, dtype=dtype)  # noqa: E731
    return make(heads), make(kv_heads), make(kv_heads)


def exact(q, k, v, scaling, mask=None):
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    mask = causal if mask is None else mask & causal
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


# -- transformers' Reformer ------------------------------------------------------------------------


def reformer(settings, heads=4, dim=16):
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = transformers.ReformerConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        attention_head_size=dim,
        lsh_attn_chunk_length=settings.chunk,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0,
        num_hashes=settings.rounds,
        num_buckets=settings.buckets,
        hash_seed=settings.seed,
        is_decoder=True,
    )
    return LSHSelfAttention(config).eval()


REFORMERS = [
    (Settings(rounds=1, chunk=8, buckets=4, seed=7), 64),
    (Settings(rounds=2, chunk=8, buckets=8, seed=1), 64),
    (Settings(rounds=4, chunk=16, buckets=8, seed=2), 96),
    (Settings(rounds=3, chunk=16, buckets=2, seed=3), 32),
    (Settings(rounds=2, chunk=16, buckets=16, seed=4), 128),
]


@torch.no_grad()
def both(settings, length, dtype):
    """Reformer's answer to a random input, and ours to its vectors: ``[B, L, H * D]`` each."""
    theirs, hidden = reformer(settings).to(dtype), torch.randn(2, length, 64, dtype=dtype)
    split = lambda x: theirs._split_hidden_size_dim(x, 4, 16)  # noqa: E731
    qk, v = split(theirs.query_key(hidden)), split(theirs.value(hidden))
    keys = theirs._len_and_dim_norm(qk, 4.0)
    found = lsh_attention(qk, keys, v, 1.0, settings, shared_qk=True)
    rotations = lsh._rotations(4, 16, settings.buckets, settings, "cpu")
    hashed = [
        lsh._buckets(qk[b, h, None], None, rotations[h], True) for b in (0, 1) for h in range(4)
    ]
    buckets = torch.stack([of_keys for _, of_keys in hashed]).unflatten(0, (2, 4))
    offsets = settings.buckets * torch.arange(settings.rounds)[:, None]
    given = None if dtype == torch.float32 else buckets + offsets  # else it draws its own
    answer = theirs(hidden, buckets=given)
    assert_equal(answer.buckets, buckets + offsets)
    return answer.hidden_states, theirs._merge_hidden_size_dims(found, 4, 16)


@pytest.mark.parametrize(("settings", "length"), REFORMERS, ids=str)
def test_equal_to_reformer_with_the_same_rotations(settings, length):
    """But for tokens that see only themselves: near -1e5 a step of float32 is 0.008."""
    expected, found = both(settings, length, torch.float32)
    assert_within(found[:, 8:], expected[:, 8:], 2e-6)
    assert_within(found, expected, 0.05)


@pytest.mark.parametrize(("settings", "length"), REFORMERS, ids=str)
def test_equal_to_reformer_in_float64(settings, length):
    expected, found = both(settings, length, torch.float64)
    assert_within(found, expected, 1e-9)


def test_as_many_buckets_as_reformer_takes():
    for length in (100, 128, 700, 4096):
        theirs = reformer(Settings(chunk=64))
        theirs.num_buckets = None
        theirs._set_num_buckets(length)
        assert n_buckets(length, Settings(chunk=64)) == theirs.num_buckets
    assert n_buckets(4096, Settings(buckets=6)) == 6


# -- exact attention -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [25, 49, 50, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_windows_over_everything_are_exact_attention(chunk, dtype, heads, kv_heads):
    """Two chunks that span the text: every key is found, whatever the hashes are."""
    q, k, v = qkv(heads, kv_heads, dtype=dtype)
    found = lsh_attention(q, k, v, 0.25, Settings(rounds=3, chunk=chunk))
    assert found.dtype == dtype
    expected = exact(q.float(), k.float(), v.float(), 0.25)
    assert_within(found, expected, 2e-6 if dtype == torch.float32 else 0.03)


def test_masks():
    q, k, v = qkv()
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool)
    mask[0, :, :, :7] = False  # left padding of one row
    mask[1] = torch.ones(50, 50, dtype=torch.bool).triu(-10)  # a sliding window in the other
    found = lsh_attention(q, k, v, 0.25, Settings(chunk=32), mask)
    expected = exact(q, k, v, 0.25, mask)
    assert_within(found[0, :, 7:], expected[0, :, 7:], 2e-6)
    assert_within(found[1], expected[1], 2e-6)
    assert found.isfinite().all()  # also where padding sees nothing


# -- a plain loop ----------------------------------------------------------------------------------


def reachable(q, k, rotations, chunk) -> np.ndarray:
    """Bool ``[L, L]`` of one head: which keys some round finds; by the description in the file."""
    length = len(q)
    found = np.zeros((length, length), bool)
    rounds = [(np.zeros(length, int), np.zeros(length, int))]
    for r in range(rotations.shape[1]):
        turned = [x @ rotations[:, r] for x in (q, k - k.mean(0))]
        rounds.append([np.concatenate([x, -x], 1).argmax(1) for x in turned])
    for q_bucket, k_bucket in rounds:
        queries = sorted(range(length), key=lambda i: (q_bucket[i], i))  # noqa: B023
        keys = sorted(range(length), key=lambda i: (k_bucket[i], i))  # noqa: B023
        for at in range(0, length, chunk):
            part = queries[at : at + chunk]
            last = (q_bucket[part[-1]], part[-1])
            end = sum((k_bucket[j], j) <= last for j in keys)
            width = min(2 * chunk, length)
            window = keys[max(0, end - width) :][:width]
            found[np.ix_(part, window)] = True
    return found & np.tril(np.ones((length, length), bool))


@pytest.mark.parametrize("length", [37, 40])
@pytest.mark.parametrize(("rounds", "chunk", "buckets"), [(1, 4, 4), (3, 4, 8), (2, 5, None)])
def test_exact_attention_to_what_the_rounds_find(length, rounds, chunk, buckets):
    """Each key once, however many rounds find it."""
    q, k, v = qkv(length=length)
    settings = Settings(rounds, chunk, buckets, seed=3)
    rotations = to_numpy(lsh._rotations(2, 16, n_buckets(length, settings), settings, "cpu"))
    mask = torch.tensor(
        np.array(
            [
                [reachable(to_numpy(q[b, h]), to_numpy(k[b, h // 2]), rotations[h // 2], chunk)
                 for h in range(4)]
                for b in range(2)
            ]
        )
    )  # fmt: skip
    causal = length * (length + 1) // 2
    assert mask.diagonal(dim1=-2, dim2=-1).all()  # everyone sees itself
    assert mask.flatten(2).sum(-1).max() < causal  # and not everything
    found = lsh_attention(q, k, v, 0.25, settings)
    assert_within(found, exact(q, k, v, 0.25, mask), 3e-6)


def test_no_later_value_gets_in():
    q, k, v = qkv(length=64)
    settings = Settings(rounds=2, chunk=8)
    before = lsh_attention(q, k, v, 0.25, settings)
    v[:, :, 40:] += 100.0
    after = lsh_attention(q, k, v, 0.25, settings)
    assert_equal(after[:, :, :40], before[:, :, :40])
    assert not torch.equal(after[:, :, 40:], before[:, :, 40:])


def test_more_rounds_find_more():
    q, k, v = qkv(length=256, batch=1)
    k = q[:, ::2] + 0.3 * k  # keys that look like some queries
    expected = exact(q, k, v, 1.0)
    errors = [
        float((lsh_attention(q, k, v, 1.0, Settings(rounds, 16)) - expected).abs().mean())
        for rounds in (1, 4, 16)
    ]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_the_seed_is_all_that_is_random():
    q, k, v = qkv(length=64)
    one, same, other = (
        lsh_attention(q, k, v, 0.25, Settings(rounds=1, chunk=8, seed=s)) for s in (0, 0, 1)
    )
    assert_equal(one, same)
    assert not torch.equal(one, other)


def test_gradients_flow():
    q, k, v = (x[:1, :1].double().requires_grad_() for x in qkv(1, 1, length=12, dim=4))
    settings = Settings(rounds=2, chunk=3)
    assert torch.autograd.gradcheck(lambda *x: lsh_attention(*x, 0.5, settings), (q, k, v))


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "phi3", "gpt-neox", "opt"])
def test_models(name):
    model, ids = make_model(name), tokens(2, 60)
    before = logits(model, ids)
    assert use_lsh_attention(model, chunk=32, rounds=1) is model
    assert_within(logits(model, ids), before, 1e-4)  # two chunks reach everything
    use_lsh_attention(model, chunk=8, rounds=1)
    hashed = logits(model, ids)
    assert not torch.allclose(hashed, before, atol=1e-3)
    assert_within(hashed[:, :16], before[:, :16], 1e-4)  # the nearest are always seen
    assert_equal(logits(model, ids), hashed)
    short = tokens(2, 8)
    model.set_attn_implementation("sdpa")
    assert_equal(logits(model, ids), before)
    expected = logits(model, short)
    use_lsh_attention(model, chunk=8)
    assert_equal(logits(model, short), expected)  # no longer than a chunk


def test_left_padding():
    model = make_model("llama")
    use_lsh_attention(model, chunk=32)
    ids = tokens(1, 50)
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.int64), ids], 1)
    mask = (torch.arange(60) >= 10)[None].long()
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[:, 10:]
    assert_within(found, logits(model, ids), 1e-4)


def test_decoding_is_exact():
    """One token after a cache: what was read is as it was read, and nothing is hashed."""
    model, ids = make_model("llama"), tokens(1, 40)
    with torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        expected = model(ids[:, -1:], past_key_values=cache).logits
        use_lsh_attention(model, chunk=4)
        cache.crop(-1)
        assert_equal(model(ids[:, -1:], past_key_values=cache).logits, expected)
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == 44


def test_layers_are_hashed_with_seeds_of_their_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        lsh,
        "lsh_attention",
        lambda q, k, v, scaling, settings, mask: seeds.append(settings.seed) or q,
    )
    model = make_model("llama")
    logits(use_lsh_attention(model, chunk=8, seed=5))
    assert seeds == [5, 6]


def test_the_perplexity_is_printed(capsys):
    model = QuantizedModel.from_pretrained(assets.STORIES260K, verbose=False)
    text = assets.valid_text()[:12000]
    before = gpu_poor.metrics.perplexity(model, text, length=512)
    assert use_lsh_attention(model, chunk=16, rounds=2, text=text) is model
    after = gpu_poor.metrics.perplexity(model, text, length=512)
    out = capsys.readouterr().out
    assert f"perplexity {before:.4f} exact, {after:.4f} hashed" in out
    assert 1.005 < after / before < 1.2


def test_what_cannot_be_is_refused():
    model = make_model("llama")
    for wrong in ({"rounds": 0}, {"chunk": 2.5}, {"buckets": 7}, {"seed": -1}, {"rounds": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            use_lsh_attention(model, **wrong)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="no causal self-attention"):
        use_lsh_attention(make_model("bloom"))
    with pytest.raises(ValueError, match="FalconForCausalLM has attention of its own"):
        use_lsh_attention(make_model("falcon"))
    with pytest.raises(TypeError, match="a model of transformers"):
        use_lsh_attention(torch.nn.Linear(2, 2))
    q, k, v = qkv()
    with pytest.raises(ValueError, match="do not fit"):
        lsh_attention(q, k, v[:, :, 1:], 1.0, Settings())
    with pytest.raises(ValueError, match="do not fit"):
        lsh_attention(q, k, v, 1.0, Settings(), shared_qk=True)


def test_what_changes_the_logits_is_refused_when_it_runs():
    gemma = make_model("gemma2")
    with pytest.raises(ValueError, match="softcap, which Gemma2Attention needs"):
        use_lsh_attention(gemma, chunk=8, text=tokens(1, 200)[0])
    assert gemma.config._attn_implementation != lsh.NAME  # as it was
    model = make_model("llama", attention_dropout=0.5).train()
    with pytest.raises(ValueError, match="no dropout"):
        use_lsh_attention(model, chunk=4)(tokens())
    biased = torch.ones(1, 1, 17, 17)
    with pytest.raises(ValueError, match="adds numbers"):
        model.eval()(tokens(), attention_mask=biased)
    for length in (2, 17):  # exact, hashed
        with pytest.raises(ValueError, match="keeps no attention weights"):
            model(tokens()[:, :length], output_attentions=True)


def test_masks_of_floats():
    """Zero where attention is allowed, the lowest number or minus infinity where it is not."""
    model, ids = make_model("llama"), tokens(1, 40)
    use_lsh_attention(model, chunk=8)
    expected = logits(model, ids)
    causal = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    for lowest in (torch.finfo(torch.float32).min, float("-inf")):
        mask = torch.zeros(1, 1, 40, 40).masked_fill(~causal, lowest)
        with torch.no_grad():
            assert_equal(model(ids, attention_mask=mask).logits, expected)
