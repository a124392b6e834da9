"""The CUDA backend: rows move between GPUs of one node by this package's own kernels.

Nothing here waits for the host but the sizes of a dispatch without a capacity. Row order and results are those of the
torch backend; sums differ by rounding alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.control import ControlPlane
from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_counting import WORD_BYTES, Counts, choices_of_mask, get_ready
from moe_ep.backends.cuda_jobs import Launch
from moe_ep.backends.cuda_link import CudaLink, aligned, pointer
from moe_ep.backends.cuda_outputs import Outputs, max_chunks, outputs_of
from moe_ep.backends.cuda_placing import Placing
from moe_ep.backends.cuda_reserving import Reserving, limits_of, static_sizes
from moe_ep.backends.cuda_settings import Settings
from moe_ep.backends.lease import Lease
from moe_ep.backends.types import Dispatch
from moe_ep.config import ExchangeSpec
from moe_ep.handle import CudaPlan

_HOPPER = (9, 0)
# The host waits that long for sizes before it gives the GPU what is to run beside an exchange.
_SOON_SECONDS = 1e-4


class CudaBackend(Reserving):
    """Exchanges rows among GPUs that reach each other's memory.

    Args:
        control: of the Buffer.
        granted_bytes: memory for rows on their way; 0 reserves at first use.
        bulk: whether rows go through the copy engine of GPUs since Hopper; None where there is one.
    """

    name = "cuda"

    def __init__(self, control: ControlPlane, granted_bytes: int, bulk: bool | None = None) -> None:
        super().__init__(control, CudaLink(control, granted_bytes))
        self._extension = load_extension()
        self._serial = 0
        bulk = self.link.compute_capability >= _HOPPER if bulk is None else bulk
        self.settings = Settings(self._extension, bulk, self.control.size, self.link.num_sms)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arena."""
        return self.link.memory_bytes

    @property
    def lease(self) -> Lease:
        """What callers hold of the arena."""
        return self.link.lease

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
        self.forget()
        # Ranks that failed have not launched the same dispatches; the incarnation tells plans apart.
        self._serial = 0

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
        counts = self._count(topk_idx, spec, max_tokens, totals)
        # Nobody knows yet how rows will be asked for.
        counts.call.count_direct()
        current = self.link.here()
        counts.call.count(self.link.channel, header, current, self.link.queue_of(current, inline=False))
        return counts

    def _count(
        self, topk_idx: Tensor, spec: ExchangeSpec, max_tokens: int, totals: Tensor | None, told: Tensor | None = None
    ) -> Counts:
        """Get ready to count; arguments as in :meth:`count`, and ``told`` as in ``get_ready``."""
        counts = get_ready(self.link, topk_idx, spec, told)
        counts.call.set_capacity(max_tokens, *limits_of(spec, max_tokens))
        if totals is not None:
            counts.call.set_total(totals.data_ptr())
        return counts

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
        beside: bool = False,
        inline: bool = False,
        lends: bool = False,
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
            beside: whether the current stream may be given more work before the outputs are asked for. Where no other
                exchange is under way, that work waits until this one has its SMs, and does not keep it from them.
            inline: whether it runs on the current stream instead, for a caller who waits for it at once.
            lends: whether rows stay in the arena; a fixed number of rows must fit, others do if they fit.
        """
        # Copies are made on the current stream, which the exchange waits for.
        x, topk_idx = aligned(x), topk_idx.contiguous()
        self.link.begin()
        counts = planned or self._count(topk_idx, spec, max_tokens, totals)
        inputs, counted = (x, scales, topk_weights), planned is not None
        sizes = (max_tokens, num_sms)
        return self._launch(inputs, spec, counts, counted, header, owner, *sizes, with_source, beside, inline, lends)

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
        self.link.begin()
        counts = self._count(choices, spec, 0, None, told)
        return self._launch((x, scales, None), spec, counts, False, header, owner, 0, num_sms, True)

    def _launch(
        self,
        inputs: tuple[Tensor, Tensor | None, Tensor | None],
        spec: ExchangeSpec,
        counts: Counts,
        counted: bool,
        header: list[int],
        owner: int,
        max_tokens: int,
        num_sms: int | None,
        with_source: bool,
        beside: bool = False,
        inline: bool = False,
        lends: bool = False,
    ) -> Launch[Dispatch]:
        """Open a dispatch, and move its rows."""
        (x, scales, topk_weights), link, call = inputs, self.link, counts.call
        current = link.here()
        queue = link.queue_of(current, inline)
        settings, record = self.settings.rows(spec, x, scales, topk_weights, num_sms)
        strides = (0, 0) if scales is None else scales.stride()
        call.set_rows(settings, x.data_ptr(), pointer(topk_weights), pointer(scales), *strides)
        self._serial += 1
        identity = (owner, self.control.incarnation, self._serial)
        take, holds = None, beside and link.is_idle()
        # A single rank has no rings.
        if lends and self.control.size > 1:
            call.lend(max_chunks(max_tokens))
            take = functools.partial(self.direct.take, call, record)
        out = Outputs(spec, inputs, counts, identity, with_source, take)
        if max_tokens or counts.sizes is not None:
            fixed = static_sizes(spec, max_tokens)
            out.allocate(*(counts.sizes or (*fixed, max_tokens, fixed[0])))
            event = call.run(link.channel, header, current, queue, counted, holds, not inline)
            result = out.result()
            flights = link.end(current, (inputs, counts, result), event)
            return Launch(link, lambda: (result, flights), outputs_of)
        # What is sent before the sizes are known must not wait for peers, which may wait for this host.
        call.send(link.channel, header, current, queue, holds)

        def note_sizes(max_tokens: int) -> int:
            self.max_tokens = max(self.max_tokens, max_tokens)
            return 1 if out.in_arena else self.num_laps(max_tokens, record)

        # A host that is not ahead of its GPU knows the sizes soon, and then nothing comes between.
        soon = holds and call.wait_sizes(link.channel, _SOON_SECONDS) is not None
        placing = Placing(link, note_sizes, counts, out, (current, queue), (inputs, counts), beside and not soon, soon)
        link.defer(placing.place)
        if soon:
            placing.place()
        return Launch(link, placing.outputs, outputs_of)

    def _kept(self, plan: CudaPlan) -> Any:  # noqa: ANN401
        return self._extension.KeptPlan(
            plan.num_tokens,
            plan.top_k,
            plan.num_experts,
            plan.layout,
            plan.zero_padding,
            plan.num_rows,
            plan.max_chunks,
            plan.source.data_ptr(),
            plan.received.data_ptr(),
        )

    def replay(
        self,
        x: Tensor,
        plan: CudaPlan,
        header: list[int],
        scales: Tensor | None = None,
        num_sms: int | None = None,
        beside: bool = False,
        inline: bool = False,
    ) -> Launch[tuple[Tensor, Tensor | None]]:
        """Launch a dispatch of other rows [T, H] along a plan: layout rows, and their scales."""
        x = aligned(x)
        current = self.link.begin()
        scale_words = 0 if scales is None else scales.shape[1]
        rows = x.new_empty(plan.num_rows, x.shape[1])
        out_scales = None if scales is None else scales.new_empty(plan.num_rows, scale_words)
        strides = (0, 0) if scales is None else scales.stride()
        event = self._extension.replay(
            self.link.channel,
            self.settings.replay(x, scale_words, plan.is_compact, num_sms),
            self._kept(plan),
            header,
            x.data_ptr(),
            pointer(scales),
            *strides,
            rows.data_ptr(),
            pointer(out_scales),
            current,
            self.link.queue_of(current, inline),
            beside and self.link.is_idle(),
            not inline,
        )
        flights = self.link.end(current, (x, scales, rows, out_scales, plan), event)
        return Launch(self.link, lambda: ((rows, out_scales), flights), tuple)

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
        beside: bool = False,
        inline: bool = False,
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
            beside: as in :meth:`dispatch`.
            inline: as in :meth:`dispatch`.

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
        weight_words = 0 if row_weights is None else row_weights.itemsize // WORD_BYTES
        record = (y.shape[1] * (WORD_BYTES if wide else y.itemsize), top_k * value_words)
        laps = self.num_laps(plan.max_chunks * self._extension.CHUNK_TOKENS, record)
        words = (weight_words, value_words)
        event = self._extension.combine(
            self.link.channel,
            self.settings.combine(y, words, only_own_values, wide, plan.is_compact, num_sms, laps > 1),
            self._kept(plan),
            header,
            top_k,
            y.data_ptr(),
            pointer(row_weights),
            pointer(values),
            out.data_ptr(),
            pointer(bias[0]) if bias else 0,
            pointer(bias[1]) if len(bias) > 1 else 0,
            pointer(out_values),
            current,
            self.link.queue_of(current, inline),
            beside and self.link.is_idle(),
            not inline,
        )
        flights = self.link.end(current, (y, row_weights, plan, bias, values, out, out_values), event)
        return Launch(self.link, lambda: ((out, out_values), flights), tuple)
