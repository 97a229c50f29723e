"""The benchmarks of decode and of attention: that they time what they say, and what they report."""

import contextlib
import json
import os
import subprocess
import sys
import types
import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("transformers")

import gpu_poor  # noqa: E402
from benchmarks import (  # noqa: E402
    attention,
    decode,
    decode_contexts,
    machine,
    peers,
    plot,
    report,
    report_decode,
    report_goals,
    shapes,
)
from benchmarks.peers import llama_cpp_avx2_peer, llama_cpp_peer  # noqa: E402
from gpu_poor import ops  # noqa: E402
from gpu_poor.kv_cache import PagedKVCache  # noqa: E402

HEADS = (4, 2, 16)


class Stream:
    """A stream that is always the same, and reads nothing."""

    bytes = 1 << 20

    def best(self) -> float:
        return 10.0


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Nobody keeps a core busy for the sake of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "busy_core", contextlib.nullcontext)
        yield


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(attention, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(attention, "COLD_CACHES", 0)


@pytest.fixture
def args():
    found = types.SimpleNamespace(
        bits=[8, 4], activation="a16", rounds=2, prompt=4, tokens=3, threads=1
    )
    decode_contexts.make_quick(found)
    found.contexts, found.ablation_context = [8, 20], 8
    return found


# -- attention ---------------------------------------------------------------------------------


def test_attention_goes_over_all_copies_and_counts_the_bytes_it_reads(small, monkeypatch):
    found = attention.contenders(HEADS, 100)
    assert list(found) == [*(f"pages {form}" for form in attention.FORMATS), *attention.SDPA]
    numbers = 2 * 2 * 100 * 16  # keys and values, heads, tokens, dim
    assert found["pages int8"]["bytes"] == numbers + 2 * (numbers // 16)
    assert found["pages bf16"]["bytes"] == found["SDPA bf16"]["bytes"] == 2 * numbers
    for name, contender in found.items():
        assert contender["copies"] * contender["bytes"] >= (1 << 16) * 0.7, name  # whole pages more
        seen, step = set(), ops.paged_attention
        monkeypatch.setattr(
            ops, "paged_attention", lambda q, p, *a, step=step, seen=seen: (
                seen.add(p.data_ptr()), step(q, p, *a))[1],
        )  # fmt: skip
        outputs = contender["call"]()
        monkeypatch.setattr(ops, "paged_attention", step)
        assert len(outputs) == contender["copies"] >= 2
        assert len(seen) == (len(outputs) if name.startswith("pages") else 0)
    rows = attention.speed(HEADS, 100, Stream(), rounds=2)
    base = next(row for row in rows if row["name"] == "SDPA fp32")
    assert base["over_sdpa_fp32"]["median"] == 1.0
    json.dumps(rows)


def test_attention_of_prompts(small):
    rows = attention.prompts(HEADS, 40, rounds=1)
    assert [row["name"] for row in rows] == [
        *(f"pages {form}" for form in attention.FORMATS), *attention.SDPA
    ]  # fmt: skip
    for row in rows:
        seen = row["heads"] * 40 * 41 / 2  # pairs, of 2 D products and sums each for q k and w v
        rate = 4 * row["head_dim"] * seen / row["seconds"]["median"] / 1e9
        assert row["gflop_s"] == pytest.approx(rate)
        assert ("error" in row) == row["name"].startswith("pages")
    assert "| pages int8 |" in report_decode.prompts({"prompts": rows})


def test_attention_that_is_wrong_is_not_timed(small, monkeypatch):
    right = ops.paged_attention
    monkeypatch.setattr(ops, "paged_attention", lambda *a: 1.001 * right(*a))
    for measure in (attention.contenders, lambda *shape: attention.prompts(*shape, rounds=1)):
        with pytest.raises(RuntimeError, match="away from float64"):
            measure(HEADS, 40)


@pytest.mark.parametrize("kind", ["pages int8", "dynamic fp16"])
def test_memory_of_a_cache_is_what_its_process_grows_by(kind):
    command = [sys.executable, "-m", "benchmarks.attention", "--child", kind, "64", "8", "4096"]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(peers.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=peers.ROOT,
                          env=env)  # fmt: skip
    facts = json.loads(done.stdout.splitlines()[-1])
    row = 66 if kind == "pages int8" else 128
    assert facts["bytes"] == 8 * 2 * attention.MEMORY_HEADS * 4096 * row
    assert 0.98 < facts["rss"] / facts["bytes"] < 1.15


# -- decode ------------------------------------------------------------------------------------


def test_decode_measures_the_fused_path_and_the_others(args):
    result = decode.measure("tiny-llama", args, Stream())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["int8", "int8 unfused", "int4", "fp32"]
    assert rows["int8"]["bytes"] == rows["int8 unfused"]["bytes"] < rows["fp32"]["bytes"] / 3.5
    for name in ("int8", "int4"):
        spent = rows[name]["step_s"] + rows[name]["head_s"] + rows[name]["python_s"]
        assert spent == pytest.approx(rows[name]["seconds"]["median"])
        assert rows[name]["kept_when_busy"]["n"] == args.rounds
    assert rows["fp32"]["over_fp32"]["median"] == rows["int8"]["over_int8"]["median"] == 1.0
    share = rows["int4"]["bytes"] / rows["int4"]["samples"][0] / 10e9
    assert rows["int4"]["of_stream"]["min"] <= share


def test_a_fused_path_that_never_ran_has_no_figures():
    model = gpu_poor.quantize(shapes.build("tiny-llama"), verbose=False, fuse=False)
    with pytest.raises(ValueError, match="no step was timed"):
        decode.Spans(model).median("step")


def test_twin_shares_weights_and_nothing_else():
    model = gpu_poor.quantize(shapes.build("tiny-gpt2"), verbose=False, fuse=True)
    other = gpu_poor.unfuse(decode_contexts.twin(model))
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert gpu_poor.explain(model).blocks[0].fused and not gpu_poor.explain(other).blocks[0].fused
    assert other.config is not model.config


@pytest.mark.parametrize("paged", [False, True])
def test_tokens_after_a_context_attend_to_it(paged):
    from transformers import DynamicCache

    model = gpu_poor.quantize(shapes.build("tiny-llama"), verbose=False, fuse=True)
    cache = PagedKVCache(model, format="fp32", kv_memory="8MB") if paged else DynamicCache()
    decode_contexts._filled(cache, model.config, 19)
    before = [cache.get_seq_length(i) for i in range(2)]
    seconds = decode_contexts.seconds_after(model, cache, 20, 3)
    assert before == [19, 19] == [cache.get_seq_length(i) for i in range(2)]
    assert 0 < seconds < 5
    last = str(gpu_poor.explain(model).steps[0])
    assert ("DynamicCache" in last) != paged


def test_contexts_stay_within_the_positions_of_a_shape():
    assert decode_contexts.within("gpt2", 1984, 17) == 1024 - 17
    assert decode_contexts.within("tinyllama-1.1b", 8192, 17) == 8192


def test_ablation_variants_are_what_they_are_called():
    models = decode_contexts.variants("tiny-llama")
    assert list(models)[0] == "fp32"  # what the others are compared with
    for name, model in models.items():
        blocks = gpu_poor.explain(model).blocks
        assert all(b.fused for b in blocks) == (name[:3] == "int" and "unfused" not in name), name
        assert (model.config._attn_implementation == "gpu_poor") == ("flash" in name), name
        assert hasattr(model, "_gp_kv_pool") == ("int8 KV" in name), name
    tables = [m.get_input_embeddings().weight for n, m in models.items() if n.startswith("int8")]
    assert len({t.data_ptr() for t in tables}) == 1


# -- documents ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """Records as small as they get, by the code that makes the large ones."""
    found = types.SimpleNamespace(bits=[8, 4], activation="a16", rounds=2, prompt=4, tokens=3)
    decode_contexts.make_quick(found)
    found.contexts, found.ablation_context = [8, 20], 8
    header = machine.header(1)
    return {
        "decode": {
            "header": header,
            "shapes": [decode.measure("tiny-llama", found, Stream())],
            "contexts": decode_contexts.contexts(found),
            "ablation": decode_contexts.ablation(found),
            "timeline": decode_contexts.timeline(found),
        }
    }


def test_another_machine_has_its_decode_and_its_picture(measured, tmp_path):
    folder = tmp_path / "results" / "AMD, Zen"
    machine.save(json.loads(json.dumps(measured["decode"])), folder / "decode.json", "")
    arguments = ["--root", str(tmp_path), "--results", str(tmp_path / "results")]
    assert report.main(arguments) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    here, _, there = text.partition("## Another machine: AMD, Zen")
    assert "Measured on AMD, Zen: see there." in here and "###" not in here
    assert "(results/AMD%2C%20Zen/decode.svg)" in there
    for row in measured["decode"]["ablation"]:
        assert f"| tiny-llama | {row['name']} |" in there
    assert "| Python between |" in there
    assert "### Decode attention" not in there  # not measured: left out
    assert (folder / "decode.svg").exists()
    assert report.main([*arguments, "--check"]) == 0


def test_picture_has_every_point(measured):
    rows = measured["decode"]["contexts"]
    root = ET.fromstring(plot.contexts_svg(rows))
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(titles) == sorted(row["name"] for row in rows)
    assert {row["name"] for row in rows} == set(plot.WAYS)


def median(value: float) -> dict:
    return {"median": value}


def test_goals_of_decode_attention_and_rivals():
    row = {"name": "int8", "of_stream": median(0.84), "over_fp32": median(3.5),
           "kept_when_busy": median(0.5)}  # fmt: skip
    record = {"shapes": [{"shape": shape, "rows": [row]} for shape in ("gpt2", "gpt2-large")]}
    goals = {goal: (value, met) for goal, value, met in report_goals.decode(record)}
    assert goals["int8: decode, of the read stream ≥ 85.0 %"] == ("84.0 % (gpt2-large)", False)
    assert all(met for goal, (_, met) in goals.items() if "stream" not in goal) and len(goals) == 3
    shape = {"length": 8192, "heads": 32, "kv_heads": 8, "head_dim": 128}
    rows = [
        shape | {"name": name, "of_stream": median(share), "over_sdpa_fp32": median(3.1)}
        for name, share in (("pages fp16", 0.6), ("pages int8", 0.49), ("SDPA fp32", 0.1))
    ]
    memory = [{"name": "pages int8", "head_dim": 64, "smaller_than_fp16": 1.91}]  # fmt: skip
    assert [goal[1:] for goal in report_goals.attention({"rows": rows, "memory": memory})] == [
        ("49.0 % (pages int8)", False),
        ("3.10x (pages fp16)", True),
        ("1.910x (head dim 64)", True),
    ]

    def contest(name, base, **speedups):
        speedup = {base: {key: median(value) for key, value in speedups.items()}}
        rows = [{"name": name, "error": "", "speedup": speedup}]
        return {"header": {"features": ["amx_int8"]}, "shapes": {"gpt2-large": {"rows": rows}}}

    native = contest("gpu_poor:int8", "llama_cpp:q8_0", decode=1.05, prefill_512=2.6)
    avx2 = contest("gpu_poor:int8-a8-avx2", "llama_cpp_avx2:q8_0", prefill_512=0.8)
    assert [met for _, _, met in report_goals.rivals(native, avx2)] == [False, True, False]
    native["header"]["features"] = []  # prefill is judged where there is AMX
    assert [met for _, _, met in report_goals.rivals(native, None)] == [False]


def test_sections_leave_out_what_was_not_measured():
    assert report_decode.sections(dict.fromkeys(report.PARTS), "") == ""


# -- peers -------------------------------------------------------------------------------------


def test_contenders_by_module_or_single_variant():
    found = peers.contenders(("gpu_poor:int8-a8-avx2", "llama_cpp_avx2"))
    assert list(found) == ["gpu_poor:int8-a8-avx2", "llama_cpp_avx2:q8_0", "llama_cpp_avx2:q4_0"]
    assert not any(name.startswith("llama_cpp_avx2") for name in peers.contenders())
    with pytest.raises(ValueError, match="unknown peer 'nobody'"):
        peers.contenders(("nobody:int8",))
    assert peers.environment("gpu_poor:int8-a8-avx2")["GPU_POOR_ISA"] == "avx2"
    assert peers.environment("gpu_poor:int8-a8") == peers.environment("torch_fp32") == {}


def test_llama_cpp_is_built_for_what_its_peer_says(monkeypatch, tmp_path):
    folder = tmp_path / "sdist"
    mmq = llama_cpp_peer.source(folder) / "ggml/src/ggml-cpu/amx/mmq.cpp"
    mmq.parent.mkdir(parents=True)
    mmq.write_text(llama_cpp_peer.LOADCONFIG)
    (folder / f"{llama_cpp_peer.source(folder).parents[1].name}.tar.gz").touch()
    commands = []
    monkeypatch.setattr(llama_cpp_peer.subprocess, "run", lambda c, **_: commands.append(c))
    llama_cpp_peer.install(folder)
    llama_cpp_avx2_peer.install(folder)
    native, avx2 = (c for c in commands if "-B" in c)
    assert "-DGGML_NATIVE=ON" in native and not any("AVX" in flag for flag in native)
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"} <= set(avx2)
    on = [flag for flag in avx2 if flag.endswith("=ON")]
    assert not any(word in flag for flag in on for word in ("512", "VNNI", "AMX"))
    assert mmq.read_text().count("__asm__") == 1
    assert llama_cpp_avx2_peer.setup.keywords == {"peer": "llama_cpp_avx2"}


def test_rounds_are_as_many_for_each_way(args):
    rows = decode_contexts.contexts(args)
    assert {row["seconds"]["n"] for row in rows} == {args.rounds}
    assert {row["context"] for row in rows} == {8, 20}
