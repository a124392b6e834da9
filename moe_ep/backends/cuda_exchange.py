"""The CUDA backend: rows move between GPUs of one node by this package's own kernels.

Nothing here waits for the host but the sizes of a dispatch without a capacity. Row order and results are those of the
torch backend; sums differ by rounding alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.control import Call, ControlPlane
from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_counting import choices_of_mask, count_choices, count_rows
from moe_ep.backends.cuda_jobs import Launch
from moe_ep.backends.cuda_link import CudaLink, aligned, pointer
from moe_ep.backends.cuda_outputs import WORD_BYTES, Counts, Outputs, outputs_of
from moe_ep.backends.cuda_placing import FIRST_LAP, Placing
from moe_ep.backends.types import Dispatch
from moe_ep.config import FP8_GROUP, ExchangeSpec
from moe_ep.handle import LAYOUT_CODES, CudaPlan
from moe_ep.plan import rows_of_factor

_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_CASTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# How many of 24 blocks send; the others place or reduce.
_SENDERS_OF_24 = {"compact": 8, "expanded": 8, "slab": 8, "combine": 16, "combine compact": 16}
# SMs until a number is given: where the measured curve of two H100s begins to flatten (benchmarks/NOTES.md).
_DEFAULT_SMS = {"compact": 24, "expanded": 32, "slab": 32, "combine": 32, "combine compact": 24}
_HOPPER = (9, 0)


class CudaBackend:
    """Exchanges rows among GPUs that reach each other's memory.

    Args:
        control: of the Buffer.
        granted_bytes: memory for rows on their way; 0 reserves at first use.
        bulk: whether rows go through the copy engine of GPUs since Hopper; None where there is one.
    """

    name = "cuda"

    def __init__(self, control: ControlPlane, granted_bytes: int, bulk: bool | None = None) -> None:
        self.control = control
        self.link = CudaLink(control, granted_bytes)
        self.bulk = self.link.compute_capability >= _HOPPER if bulk is None else bulk
        self.max_tokens = 0
        self.reserved_tokens = 0
        self._extension = load_extension()
        self._serial = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arena."""
        return self.link.memory_bytes

    def make_runtime(self, ranks_per_node: int) -> Any:
        """The bound object that ``Buffer.runtime`` is."""
        return self._extension.Buffer(
            rank=self.control.rank,
            num_ranks=self.control.size,
            ranks_per_node=ranks_per_node,
            device=self.link.device.index,
            stream=self.link.stream,
            memory=self.link.local_memory,
        )

    def reset(self) -> None:
        """Go on after a failure. Collective."""
        self.link.reset()
        # Ranks that failed have not launched the same dispatches; the incarnation tells plans apart.
        self._serial = 0

    # Sizes

    def ensure(self, num_tokens: int, row_bytes: int, meta_words: int) -> None:
        """Reserve memory at the first exchange, or where one needs more. Collective when it does anything.

        Args:
            num_tokens: T of this rank.
            row_bytes: bytes of a row as it travels.
            meta_words: 32-bit words that travel with it.
        """
        if self.link.fits(row_bytes, meta_words):
            if self.max_tokens <= self.reserved_tokens or torch.cuda.is_current_stream_capturing():
                return
            # All ranks have seen the same larger T in the counts of an exchange before.
            self.reserved_tokens = self.max_tokens
        else:
            # NOTE: rings of different sizes would tear exchanges apart, so ranks that differ reserve the same as well;
            # the opening of their exchange tells them.
            tokens, row_bytes, meta_words = self._agree(num_tokens, row_bytes, meta_words)
            self.max_tokens = max(self.max_tokens, tokens)
            self.reserved_tokens = max(self.reserved_tokens, tokens)
        self.link.reserve(self.reserved_tokens, row_bytes, meta_words)

    def num_laps(self, max_tokens: int, record: tuple[int, int]) -> int:
        """How often an exchange goes round the rings.

        Args:
            max_tokens: largest T of any rank.
            record: bytes of a row and words of metadata as they travel.
        """
        if self.control.size == 1:
            return 1
        chunks = -(-max_tokens // self._extension.CHUNK_TOKENS)
        return -(-chunks // self.link.ring_groups(*record))

    def agree_tokens(self, num_tokens: int) -> int:
        """The largest T of any rank. Collective."""
        tokens = self._agree(num_tokens)[0]
        self.max_tokens = max(self.max_tokens, tokens)
        return tokens

    def _agree(self, *sizes: int) -> list[int]:
        return self.control.open(Call("reserve"), torch.tensor(sizes, device="cpu")).amax(0).tolist()

    def _split(self, what: str, num_sms: int | None) -> tuple[int, int]:
        """Blocks of the two roles of a kernel, by the layout that a dispatch places, or what a combine reads."""
        # Blocks wait for each other, so all of them have to be resident.
        num_sms = min(num_sms or _DEFAULT_SMS[what], self.link.num_sms)
        senders = max(num_sms * _SENDERS_OF_24[what] // 24, 1)
        others = max(num_sms - senders, 1)
        return (0, senders + others) if self.control.size == 1 else (senders, others)

    # Dispatch

    def count(
        self, topk_idx: Tensor, spec: ExchangeSpec, header: list[int], max_tokens: int, totals: Tensor | None
    ) -> Counts:
        """Plan a set of tokens and open an exchange with their counts, on the communication stream.

        Args:
            topk_idx: int64 [T, K] physical ids, -1 = no choice.
            spec: the settings.
            header: compared on all ranks.
            max_tokens: largest T of any rank, which a capacity needs; 0 without one.
            totals: int64 [e], running count of received choices.
        """
        counting = count_choices(self.link, topk_idx, spec)
        self.link.follow(self.link.here())
        counting.open(header, max_tokens, self._capacity(spec, max_tokens), totals)
        return counting.counts

    def _capacity(self, spec: ExchangeSpec, max_tokens: int) -> tuple[int, int]:
        """Rows of this rank's output and rows of every group; 0 where not limited or fixed."""
        if spec.layout == "slab":
            return 0, spec.num_ranks * (spec.max_tokens_per_rank or 0)
        if spec.capacity is None:
            return 0, 0
        if spec.capacity.rows is not None:
            return spec.capacity.rows, 0
        return 0, spec.capacity.per_expert or rows_of_factor(spec.capacity.factor or 0.0, spec, max_tokens)

    def _static_sizes(self, spec: ExchangeSpec, max_tokens: int) -> tuple[int, int]:
        """Layout rows of this rank with a capacity, or of slabs, and the most that it receives."""
        rows, per_expert = self._capacity(spec, max_tokens)
        rows, received = rows or per_expert * spec.num_local_experts, self.control.size * max_tokens
        # What a capacity does not hold never arrives.
        return rows, min(rows, received) if spec.layout == "compact" else received

    def dispatch(
        self,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        spec: ExchangeSpec,
        header: list[int],
        owner: int,
        *,
        max_tokens: int,
        totals: Tensor | None = None,
        planned: Counts | None = None,
        num_sms: int | None = None,
        with_source: bool = False,
    ) -> Launch[Dispatch]:
        """Launch a dispatch. Arguments are valid; ids are physical.

        Args:
            x: [T, H] rows.
            scales: [T, H / 128] words of fp8 rows, or None.
            topk_idx: int64 [T, K], -1 = no choice.
            topk_weights: [T, K] fp32 or fp64, or None.
            spec: the settings.
            header: compared on all ranks.
            owner: id stored in the plan.
            max_tokens: largest T of any rank where outputs have a fixed size, else 0.
            totals: int64 [e], running count of received choices.
            planned: counts that were exchanged before.
            num_sms: None for the default.
            with_source: whether the result tells each received row's token.
        """
        # Copies are made on the current stream, which the exchange waits for.
        x, topk_idx = aligned(x), topk_idx.contiguous()
        current = self.link.begin()
        opening: Callable[[], None]
        if planned is None:
            counting = count_choices(self.link, topk_idx, spec)
            counts, limits = counting.counts, self._capacity(spec, max_tokens)
            opening = functools.partial(counting.open, header, max_tokens, limits, totals)
        else:
            counts, opening = planned, functools.partial(self.link.channel.open, header, self.link.queue)
        inputs = (x, scales, topk_weights)
        return self._launch(inputs, spec, counts, opening, owner, current, max_tokens, num_sms, with_source)

    def dispatch_rows(
        self,
        x: Tensor,
        scales: Tensor | None,
        in_rank: Tensor,
        choices_per_expert: Tensor,
        spec: ExchangeSpec,
        header: list[int],
        owner: int,
        num_sms: int | None = None,
    ) -> Launch[Dispatch]:
        """Launch a dispatch of rows to the ranks of a mask, without choices; arguments as in :meth:`dispatch`.

        Args:
            in_rank: bool [T, R].
            choices_per_expert: integers [E], this rank's; only their sums over ranks are told.
        """
        # Copies are made on the current stream, which the exchange waits for.
        x, choices = aligned(x), choices_of_mask(in_rank)
        told = choices_per_expert.to(device=x.device, dtype=torch.int32, non_blocking=True)
        spec = dataclasses.replace(spec, top_k=0)
        current = self.link.begin()
        counting = count_rows(self.link, choices, told, spec)
        opening = functools.partial(counting.open, header)
        return self._launch((x, scales, None), spec, counting.counts, opening, owner, current, 0, num_sms, True)

    def _launch(
        self,
        inputs: tuple[Tensor, Tensor | None, Tensor | None],
        spec: ExchangeSpec,
        counts: Counts,
        opening: Callable[[], None],
        owner: int,
        current: int,
        max_tokens: int,
        num_sms: int | None,
        with_source: bool,
    ) -> Launch[Dispatch]:
        """Open a dispatch, and move its rows."""
        (x, scales, topk_weights), cast = inputs, 0
        row_bytes, scale_words = x.shape[1] * x.itemsize, 0 if scales is None else scales.shape[1]
        if spec.wire_dtype is not None and scales is None:
            cast, row_bytes, scale_words = _CASTS[x.dtype], x.shape[1], x.shape[1] // FP8_GROUP
        weight_words = 0 if topk_weights is None else topk_weights.itemsize // WORD_BYTES
        meta_words = (2 + weight_words) * spec.top_k + scale_words
        self._serial += 1
        arguments = self._extension.DispatchArguments(
            row_bytes=row_bytes,
            meta_words=meta_words,
            top_k=spec.top_k,
            num_experts=spec.num_experts,
            table=counts.table.data_ptr(),
            token_ranks=counts.token_ranks.data_ptr(),
            idx_in_rank=counts.idx_in_rank.data_ptr(),
            num_tokens=x.shape[0],
            with_plan=True,
            layout=LAYOUT_CODES[spec.layout],
            cast=cast,
            x=x.data_ptr(),
            topk_idx=counts.topk_idx.data_ptr(),
            index_bytes=counts.topk_idx.itemsize,
            weight_words=weight_words,
            scale_words=scale_words,
            idx_in_expert=counts.idx_in_expert,
            topk_weights=pointer(topk_weights),
            scales=pointer(scales),
            scale_stride=0 if scales is None else scales.stride(0),
            scale_word_stride=0 if scales is None else scales.stride(1),
        )
        out = Outputs(self.control.incarnation, spec, inputs, counts, owner, self._serial, arguments, with_source)
        senders, placers = self._split(spec.layout, num_sms)
        bulk, keep = self.bulk and cast == 0, (inputs, counts, out)
        if max_tokens or counts.sizes is not None:
            sizes = counts.sizes or (*self._static_sizes(spec, max_tokens), max_tokens)
            result = out.allocate(*sizes)
            self.link.follow(current)
            opening()
            self.link.channel.dispatch(
                arguments, num_senders=senders, num_placers=placers, bulk=bulk, stream=self.link.queue
            )
            flight = self.link.end(current, (*keep, result))
            return Launch(self.link, lambda: (result, (flight,)), outputs_of)
        self.link.follow(current)
        opening()
        opened = self._extension.Event()
        opened.record(self.link.queue)
        # What is sent before the sizes are known must not wait for peers, which may wait for this host.
        self.link.channel.dispatch(
            arguments,
            num_senders=senders,
            num_placers=0,
            laps=FIRST_LAP,
            bulk=bulk,
            stream=self.link.queue,
        )
        flight = self.link.end(current, keep)

        def note_sizes(max_tokens: int) -> int:
            self.max_tokens = max(self.max_tokens, max_tokens)
            return self.num_laps(max_tokens, (row_bytes, meta_words))

        split, launched = (senders, placers), (flight, keep)
        placing = Placing(self.link, note_sizes, counts, out, arguments, split, bulk, opened, launched)
        self.link.defer(placing.place)
        return Launch(self.link, placing.outputs, outputs_of)

    def replay(
        self,
        x: Tensor,
        plan: CudaPlan,
        header: list[int],
        scales: Tensor | None = None,
        num_sms: int | None = None,
    ) -> Launch[tuple[Tensor, Tensor | None]]:
        """Launch a dispatch of other rows [T, H] along a plan: layout rows, and their scales."""
        x = aligned(x)
        current = self.link.begin()
        scale_words = 0 if scales is None else scales.shape[1]
        rows = x.new_empty(plan.num_rows, x.shape[1])
        out_scales = None if scales is None else scales.new_empty(plan.num_rows, scale_words)
        self.link.follow(current)
        self.link.channel.open(header, self.link.queue)
        arguments = self._extension.DispatchArguments(
            row_bytes=x.shape[1] * x.itemsize,
            meta_words=scale_words,
            top_k=plan.top_k,
            num_experts=plan.num_experts,
            table=plan.table.data_ptr(),
            token_ranks=plan.token_ranks.data_ptr(),
            idx_in_rank=plan.idx_in_rank.data_ptr(),
            num_tokens=plan.num_tokens,
            with_plan=False,
            layout=plan.layout,
            x=x.data_ptr(),
            scale_words=scale_words,
            scales=pointer(scales),
            scale_stride=0 if scales is None else scales.stride(0),
            scale_word_stride=0 if scales is None else scales.stride(1),
        )
        arguments.set_output(
            max_chunks=plan.max_chunks,
            groups=plan.groups.data_ptr(),
            positions=plan.positions.data_ptr(),
            out=rows.data_ptr(),
            num_rows=plan.num_rows,
            out_scales=pointer(out_scales),
            zero_padding=plan.zero_padding,
        )
        senders, placers = self._split("compact" if plan.is_compact else "expanded", num_sms)
        self.link.channel.dispatch(
            arguments, num_senders=senders, num_placers=placers, bulk=self.bulk, stream=self.link.queue
        )
        flight = self.link.end(current, (x, scales, rows, out_scales, plan))
        return Launch(self.link, lambda: ((rows, out_scales), (flight,)), tuple)

    # Combine

    def combine(
        self,
        y: Tensor,
        row_weights: Tensor | None,
        plan: CudaPlan,
        header: list[int],
        bias: tuple[Tensor, ...] = (),
        values: Tensor | None = None,
        only_own_values: bool = False,
        wide: bool = False,
        num_sms: int | None = None,
    ) -> Launch[tuple[Tensor, Tensor | None]]:
        """Launch the way home of layout rows: each token's sum, and of values that travel beside them.

        Args:
            y: [num_rows, H] layout rows; only valid ones are read.
            row_weights: [num_rows] fp32 (fp64 for fp64 rows) factors, or None.
            plan: of the dispatch.
            header: compared on all ranks.
            bias: up to two [T, H] tensors added before rounding.
            values: [num_rows], or [N, K] for compact rows, fp32 or fp64; each token's are summed over ranks.
            only_own_values: whether values of compact rows count for this rank's choices alone.
            wide: whether sums of 16-bit rows travel in fp32.
            num_sms: None for the default.

        Returns:
            [T, H] in y's dtype, and [T, K] values or None.
        """
        y, bias = aligned(y), tuple(aligned(term) for term in bias)
        current = self.link.begin()
        out = y.new_empty(plan.num_tokens, y.shape[1])
        out_values, value_words, top_k = None, 0, plan.top_k
        if values is not None:
            values = values.contiguous()
            top_k = values.shape[1] if plan.is_compact else plan.top_k
            out_values = values.new_empty(plan.num_tokens, top_k)
            value_words = values.itemsize // WORD_BYTES
        self.link.follow(current)
        self.link.channel.open(header, self.link.queue)
        senders, reducers = self._split("combine compact" if plan.is_compact else "combine", num_sms)
        self.link.channel.combine(
            row_bytes=y.shape[1] * (WORD_BYTES if wide else y.itemsize),
            meta_words=top_k * value_words,
            top_k=top_k,
            num_experts=plan.num_experts,
            max_chunks=plan.max_chunks,
            table=plan.table.data_ptr(),
            groups=plan.groups.data_ptr(),
            positions=plan.positions.data_ptr(),
            token_ranks=plan.token_ranks.data_ptr(),
            num_tokens=plan.num_tokens,
            num_senders=senders,
            num_reducers=reducers,
            bulk=self.bulk,
            layout=plan.layout,
            element=_ELEMENTS[y.dtype],
            wide_wire=wide,
            hidden=y.shape[1],
            y=y.data_ptr(),
            row_weights=pointer(row_weights),
            weight_words=0 if row_weights is None else row_weights.itemsize // WORD_BYTES,
            values=pointer(values),
            value_words=value_words,
            only_own_values=only_own_values,
            out=out.data_ptr(),
            bias_0=pointer(bias[0]) if bias else 0,
            bias_1=pointer(bias[1]) if len(bias) > 1 else 0,
            out_values=pointer(out_values),
            stream=self.link.queue,
        )
        flight = self.link.end(current, (y, row_weights, plan, bias, values, out, out_values))
        return Launch(self.link, lambda: ((out, out_values), (flight,)), tuple)
