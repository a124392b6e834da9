"""The pure PyTorch backend: every exchange over any torch.distributed group, on any device.

It is the reference for the CUDA backend: row order is identical, sums differ by rounding alone. Calls are synchronous;
``Buffer`` runs them on its communication thread where a caller asks for overlap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.backends.control import Answer, ControlPlane
from moe_ep.backends.lease import Lease
from moe_ep.backends.place import (
    collect_choices,
    fill_rows,
    identity_places,
    place_choices,
    place_values,
    poison,
    reduce_rows,
    spread,
)
from moe_ep.backends.transport import Transport
from moe_ep.backends.types import Announce, Counted, Dispatch, Packed, Prepared
from moe_ep.backends.wire import WORD_BYTES, Metadata, Received, as_words, dequantize, from_words, quantize
from moe_ep.config import ExchangeSpec
from moe_ep.handle import PlacePlan, Plan, SendPlan
from moe_ep.plan import (
    count_tokens_and_choices,
    drop_choices,
    fit_capacity,
    make_groups,
    place_per_choice,
    place_per_rank,
    plan_send_per_choice,
    plan_send_per_rank,
    tokens_in_rank,
)


class TorchBackend:
    """Exchanges rows among the ranks of a group with torch alone.

    Args:
        control: headers and bounded waits.
        group: gives the caller's group, used for payload on devices that it supports by itself; None for one rank.
    """

    name = "torch"

    def __init__(self, control: ControlPlane, group: Callable[[], dist.ProcessGroup | None]) -> None:
        self.control = control
        self.transport = Transport(control, group)
        self.lease = Lease()
        self.max_tokens = 0
        self.reserved_tokens = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of wire memory kept between exchanges."""
        return self.transport.memory_bytes

    def reset(self) -> None:
        """Forget sizes and memory."""
        self.max_tokens = 0
        self.transport.reset()

    # Counts

    def count_words(self, topk_idx: Tensor, spec: ExchangeSpec) -> Tensor:
        """What other ranks must know of a set of tokens: [n] int64 on the CPU, read by ``Counted.from_table``."""
        words = count_tokens_and_choices(topk_idx, spec.num_experts)
        if spec.per_choice:
            return words
        return torch.cat([words, tokens_in_rank(topk_idx, spec.num_experts, spec.num_ranks).sum(0).cpu()])

    # Dispatch

    def dispatch(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        planned: Counted | None,
        announce: Announce,
        agree_tokens: Callable[[int], int],
        spec: ExchangeSpec,
        owner: int,
    ) -> Dispatch:
        """Plan and move rows. Arguments are valid; ids are physical.

        Args:
            x: [T, H] rows.
            scales: [T, H / 128] fp32 or int32 scales of fp8 rows, or None.
            topk_idx: [T, K] int64, -1 = no choice.
            topk_weights: [T, K] fp32 or fp64, or None.
            planned: counts that were exchanged before, or None.
            announce: begins the exchange, with the words of ``count_words`` unless ``planned``.
            agree_tokens: given the largest T of this exchange, says which T a capacity is meant for; may raise.
            spec: the settings.
            owner: id stored in the plan.
        """
        if spec.capacity is not None:
            answer = announce(None).finish()
            counted = Counted.from_table(answer.table, spec) if planned is None else planned
            max_tokens = agree_tokens(max(counted.tokens.tolist()))
            prepared = self.prepare(topk_idx, counted, spec, owner, max_tokens=max_tokens)
            return self.move(x, scales, topk_weights, prepared)
        # Without a capacity the source's half needs nobody's counts: rows travel with their own.
        send = self.plan_send(topk_idx, spec)
        num_words = Counted.num_words(spec) if planned is None else 0
        packed = self.pack(x, scales, topk_weights, topk_idx, send, spec, num_words)
        answer = announce(packed.load.outbox).finish()
        counted = Counted.from_table(answer.table, spec) if planned is None else planned
        return self.place(packed, self.prepare(topk_idx, counted, spec, owner, send), answer)

    def plan_send(self, topk_idx: Tensor, spec: ExchangeSpec) -> SendPlan:
        """The source's half of a plan; ``topk_idx`` after capacity drops."""
        if spec.per_choice:
            return plan_send_per_choice(topk_idx, spec.num_experts, spec.num_ranks)
        in_rank = tokens_in_rank(topk_idx, spec.num_experts, spec.num_ranks)
        return plan_send_per_rank(in_rank, in_rank.sum(0).tolist(), topk_idx, spec.num_experts)

    def prepare(
        self,
        topk_idx: Tensor,
        counted: Counted,
        spec: ExchangeSpec,
        owner: int,
        send: SendPlan | None = None,
        max_tokens: int = 0,
    ) -> Prepared:
        """What of a dispatch follows from the counts: capacity and sizes.

        Args:
            topk_idx: [T, K] int64 physical ids.
            counted: the exchanged counts.
            spec: the settings.
            owner: id stored in the plan.
            send: the source's half where it is made already, which a capacity does not allow.
            max_tokens: tokens per rank that ``Capacity(factor=...)`` is meant for.
        """
        rank = self.control.rank
        self.max_tokens = max(self.max_tokens, *counted.tokens.tolist())
        kept, per_expert, overflow = fit_capacity(counted.choices, counted.rows, spec, max_tokens)
        rows_per_rank = counted.rows
        if overflow is not None:
            topk_idx = drop_choices(topk_idx, kept[rank])
            if not spec.per_choice:
                # Which rows are still needed follows from ids, not from counts: known to their sources alone.
                left = tokens_in_rank(topk_idx, spec.num_experts, spec.num_ranks).sum(0).cpu()
                rows_per_rank = self.control.swap_even(left) if self.control.size > 1 else left.unsqueeze(0)
        groups = make_groups(kept, rows_per_rank, per_expert, overflow, spec, rank)
        if spec.per_choice:
            first = rank * spec.num_local_experts
            recv_counts = kept[:, first : first + spec.num_local_experts].sum(1).tolist()
        else:
            recv_counts = rows_per_rank[:, rank].tolist()
        send = self.plan_send(topk_idx, spec) if send is None else send
        return Prepared(spec, owner, self.control.seq, topk_idx, send, groups, rows_per_rank, recv_counts)

    def pack(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_weights: Tensor | None,
        topk_idx: Tensor,
        send: SendPlan,
        spec: ExchangeSpec,
        num_words: int | None = None,
    ) -> Packed:
        """Rows and metadata in the order of the wire; arguments as in :meth:`dispatch` and ``Transport.load``."""
        cast = spec.wire_dtype is not None and scales is None
        payload, scales = quantize(x) if cast else (x, scales)
        layout = Metadata.of(spec, topk_weights, scales)
        meta = layout.pack(topk_idx, topk_weights, scales, send)
        load = self.transport.load(payload, send.send_src, send.send_counts, meta, num_words)
        return Packed(load, layout, x.dtype if cast else None)

    def move(self, x: Tensor, scales: Tensor | None, topk_weights: Tensor | None, prepared: Prepared) -> Dispatch:
        """The payload of a prepared dispatch, which was announced before."""
        packed = self.pack(x, scales, topk_weights, prepared.topk_idx, prepared.send, prepared.spec)
        return self.place(packed, prepared, None)

    def place(self, packed: Packed, prepared: Prepared, answer: Answer | None) -> Dispatch:
        """Put what arrives in its place."""
        spec, groups = prepared.spec, prepared.groups
        compact = spec.layout == "compact"
        received = self.transport.ship(packed.load, prepared.recv_counts, answer)
        ids, weights, scales, recv_src = packed.layout.unpack(received.meta, spec, self.control.rank)
        device = received.buffer.device
        plan = self.make_plan(prepared, self._plan_places(prepared, ids, device), packed.layout.weight_bytes)
        rows = self._place(received.buffer, received.index, plan)
        if scales is not None:
            scales = place_values(scales, plan)
            if packed.cast_from is not None:
                rows, scales = dequantize(rows, scales, packed.cast_from), None
        row_weights = None
        if weights is not None:
            row_weights = fill_rows(weights, plan, 0) if compact else place_choices(weights, plan)
        if plan.overflowed:
            poison(rows)
            if row_weights is not None:
                poison(row_weights)
        return Dispatch(
            rows=rows,
            scales=scales,
            row_weights=row_weights,
            topk_idx=fill_rows(ids, plan, -1) if compact and ids is not None else None,
            recv_src_idx=recv_src,
            tokens_per_expert=groups.counts.to(device=device, dtype=torch.int32),
            expert_ends=groups.ends.to(device=device, dtype=torch.int32),
            overflow=None if spec.capacity is None else torch.tensor(groups.overflow is not None, device=device),
            plan=plan,
            groups=groups,
        )

    def _plan_places(self, prepared: Prepared, ids: Tensor | None, device: torch.device) -> PlacePlan:
        spec, groups = prepared.spec, prepared.groups
        if spec.layout == "compact":
            return identity_places(device)
        if spec.per_choice:
            first = self.control.rank * spec.num_local_experts
            counts = groups.kept[:, first : first + spec.num_local_experts]
            return place_per_choice(counts, groups, sum(prepared.recv_counts), device)
        assert ids is not None
        return place_per_rank(ids, groups)

    def make_plan(self, prepared: Prepared, place: PlacePlan, weight_bytes: int) -> Plan:
        """The replayable plan of a prepared dispatch."""
        spec, groups = prepared.spec, prepared.groups
        num_wire = sum(prepared.recv_counts)
        one_each = spec.per_choice or spec.layout == "compact"
        return Plan(
            owner=prepared.owner,
            incarnation=self.control.incarnation,
            serial=prepared.serial,
            num_tokens=prepared.topk_idx.shape[0],
            top_k=prepared.topk_idx.shape[1],
            num_wire=num_wire,
            num_rows=groups.num_rows,
            num_valid=num_wire if one_each else int(groups.counts.sum()),
            per_choice=spec.per_choice,
            overflowed=groups.overflow is not None and spec.on_overflow == "raise",
            weight_bytes=weight_bytes,
            recv_counts=prepared.recv_counts,
            send=prepared.send,
            place=place,
        )

    def plan_rows(self, in_rank: Tensor, rows_per_rank: Tensor, owner: int) -> Plan:
        """Plan an exchange of rows by a mask alone: compact rows in the order (source rank, token).

        Args:
            in_rank: [T, R] bool.
            rows_per_rank: [R, R] exchanged counts.
            owner: id stored in the plan.
        """
        rank = self.control.rank
        num_wire = int(rows_per_rank[:, rank].sum())
        return Plan(
            owner=owner,
            incarnation=self.control.incarnation,
            serial=self.control.seq,
            num_tokens=in_rank.shape[0],
            top_k=0,
            num_wire=num_wire,
            num_rows=num_wire,
            num_valid=num_wire,
            per_choice=False,
            overflowed=False,
            weight_bytes=WORD_BYTES,
            recv_counts=rows_per_rank[:, rank].tolist(),
            send=plan_send_per_rank(in_rank, rows_per_rank[rank].tolist(), None, self.control.size),
            place=identity_places(in_rank.device),
        )

    def move_rows(self, x: Tensor, scales: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None, Tensor]:
        """Move rows along :meth:`plan_rows`; returns rows [N, H], scales, and source tokens int32 [N]."""
        send = plan.send
        parts = [send.send_src.to(torch.int32).unsqueeze(1)]
        if scales is not None:
            parts.append(as_words(scales.index_select(0, send.send_src)))
        load = self.transport.load(x, send.send_src, send.send_counts, torch.cat(parts, dim=1))
        received = self.transport.ship(load, plan.recv_counts, None)
        assert received.meta is not None
        scales = None if scales is None else from_words(received.meta[:, 1:], scales.dtype)
        return self._place(received.buffer, received.index, plan), scales, received.meta[:, 0].contiguous()

    def replay(
        self, x: Tensor, plan: Plan, scales: Tensor | None = None, announce: Announce | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Move other rows [T, H] along an existing plan; returns layout rows and the rows' scales."""
        send = plan.send
        meta = None if scales is None else as_words(scales.index_select(0, send.send_src))
        keep = meta is None and plan.place.row_src is None
        received = self._swap(x, send.send_src, send.send_counts, plan.recv_counts, meta, announce, keep=keep)
        rows = self._place(received.buffer, received.index, plan)
        if plan.overflowed:
            poison(rows)
        if scales is not None:
            assert received.meta is not None
            scales = place_values(from_words(received.meta, scales.dtype), plan)
        return rows, scales

    def _place(self, buffer: Tensor, index: Tensor | None, plan: Plan) -> Tensor:
        """Copy wire rows to their layout rows [num_rows, H]; rows past the last group stay undefined."""
        source = plan.place.row_src
        if index is not None:
            source = index if source is None else index.index_select(0, source)
        valid = buffer if source is None else buffer.index_select(0, source)
        return spread(valid, plan)

    # Combine

    def combine(
        self,
        y: Tensor,
        row_weights: Tensor | None,
        plan: Plan,
        bias: tuple[Tensor, ...] = (),
        announce: Announce | None = None,
        wide: bool = False,
    ) -> Tensor:
        """Sum each token's rows, weighted when ``row_weights`` is given, in fp32 (fp64 for fp64 rows) and fixed order.

        Args:
            y: [num_rows, H] layout rows; only valid ones are read.
            row_weights: [num_rows] or None.
            plan: of the dispatch.
            bias: up to two [T, H] tensors added before rounding.
            announce: begins the exchange; None when it was announced before.
            wide: whether sums of 16-bit rows travel in fp32.

        Returns:
            [T, H] in y's dtype; zeros (plus bias) for tokens that no rank received.
        """
        send, place = plan.send, plan.place
        if self.control.size == 1 and place.back_offsets is None:
            order = send.token_rows if place.back_rows is None else place.back_rows[send.token_rows]
            weights = None if row_weights is None else row_weights[order]
            if announce is not None:
                announce(None).finish()
            out = reduce_rows(y, order, send.token_offsets, weights, bias)
        else:
            rows, index, weights = self._homeward(y, row_weights, plan, wide)
            meta = None if weights is None else as_words(weights.unsqueeze(1))
            received = self._swap(rows, index, plan.recv_counts, send.send_counts, meta, announce)
            order = send.token_rows if received.index is None else received.index.index_select(0, send.token_rows)
            if row_weights is not None and received.meta is not None:
                weights = from_words(received.meta, row_weights.dtype).squeeze(1).index_select(0, send.token_rows)
            out = reduce_rows(received.buffer, order, send.token_offsets, weights, bias, y.dtype)
        return poison(out) if plan.overflowed else out

    def combine_grads(
        self, grads: Tensor, weight_grads: Tensor, plan: Plan, announce: Announce, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The reversed dispatch: gradients of rows and of their weights travel home in one exchange.

        Args:
            grads: [num_rows, H] gradients of layout rows.
            weight_grads: [num_rows] or, for compact rows, [num_rows, K].
            plan: of the dispatch.
            announce: begins the exchange.
            wide: as in :meth:`combine`.

        Returns:
            Gradients of x [T, H] and of topk_weights [T, K].
        """
        send = plan.send
        rows, index, _ = self._homeward(grads, None, plan, wide)
        meta = as_words(collect_choices(weight_grads, plan))
        received = self._swap(rows, index, plan.recv_counts, send.send_counts, meta, announce)
        index = send.token_rows if received.index is None else received.index.index_select(0, send.token_rows)
        dx = reduce_rows(received.buffer, index, send.token_offsets, dtype=grads.dtype)
        assert received.meta is not None
        values = from_words(received.meta, weight_grads.dtype).flatten()
        if values.numel():
            taken = values[send.choice_pos.clamp(min=0)]
            dweights = torch.where(send.choice_pos >= 0, taken, 0.0)
        else:
            dweights = weight_grads.new_zeros(send.choice_pos.numel())
        return dx, dweights.view(plan.num_tokens, plan.top_k)

    def combine_weights(self, row_weights: Tensor, plan: Plan) -> Tensor:
        """Bring [N, K] values home by themselves: each token's are summed elementwise over ranks, [T, K]."""
        send = plan.send
        received = self._swap(row_weights[: plan.num_wire], None, plan.recv_counts, send.send_counts, None, None)
        return reduce_rows(received.buffer, send.token_rows, send.token_offsets)

    def _homeward(
        self, y: Tensor, row_weights: Tensor | None, plan: Plan, wide: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What goes back to the sources for layout rows ``y``.

        Returns:
            Rows; index of the wire rows among them, None when they are in order; weights [N] that the source multiplies
            by, None where there are none left: rows of several choices are weighted and summed here.
        """
        place = plan.place
        if place.back_offsets is not None:
            assert place.back_rows is not None
            weights = None if row_weights is None else row_weights.index_select(0, place.back_rows)
            dtype = torch.float32 if wide else None
            return reduce_rows(y, place.back_rows, place.back_offsets, weights, dtype=dtype), None, None
        if place.back_rows is None:
            return y[: plan.num_wire], None, None if row_weights is None else row_weights[: plan.num_wire]
        return y, place.back_rows, None if row_weights is None else row_weights.index_select(0, place.back_rows)

    def _swap(
        self,
        rows: Tensor,
        index: Tensor | None,
        counts: list[int],
        recv_counts: list[int],
        meta: Tensor | None,
        announce: Announce | None,
        *,
        keep: bool = False,
    ) -> Received:
        """Send rows along a plan; arguments as in ``Transport.load`` and ``Transport.ship``."""
        load = self.transport.load(rows, index, counts, meta, None if announce is None else 0)
        answer = None if announce is None else announce(load.outbox).finish()
        return self.transport.ship(load, recv_counts, answer, keep=keep)
