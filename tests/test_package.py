"""The package's front: public names, what works without transformers, and messages that help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_poor
from gpu_poor import isa

ROOT = Path(__file__).parents[1]


def run(script, **env):
    """Run a script in a process of its own, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error:gpu_poor", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_dir_lists_the_public_names_only():
    names = {name for name in dir(gpu_poor) if not re.fullmatch("__.*__", name)}
    assert names | {"__version__"} == set(gpu_poor.__all__)


def test_assets_is_an_attribute():
    done = run("import gpu_poor; print(gpu_poor.assets.STORIES260K)")
    assert Path(done.stdout.strip(), "config.json").is_file(), done.stderr


@pytest.mark.parametrize(
    "use",
    [
        "gpu_poor.load",
        "from gpu_poor import GpuPoorConfig",
        "from gpu_poor.quantization import QuantizedModel",
        "from gpu_poor.attention import use_lsh_attention",
        "from gpu_poor.examples import demo; demo.demo_production_ready()",
    ],
)
def test_without_transformers_the_message_says_what_to_install(use):
    done = run(f"import sys; sys.modules['transformers'] = None\nimport gpu_poor\n{use}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: "), done.stderr
    assert 'pip install "gpu-poor[hf]"' in last
    assert "The above exception was the direct cause" in done.stderr


def test_the_demo_without_transformers_prints_a_line_and_no_traceback(tmp_path):
    done = run(
        "import sys; sys.modules['transformers'] = None\n"
        f"from gpu_poor.examples import demo; sys.exit(demo.main(['--out', {str(tmp_path)!r}]))"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and 'pip install "gpu-poor[hf]"' in done.stderr


def test_an_import_error_of_another_kind_is_passed_on():
    with pytest.raises(ImportError, match="^broken$"), gpu_poor._needs_transformers("x"):
        raise ImportError("broken", name="numpy")


def test_every_instruction_set_is_known():
    compiled = re.findall(r"^GP_IMPL\((\w+)\)", (ROOT / "csrc" / "impls.h").read_text(), re.M)
    for name in isa.KNOWN[1:]:
        assert [impl for impl in compiled if impl.endswith(name)], name
    assert [name for name in isa.KNOWN if name in isa.available()] == list(isa.available())


def test_an_instruction_set_the_cpu_lacks_is_not_an_unknown_one(monkeypatch):
    monkeypatch.setattr(isa, "available", lambda: ("torch", "ref"))
    before = isa.current()
    with pytest.raises(ValueError, match="this CPU has no amx.*available: torch, ref"):
        isa.set_cap("amx")
    with pytest.raises(ValueError, match="'mmx' is not one of torch, ref"):
        isa.set_cap("mmx")
    assert isa.current() == before
