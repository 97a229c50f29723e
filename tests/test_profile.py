"""profile: the rows add up, each operator is in its row, and the model stays as it was."""

import json
import time

import pytest
import torch
from conftest import make_model, tokens
from helpers import assert_equal, assert_within

import gpu_poor
from gpu_poor import assets

transformers = pytest.importorskip("transformers")
from gpu_poor.quantization import QuantizedModel  # noqa: E402


def unfused(model):
    """Its blocks run as they are written, where they would be fused."""
    return getattr(gpu_poor, "unfuse", lambda model: model)(model)


@pytest.fixture(scope="module")
def model():
    return QuantizedModel.from_pretrained(assets.STORIES260K, verbose=False)


def calls(profile):
    return {(row.kind, row.what): row.calls for row in profile.rows}


def test_every_layer_is_counted(capsys):
    """stories260k: 5 blocks, a matrix of each role in each, one head."""
    model = unfused(QuantizedModel.from_pretrained(assets.STORIES260K, verbose=False))
    profile = gpu_poor.profile(model, "Once upon a time", n_tokens=6, runs=1)
    assert capsys.readouterr().out.strip() == str(profile)
    found = calls(profile)
    for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert found["linear", role] == 5
    assert found["linear", "lm_head"] == found["embedding", "embed_tokens"] == 1
    assert found["attention", ""] == 5
    assert found["cache", ""] >= 5
    assert found["norm", ""] % 11 == 0
    assert found["activation", ""] == 5
    assert found["elementwise", "LlamaDecoderLayer"] == 10  # residuals
    assert found["generate", ""] > 1
    assert profile.rows[-1].kind == "Python between" and profile.rows[-1].calls is None
    assert_within(sum(row.ms for row in profile.rows), profile.ms_per_token, 1e-9)
    assert_within(sum(row.share for row in profile.rows), 1.0, 1e-9)
    assert profile.of("linear") == sum(r.ms for r in profile.rows if r.kind == "linear") > 0
    assert profile.prompt_tokens == 5 and profile.new_tokens == 6
    for row in profile.rows:
        assert f"{row.ms:.4f}" in str(profile)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3-moe", "gpt-neox", "falcon"])
def test_architectures_in_float_and_quantized(name):
    model = make_model(name)
    for each in (model, unfused(gpu_poor.quantize(model, verbose=False))):
        profile = gpu_poor.profile(each, tokens(1, 5), n_tokens=3, runs=1, verbose=False)
        roles = {what for kind, what in calls(profile) if kind == "linear"}
        assert len(roles) >= 4, roles
        assert profile.of("attention") > 0 and profile.of("cache") > 0 and profile.of("norm") > 0
        assert profile.of("embedding") > 0


def test_a_fused_step_is_a_row(model):
    pytest.importorskip("gpu_poor.fusion")
    profile = gpu_poor.profile(model, n_tokens=4, runs=1, verbose=False)
    assert calls(profile)["fused", "decoder_step"] == 1
    assert profile.of("fused") > 0 and calls(profile)["linear", "lm_head"] == 1


def test_eager_attention_is_attention():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    profile = gpu_poor.profile(model, n_tokens=3, runs=1, verbose=False)
    assert calls(profile)["attention", ""] == 2 * 3  # two products and a softmax in two blocks


def test_time_between_operators_is_pythons(model):
    handle = model.model.register_forward_pre_hook(lambda module, args: time.sleep(0.02))
    try:
        slow = gpu_poor.profile(model, n_tokens=5, runs=1, verbose=False)
    finally:
        handle.remove()
    assert slow.rows[-1].ms > 15 and slow.ms_per_token > 20
    assert slow.rows[-1].share > 0.5


def test_time_in_an_operator_is_its_rows():
    """A head of 60,000 words on a small model."""
    model = make_model("llama", vocab_size=60_000)
    profile = gpu_poor.profile(model, n_tokens=5, runs=1, verbose=False)
    others = [r.ms for r in profile.rows if r.kind == "linear" and r.what != "lm_head"]
    head = next(r.ms for r in profile.rows if r.what == "lm_head")
    assert head > 5 * max(others)


def test_the_model_stays_as_it_was(model):
    update = transformers.Cache.update
    ids = tokens(1, 9)
    before = model.model(ids).logits
    text = model.generate("Once upon a time", 20)
    gpu_poor.profile(model, n_tokens=3, runs=1, verbose=False)
    assert transformers.Cache.update is update
    module = torch.nn.modules.module
    assert not module._global_forward_hooks and not module._global_forward_pre_hooks
    assert not module._global_forward_hooks_always_called
    assert_equal(model.model(ids).logits, before)
    assert model.generate("Once upon a time", 20) == text


def test_transformers_has_nothing_to_warn_of(model, caplog):
    """An end of text that no token is, and that is none of its mistakes."""
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        profile = gpu_poor.profile(model, n_tokens=5, runs=1, verbose=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert profile.new_tokens == 5 and not caplog.records


def test_nothing_is_left_behind_by_an_error(model, monkeypatch):
    update, seen = transformers.Cache.update, []

    def fails(*args, **kwargs):
        seen.append(transformers.Cache.update is not update)
        if seen[-1]:  # under the profiler
            raise ZeroDivisionError
        return forward(*args, **kwargs)

    forward = model.model.model.forward
    monkeypatch.setattr(model.model.model, "forward", fails)
    with pytest.raises(ZeroDivisionError):
        gpu_poor.profile(model, n_tokens=3, runs=1, verbose=False)
    assert seen[-1] and not seen[0]
    assert transformers.Cache.update is update
    assert not torch.nn.modules.module._global_forward_hooks


def test_files(model, tmp_path):
    trace, table = tmp_path / "trace.json", tmp_path / "profile.json"
    profile = gpu_poor.profile(model, n_tokens=3, runs=1, trace=trace, verbose=False)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "gpu_poor::int8_linear" in names
    profile.save(table)
    assert json.loads(table.read_text()) == json.loads(json.dumps(profile.to_dict()))
    assert json.loads(table.read_text())["rows"][0]["ms"] == profile.rows[0].ms


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_tokens": 1}, ValueError, "n_tokens >= 2"),
        ({"runs": 0}, ValueError, "runs >= 1"),
        ({"n_tokens": 3.5}, ValueError, "integers n_tokens"),
        ({"prompt": []}, ValueError, "prompt is empty"),
        ({"prompt": [[1, 2], [3, 4]]}, ValueError, "one row of token ids"),
        ({"prompt": [1.5]}, ValueError, "one row of token ids"),
        ({"prompt": [3, 512]}, ValueError, "vocabulary of 512"),
        ({"n_tokens": 500}, ValueError, "context of 512"),
    ],
)
def test_mistakes(model, arguments, error, message):
    with pytest.raises(error, match=message):
        gpu_poor.profile(model, **arguments)


def test_what_does_not_generate():
    with pytest.raises(TypeError, match="got Linear"):
        gpu_poor.profile(torch.nn.Linear(2, 2))
