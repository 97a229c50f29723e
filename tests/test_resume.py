"""A calibration that was killed goes on after its last finished block."""

import copy
import json

import pytest
import torch
from conftest import logits, make_model, tokens

from gpu_poor import quantize
from gpu_poor.calibrate import _BlockWork
from gpu_poor.strategies.gptq import Gptq
from gpu_poor.strategies.smoothquant import SmoothQuant

SAMPLES = [tokens(), tokens().flip(1)]


class Killed(BaseException):
    """Not an Exception, as a real kill is none."""


def outlying(name):
    model = make_model(name)
    for module_name, module in model.named_modules():
        if "norm" in module_name and getattr(module, "weight", None) is not None:
            module.weight.data[3::17] += 29
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3-moe"])
@pytest.mark.parametrize("strategy", [None, [SmoothQuant(), Gptq()]])
def test_a_killed_calibration_goes_on(name, strategy, tmp_path, monkeypatch):
    options = dict(sample_inputs=SAMPLES, strategy=strategy, verbose=False)
    model = outlying(name)
    expected = logits(quantize(copy.deepcopy(model), 4, **options))
    run, runs = _BlockWork.run, []

    def counted(self, *args):
        if len(runs) == 1:
            raise Killed
        runs.append(self.name)
        run(self, *args)

    monkeypatch.setattr(_BlockWork, "run", counted)
    before = logits(model)
    with pytest.raises(Killed):
        quantize(model, 4, **options, work_folder=tmp_path / "work")
    assert torch.equal(logits(model), before)
    runs.insert(0, "")  # so that no length is 1 any more
    quantize(model, 4, **options, work_folder=tmp_path / "work")
    assert len(runs) == 3 and runs[1] != runs[2]  # the first block was not done again
    assert "an earlier run, in work_folder: 1" in str(model.gpu_poor_receipt)
    assert torch.equal(logits(model), expected)


def test_another_job_is_refused(tmp_path):
    quantize(make_model("llama"), 4, sample_inputs=SAMPLES, work_folder=tmp_path, verbose=False)
    for changes in ({"sample_inputs": [tokens()]}, {"bits": 8}, {"activation": "a8"}):
        options = {"bits": 4, "sample_inputs": SAMPLES} | changes
        model = make_model("llama")
        with pytest.raises(ValueError, match="another calibration"):
            quantize(model, **options, work_folder=tmp_path, verbose=False)
        quantize(model, verbose=False)  # it was left as it was


def test_a_model_that_differs_in_its_norms_is_another_one(tmp_path):
    options = dict(sample_inputs=SAMPLES, work_folder=tmp_path, verbose=False)
    quantize(make_model("llama"), 4, **options)
    with pytest.raises(ValueError, match="another calibration"):
        quantize(outlying("llama"), 4, **options)


@pytest.mark.parametrize(
    "name", ["job.json", "hidden-states.safetensors", "block-0000.safetensors"]
)
def test_damage_is_named(name, tmp_path):
    quantize(make_model("llama"), 4, sample_inputs=SAMPLES, work_folder=tmp_path, verbose=False)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is damaged"):
        quantize(make_model("llama"), 4, sample_inputs=SAMPLES, work_folder=tmp_path)


def test_no_temporary_file_is_left(tmp_path):
    options = dict(sample_inputs=SAMPLES, work_folder=tmp_path, verbose=False)
    (tmp_path / ".tmpOExm5J").write_text("somebody else's, for the folder is not ours yet")
    quantize(make_model("llama"), 4, **options)
    assert (tmp_path / ".tmpOExm5J").exists()
    strays = ".hidden-states.safetensors.123", ".block-0000.safetensors.9", ".job.json.7"
    for stray in strays:
        (tmp_path / stray).write_text("of a process that was killed while it wrote")
    quantize(make_model("llama"), 4, **options)
    names = {path.name for path in tmp_path.iterdir()}
    blocks = {"block-0000.safetensors", "block-0001.safetensors"}
    assert names == {"job.json", "hidden-states.safetensors"} | blocks
    assert len(json.loads((tmp_path / "job.json").read_text())["job"]) == 64


def test_a_work_folder_needs_calibration(tmp_path):
    with pytest.raises(ValueError, match="needs sample_inputs"):
        quantize(make_model("llama"), 4, work_folder=tmp_path)
