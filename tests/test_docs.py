"""What the documents show is true: code runs, files exist, nothing registered is missing."""

import re
from pathlib import Path

import pytest
import torch

import gpu_poor
from gpu_poor import assets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def run_readme(folder, name: str) -> None:
    """All Python blocks, top to bottom in one session, on a model in place of the one named."""
    (folder / "my_text.txt").write_text(assets.valid_text()[:6000])
    code = blocks("python")
    assert len(code) == 6 and '"gpt2-large"' in code[0]
    session: dict = {}
    for block in code:
        exec(compile(block.replace('"gpt2-large"', repr(name)), "README", "exec"), session)


def test_readme_code_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    run_readme(tmp_path, assets.STORIES260K)
    out = capsys.readouterr().out
    assert "73.4% smaller" in out  # the receipt
    assert "Once upon a time, there was" in out  # the generated text
    assert re.search(r"KL divergence +mean [\d.]+e-0[3-9]", out)  # evaluate
    assert (tmp_path / "my-int8-model" / "model.safetensors").stat().st_size < 400_000


def test_readme_code_runs_on_the_architecture_that_it_names(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shape = dict(n_embd=128, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    config = transformers.GPT2Config(vocab_size=512, **shape)
    transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    transformers.AutoTokenizer.from_pretrained(assets.STORIES260K).save_pretrained("gpt2")
    run_readme(tmp_path, "gpt2")


def run_page(name: str, session: dict) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        exec(compile(block, f"{name}.md", "exec"), session)


def test_code_of_the_pages_on_decoding_runs(capsys):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.STORIES260K)
    longer_ids = tokenizer(assets.valid_text()[:1000], return_tensors="pt").input_ids[:, :200]
    session = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K),
        "quantize": gpu_poor.quantize, "gpu_poor": gpu_poor,
        "ids": longer_ids[:, :150], "longer_ids": longer_ids,
    }  # fmt: skip
    run_page("fusion", session)
    assert "5 of 5 known decoder blocks fused" in capsys.readouterr().out
    run_page("kv_cache", session)
    assert session["cache"].get_seq_length() > 150
    assert session["other"].sequences.rows[0][:2] == session["cache"].sequences.rows[0][:2]


def test_code_of_the_attention_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    run_page("attention", {"name": assets.STORIES260K, "text": assets.valid_text()[:6000]})
    out = capsys.readouterr().out
    assert "4 key/value heads are 1 now" in out and "hashed, ratio 1.00" in out
    assert "Python between" in out and (tmp_path / "profile.json").exists()


def test_readme_shows_the_receipt():
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K)
    receipt = str(gpu_poor.quantize(model, verbose=False).gpu_poor_receipt)

    def normal(text):
        return re.sub(r"kernel \w+|in [\d.]+ s$", "*", text, flags=re.M).strip()

    assert normal(blocks("text")[0]) == normal(receipt)


def test_readme_is_short_and_has_the_tables():
    assert len(README.splitlines()) < 200
    for name in ("summary", "quality", "peers"):
        assert re.search(rf"^<!-- results:{name} -->\n.*?^<!-- /results -->$", README, re.M | re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_prose_is_120_columns_wide(path):
    if path.name == "RESULTS.md":
        return  # generated
    lines = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    wide = [line for line in lines.split("\n") if len(line) > 120]
    # Rows of tables and addresses cannot be broken.
    assert not [line for line in wide if not line.startswith("|") and "](http" not in line]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_make_targets_exist(path):
    makefile = (ROOT / "Makefile").read_text()
    code = "\n".join(re.findall(r"`[^`]+`|^```.*?^```", path.read_text(), re.M | re.S))
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_the_demo_has_one_command(path):
    """The one that works in a checkout and with a wheel."""
    assert not re.findall(r"-m examples\.demo", path.read_text(encoding="utf-8"))


def test_a_wheel_is_installed_with_transformers():
    installs = re.findall(r"`pip install ([^`]+)`", README)
    assert [i for i in installs if "dist/*.whl" in i]
    assert all("[hf]" in i for i in installs), installs


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_named_exist(path):
    pattern = r"`((?:csrc|gpu_poor|tests|benchmarks|examples|docs|notebooks)/[\w/.-]+)`"
    for name in re.findall(pattern, path.read_text()):
        assert (ROOT / name).exists(), name


def test_every_operator_is_documented():
    kernels = (ROOT / "docs" / "kernels.md").read_text()
    names = torch._C._dispatch_get_all_op_names()
    ours = {n.split("::")[1].split(".")[0] for n in names if n.startswith("gpu_poor::")}
    assert ours
    assert not {name for name in ours if f"`{name}`" not in kernels}


def test_every_strategy_is_documented():
    from gpu_poor.strategies import STRATEGIES

    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "methods.md").read_text(), re.M)
    assert set(STRATEGIES) <= set(headings)


def test_every_environment_variable_is_documented():
    documents = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    sources = [*(ROOT / "gpu_poor").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    named = {v for p in sources for v in re.findall(r'"(GPU_POOR_[A-Z_]+)"', p.read_text())}
    assert "GPU_POOR_ISA" in named
    assert not {name for name in named if name not in documents}


def test_every_instruction_set_is_in_the_readme():
    choices = re.search(r"GPU_POOR_ISA=([\w|]+)", README)[1].split("|")
    assert ("torch", *choices) == gpu_poor.isa.KNOWN


def test_every_public_name_has_a_docstring():
    for name in gpu_poor.__all__:
        assert name == "__version__" or getattr(gpu_poor, name).__doc__, name


def test_the_reports_are_what_the_records_say():
    if not (ROOT / "RESULTS.md").exists():
        pytest.skip("no RESULTS.md yet")
    from benchmarks import report

    assert report.main(["--check"]) == 0
