"""The quantized modules: what they compute, and that they behave as modules do."""

import copy
import io

import pytest
import torch
from conftest import logits, make_model, tokens
from helpers import weight_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpu_poor
from gpu_poor import ops, quantize
from gpu_poor.formats import FORMATS, INT8
from gpu_poor.nn import (
    KINDS,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedModule,
    kind_of,
)
from gpu_poor.nn.base import quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_linear(n=70, k=93, bias=True, activation="a16", dtype=torch.float32, form=INT8):
    """An nn.Linear and the quantized one made from it."""
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    weights = {"weight": quantize_rows(linear.weight.detach(), form)}
    return linear, QuantizedLinear.from_float(linear, weights, activation)


def make_embedding(n=50, k=33, dtype=torch.float32, form=INT8):
    embedding = nn.Embedding(n, k, dtype=dtype)
    weights = {"weight": quantize_rows(embedding.weight.detach(), form)}
    return embedding, QuantizedEmbedding.from_float(embedding, weights, "a16")


# -- what they compute -------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_near_the_float_linear(isa, activation, bias, dtype):
    linear, quantized = make_linear(bias=bias, activation=activation, dtype=dtype)
    x = torch.randn(3, 5, 93, dtype=dtype)
    y = quantized(x)
    assert y.dtype == dtype and y.shape == (3, 5, 70)
    exact = linear.double()(x.double())
    # Per output: the weights' error (Cauchy-Schwarz), half a step per activation, rounding.
    levels = {"a8": 127, "a16": 32384, "a32": 2**23}[activation]
    xd, w = x.double().abs(), linear.weight.abs()
    eps = torch.finfo(dtype).eps
    bound = xd.norm(dim=-1, keepdim=True) * weight_error(linear.weight.detach())
    bound = bound + 0.505 * xd.amax(-1, keepdim=True) / levels * w.sum(-1)
    bound = bound + eps * (xd @ w.T + (exact.abs() + 1))
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_is_the_dequantized_row(isa, dtype):
    embedding, quantized = make_embedding(dtype=dtype)
    index = torch.tensor([[0, 49, 7], [7, 1, 2]])
    y = quantized(index)
    assert y.dtype == dtype and y.shape == (2, 3, 33)
    assert torch.equal(y, quantized.dequantize(dtype)[index])
    error = (y.double() - embedding(index).double()).norm(dim=-1)
    rounding = torch.finfo(dtype).eps * y.double().norm(dim=-1)
    assert (error <= weight_error(embedding.weight.detach())[index] + rounding).all()


def test_embedding_index_out_of_range_is_an_error(isa):
    _, quantized = make_embedding()
    for bad in (-1, 50):
        with pytest.raises((IndexError, RuntimeError), match="(?i)index|range"):
            quantized(torch.tensor([0, bad]))


@pytest.mark.parametrize("shape", [(40, 17), (3, 5, 11)])
def test_strided_rows_quantize_as_contiguous_ones(shape, isa):
    rows = torch.randn(*shape)
    strided = rows.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    for form in FORMATS.values():
        expected = quantize_rows(rows, form)
        scratch = torch.empty(rows.nbytes, dtype=torch.uint8)
        for actual in (quantize_rows(strided, form), quantize_rows(strided, form, scratch)):
            scratch.zero_()  # the next matrix comes
            for a, b in zip(actual[:2], expected[:2], strict=True):
                assert (a is b is None) or (torch.equal(a, b) and a.is_contiguous())
            assert actual[2:] == expected[2:] == (form, shape, None)
    same = quantize_rows(strided.bfloat16(), FORMATS["bf16"], scratch)
    scratch.zero_()
    assert torch.equal(same.weight, rows.bfloat16())


def test_zero_rows_and_extremes():
    linear = nn.Linear(8, 3)
    with torch.no_grad():
        linear.weight[0] = 0
        linear.weight[1] = torch.tensor([1e30, -1e30] * 4)
        linear.weight[2] = 1e-30
    quantized = quantize(nn.Sequential(linear), allow_partial=True, verbose=False)[0]
    assert quantized.weight_scale[0] == 0 and not quantized.weight[0].any()
    assert quantized.weight[1].tolist() == [127, -127] * 4
    assert torch.equal(quantized(torch.zeros(1, 8))[0], linear.bias)


# -- kinds -------------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnEmbedding(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 2


class PlainSubclass(nn.Linear):
    pass


def test_kinds_of_plain_modules():
    assert kind_of(nn.Linear(4, 4)) is KINDS["linear"]
    assert kind_of(PlainSubclass(4, 4)) is KINDS["linear"]
    assert kind_of(nn.Embedding(4, 4)) is KINDS["embedding"]
    attention = nn.MultiheadAttention(8, 2)
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    weird = [
        OwnForward(4, 4),
        OwnEmbedding(4, 4),
        nn.Embedding(4, 4, max_norm=1.0),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        attention.out_proj,
        patched,
        nn.LayerNorm(4),
        nn.Conv2d(3, 4, 2),
        nn.Bilinear(2, 3, 4),
    ]
    assert [kind_of(module) for module in weird] == [None] * len(weird)


def test_every_kind_is_met_by_a_model(model_name):
    """Each architecture keeps in float nothing but vectors and small routers."""
    model = quantize(make_model(model_name), verbose=False)
    kept = [k for k in model.gpu_poor_receipt.kept if k.reason != "vectors, no matrix"]
    assert all("Router" in k.module_class for k in kept), kept
    KINDS_MET.update(m.kind for m in model.modules() if isinstance(m, QuantizedModule))


KINDS_MET: set[str] = set()


def test_an_expert_that_overflows_on_tokens_it_does_not_get_adds_nothing():
    experts = quantize(make_model("mixtral"), verbose=False).model.layers[0].mlp.experts
    experts.gate_up_proj_scale[3] = 1e30
    x, weights = torch.randn(5, 128), torch.full((5, 2), 0.5)
    index = torch.tensor([[0, 1]] * 5)
    assert not experts._expert(3, x).isfinite().all()
    dense = experts._forward_dense(x, index, weights)
    assert torch.allclose(dense, experts(x, index, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_type_is_a_cast_that_leaves_integers_alone(dtype):
    model = quantize(make_model("llama-tied"), verbose=False).type(dtype)
    weights = [m.weight for m in model.modules() if isinstance(m, QuantizedModule)]
    assert {w.dtype for w in weights} == {torch.int8}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == logits(model).dtype == dtype


def test_requires_grad_is_for_the_bias():
    _, quantized = make_linear()
    assert quantized.requires_grad_(False) is quantized and not quantized.bias.requires_grad
    quantized.requires_grad_(True)
    assert quantized.bias.requires_grad and not quantized.weight.requires_grad


def test_no_kind_goes_untested():
    if KINDS_MET:  # the test above ran in this process
        assert KINDS_MET == set(KINDS)


# -- experts -----------------------------------------------------------------------------------


def float_experts(name="mixtral", **changes):
    model = make_model(name, **changes)
    return next(m for m in model.modules() if kind_of(m) is QuantizedExperts)


def quantized_experts(module, activation="a32", form=INT8):
    weights = {
        name: quantize_rows(
            QuantizedExperts.to_rows(module, name, getattr(module, name).detach()), form
        )
        for name in QuantizedExperts.weights_of(module)
    }
    return QuantizedExperts.from_float(module, weights, activation)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_experts_equal_the_float_class_on_dequantized_weights(isa, name, n_tokens):
    module = float_experts(name)
    quantized = quantized_experts(module)
    reference = quantized.to_float()
    reference.act_fn, reference.config = module.act_fn, module.config
    x = torch.randn(n_tokens, 128)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(n_tokens)])
    weight = torch.rand(n_tokens, 2)
    with torch.no_grad():
        expected, actual = reference(x, index, weight), quantized(x, index, weight)
        dense = quantized._forward_dense(x, index, weight)
    # Float32 sums of at most 128 products of numbers near 1, in another order.
    bound = 128 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound
    assert (dense - expected).abs().max() <= bound
    assert actual.abs().max() > 1000 * bound


def test_experts_do_not_depend_on_the_other_tokens():
    quantized = quantized_experts(float_experts(), "a16")
    x, weight = torch.randn(9, 128), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    whole = quantized(x, index, weight)
    for i in range(9):
        one = slice(i, i + 1)
        assert torch.equal(quantized(x[one], index[one], weight[one]), whole[one])


def test_experts_skip_slots_without_an_expert():
    quantized = quantized_experts(float_experts())
    x, weight = torch.randn(3, 128), torch.rand(3, 2)
    index = torch.tensor([[0, 4], [4, 4], [3, 1]])
    y = quantized(x, index, weight)
    alone = torch.tensor([[0, 0]])
    expected = quantized(x[:1], alone, torch.stack([weight[0, :1], torch.zeros(1)], 1))
    assert torch.allclose(y[:1], expected, atol=1e-6)
    assert not y[1].any()
    assert not quantized(x, torch.full((3, 2), 4), weight).any()


def test_transposed_experts_with_bias_and_own_gate():
    """GPT-OSS stores experts transposed, with biases, gate and up interleaved and clamped."""
    transformers = pytest.importorskip("transformers")
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=48, num_local_experts=4, num_hidden_layers=1
    )
    config._experts_implementation = "eager"
    module = gpt_oss.GptOssExperts(config).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    quantized = quantized_experts(module)
    reference = quantized.to_float()
    assert quantized.gate_up_proj.shape == (4, 96, 64)
    assert reference.gate_up_proj.shape == module.gate_up_proj.shape
    x, index, weight = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    try:
        expected = reference(x, index, weight)
    except (IndexError, RuntimeError):  # transformers 5.0 takes weights [T, E]
        expected = reference(x, index, torch.zeros(5, 4).scatter_(1, index, weight))
    assert torch.allclose(quantized(x, index, weight), expected, atol=1e-4)


# -- modules as modules ------------------------------------------------------------------------


def scales_of(model):
    """The scales of the quantized modules; Gemma has a buffer named embed_scale too."""
    return {
        f"{name}.{weight}_scale": getattr(module, f"{weight}_scale")
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for weight in module.weight_names
    }


@pytest.mark.parametrize("move", ["half", "bfloat16", "to", "float"])
def test_moving_the_dtype_leaves_int8_and_scales(move, model_name):
    model = quantize(make_model(model_name), verbose=False)
    before = {n: b.clone() for n, b in scales_of(model).items()}
    model = model.to(torch.bfloat16) if move == "to" else getattr(model, move)()
    dtype = {"half": torch.float16, "float": torch.float32}.get(move, torch.bfloat16)
    assert model.dtype == dtype
    after = scales_of(model)
    assert after.keys() == before.keys()
    for name, scale in after.items():
        assert scale.dtype == torch.float32 and torch.equal(scale, before[name]), name
    assert logits(model).dtype == dtype
    embedding = model.get_input_embeddings()
    assert embedding.weight.dtype == torch.int8 and embedding.dtype == dtype
    assert model.to(torch.float32).get_input_embeddings().dtype == torch.float32
    assert torch.equal(scales_of(model)[name], before[name])


@pytest.mark.parametrize("move", ["half", "cpu", "to_empty", "share_memory", "deepcopy"])
def test_tied_modules_stay_tied(move):
    model = quantize(make_model("llama-tied"), verbose=False)
    if move == "deepcopy":
        model = copy.deepcopy(model)
    else:
        getattr(model, move)(**({"device": "cpu"} if move == "to_empty" else {}))
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight is embedding.weight
    assert head.weight_scale is embedding.weight_scale
    assert head.weight_scale.dtype == torch.float32


def test_float64_is_refused():
    model = quantize(make_model("llama-tied"), verbose=False)
    with pytest.raises(TypeError, match="cannot be made torch.float64"):
        model.double()


def other_tied_model():
    """Tied, quantized, and with other weights than the model of the same name."""
    model = make_model("llama-tied")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return quantize(model, verbose=False)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("way", ["as it is", "meta", "deepcopy", "pickle"])
def test_tied_modules_read_the_scale_that_was_loaded(way, assign):
    model, other = quantize(make_model("llama-tied"), verbose=False), other_tied_model()
    if way == "meta":
        rest = {
            n: b.clone() for n, b in model.named_buffers()
        }  # rotary frequencies are in no state_dict
        model = model.to("meta").to_empty(device="cpu")
        for name, buffer in model.named_buffers():
            buffer.fill_(float("nan")) if "scale" in name else buffer.copy_(rest[name])
    elif way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    assert torch.equal(logits(model), logits(other))


def test_the_owner_of_a_scale_is_no_submodule():
    model = quantize(make_model("llama-tied"), verbose=False)
    assert not list(model.lm_head.children())
    assert "lm_head.weight_scale" not in dict(model.named_buffers(remove_duplicate=False))


def test_moving_to_the_meta_device_keeps_dtypes():
    model = quantize(make_model("llama-tied"), verbose=False).to("meta")
    assert model.lm_head.weight.dtype == torch.int8
    assert model.model.embed_tokens.weight_scale.device.type == "meta"


def test_deepcopy_pickle_and_state_dict(model_name):
    model = quantize(make_model(model_name), verbose=False)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make_model(model_name)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.05)
    quantize(other, verbose=False)
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other), expected)


def test_a_float_state_dict_is_refused():
    """copy_ would truncate floats to int8 without a word."""
    state = make_model("llama").state_dict()
    model = quantize(make_model("llama"), verbose=False)
    with pytest.raises(RuntimeError, match="must be torch.int8"):
        model.load_state_dict(state, strict=False)
    state = model.state_dict()
    state["lm_head.weight_scale"] = state["lm_head.weight_scale"].half()
    with pytest.raises(RuntimeError, match="lm_head.weight_scale must be torch.float32"):
        model.load_state_dict(state)


def test_gradients_through_a_checkpoint():
    """transformers' gradient_checkpointing_enable: saved tensors can be had a single time."""
    layer = nn.Linear(32, 16).requires_grad_(True)
    x = torch.randn(3, 32)
    model = quantize(nn.Sequential(layer), allow_partial=True, verbose=False)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_train_and_eval_and_gradients():
    model = quantize(make_model("llama"), verbose=False)
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    gradient = model.model.norm.weight.grad
    assert gradient is not None and gradient.abs().max() > 0
    assert all(p.grad is None for p in model.parameters() if p.dtype == torch.int8)


def test_activation_can_be_changed_per_module():
    _, quantized = make_linear()
    x = torch.randn(4, 93)
    outputs = {}
    for mode in ops.ACTIVATIONS:
        quantized.activation = mode
        assert quantized.activation == mode
        outputs[mode] = quantized(x)
    assert not torch.equal(outputs["a8"], outputs["a32"])
    with pytest.raises(ValueError, match="activation must be one of a8, a16, a32"):
        quantized.activation = "a4"


def test_is_not_a_float_class():
    """PEFT and transformers would treat an nn.Linear's weight as float."""
    assert not any(issubclass(kind, nn.Linear | nn.Embedding) for kind in KINDS.values())


def test_extra_repr_names_the_format():
    _, quantized = make_linear()
    assert "int8, a16" in repr(quantized)
    assert "int8" in repr(make_embedding()[1])


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_compiles_without_a_graph_break(name):
    model = quantize(make_model(name), activation="a16", verbose=False)
    expected = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens()
    with torch.no_grad():
        actual = compiled(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # The graph may fuse float operations in another order; one int8 step may then flip.
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_models_answer_alike_on_every_isa(isa):
    """The plain torch path and every kernel, through a whole model."""
    model = quantize(make_model("gpt2"), verbose=False)
    with gpu_poor.isa.cap("ref"):
        expected = logits(model)
    actual = logits(model)
    if isa == "torch":
        assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()
    else:
        assert torch.equal(actual, expected)
