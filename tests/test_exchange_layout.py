"""Memory maps of the CUDA backend: arenas, groups of rows and plan tables, measured without a GPU."""

from __future__ import annotations

import pytest

from moe_ep.backends.cuda_counting import source_words

_C = pytest.importorskip("moe_ep._C", reason="moe_ep._C is not built")

REGION = _C.REGION_ALIGNMENT


@pytest.mark.parametrize("num_ranks", [1, 3, _C.MAX_NODE_RANKS])
def test_arena_grows_by_its_rings_alone(num_ranks: int) -> None:
    empty = _C.arena_bytes(num_ranks=num_ranks, payload_bytes=0)
    filled = _C.arena_bytes(num_ranks=num_ranks, payload_bytes=64 * REGION)
    assert filled - empty == num_ranks * 64 * REGION
    assert empty % REGION == 0


@pytest.mark.parametrize(
    ("num_ranks", "payload_bytes"), [(0, 0), (_C.MAX_NODE_RANKS + 1, 0), (2, -REGION), (2, REGION + 1)]
)
def test_arena_refuses_other_sizes(num_ranks: int, payload_bytes: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        _C.arena_bytes(num_ranks=num_ranks, payload_bytes=payload_bytes)


@pytest.mark.parametrize("row_bytes", [16, 48, 7168, 65536])
@pytest.mark.parametrize("meta_words", [0, 1, 24, 700])
def test_group_holds_a_chunk_of_rows_and_words(row_bytes: int, meta_words: int) -> None:
    group = _C.group_layout(row_bytes=row_bytes, meta_words=meta_words)
    # Sixteen bytes of header, then words, then rows where bulk copies may begin.
    assert group["meta"] >= 16
    assert group["rows"] >= group["meta"] + 4 * meta_words * _C.CHUNK_TOKENS
    assert group["rows"] % REGION == 0
    assert group["num_bytes"] >= group["rows"] + row_bytes * _C.CHUNK_TOKENS
    assert group["num_bytes"] - group["rows"] - row_bytes * _C.CHUNK_TOKENS < REGION
    assert group["num_bytes"] % REGION == 0


DIRECT_SIZES = [(2, 0, 16, 0, 0), (3, 1, 48, 3, 5), (4, 1024, 14336, 24, 14770), (16, 16384, 32, 700, 1)]


@pytest.mark.parametrize(("num_ranks", "num_groups", "row_bytes", "meta_words", "num_rows"), DIRECT_SIZES)
def test_rows_that_stay_lie_behind_groups_without_rows(
    num_ranks: int, num_groups: int, row_bytes: int, meta_words: int, num_rows: int
) -> None:
    record = {"row_bytes": row_bytes, "meta_words": meta_words}
    dims = {"num_ranks": num_ranks, "num_groups": num_groups, **record, "num_rows": num_rows}
    layout = _C.direct_layout(**dims)
    of_source = num_groups * _C.group_layout(row_bytes=0, meta_words=meta_words)["num_bytes"]
    assert layout["groups"] == [source * of_source for source in range(num_ranks)]
    assert layout["rows"] == num_ranks * of_source
    assert layout["rows"] % REGION == 0
    used = layout["rows"] + num_rows * row_bytes
    assert used <= layout["num_bytes"] < used + REGION
    # Rings of all sources together are what it lies in.
    enough = -(-layout["num_bytes"] // (num_ranks * REGION)) * REGION
    assert _C.fits_directly(payload_bytes=enough, **dims)
    assert enough == 0 or not _C.fits_directly(payload_bytes=enough - REGION, **dims)


def test_rows_stay_only_where_every_group_has_a_flag() -> None:
    dims = {"num_ranks": 2, "payload_bytes": 1 << 40, "row_bytes": 16, "meta_words": 0, "num_rows": 1}
    most = _C.group_layout(row_bytes=0, meta_words=0)["max_ring_groups"]
    assert _C.fits_directly(num_groups=most, **dims)
    assert not _C.fits_directly(num_groups=most + 1, **dims)


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(1, 1), (2, 6), (4, 256), (16, 4096)])
def test_table_has_room_for_every_part(num_ranks: int, num_experts: int) -> None:
    local = num_experts // num_ranks
    sizes = {
        "source_tokens": num_ranks,
        "source_rows": num_ranks + 1,
        "expert_rows": num_ranks * local,
        "tokens_per_expert": local,
        "expert_ends": local,
        "keep_choices": num_experts,
        "overflow": 1,
        "rank_rows": num_ranks * num_ranks,
        "most_tokens": 1,
        "most_rows": 1,
        "direct_rows": num_experts,
    }
    table = _C.table_layout(num_ranks=num_ranks, num_experts=num_experts)
    ends = {name: table[name] + size for name, size in sizes.items()}
    # Each part begins where the one before it ends.
    assert sorted(table[name] for name in sizes) == sorted([0, *sorted(ends.values())[:-1]])
    assert table["num_words"] == max(ends.values())


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(2, 7), (1, 0), (0, 4), (17, 34)])
def test_table_refuses_other_sizes(num_ranks: int, num_experts: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        _C.table_layout(num_ranks=num_ranks, num_experts=num_experts)


PLAN_SIZES = [
    (0, 2, 8, 2, False),
    (5, 3, 12, 3, False),
    (129, 1, 64, 1, False),
    (4096, 8, 256, 4, False),
    (65536, 64, 4096, 16, False),
    (7, 0, 8, 4, True),
    (4097, 0, 256, 8, True),
]


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "num_ranks", "by_mask"), PLAN_SIZES)
def test_plan_of_a_source_has_room_for_every_part(
    num_tokens: int, top_k: int, num_experts: int, num_ranks: int, by_mask: bool
) -> None:
    dims = (num_tokens, top_k, num_experts, num_ranks, by_mask)
    layout = _C.source_plan_layout(*dims)
    # Where rows go by a mask, ranks are counted in place of experts.
    planned_k, planned_experts = (num_ranks, num_ranks) if by_mask else (top_k, num_experts)
    table = _C.table_layout(num_ranks=num_ranks, num_experts=num_experts)["num_words"]
    workspace = _C.plan_workspace_bytes(
        num_tokens=num_tokens, top_k=planned_k, num_experts=planned_experts, num_ranks=num_ranks
    )
    sizes = {
        "table": 4 * table,
        "token_ranks": 4 * num_tokens,
        "idx_in_rank": 4 * num_tokens * num_ranks,
        "idx_in_expert": 4 * num_tokens * planned_k,
        "choices_per_expert": 4 * planned_experts,
        "tokens_per_rank": 4 * num_ranks,
        "is_token_in_rank": num_tokens * num_ranks,
        "workspace": workspace,
    }
    end = 0
    for name, size in sizes.items():
        assert layout[name] % 16 == 0
        assert end <= layout[name] < end + 16
        end = layout[name] + size
    assert end <= layout["num_bytes"]


@pytest.mark.parametrize("by_mask", [False, True])
@pytest.mark.parametrize(("top_k", "num_experts", "num_ranks"), [(1, 1, 1), (3, 8, 2), (8, 256, 4), (64, 4096, 16)])
def test_room_for_the_plan_of_a_source_holds_any_number_of_tokens(
    top_k: int, num_experts: int, num_ranks: int, by_mask: bool
) -> None:
    for num_tokens in [*range(70), 127, 128, 129, 500, 1023, 1024, 4095, 4096, 8191, 20000, 65535, 65536]:
        dims = (num_tokens, top_k, num_experts, num_ranks, by_mask)
        needed, given = _C.source_plan_layout(*dims)["num_bytes"], 4 * source_words(*dims)
        # No more than a third is for nothing, besides what a block of counts and the beginnings of parts take.
        assert needed <= given <= needed * 4 / 3 + 4 * (num_ranks + max(num_experts, num_ranks)) + 300


@pytest.mark.parametrize(
    ("num_ranks", "chunks", "received", "top_k"), [(1, 0, 0, 8), (2, 3, 5, 3), (4, 1024, 14770, 8)]
)
def test_plan_of_a_destination_has_room_for_every_part(num_ranks: int, chunks: int, received: int, top_k: int) -> None:
    groups, positions = 2 * num_ranks * chunks, received * top_k
    words = _C.received_plan_words(num_ranks, chunks, received, top_k)
    # Parts begin at multiples of 16 bytes.
    assert groups + positions <= words < groups + positions + 8
