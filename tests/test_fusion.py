"""Fused decoder blocks answer as the eager ones do, and step aside where they must."""

import copy
import io

import pytest
import torch
from conftest import MODELS, SIZES, make_model, tokens
from torch import nn
from torch.nn.utils import prune

import gpu_poor
from gpu_poor import explain, fuse, isa, ops, quantize, unfuse
from gpu_poor.fusion import ARCHITECTURES, decoders
from gpu_poor.fusion.blocks import LAST

transformers = pytest.importorskip("transformers")

from gpu_poor.kv_cache import PagedKVCache, PagePool  # noqa: E402 - needs transformers

_GROUPED = SIZES | {"num_key_value_heads": 2}
#: One for each entry in ARCHITECTURES, and variants of them.
FAMILIES = {
    "gpt2": MODELS["gpt2"],
    "llama": MODELS["llama"],
    "llama-bias": ("LlamaForCausalLM", "LlamaConfig", _GROUPED | {"attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": MODELS["qwen3"],
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        SIZES | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt-neox-sequential": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        SIZES | {"use_parallel_residual": False, "hidden_act": "relu"},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _GROUPED),
}
#: What fused and eager logits may differ by, of their range: sums are in another order, and an
#: activation that falls on the other side of a rounding differs by 1 / 32384 of its token's largest
#: (a16), or by 1 / 127.
TOLERANCE, TOLERANCE_A8 = 1e-3, 2e-2


def make(family: str, *, fused: bool = True, **options) -> nn.Module:
    model_class, config_class, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that would not be noticed are
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 10)
    return quantize(model, allow_partial=True, verbose=False, fuse=fused, **options)


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ARCHITECTURES]


def reasons(model: nn.Module) -> set:
    """Why the last calls of the blocks were not fused."""
    return {block.__dict__.get(LAST, "never called") for block in blocks(model)}


def step_reason(model: nn.Module):
    """Why the last call of the model was no step."""
    return model.base_model.__dict__.get(LAST, "never called")


@torch.no_grad()
def generate(model: nn.Module, ids, new: int = 12, **options):
    """The tokens, and the logits that they were chosen from."""
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False) | options
    options.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits), out.past_key_values


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    spread = float(want.max() - want.min())
    assert spread > 0.1
    assert float((got - want).abs().max()) <= tolerance * spread


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_every_architecture_is_tested():
    made = {type(b).__name__ for name in FAMILIES for b in blocks(make(name))}
    assert made == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "a8"},
        {"activation": "a32"},
        {"bits": 4},
        {"bits": 16},
        {"overrides": {"*": "int8_asym", "*down_proj": "int4_g32", "*v_proj": "fp16"}},
    ],
    ids=str,
)
def test_fused_is_eager_within_rounding(family, options):
    """Prefill, steps, and both in a batch with padding on the left."""
    if "overrides" in options and "down_proj" not in str(make(family, fused=False)):
        options = {"bits": 4, "overrides": {"*": "int4_g32"}}
    eager, model = make(family, fused=False, **options), make(family, **options)
    tolerance = TOLERANCE_A8 if options.get("activation") == "a8" else TOLERANCE
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    with torch.no_grad():
        assert_close(model(ids).logits, eager(ids).logits, tolerance)
    assert reasons(model) == {None}
    for given in (torch.ones_like(ids), mask):
        _, want, plain = generate(eager, ids, attention_mask=given)
        sequences, got, cache = generate(model, ids, attention_mask=given)
        assert not isinstance(plain, PagedKVCache) and isinstance(cache, PagedKVCache)
        assert step_reason(model) is None, step_reason(model)
        forced = eager_logits(eager, sequences[:, :-1], given)
        assert got.shape == want.shape
        assert_close(got.transpose(0, 1), forced[:, ids.shape[1] - 1 :], tolerance)


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_input_scales(bits):
    """What calibration keeps beside a linear because no norm before it can take it."""
    pair = [make("llama", fused=fused, bits=bits) for fused in (False, True)]
    for model in pair:
        for i, block in enumerate(blocks(model)):
            for linear in (block.self_attn.o_proj, block.self_attn.k_proj, block.mlp.down_proj):
                generator = torch.Generator().manual_seed(i)
                scale = torch.rand(linear.in_features, generator=generator) + 0.5
                linear.input_scale = scale.half()
    eager, model = pair
    with torch.no_grad():
        assert_close(model(tokens(2, 9)).logits, eager(tokens(2, 9)).logits)
    assert_close(generate(model, tokens(2, 9))[1][:2], generate(eager, tokens(2, 9))[1][:2])
    assert step_reason(model) is None and reasons(model) == {None}


@torch.no_grad()
def eager_logits(model, sequences, mask):
    """Of the whole sequences at once, positions counted as generate does."""
    mask = torch.cat((mask, torch.ones_like(sequences[:, mask.shape[1] :])), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits


def test_on_every_instruction_set(isa):
    """The same tokens; under plain torch, without kernels, blocks run as they were written."""
    model = make("llama")
    ids = tokens(1, 9)
    sequences, logits, _ = generate(model, ids)
    assert (step_reason(model) is None) == (isa != "torch")
    with gpu_poor.isa.cap("ref"):
        expected, want, _ = generate(make("llama"), ids)
    assert_close(logits, want)
    assert torch.equal(sequences, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_models_keep_their_dtype(family, dtype):
    """Logits of 16 bits are steps of up to 1/256, so fused and eager can't agree to 1e-3: both are
    compared with float32, and fused blocks, which round less often, are no farther from it."""
    model, eager = make(family).to(dtype), make(family, fused=False).to(dtype)
    wide, ids = copy.deepcopy(eager).float(), tokens(4, 25)
    with torch.no_grad():
        got, rounded, want = (m(ids).logits for m in (model, eager, wide))
    assert got.dtype == dtype and reasons(model) == {None}
    errors = [float((y.float() - want).square().mean().sqrt()) for y in (got, rounded)]
    assert errors[0] <= 1.1 * errors[1]
    generate(model, ids)
    assert step_reason(model) is None


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_bits_depend_on_the_sequence_only(family, form, monkeypatch):
    """Not on threads, on the batch and its padding, or on how many tokens come at a time."""
    if family == "gpt2":  # its heads of 30 are none that int8 can have
        monkeypatch.setitem(FAMILIES[family][2], "n_head", 5)
    model, ids, before = make(family), tokens(3, 40), torch.get_num_threads()
    pool = PagePool(model, format=form, kv_memory="8MB", page_size=16)

    @torch.no_grad()
    def logits(ids, sizes, **options):
        cache, parts, length = PagedKVCache(pool), [], 0
        for size in sizes:
            mask = options.get("mask", torch.ones_like(ids))[:, : length + size]
            position = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
            part = ids[:, length : length + size]
            out = model(
                part, attention_mask=mask, position_ids=position, past_key_values=cache
            ).logits
            assert step_reason(model) is None
            parts.append(out)
            length += size
        return torch.cat(parts, 1)

    want = logits(ids, [40])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert_close(want, whole, 2e-2 if form == "int8" else TOLERANCE)
    for sizes in ([1] * 40, [17, 1, 22], [8, 9, 7, 16]):
        assert torch.equal(logits(ids, sizes), want), sizes
    assert torch.equal(logits(ids[1:2], [39, 1]), want[1:2])
    padded = torch.cat((ids[:, :21], ids), 1)
    mask = torch.ones_like(padded)
    mask[:, :21] = 0
    monkeypatch.setattr(decoders, "SLICE", 3 * 13)
    for sizes in ([61], [60, 1]):
        assert torch.equal(logits(padded, sizes, mask=mask)[:, 21:], want)
    try:
        torch.set_num_threads(1)
        assert torch.equal(logits(ids, [40]), want)
    finally:
        torch.set_num_threads(before)


def test_an_interrupted_step_leaves_the_cache_as_it_was(monkeypatch):
    model, ids = make("llama"), tokens(1, 40)
    cache, calls, step = PagedKVCache(model, format="int8", kv_memory="8MB"), [], ops.decoder_step

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    with torch.no_grad():
        want = model(ids, past_key_values=PagedKVCache(cache.pool)).logits
        model(ids[:, :10], past_key_values=cache)
        monkeypatch.setattr(decoders, "SLICE", 8)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ops, "decoder_step", interrupted)
            model(ids[:, 10:], past_key_values=cache)
        assert cache.get_seq_length() == 10
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PagedKVCache, "advance", interrupted)  # it may come between any two lines
            calls[1:] = []
            step = PagedKVCache.advance
            model(ids[:, 10:], past_key_values=cache)
        assert cache.get_seq_length() == 10
        assert torch.equal(model(ids[:, 10:], past_key_values=cache).logits, want[:, 10:])


def test_an_embedding_is_looked_up_once():
    """Its hooks are called as often as without, where a hook inside makes it no step, too."""
    model, ids, calls = make("llama"), tokens(1, 3), []
    model.model.embed_tokens.register_forward_hook(lambda *args: calls.append("embedding"))
    generate(model, ids, new=2)
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    generate(model, ids, new=2)
    assert step_reason(model) == "a module inside has a hook"
    assert calls == 4 * ["embedding"]


# -- the model stays what it was ------------------------------------------------------------------


def test_names_classes_and_state_stay(family):
    plain, model = make(family, fused=False), make(family)
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(plain.state_dict()) == list(model.state_dict())
    for a, b in zip(plain.modules(), model.modules(), strict=True):
        assert isinstance(b, type(a)) and repr(type(b)) == repr(type(a))
    model.load_state_dict(plain.state_dict())
    unfuse(model)
    assert all(type(a) is type(b) for a, b in zip(plain.modules(), model.modules(), strict=True))
    assert unfuse(model) is model and fuse(fuse(model)) is model


def test_other_weights_are_noticed():
    """load_state_dict writes into the tensors, assign=True replaces them."""
    model, other = make("llama"), make("llama", fused=False)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.mul_(1.5)
    for assign in (False, True):
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_close(generate(model, tokens(1, 5))[1], generate(other, tokens(1, 5))[1])
        assert step_reason(model) is None


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_copies_are_fused_and_independent(family, copied):
    model = make(family)
    want = generate(model, tokens(1, 5))[1]
    twin = copied(model)
    assert_close(generate(twin, tokens(1, 5))[1], want)
    assert step_reason(twin) is None and _eager_reason(twin) == {None}
    with torch.no_grad():
        for block in blocks(twin):
            for parameter in block.parameters():
                if parameter.is_floating_point():
                    parameter.zero_()
    assert_close(generate(model, tokens(1, 5))[1], want)
    assert float((generate(twin, tokens(1, 5))[1] - want).abs().max()) > 0.1


def test_a_saved_model_is_fused_when_it_is_loaded(tmp_path, family):
    model = make(family)
    want = generate(model, tokens(1, 5))[1]
    model.save_pretrained(tmp_path)
    loaded = gpu_poor.load(tmp_path)
    assert_close(generate(loaded, tokens(1, 5))[1], want)
    assert step_reason(loaded) is None
    assert loaded.config.architectures == [type(model).__name__]


@pytest.mark.parametrize("function", [fuse, unfuse, explain])
def test_what_is_no_model(function):
    with pytest.raises(TypeError, match=f"{function.__name__} takes a model, got NoneType"):
        function(None)


def test_dequantize_unfuses():
    model = gpu_poor.dequantize(make("llama"))
    assert all(type(block) is not None for block in blocks(model))
    assert "0 of 2" in str(explain(model))


# -- stepping aside -------------------------------------------------------------------------------


def _eager_reason(model, **call) -> set:
    with torch.no_grad():
        model(tokens(1, 5), **call)
    return reasons(model)


def test_gradients_come_from_the_eager_path():
    model = make("llama")
    model(tokens(1, 5)).logits.sum().backward()
    assert all("gradients" in reason for reason in reasons(model))
    assert model.model.layers[0].input_layernorm.weight.grad is not None
    assert _eager_reason(model) == {None}


def test_gradients_of_a_cache():
    """A prefix that is trained, in evaluation mode, of a model that is not."""
    found = []
    for model in (make("llama").requires_grad_(False), make("llama", fused=False)):
        cache = transformers.DynamicCache(config=model.config)
        generator = torch.Generator().manual_seed(0)
        prefix = torch.randn(4, 1, 2, 3, 32, generator=generator).requires_grad_()
        for i in range(2):
            cache.update(prefix[2 * i], prefix[2 * i + 1], i)
        model(tokens(1, 5), past_key_values=cache).logits.sum().backward()
        found.append(prefix.grad)
    assert_close(*found)
    assert bool((found[0].flatten(1).abs().sum(1) > 0).all())


def test_transforms_take_the_eager_path():
    model, eager = make("llama").requires_grad_(False), make("llama", fused=False)
    embeddings = model.get_input_embeddings()(tokens(2, 5)).detach()

    def logits(x):
        return model(inputs_embeds=x, use_cache=False).logits

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(logits, (embeddings,), (embeddings,))
    with torch.no_grad():
        got = torch.func.vmap(lambda x: logits(x[None]))(embeddings)[:, 0]
        assert_close(got, eager(inputs_embeds=embeddings).logits)
    assert _eager_reason(model) == {None}


class _Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_of_the_eager_path():
    model = make("llama")
    with torch.no_grad():
        traced = torch.jit.trace(_Logits(model), tokens(2, 5))
        assert_close(traced(tokens(2, 5)), model(tokens(2, 5)).logits)


def test_training_mode():
    model = make("gpt2").train()
    assert _eager_reason(model) == {"in training mode"}
    assert _eager_reason(model.eval()) == {None}


def test_hooks_inside_are_called():
    model, seen = make("llama"), []
    hook = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *args: seen.append(1))
    assert _eager_reason(model) == {None, "a module inside has a hook"}
    generate(model, tokens(1, 5), new=3)
    assert len(seen) == 4 and "hook" in step_reason(model)
    hook.remove()
    assert _eager_reason(model) == {None}


def test_a_hooked_model_is_not_compared_place_by_place(monkeypatch):
    """Why nothing can be fused is found out in a fraction of the places that are watched."""
    model, compared = make("llama"), []

    def unchanged(mappings, keys, values, compare=isa.unchanged):
        compared.append(len(mappings))
        return compare(mappings, keys, values)

    monkeypatch.setattr(isa, "unchanged", unchanged)
    generate(model, tokens(1, 5), new=4)
    compared.clear()
    generate(model, tokens(1, 5), new=4)
    whole = max(compared)
    hooks = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    compared.clear()
    generate(model, tokens(1, 5), new=4)
    assert sum(compared) < 4 * whole and "hook" in step_reason(model), compared
    assert all(n < whole / 8 for n in compared)
    # A replaced module is found out, hook or not: with the last hook the old one's is gone, too.
    for hook in hooks:
        hook.remove()
    layer = model.model.layers[0].self_attn
    inner = layer.q_proj.register_forward_hook(lambda *_: None)
    assert _eager_reason(model) == {None, "a module inside has a hook"}
    layer.q_proj = copy.deepcopy(model.model.layers[1].self_attn.q_proj)
    assert _eager_reason(model) == {None}
    assert inner is not None


def test_hooks_on_blocks_are_called():
    model, seen = make("llama"), []
    model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    generate(model, tokens(1, 5), new=3)
    assert len(seen) == 3 and "hook" in step_reason(model) and reasons(model) == {None}


def test_outputs_on_request(family):
    """Attentions and hidden states are those of the eager model, and what fused comes back."""
    model, eager = make(family), make(family, fused=False)
    for m in (model, eager):
        m.set_attn_implementation("eager")
    with torch.no_grad():
        got = model(tokens(1, 5), output_attentions=True, output_hidden_states=True)
        want = eager(tokens(1, 5), output_attentions=True, output_hidden_states=True)
    assert len(got.attentions) == len(want.attentions) == 2
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert_close(a, b)
    assert None not in reasons(model)
    with torch.no_grad():
        hidden = model(tokens(1, 5), output_hidden_states=True).hidden_states
    for a, b in zip(hidden, want.hidden_states, strict=True):
        assert_close(a, b)
    assert _eager_reason(model) == {None}
    generate(model, tokens(1, 5))
    assert step_reason(model) is None


def test_hidden_states_of_a_step():
    model = make("llama")
    out = model.generate(
        tokens(1, 5), max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True
    )
    assert [len(states) for states in out.hidden_states] == [3, 3, 3]
    assert "output_hidden_states" in step_reason(model)


def test_a_mask_with_holes_is_obeyed():
    model, eager = make("llama"), make("llama", fused=False)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    _, got, _ = generate(model, ids, attention_mask=mask)
    _, want, _ = generate(eager, ids, attention_mask=mask)
    assert_close(got, want)
    assert "mask" in step_reason(model)


def test_other_caches_work():
    model, eager = make("mistral"), make("mistral", fused=False)
    for kind in (transformers.DynamicCache, transformers.StaticCache):
        options = {"max_cache_len": 40} if kind is transformers.StaticCache else {}
        got, want = (
            generate(m, tokens(2, 5), past_key_values=kind(config=m.config, **options))[1]
            for m in (model, eager)
        )
        assert_close(got, want)
        assert kind.__name__ in step_reason(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "gpu_poor"])
def test_a_static_cache_has_empty_slots(family, attention):
    """transformers makes no mask for the first tokens of one: none sees beyond itself."""
    model, eager = make(family), make(family, fused=False)
    model.set_attn_implementation(attention)
    for ids in (tokens(1, 9), tokens(2, 9)):
        got, want = (
            generate(m, ids, cache_implementation="static", new=6)[1][:3] for m in (model, eager)
        )
        assert_close(got, want)
        assert reasons(model) == {None}


@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_given_cache_in_pages(form):
    model = make("llama")
    pool = PagePool(model, format=form, kv_memory="8MB", page_size=16)
    if form == "int8":
        pool.center_keys(model)
    cache = PagedKVCache(pool)
    _, logits, used = generate(model, tokens(2, 20), past_key_values=cache)
    assert used is cache and step_reason(model) is None
    _, want, _ = generate(make("llama", fused=False), tokens(2, 20))
    spread = float(want.max() - want.min())
    assert float((logits[0] - want[0]).abs().max()) <= (0.02 if form == "int8" else 1e-3) * spread


def test_a_conversation_goes_on_in_its_cache():
    model = make("llama")
    ids, more = tokens(1, 9), tokens(1, 4)
    sequences, _, cache = generate(model, ids, new=5)
    both = torch.cat((sequences, more), 1)
    _, got, _ = generate(model, both, new=5, past_key_values=cache)
    _, want, _ = generate(model, both, new=5)
    assert_close(got, want)


@pytest.mark.parametrize("fused", [False, True])
def test_no_sequences_are_transformers_error(fused):
    with pytest.raises(RuntimeError, match="0 elements"):
        make("llama", fused=fused).generate(tokens(2, 5)[:0], max_new_tokens=3)


def test_an_early_exit_runs_fewer_blocks():
    """transformers lowers the config's number of layers to draft, and raises it again to check."""
    model, ids = make("llama"), tokens(1, 9)
    want = make("llama", fused=False).generate(ids, max_new_tokens=8, do_sample=False)
    got = model.generate(ids, max_new_tokens=8, do_sample=False, assistant_early_exit=1)
    assert torch.equal(got, want)
    assert_close(generate(model, ids)[1], generate(make("llama", fused=False), ids)[1])
    assert step_reason(model) is None


def test_beams_and_several_sequences():
    model, eager = make("llama"), make("llama", fused=False)
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        got, want = (
            m.generate(tokens(2, 5), max_new_tokens=8, do_sample=False, **options)
            for m in (model, eager)
        )
        assert torch.equal(got, want)
        assert step_reason(model) is None


def test_a_replaced_linear_is_not_overlooked():
    """A module in a linear's place, as PEFT puts one there."""
    model = make("llama")
    layer = model.model.layers[0].self_attn
    original = layer.q_proj

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = original

        def forward(self, x):
            return 2 * self.base_layer(x)

    layer.q_proj = Doubled().eval()
    found = _eager_reason(model)
    assert found == {None, f"q_proj is Doubled, with a forward of {__name__}"}
    layer.q_proj = original
    assert _eager_reason(model) == {None}


def test_a_class_of_ones_own_is_not_overlooked(monkeypatch):
    """Attention of a subclass, and a method that is replaced in a class of transformers."""

    def doubled(self, *args, **kwargs):
        out, weights = base(self, *args, **kwargs)
        return 2 * out, weights

    model, eager = make("llama"), make("llama", fused=False)
    attention = type(model.model.layers[0].self_attn)
    base = attention.forward
    mine = type("Doubled", (attention,), {"forward": doubled, "__module__": __name__})
    for m in (model, eager):
        m.model.layers[0].self_attn.__class__ = mine
    assert_close(generate(model, tokens(1, 9))[1], generate(eager, tokens(1, 9))[1])
    assert reasons(model) == {None, f"self_attn is Doubled, with a forward of {__name__}"}

    monkeypatch.setattr(attention, "forward", doubled)
    model, eager = make("llama"), make("llama", fused=False)
    assert_close(generate(model, tokens(1, 9))[1], generate(eager, tokens(1, 9))[1])
    assert reasons(model) == {f"self_attn is LlamaAttention, with a forward of {__name__}"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_numbers_are_noticed(family):
    """Of norms, and what scores are multiplied by, after a first call."""
    model, eager = make(family), make(family, fused=False)
    generate(model, tokens(1, 9))
    for m in (model, eager):
        for module in m.modules():
            for name in ("eps", "variance_epsilon"):
                if name in vars(module):
                    setattr(module, name, 1e-3)
            if "scaling" in vars(module):
                module.scaling *= 10
    assert_close(generate(model, tokens(1, 9))[1][:3], generate(eager, tokens(1, 9))[1][:3])
    assert step_reason(model) is None and _eager_reason(model) == {None}


def test_a_pruned_norm_is_no_parameter():
    model, eager = make("llama"), make("llama", fused=False)
    for m in (model, eager):
        prune.l1_unstructured(m.model.layers[0].input_layernorm, "weight", 0.3)
    assert_close(generate(model, tokens(1, 9))[1], generate(eager, tokens(1, 9))[1])
    assert reasons(model) == {None, "a LlamaRMSNorm without a weight of its own"}


def test_a_patched_forward_is_called():
    model, seen = make("llama"), []
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: seen.append(1) or forward(x)
    assert _eager_reason(model) == {None, "mlp has a forward of its own"}
    assert seen
    del mlp.forward
    assert _eager_reason(model) == {None}


def test_float_layers_stay_eager():
    model = make("llama", overrides={"*layers.1.mlp.up_proj": 32})
    assert _eager_reason(model) == {None, "mlp.up_proj is Linear, not quantized"}
    generate(model, tokens(1, 5))
    assert step_reason(model) == "block 1: mlp.up_proj is Linear, not quantized"
    text = str(explain(model))
    assert "1 of 2 known decoder blocks fused" in text and "mlp.up_proj is Linear" in text


def test_autocast():
    model = make("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert _eager_reason(model) == {"autocast"}


def test_compiled_models_run_as_written():
    model = make("llama")
    with torch.no_grad():
        want = model(tokens(1, 5)).logits
        compiled = torch.compile(model.model, backend="eager", fullgraph=False)
        got = model.lm_head(compiled(tokens(1, 5)).last_hidden_state)
    assert_close(got, want)


def test_moved_to_meta_and_unknown_models():
    model = make("llama")
    model.to("meta")
    assert "0 of 2" in str(explain(model)) and "meta" in str(explain(model))
    other = quantize(make_model("opt"), verbose=False)
    assert "no module is one of GPT2Block" in str(explain(other))
    generate(other, tokens(1, 5))


def test_explain_before_and_after_a_call():
    model = make("llama", fused=False)
    assert "0 of 2" in str(explain(model)) and "gpu_poor.fuse(model)" in str(explain(model))
    fuse(model)
    assert "2 of 2" in str(explain(model))
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=transformers.DynamicCache())
    assert "PagedKVCache" in str(explain(model))
    with isa.cap("torch"):
        model = make("llama")
        assert "no kernels" in str(explain(model))


def test_too_few_pages_leave_the_models_own_cache(monkeypatch):
    model = make("llama")
    monkeypatch.setattr(gpu_poor.memory, "available", lambda: 1000)
    _, _, cache = generate(model, tokens(1, 5))
    assert not isinstance(cache, PagedKVCache)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_trained_model_says_the_same(bits):
    name = gpu_poor.assets.STORIES260K
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    said = []
    for fused in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(name).eval()
        quantize(model, bits, allow_partial=True, verbose=False, fuse=fused)
        said.append(generate(model, ids, new=120)[0])
    assert torch.equal(*said)
    assert step_reason(model) is None
