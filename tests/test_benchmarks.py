"""The benchmark's own arithmetic: work, gate, statistics, files. What it measures is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pyattn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # where `python benchmarks/run.py` finds its modules

import cases  # noqa: E402
import gate  # noqa: E402
import memory  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402

CASE = cases.Attention("fp32", "causal", (2, 3, 17, 8))


@pytest.mark.parametrize("mask", cases.MASKS)
def test_work_counts_the_pairs_that_see_each_other(mask):
    case = cases.Attention("fp32", mask, (3, 2, 7, 5))
    visible = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    if mask == "causal":
        visible &= torch.ones(7, 7, dtype=torch.bool).tril()
    if mask == "padding":
        lengths = [round(7 / 6), round(7 * 3 / 6), round(7 * 5 / 6)]
        visible &= torch.arange(7) < torch.tensor(lengths).view(3, 1, 1, 1)
    pairs = int(visible.sum())
    assert case.visible_pairs == pairs
    # Multiply-adds of one head and pair, 5 each: q.k and p v; then q.k again, do.v, p do, ds k, ds q.
    assert case.flops(cases.FORWARD) == 2 * pairs * 2 * (2 * 5)
    assert case.flops(cases.TRAINING) == 2 * pairs * 2 * (7 * 5)


def test_bytes_count_each_tensor_once():
    tensor, lse = 2 * 3 * 17 * 8 * 2, 2 * 3 * 17 * 4
    case = cases.Attention("bf16", "full", (2, 3, 17, 8))
    assert case.bytes(cases.FORWARD) == 4 * tensor
    assert case.bytes(cases.TRAINING) == 12 * tensor + 2 * lse

    queries, keys, lse = 2 * 3 * 5 * 8 * 2, 2 * 3 * 17 * 8 * 2, 2 * 3 * 5 * 4
    case = cases.Attention("bf16", "full", (2, 3, 5, 17, 8))
    assert case.bytes(cases.FORWARD) == 2 * queries + 2 * keys
    assert case.bytes(cases.TRAINING) == 6 * queries + 6 * keys + 2 * lse


def test_half_of_the_tokens_are_padding():
    for shape in cases.SHAPES:
        case = cases.Attention("fp32", "padding", shape)
        full = cases.Attention("fp32", "full", shape)
        assert case.visible_pairs / full.visible_pairs == pytest.approx(0.5, abs=1 / shape[-2])


SHAPES = {"full": (2, 3, 5, 17, 8), "causal": (2, 3, 17, 8), "padding": (2, 3, 5, 17, 8)}


@pytest.mark.parametrize("mask", cases.MASKS)
def test_every_route_computes_the_truth(mask):
    case = cases.Attention("fp64", mask, SHAPES[mask])
    inputs, grad_out = case.inputs(seed=0, device="cpu")
    out, *_ = case.truth(inputs, grad_out)
    for route in case.routes("cpu").values():
        torch.testing.assert_close(route.call(*inputs), out)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 17, 8), cases.TINY])
def test_gate_passes_torch_itself(dtype, shape):
    case = cases.Attention(dtype, "causal", shape)
    errors = gate.check(case, case.routes("cpu")[case.yardstick], "cpu", seeds=2)
    assert [error.result for error in errors] == ["out", "dq", "dk", "dv"]
    assert all(error.passed for error in errors)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


WRONG = {
    "scale": (lambda q, k, v: causal(1.001 * q, k, v), {"out", "dq", "dk", "dv"}),
    "mask": (F.scaled_dot_product_attention, {"out", "dq", "dk", "dv"}),
    "nan": (lambda q, k, v: causal(q, k, v) * torch.nan, {"out", "dq", "dk", "dv"}),
    # v's value, twice its gradient
    "dv": (lambda q, k, v: causal(q, k, 2 * v - v.detach()), {"dv"}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_gate_refuses_a_wrong_kernel(kind):
    kernel, refused = WRONG[kind]
    errors = gate.check(CASE, cases.Route(kernel), "cpu", seeds=2)
    assert {error.result for error in errors if not error.passed} >= refused
    if kind == "dv":
        assert [error.passed for error in errors] == [True, True, True, False]


def bench(stopwatch=None):
    stopwatch = stopwatch or timing.cpu_stopwatch(Clock())
    no_memory = memory.Memory("cpu", 1, wanted=False)
    return run.Bench("cpu", cases.DIRECTIONS, 0.01, 2, stopwatch, no_memory)


@pytest.mark.parametrize("kind", WRONG)
def test_no_time_for_a_case_that_fails(kind, monkeypatch):
    kernel, _ = WRONG[kind]
    monkeypatch.setattr(pyattn, "attention", lambda q, k, v, mask: kernel(q, k, v))
    failure = bench().measure(CASE)
    assert isinstance(failure, report.Failure)
    text = report.failure_text(failure)
    assert "NO TIME: the error is above the limit" in text
    assert "dv  FAILED: error" in text


def test_a_case_that_raises_is_a_failure(monkeypatch):
    def refuse(q, k, v, mask):
        raise NotImplementedError("no backend takes this problem")

    monkeypatch.setattr(pyattn, "attention", refuse)
    assert bench().measure(CASE).reason == "NotImplementedError: no backend takes this problem"


class Clock:
    """Time that passes only in `call`s, each of which lasts what it was made with and is logged."""

    def __init__(self):
        self.now_s, self.log = 0.0, []

    def __call__(self):
        self.now_s += 1e-9
        return self.now_s

    def variant(self, name, seconds):
        durations = iter(seconds) if isinstance(seconds, list) else None

        def call():
            self.log.append(name)
            self.now_s += next(durations) if durations else seconds

        return timing.Variant(call)


def runs(log):
    """The log without repetitions in a row."""
    return [name for i, name in enumerate(log) if i == 0 or log[i - 1] != name]


def test_variants_take_turns_in_alternating_order():
    clock = Clock()
    variants = {name: clock.variant(name, seconds) for name, seconds in {"a": 0.01, "b": 0.02, "c": 0.03}.items()}
    timings = timing.interleave(variants, timing.cpu_stopwatch(clock), budget_s=0.1, blocks=4)
    # abc to calibrate, then abc cba abc cba, where neighbours of one name run together.
    assert "".join(runs(clock.log)) == "abc" + "abcbabcba"
    assert timings["b"].min_s == pytest.approx(0.02)
    assert timings["b"].median_s == pytest.approx(0.02)
    assert timings["b"].spread == pytest.approx(0, abs=1e-6)
    assert len(timings["b"].block_minima_s) == 4


def test_short_calls_are_timed_in_batches():
    clock = Clock()
    variants = {"short": clock.variant("short", 3e-6)}
    result = timing.interleave(variants, timing.cpu_stopwatch(clock), budget_s=0.02, blocks=2)["short"]
    assert result.min_s == pytest.approx(3e-6, rel=1e-3)
    assert len(clock.log) * 3e-6 >= 2 * timing.SAMPLE_S


def test_a_hopeless_variant_is_not_timed_again():
    clock = Clock()
    variants = {"pyattn": clock.variant("pyattn", 0.01), "sdpa": clock.variant("sdpa", 0.05)}
    variants["formula"] = clock.variant("formula", 0.05 * timing.HOPELESS * 1.1)
    timings = timing.interleave(variants, timing.cpu_stopwatch(clock), budget_s=0.1)
    assert len(timings["formula"].block_minima_s) == 1
    assert timings["formula"].min_s == pytest.approx(0.05 * timing.HOPELESS * 1.1)
    assert len(timings["sdpa"].block_minima_s) == timing.BLOCKS


def test_statistics():
    result = timing.Timing.of([[3.0, 1.0, 4.0], [2.0, 5.0, 9.0, 6.0]])
    assert (result.min_s, result.median_s) == (1.0, 4.0)
    assert result.spread == pytest.approx((6.0 - 2.0) / 4.0)
    assert result.block_minima_s == [1.0, 2.0]


def made_up(seconds=(2e-3, 3e-3, 5e-3)):
    timings = {
        name: timing.Timing(s, 1.1 * s, 0.05, [s, 1.2 * s])
        for name, s in zip((cases.PYATTN, "sdpa", "formula"), seconds, strict=True)
    }
    rows = [
        report.Row("attention", direction, dtype, mask, shape, 10**8, 10**6, timings, {"pyattn": 5 << 20, "sdpa": None})
        for direction in cases.DIRECTIONS
        for dtype in ("fp32", "bf16")
        for mask in cases.MASKS
        for shape in (*cases.QUICK_SHAPES, cases.TINY)
    ]
    failures = [report.Failure("attention", "fp16", "full", (1, 1, 2, 3), "too far", [gate.Error("out", 2, 1, 1.1)])]
    header = dict.fromkeys(("machine", "backend", "torch", "threads"), "made up")
    return report.Results(header, {"fp32": 100.0, "bf16": 100.0}, rows, failures)


def test_json_holds_everything(tmp_path):
    results = made_up()
    results.write(tmp_path / "results.json")
    assert report.Results.read(tmp_path / "results.json") == results
    document = json.loads((tmp_path / "results.json").read_text())
    assert document.keys() == {"schema", "header", "peak_gflops_per_s", "rows", "failures"}
    assert document["rows"][0].keys() == {
        *("op", "direction", "dtype", "mask", "shape", "flops", "bytes", "timings", "extra_peak_bytes"),
        *("fastest", "speedup", "gflops_per_s"),
    }
    assert document["rows"][0]["speedup"] == pytest.approx(1.5)
    assert document["failures"][0]["errors"][0] == {"result": "out", "pyattn": 2, "torch": 1, "limit": 1.1}


def test_json_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"results\.json: expected schema 1, got 0"):
        report.Results.read(path)


def test_a_lost_row_is_shown_and_marked():
    won, lost = made_up(), made_up(seconds=(3e-3, 5e-3, 2e-3))
    assert report.row_text(lost.rows[0], lost).endswith("slower")
    assert "0.67x formula" in report.row_text(lost.rows[0], lost)
    assert not report.row_text(won.rows[0], won).endswith("slower")
    assert f"{len(lost.rows)} rows: {len(lost.rows)} slower than" in report.summary_text(lost)


def test_plot_draws_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(made_up(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_one_call():
    """The formula holds the scores and their softmax, 4 MiB each, and little else."""
    case = cases.Attention("fp32", "full", (1, 1, 1024, 8))
    with memory.Memory("cpu", threads=1) as peaks:
        assert 8 << 20 <= peaks.extra_peak_bytes(case, "formula", cases.FORWARD) < 12 << 20


def test_list_names_every_case(capsys):
    assert run.main(["--list", "--dtype", "fp32", "--mask", "padding"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "padding" in line] == [
        f"{'attention':<21} fp32  padding  {shape}" for shape in cases.SHAPES
    ]
    assert lines[-1] == f"{'attention':<21} fp32  full     {cases.TINY}"


def test_one_case_end_to_end(tmp_path):
    command = [sys.executable, BENCHMARKS / "run.py", "--shapes", "1,2,16,8", "--dtype", "fp32", "--mask", "full"]
    command += ["--seconds", "0.01", "--json", tmp_path / "results.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    results = report.Results.read(tmp_path / "results.json")
    # Whether the gate passes is the kernel's affair, and on so small a case partly chance.
    assert done.returncode == bool(results.failures), done.stderr
    assert len(results.rows) == 2 * (1 - len(results.failures))
    for row in results.rows:
        assert row.timings.keys() == {"pyattn", "sdpa", "formula"}
        assert report.row_text(row, results) in done.stdout
