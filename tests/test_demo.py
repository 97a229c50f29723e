"""The demo measures what it says: figures against independent ones, and a verdict that can fail."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_poor
from gpu_poor import memory
from gpu_poor.examples import demo, measure, models

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[1]
SMALL = {"n_runs": 2, "n_tokens": 600, "verbose": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model gains nothing from threads, and loses much where other work has the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results():
    return demo.demo_production_ready(**SMALL)


def test_memory_is_that_of_the_models(results):
    model = models.load_float("stories260k").model
    before = memory.parameter_bytes(model)
    after = memory.parameter_bytes(gpu_poor.quantize(model, verbose=False))
    m = results["memory"]
    assert m["before_mb"] == pytest.approx(before / 1e6)
    assert m["after_mb"] == pytest.approx(after / 1e6)
    assert m["reduction"] == pytest.approx(1 - after / before)
    for when in ("before_mb", "after_mb"):
        assert sum(c[when] for c in m["components"].values()) == pytest.approx(m[when])


def test_layers(results):
    layers = results["layers"]
    assert layers["int8_linear"] == 5 * 7 + 1 and layers["int8_embedding"] == 1
    assert layers["shared_lm_head"] is True
    assert [(k["module"], k["count"]) for k in layers["kept"]] == [("LlamaRMSNorm", 11)]


def test_speed_ratios_are_float_over_quantized(results):
    runs = results["speed"]["runs"]
    assert len(runs) == 2
    for run in runs:
        ratio = run["float_ms_per_token"] / run["quantized_ms_per_token"]
        assert run["decode_ratio"] == pytest.approx(ratio)
    ratios = sorted(run["decode_ratio"] for run in runs)
    assert ratios[0] <= results["speed"]["decode_ratio"] <= ratios[1]


def test_quality_and_samples(results):
    q = results["quality"]
    assert 0 < q["kl_mean"] < 2e-3 and q["top1"] > 0.95 and q["n_tokens"] == 510
    for sample in results["samples"]:
        assert 0 <= sample["n_same"] <= sample["n_tokens"] <= measure.SAMPLE_TOKENS
        same = sample["n_same"] == sample["n_tokens"]
        assert (sample["before"] == sample["after"]) is same


def test_a_sample_that_differs_is_counted():
    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": [7]}

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    sample = measure.sample(Tokenizer(), "p", torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3]))
    assert sample["n_same"] == 1
    assert sample["before"] == " 1 2 3" and sample["after"] == " 1 9 3"


def test_a_sample_goes_on_from_its_prompt():
    """The space before a new word, which decoding the new tokens alone drops, and no other."""
    tokenizer = models.load_float("stories260k").tokenizer
    for prompt, pieces, text in (
        ("Once upon a time, there was a little", ["\u2581g", "ir", "l"], " girl"),
        ("Once upon a time, there was a little g", ["ir", "l"], "irl"),
    ):
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(pieces))
        assert measure.sample(tokenizer, prompt, ids, ids)["before"] == text


def test_report_shows_the_figures(results):
    text = demo.report(results)
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        f"{results['memory']['reduction']:.1%}",
        f"{results['speed']['decode_ratio']:.2f}x",
        f"{results['quality']['kl_mean']:.2e}",
        results["verdict"]["text"],
        "36 linear, 1 embedding",
        "11 LlamaRMSNorm",
    ):
        assert part in text, part


# -- the verdict --------------------------------------------------------------------------------


def figures(**changes):
    values = {"reduction": 0.75, "speed": 2.0, "kl": 1e-4, "ppl": 1.001, "top1": 0.99} | changes
    return {
        "n_parameters": values.get("n", 10**8),
        "memory": {"reduction": values["reduction"]},
        "speed": {"decode_ratio": values["speed"]},
        "quality": {
            "kl_mean": values["kl"],
            "perplexity_ratio": values["ppl"],
            "top1": values["top1"],
        },
    }


def test_verdict_good():
    assert demo.verdict(figures())["production_ready"] is True


@pytest.mark.parametrize(
    "change",
    [
        {"reduction": 0.69},
        {"speed": 0.9},
        {"kl": 2e-3},
        {"ppl": 1.01},
        {"top1": 0.97},
        {"kl": math.nan},
    ],
    ids=str,
)
def test_verdict_names_what_fails(change):
    v = demo.verdict(figures(**change))
    failed = [c["check"] for c in v["checks"] if c["passed"] is False]
    assert v["production_ready"] is False and len(failed) == 1 and failed[0] in v["text"]


def test_speed_of_a_tiny_model_is_not_judged():
    v = demo.verdict(figures(n=10**6, speed=0.1))
    assert v["production_ready"] is True and "too small a model to judge speed" in v["text"]
    assert demo.verdict(figures(n=10**6, kl=1))["production_ready"] is False


def test_verdict_without_quality():
    assert demo.verdict(figures() | {"quality": "unmeasured"})["production_ready"] is None
    bad = demo.verdict(figures(reduction=0.1) | {"quality": "unmeasured"})
    assert bad["production_ready"] is False


def test_a_broken_quantizer_fails_the_verdict(monkeypatch):
    honest = gpu_poor.quantize

    def broken(model, **kwargs):
        model = honest(model, **kwargs)
        model.model.layers[1].mlp.up_proj.weight_scale.mul_(2)
        return model

    monkeypatch.setattr(gpu_poor, "quantize", broken)
    verdict = demo.demo_production_ready(**SMALL)["verdict"]
    assert verdict["production_ready"] is False and "mean KL divergence" in verdict["text"]


# -- where models come from ---------------------------------------------------------------------


def test_one_after_the_other_gives_the_same(results, monkeypatch):
    """With no room for both models the float one is measured first; the figures are the same."""
    monkeypatch.setattr(measure, "available_bytes", lambda: 0)
    alone = demo.demo_production_ready(**SMALL)
    assert alone["speed"]["took_turns"] is False and results["speed"]["took_turns"] is True
    for key in ("quality", "samples", "memory", "layers"):
        assert alone[key] == results[key]


@pytest.fixture
def tiny_gpt2(monkeypatch):
    """The name gpt2-large with a tiny shape, on a machine without a hub."""
    monkeypatch.setattr(models, "GPT2_SHAPES", {"gpt2-large": (1, 64, 2)})


def test_random_weights_are_measured_for_memory_and_speed_only(tiny_gpt2):
    r = demo.demo_production_ready("gpt2-large", random_weights=True, **SMALL)
    assert r["source"] == "random weights" and r["quality"] == "unmeasured" and r["samples"] == []
    assert r["architecture"] == "GPT2LMHeadModel" and r["memory"]["reduction"] > 0.7
    assert r["verdict"]["production_ready"] in (None, False)  # never "ready"
    text = demo.report(r)
    assert "RANDOM WEIGHTS" in text and "unmeasured" in text


def test_random_weights_are_reproducible(tiny_gpt2):
    a, b = (models.random_gpt2("gpt2-large").state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name, flag", [("gpt2-large", False), ("no/such-model", True)])
def test_a_model_that_cannot_be_had_says_what_to_do(name, flag, capsys, tmp_path):
    argv = [name, "--out", str(tmp_path)] + ["--random-weights"] * flag
    assert demo.main(argv) == 1
    error = capsys.readouterr().err
    assert name in error and "could not be downloaded" in error and "--random-weights" in error
    assert "stories260k" in error and not list(tmp_path.iterdir())
    commands = re.findall(r"python -m (\S+)", error)
    assert commands and set(commands) == {"gpu_poor.examples.demo"}  # a wheel has this one only


def test_the_hub_is_asked_once(monkeypatch):
    """Each question to a hub out of reach takes half a minute of retries."""
    import transformers

    asked = []
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):

        def out_of_reach(*args, name=name, **kwargs):
            asked.append(name)
            raise OSError("no network")

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", out_of_reach)
    with pytest.raises(OSError, match="could not be downloaded"):
        models.load_float("no/such-model")
    assert asked == ["AutoConfig"]


def test_a_path_that_is_no_float_model_says_what_it_is(tmp_path):
    file, empty, int8 = tmp_path / "model.gguf", tmp_path / "empty", tmp_path / "int8"
    file.write_text("x")
    empty.mkdir()
    model = models.load_float("stories260k").model
    gpu_poor.quantize(model, verbose=False).save_pretrained(int8)
    for path, message in (
        (file, "is a file"),
        (empty, "no config.json in it"),
        (int8, "quantized already; give the float original"),
    ):
        with pytest.raises(OSError, match=message):
            models.load_float(str(path))


def test_published_shapes():
    """124 M, 355 M, 774 M and 82 M parameters, as OpenAI and Hugging Face publish them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    published = {"gpt2": 124.4, "gpt2-medium": 354.8, "gpt2-large": 774.0, "distilgpt2": 81.9}
    for name, (n_layer, n_embd, n_head) in models.GPT2_SHAPES.items():
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head))
        # Not lm_head: it is the embedding, which transformers 5.0 does not tie on "meta".
        n_millions = sum(p.numel() for p in model.transformer.parameters()) / 1e6
        assert n_millions == pytest.approx(published[name], abs=0.1)
        assert n_embd // n_head == 64


# -- the command line ---------------------------------------------------------------------------


def test_options_are_checked_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "demo_production_ready", None)
    file = tmp_path / "empty.txt"
    file.write_text("\n")
    for option, value, message in (
        ("--runs", 0, "0 is not >= 1"),
        ("--tokens", 0, "0 is not >= 1"),
        ("--tokens", "many", "invalid"),
        ("--out", file, "cannot write there"),
        ("--out", file / "below", "cannot write there"),
        ("--text", file, "empty"),
        ("--text", tmp_path / "missing.txt", "cannot read"),
    ):
        out = () if option == "--out" else ("--out", str(tmp_path))
        with pytest.raises(SystemExit) as stopped:
            demo.main([option, str(value), *out])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and f"argument {option}: " in error and message in error
        assert "usage: python -m gpu_poor.examples.demo" in error


def test_numbers_are_checked_without_the_command_line_too():
    for arguments in ({"n_runs": 0}, {"n_tokens": 0}):
        with pytest.raises(ValueError, match="needs n_runs >= 1"):
            demo.demo_production_ready(**arguments)


# -- the scripts --------------------------------------------------------------------------------


def run_script(*argv, cwd):
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("module", ["examples.demo", "gpu_poor.examples.demo"])
def test_python_m_examples_demo_writes_results(tmp_path, module):
    done = run_script("-m", module, "--runs", 1, "--tokens", 300, "--out", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "stories260k.json").read_text())
    assert saved["verdict"]["text"] in done.stdout
    assert saved["memory"]["reduction"] > 0.7 and len(saved["speed"]["runs"]) == 1


def test_multiple_models_goes_on_after_a_missing_one(tmp_path):
    done = run_script(
        ROOT / "examples" / "test_multiple_models.py",
        *("no/such-model", "stories260k", "--runs", 1, "--tokens", 300),
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "no/such-model" in done.stderr
    assert (tmp_path / "results" / "stories260k.json").exists()
    assert "73.4%" in done.stdout
