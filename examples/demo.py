"""The demo of a checkout; ``python -m gpu_poor.examples.demo`` is the same, with a wheel too."""

import sys

from gpu_poor.examples.demo import main

if __name__ == "__main__":
    sys.exit(main())
