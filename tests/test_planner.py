"""Plans: the target is met, bytes are exact, KL is as predicted, and bad input is named."""

import copy
import glob
import json
import math
import random
import re

import pytest
import torch
from conftest import MODELS, logits, make_model, tokens
from torch import nn

import gpu_poor
from gpu_poor import assets, files, formats, memory, memory_plan, metrics, planner, sensitivity
from gpu_poor.plan import make_plan

TEXT = assets.calib_text()[:20000]


def plan_of(model, target, **options) -> memory_plan.MemoryPlan:
    return gpu_poor.plan_memory(model, target, **({"sample_inputs": tokens()} | options))


def carried_out(model, plan) -> nn.Module:
    return gpu_poor.quantize(copy.deepcopy(model), **plan.options, verbose=False)


# -- the goals ----------------------------------------------------------------------------------


def test_targets_are_met_within_a_per_cent_and_never_exceeded(stories):
    model, tokenizer = stories
    original = memory.parameter_bytes(model)
    targets = [0.16, 0.18, 0.24, "200 kB", 266_240]
    for target in targets:
        plan = plan_of(model, target, sample_inputs=TEXT, tokenizer=tokenizer)
        n_bytes = memory.parameter_bytes(carried_out(model, plan))
        assert n_bytes == plan.predicted_bytes
        allowed = planner.parse_target(target, original)
        assert 0.99 * allowed <= n_bytes <= allowed


def test_predicted_kl_ranks_plans_as_measured_kl_does(stories):
    """Plans for targets, and senseless ones, of many sizes and of one size."""
    model, tokenizer = stories
    reference = metrics.record(model, assets.valid_text()[:12000], tokenizer, n_tokens=2048)
    plans = [
        plan_of(model, target, sample_inputs=TEXT, tokenizer=tokenizer)
        for target in (0.16, 0.18, 0.2, 0.25, 0.35)
    ]
    tables = losses_of(model, tokenizer)
    rng = random.Random(0)
    for _ in range(7):
        names = rng.sample(list(formats.FORMATS), 3)
        plans.append({name: rng.choice(names) for name in tables})
    predicted, measured = [], []
    for plan in plans:
        chosen = plan if isinstance(plan, dict) else {d.names[0]: d.format for d in plan.decisions}
        predicted.append(sum(tables[n][f] for n, f in chosen.items() if f is not None))
        if not isinstance(plan, dict):
            assert predicted[-1] == pytest.approx(plan.predicted_kl, rel=1e-6)
        kept = [n for n, f in chosen.items() if f is None]
        quantized = gpu_poor.quantize(
            copy.deepcopy(model),
            overrides={n: f for n, f in chosen.items() if f is not None},
            exclude=kept,
            allow_partial=True,
            verbose=False,
        )
        measured.append(metrics.evaluate(quantized, reference).kl_mean)
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (predicted, measured)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) >= 0.9
    for p, m in zip(predicted, measured, strict=True):
        assert abs(math.log(p / m)) < math.log(1.4), (p, m)


def losses_of(model, tokenizer) -> dict[str, dict[str, float]]:
    """``{name: {format: predicted KL}}``"""
    from gpu_poor.samples import token_rows

    rows = token_rows(model, TEXT, tokenizer, n_tokens=planner.N_TOKENS)
    units = sensitivity.units(make_plan(model))
    known = sensitivity.fisher(model, units, rows)
    every = list(formats.FORMATS.values())
    return {
        u.name: dict(zip(formats.FORMATS, sensitivity.losses(u, every, known), strict=True))
        for u in units
    }


@pytest.mark.parametrize("blocks", [(0, 1), (3, 4)], ids=["first", "last"])
def test_a_plan_beats_a_rule_of_the_same_size(stories, blocks):
    """The rule: 8 bits for two blocks, 4 for the others."""
    model, tokenizer = stories
    reference = metrics.record(model, assets.valid_text()[:12000], tokenizer, n_tokens=2048)
    overrides = {f"model.layers.{i}": 8 for i in blocks}
    rule = gpu_poor.quantize(copy.deepcopy(model), bits=4, overrides=overrides, verbose=False)
    for samples in (TEXT, None):
        plan = plan_of(
            model, memory.parameter_bytes(rule), sample_inputs=samples, tokenizer=tokenizer
        )
        found = metrics.evaluate(carried_out(model, plan), reference).kl_mean
        assert found < 0.8 * metrics.evaluate(rule, reference).kl_mean


# -- bytes, and what stays in float -------------------------------------------------------------


def test_bytes_are_exact(model_name):
    model = make_model(model_name)
    plan = plan_of(model, 0.3)
    quantized = carried_out(model, plan)
    assert plan.predicted_bytes == memory.parameter_bytes(quantized) <= plan.target_bytes
    assert plan.original_bytes == memory.parameter_bytes(model)
    assert bool(torch.isfinite(logits(quantized)).all())
    found = {n: m.format.name for n, m in quantized.named_modules() if hasattr(m, "format")}
    chosen = {name: d.format for d in plan.decisions if d.format for name in d.names}
    assert found.items() <= chosen.items() and found


def test_tied_modules_are_decided_together():
    plan = plan_of(make_model("llama-tied"), 0.3)
    names = [d.names for d in plan.decisions]
    assert ["model.embed_tokens", "lm_head"] in names
    assert len({name for each in names for name in each}) == sum(map(len, names))


def test_all_that_fits_stays_in_float():
    model = make_model("llama")
    plan = gpu_poor.plan(model, 1.0, dry_run=False, verbose=False, sample_inputs=tokens())
    assert not plan.overrides and plan.predicted_kl == 0 and plan.gap == 0
    assert plan.measured_bytes == plan.predicted_bytes == plan.original_bytes
    assert "the model fits as it is" in str(plan)
    assert not any(isinstance(m, gpu_poor.nn.QuantizedModule) for m in model.modules())


def test_bfloat16_models_are_counted_as_they_are():
    model = make_model("llama").to(torch.bfloat16)
    plan = plan_of(model, 0.5)
    assert plan.original_bytes == sum(p.nbytes for p in model.parameters())
    assert plan.predicted_bytes == memory.parameter_bytes(carried_out(model, plan))


KEPT = {
    "embeddings": (dict(quantize_embeddings=False), {"model.embed_tokens", "lm_head"}),
    "critical": (dict(critical_layers="first"), {"model.layers.0.mlp.up_proj"}),
    "exclude": (dict(exclude="*.down_proj"), {"model.layers.1.mlp.down_proj"}),
    "include": (dict(include="*.mlp"), {"model.layers.0.self_attn.q_proj", "lm_head"}),
}


@pytest.mark.parametrize("options, kept", KEPT.values(), ids=KEPT)
def test_what_was_asked_to_stay_stays(options, kept):
    model = make_model("llama-tied")
    plan = plan_of(model, 0.9, **options)
    quantized = carried_out(model, plan)
    assert not {name for d in plan.decisions for name in d.names} & kept
    assert not any(hasattr(quantized.get_submodule(name), "format") for name in kept)
    assert plan.predicted_bytes == memory.parameter_bytes(quantized)


def test_only_the_formats_asked_for():
    model = make_model("llama")
    plan = plan_of(model, 0.27, formats=["int8", "int4_g128"])
    assert {d.format for d in plan.decisions} <= {None, "int8", "int4_g128"}
    assert set(plan.overrides.values()) <= {"int8", "int4_g128"} and plan.overrides
    with pytest.raises(ValueError, match="format must be one of int8.*got 'int3'"):
        plan_of(model, 0.27, formats=["int3"])


def test_names_are_no_patterns():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a[0]": nn.Linear(64, 64), "a*": nn.Linear(64, 32)})

    model = Odd()
    plan = gpu_poor.plan_memory(model, 0.6)
    assert plan.basis == "weights" and plan.predicted_kl is None
    quantized = carried_out(model, plan)
    assert memory.parameter_bytes(quantized) == plan.predicted_bytes
    for decision in plan.decisions:
        module = quantized.layers[decision.names[0].partition(".")[2]]
        assert getattr(getattr(module, "format", None), "name", None) == decision.format
    assert all(glob.escape(n) in (plan.overrides | dict.fromkeys(plan.exclude)) for n in
               ("layers.a[0]", "layers.a*"))  # fmt: skip


def test_a_format_that_overflows_is_no_choice():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e8  # no float16 scale holds it
    plan = plan_of(model, 0.4)
    assert plan.overrides["model.layers.0.mlp.down_proj"] == "int8"
    assert math.isfinite(plan.predicted_kl)
    assert memory.parameter_bytes(carried_out(model, plan)) == plan.predicted_bytes


# -- what it says -------------------------------------------------------------------------------


def test_a_plan_prints_and_saves(stories, tmp_path, capsys):
    model, tokenizer = stories
    path = tmp_path / "plan.json"
    plan = gpu_poor.plan(
        model, 0.5, context=100, sample_inputs=TEXT, tokenizer=tokenizer, path=path
    )
    out = capsys.readouterr().out
    assert str(plan) == out.rstrip("\n")
    for shown in ("model.layers.*.mlp.up_proj", "model.embed_tokens = lm_head", "KV cache of 100"):
        assert shown in out
    assert f"{plan.predicted_bytes:,} bytes" in out and f"{plan.predicted_kl:.2e} nats" in out
    saved = json.loads(path.read_text())
    assert saved == json.loads(json.dumps(plan.to_dict()))
    assert saved["overrides"] == plan.overrides and saved["measured_kl"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    plan.measure(carried_out(model, plan), kl=0.0123)
    assert f"measured: {plan.predicted_bytes:,} bytes; mean KL 1.23e-02 nats" in str(plan)
    assert plan.to_dict()["measured_bytes"] == plan.predicted_bytes


def test_a_plan_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    plan = plan_of(make_model("llama"), 0.3)
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_plan_is_carried_out():
    model = make_model("llama")
    plan = gpu_poor.plan(model, 0.3, dry_run=False, verbose=False, sample_inputs=tokens())
    assert plan.measured_bytes == plan.predicted_bytes == memory.parameter_bytes(model)
    assert any(isinstance(m, gpu_poor.nn.QuantizedModule) for m in model.modules())


def test_without_samples_a_model_is_judged_by_its_own_text(stories):
    model, _ = stories
    plan = gpu_poor.plan_memory(model, 0.25)
    assert plan.basis == "own text" and plan.n_tokens == 16 * 128
    assert "2048 tokens that the model wrote itself" in str(plan)


# -- the KV cache -------------------------------------------------------------------------------


def cached(model, length: int) -> int:
    ids = torch.arange(3, 3 + length)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bart"])
def test_kv_formula_is_what_the_cache_takes(name):
    model = make_model(name)
    assert memory.kv_cache_bytes(model, 17) == cached(model, 17)
    half = model.to(torch.bfloat16)
    assert memory.kv_cache_bytes(half, 17) == cached(half, 17)


def test_a_window_bounds_the_cache():
    # A cache keeps one token less than the window: the next one completes it.
    gemma = make_model("gemma2", sliding_window=8)  # the first of its two layers
    layer = memory.kv_cache_bytes(gemma, 1) // 2
    assert memory.kv_cache_bytes(gemma, 40) == layer * (8 + 40) == cached(gemma, 40) + layer
    phi = make_model("phi3", sliding_window=8)
    assert memory.kv_cache_bytes(phi, 40) == memory.kv_cache_bytes(phi, 8)
    phi = make_model("phi3", sliding_window=None)
    assert memory.kv_cache_bytes(phi, 40) == 40 * memory.kv_cache_bytes(phi, 1)


def test_the_cache_counts():
    model = make_model("llama")
    free, cache = plan_of(model, 0.5), memory.kv_cache_bytes(model, 64)
    plan = plan_of(model, 0.5, context=64)
    assert plan.kv_bytes == cache and plan.target_bytes == free.target_bytes
    assert plan.predicted_bytes + cache <= plan.target_bytes < free.predicted_bytes + cache


def test_caches_without_a_formula_are_refused():
    model = make_model("gemma2")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="gemma2 cannot be counted: linear_attention"):
        plan_of(model, 0.5, context=8)
    with pytest.raises(ValueError, match="Sequential has no config"):
        gpu_poor.plan_memory(nn.Sequential(nn.Linear(64, 64)), 0.5, context=8)


# -- bad input ----------------------------------------------------------------------------------

SIZES = {
    0.4: 400_000,
    1.0: 1_000_000,
    12345: 12345,
    "6GB": 6 * 10**9,
    "500 MB": 500 * 10**6,
    "6GiB": 6 * 2**30,
    "1.5kb": 1500,
    ".5 KiB": 512,
    "40%": 400_000,
    "77B": 77,
}


@pytest.mark.parametrize("target, n_bytes", SIZES.items())
def test_targets(target, n_bytes):
    assert planner.parse_target(target, 10**6) == n_bytes


@pytest.mark.parametrize(
    "target",
    [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, None, [1], "", "6", "GB", "6 XB", "-6GB",
     "6e9B", "0MB", "nanGB", "1,5GB", 10**400, "9" * 400 + "GB", "99999999TB"],
)  # fmt: skip
def test_targets_that_are_none(target):
    with pytest.raises(ValueError, match="memory_target must be"):
        gpu_poor.plan_memory(make_model("llama"), target)


def test_an_impossible_target_says_the_smallest_possible():
    model = make_model("llama-tied")
    with pytest.raises(ValueError, match="but the smallest possible is") as error:
        plan_of(model, 0.1, context=10)
    least = int(re.search(r"possible is ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    assert f"{memory.kv_cache_bytes(model, 10):,} of them for the KV cache" in str(error.value)
    plan = plan_of(model, least, context=10)
    assert plan.predicted_bytes + plan.kv_bytes == least
    with pytest.raises(ValueError, match=f"smallest possible is {least:,}"):
        plan_of(model, least - 1, context=10)


BAD = {
    "empty": (dict(sample_inputs=[]), "sample_inputs is empty"),
    "floats": (dict(sample_inputs=tokens().float()), "integer token ids"),
    "vocabulary": (dict(sample_inputs=[[1, 999]]), r"sample_inputs\[0\] has the token id 999"),
    "long": (dict(sample_inputs=[1] * 65), "65 tokens; the model takes at most 64"),
    "context": (dict(context=65), "context=65: the model takes at most 64"),
    "no context": (dict(context=0), "context must be a number of tokens, got 0"),
    "pattern": (dict(exclude="nothing"), "exclude: the pattern 'nothing' matches no module"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(make_model("llama"), 0.5, **options)


def test_bad_models_are_named():
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight is not finite"):
        plan_of(model, 0.5)
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e38)
    for samples in (tokens(), None):
        with pytest.raises(ValueError, match="activations of model.layers.1.mlp.up_proj are not"):
            plan_of(model, 0.5, sample_inputs=samples)
    with pytest.raises(ValueError, match="already quantized"):
        plan_of(gpu_poor.quantize(make_model("llama"), verbose=False), 0.5)
    with pytest.raises(ValueError, match="is no causal language model"):
        gpu_poor.plan_memory(nn.Sequential(nn.Linear(64, 64)), 0.6, sample_inputs=[1])
