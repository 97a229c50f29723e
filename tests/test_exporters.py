"""What is exported is equal: read back here, and by the peer itself where it is installed."""

import pytest
import torch
from foreign import FOREIGN, answer, load
from helpers import assert_equal
from safetensors.torch import load_file

import gpu_poor
from gpu_poor.nn import QuantizedModule

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("gptq-sym-g32", {"int4_g32": 14}),
        ("ct-w4a16-channel", {"int4_g128": 7}),
        ("ct-w8a16-g32", {"int8_g32": 7}),
        ("bnb-int8", {"int8": 7}),
        ("gguf-q8_0", {"int8_g32": 7}),
        ("ct-w8a8-asym", {"int8_asym": 7}),
    ],
)
def test_exported_models_are_equal(name, forms, tmp_path):
    model = load(name)
    ids = load_file(FOREIGN / f"{name}.expected.safetensors")["ids"]
    before = answer(model, ids)
    folder = gpu_poor.export(model, tmp_path / "out")
    assert_equal(answer(model, ids), before)
    again = load(folder)
    assert gpu_poor.receipt(again).formats == forms
    assert all(r.how in ("exact", "float") for r in gpu_poor.receipt(again).imported)
    assert (answer(again, ids) - before).abs().max() <= 5e-6 * before.abs().max()
    for path, module in again.named_modules():
        if isinstance(module, QuantizedModule):
            assert_equal(module.dequantize(), model.get_submodule(path).dequantize())
    assert not [path for path in tmp_path.iterdir() if path != folder]


@pytest.mark.parametrize("name", ["ct-w4a16-bf16-g32", "ct-w4a16-channel", "ct-w8a16-g32"])
def test_export_packs_as_the_peer_does(name, tmp_path):
    """What compressed-tensors wrote goes through our formats and comes out the same."""
    theirs = load_file(FOREIGN / name / "model.safetensors")
    folder = gpu_poor.export(load(name), tmp_path / "out")
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    checked = 0
    for key, value in theirs.items():
        if key.endswith(("weight_packed", "weight_shape")):
            assert_equal(ours[key], value)
            checked += 1
        elif key.endswith("weight_scale"):
            assert_equal(ours[key].float(), value.float())
    assert checked == 14


@pytest.mark.parametrize(
    "name",
    [
        "gptq-sym-g32",
        "ct-w4a16-channel",
        "ct-w8a16-g32",
        "ct-w8a8-asym",
        "bnb-int8",
        "whole-minima",
    ],
)
def test_the_peer_loads_what_is_exported(name, tmp_path):
    """transformers with compressed-tensors: the same values, bit for bit."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = load("awq-g32" if name == "whole-minima" else name)
    options = {"dtype": torch.float32, "output_loading_info": True}
    if name == "whole-minima":
        whole_minima(model)
    if name in ("whole-minima", "ct-w8a8-asym"):
        # It cannot load packed zero points in another way, those of its own making included.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    folder = gpu_poor.export(model, tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info.values()), info
    ids = torch.tensor([[5, 6, 7, 8, 90]])
    logits = answer(theirs, ids)  # the first forward unpacks the weights
    compared = 0
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule) and path != "lm_head":
            assert_equal(theirs.get_submodule(path).weight.data, module.dequantize())
            compared += 1
    assert compared >= 7
    assert (answer(model, ids) - logits).abs().max() <= 5e-6 * logits.abs().max()


def whole_minima(model) -> None:
    """Scales with few bits, so that zero points times scales are float16."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            scale, minimum = module.weight_scale.unbind(2)
            zero = (-minimum.float() / scale.float()).round().clamp(0, 15)
            zero = torch.where(scale == 0, 0.0, zero)
            scale.copy_(torch.full_like(scale, 2**-6))
            minimum.copy_(-zero * 2**-6)


def test_export_of_minima_that_are_whole_multiples(tmp_path):
    model = load("awq-g32")
    whole_minima(model)
    again = load(gpu_poor.export(model, tmp_path / "out"))
    assert all(r.how in ("exact", "float") for r in gpu_poor.receipt(again).imported)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            assert_equal(again.get_submodule(path).dequantize(), module.dequantize())


def test_what_cannot_be_exported(tmp_path):
    model = load("awq-g32")
    with pytest.raises(ValueError, match=r"q_proj: int4_g32_asym has minima(.|\n)*k_proj"):
        gpu_poor.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    folder = gpu_poor.export(model, tmp_path / "out", requantize="int8")
    assert gpu_poor.receipt(load(folder)).formats == {"int8": 7}
    with pytest.raises(ValueError, match="not an empty folder"):
        gpu_poor.export(model, folder)
    with pytest.raises(ValueError, match="format must be one of compressed-tensors"):
        gpu_poor.export(model, tmp_path / "other", format="gguf")
    with pytest.raises(ValueError, match="c_attn: compressed-tensors has no conv1d"):
        gpu_poor.export(load("gptq-gpt2"), tmp_path / "other")
    with pytest.raises(ValueError, match="no transformers model quantized by gpu_poor"):
        gpu_poor.export(gpu_poor.dequantize(model), tmp_path / "other")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ({}, "int8"),  # the rows of down_proj end in a short group, whatever its size
        ({"*.down_proj": "int8"}, "int4_g32"),
        ({"*.down_proj": "int8", "*.q_proj": "int8_g64_asym"}, "int8"),
    ],
)
def test_the_error_says_what_to_pass(overrides, asked, tmp_path):
    from conftest import logits, make_model

    model = make_model("qwen3")
    model = gpu_poor.quantize(model, bits=4, overrides=overrides, verbose=False, activation="a32")
    with pytest.raises(ValueError, match=r"export\(\.\.\., requantize='(\w+)'\)") as caught:
        gpu_poor.export(model, tmp_path / "out")
    assert f"requantize='{asked}'" in str(caught.value)
    again = gpu_poor.load(gpu_poor.export(model, tmp_path / "out", requantize=asked))
    assert (logits(again) - logits(model)).norm() < 0.5 * logits(model).norm()


def test_export_of_our_own_models_in_several_files(tmp_path, monkeypatch):
    from conftest import logits, make_model

    from gpu_poor import exporters

    monkeypatch.setattr(exporters, "SHARD_BYTES", 60_000)
    model = gpu_poor.quantize(make_model("qwen3"), verbose=False, activation="a32")
    folder = gpu_poor.export(model, tmp_path / "out")
    assert len(list(folder.glob("*.safetensors"))) > 2
    again = gpu_poor.load(folder, activation="a32")
    expected = logits(model)
    # Its table is float now, the lm_head int8 as before.
    assert (logits(again) - expected).abs().max() <= 1e-5 * expected.abs().max()
