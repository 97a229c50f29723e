"""What the demo measures besides quality: time of runs, and texts before and after."""

import re
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

PROMPT_TOKENS, NEW_TOKENS, SAMPLE_TOKENS = 128, 32, 48


def available_bytes() -> int:
    """What Linux says can be allocated without swapping; elsewhere assume there is enough."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else sys.maxsize


# -- speed --------------------------------------------------------------------------------------


def timed(n_runs: int, *models: nn.Module) -> list[list[dict[str, float]]]:
    """``n_runs`` runs of each model, the models taking turns, after one run each to warm up."""
    for model in models:
        _run(model)
    turns = [[_run(model) for model in models] for _ in range(n_runs)]
    return [list(runs) for runs in zip(*turns, strict=True)]


@torch.inference_mode()
def _run(model: nn.Module) -> dict[str, float]:
    """Seconds for a prompt, and seconds per token of generating after a prompt of 8 tokens."""
    config = model.config.get_text_config()
    n_prompt = min(PROMPT_TOKENS, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (1, n_prompt), generator=torch.manual_seed(0))
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True)
    prompt_s = time.perf_counter() - start
    start = time.perf_counter()
    _greedy(model, ids[:, :8], min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
    token_s = (time.perf_counter() - start) / NEW_TOKENS
    return {"prompt_tokens": n_prompt, "prompt_s": prompt_s, "token_s": token_s}


def speed(float_runs: list[dict], quantized_runs: list[dict], took_turns: bool) -> dict:
    """Milliseconds and float / quantized ratios of each run, and the median ratios."""
    rows = [
        {
            "float_ms_per_token": 1e3 * f["token_s"],
            "quantized_ms_per_token": 1e3 * q["token_s"],
            "decode_ratio": f["token_s"] / q["token_s"],
            "float_prefill_ms": 1e3 * f["prompt_s"],
            "quantized_prefill_ms": 1e3 * q["prompt_s"],
            "prefill_ratio": f["prompt_s"] / q["prompt_s"],
        }
        for f, q in zip(float_runs, quantized_runs, strict=True)
    ]
    return {
        "decode_ratio": statistics.median(r["decode_ratio"] for r in rows),
        "prefill_ratio": statistics.median(r["prefill_ratio"] for r in rows),
        "prefill_tokens": quantized_runs[0]["prompt_tokens"],
        "new_tokens": NEW_TOKENS,
        "took_turns": took_turns,
        "runs": rows,
    }


# -- texts --------------------------------------------------------------------------------------


@torch.inference_mode()
def _greedy(model: nn.Module, ids: Tensor, **lengths: int) -> Tensor:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths
    )
    return out[0, ids.shape[1] :]


def continuation(model: nn.Module, tokenizer, prompt: str) -> Tensor:
    """Token ids ``[n]`` that the model finds most likely after a prompt, which is left out."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return _greedy(model, ids, max_new_tokens=SAMPLE_TOKENS)


def _text(tokenizer, prompt: str, ids: Tensor) -> str:
    """The text that ids ``[n]`` add to a prompt. Decoded with the prompt and cut off it: alone, a
    tokenizer such as Llama's drops the space that a text's first word begins with."""
    before = tokenizer(prompt)["input_ids"]
    alone = tokenizer.decode(before, skip_special_tokens=True)
    return tokenizer.decode([*before, *ids.tolist()], skip_special_tokens=True)[len(alone) :]


def sample(tokenizer, prompt: str, before: Tensor, after: Tensor) -> dict:
    """Both texts as they go on from the prompt, and how many tokens from the start agree."""
    n = min(len(before), len(after))
    differ = (before[:n] != after[:n]).nonzero()
    return {
        "prompt": prompt,
        "before": _text(tokenizer, prompt, before),
        "after": _text(tokenizer, prompt, after),
        "n_tokens": len(before),
        "n_same": int(differ[0]) if len(differ) else n,
    }
