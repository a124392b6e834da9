"""The bench of the CUDA kernels on one GPU: every exchange is checked by the bench itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_ep.cli.main import main

_C = pytest.importorskip("moe_ep._C", reason="the extension moe_ep._C is not built: run `make test` or pip install")
if not hasattr(_C, "Arena"):
    pytest.skip("moe_ep._C is built without CUDA", allow_module_level=True)
pytestmark = pytest.mark.gpu

SMALL = ["--backend", "cuda", "--quick", "--shapes", "512:4:16", "--tokens", "64", "--pairs", "2"]


def run_bench(path: Path, ranks: int, parts: list[str]) -> list[dict]:
    words = [word for part in parts for word in ("--part", part)]
    assert main(["bench", *SMALL, "--ranks", str(ranks), *words, "--json", str(path)]) == 0
    return json.loads(path.read_text())["rows"]


def test_a_single_rank_is_measured(tmp_path: Path) -> None:
    rows = run_bench(tmp_path / "results.json", 1, ["sweep", "decode", "sms"])
    assert {row["mode"] for row in rows} == {"exact", "capacity", "replay", "graph of 20"}
    assert {row["op"] for row in rows} == {"dispatch", "combine", "decode_pair"}
    if torch.cuda.get_device_capability() >= (9, 0):
        assert all(row["floor_us"] > 0 for row in rows)


@pytest.mark.multi_gpu(2)
def test_all_parts_on_two_ranks(tmp_path: Path) -> None:
    rows = run_bench(tmp_path / "results.json", 2, ["sweep", "decode", "sms", "laps", "overlap", "layer"])
    ours = [row for row in rows if row["backend"] == "cuda"]
    assert {row["op"] for row in ours} >= {"dispatch", "combine", "dispatch_beside_gemm", "moe_layer"}
    assert {row["laps"] for row in ours if "laps" in row} == {1, 2}
    in_arena = [row for row in ours if row["mode"].startswith("arena")]
    assert [(row["mode"], row["num_sms"]) for row in in_arena] == [("arena", 8), ("arena capacity", 8)]
    assert all(row["nccl_us"] > 0 for row in ours if "host_us" in row)
    assert any(row["backend"] == "nccl_reduce_scatter" for row in rows)
    pairs = [row for row in ours if row["op"] == "decode_pair"]
    dtypes = ("bfloat16", "float8_e4m3fn")
    assert {(row["layout"], row["dtype"]) for row in pairs} == {
        (layout, dtype) for layout in ("compact", "expanded", "slab") for dtype in dtypes
    }
    assert all(row["nccl_us"] > 0 for row in ours if row["mode"] == "graph of 20")
    nccl = [row for row in rows if row["backend"] == "nccl_all_gather_reduce_scatter"]
    assert [row["dtype"] for row in nccl] == list(dtypes)
