"""The demo on several models, one line each: ``python examples/test_multiple_models.py``.

Writes results/<model>.json for each. Models that cannot be had are reported and make the exit
status 1, unless ``--random-weights`` builds them for memory and speed only.
"""

import argparse
import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, any directory

from gpu_poor import memory
from gpu_poor.examples import demo

MODELS = ("stories260k", "distilgpt2", "gpt2", "gpt2-medium", "gpt2-large")


def line(r: dict) -> str:
    """One row of the summary table."""
    m, s, q = r["memory"], r["speed"], r["quality"]
    kl = f"{q['kl_mean']:.1e}" if isinstance(q, dict) else "unmeasured"
    return (
        f"{r['model'][-28:]:<28}{m['before_mb']:>10.1f}{m['after_mb']:>10.1f}{m['reduction']:>9.1%}"
        f"{s['decode_ratio']:>9.2f}x{s['prefill_ratio']:>9.2f}x{kl:>12}  {r['verdict']['text']}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, help=f"default: {' '.join(MODELS)}")
    demo.add_options(parser)
    args = parser.parse_args(argv)
    rows, missing = [], []
    for name in args.models:
        try:
            results = demo.demo_production_ready(
                name, args.random_weights, n_runs=args.runs, n_tokens=args.tokens
            )
        except OSError as error:
            missing.append(f"{name}: {error}")
            continue
        demo.write(results, args.out)
        rows.append(line(results))
        gc.collect()
        memory.trim()
        print("\n" + "=" * 100 + "\n")
    print(
        f"{'model':<28}{'float MB':>10}{'int8 MB':>10}{'smaller':>9}"
        f"{'decode':>10}{'prefill':>10}{'mean KL':>12}"
    )
    print("\n".join(rows))
    print("\n".join(missing), file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
