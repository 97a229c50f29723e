"""convert_to_multi_query: the mean of a group of heads, which is exact where they are equal."""

import copy

import pytest
import torch
from conftest import assert_untouched, logits, make_model, state, tokens
from helpers import assert_equal, assert_within

import gpu_poor
from gpu_poor import assets

transformers = pytest.importorskip("transformers")
from gpu_poor.attention import convert_to_multi_query  # noqa: E402
from gpu_poor.attention.multi_query import PROJECTIONS, pool  # noqa: E402
from gpu_poor.quantization import QuantizedModel  # noqa: E402

#: Of conftest's models, those that can be converted, made with four key/value heads.
CONVERTIBLE = ("gpt2", "llama", "qwen3", "qwen3-moe", "mixtral", "olmo", "gemma2", "phi3")


def four_heads(name):
    """With biases where the architecture has them."""
    changes = {} if name == "gpt2" else {"num_key_value_heads": 4}
    if name in ("llama", "qwen3"):
        changes["attention_bias"] = True
    model = make_model(name, **changes)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".bias"):
                parameter.normal_()
    return model


def heads_of(model, name, tensor):
    """``[4, head_dim, ...]`` views of the key and of the value heads in a parameter."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "c_attn" in name:
        tensor = tensor.t() if tensor.dim() == 2 else tensor
        return tensor[config.n_embd :].unflatten(0, (2, 4, head_dim)).unbind(0)
    n = PROJECTIONS.get(name.split(".")[-2])
    if n is None:
        return ()
    return tensor[-n * 4 * head_dim :].unflatten(0, (n, 4, head_dim)).unbind(0)


@torch.no_grad()
def make_equal(model, group):
    for name, parameter in model.named_parameters():
        for heads in heads_of(model, name, parameter):
            for head in range(4):
                heads[head] = heads[head - head % group].clone()


def groups(name):
    return (4,) if name == "gpt2" else (4, 2)


@pytest.mark.parametrize(
    ("name", "group"), [(name, group) for name in CONVERTIBLE for group in groups(name)]
)
def test_with_equal_heads_nothing_changes(name, group, capsys):
    model = four_heads(name)
    make_equal(model, group)
    before = logits(model)
    parameters = sum(p.numel() for p in model.parameters())
    converted = convert_to_multi_query(model, 4 // group)
    assert converted.config.num_key_value_heads == 4 // group
    assert sum(p.numel() for p in converted.parameters()) < parameters
    assert_within(logits(converted), before, 1e-5 * float(before.abs().max()))
    out = capsys.readouterr().out
    assert f"4 key/value heads are {4 // group} now" in out and "up-training" in out


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_new_heads_are_means(name):
    model = four_heads(name)
    expected = {
        key: [heads.detach().double().mean(0) for heads in heads_of(model, key, parameter)]
        for key, parameter in model.named_parameters()
    }
    converted = convert_to_multi_query(model, 1, verbose=False)
    pooled = [key for key, means in expected.items() if means]
    assert pooled
    parameters = dict(converted.named_parameters())
    for key in pooled:
        for i, mean in enumerate(reversed(expected[key])):
            end = len(parameters[key]) - i * len(mean)
            assert_equal(parameters[key][end - len(mean) : end], mean.float())


def test_pool():
    heads = torch.tensor([9.0, 2.0, 3.0, 4.0, 7.0])[:, None]
    assert pool(heads, 2, 1, first=1).flatten().tolist() == [9.0, 2.5, 5.5]
    tenths = torch.full((3, 1), 0.1)
    assert_equal(pool(tenths, 3, 1), tenths[:1])  # exact, which a sum in float32 is not
    with_dim = torch.arange(8.0).view(8, 1)
    assert pool(with_dim, 2, 2).flatten().tolist() == [1.0, 2.0, 5.0, 6.0]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_saved_and_loaded(name, tmp_path):
    converted = convert_to_multi_query(four_heads(name), 1, verbose=False)
    converted.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(converted)
    assert_equal(logits(loaded), logits(converted))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_converted_generates_and_quantizes(name):
    converted = convert_to_multi_query(four_heads(name), 1, verbose=False)
    ids = tokens(1, 9)
    out = converted.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    cache = transformers.DynamicCache(config=converted.config)
    converted(ids, past_key_values=cache)
    assert cache.layers[0].keys.shape[1] == 1
    again = converted(out[:, :-1]).logits[:, -5:].argmax(-1)  # without a cache
    assert_equal(out[:, -5:], again)
    quantized = gpu_poor.quantize(copy.deepcopy(converted), verbose=False, allow_partial=True)
    wanted = logits(converted)
    assert_within(logits(quantized), wanted, 0.05 * float(wanted.abs().max()))


def test_another_model_of_the_same_config_keeps_its_heads():
    config = transformers.LlamaConfig(
        **{"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 384}
    )
    one, other = (transformers.LlamaForCausalLM(config) for _ in range(2))
    convert_to_multi_query(one, 2, verbose=False)
    assert other.config.num_key_value_heads == 4 and one.config.num_key_value_heads == 2
    assert logits(other).isfinite().all()


def test_gpt2_is_left_as_it_was_and_the_rest_goes_along():
    model = four_heads("gpt2").train()
    model.generation_config.max_new_tokens = 7
    before = state(model)
    converted = convert_to_multi_query(model, 1, verbose=False)
    assert converted.training and converted.generation_config.max_new_tokens == 7
    assert converted.lm_head.weight is converted.transformer.wte.weight
    assert_untouched(model, before)


def test_frozen_heads_stay_frozen_and_hooks_stay():
    model = four_heads("llama")
    projection = model.model.layers[0].self_attn.k_proj
    projection.weight.requires_grad_(False)
    shapes = []
    projection.register_forward_hook(lambda m, args, out: shapes.append(out.shape[-1]))
    convert_to_multi_query(model, 2, verbose=False)
    assert not projection.weight.requires_grad and projection.bias.requires_grad
    logits(model)
    assert shapes == [64] and projection.out_features == 64


def test_perplexity_is_printed(capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K)
    text = assets.valid_text()[:4000]
    before = gpu_poor.metrics.perplexity(model, text)
    convert_to_multi_query(model, 2, text=text)
    after = gpu_poor.metrics.perplexity(model, text)
    assert f"perplexity {before:.4f} before, {after:.4f} now" in capsys.readouterr().out
    assert after > 1.2 * before


@pytest.mark.parametrize(
    ("name", "kv_heads", "message"),
    [
        ("llama", 0, "from 1 to 1"),
        ("llama", 2, "from 1 to 1"),
        ("llama", True, "from 1 to 1"),
        ("llama", 1.0, "from 1 to 1"),
        ("olmo", 3, "does not divide the 4"),
        ("gpt2", 2, "kv_heads must be 1, got 2"),
        ("gpt-neox", 1, "GPTNeoXForCausalLM has no num_key_value_heads"),
        ("opt", 1, "OPTForCausalLM has no num_key_value_heads"),
        ("bloom", 1, "BloomForCausalLM has no num_key_value_heads"),
    ],
)
def test_what_cannot_be_is_refused(name, kv_heads, message):
    model = make_model(name)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        convert_to_multi_query(model, kv_heads, verbose=False)
    assert_untouched(model, before)


def test_norms_over_all_heads_are_refused():
    """OLMo 2's k_norm spans the heads: its mean would be a guess."""
    config = transformers.Olmo2Config(
        vocab_size=384, hidden_size=64, num_attention_heads=4, num_hidden_layers=1, pad_token_id=0
    )
    model = transformers.Olmo2ForCausalLM(config).eval()
    before, answer = state(model), logits(model)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_norm.weight depends on the number"):
        convert_to_multi_query(model, 1)
    assert_untouched(model, before)
    assert_equal(logits(model), answer)


def test_gpt2_options_that_are_lost_are_refused():
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        convert_to_multi_query(make_model("gpt2", scale_attn_by_inverse_layer_idx=True), 1)


def test_quantized_models_are_refused():
    model = gpu_poor.quantize(make_model("llama"), verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.STORIES260K)
    for each in (model, QuantizedModel(model, tokenizer)):
        with pytest.raises(ValueError, match="convert the float model"):
            convert_to_multi_query(each, 1)
    with pytest.raises(TypeError, match="a model of transformers"):
        convert_to_multi_query(torch.nn.Linear(2, 2), 1)


def test_one_head_is_the_fewest():
    model = convert_to_multi_query(make_model("llama"), 1, verbose=False)
    with pytest.raises(ValueError, match="has one key/value head"):
        convert_to_multi_query(model, 1, verbose=False)
