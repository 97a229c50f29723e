"""Linears that multiply their inputs by a scale, where nothing before them can be divided."""

import copy
import json

import pytest
import torch
from conftest import logits, make_model, tokens
from helpers import assert_equal, heavy_tailed
from safetensors.torch import load_file, save_file
from torch import nn

import gpu_poor
from gpu_poor import memory, ops, quantize
from gpu_poor.formats import FORMATS
from gpu_poor.nn import QuantizedLinear, QuantizedModule
from gpu_poor.nn.base import quantize_rows
from gpu_poor.planner import plan_memory
from gpu_poor.strategies import Smoothing
from gpu_poor.strategies.awq import Awq
from gpu_poor.strategies.base import STRATEGIES
from gpu_poor.strategies.gptq import Gptq
from gpu_poor.strategies.smoothquant import SmoothQuant

DTYPES = ops.FLOATS
#: ``{architecture: the linears of a block that nothing precedes}``, by the ends of their names.
KEPT = {
    "gpt2": {"attn.c_proj", "mlp.c_proj"},  # behind grouped values and behind a GELU
    "llama": {"self_attn.o_proj"},  # behind grouped heads
    "opt": set(),
    "olmo": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
             "mlp.up_proj"},  # behind norms without weights
    "phi3": {"self_attn.o_proj", "mlp.down_proj"},
}  # fmt: skip


def powers(k):
    return torch.arange(k).remainder(3).sub(1).float().exp2()


def scaled_linear(form, n=24, k=40, activation="a32", powers_of_two=True, dtype=torch.float32):
    """A quantized linear with an input scale, the float rows it stands for, and a bias."""
    rows, bias = heavy_tailed(n, k, dtype=dtype), nn.Parameter(heavy_tailed(n, seed=1, dtype=dtype))
    scale = powers(k) if powers_of_two else torch.rand(k, generator=torch.Generator()).add(0.3)
    scale = scale.half()
    stored = quantize_rows(rows, FORMATS[form], factors=scale.float().reciprocal())
    module = QuantizedLinear(stored._replace(input_scale=scale), bias, activation, dtype)
    return module, rows, bias


def kept(model):
    return {name: module for name, module in model.named_modules()
            if getattr(module, "input_scale", None) is not None}  # fmt: skip


def calibrated(name="gpt2", strategy=("smoothquant", "mse"), bits=8, **options):
    return quantize(make_model(name), bits, strategy=strategy, sample_inputs=tokens(6, 40),
                    verbose=False, **options)  # fmt: skip


# -- one linear --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_linear_multiplies_its_inputs(form, dtype):
    module, rows, _ = scaled_linear(form, dtype=dtype)
    x = heavy_tailed(5, 40, seed=2, dtype=dtype)
    # Rounding apart, it is the linear whose weight dequantize() gives ...
    weight = module.dequantize()
    expected = x.double() @ weight.double().T + module.bias.double()
    bound = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    y = module(x)
    assert y.dtype == dtype
    assert ((y - expected).abs() <= bound * (1 + x.double().abs() @ weight.double().abs().T)).all()
    # ... and that weight is nearly the float one: the columns were divided by what x is times.
    relative = (weight - rows).norm() / rows.norm()
    assert relative < (0.3 if FORMATS[form].bits == 4 else 0.05)  # 1 or more were it the other way


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_the_kernel_sees_the_product(activation, isa):
    module, _, _ = scaled_linear("int4_g32", activation=activation)
    plain = copy.deepcopy(module)
    plain.input_scale = None
    x = heavy_tailed(5, 40, seed=2)
    assert_equal(module(x), plain(x * powers(40)))
    assert not torch.equal(module(x), plain(x))


def test_powers_of_two_are_undone_exactly():
    module, _, _ = scaled_linear("int8")
    plain = copy.deepcopy(module)
    plain.input_scale = None
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal(module.dequantize(dtype) / powers(40).to(dtype), plain.dequantize(dtype))
    assert_equal(module.to_float().weight, module.dequantize())
    # No product is rounded either: the same bits as of the weight without a scale.
    rows = torch.randint(-127, 128, (24, 40)).float()
    rows[:, 0] = 127  # scales of 1
    x = torch.randint(-99, 99, (3, 40)).float()
    stored = quantize_rows(rows, FORMATS["int8"])._replace(input_scale=powers(40).half())
    linear = QuantizedLinear(stored, activation="a32")
    assert_equal(linear(x).double(), (x * powers(40)).double() @ rows.double().T)


def test_gradients_go_through():
    module, _, _ = scaled_linear("int8", powers_of_two=True)
    x = heavy_tailed(5, 40, seed=2).requires_grad_()
    grad = heavy_tailed(5, 24, seed=3)
    module(x).backward(grad)
    expected = grad.double() @ module.dequantize().double()
    assert (x.grad - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_equal(module.bias.grad, grad.sum(0))
    assert not module.weight.requires_grad and not module.input_scale.requires_grad


def test_casts_and_moves_keep_the_scale():
    module, _, _ = scaled_linear("int4_g32")
    scale = module.input_scale.clone()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.float):
        cast(module)
        assert_equal(module.input_scale, scale)
        x = heavy_tailed(2, 40).to(module.bias.dtype)
        assert module(x).dtype == module.dtype == x.dtype
    module.to("meta")
    assert module.input_scale.is_meta and module.input_scale.dtype == torch.float16
    assert module(torch.empty(2, 40, device="meta")).shape == (2, 24)


def test_products_out_of_the_range_of_float16():
    module, rows, _ = scaled_linear("int8", dtype=torch.float16)
    module.input_scale.fill_(1024)
    with torch.no_grad():
        module.weight_scale.div_(1024)
    x = torch.full((1, 40), 1000.0, dtype=torch.float16)
    assert (x * module.input_scale).isinf().all()
    assert module(x).isfinite().all()


@pytest.mark.parametrize("x", [torch.ones(2, 40).double(), torch.ones(2, 40).long()])
def test_inputs_of_other_dtypes_are_refused(x, isa):
    with pytest.raises(RuntimeError, match="x must be float32"):
        scaled_linear("int8")[0](x)


def test_state_dict():
    module, _, _ = scaled_linear("int8")
    state = module.state_dict()
    assert (
        set(state) == {"weight", "weight_scale", "bias", "input_scale"}
        and state["input_scale"].nbytes == 2 * 40
    )
    again = scaled_linear("int8")[0]
    again.input_scale = torch.ones_like(again.input_scale)
    again.load_state_dict(state)
    assert_equal(again.input_scale, module.input_scale)
    lacking = {name: value for name, value in state.items() if name != "input_scale"}
    with pytest.raises(RuntimeError, match="Missing key.*input_scale"):
        again.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match="input_scale must be torch.float16"):
        again.load_state_dict(state | {"input_scale": state["input_scale"].float()})
    again.input_scale = None
    with pytest.raises(RuntimeError, match="Unexpected key.*input_scale"):
        again.load_state_dict(state)
    assert "input_scale" in repr(module) and "input_scale" not in repr(again)


def test_compiled():
    module, _, _ = scaled_linear("int8", activation="a16")
    x = heavy_tailed(3, 40)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_equal(compiled(x), module(x))


# -- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["smoothquant", "awq"])
@pytest.mark.parametrize("name", KEPT)
def test_kept_where_nothing_precedes(name, strategy):
    expected = logits(make_model(name))
    model = calibrated(name, (strategy, "mse"), activation="a32")
    found = {".".join(n.split(".")[3 if name != "opt" else 4 :]) for n in kept(model)}
    n_kept = len(kept(model))
    if strategy == "awq":  # where its search finds a gain
        assert found <= KEPT[name]
    else:
        assert {".".join(n.split(".")[-2:]) for n in kept(model)} == KEPT[name]
        assert n_kept == 2 * len(KEPT[name])
    if n_kept:
        assert f", {n_kept} linears with an input scale" in model.gpu_poor_receipt.remarks[0]
    else:
        assert "input scale" not in str(model.gpu_poor_receipt)
    assert (logits(model) - expected).norm() < 0.03 * expected.norm()


class Wild(Smoothing):
    """Factors of all sizes, whatever the data."""

    name = "wild"
    needs_inputs = True
    keep = True

    def factors(self, gain, rows, inputs, forms):
        k = rows[0].shape[1]
        return torch.rand(k, generator=torch.Generator().manual_seed(k)).mul(3).sub(1.5).exp2()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_the_float_function_is_unchanged(name, dtype, monkeypatch):
    """The weights as they are before rounding, in place of the rounded ones: the float model."""
    monkeypatch.setitem(STRATEGIES, "wild", Wild)
    model = make_model(name).to(dtype)
    expected, before = logits(model).float(), dict(model.named_modules())
    before = {n: m.weight.detach().float() for n, m in before.items() if hasattr(m, "weight")}
    quantize(model, strategy=(Wild(), "absmax"), sample_inputs=tokens(), verbose=False,
             allow_partial=True)  # fmt: skip
    assert kept(model)
    for path, module in kept(model).items():
        weight = before[path].T if module.kind == "conv1d" else before[path]
        # Half a step of a row's scale is what rounding may change, in the columns as divided.
        step = module.weight_scale[:, None] * module.input_scale.float()
        assert ((module.dequantize() - weight).abs() <= 0.51 * step + 1e-6).all()
        assert float(module.input_scale.max() / module.input_scale.min()) > 4
    assert (logits(model) - expected).norm() < 0.1 * expected.norm()
    for module in kept(model).values():
        module.input_scale = None
    assert (logits(model) - expected).norm() > 0.1 * expected.norm()  # it would be seen


def test_not_kept():
    """Not if told, nor by awq with gptq, without data, in 16 bits, or for weights of several."""
    told = (SmoothQuant(keep=False), "mse"), (Awq(keep=False), "mse"), ("awq", "gptq")
    for strategy in told:
        assert not kept(calibrated("gpt2", strategy))
    assert not kept(quantize(make_model("gpt2"), verbose=False))
    model = calibrated("gpt2", overrides={"*.0.mlp.c_proj": 16})
    assert {name.rpartition("h.")[2] for name in kept(model)} == {
        "0.attn.c_proj", "1.attn.c_proj", "1.mlp.c_proj"
    }  # fmt: skip
    model = make_model("llama")
    first, second = model.model.layers
    second.self_attn.o_proj.weight = first.self_attn.o_proj.weight
    quantize(model, strategy="smoothquant", sample_inputs=tokens(6, 40), verbose=False)
    assert not kept(model)


def test_with_gptq_the_rounding_sees_the_divided_inputs():
    """The layer's answers on the calibration data are what it minimises."""
    expected = logits(make_model("gpt2"), tokens(6, 40))
    errors = {}
    for rounding in ("absmax", Gptq()):
        model = calibrated("gpt2", (SmoothQuant(), rounding), bits=4)
        assert len(kept(model)) == 4
        errors[rounding if isinstance(rounding, str) else "gptq"] = float(
            (logits(model, tokens(6, 40)) - expected).norm()
        )
    assert errors["gptq"] < 0.8 * errors["absmax"]


def test_bytes_are_counted():
    model, without = calibrated(), calibrated(strategy=(SmoothQuant(keep=False), "mse"))
    extra = sum(2 * module.in_features for module in kept(model).values())
    assert memory.parameter_bytes(model) == memory.parameter_bytes(without) + extra > 0
    assert memory.by_class(model)["linear"] == memory.by_class(without)["linear"] + extra
    as_float = dict(as_float=torch.float32)
    assert memory.by_class(model, **as_float) == memory.by_class(without, **as_float)
    assert gpu_poor.receipt(model).after["linear"] == memory.by_class(model)["linear"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_plan_leaves_room(name):
    model = make_model(name)
    ids = tokens(6, 40)
    plan = plan_memory(model, 0.3, sample_inputs=ids, formats=["int8", "int4_g64"],
                       strategy="smoothquant")  # fmt: skip
    quantize(model, **plan.options, strategy="smoothquant", sample_inputs=ids, verbose=False)
    found = memory.parameter_bytes(model)
    assert kept(model)
    assert 0.98 * plan.predicted_bytes < found <= plan.predicted_bytes <= plan.target_bytes


def test_dequantize_folds_it_back():
    model = calibrated(activation="a32")
    expected = logits(model)
    gpu_poor.dequantize(model)
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


# -- files -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    calibrated(bits=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change_config=None, change=None):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if change_config is not None:
        change_config(config["quantization_config"])
    path.write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_round_trip(name, dtype, tmp_path):
    import transformers

    model = calibrated(name, bits=4)
    model.save_pretrained(tmp_path / "model")
    listed = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert listed["input_scales"] == list(kept(model))
    options = {} if dtype is None else {"dtype": dtype}
    model.to(dtype)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    assert kept(loaded).keys() == kept(model).keys()
    for path, module in kept(model).items():
        assert_equal(loaded.get_submodule(path).input_scale, module.input_scale)
    for key, value in model.state_dict().items():
        assert_equal(loaded.state_dict()[key], value)
    if dtype is None:  # .to() has cast what rotates llama's heads, too
        assert_equal(logits(loaded), logits(model))
    assert memory.parameter_bytes(loaded) == memory.parameter_bytes(model)
    assert gpu_poor.receipt(loaded).remarks == model.gpu_poor_receipt.remarks
    loaded.save_pretrained(tmp_path / "again")
    assert_equal(logits(gpu_poor.load(tmp_path / "again", **options)), logits(loaded))
    base = transformers.AutoModel.from_pretrained(tmp_path / "model", **options)
    assert len(kept(base)) == len(kept(model))  # under names of its own
    ids = tokens()
    with torch.no_grad():
        assert_equal(base(ids).last_hidden_state, loaded.base_model(ids).last_hidden_state)


def test_a_model_without_any_is_saved_as_before(tmp_path):
    quantize(make_model("gpt2"), verbose=False).save_pretrained(tmp_path)
    assert 'input_scales": [' not in (tmp_path / "config.json").read_text()


SCALE = "transformer.h.0.attn.c_proj.input_scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALE), f"{SCALE} is missing"),
        (lambda t: t[SCALE].zero_(), f"{SCALE} holds a number that is not above 0"),
        (lambda t: t[SCALE][3:4].fill_(float("nan")), f"{SCALE} holds a number that is not above"),
        (lambda t: t[SCALE][3:4].fill_(float("inf")), f"{SCALE} holds a NaN or an infinity"),
        (lambda t: t.update({SCALE: t[SCALE][:-1].clone()}), f"{SCALE} is F16 .*expected F16"),
        (lambda t: t.update({SCALE: t[SCALE].float()}), f"{SCALE} is F32 .*expected F16"),
        (
            lambda t: t.update({SCALE.replace("attn.c_proj", "attn.c_attn"): t[SCALE].clone()}),
            "c_attn.input_scale is F16 in the checkpoint, but the config lists no such",
        ),
    ],
)
def test_damaged_files_are_refused(folder, change, message):
    edit(folder, change=change)
    with pytest.raises(ValueError, match=message):
        gpu_poor.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(input_scales="all"), "must be a list of names"),
        (lambda c: c.update(input_scales=[3]), "must be a list of names"),
        (lambda c: c.update(input_scales=["transformer.wte"]), "of no linear .*transformer.wte"),
        (lambda c: c.update(input_scales=["lm_head"]), "with a weight of its own: .*lm_head"),
        (lambda c: c.update(input_scales=["nothing"]), "of no linear .*nothing"),
        (lambda c: c.pop("input_scales"), "c_proj.input_scale is F16 .*config lists no such"),
        (
            lambda c: c["input_scales"].append("transformer.h.0.mlp.c_fc"),
            "h.0.mlp.c_fc.input_scale is missing",
        ),
    ],
)
def test_configs_that_do_not_fit_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        gpu_poor.load(folder)


def test_export_refuses_or_folds_back(tmp_path):
    overrides = {"*.down_proj": "int8"}
    model = calibrated("qwen3", bits=8, overrides=overrides, activation="a32")
    with pytest.raises(ValueError, match=r"2 modules have no exact form(.|\n)*requantize='int8'"
                       r"(.|\n)*0.self_attn.o_proj: it keeps an input scale"):  # fmt: skip
        gpu_poor.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    again = gpu_poor.load(gpu_poor.export(model, tmp_path / "out", requantize="int8"))
    assert not kept(again)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and path != "lm_head":
            weight, found = module.dequantize(), again.get_submodule(path).dequantize()
            if path in kept(model):
                assert 0 < (found - weight).norm() < 0.01 * weight.norm()
            else:
                assert_equal(found, weight)
