"""When the CUDA backend makes its rings larger, and what it keeps for graphs: decisions of the host, without a GPU."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.backends.cuda_link import CudaLink
from moe_ep.backends.cuda_retired import RetiredArenas
from moe_ep.errors import PeerTimeoutError


class Rings:
    """A link whose rings are a number of bytes: T rows and their words."""

    def __init__(self) -> None:
        self.bytes = 0
        self.made: list[int] = []

    def payload_for(self, tokens: int, row_bytes: int, meta_words: int) -> int:
        return tokens * (row_bytes + 4 * meta_words)

    def fits(self, row_bytes: int, meta_words: int) -> bool:
        return self.bytes >= 8 * (row_bytes + 4 * meta_words)

    def must_grow(self, *sizes: int) -> bool:
        return self.payload_for(*sizes) > self.bytes

    def reserve(self, *sizes: int) -> None:
        if self.must_grow(*sizes):
            self.bytes = self.payload_for(*sizes)
            self.made.append(self.bytes)

    def reset(self) -> None:
        pass


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """One rank, whose peers send as many tokens as it does."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    backend = object.__new__(CudaBackend)
    backend.link = Rings()  # type: ignore[assignment]
    backend.direct = types.SimpleNamespace(forget=lambda: None)  # type: ignore[assignment]
    backend.max_tokens = backend.reserved_tokens = 0
    backend._expected, backend._expects = set(), False
    backend._agree = lambda *sizes: list(sizes)  # type: ignore[method-assign]
    return backend


def test_the_first_exchange_makes_rings_for_all_that_is_expected(rank: CudaBackend) -> None:
    rank.expect(128, 64, 4)
    rank.expect(16, 1024, 4)
    rank.ensure(10, 64, 4)
    assert rank.link.made == [16 * (1024 + 16)]  # type: ignore[attr-defined]


def test_rings_grow_once_for_larger_sizes_that_are_expected(rank: CudaBackend) -> None:
    rank.ensure(10, 64, 4)
    rank.expect(128, 64, 4)
    rank.ensure(10, 64, 4)
    rank.expect(128, 64, 4)
    rank.ensure(10, 64, 4)
    rank.expect(100, 64, 4)
    rank.ensure(10, 64, 4)
    assert rank.link.made == [10 * 80, 128 * 80]  # type: ignore[attr-defined]


def test_nothing_grows_in_a_capture_but_after_it(rank: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    rank.ensure(10, 64, 4)
    rank.expect(128, 64, 4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    rank.ensure(10, 64, 4)
    assert rank.link.made == [10 * 80]  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    rank.ensure(10, 64, 4)
    assert rank.link.made == [10 * 80, 128 * 80]  # type: ignore[attr-defined]


def test_a_rank_that_refuses_knows_what_its_peers_do(rank: CudaBackend) -> None:
    assert rank.will_agree(64, 4)
    rank.ensure(10, 64, 4)
    assert not rank.will_agree(64, 4)
    # An exchange has told of more tokens: peers make larger rings, and talk about it.
    rank.max_tokens = 20
    assert rank.will_agree(64, 4)
    # They were told, and made none.
    assert rank.will_agree(64, 4)
    rank.ensure(10, 64, 4)
    assert not rank.will_agree(64, 4)
    assert rank.link.made == [10 * 80, 20 * 80]  # type: ignore[attr-defined]


def test_a_rank_that_refuses_notes_what_its_peers_decide_in_silence(rank: CudaBackend) -> None:
    rank.ensure(10, 64, 4)
    # More tokens of shorter rows, for which the rings are large enough: peers take them for reserved.
    rank.max_tokens = 11
    assert not rank.will_agree(32, 4)
    rank.ensure(11, 64, 4)
    assert rank.link.made == [10 * 80]  # type: ignore[attr-defined]


def test_after_a_reset_ranks_know_the_same(rank: CudaBackend) -> None:
    rank.ensure(10, 64, 4)
    rank.expect(128, 64, 4)
    rank.max_tokens = 12
    # Another rank has made its rings, and has seen 30 tokens.
    rank._agree = lambda *sizes: [30, 12]  # type: ignore[method-assign]
    rank.reset()
    rank.ensure(10, 64, 4)
    assert (rank.max_tokens, rank.reserved_tokens) == (30, 30)
    assert rank.link.made == [10 * 80, 128 * 80]  # type: ignore[attr-defined]


class Channel:
    def __init__(self) -> None:
        self.overflows, self.problem, self.number, self.left = 0, None, 0, False

    def is_quiet(self, overflows: int) -> bool:
        return self.problem is None and self.overflows == overflows

    def overflow(self) -> tuple[int, int, int, int]:
        return self.overflows, 1, 12, 8

    def trouble(self) -> Any:  # noqa: ANN401
        return self.problem

    def epoch(self) -> int:
        return self.number

    def reset(self, epoch: int) -> None:
        self.number, self.problem = epoch, None

    def abandon(self) -> None:
        self.left = True


def make_retired(count: int) -> tuple[RetiredArenas, list[Channel], list[int]]:
    closed: list[int] = []
    retired, channels = RetiredArenas(), [Channel() for _ in range(count)]
    for idx, channel in enumerate(channels):
        arena = types.SimpleNamespace(num_bytes=100 + idx, close=lambda idx=idx: closed.append(idx))
        retired.add(arena, channel, 0)
    return retired, channels, closed


def test_retired_arenas_are_watched() -> None:
    retired, channels, _ = make_retired(2)
    assert retired.is_quiet()
    assert (len(retired), retired.num_bytes) == (2, 201)
    channels[1].overflows = 3
    assert not retired.is_quiet()
    assert retired.new_overflow() == (1, 12, 8)
    assert retired.is_quiet()
    assert retired.new_overflow() is None
    channels[0].problem = {"kind": 1}
    assert not retired.is_quiet()
    assert retired.trouble() == {"kind": 1}


def test_a_link_without_an_arena_of_its_own_watches_retired_ones() -> None:
    link = object.__new__(CudaLink)
    link.arena = link.channel = link._broken = None
    link.control = types.SimpleNamespace(rank=0, timeout_s=5.0)  # type: ignore[assignment]
    link._retired, channels, _ = make_retired(1)
    assert link.memory_bytes == 100
    assert link.is_quiet()
    channels[0].overflows = 1
    assert link.new_overflow() == (1, 12, 8)
    channels[0].problem = {"kind": 1, "peer": 1, "phase": 0, "expected": 3, "seen": 1}
    with pytest.raises(PeerTimeoutError, match="waited 5 s for rank 1 to open exchange 3"):
        link.check()


@pytest.mark.parametrize("has_own", [False, True])
def test_a_reset_goes_on_from_the_largest_number_of_each_channel(has_own: bool) -> None:
    link = object.__new__(CudaLink)
    # Another rank has opened two exchanges more through the channel in use, and one less through a retired one.
    others = torch.tensor([-1, 0, *([2] if has_own else [])])
    opened: list[torch.Tensor] = []

    def talk(call: object, words: torch.Tensor | None = None) -> torch.Tensor:
        if words is None:
            return torch.empty(2, 0)
        opened.append(words)
        return torch.stack([words, words + others])

    link.control = types.SimpleNamespace(open=talk)  # type: ignore[assignment]
    link.channel, link._broken, link._flights, link._unplaced = Channel() if has_own else None, None, [], []
    link._retired, channels, _ = make_retired(2)
    channels[0].number, channels[1].number = 5, 7
    if has_own:
        link.channel.number = 11
    link.reset()
    assert [channel.number for channel in channels] == [6, 8]
    assert [words.tolist() for words in opened] == [[5, 7, *([11] if has_own else [])]]
    assert not has_own or link.channel.number == 14


def test_retired_arenas_are_reset_and_released() -> None:
    retired, channels, closed = make_retired(2)
    channels[0].number, channels[0].problem, channels[1].overflows = 7, {"kind": 1}, 2
    assert retired.epochs() == [7, 0]
    retired.reset([9, 4])
    assert [channel.number for channel in channels] == [9, 4]
    assert retired.is_quiet()
    retired.abandon()
    assert all(channel.left for channel in channels)
    retired.close()
    assert (closed, len(retired)) == ([0, 1], 0)
