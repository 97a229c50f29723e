"""The benchmarks' own logic: ratios, the cold-weights rule, generated documents, random models."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from conftest import make_model  # noqa: E402

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
        {"name": "gpu_poor_int8", "samples": {"decode": [2.0, 2.0]}},
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
        contender("gpu_poor_int8", 0.2),
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


# -- strategies --------------------------------------------------------------------------------


def strategy_row(model, form, strategy, kl, variant="plain", bits=4.5):
    quality = {"kl_mean": kl, "kl_mean_se": kl / 50, "kl_p99": 9 * kl, "perplexity_ratio": 1.01,
               "top1": 0.9}  # fmt: skip
    return {"model": model, "variant": variant, "format": form, "strategy": strategy.split(),
            "seconds": 1.0, "calibration_tokens": 0, "bits_per_weight": bits, "remarks": [],
            "quality": quality}  # fmt: skip


STRATEGY_ROWS = [
    strategy_row("stories260k-llama", "int4_g64_asym", "absmax", 0.12),
    strategy_row("stories260k-llama", "int4_g64_asym", "equalize mse", 0.09),
    strategy_row("stories260k-llama", "int8", "equalize mse", 6e-4, bits=8.2),
    strategy_row("stories260k-llama", "int4_g32", "absmax", 0.15),
    strategy_row("stories260k-llama", "int8", "equalize mse", 1.1e-3, "outliers", 8.2),
    strategy_row("tinystories-656k-llama", "int4_g64_asym", "equalize mse", 0.05),
]


def test_every_case_is_measured_once_and_is_known():
    from benchmarks import strategies
    from gpu_poor.formats import FORMATS
    from gpu_poor.strategies import STRATEGIES, recipe

    cases = strategies.cases()
    assert len(cases) == len(set(cases))
    for variant, form, names in cases:
        assert variant in ("plain", "outliers") and form in FORMATS
        assert recipe(names, True).names == list(names) or len(names) == 1
    assert {name for *_, names in cases for name in names} == set(STRATEGIES)
    assert strategies.TEXTS.keys() == strategies.CALIBRATION.keys()
    assert strategies.needs_data(("awq", "mse")) and not strategies.needs_data(("equalize", "mse"))


def test_bits_per_weight_counts_scales_and_padding():
    from benchmarks.strategies import bits_per_weight
    from gpu_poor import quantize

    model = make_model("llama", hidden_size=128, intermediate_size=256)
    quantize(model, overrides={"model.layers": "int4_g64_asym"}, verbose=False)
    assert bits_per_weight(model) == 4.5
    model = make_model("llama", hidden_size=128, intermediate_size=256)
    quantize(model, overrides={"model.layers": "int4_g32_asym"}, verbose=False)
    assert bits_per_weight(model) == 5.0
    model = make_model("llama", intermediate_size=200)  # 8 more rows, and groups cut short
    quantize(model, overrides={"model.layers": "int4_g64_asym"}, verbose=False)
    assert 4.5 < bits_per_weight(model) < 4.9


def test_an_interrupted_run_goes_on(tmp_path):
    from benchmarks.strategies import earlier_rows

    path = tmp_path / "strategies.json"
    assert earlier_rows(path, 8) == []
    record = {"header": {"commit": machine.commit()[0]}, "n_tokens": 8, "complete": False,
              "rows": STRATEGY_ROWS}  # fmt: skip
    for changes, expected in (
        ({}, STRATEGY_ROWS),
        ({"complete": True}, []),
        ({"n_tokens": 9}, []),
        ({"header": {"commit": "another"}}, []),
    ):
        path.write_text(json.dumps(record | changes))
        assert earlier_rows(path, 8) == expected


def test_goals_of_low_bits():
    found = {goal: (measured, met) for goal, measured, met in
             report_goals.strategies({"rows": STRATEGY_ROWS})}  # fmt: skip
    assert found == {
        "mean KL, 4.5 bits without data, stories260k-llama ≤ 0.0850":
            ("0.0900 (int4_g64_asym, equalize + mse)", False),
        "mean KL, 4.5 bits without data, tinystories-656k-llama ≤ 0.0550":
            ("0.0500 (int4_g64_asym, equalize + mse)", True),
        "mean KL, 8 bits without data, outlier variants ≤ 1.2e-03":
            ("1.1e-03 (stories260k-llama)", True),
    }  # fmt: skip


def test_rivals_are_compared_at_as_many_bits():
    rows = STRATEGY_ROWS[:4]  # 0.09 at 4.5 bits, 6e-4 at 8.2; hollow and absmax do not count
    model = "stories260k-llama"
    assert report_goals.at_bits(rows, model, 4.5) == pytest.approx(0.09)
    assert report_goals.at_bits(rows, model, 8.2) == pytest.approx(6e-4)
    assert report_goals.at_bits(rows, model, 6.35) == pytest.approx((0.09 * 6e-4) ** 0.5)
    assert report_goals.at_bits(rows, "another", 4.5) is None
    record = {"rows": rows, "peers": [
        {"model": model, "peer": f"rival {kl}", "bits_per_weight": 4.5,
         "quality": rows[0]["quality"] | {"kl_mean": kl}} for kl in (0.1, 0.06)
    ]}  # fmt: skip
    *_, (goal, measured, met) = report_goals.strategies(record)
    assert "a rival's" in goal and measured == f"1.500x (rival 0.06, {model})" and not met
    text = tables.peer_weights(record)
    assert "| rival 0.1 | 4.50 |" in text and "0.90x" in text and "1.50x" in text
    assert tables.peer_weights({"rows": rows}) == tables.NOT_YET


def test_a_rival_rounds_the_blocks_and_nothing_else():
    from benchmarks.peer_weights import apply

    model = make_model("gpt2")  # Conv1D: rows are columns
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def rounding(weight):
        seen.append(tuple(weight.shape))
        return weight / 2, 5 * weight.numel()

    assert apply(model, rounding) == 5.0
    assert seen == 2 * [(360, 120), (120, 120), (480, 120), (120, 480)]
    for name, value in model.state_dict().items():
        halved = ".h." in name and value.dim() == 2
        assert torch.equal(value, before[name] / 2 if halved else before[name]), name


def test_the_goals_are_of_the_defaults():
    from benchmarks import strategies
    from gpu_poor.strategies import recipe

    assert recipe(None, False).names == list(strategies.DATA_FREE)
    assert recipe(None, True).names == list(strategies.CALIBRATED)
    defaults = {" + ".join(s) for s in (strategies.DATA_FREE, strategies.CALIBRATED)}
    assert {strategy for _, strategy in report_goals.LOW_BITS} == defaults


def test_the_plot_shows_every_point_where_it_belongs():
    from xml.etree import ElementTree

    from benchmarks.plot import PANEL, svg

    text = svg(STRATEGY_ROWS)
    root = ElementTree.fromstring(text)
    assert svg(list(STRATEGY_ROWS)) == text
    panels = root.findall("{*}g")
    assert [panel[0].text for panel in panels] == ["stories260k-llama", "tinystories-656k-llama"]
    circles = panels[0].findall("{*}circle")
    assert len(circles) == 4 and len(panels[1].findall("{*}circle")) == 1  # no outlier variant
    at = {(c[0].text, c.get("stroke")): (float(c.get("cx")), float(c.get("cy"))) for c in circles}
    assert all(0 < x < PANEL[0] and 0 < y < PANEL[1] for x, y in at.values())
    grey, blue = "#8a8a8a", "#1f6fb4"
    assert at["int4_g64_asym", grey][0] == at["int4_g64_asym", blue][0] < at["int8", blue][0]
    # Upwards is worse: the axis points down.
    assert at["int4_g32", grey][1] < at["int4_g64_asym", grey][1] < at["int4_g64_asym", blue][1]
    assert at["int4_g64_asym", blue][1] < at["int8", blue][1]


def test_report_shows_the_strategies_of_another_machine(results):
    record = json.loads((results / "results" / "model.json").read_text())
    elsewhere = {"header": record["header"] | {"cpu": "Zeta 9"}, "n_tokens": 8, "complete": True,
                 "rows": STRATEGY_ROWS}  # fmt: skip
    machine.save(elsewhere, results / "results" / "zeta" / "strategies.json", "")
    assert run(results) == 0
    text = (results / "RESULTS.md").read_text()
    assert "(results/quality.svg)" in text and (results / "results" / "quality.svg").exists()
    assert "| stories260k-llama with outliers | int8 | equalize + mse | 8.20 |" in text
    assert text.index("| equalize + mse | 4.50 |") < text.index("| absmax | 4.50 |")  # best first
    assert "Zeta 9 (strategies)" in text
    (results / "results" / "quality.svg").write_text("")
    assert run(results, "--check") == 1
