"""How much worse int8 answers, on real trained models and text, for each activation mode.

``python -m benchmarks.quality --models DIR --data DIR``. Every model also as its outlier variant:
the same function, but with the massive activation channels that large models have and small ones
hide. Definitions of the figures: gpu_poor.metrics. All weights are quantized, embeddings too.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks import machine

#: model folder -> (evaluation text, characters of it that are tokenized)
TEXTS = {
    "stories260k-llama": "tinystories_valid.txt",
    "tinystories-656k-llama": "tinystories_valid.txt",
    "books-gpt2-4M": "books_valid.txt",
    "pycode-llama-28m": "pycode_valid.txt",
}
MODES = ("a8", "a16", "a32")
#: Predicted tokens per model: standard errors of mean KL of one or two %.
N_TOKENS = 8192
LENGTH = 256
SAMPLE_TOKENS = 48
#: The outlier variant: every 17th channel from the third, 30 times as large.
FIRST, STEP, GAIN = 3, 17, 30.0


def _pairs(model: nn.Module):
    """(norm, linears it feeds) of every block of a Llama or GPT-2."""
    for block in model.base_model.modules():
        if hasattr(block, "input_layernorm"):
            attention, mlp = block.self_attn, block.mlp
            yield block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)
            yield block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)
        elif hasattr(block, "ln_1"):
            yield block.ln_1, (block.attn.c_attn,)
            yield block.ln_2, (block.mlp.c_fc,)


@torch.no_grad()
def add_outliers(model: nn.Module) -> nn.Module:
    """Multiply norm channels by 30 and divide the columns behind them: the same function."""
    for norm, linears in _pairs(model):
        norm.weight[FIRST::STEP] *= GAIN
        if getattr(norm, "bias", None) is not None:
            norm.bias[FIRST::STEP] *= GAIN
        for linear in linears:
            # nn.Linear has inputs as columns, GPT-2's Conv1D as rows.
            weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
            weight[:, FIRST::STEP] /= GAIN
    return model


@torch.inference_mode()
def sample(model: nn.Module, tokenizer, text: str) -> str:
    """Greedy continuation of a text."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def measure(folder: Path, text: str, n_tokens: int) -> list[dict]:
    """Rows of one model: plain and with outliers, each in every mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpu_poor import metrics, quantize

    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Two characters a token at the very least: enough text, without tokenizing megabytes.
    excerpt, prompt = text[: 16 * n_tokens], text[:200].rsplit(" ", 1)[0]
    reference = metrics.record(original, excerpt, tokenizer, length=LENGTH, n_tokens=n_tokens)
    before = sum(p.numel() for p in original.parameters()) * 4
    rows = []
    for variant in ("plain", "outliers"):
        base = copy.deepcopy(original)
        if variant == "outliers":
            add_outliers(base)
            unchanged = metrics.evaluate(base, reference).to_dict()
            rows.append(_row(folder, variant, "float", before, before, unchanged))
        for mode in MODES:
            model = quantize(copy.deepcopy(base), bits=8, activation=mode, verbose=False)
            quality = metrics.evaluate(model, reference).to_dict()
            after = model.gpu_poor_receipt.bytes_after
            rows.append(_row(folder, variant, mode, before, after, quality))
            if variant == "plain" and mode == "a16":
                rows[-1]["sample"] = {
                    "prompt": prompt,
                    "float": sample(original, tokenizer, prompt),
                    "int8": sample(model, tokenizer, prompt),
                }
            print("{model} {variant} {mode}: KL {kl:.2e}, ppl {ratio:.4f}, top-1 {top1:.2%}".format(
                **rows[-1], kl=quality["kl_mean"], ratio=quality["perplexity_ratio"],
                top1=quality["top1"]))  # fmt: skip
    return rows


def _row(folder: Path, variant: str, mode: str, before: int, after: int, quality: dict) -> dict:
    return {"model": folder.name, "variant": variant, "mode": mode, "bytes_before": before,
            "bytes": after, "quality": quality}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder of model folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation texts")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="default: benchmarks/results/quality.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    n_tokens = N_TOKENS // 8 if args.quick else N_TOKENS
    record = {"header": machine.header(args.threads), "n_tokens": n_tokens, "rows": []}
    for name, text in TEXTS.items():
        if not (args.models / name).is_dir():
            print(f"{name}: not in {args.models.name}, left out", file=sys.stderr)
            continue
        text = (args.data / text).read_text()
        record["rows"] += measure(args.models / name, text, n_tokens)
    machine.save(record, args.json, "quality.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
