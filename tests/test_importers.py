"""Checkpoints that other libraries wrote: what they mean is what we answer, or an error says why.

The fixtures are of tests/fixtures/make_foreign.py: packed by the peers' own packages, and beside
each what the peer makes of it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import FOREIGN, NAMES, answer, foreign, load
from helpers import assert_equal
from safetensors.torch import load_file, save_file

import gpu_poor
from gpu_poor.formats import FORMATS
from gpu_poor.nn import QuantizedModule

pytest.importorskip("transformers")

from gpu_poor.importers import IMPORTERS, grids  # noqa: E402
from gpu_poor.importers.gguf import ARCHITECTURES  # noqa: E402
from gpu_poor.importers.gguf_blocks import TYPES  # noqa: E402
from gpu_poor.importers.gguf_file import GgufFile  # noqa: E402

ROOT = Path(__file__).parents[1]

#: How the matrices of a checkpoint get in, and the largest relative error of one.
ROUNDED = {"rounded": 7e-4}
EXPECTED = {
    "awq-g32": ROUNDED,
    "bnb-fp4": {"re-quantized": 0.09},
    "bnb-nf4": {"re-quantized": 0.08},
    "ct-w4a16-asym-g32": ROUNDED,
    "gguf-q4_k-q5_0": {"exact": 0.0} | ROUNDED,
    "gguf-q5_k-q5_1": {"exact": 0.0} | ROUNDED,
    "gguf-q6_k-q4_0": {"exact": 0.0, "re-quantized": 0.007},
    "gptq-act-order": {"re-quantized": 0.007},
    "gptq-asym-g64": ROUNDED,
    "gptq-gpt2": ROUNDED,
    "gptq-v2-asym-g32": ROUNDED,
}


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_peers_checkpoint_means_the_same_here(name):
    expected = load_file(FOREIGN / f"{name}.expected.safetensors")
    model = load(name)
    records = gpu_poor.receipt(model).imported
    ways = EXPECTED.get(name, {"exact": 0.0})
    assert {r.how for r in records} - {"float"} == set(ways)
    for record in records:
        assert record.relative_error <= ways.get(record.how, 0.0), record
    # Every module is recorded, under its name and format, and what stayed float is said to.
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    named = {r.name.removesuffix(".weight"): r.form for r in records if r.how != "float"}
    assert {n: m.format.name for n, m in modules.items() if n != "lm_head"} == named
    # The errors are those of the weights themselves.
    recorded = {r.name: r for r in records}
    for key in set(expected) - {"ids", "logits"}:
        module = model.get_submodule(key.removesuffix(".weight"))
        rows = module.to_rows(module, "weight", expected[key])
        error = (module.dequantize() - rows).abs().max()
        if recorded[key].how == "exact":
            # bitsandbytes multiplies by the scale and by 1 / 127, we by their product.
            assert error <= 2**-22 * rows.abs().max()
        assert torch.isclose(error, torch.tensor(recorded[key].max_error), atol=1e-7)
    got = answer(model, expected["ids"])
    if set(ways) == {"exact"}:
        assert (got - expected["logits"]).abs().max() <= 2e-6 * expected["logits"].abs().max()
    # The kernels against plain float matrices of the same values.
    dense = answer(gpu_poor.dequantize(model), expected["ids"])
    assert (got - dense).abs().max() <= 5e-6 * dense.abs().max()


@pytest.mark.parametrize("name", ["gptq-asym-g64", "bnb-nf4", "gguf-q6_k-q4_0", "awq-g32"])
def test_inexact_weights_still_answer_as_the_peer_does(name):
    """The logits move by no more than the weights did: 8 or so matrices, one after the other."""
    expected = load_file(FOREIGN / f"{name}.expected.safetensors")
    model = load(name)
    worst = max(r.relative_error for r in gpu_poor.receipt(model).imported)
    difference = (answer(model, expected["ids"]) - expected["logits"]).square().mean().sqrt()
    assert 0 < difference <= 8 * worst * expected["logits"].square().mean().sqrt()


@pytest.mark.parametrize("name", ["gptq-sym-g32", "gguf-q4_0", "bnb-int8", "gguf-gpt2-q4_0"])
def test_an_imported_model_is_an_ordinary_one(name, tmp_path):
    model = load(name, activation="a16")
    ids = load_file(FOREIGN / f"{name}.expected.safetensors")["ids"]
    text = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert text.shape == (1, ids.shape[1] + 5)
    model.save_pretrained(tmp_path / "saved")
    again = gpu_poor.load(tmp_path / "saved")
    assert_equal(answer(again, ids), answer(model, ids))
    lines = str(gpu_poor.receipt(model)).splitlines()
    assert any("imported: " in line and line.endswith(", exact") for line in lines)
    assert json.loads(json.dumps(gpu_poor.receipt(model).to_dict()))["imported"][0]["how"]


def test_dtype_and_rest():
    model = load("gptq-sym-g32", dtype=torch.bfloat16, rest="int8")
    assert model.dtype == torch.bfloat16
    table = model.get_input_embeddings()
    assert table.format.name == "int8" and table.weight is model.lm_head.weight
    record = next(r for r in gpu_poor.receipt(model).imported if r.source == "float16")
    assert record.how == "re-quantized" and record.name == "model.embed_tokens.weight"
    assert load("gptq-sym-g32", dtype=None).dtype == torch.float16  # as in the config


def test_rest_of_a_conv1d(tmp_path):
    """Its float weight is the other way round, and not square."""
    module = "transformer.h.0.attn.c_attn"
    packed = [f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")]
    weight = {f"{module}.weight": torch.randn(64, 192).half() / 8}
    folder = changed("gptq-gpt2", tmp_path, tensors=weight, drop=packed)
    ids = torch.tensor([[5, 6, 7, 8, 90]])
    expected = answer(load(folder), ids)
    model = load(folder, rest="int8")
    assert model.get_submodule(module).shapes["weight"] == (192, 64)
    assert gpu_poor.receipt(model).formats == {"int4_g32_asym": 3, "int8": 4}
    assert (answer(model, ids) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_groups_that_we_lack_are_requantized(tmp_path):
    """The same weights as groups of 16."""
    found = load_file(FOREIGN / "gptq-sym-g32" / "model.safetensors")
    halved = {}
    for name, value in found.items():
        if name.endswith((".scales", ".qzeros")):
            halved[name] = value.repeat_interleave(2, 0)
        elif name.endswith(".g_idx"):
            halved[name] = torch.arange(len(value), dtype=torch.int32) // 16
    folder = changed("gptq-sym-g32", tmp_path, {"group_size": 16}, tensors=halved)
    model, reference = load(folder), load("gptq-sym-g32")
    records = [r for r in gpu_poor.receipt(model).imported if r.how != "float"]
    assert {(r.form, r.how) for r in records} == {("int4_g64_asym", "re-quantized")}
    for record in records:
        path = record.name.removesuffix(".weight")
        theirs = reference.get_submodule(path).dequantize()
        error = (model.get_submodule(path).dequantize() - theirs).norm() / theirs.norm()
        assert 0 < error < 0.1 and abs(error - record.relative_error) < 1e-5


def test_requantize_chooses_the_format():
    forms = gpu_poor.receipt(load("bnb-nf4", requantize="int8")).formats
    assert forms == {"int8": 7}
    with pytest.raises(ValueError, match="format must be one of"):
        load("bnb-nf4", requantize="int3")


@pytest.mark.parametrize("number", TYPES, ids=lambda n: TYPES[n].name)
def test_every_block_type_is_what_the_gguf_package_says(number):
    """Any bytes are a block; only the float16 in them have to be finite."""
    quants = pytest.importorskip("gguf").quants
    constants = pytest.importorskip("gguf").constants
    kind = TYPES[number]
    n, k = 6, 512
    blocks = torch.randint(0, 256, (n * k // kind.elements, kind.n_bytes), dtype=torch.uint8)
    if kind.elements > 1:  # the high byte of every float16: below 2
        at = {"Q4_1": (1, 3), "Q5_1": (1, 3), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,)}
        blocks[:, list(at.get(kind.name, (1,)))] &= 0b10111111
    else:
        blocks[:, -1] &= 0b10111110
    theirs = quants.dequantize(blocks.view(n, -1).numpy(), constants.GGMLQuantizationType(number))
    ours = kind.read(blocks, n, k)
    ours = ours.float() if isinstance(ours, torch.Tensor) else ours.values()
    theirs = torch.from_numpy(theirs.copy())
    assert theirs.shape == ours.shape and theirs.abs().max() > 0
    # K types: they multiply two scales and add in an order of their own.
    bound = 2**-21 * theirs.abs().max() if kind.name.endswith("_K") else 0.0
    assert (ours - theirs).abs().max() <= bound


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("n", [2, 16, 17, 50])
def test_weights_are_stored_the_same_in_pieces(form, n, monkeypatch):
    rows = torch.randn(n, 70)
    whole, record = grids.store("w", "float32", rows, form)
    monkeypatch.setattr(grids, "CHUNK", 1)  # one panel at a time
    pieces, again = grids.store("w", "float32", rows, form)
    for a, b in zip(whole[:2], pieces[:2], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert_equal(*(form.dequantize(*s[:2], s.shape, torch.float32) for s in (whole, pieces)))
    assert again.max_error == record.max_error
    error = form.dequantize(*whole[:2], whole.shape, torch.float32) - rows
    assert record.max_error == error.abs().max()
    assert abs(record.relative_error - float(error.norm() / rows.norm())) < 1e-6


def test_every_importer_has_fixtures_and_is_documented():
    text = (ROOT / "docs" / "importers.md").read_text()
    methods = {path.suffix for path in FOREIGN.iterdir() if path.suffix == ".gguf"}
    for config in FOREIGN.glob("*/config.json"):
        methods.add(json.loads(config.read_text())["quantization_config"]["quant_method"])
    assert methods == set(IMPORTERS)
    assert not {name for name in IMPORTERS if f"`{name}`" not in text}
    assert not {kind.name for kind in TYPES.values() if kind.name not in text}


SCRIPT = """
import sys, torch, gpu_poor
from gpu_poor import memory
torch.set_num_threads(1)
import gpu_poor.importers, transformers.models.llama.modeling_llama
gpu_poor.load(sys.argv[1])
before = memory.rss()["anon"] + memory.rss()["file"]
model = gpu_poor.load(sys.argv[2])
print(memory.parameter_bytes(model), memory.rss()["peak"] - before)
"""


def test_peak_memory_is_the_quantized_model_and_one_tensor(tmp_path):
    """70 MB in 4 bits, 470 MB in float32; any bits are a GPTQ weight."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    config = json.loads((FOREIGN / "gptq-sym-g32" / "config.json").read_text())
    k, groups, layers = 2048, 64, 4
    config |= {"hidden_size": k, "intermediate_size": k, "num_hidden_layers": layers}
    config |= {"num_key_value_heads": 4, "head_dim": 512}
    tensors = {"model.norm.weight": torch.ones(k).half()}
    tensors["model.embed_tokens.weight"] = torch.randn(config["vocab_size"], k).half()
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input", "post_attention"):
            tensors[f"{prefix}.{norm}_layernorm.weight"] = torch.ones(k).half()
        for path in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"):
            tensors |= packed(f"{prefix}.{path}_proj", k, groups)
        for path in ("gate", "up", "down"):
            tensors |= packed(f"{prefix}.mlp.{path}_proj", k, groups)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", SCRIPT, str(FOREIGN / "gptq-sym-g32"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    model, peak = map(int, done.stdout.split())
    assert model > 40e6
    assert peak <= model + 3 * 4 * k * k, (model, peak)  # some copies of the integers of one tensor


def packed(module: str, k: int, groups: int) -> dict[str, torch.Tensor]:
    words = torch.randint(-(2**31), 2**31 - 1, (k // 8, k), dtype=torch.int32)
    return {
        f"{module}.qweight": words,
        f"{module}.qzeros": torch.full((groups, k // 8), 0x77777777, dtype=torch.int32),
        f"{module}.scales": torch.full((groups, k), 0.01).half(),
        f"{module}.g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }


# -- what is refused ---------------------------------------------------------------------------


def changed(name: str, tmp_path, settings=None, config=None, tensors=None, drop=()) -> Path:
    """A copy of a folder with other settings, config or tensors."""
    folder = tmp_path / name
    shutil.copytree(FOREIGN / name, folder, dirs_exist_ok=True)
    found = json.loads((folder / "config.json").read_text()) | (config or {})
    found["quantization_config"] |= settings or {}
    (folder / "config.json").write_text(json.dumps(found))
    if tensors or drop:
        kept = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in kept.items() if k not in drop} | (tensors or {})
        save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gptq-sym-g32", {"bits": 3}, "bits 3 is not supported"),
        ("gptq-sym-g32", {"bits": True}, "bits True"),
        ("gptq-sym-g32", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq-sym-g32", {"dynamic": {"x": {"bits": 8}}}, "dynamic"),
        ("gptq-sym-g32", {"group_size": 0}, "group_size"),
        ("gptq-sym-g32", {"group_size": "32"}, "group_size"),
        ("gptq-sym-g32", {"group_size": 64}, "qzeros is int32 .*expected int32"),
        ("gptq-sym-g32", {"bits": 8}, "qweight is int32"),
        ("awq-g32", {"version": "gemv"}, "version 'gemv'"),
        ("awq-g32", {"bits": 8}, "bits 8"),
        ("ct-w4a16-channel", {"format": "marlin-24", "config_groups": None}, "config_groups"),
        ("ct-w4a16-channel", {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        ("ct-w4a16-channel", {"transform_config": {"r1": {}}}, "transform_config"),
        ("ct-w4a16-channel", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("bnb-nf4", {"load_in_4bit": False}, "load_in_4bit and load_in_8bit"),
        ("bnb-nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
    ],
)
def test_unsupported_settings(name, settings, message, tmp_path):
    folder = changed(name, tmp_path, settings)
    with pytest.raises(ValueError, match=message) as error:
        gpu_poor.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("type", "float", "4 bits, float"),
        ("num_bits", 3, "3 bits"),
        ("strategy", "block", "strategy 'block'"),
    ],
)
def test_unsupported_schemes(key, value, message, tmp_path):
    folder = changed("ct-w4a16-channel", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        gpu_poor.load(folder)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensors", "drop", "message"),
    [
        ("gptq-sym-g32", {}, [f"{Q}.scales"], f"{Q}.scales is missing"),
        ("gptq-sym-g32", {}, [f"{Q}.qweight"], f"{Q}.weight is missing"),
        ("gptq-sym-g32", {}, ["model.norm.weight"], "model.norm.weight is missing"),
        ("gptq-sym-g32", {"model.extra": torch.ones(1)}, [], "no place for model.extra"),
        ("gptq-sym-g32", {f"{Q}.bias": torch.ones(64)}, [], f"no place for {Q}.bias"),
        ("gptq-sym-g32", {f"{Q}.scales": torch.ones(2, 64).int()}, [], f"{Q}.scales is int32"),
        ("gptq-sym-g32", {f"{Q}.scales": torch.ones(2, 63)}, [], f"{Q}.scales is float32"),
        ("gptq-sym-g32", {f"{Q}.scales": torch.full((2, 64), torch.nan)}, [], f"{Q}.*not finite"),
        ("gptq-sym-g32", {f"{Q}.scales": torch.full((2, 64), 1e9)}, [], f"{Q}.*not finite"),
        ("gptq-sym-g32", {f"{Q}.g_idx": torch.full((64,), 2).int()}, [], "outside of"),
        ("gptq-sym-g32", {"model.norm.weight": torch.ones(64).int()}, [], "norm.weight is int32"),
        ("gptq-sym-g32", {"lm_head.weight": torch.ones(96, 64)}, [], "one weight by the config"),
        ("awq-g32", {f"{Q}.qweight": torch.zeros(64, 9).int()}, [], f"{Q}.qweight is int32"),
        ("ct-w4a16-channel", {f"{Q}.weight_g_idx": torch.zeros(64).int()}, [], "act-order"),
        ("ct-w4a16-channel", {f"{Q}.weight_shape": torch.tensor([64, 65])}, [], "weight_shape"),
        ("ct-w4a16-channel", {f"{Q}.weight_packed": torch.zeros(64, 9).int()}, [], "no .4. bits"),
        ("ct-w4a16-channel", {f"{Q}.weight_scale": torch.ones(64, 3)}, [], "3 groups of 64"),
        ("bnb-int8", {f"{Q}.weight_format": torch.tensor(1).byte()}, [], "weight_format 1"),
        ("bnb-int8", {f"{Q}.SCB": torch.ones(63)}, [], f"{Q}.SCB is float32"),
        ("bnb-nf4", {f"{Q}.weight.quant_map": torch.full((16,), 2.0)}, [], "quant_map"),
        ("bnb-nf4", {f"{Q}.weight.nested_absmax": torch.ones(9)}, [], "nested_absmax is"),
    ],
)
def test_damaged_tensors(name, tensors, drop, message, tmp_path):
    folder = changed(name, tmp_path, tensors=tensors, drop=drop)
    with pytest.raises(ValueError, match=message) as error:
        gpu_poor.load(folder, requantize="int8")
    assert str(folder) in str(error.value) or "not finite" in message


@pytest.mark.parametrize(
    "state", [b"", b"{", b"[]", b'{"shape": [64, 64], "blocksize": 0}', b'{"shape": [1, 2]}']
)
def test_damaged_quant_state(state, tmp_path):
    key = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    data = torch.tensor(list(state) or [0], dtype=torch.uint8)
    folder = changed("bnb-nf4", tmp_path, tensors={key: data})
    with pytest.raises(ValueError, match="quant_state"):
        gpu_poor.load(folder)


def test_a_config_that_transformers_makes_no_model_of(tmp_path):
    folder = changed("gptq-sym-g32", tmp_path, config={"hidden_act": "si7u"})
    with pytest.raises(ValueError, match="gptq-sym-g32 .*no model of its config.*si7u"):
        gpu_poor.load(folder)


def test_act_order_is_refused_unless_asked_for():
    with pytest.raises(ValueError, match="q_proj.weight: it is in act-order.*requantize='int8'"):
        gpu_poor.load(FOREIGN / "gptq-act-order")


def test_folders_that_are_not_whole(tmp_path):
    folder = changed("gptq-sym-g32", tmp_path)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    shutil.copy(file, folder / "second.safetensors")
    with pytest.raises(ValueError, match="is in second.safetensors and in model.safetensors"):
        gpu_poor.load(folder)
    (folder / "second.safetensors").unlink()
    for size in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated or corrupted"):
            gpu_poor.load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="other.safetensors, which .* lists, is missing"):
        gpu_poor.load(folder)
    index.unlink()
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no .safetensors file"):
        gpu_poor.load(folder)


def test_nothing_in_a_folder_is_run(tmp_path):
    trap = tmp_path / "sprung"
    code = f"open({str(trap)!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = changed("gptq-sym-g32", tmp_path, config={"auto_map": auto})
    (folder / "evil.py").write_text(code)
    load(folder)  # a Llama all the same
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "e"')
    )
    with pytest.raises(ValueError):
        load(folder)
    assert not trap.exists()


# -- GGUF files --------------------------------------------------------------------------------


def test_gguf_of_other_kinds(tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(ValueError, match="no such file"):  # not asked for on the hub
        gpu_poor.load(file)
    data = (FOREIGN / "gguf-q4_0.gguf").read_bytes()

    def load_bytes(content):
        file.write_bytes(content)
        gpu_poor.load(file)

    with pytest.raises(ValueError, match="architecture 'lamas' is not supported; known: llama"):
        load_bytes(data.replace(b"llama", b"lamas"))
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    with pytest.raises(ValueError, match="attn_q.weight is of type IQ4_XS; known are F32"):
        load_bytes(data[:at] + b"\x17\0\0\0" + data[at + 4 :])
    with pytest.raises(ValueError, match="GGUF version 9"):
        load_bytes(data[:4] + b"\x09\0\0\0" + data[8:])
    with pytest.raises(ValueError, match="no GGUF file"):
        load_bytes(b"PK" + data[2:])
    with pytest.raises(ValueError, match="no place for blk.0.attn_x.weight|missing"):
        load_bytes(data.replace(b"blk.0.attn_q.w", b"blk.0.attn_x.w"))
    with pytest.raises(ValueError, match="block_count|blk.* is missing"):
        load_bytes(
            data.replace(b"llama.block_count\x04\0\0\0\x02", b"llama.block_count\x04\0\0\0\x7f")
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_names_are_those_of_the_gguf_package(architecture):
    gguf = pytest.importorskip("gguf")
    number = {name: n for n, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names, kind = gguf.get_tensor_name_map(number, 2), ARCHITECTURES[architecture]
    ours = {name: theirs for theirs, name in kind.names.items()}
    for theirs, name in kind.block_names.items():
        ours[f"{kind.blocks}.1.{name}"] = f"blk.1.{theirs}"
    found = {name: names.get_name(name) for name in ours}
    unknown = {name for name, theirs in found.items() if theirs is None}
    assert all(name.endswith("_norm") for name in unknown)  # of queries: not every one has it
    assert not {name for name in ours if found[name] not in (None, ours[name])}
    assert len(found) - len(unknown) >= 10


def test_gguf_frequencies_of_llama_3(tmp_path):
    """Only what they come to is in the file; the parameters are worked out, and checked."""
    model = load("gguf-llama3-q4_0")
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.rope_parameters["factor"] == 32.0
    entry = GgufFile(foreign("gguf-llama3-q4_0")).tensors["rope_freqs.weight"]
    data = bytearray(foreign("gguf-llama3-q4_0").read_bytes())
    data[entry.offset : entry.offset + 4] = torch.tensor(1.5).numpy().tobytes()
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="rope_freqs.weight: frequencies that are scaled"):
        gpu_poor.load(tmp_path / "model.gguf")


def test_gguf_truncated_anywhere(tmp_path):
    data = (FOREIGN / "gguf-q4_0.gguf").read_bytes()
    file = tmp_path / "model.gguf"
    for size in [*range(0, 3000, 37), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated|no GGUF file"):
            GgufFile(file)


def test_gguf_with_any_byte_of_the_header_changed(tmp_path):
    """A ValueError, or a file that still makes sense: never anything else, nor a long wait."""
    data = bytearray((FOREIGN / "gguf-q4_0.gguf").read_bytes())
    file = tmp_path / "model.gguf"
    read = GgufFile(FOREIGN / "gguf-q4_0.gguf")
    refused = 0
    for at in range(0, min(e.offset for e in read.tensors.values()), 5):
        changed = data.copy()
        changed[at] ^= 0xFF
        file.write_bytes(changed)
        try:
            source = IMPORTERS[".gguf"](file)
            [source.file.blocks(name) for name in source.file.tensors]
        except ValueError:
            refused += 1
    assert refused > 50
