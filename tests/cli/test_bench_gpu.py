import json

import pytest
import torch

from moe_ep import TokenDispatcher
from moe_ep.backends.cuda import load_extension
from moe_ep.cli.bench.cases import Case, Shape
from moe_ep.cli.bench.gpu import PARTS, check_ranks, require_kernels, settings_from
from moe_ep.cli.bench.gpu.baselines import GatherAll, NcclTimes, RowsOnce
from moe_ep.cli.bench.gpu.context import fill_nan, make_row, payload_of
from moe_ep.cli.bench.gpu.decode import DECODE_LAYOUTS, PAIR, decode_tokens, nccl_way, our_way
from moe_ep.cli.bench.gpu.exchange import expert_outputs, has_sums, is_right
from moe_ep.cli.bench.gpu.floor import aligned, offsets
from moe_ep.cli.bench.gpu.inputs import ALIGNMENT, Inputs, cast_fp8, pack_fp8, unpack_fp8
from moe_ep.cli.bench.gpu.overlap import hidden_share
from moe_ep.cli.bench.gpu.report import (
    COLUMNS,
    DECODE_COLUMNS,
    DECODE_TITLE,
    curve_rows,
    decode_table,
    pair_rows,
    sweep_rows,
    table_row,
    write_plot,
)
from moe_ep.cli.bench.gpu.timer import CALLS_IN_GRAPH, GRAPH_MODE, Timing, in_a_row
from moe_ep.cli.bench.gpu.traffic import count_traffic, row_bytes_of, visits
from moe_ep.cli.bench.report import build_report, markdown_report, print_report, write_json
from moe_ep.cli.bench.timing import Rank
from moe_ep.cli.main import build_parser, main
from moe_ep.config import FP8_DTYPE
from moe_ep.errors import NotBuiltError
from tests.cli.test_bench import RESULT_KEYS

CPU = torch.device("cpu")
TIMING = Timing(max_us=200.0, mean_us=150.0)


def make_case(ranks, tokens=24, shape="256:3:12", routing="uniform"):
    return Case(ranks=ranks, tokens=tokens, shape=Shape.parse(shape), dtype="bfloat16", routing=routing)


def parse(*words):
    return build_parser(["bench"]).parse_args(["bench", "--backend", "cuda", *words])


# Traffic


@pytest.fixture
def traffic():
    # Experts 0, 1 on rank 0 and 2, 3 on rank 1.
    first = torch.tensor([[0, 1], [0, 2], [-1, 3]])
    second = torch.tensor([[1, 2], [3, 2], [-1, -1]])
    return count_traffic([first, second], num_experts=4, alignment=4)


def test_a_token_counts_once_for_each_rank(traffic):
    assert traffic.rows == ((2, 2), (1, 2))
    assert traffic.received == (3, 4)
    assert traffic.choices == (4, 5)
    # Experts 0, 1: 2 + 2 choices; 2, 3: 3 + 2.
    assert traffic.expanded == (8, 8)


def test_bytes_are_those_of_the_busiest_rank(traffic):
    assert traffic.wire_bytes(10) == 20
    assert traffic.logical_bytes(10) == 40


def test_pushed_bytes_leave_out_what_stays(traffic):
    assert traffic.pushed_bytes(16) == ((0, 32), (16, 0))
    assert traffic.pushed_bytes(16, reverse=True) == ((0, 16), (32, 0))


def test_a_single_rank_copies_its_own_rows():
    alone = count_traffic([torch.tensor([[0, 1], [-1, -1]])], num_experts=2, alignment=1)
    assert alone.wire_bytes(16) == 0
    assert alone.pushed_bytes(16) == ((16,),)


def test_visits():
    assert visits(torch.tensor([[0, -1], [3, 2]]), 2, 4).tolist() == [[True, False], [False, True]]


def test_fp8_rows_carry_scales():
    assert row_bytes_of(torch.bfloat16, 7168) == 14336
    assert row_bytes_of(FP8_DTYPE, 7168) == 7392


# Floor


def test_sources_do_not_overlap_at_a_target():
    table = ((0, 130, 16), (256, 0, 0), (128, 144, 0))
    assert offsets(table) == ((0, 0, 0), (0, 256, 128), (256, 256, 128))
    assert [aligned(size) for size in (0, 1, 128, 129)] == [0, 128, 128, 256]


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"targets": [16, 32]}, "equally many"), ({"num_bytes": [8]}, "multiple of 16"), ({"num_sms": 0}, "num_sms=0")],
)
def test_push_refuses(changes, text):
    extension = load_extension()
    if not extension.build_info()["cuda"]:
        pytest.skip("moe_ep._C was built without CUDA")
    arguments = {"sources": [16], "targets": [16], "num_bytes": [16], "num_sms": 1, "stream": 0}
    with pytest.raises(ValueError, match=text):
        extension.push(**{**arguments, **changes})


# Checks, against the torch backend


def make_dispatcher(ctx, case, layout):
    return TokenDispatcher(
        ctx.group,
        num_experts=case.shape.experts,
        hidden_size=case.shape.hidden,
        top_k=case.shape.top_k,
        layout=layout,
        alignment=ALIGNMENT if layout == "expanded" else 1,
        weights="experts" if layout == "compact" else "combine",
        max_tokens_per_rank=case.tokens,
        backend="torch",
    )


@torch.no_grad()
def check_exchange(ctx, case, layout, fp8, fault):
    inputs = Inputs(Rank(group=ctx.group, device=CPU), case)
    dispatcher = make_dispatcher(ctx, case, layout)
    routed = dispatcher.dispatch(inputs.fp8 if fp8 else inputs.x, inputs.topk_idx, inputs.topk_weights)
    if fault == "rows":
        routed.x.view(torch.uint8)[[0, 1]] = routed.x.view(torch.uint8)[[1, 0]]
    if fault == "weights":
        routed.weights[routed.weights != 0] *= 1.5
    if fault == "scales":
        routed.scales[0, 0] *= 2
    right = is_right(inputs, routed, layout)
    if fp8:
        return right, True
    y, weights = expert_outputs(inputs, routed, layout)
    out = dispatcher.combine(y, routed.handle, weights)
    if fault == "sums":
        out[0] += 0.25
    return right, has_sums(inputs, out, layout)


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", ["compact", "expanded", "slab"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_right_exchanges_pass(ranks, num_ranks, layout, fp8, routing):
    case = make_case(num_ranks, routing=routing)
    assert ranks(num_ranks, check_exchange, case, layout, fp8, None) == [(True, True)] * num_ranks


@pytest.mark.parametrize(
    ("layout", "fault"),
    [(layout, fault) for layout in ("compact", "expanded", "slab") for fault in ("rows", "weights", "sums")],
)
def test_wrong_exchanges_do_not_pass(ranks, layout, fault):
    for right, summed in ranks(2, check_exchange, make_case(2), layout, False, fault):
        assert not (right and summed)
        if fault != "sums":
            assert not right


@pytest.mark.parametrize("layout", ["compact", "expanded", "slab"])
def test_wrong_scales_do_not_pass(ranks, layout):
    assert ranks(2, check_exchange, make_case(2), layout, True, "scales") == [(False, True)] * 2


@torch.no_grad()
def check_padding(ctx, case):
    inputs = Inputs(Rank(group=ctx.group, device=CPU), case)
    routed = make_dispatcher(ctx, case, "expanded").dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)
    before = inputs.has_grouped(routed.x, ALIGNMENT)
    # Groups of this few tokens are not full.
    routed.x[int(routed.expert_ends[0]) - 1] = 1.0
    return before, inputs.has_grouped(routed.x, ALIGNMENT)


def test_padding_must_be_zero(ranks):
    assert ranks(2, check_padding, make_case(2)) == [(True, False)] * 2


@torch.no_grad()
def check_baselines(ctx, case):
    inputs = Inputs(Rank(group=ctx.group, device=CPU), case)
    rows, gather = RowsOnce(inputs), GatherAll(inputs)
    sent = rows.dispatch()
    fixed = gather.dispatch_static()[0]
    return {
        "compact": inputs.has_compact(sent),
        "fp8": inputs.has_compact(*unpack_fp8(rows.dispatch(pack_fp8(inputs.fp8)), case.shape.hidden)),
        "compact sums": inputs.has_compact_sums(rows.combine(inputs.compact_outputs(sent))),
        "grouped": inputs.has_grouped(gather.dispatch()[0], 1),
        "grouped, static": inputs.has_grouped(fixed, 1) and len(fixed) == max(inputs.traffic.choices),
        "grouped sums": inputs.has_grouped_sums(gather.combine(inputs.grouped_outputs(gather.dispatch()[0], 1))),
    }


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_baselines_are_right(ranks, num_ranks, tokens):
    for found in ranks(num_ranks, check_baselines, make_case(num_ranks, tokens=tokens)):
        assert all(found.values()), found


# Decoding


@torch.no_grad()
def check_pairs(ctx, case, name):
    inputs = Inputs(Rank(group=ctx.group, device=CPU), case)
    way = nccl_way(inputs) if name == "nccl" else our_way(make_dispatcher(ctx, case, name), inputs)
    found = {}
    for dtype in (torch.bfloat16, FP8_DTYPE):
        rows, other_rows = way.rows(inputs.x, dtype), way.rows(-inputs.x, dtype)
        found[dtype, "right"] = way.is_right_pair(dtype, way.pair(rows, way.y))
        routed, sums = way.pair(other_rows, -way.y)
        # A rank that gets no rows has nothing to tell apart.
        found[dtype, "others differ"] = not (inputs.traffic.choices[ctx.rank] and way.is_right(dtype, routed))
        found[dtype, "other sums differ"] = not way.has_sums(sums)
    return found


@pytest.mark.parametrize("tokens", [1, 24])
@pytest.mark.parametrize("name", [*DECODE_LAYOUTS, "nccl"])
def test_only_the_last_pair_of_a_graph_passes(ranks, name, tokens):
    for found in ranks(2, check_pairs, make_case(2, tokens=tokens), name):
        assert all(found.values()), found


def test_a_single_rank_decodes(ranks):
    for layout in DECODE_LAYOUTS:
        (found,) = ranks(1, check_pairs, make_case(1), layout)
        assert all(found.values()), (layout, found)


def test_calls_in_a_row_return_what_the_last_one_does():
    calls = []
    run = in_a_row(lambda: calls.append("last") or "result", lambda: calls.append("other"))
    assert run() == "result"
    assert calls == ["other"] * (CALLS_IN_GRAPH - 1) + ["last"]


def test_times_of_a_graph_are_shared_and_added():
    assert TIMING.of_each(20) == Timing(max_us=10.0, mean_us=7.5)
    assert TIMING.plus(TIMING) == Timing(max_us=400.0, mean_us=300.0)


def test_fp8_cast_keeps_values():
    rows = torch.randn(5, 256).to(torch.bfloat16)
    cast, scales = cast_fp8(rows)
    back = cast.float().view(5, -1, 128) * scales.unsqueeze(2)
    # e4m3 has 3 bits behind the point: rounding errs by a sixteenth.
    torch.testing.assert_close(back.view(5, -1), rows.float(), rtol=1 / 16, atol=0.01)


def test_poison_is_nan_in_every_dtype():
    tensors = [torch.zeros(2, 16, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, FP8_DTYPE)]
    fill_nan(tensors)
    assert all(bool(tensor.float().isnan().all()) for tensor in tensors)
    assert len(payload_of((tensors[0], torch.zeros(1, dtype=torch.int64), [1]))) == 1


@torch.no_grad()
def count_payload(ctx, case):
    inputs = Inputs(Rank(group=ctx.group, device=CPU), case)
    way = our_way(make_dispatcher(ctx, case, "expanded"), inputs)
    return [len(payload_of(way.pair(way.rows(inputs.x, dtype), way.y))) for dtype in (torch.bfloat16, FP8_DTYPE)]


def test_payload_of_a_pair(ranks):
    # Rows, weights and sums; fp8 rows have scales.
    assert ranks(1, count_payload, make_case(1)) == [[3, 4]]


# Settings


def test_defaults():
    settings = settings_from(parse())
    assert settings.parts == PARTS
    assert (settings.shape.hidden, settings.shape.top_k, settings.shape.experts) == (7168, 8, 256)
    assert settings.tokens == (1, 8, 32, 128, 512, 1024, 4096, 8192)
    assert settings.routings == ("uniform", "zipf")
    assert settings.repeats >= 20


def test_parts_and_sizes_are_chosen():
    settings = settings_from(parse("--part", "laps", "--part", "sweep", "--tokens", "64", "--routing", "zipf"))
    assert settings.parts == ("sweep", "laps")
    assert settings.tokens == (64,)
    assert settings.routings == ("zipf",)
    quick = settings_from(parse("--quick", "--shapes", "512:4:16"))
    assert quick.layer.experts == 16
    assert len(quick.routings) == 1


def test_decoding_takes_few_tokens():
    assert decode_tokens(settings_from(parse("--part", "decode")).tokens) == (1, 8, 32, 128, 512)
    assert decode_tokens(settings_from(parse("--quick")).tokens) == (32,)
    assert settings_from(parse("--tokens", "4096")).parts == PARTS


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--op", "moe_layer"], "--part"),
        (["--dtype", "float16"], "--dtype"),
        (["--device", "cpu"], "device=cpu"),
        (["--tokens", "0"], "tokens=0"),
        (["--pairs", "0"], "pairs=0"),
        (["--part", "decode", "--tokens", "4096"], "up to 512 tokens"),
        (["--shapes", "64:2:8", "32:2:8"], "one shape"),
    ],
)
def test_settings_refuse(capsys, words, text):
    assert main(["bench", "--backend", "cuda", *words]) == 2
    assert text in capsys.readouterr().err


def test_ranks_must_divide_experts():
    with pytest.raises(ValueError, match="num_experts=256.*3 ranks"):
        check_ranks(3, settings_from(parse()))
    with pytest.raises(ValueError, match="ranks=0"):
        check_ranks(0, settings_from(parse()))


def test_a_shape_that_no_dispatcher_takes_is_refused_before_processes_start():
    for shape, text in (("30:2:8", "hidden_size=30"), ("64:65:128", "top_k=65")):
        with pytest.raises(ValueError, match=f"shape={shape}: {text}"):
            check_ranks(2, settings_from(parse("--shapes", shape)))


def test_parts_need_the_cuda_backend(capsys):
    assert main(["bench", "--part", "sms"]) == 2
    assert "--backend cuda" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_without_gpus_it_says_what_is_missing(capsys):
    with pytest.raises(NotBuiltError, match="torch sees none here"):
        require_kernels()
    assert main(["bench", "--backend", "cuda"]) == 2
    error = capsys.readouterr().err
    assert "cuda backend on GPUs, and torch sees none here" in error
    assert "Traceback" not in error


# Results


def gpu_row(traffic, **changes):
    values = {"op": "dispatch", "layout": "compact", "mode": "exact", "timing": TIMING, "num_sms": 16}
    values |= {"floor": Timing(max_us=100.0, mean_us=100.0), "nccl_us": 300.0}
    case = make_case(2, tokens=changes.pop("tokens", 128))
    return make_row(case, traffic, **{**values, **changes})


def test_rows_have_the_keys_of_results(traffic):
    row = gpu_row(traffic)
    assert set(row) == RESULT_KEYS | {"mode"}
    assert row["wire_bytes"] == 2 * 512
    assert row["wire_gbps"] == pytest.approx(1024 / 200e-6 / 1e9)
    assert (row["ratio_to_floor"], row["nccl_us"], row["dtype"]) == (2.0, 300.0, "bfloat16")
    assert gpu_row(traffic, with_rates=False)["wire_gbps"] is None
    assert set(gpu_row(traffic, host_us=3.0, sm_budget=None)) == RESULT_KEYS | {"mode", "host_us"}


def test_pairs_carry_bytes_of_both_ways(traffic):
    row = gpu_row(traffic, op=PAIR, mode=GRAPH_MODE, dtype=FP8_DTYPE, dtype_home=torch.bfloat16)
    assert set(row) == RESULT_KEYS | {"mode"}
    # 256 channels: fp8 with two scales, and bf16.
    assert row["wire_bytes"] == 2 * (256 + 2 * 4 + 512)
    assert row["dtype"] == "float8_e4m3fn"


def test_the_best_of_nccl_counts():
    times = NcclTimes()
    assert times.best("dispatch", "expanded", torch.bfloat16) is None
    times.note("dispatch", "expanded", torch.bfloat16, False, 30.0)
    times.note("dispatch", "expanded", torch.bfloat16, False, 20.0)
    assert times.best("dispatch", "expanded", torch.bfloat16, captured=True) == 20.0
    times.note("dispatch", "expanded", torch.bfloat16, True, 25.0)
    assert times.best("dispatch", "expanded", torch.bfloat16, captured=True) == 25.0
    assert times.best("dispatch", "expanded", torch.bfloat16) == 20.0


def test_hidden_share():
    assert hidden_share(together_us=1500.0, other_us=1400.0, exchange_us=500.0) == pytest.approx(0.8)


def decode_rows(traffic):
    rows = []
    for tokens in (1, 32):
        common = {"mode": GRAPH_MODE, "tokens": tokens}
        for dtype in (torch.bfloat16, FP8_DTYPE):
            nccl = {"backend": "nccl_all_gather_reduce_scatter", "layout": "expanded", "floor": None, "nccl_us": None}
            rows.append(gpu_row(traffic, op=PAIR, dtype=dtype, **common, **nccl, num_sms=None))
            rows.append(gpu_row(traffic, op=PAIR, dtype=dtype, **common))
            half = Timing(max_us=70.0, mean_us=60.0)
            rows.append(gpu_row(traffic, timing=half, dtype=dtype, nccl_us=90.0, **common))
        rows.append(gpu_row(traffic, op="combine", timing=Timing(max_us=80.0, mean_us=75.0), **common))
    return rows


def test_table_of_pairs(traffic, capsys):
    rows = decode_rows(traffic)
    table = decode_table(rows)
    cases = [(tokens, dtype) for tokens in ("1", "32") for dtype in ("bf16", "fp8")]
    assert [row[:4] for row in table] == [["compact", dtype, "2", tokens] for tokens, dtype in cases]
    for row in table:
        assert len(row) == len(DECODE_COLUMNS)
        assert row[5:] == ["200.0", "300.0", "1.50", "70.0", "90.0", "80.0", "300.0", "100.0"]
    # A part of the rows still makes a table, and no rows make none.
    alone = decode_table([gpu_row(traffic, op=PAIR, mode=GRAPH_MODE, nccl_us=None, floor=None)])
    assert alone[0][5:] == ["200.0", "", "", "", "", "", "", ""]
    assert decode_table(many_rows(traffic)) == []
    print_report(build_report(rows))
    assert DECODE_TITLE in capsys.readouterr().out
    markdown = markdown_report(build_report(rows))
    assert "| decode_pair | compact | fp8 | graph of 20 | cuda |" in markdown
    assert "| compact | fp8 | 2 | 32 | uniform | 200.0 | 300.0 | 1.50 |" in markdown
    assert DECODE_TITLE not in markdown_report(build_report(many_rows(traffic)))


def test_graphs_of_many_stay_out_of_other_curves(traffic):
    rows = many_rows(traffic) + decode_rows(traffic)
    for op in ("dispatch", "combine"):
        assert sweep_rows(rows, op) == sweep_rows(many_rows(traffic), op)
    assert curve_rows(rows) == curve_rows(many_rows(traffic))
    assert {row["backend"] for row in pair_rows(rows)} == {"cuda", "nccl_all_gather_reduce_scatter"}


def many_rows(traffic):
    rows = [gpu_row(traffic, tokens=tokens, op=op) for tokens in (1, 128, 4096) for op in ("dispatch", "combine")]
    rows += [gpu_row(traffic, tokens=4096, num_sms=num_sms, mode="capacity") for num_sms in (4, 8, 16, 64)]
    rows.append(gpu_row(traffic, mode="capacity", dtype=FP8_DTYPE, host_us=12.5, arena_bytes=2**30))
    rows.append(gpu_row(traffic, backend="nccl_all_to_all", num_sms=None, floor=None, nccl_us=None))
    rows.append(gpu_row(traffic, laps=4, tokens=4096))
    rows.append(gpu_row(traffic, op="moe_layer", num_chunks=2, hidden_share=0.5, exchange_us=2000.0))
    return rows


def test_table(traffic, capsys, tmp_path):
    rows = many_rows(traffic)
    assert all(len(table_row(row)) == len(COLUMNS) for row in rows)
    report = build_report(rows)
    print_report(report)
    out = capsys.readouterr().out
    assert "nccl_all_to_all" in out
    assert table_row(rows[-1])[-1] == "chunks: 2, exchange 2,000 us, 50% hidden"
    assert "arena 1,024 MiB" in [table_row(row)[-1] for row in rows]
    assert "| dispatch | compact | bf16 | exact |" in markdown_report(report)
    write_json(report, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert main(["bench", "--show", str(tmp_path / "results.json")]) == 0


def test_curves_take_their_rows(traffic):
    rows = many_rows(traffic)
    assert sorted({row["tokens"] for row in sweep_rows(rows, "combine")}) == [1, 128, 4096]
    assert {row["num_sms"] for row in sweep_rows(rows, "dispatch")} == {16, None}
    assert {row["num_sms"] for row in curve_rows(rows)} == {4, 8, 16, 64}
    assert {row["tokens"] for row in curve_rows(rows)} == {4096}
    assert curve_rows([]) == []


@pytest.mark.parametrize("empty", [False, True])
def test_plot(traffic, tmp_path, empty):
    pytest.importorskip("matplotlib")
    write_plot([] if empty else many_rows(traffic) + decode_rows(traffic), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
