"""The main job on one model, measured: memory, speed, quality, texts before and after, a verdict.

python -m gpu_poor.examples.demo gpt2-large          # or a folder; prints, writes results/
results = demo.demo_production_ready("gpt2-large")   # the same figures as a dict
"""

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

import gpu_poor
from gpu_poor import assets, memory, metrics
from gpu_poor.examples import measure
from gpu_poor.examples.models import COMMAND, GPT2_SHAPES, PACKAGED, Loaded, load_float
from gpu_poor.examples.report import report

#: The verdict asks for all of these. KL and top-1: as close to the float model as llama.cpp's
#: Q8_0 is published to be on 7-8B models (KL 4e-4 to 1.4e-3, same top token 97.7 to 98.9 %).
#: Speed: 5 % for the noise of a shared machine.
THRESHOLDS = {
    "memory reduction": (">=", 0.70),
    "decode speed ratio": (">=", 0.95),
    "mean KL divergence": ("<=", 1e-3),
    "perplexity ratio": ("<=", 1.003),
    "same next token": (">=", 0.975),
}

#: Speed of a smaller model is shown but not judged: its weights are read in under 3 ms, and what
#: is timed is Python and the waking of threads.
SPEED_MIN_PARAMETERS = 20_000_000

STORY_PROMPTS = ("Once upon a time, there was a little girl", "The dog and the cat went to the")
PROMPTS = ("The most important thing about memory is", "Once upon a time, there was a")


def demo_production_ready(
    name_or_path: str = PACKAGED,
    random_weights: bool = False,
    *,
    activation: str = "a16",
    n_runs: int = 5,
    n_tokens: int = 8192,
    text: str | None = None,
    prompts: tuple[str, ...] | None = None,
    verbose: bool = True,
) -> dict:
    """Quantize a causal LM and measure it against its float32 original.

    Args:
        name_or_path: "stories260k" (ships with the package), a folder, or a name such as
            "gpt2-large", downloaded if possible.
        random_weights: build gpt2, gpt2-medium, gpt2-large or distilgpt2 with random weights if
            it cannot be downloaded; then memory and speed are measured, quality is not.
        activation: passed to :func:`gpu_poor.quantize`.
        n_runs: timed runs; float and quantized take turns if both fit in memory.
        n_tokens: how many tokens the quality is measured on.
        text: what to measure quality on; default: the stories in the package.
        prompts: sample texts to continue.
        verbose: print a report.

    Returns:
        A dict that ``json.dumps`` takes: model, memory, layers, speed, quality, samples,
        verdict, environment.

    Raises:
        OSError: the model is not to be had; the message says what to do.
        ImportError: transformers is not installed.
        ValueError: ``n_runs`` or ``n_tokens`` < 1.
    """
    if n_runs < 1 or n_tokens < 1:
        raise ValueError(f"needs n_runs >= 1 and n_tokens >= 1, got {n_runs} and {n_tokens}")
    if verbose:
        print(f"loading and measuring {name_or_path} ...", flush=True)
    loaded = load_float(name_or_path, random_weights)
    model = loaded.model
    prompts = prompts or (STORY_PROMPTS if name_or_path == PACKAGED else PROMPTS)
    results = {
        "model": name_or_path,
        "source": loaded.source,
        "architecture": type(model).__name__,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        **_before_and_after(loaded, activation, n_runs, n_tokens, text, prompts),
        "environment": _environment(),
    }
    results["verdict"] = verdict(results)
    if verbose:
        print("\n" + report(results))
    return results


def _before_and_after(loaded: Loaded, activation, n_runs, n_tokens, text, prompts) -> dict:
    """Measure the float model, quantize it, measure again: the figures of both.

    Side by side takes 2.25 times the float model's bytes: this one, and the copy that quantize()
    turns into int8. If that does not fit, one is measured and then the other.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    side_by_side = 1.5 * memory.parameter_bytes(model) < measure.available_bytes()
    text = assets.valid_text() if text is None else text
    prompts = () if loaded.is_random else prompts
    before = [measure.continuation(model, tokenizer, prompt) for prompt in prompts]
    reference, quantized = model, model
    if side_by_side:
        quantized = copy.deepcopy(model)
    else:
        float_runs = measure.timed(n_runs, model)[0]
        if not loaded.is_random:
            reference = metrics.record(model, text, tokenizer, n_tokens=n_tokens)

    gpu_poor.quantize(quantized, activation=activation, verbose=False)
    if side_by_side:
        float_runs, runs = measure.timed(n_runs, model, quantized)
    else:
        runs = measure.timed(n_runs, quantized)[0]
    quality = "unmeasured"
    if not loaded.is_random:
        source = (text, tokenizer) if side_by_side else ()  # a recording has its own
        quality = metrics.evaluate(quantized, reference, *source, n_tokens=n_tokens).to_dict()
    after = [measure.continuation(quantized, tokenizer, prompt) for prompt in prompts]

    receipt = quantized.gpu_poor_receipt
    return {
        "activation": receipt.activation,
        "kernel": receipt.kernel,
        "quantize_s": receipt.seconds,
        "memory": _memory(receipt),
        "layers": _layers(receipt),
        "speed": measure.speed(float_runs, runs, took_turns=side_by_side),
        "quality": quality,
        "samples": [
            measure.sample(tokenizer, *texts) for texts in zip(prompts, before, after, strict=True)
        ],
    }


def verdict(results: dict) -> dict:
    """Compare the measured figures with :data:`THRESHOLDS`.

    Returns:
        ``{"production_ready": True | False | None, "checks": [...], "text": str}``; None if
        quality was not measured and nothing else failed.
    """
    quality = results["quality"] if isinstance(results["quality"], dict) else {}
    values = {
        "memory reduction": results["memory"]["reduction"],
        "decode speed ratio": results["speed"]["decode_ratio"],
        "mean KL divergence": quality.get("kl_mean"),
        "perplexity ratio": quality.get("perplexity_ratio"),
        "same next token": quality.get("top1"),
    }
    unjudged = dict.fromkeys(values, "unmeasured")
    if results["n_parameters"] < SPEED_MIN_PARAMETERS:
        unjudged["decode speed ratio"] = "not judged: too small"
        values["decode speed ratio"] = None
    checks = []
    for name, (sense, limit) in THRESHOLDS.items():
        value = values[name]
        passed = None
        if value is not None:  # a NaN passes neither
            passed = value >= limit if sense == ">=" else value <= limit
        needs = f"needs {sense} {limit:g}" if value is not None else unjudged[name]
        checks.append({"check": name, "value": value, "needs": needs, "passed": passed})
    failed = [c["check"] for c in checks if c["passed"] is False]
    if failed:
        ready, text = False, "not ready: fails " + ", ".join(failed)
    elif not quality:
        ready, text = None, "no verdict: random weights, so quality is unmeasured; the rest passes"
    elif values["decode speed ratio"] is None:
        ready, text = True, "ready: smaller, and the same answers; too small a model to judge speed"
    else:
        ready, text = True, "ready: smaller, not slower, and the same answers"
    return {"production_ready": ready, "checks": checks, "text": text}


# -- the receipt as figures ----------------------------------------------------------------------


def _memory(receipt) -> dict:
    components = {
        name: {"before_mb": receipt.before[name] / 1e6, "after_mb": receipt.after[name] / 1e6}
        for name in receipt.before
        if receipt.before[name]
    }
    return {
        "before_mb": receipt.bytes_before / 1e6,
        "after_mb": receipt.bytes_after / 1e6,
        "reduction": receipt.reduction,
        "components": components,
    }


def _layers(receipt) -> dict:
    shared = receipt.before.get("shared lm_head", 0) > 0
    return {
        "int8_linear": receipt.modules.get("linear", 0),
        "int8_embedding": receipt.modules.get("embedding", 0),
        "int8_experts": receipt.modules.get("experts", 0),
        "shared_lm_head": shared,
        "kept": [
            {"module": k.module_class, "count": k.count, "mb": k.n_bytes / 1e6, "why": k.reason}
            for k in receipt.kept
        ],
    }


def _environment() -> dict:
    import transformers

    return {
        "gpu_poor": gpu_poor.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": gpu_poor.isa.current(),
    }


# -- command line -------------------------------------------------------------------------------


def at_least_one(text: str) -> int:
    """An argparse type."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not >= 1")
    return number


def writable_folder(text: str) -> Path:
    """An argparse type: create the folder now, not after minutes of measuring."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write there: {error}") from error
    return folder


def text_of_file(text: str) -> str:
    """An argparse type: the content of a file, which must not be empty."""
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read it as UTF-8: {error}") from error
    if not content.strip():
        raise argparse.ArgumentTypeError(f"{text} is empty")
    return content


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every script that runs the demo."""
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help=f"if {', '.join(GPT2_SHAPES)} cannot be downloaded, build it with random weights",
    )
    parser.add_argument("--runs", type=at_least_one, default=5, help="timed runs, >= 1 (default 5)")
    parser.add_argument(
        "--tokens",
        type=at_least_one,
        default=8192,
        help="tokens quality is measured on, >= 1 (default 8192)",
    )
    parser.add_argument(
        "--out",
        type=writable_folder,
        default="results",
        help="folder for the JSON (default results)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the demo on one model and write ``results/<model>.json``."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument(
        "model",
        nargs="?",
        default=PACKAGED,
        help=f"a folder, a name on the hub, or {PACKAGED} (default; ships with the package)",
    )
    add_options(parser)
    parser.add_argument("--activation", default="a16", help="a8, a16 (default) or a32")
    parser.add_argument("--text", type=text_of_file, help="file to measure quality on")
    args = parser.parse_args(argv)
    try:
        results = demo_production_ready(
            args.model,
            args.random_weights,
            activation=args.activation,
            n_runs=args.runs,
            n_tokens=args.tokens,
            text=args.text,
        )
        print(f"\nwritten to {write(results, args.out)}")
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write(results: dict, folder: Path) -> Path:
    """Write ``<folder>/<last part of the model's name>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    name = os.path.basename(os.path.normpath(results["model"])) or "model"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
