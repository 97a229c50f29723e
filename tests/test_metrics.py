"""The metrics against a NumPy float64 oracle, and against models that are wrong in known ways."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import gpu_poor
from gpu_poor import assets, metrics, metrics_input, progress, spill
from gpu_poor.blocks import Blocks

N, VOCAB = 300, 97


@pytest.fixture(scope="module")
def logits():
    generator = torch.manual_seed(0)
    p = 3 * torch.randn(N, VOCAB, generator=generator)
    q = p + 0.1 * torch.randn(N, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (N,), generator=generator)
    return p, q, targets


def oracle(p, q, targets):
    """Softmax, KL and nll written out in float64 NumPy, row by row."""
    rows = []
    for a, b, t in zip(p.double().numpy(), q.double().numpy(), targets.tolist(), strict=True):
        pa, qb = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        kl = sum(x * (math.log(x) - math.log(y)) for x, y in zip(pa, qb, strict=True))
        rows.append((-math.log(pa[t]), -math.log(qb[t]), kl, float(pa.argmax() == qb.argmax())))
    return np.array(rows).T


def stats_matrix(stats):
    return torch.stack([stats.nll_reference, stats.nll, stats.kl, stats.same]).numpy()


@pytest.mark.parametrize("chunk", [1, 5 * VOCAB, 10**9])
def test_compare_is_the_oracle(logits, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    np.testing.assert_allclose(
        stats_matrix(metrics.compare(*logits)), oracle(*logits), rtol=1e-10, atol=1e-13
    )


def test_summary_is_the_oracle(logits):
    nll_p, nll_q, kl, same = oracle(*logits)
    quality = metrics.summarize(metrics.compare(*logits), 10, "x")
    d = nll_q - nll_p
    expected = {
        "perplexity_reference": np.exp(nll_p.mean()),
        "perplexity": np.exp(nll_q.mean()),
        "perplexity_ratio": np.exp(nll_q.mean()) / np.exp(nll_p.mean()),
        "perplexity_ratio_se": np.exp(d.mean()) * d.std(ddof=1) / math.sqrt(N),
        "kl_mean": kl.mean(),
        "kl_mean_se": kl.std(ddof=1) / math.sqrt(N),
        "kl_p99": np.quantile(kl, 0.99),
        "top1": same.mean(),
        "top1_se": same.std(ddof=1) / math.sqrt(N),
    }
    for name, value in expected.items():
        assert getattr(quality, name) == pytest.approx(value, rel=1e-9), name
    assert quality.n_tokens == N


def test_identical_logits_are_perfect(logits):
    p, _, targets = logits
    quality = metrics.summarize(metrics.compare(p, p.clone(), targets), 10, "x")
    assert quality.kl_mean == quality.kl_p99 == quality.perplexity_ratio_se == 0
    assert quality.top1 == quality.perplexity_ratio == 1


WRONG = {
    "zeros": torch.zeros_like,
    "twice the scale": lambda x: 2 * x,
    "sign flipped": torch.neg,
    "shifted by a token": lambda x: x.roll(1, 0),
    "vocabulary permuted": lambda x: x.roll(1, 1),
    "one column wrong": lambda x: x.index_fill(1, torch.tensor([7]), 20.0),
    "one token in fifty wrong": lambda x: torch.where(
        (torch.arange(len(x)) % 50 == 0)[:, None], -x, x
    ),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_wrong_logits_are_detected(logits, wrong):
    p, q, targets = logits
    honest = metrics.summarize(metrics.compare(p, q, targets), 10, "x")
    bad = metrics.summarize(metrics.compare(p, WRONG[wrong](p), targets), 10, "x")
    assert bad.kl_mean > 5 * honest.kl_mean
    if wrong != "twice the scale":  # keeps every argmax: only the distribution tells
        assert bad.top1 < 1


def test_a_shift_of_all_logits_changes_nothing(logits):
    p, _, targets = logits
    assert float(metrics.compare(p, p + 5, targets).kl.max()) < 1e-12


def test_half_precision_logits_are_read_as_float32(logits):
    p, q, targets = logits
    half = metrics.compare(p.bfloat16(), q.bfloat16(), targets)
    exact = metrics.compare(p.bfloat16().float(), q.bfloat16().float(), targets)
    assert torch.equal(half.kl, exact.kl)


def test_tokens_ruled_out(logits):
    """-inf in both models adds nothing; only in the quantized one it costs infinitely much."""
    p, q, targets = (x.clone() for x in logits)
    targets[:] = 1
    p[:, 0] = -math.inf
    assert metrics.compare(p, q, targets).kl.isfinite().all()
    q[:, 0] = -math.inf
    assert metrics.compare(p, q, targets).kl.isfinite().all()
    p[:, 0] = 0
    assert metrics.compare(p, q, targets).kl.isposinf().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["reference", "model"])
def test_non_finite_logits_are_an_error(logits, value, whose):
    p, q, targets = (x.clone() for x in logits)
    (p if whose == "reference" else q)[17, 3] = value
    with pytest.raises(ValueError, match=whose):
        metrics.compare(p, q, targets)


def test_shapes_are_checked(logits):
    p, q, targets = logits
    for args in ((p, q[:, :-1], targets), (p, q[:-1], targets), (p, q, targets[:-1])):
        with pytest.raises(ValueError, match="must be"):
            metrics.compare(*args)


# -- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, length, n_tokens", [(100, 10, None), (100, 10, 50), (7, 10, None), (2, 2, 1), (100, 2, 9)]
)
def test_every_token_is_predicted_once(n, length, n_tokens):
    ids = torch.arange(1000, 1000 + n)
    out = metrics.windows(ids, length=length, n_tokens=n_tokens)
    targets = out[:, 1:].flatten()
    assert torch.equal(targets, ids[1 : 1 + len(targets)])  # in order, no gap, no repetition
    assert torch.equal(out[1:, 0], out[:-1, -1])
    wanted = n - 1 if n_tokens is None else min(n_tokens, n - 1)
    assert wanted - (length - 1) < len(targets) <= wanted


def test_windows_refuse_nonsense():
    for kwargs in ({"length": 1}, {"n_tokens": 0}):
        with pytest.raises(ValueError, match="needs length"):
            metrics.windows([1, 2], **kwargs)
    for text in ([1], []):
        with pytest.raises(ValueError, match="text is too short"):
            metrics.windows(text)
    with pytest.raises(ValueError, match="tokenizer"):
        metrics.windows("a text")


# -- models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(stories):
    return *stories, assets.valid_text()[:9000]


def test_evaluate_a_model_against_itself(stories):
    model, _, text = stories
    quality = metrics.evaluate(copy.deepcopy(model), model, text, n_tokens=1000)
    assert quality.kl_mean == quality.kl_p99 == 0
    assert quality.top1 == quality.perplexity_ratio == 1
    assert 4 < quality.perplexity < 10  # it was trained on such stories
    assert quality.n_tokens == 765 and quality.window == 256


def test_perplexity_is_the_models_own_loss(stories):
    model, tokenizer, text = stories
    ids = metrics.windows(text, tokenizer, 64, 630)
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert metrics.perplexity(model, text, length=64, n_tokens=630) == pytest.approx(
        math.exp(loss), rel=1e-4
    )


def test_batches_do_not_change_the_result(stories, monkeypatch):
    model, tokenizer, text = stories
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for p in noisy.parameters():
            p.mul_(1 + 0.01 * torch.randn_like(p))
    one = metrics.evaluate(noisy, model, text, tokenizer, length=32, n_tokens=930)
    monkeypatch.setattr(metrics, "BATCH", 1)
    alone = metrics.evaluate(noisy, model, text, tokenizer, length=32, n_tokens=930)
    assert alone.kl_mean == pytest.approx(one.kl_mean, rel=1e-3) and one.kl_mean > 1e-4
    assert alone.text_sha256 == one.text_sha256


def test_recording_first_gives_the_same(stories):
    model, tokenizer, text = stories
    broken = copy.deepcopy(model)
    nn.init.zeros_(broken.model.layers[2].mlp.down_proj.weight)
    recording = metrics.record(model, text, tokenizer, n_tokens=1000)
    direct = metrics.evaluate(broken, model, text, tokenizer, n_tokens=1000)
    assert metrics.evaluate(broken, recording) == direct
    assert direct.kl_mean > 0.01 and direct.top1 < 0.95 and direct.perplexity_ratio > 1.01
    with pytest.raises(ValueError, match="own text"):
        metrics.evaluate(broken, recording, text)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_every_module_in_its_own_mode(stories, training):
    model, _, text = stories
    model.train(training)
    model.model.layers[1].mlp.train(not training)
    modes = [module.training for module in model.modules()]
    seen = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(module.training)
    )
    try:
        metrics.perplexity(model, text, n_tokens=300)
        assert [module.training for module in model.modules()] == modes
        assert seen and not any(seen)
    finally:
        handle.remove()
        model.eval()


def test_evaluate_asks_for_a_text(stories):
    model, _, text = stories
    with pytest.raises(ValueError, match="needs a text"):
        metrics.evaluate(copy.deepcopy(model), model)


def test_a_reference_must_be_another_model_in_float(stories):
    """quantize works in place: without a copy the figures are perfect, and of nothing."""
    model, tokenizer, text = stories
    original = copy.deepcopy(model)
    quantized = gpu_poor.quantize(original, verbose=False)
    for reference in (original, copy.deepcopy(quantized)):
        with pytest.raises(ValueError, match="in place.*deepcopy.*load the original again"):
            metrics.evaluate(quantized, reference, text, tokenizer)
    with pytest.raises(ValueError, match="same object"):
        metrics.evaluate(model, model, text, tokenizer)
    with pytest.raises(ValueError, match="quantized itself"):
        metrics.record(quantized, text, tokenizer)
    metrics.evaluate(quantized, model, text, tokenizer, n_tokens=300)
    other = type(model)(type(model.config)(vocab_size=2048, hidden_size=64, num_hidden_layers=1))
    with pytest.raises(ValueError, match="512 logits a token, reference with 2048: .* not one"):
        metrics.evaluate(quantized, other, text, tokenizer, n_tokens=300)


def test_wrong_arguments_are_named(stories, tmp_path):
    model, tokenizer, text = stories
    other = copy.deepcopy(model)
    path = tmp_path / "my_text.txt"
    path.write_text(text)
    cases = [
        # arguments of evaluate, error, what its message must say
        ((other, model, str(path), tokenizer), ValueError, "text is the name of a file.*content"),
        ((other, model, path, tokenizer), TypeError, "text must be.*read_text"),
        ((other, model, path.open(), tokenizer), TypeError, "text must be.*read()"),
        ((other, model, text.encode(), tokenizer), TypeError, "text must be.*decode"),
        ((other, model, tokenizer(text), tokenizer), TypeError, "text must be.*input_ids"),
        ((other, model, [text, 3], tokenizer), TypeError, "text must be"),
        ((other, model, [0.5, 0.25], tokenizer), TypeError, "text must be.*float32"),
        ((other, model, 7.0, tokenizer), TypeError, "text must be"),
        ((other, model, tokenizer, text), TypeError, "text must be.*before tokenizer"),
        ((other, model, text, "gpt2"), TypeError, "tokenizer must be.*got text 'gpt2'"),
        ((other, model, text, other), TypeError, "tokenizer must be"),
        (("gpt2", model, text, tokenizer), TypeError, "^model must be.*got text 'gpt2'"),
        ((other, "gpt2", text, tokenizer), TypeError, "^reference must be.*record.*'gpt2'"),
        ((other, text, tokenizer), TypeError, "^reference must be.*got text$"),
        ((other, model, "", tokenizer), ValueError, "text is empty"),
        ((other, model, " \n", tokenizer), ValueError, "text is empty"),
        ((other, model, "a", tokenizer), ValueError, "text is too short: 1 token,"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            metrics.evaluate(*arguments)
    for call in (metrics.perplexity, metrics.record):
        with pytest.raises(TypeError, match="must be a loaded model.*got text 'gpt2'"):
            call("gpt2", text, tokenizer)


def test_strings_are_joined_by_an_empty_line(stories):
    _, tokenizer, text = stories
    parts = [text[:500], text[500:1500]]
    assert torch.equal(
        metrics.windows(parts, tokenizer), metrics.windows("\n\n".join(parts), tokenizer)
    )


def test_figures_from_few_tokens_come_with_a_warning(stories, recwarn):
    model, tokenizer, text = stories
    other = copy.deepcopy(model)
    n = metrics_input.MIN_TOKENS
    metrics.evaluate(other, model, text, tokenizer, n_tokens=n)
    metrics.evaluate(other, metrics.record(model, text, tokenizer, n_tokens=n))
    assert not [w for w in recwarn if w.category is UserWarning]
    recording = metrics.record(model, text, tokenizer, n_tokens=n - 1)
    for call in (
        lambda: metrics.evaluate(other, model, "Once upon a time", tokenizer),
        lambda: metrics.evaluate(other, recording),
        lambda: metrics.perplexity(model, "Once upon a time", tokenizer),
    ):
        with pytest.warns(UserWarning, match="noise") as caught:
            call()
        assert caught[0].filename == __file__


def test_printing_and_dict(logits):
    quality = metrics.summarize(metrics.compare(*logits), 10, "0123456789abcdef")
    text = str(quality)
    for part in (f"{quality.perplexity_ratio:.5f}", f"{quality.kl_mean:.2e}", "0123456789ab"):
        assert part in text
    assert quality.to_dict()["kl_p99"] == quality.kl_p99


@pytest.mark.parametrize("in_memory", [0, 10**9], ids=["file", "memory"])
def test_a_recording_by_block_is_the_same(stories, monkeypatch, in_memory):
    monkeypatch.setattr(spill, "IN_MEMORY", in_memory)
    model, tokenizer, text = stories
    model.train()
    whole = metrics.record(model, text, tokenizer, length=64, n_tokens=900, by_block=False)
    blocks = metrics.record(model, text, tokenizer, length=64, n_tokens=900, by_block=True)
    assert model.training
    assert len(whole.logits) == len(blocks.logits) == 2
    for a, b in zip(whole.logits, blocks.logits, strict=True):
        assert torch.equal(a, b)


def test_a_model_in_files_is_recorded_by_block(stories, monkeypatch, tmp_path):
    model, tokenizer, text = stories
    model.save_pretrained(tmp_path)
    mapped = type(model).from_pretrained(tmp_path)
    made = []
    monkeypatch.setattr(metrics, "Blocks", lambda *args: made.append(args) or Blocks(*args))
    options = dict(length=64, n_tokens=200)
    expected = metrics.record(copy.deepcopy(model), text, tokenizer, **options)
    assert not made
    found = metrics.record(mapped, text, tokenizer, **options)
    assert len(made) == 1
    for a, b in zip(expected.logits, found.logits, strict=True):
        assert torch.equal(a, b)


def test_a_model_that_is_no_chain_of_blocks_is_recorded_as_a_whole_and_says_so(
    stories, monkeypatch, tmp_path
):
    model, tokenizer, text = stories
    model.save_pretrained(tmp_path)
    mapped = type(model).from_pretrained(tmp_path)
    last, first = mapped.model.layers[-1], {}
    # The last block reads what the first one has left behind: the text before this one, by block.
    mapped.model.layers[0].register_forward_pre_hook(lambda m, args: first.update(x=args[0]))
    last.register_forward_hook(lambda m, args, out: out + 3 * first["x"][:1, -1:].mean(1))
    options = dict(length=64, n_tokens=200)
    whole = metrics.record(mapped, text, tokenizer, **options, by_block=False)
    with pytest.warns(UserWarning, match="do more than pass hidden states on.*as a whole"):
        found = metrics.record(mapped, text, tokenizer, **options)
    for a, b in zip(whole.logits, found.logits, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="do more than pass hidden states on"):
        metrics.record(mapped, text, tokenizer, **options, by_block=True)


@pytest.mark.parametrize("by_block", [False, True])
def test_bars(stories, monkeypatch, capsys, by_block):
    monkeypatch.setattr(progress, "DELAY_S", 0)
    model, tokenizer, text = stories
    for show in (False, True):
        options = dict(n_tokens=300, by_block=by_block, progress=show)
        recording = metrics.record(model, text, tokenizer, **options)
        metrics.evaluate(copy.deepcopy(model), recording, progress=show)
        shown = capsys.readouterr().err
        assert ("measuring the float model: 100%" in shown) == show
        assert ("measuring the model: 100%" in shown) == show
