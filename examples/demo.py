"""``python -m examples.demo gpt2-large``: quantize one model, measure it, write results/*.json."""

import sys

from gpu_poor.examples.demo import main

if __name__ == "__main__":
    sys.exit(main())
