"""How close formats and strategies stay to the float model, on real trained models and text.

``python -m benchmarks.strategies --models DIR --data DIR``. The matrices of the decoder's blocks
have the format; head and embedding 8 bits. Calibrated on text apart from the text of the figures.
Written after every row; a run that was interrupted goes on where it stopped, at the same commit.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.quality import LENGTH, N_TOKENS, TEXTS, add_outliers

CALIBRATION = {
    "stories260k-llama": "tinystories_train_calib.txt",
    "tinystories-656k-llama": "tinystories_train_calib.txt",
    "books-gpt2-4M": "books_calib.txt",
    "pycode-llama-28m": "pycode_calib.txt",
}
WINDOWS, WINDOW = 128, 512

#: The defaults of ``quantize``, without and with sample_inputs.
DATA_FREE, CALIBRATED = ("equalize", "mse"), ("equalize", "gptq")
FOUR_BITS = ("int4_g64_asym", "int4_g32_asym", "int4_g32")
#: Variant, formats, strategies; what matters most comes first.
CASES = (
    ("plain", FOUR_BITS, (("absmax",), ("mse",), ("hqq",), DATA_FREE)),
    ("plain", ("int8",), (("absmax",), ("mse",), ("hqq",), DATA_FREE)),
    ("outliers", ("int8",), (("absmax",), ("mse",), DATA_FREE)),
    ("outliers", FOUR_BITS[:1], (("mse",), DATA_FREE)),
    ("plain", FOUR_BITS[:2], (CALIBRATED, ("awq", "gptq"))),
    ("outliers", ("int8",), (("smoothquant", "mse"), CALIBRATED)),
    ("plain", FOUR_BITS[:2], (("awq", "mse"), ("smoothquant", "gptq"))),
    ("plain", FOUR_BITS[2:], (CALIBRATED, ("awq", "gptq"), ("awq", "mse"))),
    ("outliers", FOUR_BITS[:1], (CALIBRATED, ("awq", "gptq"))),
    ("plain", ("int8",), (CALIBRATED,)),
)  # fmt: skip


def cases():
    """``(variant, format, strategies)`` of every row of a model."""
    return [(v, f, s) for v, formats, strategies in CASES for f in formats for s in strategies]


def needs_data(strategies: tuple[str, ...]) -> bool:
    from gpu_poor.strategies import STRATEGIES

    return any(STRATEGIES[name].needs_inputs for name in strategies)


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits of the quantized matrices in the blocks, all scales and padding included."""
    from gpu_poor.nn import QuantizedModule
    from gpu_poor.plan import block_list

    stored = weights = 0
    for module in model.get_submodule(block_list(model)).modules():
        if isinstance(module, QuantizedModule):
            stored += sum(getattr(module, name).nbytes for name in module.storage())
            weights += sum(torch.Size(shape).numel() for shape in module.shapes.values())
    return 8 * stored / weights


class Bench:
    """One model: its variants, its reference, and the ids it is calibrated on."""

    def __init__(self, folder: Path, text: str, calibration: str, n_tokens: int, windows: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from gpu_poor import metrics
        from gpu_poor.samples import token_rows

        tokenizer = AutoTokenizer.from_pretrained(folder)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.models = {"plain": plain, "outliers": add_outliers(copy.deepcopy(plain))}
        excerpt = text[: 16 * n_tokens]
        self.reference = metrics.record(plain, excerpt, tokenizer, length=LENGTH, n_tokens=n_tokens)
        self.rows: list[Tensor] = token_rows(
            plain, calibration, tokenizer, length=WINDOW, n_tokens=windows * WINDOW
        )

    def measure(self, variant: str, form: str, strategies: tuple[str, ...]) -> dict:
        from gpu_poor import metrics, quantize
        from gpu_poor.plan import block_list

        model = copy.deepcopy(self.models[variant])
        data = self.rows if needs_data(strategies) else None
        start = time.perf_counter()
        quantize(model, 8, overrides={block_list(model): form}, strategy=strategies,
                 sample_inputs=data, verbose=False)  # fmt: skip
        return {
            "seconds": time.perf_counter() - start,
            "calibration_tokens": sum(row.shape[1] for row in data or ()),
            "bits_per_weight": bits_per_weight(model),
            "remarks": model.gpu_poor_receipt.remarks,
            "quality": metrics.evaluate(model, self.reference).to_dict(),
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder of model folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--only", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 512 tokens each")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=machine.RESULTS / "strategies.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    scale = 8 if args.quick else 1
    n_tokens, windows = N_TOKENS // scale, max(1, args.windows // scale)
    record = {"header": machine.header(args.threads), "n_tokens": n_tokens, "complete": False,
              "rows": earlier_rows(args.json, n_tokens)}  # fmt: skip
    done = {_key(row) for row in record["rows"]}
    for name in args.only:
        if not (args.models / name).is_dir():
            print(f"{name}: not in {args.models.name}, left out", file=sys.stderr)
            continue
        todo = [case for case in cases() if (name, *case) not in done]
        if not todo:
            continue
        texts = [(args.data / part[name]).read_text() for part in (TEXTS, CALIBRATION)]
        bench = Bench(args.models / name, *texts, n_tokens, windows)
        for variant, form, strategies in todo:
            row = {"model": name, "variant": variant, "format": form, "strategy": list(strategies)}
            row |= bench.measure(variant, form, strategies) | {"commit": machine.commit()[0]}
            record["rows"].append(row)
            print("{0} {1} {2} {3}: KL {kl_mean:.5f}, top-1 {top1:.2%}".format(
                *row.values(), **row["quality"]), flush=True)  # fmt: skip
            machine.save(record, args.json, "")
    record["complete"] = True
    machine.save(record, args.json, "")
    return 0


def earlier_rows(path: Path, n_tokens: int) -> list[dict]:
    """Those of an interrupted run at this commit."""
    record = json.loads(path.read_text()) if path.exists() else None
    same = record and (record["header"]["commit"], record["n_tokens"]) == (
        machine.commit()[0], n_tokens)  # fmt: skip
    return record["rows"] if same and not record["complete"] else []


def _key(row: dict) -> tuple:
    return row["model"], row["variant"], row["format"], tuple(row["strategy"])


if __name__ == "__main__":
    sys.exit(main())
