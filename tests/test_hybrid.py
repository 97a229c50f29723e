"""make_it_work_hybrid(): calibration, smoothing and a plan in one call."""

import copy
import json

import pytest
import torch
from conftest import logits, make_model, tokens

import gpu_poor
from gpu_poor import assets, make_it_work_hybrid, memory, metrics

transformers = pytest.importorskip("transformers")


def real_model():
    return transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K)


@pytest.fixture(scope="module")
def texts():
    text = assets.valid_text()
    return text[:30000], text[30000:60000]


def test_calibrated_plan_meets_its_target_and_beats_the_one_without(texts, tmp_path):
    calibration, text = texts
    model = real_model()
    recording = metrics.record(model, text, n_tokens=2048)
    original = memory.parameter_bytes(model)
    blind = make_it_work_hybrid(copy.deepcopy(model), memory_target=0.2, verbose=False)
    make_it_work_hybrid(
        model,
        calibration,
        memory_target=0.2,
        evaluate_on=text,
        plan_path=tmp_path / "plan.json",
        verbose=False,
    )
    for each in (blind, model):
        assert 0.99 * 0.2 * original < memory.parameter_bytes(each) <= 0.2 * original
    assert metrics.evaluate(model, recording).kl_mean < metrics.evaluate(blind, recording).kl_mean
    plan, receipt = model.gpu_poor_plan, gpu_poor.receipt(model)
    assert plan.measured_bytes == plan.predicted_bytes == receipt.bytes_after
    assert plan.measured_kl == receipt.quality["kl_mean"]
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["measured_kl"] == plan.measured_kl
    assert "smoothquant and gptq" in receipt.remarks[0]
    model.save_pretrained(tmp_path / "model")
    loaded = gpu_poor.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("samples", [tokens(), {"input_ids": tokens()}, [tokens(), tokens()]])
def test_samples_in_any_form(samples):
    model = make_model("gpt2")
    expected = logits(model)
    make_it_work_hybrid(model, samples, memory_target=0.3, verbose=False)
    assert (logits(model) - expected).norm() < 0.5 * expected.norm()


def test_a_generator_serves_plan_and_calibration():
    model = make_model("llama")
    make_it_work_hybrid(model, (tokens() for _ in range(2)), memory_target=0.3, verbose=False)
    assert "gptq" in gpu_poor.receipt(model).remarks[0]


def test_bits_instead_of_a_plan():
    model = make_model("llama")
    make_it_work_hybrid(model, tokens(), bits=4, verbose=False)
    assert model.model.layers[0].mlp.up_proj.format.bits == 4
    assert not hasattr(model, "gpu_poor_plan")


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_for_every_step(progress, monkeypatch, capsys):
    monkeypatch.setattr("gpu_poor.progress.DELAY_S", 0)
    options = dict(memory_target=0.3, progress=progress, verbose=False)
    make_it_work_hybrid(make_model("llama"), tokens(), **options)
    shown = capsys.readouterr().err
    assert ("looking at text" in shown) == ("calibrating" in shown) == progress


def test_embeddings_may_stay():
    model = make_model("llama")
    make_it_work_hybrid(model, memory_target=0.6, quantize_embeddings=False, verbose=False)
    assert isinstance(model.model.embed_tokens, torch.nn.Embedding)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_target": 0.01}, "the smallest possible is"),
        ({"memory_target": "many"}, "memory_target must be"),
        ({"memory_target": None}, "needs a memory_target or bits"),
        ({"bits": 3}, "bits must be"),
        ({"bits": 4, "plan_path": "plan.json"}, "plan_path belongs to a plan"),
        ({"bits": 4, "context": 8}, "context belongs to a plan"),
        ({"smoothing_alpha": 2.0, "sample_inputs": tokens()}, "alpha"),
        ({"sample_inputs": []}, "sample_inputs is empty"),
        ({"sample_inputs": torch.rand(1, 8)}, "integer token ids"),
        ({"sample_inputs": torch.full((1, 8), 10**6)}, "token id"),
        ({"sample_inputs": torch.ones(1, 4096, dtype=torch.long)}, "at most"),
        ({"strategy": "nothing"}, "strategy must be one of"),
        ({"strategy": "gptq"}, "needs sample_inputs"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(options, message):
    model = make_model("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        make_it_work_hybrid(model, **options, verbose=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "gpu_poor_plan")
