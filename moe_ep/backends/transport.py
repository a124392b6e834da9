"""How rows cross between ranks over torch.distributed: in the envelope of an exchange, or behind it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.backends.control import ENVELOPE_BYTES, HEADER_BYTES, Answer, ControlPlane, Outbox
from moe_ep.backends.wire import WORD_BYTES, Memory, Received, pack_rows, region_rows, unpack_rows


class Load(NamedTuple):
    """What is about to be sent.

    Attributes:
        rows: [M, W] rows by destination with their metadata behind them; the inbox where they are in envelopes.
        regions: rows for each rank.
        meta: [S, words] int32 metadata, which for a single rank stays here.
        inbox: where envelopes arrive, and the rows that this rank sends to itself.
        head_rows: rows that the header takes in front of each enclosed region.
        outbox: how the load, or the header alone, goes into envelopes; None for a load that was announced before.
    """

    rows: Tensor
    regions: list[int]
    meta: Tensor | None
    inbox: Memory | None = None
    head_rows: int = 0
    outbox: Outbox | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.rows.shape[1] * self.rows.itemsize

    @property
    def meta_words(self) -> int:
        """Words of metadata per row."""
        return 0 if self.meta is None else self.meta.shape[1]


class Transport:
    """Sends rows and their metadata between the ranks of a group.

    Args:
        control: headers and bounded waits.
        group: gives the caller's group, used for payload on devices that it supports by itself; None for one rank.
    """

    def __init__(self, control: ControlPlane, group: Callable[[], dist.ProcessGroup | None]) -> None:
        self.control = control
        self._group = group
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, int], Memory] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes of wire memory kept between exchanges."""
        return sum(memory.numel() for memory in self._memory.values())

    def reset(self) -> None:
        """Forget the memory: an exchange that failed may still be written to it."""
        self._memory, self._views = {}, {}

    def load(
        self,
        rows: Tensor,
        index: Tensor | None,
        counts: list[int],
        meta: Tensor | None,
        num_words: int | None = None,
    ) -> Load:
        """Put rows and their metadata in the order of the wire.

        Args:
            rows: [M, W] contiguous rows.
            index: [S] rows to send, by destination; None sends ``rows`` as they are.
            counts: wire rows for each rank.
            meta: [S, words] int32, the same number of words on every rank, or None.
            num_words: numbers that the header carries along; None for an exchange that was announced before.
        """
        if self.control.size == 1:
            return Load(rows if index is None else rows.index_select(0, index), counts, meta)
        regions = region_rows(counts, 0 if meta is None else meta.shape[1], rows.shape[1] * rows.itemsize)
        if num_words is not None and rows.device.type == "cpu":
            return self._load_envelopes(rows, index, counts, regions, meta, num_words)
        return self._load_bulk(rows, index, counts, regions, meta)

    def _load_bulk(
        self, rows: Tensor, index: Tensor | None, counts: list[int], regions: list[int], meta: Tensor | None
    ) -> Load:
        if index is None and meta is None:
            return Load(rows.contiguous(), regions, None)
        send = self._scratch("send", rows, sum(regions))
        pack_rows([send] * len(counts), _starts_of(regions), rows, index, counts, meta)
        return Load(send.rows[: sum(regions)], regions, meta)

    def _load_envelopes(
        self,
        rows: Tensor,
        index: Tensor | None,
        counts: list[int],
        regions: list[int],
        meta: Tensor | None,
        num_words: int,
    ) -> Load:
        rank, row_bytes = self.control.rank, rows.shape[1] * rows.itemsize
        stride = -(-ENVELOPE_BYTES // row_bytes)
        head = -(-(HEADER_BYTES + WORD_BYTES * num_words) // row_bytes)
        sizes = [head + region for region in regions]
        sizes[rank] = 0
        base = (self.control.size - 1) * stride
        enclosed = max(sizes) * row_bytes <= ENVELOPE_BYTES
        # This rank's own rows go where they would have arrived, behind the others' envelopes.
        inbox = self._scratch("receive", rows, base + regions[rank] if enclosed else base)
        posted = self._memory["receive"][: base * row_bytes]
        if not enclosed:
            outbox = Outbox(None, [], posted, stride * row_bytes)
            return self._load_bulk(rows, index, counts, regions, meta)._replace(
                inbox=inbox, head_rows=head, outbox=outbox
            )
        send = self._scratch("send", rows, sum(sizes))
        memories, starts = [send] * len(counts), [at + head for at in _starts_of(sizes)]
        memories[rank], starts[rank] = inbox, base
        pack_rows(memories, starts, rows, index, counts, meta)
        message = self._memory["send"][: sum(sizes) * row_bytes]
        outbox = Outbox(message, [size * row_bytes for size in sizes], posted, stride * row_bytes)
        return Load(inbox.rows, regions, meta, inbox, head, outbox)

    def ship(self, load: Load, counts: list[int], answer: Answer | None, *, keep: bool = False) -> Received:
        """Take what came in envelopes, and swap what did not fit.

        Args:
            load: from :meth:`load`.
            counts: wire rows that each rank sends here.
            answer: of the exchange that announced the load; None when nothing was enclosed.
            keep: whether received rows outlive this exchange; else the next one overwrites them.
        """
        if self.control.size == 1:
            return Received(load.rows, None, load.meta)
        enclosed = [False] * self.control.size if answer is None else answer.enclosed
        regions = region_rows(counts, load.meta_words, load.row_bytes)
        if all(enclosed):
            assert load.inbox is not None
            return unpack_rows(load.inbox, counts, self._starts(load), load.meta_words)
        if any(enclosed):
            buffer = self._ship_mixed(load, regions, enclosed)
        else:
            like, total = load.rows, sum(regions)
            buffer = like.new_empty(total, like.shape[1]) if keep else self._scratch("bulk", like, total).rows[:total]
            self._all_to_all(buffer, load.rows, regions, load.regions)
        if not load.meta_words:
            return Received(buffer, None, None)
        return unpack_rows(Memory.of(buffer), counts, _starts_of(regions), load.meta_words)

    def _starts(self, load: Load) -> list[int]:
        """Row of the inbox where each rank's region begins."""
        assert load.outbox is not None
        stride, rank = load.outbox.stride // load.row_bytes, self.control.rank
        starts = [position * stride + load.head_rows for position in range(self.control.size - 1)]
        starts.insert(rank, (self.control.size - 1) * stride)
        return starts

    def _ship_mixed(self, load: Load, regions: list[int], enclosed: list[bool]) -> Tensor:
        """Some ranks' loads fit envelopes and others' did not: [sum of regions, W] in rank order."""
        assert load.inbox is not None
        rank, like = self.control.rank, load.rows
        late = [0 if inside else region for region, inside in zip(regions, enclosed, strict=True)]
        splits = [0] * len(regions) if enclosed[rank] else load.regions
        bulk = like.new_empty(sum(late), like.shape[1])
        self._all_to_all(bulk, like[: sum(splits)], late, splits)
        starts = self._starts(load)
        pieces = list(bulk.split(late))
        for source, inside in enumerate(enclosed):
            if inside:
                pieces[source] = load.inbox.rows[starts[source] : starts[source] + regions[source]]
        return torch.cat(pieces)

    def _scratch(self, name: str, like: Tensor, num_rows: int) -> Memory:
        """At least [num_rows, W] for one exchange at a time, kept between them: fresh pages cost more than the copy."""
        width, row_bytes = like.shape[1], like.shape[1] * like.itemsize
        if like.device.type != "cpu":
            return Memory.of(like.new_empty(num_rows, width))  # torch keeps freed GPU memory by itself
        held = self._memory.get(name)
        if held is None or held.numel() < num_rows * row_bytes:
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
            # Memory made in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                held = self._memory[name] = torch.empty(num_rows * row_bytes, dtype=torch.uint8, device="cpu")
        key = (name, like.dtype, width)
        if key not in self._views:
            with torch.inference_mode(False):
                whole = held[: held.numel() // row_bytes * row_bytes]
                self._views[key] = Memory.of(whole.view(like.dtype).view(-1, width))
        return self._views[key]

    def _all_to_all(self, out: Tensor, rows: Tensor, out_splits: list[int], splits: list[int]) -> None:
        # Bytes travel: not every torch.distributed backend knows every dtype.
        out_bytes, row_bytes = out.view(torch.uint8), rows.view(torch.uint8)
        group = None if out.device.type == "cpu" else self._group()
        if out.device.type == "cpu":
            self.control.swap(out_bytes, row_bytes, out_splits, splits)
        elif group is not None and _supports(group, out.device):
            # Only the stream waits: a wait with a bound blocks the host, and when the bound passes because work that
            # was queued before still runs, NCCL breaks the caller's group. Its own watchdog ends an exchange.
            dist.all_to_all_single(out_bytes, row_bytes, out_splits, splits, group=group)
        else:
            staged = torch.empty_like(out_bytes, device="cpu")
            self.control.swap(staged, row_bytes.cpu(), out_splits, splits)
            out_bytes.copy_(staged)


def _starts_of(sizes: list[int]) -> list[int]:
    """Where each part begins among parts that follow one another."""
    return [0, *itertools.accumulate(sizes[:-1])]


def _supports(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether a group moves tensors of this device by itself."""
    return device.type in str(group._device_types) and "gloo" not in dist.get_backend(group).lower()
