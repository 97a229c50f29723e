"""quantize(): patterns, ties, all or nothing, refusals, the receipt."""

import copy
import json
import sys

import pytest
import torch
from conftest import MODELS, logits, make_model, tokens
from helpers import assert_within, run_python, weight_error
from torch import nn

import gpu_poor
from gpu_poor import memory, quantize
from gpu_poor.formats import FORMATS
from gpu_poor.nn import QuantizedLinear, QuantizedModule, kind_of
from gpu_poor.plan import first_block, make_plan
from gpu_poor.readers import read_by_owner, weight_reads

NAN, INF = float("nan"), float("inf")


def int8_names(model):
    return {n for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def mlp(*extra):
    """A model without transformers: matrices far larger than norms and biases."""
    return nn.Sequential(
        nn.Linear(96, 200), nn.GELU(), nn.LayerNorm(200), nn.Linear(200, 96), *extra
    )


def snapshot(model):
    """Everything that "left as it was" means: modules by identity, tensors by value."""
    modules = {n: id(m) for n, m in model.named_modules(remove_duplicate=False)}
    tensors = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    return modules, tensors


def assert_untouched(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (key, value) in tensors.items():
        assert key == before[1][name][0]
        assert torch.equal(value.nan_to_num(7.0), before[1][name][1].nan_to_num(7.0))
    assert not hasattr(model, "gpu_poor_receipt")
    assert not hasattr(model, "hf_quantizer")


# -- what is quantized -------------------------------------------------------------------------


def test_every_architecture_shrinks_and_answers_alike(model_name):
    model = make_model(model_name)
    expected, before = logits(model), memory.parameter_bytes(model)
    assert quantize(model, verbose=False) is model
    receipt = gpu_poor.receipt(model)
    assert receipt.bytes_before == before
    assert receipt.bytes_after == memory.parameter_bytes(model)
    assert receipt.bytes_after <= 0.30 * before
    # int8 rows err by 1/254 of the row's largest weight; random logits are sums of many such.
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.05


def test_tied_weight_is_stored_once():
    model = quantize(make_model("llama-tied"), verbose=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    assert "lm_head.weight_scale" not in model.state_dict()
    shared = gpu_poor.receipt(model).after["shared lm_head"]
    assert shared == 384 * 128 + 4 * 384


def test_a_module_used_twice_is_quantized_once():
    block = nn.Linear(128, 128)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block)})
    quantize(model, verbose=False)
    assert isinstance(model["a"], QuantizedLinear) and model["a"] is model["b"][0]


def test_without_transformers():
    code = (
        "import sys, torch, gpu_poor\n"
        "from torch import nn\n"
        "sys.modules['transformers'] = None\n"
        "model = gpu_poor.quantize(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)))\n"
        "assert model(torch.randn(2, 128)).shape == (2, 128)\n"
        "try:\n"
        "    gpu_poor.GpuPoorConfig\n"
        "except ImportError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    run_python(code)


def test_import_takes_neither_transformers_nor_more_than_the_dependencies():
    code = (
        "import sys, torch, tqdm, safetensors\n"
        "before = set(sys.modules)\n"
        "import gpu_poor\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'accelerate', 'numpy', 'matplotlib', 'peft'}, new\n"
        "assert set(gpu_poor.__all__) <= set(dir(gpu_poor))\n"
        "for name in gpu_poor.__all__:\n"
        "    getattr(gpu_poor, name)\n"
        "assert callable(gpu_poor.quantize) and callable(gpu_poor.receipt)\n"
    )
    run_python(code)


@pytest.mark.parametrize("first", ["gpu_poor", "transformers.quantizers.auto"])
def test_registers_in_either_order(first):
    code = (
        f"import {first}\nimport gpu_poor, transformers.quantizers.auto as auto\n"
        "assert 'gpu-poor' in auto.AUTO_QUANTIZER_MAPPING\n"
        "assert 'gpu-poor' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    )
    run_python(code)


# -- patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "*.mlp.*"}, lambda n: ".mlp." in n),
        ({"include": "model.layers.0"}, lambda n: "layers.0." in n),
        ({"include": ["lm_head", "*.q_proj"]}, lambda n: n == "lm_head" or "q_proj" in n),
        ({"exclude": "lm_head"}, lambda n: n != "lm_head"),
        ({"exclude": ["*.mlp", "lm_head"]}, lambda n: ".mlp." not in n and n != "lm_head"),
        ({"include": "*.mlp.*", "exclude": "*.up_proj"}, lambda n: ".mlp." in n and "up" not in n),
        ({"critical_layers": "first"}, lambda n: "layers.0." not in n),
        ({"critical_layers": ["model.layers.1.mlp"]}, lambda n: "layers.1.mlp" not in n),
        ({}, lambda n: True),
    ],
)
def test_patterns_choose_modules(options, expected):
    model = make_model("llama")
    every = {n for n, m in model.named_modules() if kind_of(m)}
    quantize(model, allow_partial=True, verbose=False, **options)
    assert int8_names(model) == {n for n in every if expected(n)}
    kept = {n: m for n, m in model.named_modules() if n in every - int8_names(model)}
    assert all(m.weight.dtype == torch.float32 for m in kept.values())


def test_first_is_the_first_block_of_the_decoder():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 200, "d_model": 64, "encoder_layers": 3, "decoder_layers": 1}
    bart = transformers.BartModel(transformers.BartConfig(**small))
    experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(9)])
    nested = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleList([experts]), nn.Linear(8, 8)])})
    for model, first in ((bart, "decoder.layers.0"), (nested, "blocks.0")):
        assert first_block(model) == first
    plan = make_plan(make_model("llama"), critical_layers=["first", "lm_head"])
    assert {n for n, (_, why) in plan.kept.items() if why == "critical layer"} > {"lm_head"}
    assert not any(".layers.0." in target.name for target in plan.targets)


def test_a_pattern_without_its_beginning_is_told_which_one_matches():
    with pytest.raises(ValueError, match=r"'q_proj' matches no module of the model; '\*\.q_proj'"):
        make_plan(make_model("llama"), exclude=["q_proj"])


@pytest.mark.parametrize("option", ["include", "exclude", "critical_layers"])
def test_a_pattern_that_matches_nothing_is_an_error(option):
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{option}: the pattern 'lm_haed' matches no module"):
        quantize(model, **{option: ["lm_haed"]}, verbose=False)
    assert_untouched(model, before)


def test_one_side_of_a_tie_keeps_both():
    model = make_model("llama-tied")
    quantize(model, exclude="lm_head", allow_partial=True, verbose=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    reasons = {kept.reason for kept in gpu_poor.receipt(model).kept}
    assert "tied to lm_head, which stays in float" in reasons


def test_a_weight_that_is_read_in_two_layouts_stays_in_float():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = mlp(nn.Linear(96, 96, bias=False), pytorch_utils.Conv1D(96, 96))
    model[5].weight = model[4].weight
    x = torch.randn(2, 96)
    expected = model(x)
    quantize(model, allow_partial=True, verbose=False)
    assert int8_names(model) == {"0", "3"} and model[4].weight is model[5].weight
    assert "tied in different layouts: 4, 5" in {k.reason for k in gpu_poor.receipt(model).kept}
    assert (model(x) - expected).norm() < 0.05 * expected.norm()


def test_weights_tied_by_storage_are_one():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[1].weight.data = model[0].weight.data
    before = memory.parameter_bytes(model)
    quantize(model, verbose=False)
    assert model[0].weight is model[1].weight
    assert model[0].weight_scale is model[1].weight_scale
    assert memory.parameter_bytes(model) < 0.3 * before
    gpu_poor.dequantize(model)
    assert model[0].weight is model[1].weight


_SMALL = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2}
_DEBERTA = _SMALL | {
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "max_position_embeddings": 64,
}
_BLOOM = {"vocab_size": 200, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pretraining_tp": 2}
_MAMBA2 = _SMALL | {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16}
_RWKV = _SMALL | {"attention_hidden_size": 64, "num_hidden_layers": 4, "rescale_every": 2}
_MOBILEBERT = _SMALL | {
    "embedding_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "intra_bottleneck_size": 32,
}
_LONGCAT = _SMALL | {
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "expert_ffn_hidden_size": 32,
}


@pytest.mark.parametrize(
    ("name", "config", "kept"),
    [
        ("MambaForCausalLM", _SMALL, {"dt_proj", "lm_head"}),
        ("FalconMambaForCausalLM", _SMALL, {"dt_proj", "lm_head"}),
        ("Mamba2ForCausalLM", _MAMBA2, {"lm_head"}),
        ("DebertaModel", _DEBERTA, {"in_proj", "rel_embeddings"}),
        ("DebertaV2Model", _DEBERTA, {"rel_embeddings"}),
        ("DebertaV2ForMaskedLM", _DEBERTA | {"legacy": False}, {"rel_embeddings"}),
        ("BloomForCausalLM", _BLOOM | {"slow_but_exact": True}, {"dense", "dense_4h_to_h"}),
        ("BloomForCausalLM", _BLOOM, set()),
        ("LongcatFlashForCausalLM", _LONGCAT, {"classifier"}),
        ("MobileBertForMaskedLM", _MOBILEBERT, {"decoder"}),
        ("RwkvForCausalLM", _RWKV, {"output"}),
    ],
)
@torch.no_grad()
def test_weights_that_their_owner_reads_stay_in_float(name, config, kept):
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, name).config_class
    model = getattr(transformers, name)(config_class(**config)).eval()
    ids = torch.randint(1, 200, (2, 9))
    expected = model(ids)[0]
    quantize(model, allow_partial=True, verbose=False)
    assert (model(ids)[0] - expected).norm() < 0.05 * expected.norm()
    names = {n.rpartition(".")[2] for n in int8_names(model)}
    assert names and not names & kept


class Reader(nn.Module):
    """Reads weights in every way that the scan knows, next to uses that int8 stands."""

    def __init__(self):
        super().__init__()
        for name in "called asked guarded walrus initialised matmul cast aliased looped".split():
            self.add_module(name, nn.Linear(64, 64))
        self.looped = nn.ModuleList([nn.Linear(64, 64)])
        self.deep = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
        self._init_weights()

    def _init_weights(self):
        self.initialised.weight.data.zero_()

    def forward(self, x):
        x = self.called(x).to(self.asked.weight.device) * self.asked.weight.shape[0]
        if self.guarded.weight.dtype != torch.int8:
            x = x.to(self.guarded.weight.dtype)
        if (dtype := self.walrus.weight.dtype).is_floating_point:
            x = x.to(dtype)
        x = x @ self.matmul.weight.t() + self.cast(x.to(self.cast.weight.dtype))
        layer = self.aliased
        x = nn.functional.linear(x, layer.weight)
        for _, layer in enumerate(self.looped):
            x = x + nn.functional.linear(x, layer.weight)
        return x + x @ self.deep["a"].weight


def test_the_scan_finds_the_weights_that_an_owner_reads():
    model = nn.Sequential(Reader())
    expected = model(torch.ones(1, 64))
    quantize(model, allow_partial=True, verbose=False)
    assert (model(torch.ones(1, 64)) - expected).norm() < 0.05 * expected.norm()
    stay = {"called", "asked", "guarded", "walrus", "initialised", "deep.b"}
    assert int8_names(model) == {f"0.{name}" for name in stay}


def test_a_class_without_source_reads_nothing():
    scope = {"nn": nn}
    code = (
        "class Typed(nn.Sequential):\n    def forward(self, x):\n        return x @ self[0].weight"
    )
    exec(code, scope)
    assert weight_reads(scope["Typed"]) == frozenset()


_WIDE = {"intermediate_size": 96, "num_attention_heads": 4}
_MORE = {
    "T5ForConditionalGeneration": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2},
    "BartForConditionalGeneration": {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
    "MistralForCausalLM": _SMALL | _WIDE | {"num_key_value_heads": 2, "head_dim": 16},
    "StableLmForCausalLM": _SMALL | _WIDE | {"num_key_value_heads": 2, "pad_token_id": 0},
    "Olmo2ForCausalLM": _SMALL | _WIDE | {"num_key_value_heads": 2, "pad_token_id": 0},
    "GraniteForCausalLM": _SMALL | _WIDE | {"num_key_value_heads": 2},
    "Qwen2ForCausalLM": _SMALL | _WIDE | {"num_key_value_heads": 2},
    "PhiForCausalLM": _SMALL | _WIDE | {"pad_token_id": 0},
    "RobertaModel": _SMALL | _WIDE | {"pad_token_id": 0},
    "DistilBertModel": {"vocab_size": 200, "dim": 64, "n_layers": 2, "n_heads": 4},
    "Gemma3ForCausalLM": _SMALL | _WIDE | {"num_key_value_heads": 2, "head_dim": 16},
    "Gemma4ForCausalLM": _SMALL
    | _WIDE
    | {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 200,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("name", [*MODELS, *_MORE])
def test_no_layer_of_the_ordinary_families_counts_as_read(name):
    transformers = pytest.importorskip("transformers")
    if name in MODELS:
        model = make_model(name)
    else:
        if (cls := getattr(transformers, name, None)) is None:
            pytest.skip(f"this transformers has no {name}")
        model = cls(cls.config_class(**_MORE[name]))
    modules = {id(module): n for n, module in model.named_modules()}
    read = {modules[key] for key in read_by_owner(model)}
    assert not {n for n in read if model.get_submodule(n).weight.dim() > 1}


@torch.no_grad()
def test_the_fast_path_of_torch_reads_weights():
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.TransformerEncoder(layer, 2)).eval()
    x = torch.randn(2, 9, 64)
    expected = model(x)
    quantize(model, allow_partial=True, verbose=False)
    assert int8_names(model) == {"0"}
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    reasons = {kept.reason for kept in gpu_poor.receipt(model).kept}
    assert "its owner reads the weight itself" in reasons


# -- refusals ----------------------------------------------------------------------------------


# -- formats -----------------------------------------------------------------------------------


def formats(model):
    """{module name: format} of the quantized modules."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    return {n: m.format.name for n, m in modules.items()}


def test_four_bits_everywhere_but_where_they_cost_most(model_name):
    model = make_model(model_name)
    expected, before = logits(model), memory.parameter_bytes(model)
    quantize(model, 4, verbose=False, activation="a32")
    receipt = gpu_poor.receipt(model)
    assert receipt.bytes_after == memory.parameter_bytes(model) < 0.26 * before
    found = formats(model)
    assert set(found.values()) == {"int8", "int4_g64_asym"}
    assert receipt.formats == {n: list(found.values()).count(n) for n in receipt.formats}
    head = model.get_output_embeddings() if hasattr(model, "lm_head") else None
    assert head is None or head.format.name == "int8"
    assert all(
        m.format.bits == 4 for m in model.modules() if type(m).__name__ == "QuantizedExperts"
    )
    quantized = logits(model)
    # The same weights in float give the same answer: nothing but rounding is in between.
    float_model = gpu_poor.dequantize(model)
    assert_within(quantized, logits(float_model), 2e-3 * float(expected.abs().max()))
    assert (logits(float_model) - expected).norm() < 0.5 * expected.norm()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_in_a_whole_model(name, form):
    model = quantize(make_model(name), overrides={"*": form}, verbose=False, allow_partial=True)
    assert set(formats(model).values()) == {form}
    answer = logits(model)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), answer)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), answer)
    scales = {n: b.dtype for n, b in model.named_buffers() if n.endswith("_scale")}
    model.to(torch.bfloat16)
    assert scales == {n: b.dtype for n, b in model.named_buffers() if n.endswith("_scale")}
    assert logits(model).isfinite().all()


def test_overrides():
    def found(bits, overrides, name="llama"):
        return formats(quantize(make_model(name), bits, overrides=overrides, verbose=False))

    some = found(8, {"*.mlp": 4, "*.1.mlp.down_proj": "int4_g128"})
    assert some["model.layers.0.mlp.up_proj"] == "int4_g64_asym"
    assert some["model.layers.0.mlp.down_proj"] == "int4_g64_asym"
    assert some["model.layers.1.mlp.down_proj"] == "int4_g128"
    assert some["model.layers.1.self_attn.q_proj"] == some["lm_head"] == "int8"
    some = found(4, {"lm_head": 4, "*.mlp.down_proj": 8, "model.embed_tokens": 8})
    assert some["lm_head"] == "int4_g64_asym" and some["model.embed_tokens"] == "int8"
    assert some["model.layers.0.mlp.down_proj"] == "int8"
    # One weight, one format, whichever of its modules is named.
    tied = found(4, {"lm_head": 4}, "llama-tied")
    assert tied["lm_head"] == tied["model.embed_tokens"] == "int4_g64_asym"


@pytest.mark.parametrize("wanted", ["fp32", 32])
def test_an_override_keeps_a_part_in_float(wanted):
    model = make_model("llama-tied")
    weight = model.lm_head.weight
    quantize(model, overrides={"lm_head": wanted}, verbose=False, allow_partial=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert set(formats(model).values()) == {"int8"}
    kept = [k for k in gpu_poor.receipt(model).kept if k.reason == "fp32 in overrides"]
    assert {k.example for k in kept} == {"model.embed_tokens", "lm_head"}
    again = quantize(
        make_model("llama"),
        overrides={"*": wanted, "lm_head": 8, "*.mlp": 4},
        verbose=False,
        allow_partial=True,
    )
    assert set(formats(again).values()) == {"int8", "int4_g64_asym"}
    assert again.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32


def test_sixteen_bits(model_name):
    model = make_model(model_name)
    expected, before = logits(model), memory.parameter_bytes(model)
    quantize(model, 16, verbose=False)
    assert set(formats(model).values()) == {"bf16"}
    assert 0.49 * before < memory.parameter_bytes(model) < 0.55 * before
    assert model.dtype == torch.float32 and logits(model).dtype == torch.float32
    # As the float model with its weights rounded, whose sums are in another order.
    quantized = logits(model)
    float_model = gpu_poor.dequantize(model)
    assert_within(quantized, logits(float_model), 1e-4 * float(expected.abs().max()))
    assert (quantized - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("samples", [None, tokens(6, 40)])
def test_the_receipt_of_16_bits_has_nothing_that_was_not_chosen(samples, tmp_path):
    model = make_model("llama")
    model.model.layers[0].input_layernorm.weight.data[3] = 40  # equalize would fold it
    norm = model.model.layers[0].input_layernorm.weight.clone()
    quantize(model, 16, activation="a8", sample_inputs=samples, verbose=False)
    receipt = gpu_poor.receipt(model)
    assert receipt.remarks == [] and receipt.activation == "float"
    assert str(receipt).startswith("LlamaForCausalLM: bf16 weights, kernel ")
    assert "numbers chosen" not in str(receipt)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    model.save_pretrained(tmp_path)
    assert str(gpu_poor.receipt(gpu_poor.load(tmp_path))).startswith(
        "LlamaForCausalLM: bf16 weights, kernel "
    )
    mixed = quantize(make_model("llama"), 16, overrides={"lm_head": 8}, verbose=False)
    assert "bf16, int8 weights, a16 activations" in str(gpu_poor.receipt(mixed))
    assert "numbers chosen by" in str(gpu_poor.receipt(mixed))


def test_sixteen_bits_of_a_16_bit_model_cost_nothing():
    for name in ("llama-tied", "gpt2", "mixtral"):
        model = make_model(name).to(torch.bfloat16)
        expected = copy.deepcopy(model)
        weight = model.get_input_embeddings().weight.data_ptr()
        before = memory.parameter_bytes(model)
        quantize(model, 16, verbose=False)
        assert memory.parameter_bytes(model) == before
        assert model.get_input_embeddings().weight.data_ptr() == weight
        for key, value in gpu_poor.dequantize(model).state_dict().items():
            assert torch.equal(value, expected.state_dict()[key]), key


def test_sixteen_bits_promise_half():
    model = make_model("llama")
    with pytest.raises(ValueError, match="at least 45% is expected"):
        quantize(model, 16, exclude="*.mlp", verbose=False)
    with pytest.raises(ValueError, match="at least 70% is expected"):
        quantize(model, exclude="*.mlp", verbose=False)
    # What is asked to be 16 bits is not what "stays in float" means.
    quantize(model, 8, overrides={"*.mlp": 16}, verbose=False)


def test_fp16_refuses_what_it_cannot_reach():
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 1e5
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is not finite"):
        quantize(model, overrides={"*.mlp": "fp16"}, verbose=False)
    assert_untouched(model, before)
    quantize(model, overrides={"*.mlp": "bf16"}, verbose=False)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"down_proj": 4}, r"'down_proj' matches no module of the model; '\*.down_proj' does"),
        ({"*.input_layernorm": 4}, "what '.*input_layernorm' matches is not quantized"),
        (
            {"lm_head": 3},
            "'lm_head' asks for 3; known are bits 4, 8 or 16, 32 and the formats int8, int8_asym",
        ),
        ({"lm_head": True}, "asks for True"),
        ({"lm_head": 4.0}, "asks for 4.0"),
        ({"lm_head": "int5"}, "asks for 'int5'"),
        ({7: 4}, "a pattern is a string"),
        ("lm_head", "must map patterns"),
        ({"lm_head": "int4_g32", "model.embed_tokens": 8}, "lm_head.* are one weight"),
    ],
)
def test_bad_overrides_leave_the_model_as_it_was(overrides, message):
    model = make_model("llama-tied")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        quantize(model, overrides=overrides, verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [NAN, INF, 1e38])
def test_four_bits_refuse_what_no_scale_reaches(value):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight is not finite"):
        quantize(model, 4, verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("bits", [2, 32, 0, None, "8", True, 8.0, 8.5])
def test_bits(bits):
    with pytest.raises(ValueError, match="bits must be 4, 8 or 16"):
        quantize(mlp(), bits)


def test_activation():
    with pytest.raises(ValueError, match="activation must be one of a8, a16, a32, got 'int8'"):
        quantize(mlp(), activation="int8")


def test_not_a_module():
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        quantize("gpt2")


def test_a_bare_layer_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match="Sequential"):
        quantize(nn.Linear(128, 128))


def test_quantized_twice():
    model = quantize(make_model("llama"), verbose=False)
    expected = logits(model)
    with pytest.raises(
        ValueError, match="already quantized by gpu_poor .* load the float original"
    ):
        quantize(model)
    assert torch.equal(logits(model), expected)


def test_quantized_by_another_library():
    model = mlp()
    model.is_quantized = True
    with pytest.raises(ValueError, match="already quantized"):
        quantize(model)


def test_meta_device():
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        quantize(mlp().to("meta"))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["0.weight", "3.weight", "3.bias", "2.weight"])
def test_non_finite_parameter_is_named(name, value, dtype, isa):
    model = mlp().to(dtype)
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^{name} is not finite"):
        quantize(model, verbose=False)
    assert_untouched(model, before)


def test_non_finite_expert_is_named():
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = INF
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.down_proj is not finite"):
        quantize(model, verbose=False)
    assert_untouched(model, before)


class Unknown(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("extra", "blame"),
    [
        (Unknown(96, 400), "1 x Unknown (0.16 MB, e.g. 4): gpu_poor knows no quantized form"),
        (nn.Conv1d(96, 200, 3), "Conv1d"),
        (nn.LSTM(96, 64), "LSTM"),
        (nn.Linear(96, 400).double(), "its weight is float64"),
        (nn.Embedding(500, 96, max_norm=1.0), "max_norm"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(96, 400)), "ParametrizationList"),
    ],
)
def test_too_little_is_an_error_that_names_what_stays(extra, blame, capsys):
    model = mlp(extra)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        quantize(model)
    assert blame in str(error.value)
    assert "allow_partial=True" in str(error.value)
    assert_untouched(model, before)
    assert not capsys.readouterr().out
    quantize(model, allow_partial=True)
    assert int8_names(model) == {"0", "3"}
    assert blame in capsys.readouterr().out  # the receipt says so too


def test_excluding_too_much_is_an_error():
    with pytest.raises(ValueError, match="excluded"):
        quantize(make_model("llama"), exclude="*.mlp", verbose=False)


def test_16_bit_models_must_shrink_by_40_percent():
    model = mlp().bfloat16()
    before = memory.parameter_bytes(model)
    assert 0.40 < 1 - memory.parameter_bytes(quantize(model, verbose=False)) / before < 0.5
    with pytest.raises(ValueError, match="at least 40% is expected"):
        quantize(mlp(Unknown(96, 400)).half(), verbose=False)


def test_a_narrow_model_is_told_so():
    with pytest.raises(ValueError, match="so narrow"):
        quantize(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("partial", [True, False])
def test_nothing_to_quantize_is_an_error(partial):
    with pytest.raises(ValueError, match="only 0.0% smaller"):
        quantize(nn.Sequential(nn.LayerNorm(8)), allow_partial=partial)


class Container(nn.Sequential):
    """Refuses its second module."""

    error: BaseException

    def __setattr__(self, name, value):
        if name == "3":
            raise self.error
        super().__setattr__(name, value)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_swap_is_undone(error):
    model = nn.Sequential(nn.Linear(128, 128), Container(*mlp()))
    model[1].error = error()
    before = snapshot(model)
    with pytest.raises(error):
        quantize(model, verbose=False)
    assert_untouched(model, before)


def test_a_failing_attach_is_undone(monkeypatch):
    model = make_model("llama-tied")
    before = snapshot(model)
    monkeypatch.setattr("gpu_poor.hf.attach", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize(model, verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["gpu_poor.hf_attach.describe", "gpu_poor.quantize.make_receipt"])
@pytest.mark.parametrize("name", ["llama-tied", "olmo"])
def test_a_failure_after_the_swap_is_undone(name, step, error, monkeypatch):
    import gpu_poor.hf  # noqa: F401 - monkeypatch looks it up

    model, calls = make_model(name), []
    before, attributes = snapshot(model), {n: dict(vars(m)) for n, m in model.named_modules()}

    def fail(*args):
        calls.append(args)
        if len(calls) > 1 or "receipt" in step:  # the model inside is attached already
            raise error

    module, _, function = step.rpartition(".")
    monkeypatch.setattr(sys.modules[module], function, fail)
    with pytest.raises(error):
        quantize(model, verbose=False)
    assert_untouched(model, before)
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == attributes
    assert getattr(model.config, "quantization_config", None) is None
    monkeypatch.undo()
    quantize(model, verbose=False)


def test_memory_that_is_not_given_back_is_no_failure(monkeypatch):
    monkeypatch.setattr(memory, "trim", lambda: 1 / 0)
    model = quantize(mlp(), verbose=False)
    assert int8_names(model) == {"0", "3"} and gpu_poor.receipt(model).seconds > 0


@pytest.mark.parametrize("patterns", [{"lm_head"}, ("lm_head",), iter(["lm_head"]), "lm_head"])
def test_patterns_come_in_any_collection(patterns):
    model = quantize(make_model("llama"), exclude=patterns, allow_partial=True, verbose=False)
    assert int8_names(model) and "lm_head" not in int8_names(model)
    assert model.config.quantization_config.exclude == ["lm_head"]


@pytest.mark.parametrize("patterns", [[3], [None], {b"lm_head"}])
def test_a_pattern_is_a_string(patterns):
    model = make_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="a pattern is a string"):
        quantize(model, exclude=patterns, verbose=False)
    assert_untouched(model, before)


def test_an_empty_include_is_an_error():
    with pytest.raises(ValueError, match="include: an empty list"):
        quantize(mlp(), include=[], verbose=False)


def test_float8_stays_and_sparse_is_refused():
    model = mlp()
    eight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    model.eight = nn.Parameter(eight, requires_grad=False)
    quantize(model, verbose=False)
    assert model.eight.dtype == torch.float8_e4m3fn
    model = mlp()
    model.sparse = nn.Parameter(torch.eye(4).to_sparse())
    with pytest.raises(ValueError, match="sparse is sparse"):
        quantize(model, verbose=False)


# -- what stays as it was ------------------------------------------------------------------------


def test_hooks_and_training_flag_survive():
    model = mlp().train()
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append("hook"))
    model[3].register_forward_pre_hook(lambda *args, **kw: calls.append("pre"), with_kwargs=True)
    quantize(model, verbose=False)
    model(torch.randn(1, 96))
    assert calls == ["hook", "pre"]
    assert model[0].training


def test_biases_stay_the_same_parameters():
    model = mlp()
    bias = model[0].bias
    quantize(model, verbose=False)
    assert model[0].bias is bias


def test_float_weights_are_freed():
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        model = mlp()
        gone = weakref.ref(model[0])
        quantize(model, verbose=False)
        assert gone() is None  # without the cycle collector: no cycle holds the float model
    finally:
        gc.enable()


def test_deleting_the_model_frees_it():
    import gc
    import weakref

    model = quantize(make_model("gpt2"), verbose=False)
    gone = weakref.ref(model.lm_head.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_dequantize_restores_a_plain_model():
    model = mlp()
    weights = model[0].weight.detach().clone()
    quantize(model, verbose=False)
    gpu_poor.dequantize(model)
    assert type(model[0]) is nn.Linear and not hasattr(model, "gpu_poor_receipt")
    assert ((model[0].weight - weights).norm(dim=1) <= weight_error(weights)).all()
    again = model[0].weight.detach().clone()
    quantize(model, verbose=False)
    # Quantizing what int8 can say exactly gives it back, within float rounding.
    assert torch.allclose(model[0].dequantize(), again, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_dequantize_answers_in_the_dtype_of_the_model(name, dtype):
    model = quantize(make_model(name).to(dtype), verbose=False)
    gpu_poor.dequantize(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype
    model = gpu_poor.dequantize(quantize(make_model(name), verbose=False).to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_dequantize_carries_hooks_and_frozen_weights():
    model, calls = mlp(), []
    model[0].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda *args: calls.append("hook"))
    gpu_poor.dequantize(quantize(model, verbose=False))
    model(torch.randn(1, 96))
    assert calls == ["hook"]
    assert not model[0].weight.requires_grad and model[3].weight.requires_grad


# -- the receipt -------------------------------------------------------------------------------


def test_receipt_is_printed_once_and_is_complete(capsys):
    model = quantize(make_model("mixtral"))
    out = capsys.readouterr().out
    receipt = gpu_poor.receipt(model)
    assert out == f"{receipt}\n"
    for word in ("MixtralForCausalLM", "int8", "a16", receipt.kernel, "experts", "smaller"):
        assert word in out
    assert receipt.kernel == gpu_poor.isa.kernels()["int8_linear"]
    assert receipt.modules["experts"] == 2
    assert any("Router" in kept.module_class for kept in receipt.kept)
    data = json.loads(json.dumps(receipt.to_dict()))
    assert data["bytes_after"] == memory.parameter_bytes(model)
    assert data["reduction"] == 1 - data["bytes_after"] / data["bytes_before"]
    quantize(make_model("llama"), verbose=False)
    assert not capsys.readouterr().out


def test_receipt_kernel_follows_the_isa(isa):
    model = quantize(mlp(), verbose=False)
    assert gpu_poor.receipt(model).kernel == gpu_poor.isa.kernels()["int8_linear"]
    if isa in ("torch", "ref"):
        assert gpu_poor.receipt(model).kernel == isa


def test_receipt_of_a_float_model_is_an_error():
    with pytest.raises(ValueError, match="not quantized"):
        gpu_poor.receipt(mlp())


def test_progress_bar(capsys, monkeypatch):
    # By sys.modules: the package's attribute of this name is the function.
    monkeypatch.setattr("gpu_poor.progress.DELAY_S", 0)
    quantize(mlp(), progress=True, verbose=False)
    assert "quantizing" in capsys.readouterr().err
    quantize(mlp(), progress=False, verbose=False)
    assert not capsys.readouterr().err


def test_models_list_is_the_promise():
    """The architectures that the round trip is promised for."""
    promised = "gpt2 llama llama-tied qwen3 qwen3-moe mixtral opt gpt-neox gemma2 phi3 falcon"
    assert set(promised.split()) | {"bloom", "bert"} <= set(MODELS)


# -- quality in the receipt --------------------------------------------------------------------


def packaged_model():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(gpu_poor.assets.STORIES260K)


def test_quality_is_unmeasured_without_a_text(tmp_path):
    model = quantize(make_model("llama"), verbose=False)
    assert gpu_poor.receipt(model).quality == "unmeasured"
    assert "quality: unmeasured" in str(gpu_poor.receipt(model))


def test_a_measured_receipt_is_saved_and_loaded(tmp_path):
    model, text = packaged_model(), gpu_poor.assets.valid_text()[:20000]
    reference = copy.deepcopy(model)
    quantize(model, 4, evaluate_on=text, verbose=False)
    receipt = gpu_poor.receipt(model)
    assert receipt.quality == gpu_poor.evaluate(model, reference, text).to_dict()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["receipt"]
    assert saved["quality"] == receipt.quality
    assert saved["bytes_after"] == memory.parameter_bytes(model)
    loaded = gpu_poor.receipt(gpu_poor.load(tmp_path))
    assert loaded.to_dict() == receipt.to_dict() | {"seconds": None}


def test_max_kl_refuses_and_restores():
    model, text = packaged_model(), gpu_poor.assets.valid_text()[:8000]
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"mean KL divergence 0\.\d+ is above max_kl=0\.001"):
        quantize(model, 4, evaluate_on=text, max_kl=1e-3, verbose=False)
    assert_untouched(model, before)
    assert [type(m) for m in model.modules()] == classes
    quantize(model, 8, evaluate_on=text, max_kl=1e-2, verbose=False)


def test_max_kl_needs_a_text():
    with pytest.raises(ValueError, match="max_kl needs a text"):
        quantize(mlp(), max_kl=0.1)
