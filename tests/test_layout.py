"""The memory maps of csrc/layout: regions lie behind each other, apart, aligned, and as long as they say."""

from collections.abc import Iterator

import pytest

_C = pytest.importorskip("moe_ep._C", reason="the extension moe_ep._C is not built: run `make test` or pip install")

BASE = 1 << 20


def spans(told: object) -> Iterator[tuple[int, int]]:
    """Yields (first byte, end) of every region in a description."""
    if isinstance(told, list):
        for part in told:
            yield from spans(part)
    elif isinstance(told, dict) and "address" in told:
        yield told["address"], told["address"] + told["num_bytes"]
    elif isinstance(told, dict):
        for part in told.values():
            yield from spans(part)


def assert_apart(told: object, base: int, num_bytes: int) -> None:
    end = base
    for begin, next_end in sorted(spans(told)):
        assert begin >= end, "regions overlap"
        end = next_end
    assert end <= base + num_bytes


@pytest.mark.parametrize("base", [0, BASE])
@pytest.mark.parametrize(
    ("num_peers", "rows_per_peer", "row_elements"), [(1, 1, 1), (3, 5, 7), (8, 64, 1024), (16, 0, 4)]
)
def test_asym_buffer(base: int, num_peers: int, rows_per_peer: int, row_elements: int):
    told = _C.asym_layout(base=base, num_peers=num_peers, rows_per_peer=rows_per_peer, row_elements=row_elements)
    region_bytes = rows_per_peer * row_elements * 4
    assert [region["address"] for region in told["regions"]] == [
        base + peer * region_bytes for peer in range(num_peers)
    ]
    assert {region["num_bytes"] for region in told["regions"]} == {region_bytes}
    # The total is rounded up so that another area can follow.
    assert told["num_bytes"] == -(-num_peers * region_bytes // _C.REGION_ALIGNMENT) * _C.REGION_ALIGNMENT
    assert_apart(told["regions"], base, told["num_bytes"])


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(("num_peers", "rows_per_peer", "row_elements"), [(1, 1, 1), (3, 5, 7), (8, 64, 1024)])
def test_sym_buffer(num_peers: int, rows_per_peer: int, row_elements: int, decoupled: bool):
    dims = {"num_peers": num_peers, "rows_per_peer": rows_per_peer, "row_elements": row_elements}
    told = _C.sym_layout(base=BASE, decoupled=decoupled, **dims)
    asym = _C.asym_layout(base=BASE, **dims)
    assert told["send"] == asym["regions"]
    if decoupled:
        assert_apart([told["send"], told["receive"]], BASE, told["num_bytes"])
        assert told["receive"][0]["address"] % _C.REGION_ALIGNMENT == 0
        assert told["num_bytes"] == 2 * asym["num_bytes"]
    else:
        assert told["receive"] == told["send"]
        assert told["num_bytes"] == asym["num_bytes"]


LOW_LATENCY = [
    {"max_tokens": 1, "dispatch_bytes": 16, "combine_bytes": 16, "top_k": 1, "num_ranks": 1},
    {"max_tokens": 128, "dispatch_bytes": 7168 + 224, "combine_bytes": 2 * 7168, "top_k": 8, "num_ranks": 8},
    {"max_tokens": 3, "dispatch_bytes": 100, "combine_bytes": 48, "top_k": 5, "num_ranks": 3},
]


@pytest.mark.parametrize("dims", LOW_LATENCY, ids=str)
def test_low_latency_sets_are_apart(dims: dict[str, int]):
    told = _C.low_latency_layout(base=BASE, **dims)
    sets = [*told["dispatch_sets"], *told["combine_sets"]]
    assert len(sets) == 4
    assert_apart(sets, BASE, told["num_bytes"])
    assert sum(one["num_bytes"] for one in sets) == told["num_bytes"]
    for one in sets:
        # Rows and each kind of flag begin on lines of their own.
        assert {
            one[name][0]["address"] % _C.REGION_ALIGNMENT for name in ("rows", "num_rows", "arrived", "consumed")
        } == {0}
        assert {len(one[name]) for name in ("rows", "num_rows", "arrived", "consumed")} == {dims["num_ranks"]}


@pytest.mark.parametrize("dims", LOW_LATENCY, ids=str)
def test_low_latency_rows_hold_what_they_carry(dims: dict[str, int]):
    told = _C.low_latency_layout(base=BASE, **dims)
    record = told["record"]
    assert record["topk_idx"] - record["source_token"] == 4
    assert record["topk_weights"] - record["topk_idx"] == 4 * dims["top_k"]
    assert record["payload"] >= record["topk_weights"] + 4 * dims["top_k"]
    assert record["payload"] % 16 == record["num_bytes"] % 16 == 0
    assert record["num_bytes"] >= record["payload"] + dims["dispatch_bytes"]
    for one in told["dispatch_sets"]:
        assert {rows["row_bytes"] for rows in one["rows"]} == {record["num_bytes"]}
        assert {rows["num_bytes"] for rows in one["rows"]} == {record["num_bytes"] * dims["max_tokens"]}
    for one in told["combine_sets"]:
        assert {rows["row_bytes"] for rows in one["rows"]} == {dims["combine_bytes"]}


@pytest.mark.parametrize("dims", LOW_LATENCY, ids=str)
def test_measuring_over_null_equals_carving(dims: dict[str, int]):
    measured, carved = (_C.low_latency_layout(base=base, **dims) for base in (0, BASE))
    assert measured["num_bytes"] == carved["num_bytes"]
    assert [(begin + BASE, end + BASE) for begin, end in spans(measured)] == list(spans(carved))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"base": 64}, "base=64: must be a multiple of 128"),
        ({"num_peers": 0}, "num_peers=0: must be at least 1"),
        ({"rows_per_peer": -1}, "rows_per_peer=-1: must not be negative"),
        ({"row_elements": 0}, "row_elements=0: must be at least 1"),
    ],
)
def test_wrong_dims(change: dict[str, int], text: str):
    with pytest.raises(ValueError, match=text):
        _C.asym_layout(**{"base": 0, "num_peers": 2, "rows_per_peer": 2, "row_elements": 2, **change})
