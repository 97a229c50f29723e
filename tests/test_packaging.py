"""One small abi3 wheel that installs and works away from the checkout, and nothing else in it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import gpu_poor

ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 5 * 10**6
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels are built on Linux only")


def run(*argv, cwd, env=None):
    done = subprocess.run(
        list(map(str, argv)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a build reads, so that the checkout's own build is left alone."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("csrc", "gpu_poor", "docs", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "-q", "-w", out)
    run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=tree)
    (path,) = out.iterdir()
    return path


def install_here() -> str:
    """Where the gpu-poor of the environment that runs the tests is, "" if it has none."""
    script = (
        "import importlib.metadata as m\n"
        "print(*(d.locate_file(f) for d in m.distributions(name='gpu-poor') for f in d.files))"
    )
    return run(sys.executable, "-I", "-c", script, cwd="/").strip()


@pytest.fixture(scope="module")
def here_before():
    return install_here()


@pytest.fixture(scope="module")
def fresh_python(here_before, wheel, tmp_path_factory):
    """A new environment with the wheel; its dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # A path file inside a folder named by a path file is not read, so an editable install of the
    # checkout stays out of sight.
    (site / "dependencies.pth").write_text(
        "\n".join(p for p in sys.path if p.endswith("-packages"))
    )
    # --prefix alone first uninstalls what the pip that runs has: the checkout's editable install.
    options = ("--no-deps", "--no-index", "-q", "--ignore-installed", "--prefix", folder)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
    return python


def test_the_environment_of_the_tests_is_left_alone(here_before, fresh_python):
    if not here_before:
        pytest.skip("gpu-poor is not installed here")
    assert install_here() == here_before


def test_one_wheel_for_every_python(wheel):
    assert re.fullmatch(r"gpu_poor-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name), wheel.name
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"gpu_poor", next(t for t in tops if t.endswith(".dist-info"))}
    assert not [n for n in names if n.endswith((".c", ".cpp", ".h", ".pyc", ".o"))]
    assert [n for n in names if n.endswith(".so")] == ["gpu_poor/_gpu_poor_C.abi3.so"]
    for wanted in (
        "gpu_poor/assets/stories260k-llama/model.safetensors",
        "gpu_poor/assets/stories260k-llama/tokenizer.json",
        "gpu_poor/assets/tinystories_valid.txt",
        "gpu_poor/assets/LICENSE",
        "gpu_poor/examples/demo.py",
    ):
        assert wanted in names
    licences = [n for n in names if n.endswith("LICENSE") and ".dist-info/" in n]
    assert len(licences) == 2  # ours and the assets'


def test_dependencies(wheel):
    with zipfile.ZipFile(wheel) as z:
        (name,) = (n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = z.read(name).decode()
    requires = re.findall(r"^Requires-Dist: (.*)$", metadata, re.M)
    hard = {re.split(r"[ ;<>=]", r)[0] for r in requires if "extra ==" not in r}
    assert hard == {"torch", "tqdm", "safetensors"}
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.M))
    assert extras == {"hf", "cli", "serve", "ray", "dev"}
    assert "torch>=2.10" in requires  # a floor; only the Makefile pins a version
    assert re.search(r"^License-Expression: MIT$", metadata, re.M)


def test_the_installed_wheel_does_the_main_job(fresh_python, tmp_path):
    script = (
        "import gpu_poor, sys; from gpu_poor.examples import demo\n"
        "assert gpu_poor.__file__.startswith(sys.prefix), gpu_poor.__file__\n"
        "r = demo.demo_production_ready(n_runs=1, n_tokens=300)\n"
        "assert r['memory']['reduction'] > 0.7 and r['quality']['kl_mean'] < 2e-3\n"
        "print('version', gpu_poor.__version__)"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    out = run(fresh_python, "-c", script, cwd=tmp_path, env=env)
    assert f"version {declared_version()}" in out


def test_import_needs_the_hard_dependencies_only(fresh_python, tmp_path):
    """Without transformers the package imports and quantizes a plain module."""
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, gpu_poor\n"
        "m = gpu_poor.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), verbose=False)\n"
        "print(m(torch.ones(1, 64)).shape)"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    assert "[1, 64]" in run(fresh_python, "-c", script, cwd=tmp_path, env=env)


def test_the_extension_exports_one_symbol_and_brings_no_runtime(wheel, tmp_path):
    """A second OpenMP in the process costs 3x; exported C++ templates could clash with torch's."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("binutils is not installed")
    with zipfile.ZipFile(wheel) as z:
        so = z.extract("gpu_poor/_gpu_poor_C.abi3.so", tmp_path)
    exported = [
        line.split()[-1] for line in run("nm", "-D", "--defined-only", so, cwd=".").splitlines()
    ]
    assert exported == ["PyInit__gpu_poor_C"]
    needed = set(re.findall(r"NEEDED.*\[(\w+)", run("readelf", "-d", so, cwd=".")))
    assert needed <= {"libtorch", "libtorch_cpu", "libstdc", "libgcc_s", "libc", "libm", "ld"}
    undefined = run("nm", "-D", "--undefined-only", so, cwd=".")
    # Symbols of torch outside its stable ABI would tie the wheel to one version of torch.
    assert not re.findall(r"\b_ZN\w*(?:2at|3c10|5torch)\w*", undefined)


def test_the_source_distribution_can_be_built_from(tree, tmp_path):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    (path,) = tmp_path.iterdir()
    names = {n.partition("/")[2] for n in tarfile.open(path).getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "gpu_poor/assets/LICENSE"} <= names


# -- one home for facts -------------------------------------------------------------------------


def declared_version() -> str:
    return re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_the_version_is_written_once():
    version = declared_version()
    assert gpu_poor.__version__ in (version, "0+unknown")
    for path in (ROOT / "gpu_poor").rglob("*.py"):
        assert f'"{version}"' not in path.read_text(), path
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_one_flag_set_for_every_cpu():
    """Kernels name their instruction set themselves, so a wheel runs on CPUs other than ours."""
    code = (ROOT / "setup.py").read_text().split('"""', 2)[2]  # without the docstring
    assert not re.search(r"-march|-mtune|-mavx|-ffast-math|-fopenmp", code)
    assert "-ffp-contract=off" in code


def test_torch_is_pinned_in_the_makefile_only():
    assert re.search(r"^CONSTRAINTS := torch==\d", (ROOT / "Makefile").read_text(), re.M)
    assert "torch==" not in (ROOT / "pyproject.toml").read_text()


def test_the_oldest_transformers_tested_is_the_oldest_claimed():
    project, makefile = (ROOT / "pyproject.toml").read_text(), (ROOT / "Makefile").read_text()
    claimed = re.search(r'hf = \["transformers>=([\d.]+)"', project)[1]
    tested = re.search(r"^OLDEST_TRANSFORMERS := (\S+)$", makefile, re.M)[1]
    assert tested == claimed or tested == f"{claimed}.0"
