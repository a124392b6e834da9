import json

import pytest
import torch

from moe_ep.buffer import Buffer
from moe_ep.cli.main import main
from moe_ep.cli.plan import expect_traffic, format_bytes
from moe_ep.config import ExchangeSpec
from moe_ep.testing import make_routing

DSV3 = ["plan", "--ranks", "4", "--experts", "256", "--top-k", "8", "--hidden", "7168", "--tokens", "4096"]


def figures(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return {line["name"]: line["value"] for line in json.loads(capsys.readouterr().out)}


def make_spec(**changes):
    settings = {"num_experts": 16, "hidden_size": 64, "top_k": 3, "num_ranks": 4, "dtype": torch.float32}
    return ExchangeSpec(**(settings | changes))


def test_figures_of_a_known_shape(capsys):
    plan = figures(capsys, *DSV3, "--intermediate", "2048")
    # 4 (1 - C(192, 8) / C(256, 8)) ranks per token; 3/4 of the rows leave the rank; 14336 bytes per row.
    assert plan["ranks per token, expected"] == pytest.approx(3.614, abs=1e-3)
    assert plan["wire mode"] == "one row per (token, rank)"
    assert plan["compact rows, busiest rank"] == pytest.approx(14_804, abs=1)
    assert plan["expanded rows, busiest rank"] == 32_768
    assert plan["wire bytes out"] == pytest.approx(159.2e6, rel=1e-3)
    assert plan["wire bytes of a training step"] == pytest.approx(4 * plan["wire bytes out"])
    # What weights="combine" keeps beyond weights="experts": y, T K rows of H bf16 numbers.
    extra = plan["saved per layer, weights=combine"] - plan["saved per layer, weights=experts"]
    assert extra == 4096 * 8 * 7168 * 2
    assert plan["saved: inside the experts"] == 4096 * 8 * 3 * 2048 * 2


def test_uniform_formula_agrees_with_a_drawn_routing():
    traffic = expect_traffic(make_spec(), "uniform")
    topk_idx, _ = make_routing(20_000, 3, 16, seed=1)
    ranks = topk_idx // 4
    visits = torch.stack([(ranks == rank).any(1) for rank in range(4)], 1).sum(1).double()
    # The mean of 20,000 draws with a deviation below 1 lies within 0.03 of its expectation.
    assert traffic.ranks_per_token == pytest.approx(float(visits.mean()), abs=0.03)


def test_skewed_routing_is_less_balanced(capsys):
    even, skewed = (figures(capsys, *DSV3, "--routing", kind) for kind in ("uniform", "zipf"))
    assert even["imbalance of ranks"] == 1.0
    assert skewed["imbalance of ranks"] > 1.0
    assert skewed["rows of the busiest expert"] > 2 * even["rows of the busiest expert"]
    assert skewed["wire bytes in, busiest rank"] > skewed["wire bytes out"]


def test_one_rank_has_no_wire(capsys):
    plan = figures(capsys, "plan", "--ranks", "1", "--experts", "8", "--top-k", "2", "--hidden", "64", "--tokens", "16")
    assert plan["wire bytes out"] == 0
    assert plan["ranks per token, expected"] == 1


def test_compact_layout_has_fewer_rows_and_one_weight_place(capsys):
    expanded, compact = (figures(capsys, *DSV3, "--layout", layout) for layout in ("expanded", "compact"))
    assert compact["dispatched rows"] < expanded["dispatched rows"]
    assert "saved per layer, weights=combine" not in compact


def test_arena_is_what_a_buffer_reports(capsys):
    plan = figures(capsys, "plan", "--ranks", "1", "--experts", "8", "--top-k", "2", "--hidden", "64", "--tokens", "16")
    report = Buffer(None).memory_report(max_tokens_per_rank=16, row_bytes=64 * 2)
    assert plan["arena, worst case in one round"] == report["exchange_bytes"]


def test_table_states_formulas(capsys):
    assert main(DSV3) == 0
    out = capsys.readouterr().out
    assert "C(E-e, K) / C(E, K)" in out
    assert "14,804 rows" in out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--experts", "255"], "num_experts=255"),
        (["--top-k", "300"], "top_k=300"),
        (["--tokens", "-1"], "tokens=-1"),
        (["--ranks", "0"], "ranks=0"),
        (["--hidden", "7"], "hidden_size=7"),
        (["--intermediate", "0"], "intermediate=0"),
    ],
)
def test_impossible_plans_are_one_line(capsys, change, text):
    assert main([*DSV3, *change]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**20, "3 MiB"), (2**31, "2.00 GiB")])
def test_bytes_are_readable(count, text):
    assert format_bytes(count) == text
