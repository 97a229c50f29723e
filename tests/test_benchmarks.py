"""The benchmarks' own logic: ratios, the cold-weights rule, generated documents, random models."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")


from benchmarks import (  # noqa: E402
    kernels,
    machine,
    memory,
    planning,
    quality,
    report,
    report_goals,
    shapes,
    timing,
)
from benchmarks import report_tables as tables  # noqa: E402
from benchmarks.peers import compete  # noqa: E402
from gpu_poor import formats  # noqa: E402

# -- timing ------------------------------------------------------------------------------------


def test_interleave_takes_turns_and_times_the_right_callable(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds

        return call

    samples = timing.interleave({"a": work("a", 1.0), "b": work("b", 3.0)}, rounds=4)
    assert samples == {"a": [1.0] * 4, "b": [3.0] * 4}
    assert calls == ["a", "b", *"abba" * 2]  # warm-up, then turning rounds
    assert timing.summary(timing.ratios(samples["b"], samples["a"])) == {
        "median": 3.0,
        "min": 3.0,
        "iqr": 0.0,
        "n": 4,
    }


def test_ratio_is_of_rounds_not_of_medians():
    # The machine was 10 times slower in two rounds; the ratio within each round is 2 throughout.
    a, b = [1.0, 10.0, 1.0, 10.0, 1.0], [2.0, 20.0, 2.0, 20.0, 2.0]
    assert set(timing.ratios(b, a)) == {2.0}
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 100.0])["median"] == 3.0
    with pytest.raises(ValueError, match="rounds"):
        timing.ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no samples"):
        timing.summary([])


def test_speedups_only_between_equally_many_rounds():
    rows = [
        {"name": "torch_fp32", "samples": {"decode": [4.0, 6.0]}},
        {"name": "gpu_poor:int8", "samples": {"decode": [2.0, 2.0]}},
        {"name": "died", "samples": {"decode": [2.0]}},
    ]
    compete.add_speedups(rows)
    assert rows[1]["speedup"]["torch_fp32"]["decode"]["median"] == 2.5
    assert rows[2]["speedup"] == {}


def test_a_failing_peer_is_a_recorded_row():
    worker = compete.Worker("no_such_peer", "tiny-gpt2", 1)
    assert "unknown peer" in worker.error
    assert worker.ask({"linears": True}) is None
    worker.close()


# -- kernels and machine -----------------------------------------------------------------------


def row(share: float) -> dict:
    return {"op": "int8_linear", "format": "int8", "n": 64, "k": 32, "m": 1, "mode": "a8",
            "isa": "avx2", "of_stream": timing.summary([share])}  # fmt: skip


def test_weights_faster_than_memory_fail():
    assert kernels.warm_rows([row(1.0), row(1.02)]) == []
    (message,) = kernels.warm_rows([row(0.5), row(1.03)])
    assert "64x32" in message and "103.0%" in message


@pytest.mark.parametrize("name, size", [("int8", 20 * 64), ("int4_g32", 2 * 2 * 256)])
def test_rotation_visits_every_matrix_and_continues(name, size, monkeypatch):
    buffer = torch.arange(3 * size + 7).to(torch.int8)
    rotation = kernels.Rotation(buffer, formats.find(name), 20, 64)
    seen = []
    monkeypatch.setattr(rotation, "linear", lambda x, i, bits: seen.append(i))
    for _ in range(2):
        rotation.seconds(None, 16, 2)
    assert seen == [0, 1, 2, 0] and rotation.count == 3
    starts = [weight.data_ptr() - buffer.data_ptr() for weight in rotation.weights]
    assert starts == [0, size, 2 * size]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="machine.c is compiled at run time")
@pytest.mark.parametrize("threads", [1, 2])
def test_machine_loops_run(threads):
    stream = machine.Stream(machine.cold_buffer(0.002), threads)
    table = stream.tune(passes=1)
    assert all(v > 0 for v in table.values())
    assert stream.loop in machine.CANDIDATES
    header = machine.header(threads)
    assert header["threads"] == threads and header["torch"] == torch.__version__
    json.dumps(header)


# -- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-7b", 6_738_415_616),
    ],
)
def test_shapes_have_their_published_number_of_parameters(name, parameters):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_outlier_variant_is_the_same_function(name):
    model = shapes.build(name)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        for parameter in model.parameters():  # biases that are not zero, norms that are not one
            parameter.add_(torch.randn_like(parameter) * 0.05)
        before = model(tokens).logits
        weights = [p.clone() for p in model.parameters()]
        after = quality.add_outliers(model)(tokens).logits
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))
    changed = sum(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    # Each of two blocks: two norms (with biases in GPT-2) and the linears behind them.
    assert changed == 2 * (6 if name == "tiny-gpt2" else 7)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_random_checkpoint_is_complete(name, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(memory, "SHARD_BYTES", 200_000)
    facts = memory.write_checkpoint(name, tmp_path, torch.bfloat16)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert facts["checkpoint_bytes"] == 2 * sum(p.numel() for p in model.parameters())


# -- documents ---------------------------------------------------------------------------------


def seconds(value: float) -> dict:
    return timing.summary([value, value])


def contender(name: str, decode: float, **more) -> dict:
    base = seconds(0.1 / decode)
    return {
        "name": name, "label": name, "error": "", "note": "", "peer_note": "", "requirements": [],
        "bytes": 100_000_000, "bytes_before": 400_000_000, "details": None, "linears_s": 0.01,
        "seconds": {"decode": seconds(decode), "prefill_128": seconds(0.5)},
        "samples": {"decode": [decode, decode], "prefill_128": [0.5, 0.5]},
        "speedup": {"torch_fp32": {"decode": base, "prefill_128": seconds(1.0)}},
    } | more  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A folder with a model.json: gpu-poor slower than fp32, and a peer that fails."""
    header = machine.header(2)
    rows = [
        contender("torch_fp32", 0.1),
        contender("gpu_poor:int8", 0.2),
        contender(
            "broken", 0.1, error="OSError: no such thing", seconds={}, samples={}, speedup={}
        ),
    ]
    record = {"header": header, "shapes": {"gpt2-large": {"rows": rows}}}
    folder = tmp_path / "results"
    machine.save(record, folder / "model.json", "")
    machine.save(record, folder / "peers.json", "")
    (tmp_path / "README.md").write_text(
        "# x\n<!-- results:summary -->\nold\n<!-- /results -->\nkept\n"
        "<!-- results:quality -->\n<!-- /results -->\n"
    )
    return tmp_path


def run(root, *arguments):
    return report.main(["--root", str(root), "--results", str(root / "results"), *arguments])


def test_report_shows_losing_and_failing_rows(results):
    assert run(results) == 0
    text = (results / "RESULTS.md").read_text()
    assert "0.50x" in text and "fails: OSError: no such thing" in text
    assert "decode over transformers fp32 ≥ 2.30x | 0.50x (gpt2-large) | **missed**" in text
    assert "75.0 %" in text
    readme = (results / "README.md").read_text()
    assert "old" not in readme and "kept" in readme and "GPT-2 large" in readme
    assert readme.count(tables.NOT_YET) == 1  # quality: an unmeasured part says so


def test_report_shows_another_machine_and_which_part_ran_where(results):
    record = json.loads((results / "results" / "model.json").read_text())
    elsewhere = record | {"header": record["header"] | {"cpu": "Zeta 9"}}
    machine.save(elsewhere, results / "results" / "zeta" / "model.json", "")
    machine.save(elsewhere, results / "results" / "peers.json", "")
    assert run(results) == 0
    text = (results / "RESULTS.md").read_text()
    first, _, second = text.partition("## Another machine: zeta")
    assert "| Zeta 9 |" in second and "0.50x (gpt2-large)" in second
    assert f"| {record['header']['cpu']} (model); Zeta 9 (peers) |" in first


def test_check_detects_a_stale_file(results, capsys):
    assert run(results, "--check") == 1
    run(results)
    assert run(results, "--check") == 0
    record = json.loads((results / "results" / "model.json").read_text())
    record["shapes"]["gpt2-large"]["rows"][1]["bytes"] = 123_000_000
    machine.save(record, results / "results" / "model.json", "")
    before = (results / "RESULTS.md").read_text()
    assert run(results, "--check") == 1
    assert (results / "RESULTS.md").read_text() == before
    assert "RESULTS.md" in capsys.readouterr().err


def test_unknown_marker_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        report.fill("<!-- results:nothing -->\n<!-- /results -->", {})


def test_spearman_is_the_correlation_of_ranks():
    assert planning.spearman([1.0, 2.0, 30.0], [-5.0, 0.0, 0.1]) == pytest.approx(1)
    assert planning.spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties; with them, of the averaged ranks
    assert planning.spearman([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
    assert planning.ranks([5.0, 1.0, 5.0, 7.0]).tolist() == [1.5, 0.0, 1.5, 3.0]


def plan_row(kind, predicted, kl, **more):
    return {"model": "m", "kind": kind, "predicted": dict.fromkeys(planning.BASES, predicted),
            "kl": kl, "kl_se": 0.1, "bytes": 99, **more}  # fmt: skip


def test_plans_are_summarized_and_judged():
    rows = [plan_row("module", p, k) for p, k in ((1.0, 1.0), (2.0, 4.0), (3.0, 6.0))]
    rows += [plan_row("equal", p, k) for p, k in ((3.0, 1.0), (2.0, 4.0), (1.0, 6.0))]
    rows += [plan_row("planned", 2.0, 2.0, target=0.2, basis="samples", target_bytes=101,
                      predicted_bytes=99)]  # fmt: skip
    rows += [{"model": "m", "kind": "planned", "target": 0.1, "basis": "samples", "error": "no"}]
    record = {"rows": rows, "summary": planning.summary(rows)}
    by = {(r["rows"], r["basis"]): r for r in record["summary"]}
    assert by["modules", "samples"]["spearman"] == pytest.approx(1)
    assert by["modules", "samples"]["ratio_least"] == pytest.approx(0.5)
    assert by["equal", "own text"]["spearman"] == pytest.approx(-1)
    assert by["plans", "samples"]["n"] == 4
    goals = {goal: (measured, met) for goal, measured, met in report_goals.planning(record)}
    assert goals["memory_target used ≥ 99.0 %"] == ("98.0 % (m, 0.2 of the float model)", False)
    assert goals["memory_target used ≤ 100.0 %"][1]
    assert not goals["predicted KL ranks plans as measured KL does: Spearman ≥ 0.900"][1]
    assert "| exact | 2.00e+00 | 2.00e+00 ± 1e-01 |" in tables.targets(record)
    assert "| m | weights | 1.000 of 3 |" in tables.predictions(record)


def test_goals_take_the_worst_case():
    rows = [{"x": 0.95, "at": "a"}, {"x": 0.91, "at": "b"}]
    value, where = lambda r: r["x"], lambda r: r["at"]  # noqa: E731
    least = report_goals.at_least("t", rows, value, 0.92, report_goals.percent, where)
    assert list(least) == [("t ≥ 92.0 %", "91.0 % (b)", False)]
    most = report_goals.at_most("t", rows, value, 0.95, report_goals.percent, where)
    assert list(most) == [("t ≤ 95.0 %", "95.0 % (a)", True)]
    assert list(report_goals.at_least("t", [], value, 1, report_goals.percent, where)) == []


def test_committed_documents_are_current():
    assert report.main(["--check"]) == 0


def test_campaign_resumes_at_the_first_unfinished_part(tmp_path):
    from benchmarks.__main__ import is_done

    path = tmp_path / "part.json"
    assert not is_done(path, "c0ffee")
    for more, done in ({}, True), ({"complete": False}, False), ({"warm": ["4096x4096"]}, False):
        path.write_text(json.dumps({"header": {"commit": "c0ffee"}} | more))
        assert is_done(path, "c0ffee") is done
        assert not is_done(path, "another")
