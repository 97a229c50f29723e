"""transformers: what is saved and loaded answers with the same bits, and says what is wrong."""

import copy
import json

import pytest
import torch
from conftest import MODELS, logits, make_model, tokens
from helpers import run_python

import gpu_poor
from gpu_poor import GpuPoorConfig, memory, quantize
from gpu_poor.folds import norms
from gpu_poor.plan import formats_of

transformers = pytest.importorskip("transformers")
from gpu_poor import hf_data  # noqa: E402 - needs transformers

FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def load_class(name):
    return getattr(transformers, MODELS[name][0])


def saved(tmp_path, name="llama-tied", **options):
    """A quantized model and the folder it was saved to."""
    model = quantize(make_model(name), verbose=False, **options)
    model.save_pretrained(tmp_path / "int8")
    return model, tmp_path / "int8"


# -- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_round_trip_has_equal_bits(model_name, bits, tmp_path):
    model, folder = saved(tmp_path, model_name, bits=bits)
    expected = logits(model)
    loaded, info = load_class(model_name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or mismatched
    assert torch.equal(logits(loaded), expected)
    assert memory.parameter_bytes(loaded) == memory.parameter_bytes(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert formats_of(loaded) == formats_of(model)
    loaded.save_pretrained(tmp_path / "again")
    again = load_class(model_name).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_quantizing_while_loading_equals_in_memory(model_name, bits, tmp_path):
    model = make_model(model_name)
    model.save_pretrained(tmp_path / "float")
    quantize(model, bits, verbose=False)
    streamed, info = load_class(model_name).from_pretrained(
        tmp_path / "float", quantization_config=GpuPoorConfig(bits), output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits(streamed), logits(model))
    assert streamed.state_dict().keys() == model.state_dict().keys()
    config, expected = streamed.config.quantization_config, model.config.quantization_config
    assert config.to_dict() == expected.to_dict()
    receipts = [gpu_poor.receipt(m).to_dict() for m in (streamed, model)]
    for receipt in receipts:
        del receipt["seconds"]
    assert receipts[0] == receipts[1]
    streamed.save_pretrained(tmp_path / "int8")
    loaded = load_class(model_name).from_pretrained(tmp_path / "int8")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streaming_evens_out_gains_as_in_memory(model_name, dtype, tmp_path):
    """Whatever default dtype transformers sets while it builds the skeleton."""
    model = make_model(model_name)
    with torch.no_grad():
        for _, norm in norms(model):
            norm.weight[3], norm.weight[9] = 40, -20
    model.save_pretrained(tmp_path)
    model = load_class(model_name).from_pretrained(tmp_path, dtype=dtype)
    quantize(model, 4, verbose=False)
    streamed = load_class(model_name).from_pretrained(
        tmp_path, dtype=dtype, quantization_config=GpuPoorConfig(4)
    )
    assert gpu_poor.receipt(streamed).remarks == gpu_poor.receipt(model).remarks
    assert torch.equal(logits(streamed), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "gemma2", "mixtral", "opt"])
def test_round_trip_of_16_bit_models(name, dtype, tmp_path):
    # Not .to(dtype): that rounds the rotary frequencies too, which loading computes in float32.
    make_model(name).save_pretrained(tmp_path / "float32")
    model = load_class(name).from_pretrained(tmp_path / "float32", dtype=dtype)
    model.save_pretrained(tmp_path / "float")
    quantize(model, verbose=False)
    model.save_pretrained(tmp_path / "int8")
    loaded = load_class(name).from_pretrained(tmp_path / "int8")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    streamed = load_class(name).from_pretrained(
        tmp_path / "float", quantization_config=GpuPoorConfig()
    )
    assert torch.equal(logits(streamed), logits(model))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_scales_stay_float32_whatever_dtype_is_asked_for(dtype, tmp_path):
    model, folder = saved(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    scales = {n: b for n, b in loaded.named_buffers() if n.endswith("weight_scale")}
    assert scales and all(scale.dtype == torch.float32 for scale in scales.values())
    assert loaded.dtype == dtype
    assert logits(loaded).dtype == dtype
    expected = model.get_submodule("model.layers.0.mlp.up_proj").weight_scale
    assert torch.equal(scales["model.layers.0.mlp.up_proj.weight_scale"], expected)


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {}])
def test_sharded_folders_and_device_maps(options, tmp_path):
    if options:
        pytest.importorskip("accelerate")
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "float", max_shard_size="300KB")
    quantize(model, verbose=False)
    model.save_pretrained(tmp_path / "int8", max_shard_size="100KB")
    assert len(list((tmp_path / "int8").glob("*.safetensors"))) > 2
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert torch.equal(logits(load(tmp_path / "int8", **options)), logits(model))
    streamed = load(tmp_path / "float", quantization_config=GpuPoorConfig(), **options)
    assert torch.equal(logits(streamed), logits(model))


def test_load_is_plain_from_pretrained(tmp_path):
    model, folder = saved(tmp_path)
    assert torch.equal(logits(gpu_poor.load(folder)), logits(model))
    make_model("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="not quantized by gpu_poor"):
        gpu_poor.load(tmp_path / "float")


_SMALL = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SEQ2SEQ = {"vocab_size": 200, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LlamaForSequenceClassification", _SMALL | {"pad_token_id": 0}),
        ("T5ForConditionalGeneration", {"vocab_size": 200, "d_model": 64, "d_ff": 96}),
        ("BartForConditionalGeneration", _SEQ2SEQ),
        ("LlamaModel", _SMALL),
    ],
)
@pytest.mark.parametrize("bits", [8, 4, 16])  # T5 wants float32 of what is named wo
def test_load_takes_the_class_that_was_saved(name, config, bits, tmp_path):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    quantize(model, bits, verbose=False, allow_partial=True)
    model.save_pretrained(tmp_path / "repository" / "int8")
    loaded = gpu_poor.load(tmp_path / "repository", subfolder="int8")
    assert isinstance(loaded, cls) and type(loaded).__name__ == cls.__name__
    tensors = model.state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in loaded.state_dict().items())


def rename_class(folder, name):
    """Say in its config that a folder was saved from another class."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"architectures": name and [name]}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["Unknown", "nn", "AutoModel", None])
def test_load_of_an_unknown_class_falls_back(name, tmp_path):
    model, folder = saved(tmp_path, "llama")
    rename_class(folder, name)
    loaded, info = gpu_poor.load(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(loaded), logits(model))


def test_load_makes_up_no_weight(tmp_path):
    model, folder = saved(tmp_path, "llama")
    rename_class(folder, "LlamaForSequenceClassification")
    with pytest.raises(ValueError, match="has no module 'lm_head'"):
        gpu_poor.load(folder)
    model.model.save_pretrained(folder)
    rename_class(folder, "LlamaForSequenceClassification")
    with pytest.raises(ValueError, match=r"has no score\.weight"):
        gpu_poor.load(folder)


def test_a_fresh_process_needs_only_import_gpu_poor(tmp_path):
    model, folder = saved(tmp_path)
    torch.save(logits(model), tmp_path / "expected.pt")
    code = (
        "import sys, gpu_poor\n"
        "assert 'transformers' not in sys.modules\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"ids = torch.tensor({tokens().tolist()})\n"
        "with torch.no_grad():\n"
        "    actual = model(ids, attention_mask=torch.ones_like(ids)).logits\n"
        "assert torch.allclose(actual, expected, atol=1e-5), (actual - expected).abs().max()\n"
        "assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale\n"
    )
    run_python(code)


def test_activations_and_options_are_saved(tmp_path):
    model = quantize(
        make_model("llama"), activation="a8", exclude="lm_head", allow_partial=True, verbose=False
    )
    model.get_submodule("model.layers.1.mlp.down_proj").activation = "a32"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear
    assert loaded.get_submodule("model.layers.1.mlp.down_proj").activation == "a32"
    assert loaded.get_submodule("model.layers.0.mlp.down_proj").activation == "a8"
    assert torch.equal(logits(loaded), logits(model))


def test_base_model_loads_from_a_causal_lm_folder(tmp_path):
    model, folder = saved(tmp_path)
    base = transformers.AutoModel.from_pretrained(folder)
    ids = tokens()
    with torch.no_grad():
        assert torch.equal(base(ids)[0], model.model(ids)[0])


def test_base_model_loads_as_a_tied_causal_lm(tmp_path):
    """The saved list knows no lm_head; it is tied to the int8 embedding all the same."""
    model = make_model("llama-tied")
    quantize(model.model, verbose=False).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(quantize(make_model("llama-tied"), verbose=False)))


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_the_model_inside_can_be_saved_alone(name, tmp_path):
    model, folder = saved(tmp_path, name)
    for outer in (model, load_class(name).from_pretrained(folder)):
        inner, ids = outer.base_model, tokens()
        inner.save_pretrained(tmp_path / "inner")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "inner")
        with torch.no_grad():
            assert torch.equal(loaded(ids)[0], inner(ids)[0])
        outer.save_pretrained(tmp_path / "outer")  # its own names again
        again = load_class(name).from_pretrained(tmp_path / "outer")
        assert torch.equal(logits(again), logits(model))
    gpu_poor.dequantize(model).base_model.save_pretrained(tmp_path / "float")
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert "quantization_config" not in config


def test_generate(tmp_path):
    model, folder = saved(tmp_path)
    ids = tokens(1, 5)
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert out.shape == (1, 11)
    loaded = gpu_poor.load(folder)
    assert torch.equal(loaded.generate(ids, max_new_tokens=6, do_sample=False), out)


def test_dequantized_model_is_ordinary_again(model_name, tmp_path):
    model = make_model(model_name)
    keys, classes = model.state_dict().keys(), {type(m) for m in model.modules()}
    quantize(model, activation="a32", verbose=False)
    expected = logits(model)
    gpu_poor.dequantize(model)
    # a32 sums in another order than torch does, and each layer's error goes into the next.
    bound = 1e-4 * expected.abs().max()
    assert (logits(model) - expected).abs().max() <= bound
    assert model.state_dict().keys() == keys
    assert {type(m) for m in model.modules()} <= classes | {torch.nn.Linear}
    model.save_pretrained(tmp_path)
    loaded = load_class(model_name).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_resize_token_embeddings_says_what_to_do():
    model = quantize(make_model("llama-tied"), verbose=False)
    with pytest.raises(ValueError, match="dequantize"):
        model.resize_token_embeddings(400)
    gpu_poor.dequantize(model).resize_token_embeddings(400)
    assert model.get_input_embeddings().weight.shape[0] == 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_float_parameters_has_a_dtype(dtype, tmp_path):
    model = make_model("olmo").to(dtype)
    names = [name for name, _ in model.named_parameters()]
    for m in (quantize(model, verbose=False), copy.deepcopy(model)):
        assert m.dtype == m.model.dtype == dtype
        assert m.to(torch.float16).dtype == m.model.dtype == torch.float16
    model.model.save_pretrained(tmp_path)
    assert transformers.AutoModel.from_pretrained(tmp_path).dtype == torch.float16
    gpu_poor.dequantize(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_config_may_be_shared_with_a_float_model(tmp_path):
    model = make_model("llama")
    sibling = type(model)(model.config)
    quantize(model, verbose=False)
    assert getattr(sibling.config, "quantization_config", None) is None
    held = [m.config for m in model.modules() if hasattr(m, "config")]
    assert len(held) > 4 and all(config is model.config for config in held)
    sibling.save_pretrained(tmp_path)
    assert torch.equal(logits(load_class("llama").from_pretrained(tmp_path)), logits(sibling))


# -- tied weights ------------------------------------------------------------------------------


def test_tied_weight_is_one_buffer_in_memory_and_in_the_file(tmp_path):
    model, folder = saved(tmp_path)
    for m in (model, gpu_poor.load(folder)):
        assert m.lm_head.weight is m.model.embed_tokens.weight
        assert m.lm_head.weight_scale is m.model.embed_tokens.weight_scale
        m.tie_weights()
        assert m.lm_head.weight is m.model.embed_tokens.weight
    from safetensors.torch import load_file

    file = load_file(folder / "model.safetensors")
    assert not any(key.startswith("lm_head") for key in file)


@pytest.mark.parametrize("present", ["both equal", "both different", "lm_head only"])
def test_streaming_a_tied_model_with_unusual_files(present, tmp_path):
    """Files may hold a tied weight twice, or under lm_head's name only."""
    from safetensors.torch import load_file, save_file

    model = make_model("llama-tied")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    state["lm_head.weight"] = state[name].clone()
    if present == "both different":
        state["lm_head.weight"] *= torch.linspace(1, 2, 384)[:, None]
    if present == "lm_head only":
        del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    # What transformers makes of the file without us is the measure.
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tied = reference.lm_head.weight is reference.model.embed_tokens.weight
    assert tied == (present != "both different") or present == "both equal"  # 5.0: not tied
    quantize(reference, verbose=False)
    streamed, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=GpuPoorConfig(), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert "_keys_to_ignore_on_load_missing" not in vars(streamed)
    assert torch.equal(logits(streamed), logits(reference))
    assert tied == (streamed.lm_head.weight is streamed.model.embed_tokens.weight)
    streamed.save_pretrained(tmp_path / "int8")
    assert torch.equal(logits(gpu_poor.load(tmp_path / "int8")), logits(reference))


# -- the config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is unknown"),
        ({"version": "1"}, "version '1' is unknown"),
        ({"bits": 2}, "bits must be 4, 8 or 16"),
        ({"formats": {"lm_head": "int3"}}, "formats has unknown values int3"),
        ({"formats": {"nowhere": "int4_g32"}}, "of no module"),
        ({"overrides": {"lm_head": "int3"}}, "asks for 'int3'"),
        ({"overrides": ["lm_head"]}, "overrides must map"),
        ({"bits": "8"}, "bits must be 4, 8 or 16"),
        ({"receipt": {}}, "receipt is none"),
        ({"receipt": {"before": {}, "kept": [1], "quality": 1, "remarks": []}}, "receipt is none"),
        (
            {
                "receipt": {
                    "before": {"linear": float("inf")},
                    "kept": [],
                    "quality": "unmeasured",
                    "remarks": [],
                }
            },
            "receipt is none",
        ),
        (
            {
                "receipt": {
                    "before": {},
                    "kept": [
                        {
                            "module_class": "a",
                            "count": 1,
                            "n_bytes": "x",
                            "example": "b",
                            "reason": "c",
                        }
                    ],
                    "quality": "unmeasured",
                    "remarks": [],
                }
            },
            "receipt is none",
        ),
        ({"activation": ["a16"]}, "activation must be one of"),
        ({"receipt": {"before": {}, "kept": [], "quality": {}, "remarks": []}}, "receipt is none"),
        ({"strategy": ["nothing"]}, "strategy must be one of"),
        ({"strategy": 4}, "strategy must be a name"),
        ({"activation": "a4"}, "activation must be"),
        ({"group_size": 32}, "unknown keys group_size"),
        ({"modules": {"lm_head": "os.system"}}, "unknown values os.system"),
        ({"modules": ["lm_head"]}, "must map names"),
        ({"modules": {}}, "no modules"),
        ({"modules": None}, "no modules"),
        ({"modules": {"model.layers.7.mlp.up_proj": "linear"}}, "no module"),
        ({"modules": {"lm_head": "embedding"}}, "saved as embedding"),
        ({"modules": {"model.norm": "linear"}}, "saved as linear"),
        ({"ties": {"lm_head": "x"}, "modules": {}}, "of no module"),
        ({"activations": {"lm_head": "a7"}}, "unknown values a7"),
        ({"include": 3}, "include must be"),
    ],
)
def test_config_is_refused(change, message, tmp_path):
    _, folder = saved(tmp_path, "llama")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    if config["quantization_config"]["modules"] == {}:
        config["quantization_config"]["activations"] = {}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_config_object_can_be_used_twice(tmp_path):
    config = GpuPoorConfig(bits=8)
    for name in ("llama", "gpt2"):
        make_model(name).save_pretrained(tmp_path / name)
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, quantization_config=config
        )
    assert config.modules is None


# -- quantizing while loading: errors ------------------------------------------------------------


DATA = {
    "sample_inputs": [tokens(4, 60), tokens(3, 40).flip(1)],
    "evaluate_on": tokens(1, 200).flatten(),
}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["stored", "converted"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
@pytest.mark.filterwarnings("ignore:sample_inputs has")
def test_loading_with_data_is_quantize_of_what_is_loaded(name, dtype, tmp_path, monkeypatch):
    """Calibrated and measured; converted weights and merged experts come from temporary files."""
    monkeypatch.setattr(hf_data, "SMALL", 1000)
    make_model(name).save_pretrained(tmp_path / "float")
    load, options = load_class(name).from_pretrained, {} if dtype is None else {"dtype": dtype}
    expected = quantize(load(tmp_path / "float", **options), 4, **DATA, verbose=False)
    found = load(tmp_path / "float", quantization_config=GpuPoorConfig(4, **DATA), **options)
    assert torch.equal(logits(found), logits(expected))
    assert found.gpu_poor_receipt.quality == expected.gpu_poor_receipt.quality
    assert found.gpu_poor_receipt.remarks == expected.gpu_poor_receipt.remarks
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()
    found.save_pretrained(tmp_path / "int4")  # without the data
    assert not set(DATA) & set(json.loads((tmp_path / "int4/config.json").read_text()))
    again = load(tmp_path / "int4")
    assert torch.equal(logits(again), logits(found))
    assert again.gpu_poor_receipt.quality == found.gpu_poor_receipt.quality


@pytest.mark.parametrize("data", [{"evaluate_on": DATA["evaluate_on"]}, DATA], ids=["text", "both"])
@pytest.mark.filterwarnings("ignore:sample_inputs has")
def test_loading_refuses_a_model_worse_than_max_kl(data, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mean KL divergence .* is above max_kl=1e-09"):
        load_class("llama").from_pretrained(
            tmp_path, quantization_config=GpuPoorConfig(4, **data, max_kl=1e-9)
        )


def test_loading_with_wrong_data_is_refused(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    cases = [
        ({"max_kl": 0.1}, "max_kl needs a text"),
        ({"strategy": "gptq"}, "needs calibration data"),
        ({"strategy": "gptq", "evaluate_on": DATA["evaluate_on"]}, "gptq needs sample_inputs"),
        ({"evaluate_on": ""}, "text is empty"),
        ({"sample_inputs": [[999]]}, "has the token id 999"),
    ]
    for options, message in cases:
        config = GpuPoorConfig(4, **options)
        with pytest.raises(ValueError, match=message):
            load_class("llama").from_pretrained(tmp_path, quantization_config=config)
    state = {n: v for n, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in n}
    model.save_pretrained(tmp_path, state_dict=state)
    config = GpuPoorConfig(4, evaluate_on=DATA["evaluate_on"])
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight was not in the checkpoint"):
        load_class("llama").from_pretrained(tmp_path, quantization_config=config)


def test_streaming_refuses_what_quantize_refuses(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "a")
    for config, message in (
        (GpuPoorConfig(exclude=["*.mlp.*"]), "excluded"),
        (GpuPoorConfig(exclude=["nothing.here"]), "matches no module"),
    ):
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "a", quantization_config=config
            )
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is not finite"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", quantization_config=GpuPoorConfig()
        )


@pytest.mark.parametrize("config", [{}, {"quantization_config": GpuPoorConfig()}])
def test_what_cannot_be_loaded_is_said_at_once(config, tmp_path):
    _, folder = saved(tmp_path, "llama")
    if config:
        folder = tmp_path / "float"
        make_model("llama").save_pretrained(folder)
    places = {"model": "cpu", "lm_head": "disk"}
    for options, message in (
        ({"dtype": torch.float64}, "dtype must be one of float32, bfloat16, float16"),
        ({"device_map": places}, "device_map leaves modules on 'disk'"),
        ({"device_map": "meta"}, "device_map leaves modules on 'meta'"),
    ):
        if "device_map" in options:
            pytest.importorskip("accelerate")
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, offload_folder=tmp_path / "disk", **config, **options
            )


def test_streaming_splits_fused_projections(tmp_path):
    """One tensor in the file, several in the model."""
    if not hasattr(transformers, "HrmTextForCausalLM"):
        pytest.skip("this transformers has no model whose files are so")
    model = transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**_SMALL)).eval()
    model.save_pretrained(tmp_path)
    streamed = transformers.HrmTextForCausalLM.from_pretrained(
        tmp_path, quantization_config=GpuPoorConfig(allow_partial=True)
    )
    quantize(model, verbose=False, allow_partial=True)
    ids = tokens(1, 5) % 200
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_streaming_peak_is_the_int8_model_and_one_tensor(name, tmp_path):
    """Anonymous memory while loading: at most 1.10 x the int8 model and the largest tensor.

    And no page of the float checkpoint stays mapped, which would count as this process's memory.
    The largest tensor is the embedding: the experts of a Mixtral layer, once merged, are larger.
    """
    hook = hasattr(transformers.quantizers.HfQuantizer, "update_weight_conversions")
    if name == "mixtral" and not hook:
        pytest.skip("this transformers merges experts before a quantizer sees them")
    changes = {
        "llama": {"hidden_size": 768, "intermediate_size": 2816},
        "mixtral": {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16},
    }[name]
    model = make_model(name, num_hidden_layers=4, vocab_size=10000, **changes)
    model.save_pretrained(tmp_path)
    code = (
        "import threading, time, torch, gpu_poor\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_config  # imports what loading imports\n"
        "from transformers import LlamaForCausalLM\n"
        "import transformers.core_model_loading, gpu_poor.hf\n"
        "base, peak, stop = gpu_poor.memory.rss()['anon'], 0, False\n"
        "def watch():\n"
        "    global peak\n"
        "    while not stop:\n"
        "        peak = max(peak, gpu_poor.memory.rss()['anon']); time.sleep(0.001)\n"
        "thread = threading.Thread(target=watch, daemon=True); thread.start()\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r},\n"
        "    quantization_config=gpu_poor.GpuPoorConfig(bits=8))\n"
        "stop = True; thread.join()\n"
        f"left = [line for line in open('/proc/self/maps') if {str(tmp_path)!r} in line]\n"
        "assert not left, left\n"
        "print(peak - base, gpu_poor.memory.rss()['anon'] - base,\n"
        "      gpu_poor.memory.parameter_bytes(model))\n"
    )
    peak, after, size = map(int, run_python(code).split()[-3:])
    largest = 10000 * changes["hidden_size"] * 4
    # 10 MB for what transformers, torch's threads and the watcher allocate once.
    assert peak <= 1.10 * size + largest + 10e6
    assert after <= 1.05 * size + 10e6
