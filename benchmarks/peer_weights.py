"""The quality of the rivals' 4-bit weights: their package rounds and dequantizes, we evaluate.

``python -m benchmarks.peer_weights --models DIR --data DIR --json strategies.json`` adds its rows
to the record that benchmarks.strategies has written. The matrices of the decoder's blocks go
through the rival's own quantizer and back; head and embedding are our 8 bits, as in every other
row, so only the weights of the blocks differ. Activations stay float in the blocks, which favours
the rivals. A rival that is not installed is left out, with a word.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.quality import LENGTH, N_TOKENS, TEXTS

#: A weight ``[N, K]`` -> what is left of it, and the bits it was stored in, scales included.
Rounding = Callable[[Tensor], tuple[Tensor, int]]


def llama_cpp(name: str) -> Rounding:
    """Blocks of 32 of a row; what is no multiple stays in float16, as in llama.cpp."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]

    def rounding(weight: Tensor) -> tuple[Tensor, int]:
        if weight.shape[1] % 32:
            return weight.half().float(), 16 * weight.numel()
        stored = gguf.quants.quantize(weight.numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(stored, kind)), 8 * stored.nbytes

    return rounding


def bitsandbytes(kind: str) -> Rounding:
    """Blocks of 64 weights with a float32 maximum each, its default without double quantization."""
    from bitsandbytes import functional

    def rounding(weight: Tensor) -> tuple[Tensor, int]:
        stored, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        bits = 8 * (stored.nbytes + state.absmax.nbytes)
        return functional.dequantize_4bit(stored, state), bits

    return rounding


def hqq(group: int) -> Rounding:
    """Scale and zero in float16, as its models store them."""
    from hqq.core.quantize import Quantizer

    def rounding(weight: Tensor) -> tuple[Tensor, int]:
        if weight.numel() % group:
            return weight.half().float(), 16 * weight.numel()
        stored, meta = Quantizer.quantize(
            weight, nbits=4, group_size=group, axis=1, device="cpu", compute_dtype=torch.float16
        )
        bits = 4 * weight.numel() + 16 * (meta["scale"].numel() + meta["zero"].numel())
        return Quantizer.dequantize(stored, meta).float(), bits

    return rounding


def quanto(group: int) -> Rounding:
    """A scale and a shift, 16 bits each in 16-bit models; rows not filled by groups are whole."""
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    def rounding(weight: Tensor) -> tuple[Tensor, int]:
        size = None if weight.shape[1] % group else group
        scale, shift = MaxOptimizer()(weight, qint4, 0, size)
        left = quantize_weight(weight, qint4, 0, scale, shift, size).dequantize()
        return left, 4 * weight.numel() + 16 * (scale.numel() + shift.numel())

    return rounding


#: Name -> (what makes its rounding, argument).
PEERS = {
    "llama.cpp Q4_0": (llama_cpp, "Q4_0"),
    "llama.cpp Q4_1": (llama_cpp, "Q4_1"),
    "bitsandbytes nf4": (bitsandbytes, "nf4"),
    "HQQ g64": (hqq, 64),
    "HQQ g32": (hqq, 32),
    "quanto qint4 g64": (quanto, 64),
    "quanto qint4 g32": (quanto, 32),
}


def installed() -> Iterator[tuple[str, Rounding]]:
    for name, (make, argument) in PEERS.items():
        try:
            yield name, make(argument)
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)


@torch.no_grad()
def apply(model: nn.Module, rounding: Rounding) -> float:
    """Replace the matrices of the blocks; returns the bits per weight that were stored."""
    from gpu_poor.plan import block_list, make_plan

    prefix, bits, weights = f"{block_list(model)}.", 0, 0
    for target in make_plan(model).targets:
        if target.name.startswith(prefix) and target.is_linear:
            rows = target.rows()["weight"]
            left, stored = rounding(rows.detach().contiguous())
            rows.copy_(left)
            bits, weights = bits + stored, weights + rows.numel()
    return bits / weights


def measure(folder: Path, text: str, n_tokens: int) -> Iterator[dict]:
    """A row for every rival."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gpu_poor import metrics, quantize
    from gpu_poor.plan import block_list

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = metrics.record(
        plain, text[: 16 * n_tokens], tokenizer, length=LENGTH, n_tokens=n_tokens
    )
    for name, rounding in installed():
        model = copy.deepcopy(plain)
        bits = apply(model, rounding)
        quantize(model, 8, exclude=block_list(model), allow_partial=True, verbose=False)
        quality = metrics.evaluate(model, reference).to_dict()
        row = {"model": folder.name, "peer": name, "bits_per_weight": bits, "quality": quality}
        print("{model} {peer}: {bits_per_weight:.2f} bits, KL {kl:.5f}".format(
            **row, kl=quality["kl_mean"]), flush=True)  # fmt: skip
        yield row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder of model folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "strategies.json")
    args = parser.parse_args(argv)
    record = json.loads(args.json.read_text())
    record["peers"] = []
    for name, text in TEXTS.items():
        if (args.models / name).is_dir():
            text = (args.data / text).read_text()
            record["peers"] += measure(args.models / name, text, record.get("n_tokens", N_TOKENS))
    machine.save(record, args.json, "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
