"""llama.cpp for AVX2 and nothing newer; otherwise llama_cpp_peer.py."""

from functools import partial

from benchmarks.peers import llama_cpp_peer as native

LABELS = {"q8_0": "llama.cpp Q8_0, AVX2 only", "q4_0": "llama.cpp Q4_0, AVX2 only"}
REQUIREMENTS = native.REQUIREMENTS
NOTE = "built here with -DGGML_NATIVE=OFF, AVX2, FMA, F16C and BMI2, without AVX-512, VNNI and AMX"

install = partial(native.install, instructions=native.AVX2)
setup = partial(native.setup, peer="llama_cpp_avx2")
