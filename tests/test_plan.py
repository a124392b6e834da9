"""The planner against the brute-force oracle, with the exchange itself replaced by list concatenation."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_ep.config import Capacity, ExchangeSpec
from moe_ep.plan import (
    Groups,
    PlacePlan,
    SendPlan,
    count_choices,
    drop_choices,
    fit_capacity,
    localize,
    logical_to_physical,
    make_groups,
    place_per_choice,
    place_per_rank,
    plan_send_per_choice,
    plan_send_per_rank,
    ranges,
    rows_of_factor,
    tokens_in_rank,
)
from moe_ep.testing.reference import ExpectedDispatch, ExpectedRank
from tests.checks import Case

PAD, UNDEFINED = (-1, -1, -1), None
Row = tuple[int, int, int]


class Simulation:
    """All ranks in one process: sends are planned per source, split by destination, joined, and placed."""

    def __init__(self, case: Case, per_choice: bool) -> None:
        self.case, self.per_choice = case, per_choice
        self.spec = make_spec(case)
        num_experts, num_ranks = case.num_experts, case.num_ranks
        ids = [self._physical(case.routing(rank)[0]) for rank in range(num_ranks)]
        counts = torch.stack([count_choices(i, num_experts) for i in ids])
        rows = torch.stack([tokens_in_rank(i, num_experts, num_ranks).sum(0) for i in ids])
        kept, self.per_expert, self.overflow = fit_capacity(
            counts, rows, self.spec, case.max_tokens_per_rank or max(case.tokens)
        )
        if self.overflow is not None:
            ids = [drop_choices(i, kept[rank]) for rank, i in enumerate(ids)]
            rows = torch.stack([tokens_in_rank(i, num_experts, num_ranks).sum(0) for i in ids])
        self.ids, self.kept, self.rows_per_rank = ids, kept, rows
        self.sends = [self._plan_send(rank) for rank in range(num_ranks)]

    def _physical(self, ids: torch.Tensor) -> torch.Tensor:
        if self.case.expert_map is None:
            return ids
        return logical_to_physical(ids, torch.tensor(self.case.expert_map, dtype=torch.int32))

    def _plan_send(self, rank: int) -> SendPlan:
        case, ids = self.case, self.ids[rank]
        if self.per_choice:
            return plan_send_per_choice(ids, case.num_experts, case.num_ranks)
        in_rank = tokens_in_rank(ids, case.num_experts, case.num_ranks)
        return plan_send_per_rank(in_rank, self.rows_per_rank[rank].tolist(), ids, case.num_experts)

    def groups(self, rank: int) -> Groups:
        return make_groups(self.kept, self.rows_per_rank, self.per_expert, self.overflow, self.spec, rank)

    def wire(self, rank: int) -> list[tuple[Row, list[int]]]:
        """What a rank receives: per wire row its origin (source, token, choice or -1), and its K local ids."""
        received = []
        for source, send in enumerate(self.sends):
            begin = sum(send.send_counts[:rank])
            tokens = send.send_src.tolist()
            ids = localize(self.ids[source][send.send_src], self.spec.num_local_experts, rank)[0].tolist()
            choice_of = {pos: c for c, pos in enumerate(send.choice_pos.tolist()) if pos >= 0}
            for row in range(begin, begin + send.send_counts[rank]):
                choice = choice_of[row] % self.case.top_k if self.per_choice else -1
                received.append(((source, tokens[row], choice), ids[row]))
        return received

    def place(self, rank: int) -> tuple[PlacePlan, list[Row | None]]:
        """The destination's plan, and the origin of every layout row after following it."""
        groups, wire = self.groups(rank), self.wire(rank)
        if self.per_choice:
            first = rank * self.spec.num_local_experts
            counts = self.kept[:, first : first + self.spec.num_local_experts]
            place = place_per_choice(counts, groups, int(counts.sum()), torch.device("cpu"))
        else:
            ids = torch.tensor([row for _, row in wire], dtype=torch.int64).reshape(len(wire), self.case.top_k)
            place = place_per_rank(ids, groups)
        num_valid = int(groups.counts.sum())
        sources = range(num_valid) if place.row_src is None else place.row_src.tolist()
        positions = range(num_valid) if place.row_pos is None else place.row_pos.tolist()
        rows: list[Row | None] = [UNDEFINED] * groups.num_rows
        for at, (source, position) in enumerate(zip(sources, positions, strict=True)):
            source_rank, token, choice = wire[source][0]
            if not self.per_choice:
                assert place.row_choice is not None
                assert int(place.row_choice[at]) // self.case.top_k == source
                choice = int(place.row_choice[at]) % self.case.top_k
            rows[position] = (source_rank, token, choice)
        for position in place.pad_rows.tolist():
            assert rows[position] is UNDEFINED
            rows[position] = PAD
        return place, rows


def make_spec(case: Case) -> ExchangeSpec:
    names = ("num_experts", "hidden_size", "top_k", "num_ranks", "dtype", "layout", "alignment", "weights", "capacity")
    return ExchangeSpec(**{name: getattr(case, name) for name in names}, max_tokens_per_rank=case.max_tokens_per_rank)


def layout_of(expected: ExpectedRank) -> list[Row | None]:
    rows: list[Row | None] = [UNDEFINED] * expected.num_rows
    for position, row in expected.rows.items():
        rows[position] = row
    for position in expected.padding:
        rows[position] = PAD
    return rows


def check(case: Case, per_choice: bool) -> ExpectedDispatch:
    expected, simulation = case.expected(), Simulation(case, per_choice)
    assert (None if simulation.overflow is None else tuple(simulation.overflow)) == expected.overflow
    for rank, mine in enumerate(expected.ranks):
        groups = simulation.groups(rank)
        assert groups.counts.tolist() == mine.tokens_per_expert
        assert groups.ends.tolist() == mine.expert_ends
        assert groups.num_rows == mine.num_rows
        if case.layout == "compact":
            wire = simulation.wire(rank)
            assert [row for row, _ in wire] == list(mine.rows.values())
            assert [ids for _, ids in wire] == mine.local_ids
            continue
        place, rows = simulation.place(rank)
        target = layout_of(mine)
        if case.layout == "slab":
            # Rows past a slab's count are undefined there, and zero or undefined here.
            rows = [row if row != PAD else UNDEFINED for row in rows]
        assert rows == target
        check_way_back(simulation, rank, place, rows)
    return expected


def check_way_back(simulation: Simulation, rank: int, place: PlacePlan, rows: list[Row | None]) -> None:
    """Every wire row's layout rows are found again, and every token's wire rows."""
    wire = simulation.wire(rank)
    if place.back_rows is None:
        back = list(range(len(wire)))
    else:
        back = place.back_rows.tolist()
    if place.back_offsets is None:
        ends = list(range(1, len(wire) + 1))
    else:
        ends = [*place.back_offsets.tolist()[1:], len(back)] if wire else []
    begin = 0
    for ((source, token, choice), _), end in zip(wire, ends, strict=True):
        found = [rows[position] for position in back[begin:end]]
        chosen = [row for row in rows if row is not UNDEFINED and row[:2] == (source, token)]
        if choice >= 0:
            chosen = [row for row in chosen if row[2] == choice]
        # Sums run over the choices of a token in their order.
        assert found == sorted(chosen)
        begin = end
    assert begin == len(back)


def check_sources(case: Case, per_choice: bool) -> None:
    """At the source: each token's wire rows, in the order in which its partial sums are added."""
    simulation = Simulation(case, per_choice)
    for rank, send in enumerate(simulation.sends):
        src, rows = send.send_src.tolist(), send.token_rows.tolist()
        offsets = [*send.token_offsets.tolist(), len(rows)]
        assert sorted(rows) == list(range(len(src)))
        for token in range(case.tokens[rank]):
            mine = rows[offsets[token] : offsets[token + 1]]
            assert all(src[row] == token for row in mine)
            if not per_choice:
                assert mine == sorted(mine), "partial sums must be added in rank order"


BASES = [
    Case(tokens=(7, 0, 12), num_experts=6, top_k=3),
    Case(tokens=(9,), num_experts=5, top_k=2),
    Case(tokens=(4, 5, 6, 1), num_experts=4, top_k=2),
    Case(tokens=(0, 0), num_experts=4, top_k=4),
    Case(tokens=(6, 6), num_experts=8, top_k=8),
    Case(tokens=(6, 9), num_experts=2, top_k=1),
]
LAYOUTS = [
    {},
    {"alignment": 4},
    {"alignment": 16},
    {"layout": "compact", "weights": "experts"},
    {"layout": "slab", "max_tokens_per_rank": 12},
]
CAPACITIES = [
    Capacity(rows=200),
    Capacity(rows=30),
    Capacity(rows=13),
    Capacity(per_expert=40),
    Capacity(per_expert=4),
    Capacity(factor=1.0),
    Capacity(factor=0.3),
]


@pytest.mark.parametrize("kind", ["uniform", "zipf", "one", "empty", "holes"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_row_goes_where_the_oracle_says(kind: str, layout: dict) -> None:
    for base in BASES:
        case = replace(base, kind=kind, **layout)
        for per_choice in (False, True):
            if not (per_choice and case.layout == "compact"):
                check(case, per_choice)
            check_sources(case, per_choice)


@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
@pytest.mark.parametrize("layout", [{}, {"alignment": 4}, {"layout": "compact", "weights": "experts"}], ids=str)
def test_capacities_keep_what_the_oracle_keeps(capacity: Capacity, layout: dict) -> None:
    overflows = 0
    for base in BASES:
        if capacity.rows is not None and capacity.rows < base.num_experts // base.num_ranks * 3 + 1:
            continue
        for kind in ("zipf", "one", "holes", "empty"):
            case = replace(base, kind=kind, capacity=capacity, **layout)
            for per_choice in (False,) if case.layout == "compact" else (False, True):
                overflows += check(case, per_choice).overflow is not None
    if capacity in (Capacity(rows=200), Capacity(per_expert=40)):
        assert overflows == 0
    if capacity in (Capacity(rows=13), Capacity(per_expert=4), Capacity(factor=0.3)):
        assert overflows > 0


def test_random_settings_agree_with_the_oracle() -> None:
    rng = random.Random(2)
    for trial in range(150):
        num_ranks, per_rank = rng.choice([1, 2, 3, 4, 5]), rng.choice([1, 2, 3, 7])
        alignment = rng.choice([1, 1, 2, 8])
        capacity = rng.choice(
            [
                None,
                Capacity(rows=per_rank * (alignment - 1) + rng.randint(1, 60)),
                Capacity(per_expert=alignment * rng.randint(1, 6)),
                Capacity(factor=rng.uniform(0.2, 2.0)),
            ]
        )
        case = Case(
            tokens=tuple(rng.choice([0, 1, 5, 17]) for _ in range(num_ranks)),
            num_experts=num_ranks * per_rank,
            top_k=rng.randint(1, min(6, num_ranks * per_rank)),
            kind=rng.choice(["uniform", "zipf", "holes", "one"]),
            alignment=alignment,
            capacity=capacity,
            max_tokens_per_rank=17,
            seed=trial,
        )
        for per_choice in (False, True):
            check(case, per_choice)


def test_drop_keeps_each_experts_first_share() -> None:
    # 12 choices of expert 0 and 4 of expert 1, room for 8: shares floor(8 * 12 / 16) = 6 and floor(8 * 4 / 16) = 2.
    topk_idx = torch.tensor([[0]] * 6 + [[1]] * 2)
    spec = ExchangeSpec(
        num_experts=2, hidden_size=4, top_k=1, num_ranks=1, dtype=torch.float32, capacity=Capacity(rows=8)
    )
    counts = torch.stack([count_choices(topk_idx, 2)])
    kept, per_expert, overflow = fit_capacity(counts * 2, torch.tensor([[16]]), spec, 16)
    assert (kept.tolist(), per_expert) == ([[6, 2]], 0)
    assert overflow is not None
    assert (overflow.rank, overflow.needed, overflow.given) == (0, 16, 8)


def test_drop_takes_sources_in_rank_order() -> None:
    spec = ExchangeSpec(
        num_experts=2, hidden_size=4, top_k=1, num_ranks=2, dtype=torch.float32, capacity=Capacity(per_expert=5)
    )
    counts = torch.tensor([[4, 0], [4, 3]])
    kept, _, overflow = fit_capacity(counts, counts, spec, 8)
    assert kept.tolist() == [[4, 0], [1, 3]]
    assert overflow is not None
    assert (overflow.rank, overflow.needed, overflow.given) == (0, 8, 5)
    dropped = drop_choices(torch.tensor([[0], [0], [-1], [0], [1]]), torch.tensor([1, 3]))
    assert dropped.tolist() == [[0], [-1], [-1], [-1], [1]]


def test_factor_rounds_up_to_the_alignment() -> None:
    spec = make_spec(Case(tokens=(10, 10), num_experts=8, top_k=2, alignment=4))
    # An even share is 2 * 10 * 2 / 8 = 5 rows.
    assert [rows_of_factor(f, spec, 10) for f in (0.1, 0.8, 0.81, 1.0, 1.6, 1.7)] == [4, 4, 8, 8, 8, 12]


def test_layout_counts() -> None:
    topk_idx = torch.tensor([[0, 1, -1], [3, 0, 5], [-1, -1, -1], [5, 4, 3]])
    assert count_choices(topk_idx, 6).tolist() == [2, 1, 0, 2, 1, 2]
    assert tokens_in_rank(topk_idx, 6, 3).int().tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]]


def test_replica_is_token_index_modulo_their_number() -> None:
    table = torch.tensor([[0, 5, 3], [1, -1, -1], [2, 4, -1]], dtype=torch.int32)
    topk_idx = torch.tensor([[0, 1], [0, 2], [0, -1], [0, 2], [2, 1]])
    assert logical_to_physical(topk_idx, table).tolist() == [[0, 1], [5, 4], [3, -1], [0, 4], [2, 1]]


def test_ranges() -> None:
    assert ranges(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).tolist() == []


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=(7, 3), num_experts=4, top_k=2, alignment=2)
    check(case, per_choice=True)
    real = place_per_choice

    def swapped(*args: Any) -> PlacePlan:  # noqa: ANN401
        place = real(*args)
        source = place.row_src.clone()
        source[[0, 1]] = source[[1, 0]]
        return replace(place, row_src=source)

    monkeypatch.setattr("tests.test_plan.place_per_choice", swapped)
    with pytest.raises(AssertionError):
        check(case, per_choice=True)
