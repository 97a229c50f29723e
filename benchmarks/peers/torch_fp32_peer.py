"""transformers as it comes: float32."""

from benchmarks.peers import runner

LABELS = {"": "transformers fp32"}
REQUIREMENTS = ()
NOTE = ""


def setup(shape: str, threads: int, variant: str):
    return runner.TransformersRunner(*runner.float_model(shape))
