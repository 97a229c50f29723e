"""Damaged folders: every one is refused with an error that names the tensor or the file."""

import json
import struct

import pytest
import torch
from conftest import logits, make_model
from safetensors.torch import load_file, save_file

import gpu_poor
from gpu_poor import GpuPoorConfig, quantize

transformers = pytest.importorskip("transformers")

WEIGHT = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """A sound quantized model; its file is model.safetensors."""
    quantize(make_model("llama-tied"), verbose=False).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    """Apply ``change`` to the state dict of a folder."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def loaders():
    """Both ways to load, and one that asks transformers to overlook mismatches."""
    auto = transformers.AutoModelForCausalLM
    return {
        "load": gpu_poor.load,
        "from_pretrained": auto.from_pretrained,
        "ignoring": lambda path: auto.from_pretrained(path, ignore_mismatched_sizes=True),
    }


@pytest.fixture(params=["load", "from_pretrained", "ignoring"])
def load(request):
    return loaders()[request.param]


def test_the_sound_folder_loads(folder, load):
    assert logits(load(folder)).isfinite().all()


@pytest.mark.parametrize("key", [WEIGHT, f"{WEIGHT}_scale", EMBEDDING, f"{EMBEDDING}_scale"])
def test_missing_tensor(folder, load, key):
    edit(folder, lambda state: state.pop(key))
    with pytest.raises(ValueError, match=f"{key} is missing from the checkpoint"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (WEIGHT, torch.zeros(208, 128), "F32"),
        (WEIGHT, torch.zeros(208, 128, dtype=torch.uint8), "U8"),
        (WEIGHT, torch.zeros(207, 128, dtype=torch.int8), r"\(207, 128\)"),
        (WEIGHT, torch.zeros(128, 208, dtype=torch.int8), r"\(128, 208\)"),
        (WEIGHT, torch.zeros(208 * 128, dtype=torch.int8), r"\(26624,\)"),
        (f"{WEIGHT}_scale", torch.ones(208, dtype=torch.float16), "F16"),
        (f"{WEIGHT}_scale", torch.ones(1), r"\(1,\)"),
        (f"{WEIGHT}_scale", torch.ones(208, 1), r"\(208, 1\)"),
        (f"{WEIGHT}_scale", torch.full((208,), float("nan")), "NaN"),
        (f"{WEIGHT}_scale", torch.full((208,), float("inf")), "infinity"),
        (f"{WEIGHT}_scale", -torch.ones(208), "negative"),
        ("model.norm.weight", torch.full((128,), float("nan")), "not finite"),
    ],
)
def test_wrong_tensor(folder, load, key, value, message):
    edit(folder, lambda state: state.update({key: value}))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert key in str(error.value)


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.3, 0.9, 0.9999])
def test_truncated_file(folder, load, fraction):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        load(folder)


def header_of(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, body):
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def _huge_length(data):
    return struct.pack("<Q", 2**62) + data[8:]


def _no_json(data):
    return data[:8] + b"{" * 100 + data[108:]


def _overlap(data):
    header, body = header_of(data)
    header[f"{WEIGHT}_scale"]["data_offsets"] = header[EMBEDDING + "_scale"]["data_offsets"]
    return with_header(header, body)


def _past_the_end(data):
    header, body = header_of(data)
    header[WEIGHT]["data_offsets"] = [len(body) - 5, len(body) + 208 * 128 - 5]
    return with_header(header, body)


def _shape_beyond_the_data(data):
    header, body = header_of(data)
    header[WEIGHT]["shape"] = [2**40, 2**40]
    return with_header(header, body)


@pytest.mark.parametrize(
    "damage", [_huge_length, _no_json, _overlap, _past_the_end, _shape_beyond_the_data]
)
def test_corrupted_header(folder, load, damage):
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="truncated or corrupted"):
        load(folder)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_header_bytes_never_load_other_numbers(folder, seed):
    """Any damage to the header is an error, or changes nothing."""
    file = folder / "model.safetensors"
    expected = logits(gpu_poor.load(folder))
    data = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    (size,) = struct.unpack("<Q", data[:8])
    at = int(torch.randint(0, 8 + size, (), generator=generator))
    data[at] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
    file.write_bytes(bytes(data))
    try:
        actual = logits(gpu_poor.load(folder))
    except (ValueError, RuntimeError, OSError):
        return
    assert torch.equal(actual, expected)


def test_pickle_is_refused(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_nothing_in_a_config_is_imported(folder):
    """A kind is looked up in a table; a name that python could import is just unknown."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["modules"]["lm_head"] = "antigravity"
    file.write_text(json.dumps(config))
    import sys

    with pytest.raises(ValueError, match="unknown values antigravity"):
        gpu_poor.load(folder)
    assert "antigravity" not in sys.modules


def test_a_folder_saved_tied_loads_only_tied(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["tie_word_embeddings"] = False
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        gpu_poor.load(folder)


def edit_config(folder, change):
    """Apply ``change`` to the config.json of a folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("architectures", [None, ["X"]])
@pytest.mark.parametrize("name", [WEIGHT.removesuffix(".weight"), "model.embed_tokens"])
def test_int8_tensors_of_a_module_that_is_not_listed(folder, load, name, architectures):
    def change(config):
        kind = config["quantization_config"]["modules"].pop(name)
        config["quantization_config"]["modules"] |= {"unknown": kind} if architectures else {}
        config["architectures"] = architectures or config["architectures"]

    edit_config(folder, change)
    with pytest.raises(ValueError, match=f"{name}.weight"):
        load(folder)


def test_a_tied_head_that_is_not_listed_is_tied_all_the_same(folder, load):
    expected = logits(load(folder))

    def change(config):
        del config["quantization_config"]["modules"]["lm_head"]
        config["quantization_config"]["ties"] = {}

    edit_config(folder, change)
    loaded = load(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_a_norm_that_is_no_float(folder, load, dtype):
    edit(folder, lambda s: s.update({"model.norm.weight": torch.ones(128, dtype=dtype)}))
    with pytest.raises(ValueError, match=r"model.norm.weight is"):
        load(folder)


# -- quantizing a damaged float folder while loading ---------------------------------------------


@pytest.mark.parametrize("shape", [(207, 128), (128, 208), (208 * 128,)])
def test_streaming_a_wrong_shape(tmp_path, shape):
    make_model("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda state: state.update({WEIGHT: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=f"{WEIGHT} has shape"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=GpuPoorConfig()
        )


def test_streaming_a_missing_weight(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    edit(tmp_path, lambda state: state.pop(WEIGHT))
    with pytest.raises(ValueError, match=f"{WEIGHT} was not in the checkpoint"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=GpuPoorConfig()
        )


@pytest.mark.parametrize("fraction", [0.0001, 0.9])
def test_streaming_a_truncated_file(tmp_path, fraction):
    make_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=GpuPoorConfig()
        )
