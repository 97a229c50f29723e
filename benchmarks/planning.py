"""Do plans keep their promises? Predicted against measured KL divergence and bytes, on real models.

``python -m benchmarks.planning --models DIR --data DIR``. Three questions for each model: what one
module alone costs in a format, what whole plans cost, random ones and ones of one size among them,
and how much of a memory target a plan uses. Predictions from the calibration text, from text that
the model writes itself, and from the weights alone; measured on the evaluation text, through
``quantize``, activations included.
"""

import argparse
import copy
import itertools
import math
import random
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.quality import TEXTS

CALIBRATION = {"tinystories_valid.txt": "tinystories_train_calib.txt"}
#: Fractions of the float32 model.
TARGETS = (0.16, 0.18, 0.20, 0.23, 0.30, 0.45)
BASES = ("samples", "own text", "weights")
#: (module, format) pairs measured alone; random plans; random plans of one size.
N_ALONE, N_RANDOM, N_EQUAL = 60, 6, 8
N_TOKENS = 4096
#: The size of plans of one size, of the float32 weights.
EQUAL = 0.19


def ranks(values: list[float]) -> Tensor:
    """Ranks from 0, those of equal values averaged: float64."""
    x = torch.tensor(values, dtype=torch.float64)
    return (x[:, None] > x).double().sum(1) + ((x[:, None] == x).double().sum(1) - 1) / 2


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of the ranks."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


class Trial:
    """One model with its texts, its units, and what each format is predicted to cost them."""

    def __init__(self, folder: Path, data: Path, text: str, n_tokens: int):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from gpu_poor import metrics, sensitivity
        from gpu_poor.formats import FORMATS
        from gpu_poor.plan import make_plan
        from gpu_poor.samples import token_rows

        self.name = folder.name
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        excerpt = (data / text).read_text()[: 16 * n_tokens]
        self.reference = metrics.record(self.model, excerpt, self.tokenizer, n_tokens=n_tokens)
        source = CALIBRATION.get(text, text.replace("_valid", "_calib"))
        self.calibration = (data / source).read_text()[: 16 * n_tokens]
        self.units = sensitivity.units(make_plan(self.model))
        self.forms = list(FORMATS)
        rows = {
            "samples": token_rows(self.model, self.calibration, self.tokenizer, n_tokens=n_tokens),
            "own text": sensitivity.own_text(self.model),
            "weights": None,
        }
        self.tables = {}
        for basis, texts in rows.items():
            known = texts and sensitivity.fisher(self.model, self.units, texts)
            self.tables[basis] = [
                dict(
                    zip(FORMATS, sensitivity.losses(u, list(FORMATS.values()), known), strict=True)
                )
                for u in self.units
            ]

    def predicted(self, formats: list[str | None]) -> dict[str, float]:
        """By basis, for one format (None: float) for each unit."""
        return {
            basis: sum(unit[f] for unit, f in zip(table, formats, strict=True) if f is not None)
            for basis, table in self.tables.items()
        }

    def measured(self, formats: list[str | None]) -> dict:
        """Bytes, mean KL and its standard error of the model quantized so."""
        from gpu_poor import memory, metrics, quantize

        names = [unit.targets[0].names[0] for unit in self.units]
        chosen = dict(zip(names, formats, strict=True))
        model = quantize(
            copy.deepcopy(self.model),
            overrides={name: form for name, form in chosen.items() if form is not None},
            exclude=[name for name, form in chosen.items() if form is None],
            allow_partial=True,
            verbose=False,
        )
        quality = metrics.evaluate(model, self.reference)
        return {"bytes": memory.parameter_bytes(model), "kl": quality.kl_mean,
                "kl_se": quality.kl_mean_se}  # fmt: skip

    def row(self, kind: str, formats: list[str | None], **more) -> dict:
        row = {"model": self.name, "kind": kind, **more, "predicted": self.predicted(formats)}
        row |= self.measured(formats)
        shown = ", ".join(f"{basis} {loss:.2e}" for basis, loss in row["predicted"].items())
        print(f"{self.name} {kind}: {shown}; measured {row['kl']:.2e}, {row['bytes']} bytes")
        return row

    # -- the three questions -------------------------------------------------------------------

    def alone(self, rng: random.Random, n: int) -> list[dict]:
        """Modules on their own: some pairs with a format, each as likely as another."""
        pairs = list(itertools.product(range(len(self.units)), self.forms))
        rows = []
        for unit, form in rng.sample(pairs, min(n, len(pairs))):
            formats = [form if i == unit else None for i in range(len(self.units))]
            rows.append(self.row("module", formats, module=self.units[unit].name, format=form))
        return rows

    def planned(self) -> list[dict]:
        """Plans for targets, by each basis; predicted bytes beside measured ones."""
        from gpu_poor import plan_memory

        rows = []
        for target, basis in itertools.product(TARGETS, ("samples", "own text")):
            samples = self.calibration if basis == "samples" else None
            try:
                plan = plan_memory(
                    self.model, target, sample_inputs=samples, tokenizer=self.tokenizer
                )
            except ValueError as error:
                why = str(error).split(", with the formats")[0]
                rows.append({"model": self.name, "kind": "planned", "target": target,
                             "basis": basis, "error": why})  # fmt: skip
                continue
            formats = [decision.format for decision in plan.decisions]
            rows.append(self.row("planned", formats, target=target, basis=basis,
                                 target_bytes=plan.target_bytes, gap=plan.gap,
                                 predicted_bytes=plan.predicted_bytes))  # fmt: skip
        return rows

    def senseless(self, rng: random.Random) -> list[dict]:
        """Plans of no sense: each unit at random, by odds that differ from plan to plan."""
        rows = []
        for _ in range(N_RANDOM):
            odds = [rng.random() ** 3 for _ in self.forms]
            rows.append(self.row("random", rng.choices(self.forms, odds, k=len(self.units))))
        return rows

    def equal(self, rng: random.Random) -> list[dict]:
        """Plans of one size, each the best one for predictions made wrong at random."""
        from gpu_poor import knapsack
        from gpu_poor.formats import FORMATS, stored_bytes

        table = self.tables["samples"]
        sizes = [
            {f: sum(stored_bytes(form, *w.rows.shape) for w in unit.weights.values())
             for f, form in FORMATS.items()} for unit in self.units
        ]  # fmt: skip
        budget = int(
            EQUAL * sum(w.rows.numel() * 4 for u in self.units for w in u.weights.values())
        )
        rows = []
        for _ in range(N_EQUAL):
            wrong = [
                {f: loss * 10 ** rng.gauss(0, 1) for f, loss in unit.items()} for unit in table
            ]
            options = [
                [(size[f], loss[f]) for f in self.forms]
                for size, loss in zip(sizes, wrong, strict=True)
            ]
            best = knapsack.choose(options, budget)
            rows.append(self.row("equal", [self.forms[i] for i in best.indices]))
        return rows


def agreement(rows: list[dict], basis: str) -> dict:
    """How predictions of a basis go with what was measured: rank correlation, and their ratio."""
    pairs = [(row["predicted"][basis], row["kl"]) for row in rows]
    logs = torch.tensor([math.log(max(p, 1e-30) / m) for p, m in pairs], dtype=torch.float64)
    return {
        "n": len(pairs),
        "spearman": spearman(*map(list, zip(*pairs, strict=True))),
        "ratio": math.exp(float(logs.mean())),
        "ratio_least": math.exp(float(logs.min())),
        "ratio_most": math.exp(float(logs.max())),
    }


def summary(rows: list[dict]) -> list[dict]:
    """:func:`agreement` of each model, kind of row and basis."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and "kl" in row]
        kinds = {
            "modules": ("module",),
            "plans": ("planned", "random", "equal"),
            "equal": ("equal",),
        }
        for (name, kind), basis in itertools.product(kinds.items(), BASES):
            chosen = [row for row in mine if row["kind"] in kind]
            found.append({"model": model, "rows": name, "basis": basis, **agreement(chosen, basis)})
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True, help="folder of model folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--only", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens and modules")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="default: benchmarks/results/planning.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    n_tokens, n_alone = (N_TOKENS, N_ALONE) if not args.quick else (N_TOKENS // 4, N_ALONE // 4)
    record = {"header": machine.header(args.threads), "n_tokens": n_tokens, "rows": []}
    for name in args.only:
        if not (args.models / name).is_dir():
            print(f"{name}: not in {args.models.name}, left out", file=sys.stderr)
            continue
        trial = Trial(args.models / name, args.data, TEXTS[name], n_tokens)
        rng = random.Random(0)
        record["rows"] += [
            *trial.alone(rng, n_alone), *trial.planned(), *trial.senseless(rng), *trial.equal(rng)
        ]  # fmt: skip
    record["summary"] = summary(record["rows"])
    for row in record["summary"]:
        print("{model} {rows} {basis}: n {n}, Spearman {spearman:.3f}, predicted / measured "
              "{ratio:.2f} ({ratio_least:.2f} to {ratio_most:.2f})".format(**row))  # fmt: skip
    machine.save(record, args.json, "planning.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
