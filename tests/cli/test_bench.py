import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from moe_ep.cli import bench
from moe_ep.cli.bench import registry
from moe_ep.cli.bench.baseline import AllToAllDispatcher
from moe_ep.cli.bench.cases import Case, Shape, exchange_cases
from moe_ep.cli.bench.exchange import count_rows, exchange_contest, make_inputs
from moe_ep.cli.bench.launch import launch, pick_device
from moe_ep.cli.bench.layer import layer_contest
from moe_ep.cli.bench.registry import find_measurement, measure
from moe_ep.cli.bench.report import (
    COLUMNS,
    build_report,
    default_path,
    describe_machine,
    machine_slug,
    markdown_report,
    print_report,
    read_json,
    table_row,
    write_json,
    write_plot,
)
from moe_ep.cli.bench.statistics import median_interval
from moe_ep.cli.bench.timing import Contest, Rank, gather_times, time_pairs
from moe_ep.cli.main import main
from moe_ep.config import expected_ranks_per_token
from moe_ep.errors import NotBuiltError
from moe_ep.testing import make_routing

CPU = torch.device("cpu")
# Keys that every row of a results file has, whatever was measured.
RESULT_KEYS = {
    "op", "backend", "layout", "dtype", "tokens", "ranks", "hidden", "top_k", "experts", "routing", "num_sms",
    "time_us_max", "time_us_mean", "wire_bytes", "wire_gbps", "logical_gbps", "floor_us", "ratio_to_floor", "nccl_us",
}  # fmt: skip


def make_case(ranks, tokens=24, shape="32:3:12", dtype="float64", routing="uniform"):
    return Case(ranks=ranks, tokens=tokens, shape=Shape.parse(shape), dtype=dtype, routing=routing)


def make_row(**changes):
    row = {
        "op": "dispatch_combine", "backend": "torch", "layout": "expanded", "dtype": "float32", "tokens": 256,
        "ranks": 2, "hidden": 1024, "top_k": 8, "experts": 64, "routing": "uniform", "device": "cpu", "num_sms": None,
        "time_us_max": 1234.5, "time_us_mean": 1200.0, "wire_bytes": 10, "wire_gbps": 1.0, "logical_gbps": 2.0,
        "floor_us": None, "ratio_to_floor": None, "nccl_us": None, "baseline_us": 2000.0, "ratio_median": 0.62,
        "ratio_low": 0.60, "ratio_high": 0.65, "target": 1.0, "met": True, "max_difference": 0.0, "correct": True,
        "baseline": "usual", "pairs": 30,
    }  # fmt: skip
    return row | changes


def test_interval_of_equal_values_is_that_value():
    interval = median_interval([1.5] * 9)
    assert (interval.low, interval.median, interval.high) == (1.5, 1.5, 1.5)


def test_median_of_an_even_number_is_the_mean_of_the_middle():
    assert median_interval([1.0, 2.0, 3.0, 10.0]).median == 2.5


def test_interval_covers_the_true_median_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(5)
    covered = 0
    for _ in range(100):
        sample = torch.randn(30, generator=generator, dtype=torch.float64).tolist()
        interval = median_interval(sample)
        assert interval.low <= interval.median <= interval.high
        covered += interval.low <= 0.0 <= interval.high
    # 100 draws at 95 %: fewer than 85 or all hundred of a far too wide interval would be more than 4 sigma away.
    assert covered >= 85


def test_interval_is_wider_at_a_higher_level():
    values = [float(i) for i in range(30)]
    narrow, wide = median_interval(values, level=0.5), median_interval(values, level=0.99)
    assert wide.high - wide.low > narrow.high - narrow.low


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([1.0], 0.0), ([1.0], 1.0)])
def test_interval_refuses(values, level):
    with pytest.raises(ValueError, match="median needs|level="):
        median_interval(values, level=level)


@pytest.mark.parametrize("text", ["1024:8", "a:b:c", "0:1:1", "16:-1:2", "16:4:2"])
def test_shape_refuses(text):
    with pytest.raises(ValueError, match="shape="):
        Shape.parse(text)


def test_cases_refuse_experts_that_ranks_do_not_divide():
    with pytest.raises(ValueError, match="num_experts=12.*5 ranks"):
        list(exchange_cases(5, [8], [Shape.parse("16:2:12")], dtype="float32", routing="uniform"))


def exchange_by_baseline(ctx, kind, tokens, experts, top_k):
    generator = torch.Generator().manual_seed(ctx.rank)
    x = torch.randn(tokens[ctx.rank], 8, generator=generator, dtype=torch.float64)
    topk_idx, topk_weights = make_routing(tokens[ctx.rank], top_k, experts, kind=kind, seed=ctx.rank)
    dispatcher = AllToAllDispatcher(ctx.group, experts)
    rows, counts, route = dispatcher.dispatch(x, topk_idx, topk_weights.double())
    # An expert whose work depends on which it is: rows in a wrong group would show.
    scale = torch.repeat_interleave(1.0 + ctx.rank * (experts // ctx.world_size) + torch.arange(len(counts)), counts)
    out = dispatcher.combine(rows * scale.unsqueeze(1), route)
    factor = (topk_weights.double() * (topk_idx >= 0) * (1.0 + topk_idx)).sum(1, keepdim=True)
    return x, topk_idx, rows, counts, out, x * factor


@pytest.mark.parametrize("kind", ["uniform", "holes", "one", "empty"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_baseline_is_right(ranks, num_ranks, kind):
    experts = 12 if num_ranks != 4 else 4
    results = ranks(num_ranks, exchange_by_baseline, kind, [7, 0, 3, 5][:num_ranks], experts, 2)
    for rank, (_, _, rows, counts, out, expected) in enumerate(results):
        # Two terms of at most 12 |x| each, in fp64.
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        wanted = []
        for expert in range(rank * experts // num_ranks, (rank + 1) * experts // num_ranks):
            chosen = [x[(topk_idx == expert).any(1)] for x, topk_idx, *_ in results]
            assert int(counts[expert - rank * experts // num_ranks]) == sum(len(part) for part in chosen)
            wanted += chosen
        assert torch.equal(rows, torch.cat(wanted))


def test_pairs_are_interleaved_and_alternate():
    calls = []

    def way(name):
        return (lambda _: calls.append(name) or name, lambda state: calls.append(state + "'"))

    contest = Contest(stages=("first", "second"), ours=way("o"), baseline=way("b"), check=lambda: (0.0, True))
    times = time_pairs(contest, Rank(group=None, device=CPU), pairs=3, warmup=1)
    assert times.shape == (2, 3, 2)
    assert bool((times >= 0).all())
    assert "".join(calls) == "bb'oo'" + "oo'bb'" + "bb'oo'" + "oo'bb'"


def gather(ctx):
    return gather_times(torch.full((2, 3), float(ctx.rank)), Rank(group=ctx.group, device=CPU))


def test_times_of_all_ranks_are_gathered(ranks):
    for gathered in ranks(3, gather):
        assert gathered[:, 0, 0].tolist() == [0.0, 1.0, 2.0]


def measure_exchange(ctx, case, pairs):
    return measure(Rank(group=ctx.group, device=CPU), find_measurement("dispatch_combine", "torch"), case, pairs)


@pytest.mark.parametrize(("num_ranks", "shape"), [(2, "32:6:16"), (2, "32:1:16"), (4, "32:6:16")])
def test_exchange_measurement(ranks, num_ranks, shape):
    case = make_case(num_ranks, shape=shape)
    results = ranks(num_ranks, measure_exchange, case, 2)
    assert all(rows == results[0] for rows in results[1:])
    whole, dispatch, combine = results[0]
    assert [row["op"] for row in results[0]] == ["dispatch_combine", "dispatch", "combine"]
    for row in results[0]:
        assert set(row) >= RESULT_KEYS
        assert row["correct"]
        assert row["time_us_max"] >= row["time_us_mean"] > 0
        assert row["ratio_low"] <= row["ratio_median"] <= row["ratio_high"]
    assert whole["wire_bytes"] == dispatch["wire_bytes"] + combine["wire_bytes"]


def take_fixed_times(monkeypatch, times, target):
    """Rows of a measurement whose ranks took ``times``, microseconds [R, 2, pairs]; 2 at index 1: ours, baseline."""
    every_rank = iter([torch.tensor([[0.0, 1.0]] * len(times)), torch.tensor(times).double().unsqueeze(3)])
    traffic = torch.tensor([[1000.0, 2000.0], [3000.0, 4000.0]], dtype=torch.float64)
    monkeypatch.setattr(registry, "time_pairs", lambda *args, **kwargs: None)
    monkeypatch.setattr(registry, "gather_times", lambda mine, rank: next(every_rank, traffic))
    contest = Contest(stages=("whole",), ours=(), baseline=(), check=lambda: (0.0, True))
    measurement = replace(
        find_measurement("moe_layer", "torch"), prepare=lambda rank, case: contest, target=lambda case: target
    )
    return measure(Rank(group=None, device=CPU), measurement, make_case(2), len(times[0][0]))


def test_the_slowest_rank_sets_the_time_and_the_ratio(monkeypatch):
    ranks_take = [[[10.0] * 4, [40.0] * 4], [[30.0] * 4, [20.0] * 4]]
    row = take_fixed_times(monkeypatch, ranks_take, target=None)[0]
    assert (row["time_us_max"], row["time_us_mean"], row["baseline_us"]) == (30, 20, 40)
    assert (row["ratio_low"], row["ratio_median"], row["ratio_high"]) == (0.75, 0.75, 0.75)
    assert row["met"] is None
    # 3000 bytes in 30 us: the bytes and the time of the busiest rank.
    assert row["wire_gbps"] == pytest.approx(0.1)
    # Ranks that are slow in turn: in every pair one of them takes 30 us, though each rank's median is 20.
    row = take_fixed_times(monkeypatch, [[[10.0, 30.0], [10.0, 10.0]], [[30.0, 10.0], [10.0, 10.0]]], target=None)[0]
    assert (row["time_us_max"], row["ratio_median"]) == (20, 3)


@pytest.mark.parametrize(("target", "met"), [(0.9, False), (1.0, False), (1.49, False), (1.5, True)])
def test_a_target_is_met_by_the_upper_end_of_the_interval_and_not_by_the_median(monkeypatch, target, met):
    times = [[[8.0] * 6 + [15.0] * 5, [10.0] * 11]] * 2
    row = take_fixed_times(monkeypatch, times, target)[0]
    assert (row["ratio_median"], row["ratio_high"]) == (0.8, 1.5)
    assert (row["target"], row["met"]) == (target, met)


def check_with_fault(ctx, case, fault):
    import moe_ep

    original = getattr(moe_ep.TokenDispatcher, fault)

    def broken(self, x, *args, **kwargs):
        result = original(self, x, *args, **kwargs)
        if ctx.rank == 1 and fault == "combine":
            result[0] += 1e-3
        if ctx.rank == 1 and fault == "dispatch":
            result.x[[0, 1]] = result.x[[1, 0]]
        return result

    setattr(moe_ep.TokenDispatcher, fault, broken)
    try:
        contest = exchange_contest(Rank(group=ctx.group, device=CPU), case)
        return contest.check()[1]
    finally:
        setattr(moe_ep.TokenDispatcher, fault, original)


@pytest.mark.parametrize("fault", ["dispatch", "combine"])
def test_a_wrong_result_is_seen(ranks, fault):
    # Rows swapped on rank 1 come back to both ranks; a wrong sum stays on the rank that made it.
    expected = {"dispatch": [False, False], "combine": [True, False]}[fault]
    assert ranks(2, check_with_fault, make_case(2), fault) == expected


def inputs(ctx, case):
    rank = Rank(group=ctx.group, device=CPU)
    x, topk_idx, topk_weights = make_inputs(rank, case)
    return x, topk_idx, topk_weights, count_rows(topk_idx, rank, case)


def test_ranks_draw_different_tokens_and_rows_are_counted(ranks):
    case = make_case(4, tokens=2000, shape="16:4:64")
    results = ranks(4, inputs, case)
    assert not torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
    for _, _, _, (remote, in_all) in results:
        # One row per (token, rank) at this shape; 2000 tokens put the mean within 3 % of its expectation.
        assert math.isclose(in_all, 2000 * expected_ranks_per_token(4, 64, 4), rel_tol=0.03)
        assert math.isclose(remote, in_all * 3 / 4, rel_tol=0.05)


def test_rows_per_choice_are_counted(ranks):
    for _, _, _, (remote, in_all) in ranks(2, inputs, make_case(2, tokens=500, shape="16:1:8")):
        assert in_all == 500
        assert 0 < remote < 500


def test_layer_measurement():
    case = make_case(1, tokens=16, shape="32:2:4", dtype="float32")
    rows = measure(Rank(group=None, device=CPU), find_measurement("moe_layer", "torch"), case, 2)
    assert [row["op"] for row in rows] == ["moe_layer", "moe_layer_forward", "moe_layer_backward"]
    assert all(row["correct"] and row["wire_bytes"] is None for row in rows)
    assert rows[0]["target"] == 1.05


def test_layer_check_sees_a_wrong_weight():
    contest = layer_contest(Rank(group=None, device=CPU), make_case(1, tokens=16, shape="32:2:4", dtype="float32"))
    assert contest.check()[1]
    layer = contest.ours[0].__self__.layer
    with torch.no_grad():
        next(layer.experts.parameters()).mul_(1.01)
    assert not contest.check()[1]


def test_exchange_needs_ranks():
    with pytest.raises(ValueError, match="ranks=1"):
        exchange_contest(Rank(group=None, device=CPU), make_case(1))


def test_unknown_backend_says_what_is_needed():
    with pytest.raises(NotBuiltError, match="cuda backend"):
        find_measurement("dispatch_combine", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_cuda_without_gpus_is_refused():
    assert pick_device("auto", 2) == "cpu"
    with pytest.raises(ValueError, match="one GPU per rank"):
        pick_device("cuda", 2)


def test_table_marks_missed_targets_and_wrong_results():
    assert table_row(make_row())[-1] == "equal, met"
    assert table_row(make_row(met=False))[-1] == "equal, MISSED"
    assert table_row(make_row(met=None, target=None))[-1] == "equal"
    assert "DIFFER" in table_row(make_row(correct=False, max_difference=0.5))[-1]
    assert len(table_row(make_row())) == len(COLUMNS)


def test_machine_slug_is_a_file_name():
    assert machine_slug({"gpus": ["NVIDIA H200"] * 4, "cpu": "x", "cores": 8}) == "4x-nvidia-h200"
    cpu = {"gpus": [], "cpu": "Intel(R) Xeon(R) Processor @ 2.90GHz", "cores": 2}
    assert machine_slug(cpu) == "2-core-intel-xeon"
    assert machine_slug(describe_machine())


def test_report_round_trip(tmp_path, capsys):
    report = build_report([make_row()])
    assert set(report) >= {"machine", "commit", "versions", "rows"}
    write_json(report, tmp_path / "deep" / "results.json")
    assert read_json(tmp_path / "deep" / "results.json") == report
    assert "| dispatch_combine | 2 | 256 |" in markdown_report(report)
    print_report(report)
    assert "0.600 .. 0.650" in capsys.readouterr().out


def test_results_lie_with_the_benchmarks_in_the_source_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = build_report([])
    assert default_path(report, ".json").parent == Path(".")
    (tmp_path / "benchmarks").mkdir()
    assert default_path(report, ".json").parent == Path("benchmarks/results")


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}'])
def test_foreign_results_file_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="not a results file"):
        read_json(tmp_path / "results.json")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    write_plot(build_report([make_row(), make_row(ratio_median=1.4, ratio_high=1.6, met=False)]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_exit_codes():
    missed, wrong = make_row(met=False), make_row(correct=False)
    assert bench._exit_code([make_row(), missed], assert_targets=False) == 0
    assert bench._exit_code([make_row(), missed], assert_targets=True) == 1
    assert bench._exit_code([make_row()], assert_targets=True) == 0
    assert bench._exit_code([make_row(), wrong], assert_targets=False) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend", "cuda"], "cuda backend"),
        (["--pairs", "0"], "pairs=0"),
        (["--ranks", "1"], "ranks=1"),
        (["--tokens", "0"], "tokens=0"),
        (["--shapes", "1024:8"], "H:K:E"),
        (["--ranks", "3", "--shapes", "64:2:16"], "experts=16"),
        (["--shapes", "30:2:8"], "shape=30:2:8: hidden_size=30"),
        (["--shapes", "64:65:128"], "shape=64:65:128: top_k=65"),
        (["--op", "moe_layer", "--layer-shapes", "30:2:8"], "shape=30:2:8: hidden_size=30"),
        (["--show", "no-such-file.json"], "no-such-file.json"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(bench, "launch", lambda *_: pytest.fail("a process was started"))
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error.splitlines()[-1]
    assert "Traceback" not in error


def test_quick_run_end_to_end(tmp_path, capsys):
    results, plot = tmp_path / "results.json", tmp_path / "plot.png"
    arguments = ["--quick", "--device", "cpu", "--shapes", "64:2:8", "--tokens", "32", "--pairs", "2"]
    arguments += ["--layer-shapes", "32:2:4", "--layer-tokens", "16"]
    assert main(["bench", *arguments, "--json", str(results), "--plot", str(plot)]) == 0
    rows = json.loads(results.read_text())["rows"]
    assert {row["op"] for row in rows} >= {"dispatch_combine", "dispatch", "combine", "moe_layer"}
    assert all(row["correct"] for row in rows)
    assert plot.exists()
    out = capsys.readouterr().out
    assert "dispatch_combine" in out
    assert main(["bench", "--show", str(results)]) == 0
    assert "| moe_layer |" in capsys.readouterr().out


def test_interrupt_ends_every_process_in_silence():
    command = [sys.executable, "-m", "moe_ep", "bench", "--op", "dispatch_combine", "--ranks", "2", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell without a terminal starts its background jobs with Ctrl-C ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        lines = [process.stderr.readline() for _ in range(2)]
        os.killpg(process.pid, signal.SIGINT)
        # The pipes close when the last process that holds them has ended.
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "R=2 T=256" in lines[1]
    assert process.returncode == 130
    assert "Traceback" not in rest


def fail(rank):
    raise ZeroDivisionError(f"rank {rank.rank} divides")


def test_error_of_a_rank_is_raised_with_its_text():
    with pytest.raises(ProcessRaisedException, match="rank 0 divides"):
        launch(1, "cpu", fail)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_results_file_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (tmp_path, tmp_path / "missing" / "file"):
        assert main(["bench", option, str(target)]) == 2
        assert f"{option} {target} cannot be written" in capsys.readouterr().err
