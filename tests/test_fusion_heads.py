"""The short way of a causal language model's step returns what the model's own forward does."""

import copy

import blocks
import pytest
import torch
import torch.nn.functional as F
from conftest import tokens
from test_fusion import FAMILIES, assert_close, generate, make, step_reason
from torch import nn
from torch.nn.modules import module as global_hooks

import gpu_poor
from gpu_poor import ops
from gpu_poor.fusion import heads
from gpu_poor.fusion.architectures import HEADS
from gpu_poor.fusion.binding import original
from gpu_poor.fusion.decoders import decoder_class
from gpu_poor.kv_cache import PagedKVCache
from gpu_poor.kv_cache.generating import generating_class


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def short(monkeypatch) -> list:
    """One entry for each call of a model: whether it went the short way."""
    ways, stepped = [], heads._stepped

    def counted(*args):
        output = stepped(*args)
        ways.append(output is not None)
        return output

    monkeypatch.setattr(heads, "_stepped", counted)
    return ways


def prefilled(model: nn.Module, ids: torch.Tensor) -> PagedKVCache:
    cache = PagedKVCache(model, kv_memory="1MB", format="fp32", page_size=16)
    model(input_ids=ids, past_key_values=cache)
    return cache


@torch.no_grad()
def step(model: nn.Module, ids: torch.Tensor, own: bool, **options):
    """The output for tokens after eight others: ``own``, of the class of transformers."""
    call = dict(input_ids=ids, past_key_values=prefilled(model, tokens(len(ids), 8)))
    call |= {"return_dict": True} | options
    return original(type(model)).forward(model, **call) if own else model(**call)


def test_every_head_is_tested():
    assert {arguments[0] for arguments in FAMILIES.values()} == set(HEADS)


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_it_is_what_the_model_returns(family, short, keep):
    model, ids = make(family), tokens(2, 3)
    want = step(model, ids, own=True, logits_to_keep=keep)
    short.clear()
    got = step(model, ids, own=False, logits_to_keep=keep)
    assert short == [False, True]  # the prompt, the step
    assert type(got) is type(want) and list(got) == list(want)
    assert torch.equal(got.logits, want.logits)
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length() == 11
    assert step_reason(model) is None


def test_generate_takes_it(family, short):
    model, eager = make(family), make(family, fused=False)
    _, got, _ = generate(model, tokens(2, 9))
    assert short == 12 * [True]  # the prompt is a step, too
    assert_close(got[:2], generate(eager, tokens(2, 9))[1][:2])


@pytest.mark.parametrize("options", [
    {"return_dict": False}, {"labels": tokens(2, 3)}, {"logits_to_keep": torch.tensor([0, 2])},
    {"output_hidden_states": True}, {"use_cache": False},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_what_it_does_not_know_takes_the_long_way(short, options):
    model = make("llama")
    want, got = (step(model, tokens(2, 3), own, **options) for own in (True, False))
    assert not any(short) and type(got) is type(want)
    if isinstance(want, tuple):
        assert torch.equal(got[0], want[0])
    else:
        assert list(got) == list(want) and torch.equal(got.logits, want.logits)


def test_hooks_and_patches_around_the_decoder_are_called(short):
    model, calls = make("llama"), []
    hook = model.model.register_forward_hook(lambda *args: calls.append("hook"))
    step(model, tokens(1, 1), own=False)
    hook.remove()
    usual = model.model.forward

    def patched(*args, **kwargs):
        calls.append("patch")
        return usual(*args, **kwargs)

    model.model.forward = patched
    step(model, tokens(1, 1), own=False)
    del model.model.forward
    everywhere = global_hooks.register_module_forward_hook(
        lambda module, *args: calls.append("global") if module is model.model else None
    )
    step(model, tokens(1, 1), own=False)
    everywhere.remove()
    assert calls == 2 * ["hook"] + 2 * ["patch"] + 2 * ["global"]  # prompt and step
    assert not any(short)
    step(model, tokens(1, 1), own=False)
    assert short[-1]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("part", ["", "model"])
def test_a_patched_class_is_called(short, monkeypatch, part, early):
    """As other packages do it, before or after the model is fused."""
    model, calls = make("llama", fused=not early), []
    cls = original(type(model.get_submodule(part)))
    usual = cls.forward

    def patched(*args, **kwargs):
        calls.append(part)
        return usual(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", patched)
        made = decoder_class if part else generating_class
        made.cache_clear()  # as in a process whose first model is this one
        step(gpu_poor.fuse(model), tokens(1, 1), own=False)
        made.cache_clear()
    assert calls == 2 * [part] and not any(short)  # prompt and step


def test_a_hook_on_the_head_or_on_the_last_norm_is_called(short):
    model, calls = make("llama"), []
    model.lm_head.register_forward_hook(lambda *args: calls.append("head"))
    step(model, tokens(1, 1), own=False)
    assert calls == 2 * ["head"] and short[-1]
    hook = model.model.norm.register_forward_hook(lambda *args: calls.append("norm"))
    step(model, tokens(1, 1), own=False)
    assert calls.count("norm") == 2 and step_reason(model) == "a module inside has a hook"
    hook.remove()
    model.model.norm = nn.Identity().eval()
    step(model, tokens(1, 1), own=False)
    assert not short[-1] and "unknown norm Identity" in gpu_poor.explain(model).steps[0].reason


def test_another_last_norm_is_noticed(short):
    """A weight put in its place counts from the next call on; one of another dtype is no step."""
    model, ids = make("gpt2"), tokens(1, 1)
    before = step(model, ids, own=False).logits
    norm = model.transformer.ln_f
    norm.weight = nn.Parameter(2 * norm.weight.detach(), requires_grad=False)
    after = step(model, ids, own=False).logits
    assert short[-1] and float((after - before).abs().max()) > 0.1
    assert_close(after, step(model, ids, own=True).logits)
    assert_close(after, step(gpu_poor.unfuse(model), ids, own=True).logits)


def test_unfused_it_is_the_models_own(short):
    model = gpu_poor.unfuse(make("llama"))
    step(model, tokens(1, 1), own=False)
    assert short == []


@pytest.mark.parametrize("kind", [1, 2])
def test_the_operators_norm(kind):
    """As torch's of what it gives without; a tensor too few or too many is an error."""
    plain = blocks.step(torch.randn(2, 3, 30))
    arguments = blocks.normed(plain, kind)
    x, weights = ops.decoder_step(*copy.deepcopy(plain)), arguments[1][-kind:]
    norm = (F.rms_norm, F.layer_norm)[kind - 1]
    got = ops.decoder_step(*copy.deepcopy(arguments))
    torch.testing.assert_close(got, norm(x, (30,), *weights, eps=1e-5))
    for tensors in (plain[1], [*arguments[1], torch.ones(30), torch.ones(30)]):
        with pytest.raises(RuntimeError, match="decoder_step: .* tensors"):
            ops.decoder_step(x, tensors, *arguments[2:])
