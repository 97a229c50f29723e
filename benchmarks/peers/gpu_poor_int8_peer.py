"""gpu-poor, 8 bits, as quantize() does it by default; ``:a8`` and ``:a32`` on request."""

from benchmarks.peers import runner

LABELS = {"": "**gpu-poor int8**"}
REQUIREMENTS = ()
NOTE = ""


def setup(shape: str, threads: int, variant: str):
    from gpu_poor import quantize

    model, before = runner.float_model(shape)
    options = {"activation": variant} if variant else {}
    return runner.TransformersRunner(quantize(model, bits=8, **options), before)
