"""One dispatcher's exchanges on the CUDA backend: nothing here waits for the host but a dispatch without a capacity.

Headers are compared by the kernels that open an exchange; what goes wrong there reaches the host through pinned memory
and is raised at the next call or wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_ep.backends.control import Call
from moe_ep.backends.cuda_counting import WORD_BYTES, Counts, source_words
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.backends.cuda_jobs import CudaJob
from moe_ep.backends.cuda_link import CudaLink
from moe_ep.backends.cuda_outputs import received_words
from moe_ep.backends.cuda_reserving import static_sizes
from moe_ep.backends.lease import LentJob
from moe_ep.backends.types import Dispatch
from moe_ep.buffer import Buffer
from moe_ep.config import FP8_GROUP, ExchangeSpec
from moe_ep.errors import CapacityError
from moe_ep.exchange import Exchanger
from moe_ep.handle import CudaPlan
from moe_ep.hooks import Hooks
from moe_ep.validate import check_chunk, check_layout_rows, check_routing, check_row_weights, check_rows

# Fewer than the channel has places for sizes.
_MOST_UNREAD = 64
# Shapes of arguments that were found good and need no second look.
_MOST_SHAPES = 256


class CudaExchanger(Exchanger):
    """Carries out the exchanges of one ``TokenDispatcher`` on GPUs; arguments as in the base.

    Args:
        num_sms: SMs of each exchange; None takes the default.
    """

    backend: CudaBackend
    link: CudaLink
    num_sms: int | None

    def __init__(
        self,
        buffer: Buffer,
        spec: ExchangeSpec,
        expert_map: Tensor | None,
        validate: bool,
        number: int | None = None,
        hooks: Hooks | None = None,
        num_sms: int | None = None,
    ) -> None:
        super().__init__(buffer, spec, expert_map, validate, number, hooks)
        assert isinstance(buffer.backend, CudaBackend)
        self.backend = buffer.backend
        self.link = self.backend.link
        self.num_sms = num_sms
        self._listed: list[int] | None = None
        self._good_shapes: set[tuple[Any, ...]] = set()
        if self._has_fixed_sizes(spec) and spec.max_tokens_per_rank is not None:
            # Fixed sizes tell nobody a larger T later; this one all ranks know.
            self.backend.expect(spec.max_tokens_per_rank, *self._record(spec))
        with torch.inference_mode(False):
            self.choices_received = torch.zeros(spec.num_local_experts, dtype=torch.int64, device=self.link.device)

    # Trouble

    def raise_overflow(self) -> None:
        """Raise, once, the CapacityError of an exchange that is known to have overflowed, and any other trouble."""
        if self.link.is_quiet():
            return
        overflow = self.link.new_overflow()
        if overflow is not None:
            rank, needed, given = overflow
            raise CapacityError(
                f"routing needed {needed} rows on rank {rank}, its capacity gives {given}: "
                'raise the capacity, balance the router, or use on_overflow="drop"; outputs since then are NaN',
                rank=rank,
                needed=needed,
                given=given,
            )
        self.link.check()

    def _begin(self) -> None:
        self.buffer.check_alive()
        # What peers know of sizes from dispatches before, this rank knows as well when it decides on memory.
        self.link.settle()
        self.raise_overflow()
        self.num_exchanges += 1

    def refuse(self, kind: str, error: Exception, lends: bool = False) -> NoReturn:
        """Raise an error that no operator would carry to the peers, after telling them; arguments as in the base."""
        self._refuse(self._call(kind, self.spec, 0), error, self.spec, lends)

    def _refuse(self, call: Call, error: Exception, spec: ExchangeSpec, lends: bool = False) -> NoReturn:
        self._begin()
        # Replays and combines find the memory of their dispatch.
        makes_plan = call.kind in ("plan", "dispatch")
        agrees = makes_plan and (self.backend.will_agree(*self._record(spec)) or self._will_agree(spec))
        if agrees or (lends and self._will_reserve(spec)):
            # Peers are about to agree on sizes, over the control plane.
            self.link.control.open(Call("reserve"), error=error)
        self.link.refuse(call, error)

    def _record(self, spec: ExchangeSpec) -> tuple[int, int]:
        """Bytes of the longest row and words of the longest metadata, whatever an exchange really carries."""
        weight_words = 2 if spec.dtype == torch.float64 else 1
        meta_words = (2 + weight_words) * spec.top_k + -(-spec.hidden_size // FP8_GROUP)
        return spec.hidden_size * (WORD_BYTES if spec.wide_sums else spec.dtype.itemsize), meta_words

    def _will_reserve(self, spec: ExchangeSpec) -> bool:
        """Whether peers that begin a dispatch whose rows stay in the arena first reserve memory for them."""
        fixed = self._has_fixed_sizes(spec)
        max_tokens = (spec.max_tokens_per_rank or self._first_tokens or 1) if fixed else 0
        return self.link.must_grow(0, 0, 0, self.backend.direct_bytes(spec, max_tokens, self._direct_record(spec)))

    def _direct_record(self, spec: ExchangeSpec) -> tuple[int, int]:
        """As ``_record``, of what a dispatch carries at most."""
        return spec.hidden_size * spec.dtype.itemsize, self._record(spec)[1]

    # Exchanges

    def plan(self, chunks: list[Tensor]) -> list[Any]:
        """Exchange the counts of several sets of tokens; the host waits once, and not at all with a capacity."""
        spec = self.spec
        call = self._call("plan", spec, 0, len(chunks) if isinstance(chunks, list | tuple) else 0)
        try:
            if not isinstance(chunks, list | tuple) or not chunks:
                raise ValueError(f"chunks is {type(chunks).__name__}; pass a list of at least one topk_idx")
            for topk_idx in chunks:
                check_chunk(topk_idx, spec, self._num_ids(), self.validate)
                self.link.check_device("topk_idx", topk_idx)
        # Whatever it is: peers wait for this rank.
        except Exception as error:
            self._refuse(call, error, spec)
        self._begin()
        ids = [self._physical(topk_idx).contiguous() for topk_idx in chunks]
        most = max(topk_idx.shape[0] for topk_idx in ids)
        max_tokens = self._prepare(most, spec)
        current = self.link.begin()
        counted: list[Counts] = []
        for topk_idx in ids:
            # Sizes that nobody has read make way for those of later sets.
            if len(counted) >= _MOST_UNREAD:
                self._read_sizes(counted[-_MOST_UNREAD])
            counted.append(
                self.backend.count(topk_idx, spec, self.link.header(call), max_tokens, self.choices_received)
            )
        for flight in self.link.end(current, (counted,), self.link.mark()):
            self.link.land(flight)
        for counts in counted:
            self._read_sizes(counts)
        return counted

    def _read_sizes(self, counts: Counts) -> None:
        if counts.call.tells_sizes and counts.sizes is None:
            counts.sizes = self.link.wait_sizes(counts.call)
            counts.host_counts = counts.call.host_counts(self.link.channel)
            self.backend.max_tokens = max(self.backend.max_tokens, counts.sizes[2])

    def dispatch(  # type: ignore[override]
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor,
        topk_weights: Tensor,
        planned: Counts | None,
        lends: bool = False,
    ) -> Any:  # noqa: ANN401
        """Rows to the ranks of their experts; with ``lends`` they stay in the arena, as far as they fit."""
        spec = self._spec_for(x)
        call = self._call("dispatch", spec, 0, int(planned is None), isinstance(x, tuple), lends)
        try:
            rows, scales = self._check_arguments(x, topk_idx, topk_weights, spec)
            self.link.lease.check("x", rows)
            if planned is not None and not isinstance(planned, Counts):
                raise ValueError(f"planned is {type(planned).__name__}; pass one entry of what plan() returned")
            if planned is not None and planned.topk_idx.shape != topk_idx.shape:
                raise ValueError(
                    f"planned counts are of {planned.topk_idx.shape[0]} tokens but x has {topk_idx.shape[0]}: "
                    "pass what plan() returned for this topk_idx"
                )
            self._check_tokens(rows.shape[0], spec)
        # Whatever it is: peers wait for this rank.
        except Exception as error:
            self._refuse(call, error, spec, lends)
        self._begin()
        max_tokens = self._prepare(rows.shape[0], spec)
        if lends:
            too_small = self.backend.ensure_direct(spec, max_tokens, self._direct_record(spec))
            if too_small is not None:
                self._refuse(call, too_small, spec, lends)
        beside = self._runs_beside("dispatch_launched")
        job = self.backend.dispatch(
            rows,
            scales,
            self._physical(topk_idx),
            topk_weights.contiguous(),
            spec,
            self.link.header(call),
            self.id,
            max_tokens=max_tokens,
            totals=self.choices_received,
            planned=planned,
            num_sms=self.num_sms,
            beside=beside,
            inline=not beside,
            lends=lends,
        )

        def landed() -> Dispatch:
            result = job.result()
            self._listed = result.groups.counts
            return result

        done: Any = self._checked(landed)
        return LentJob(done, self.link.lease, lambda result: result.rows) if lends else done

    def _runs_beside(self, phase: str) -> bool:
        """Whether work may be given to the current stream before the wait; where not, an exchange runs inline."""
        return self.overlap or self.hooks.any(phase)

    def _check_arguments(
        self, x: Tensor | tuple[Tensor, Tensor], topk_idx: Tensor, topk_weights: Tensor, spec: ExchangeSpec
    ) -> tuple[Tensor, Tensor | None]:
        """Rows and scales of a dispatch's arguments, which are found good or raised for."""
        shape = None if self.validate else _shape_of(x, topk_idx, topk_weights)
        if shape is not None and (spec, shape) in self._good_shapes:
            return x, None  # type: ignore[return-value]
        rows, scales = check_rows("x", x, spec)
        if topk_weights is None:
            raise ValueError("topk_weights are missing: pass the router's [T, K] weights, or ones")
        check_routing(rows, topk_idx, topk_weights, spec, self._num_ids(), self.validate)
        self.link.check_device("x", rows)
        if shape is not None:
            if len(self._good_shapes) >= _MOST_SHAPES:
                self._good_shapes.clear()
            self._good_shapes.add((spec, shape))
        return rows, scales

    def combine(  # type: ignore[override]
        self, y: Tensor, row_weights: Tensor | None, plan: CudaPlan
    ) -> CudaJob[Tensor]:
        """[T, H]: each token's weighted sum."""
        spec = self._spec_for(y)
        call = self._replay_call("combine", plan, spec)
        try:
            check_layout_rows("y", y, plan, spec)
            check_row_weights(row_weights, plan, spec)
            self.link.lease.check("y", y)
        # Whatever it is: peers wait for this rank.
        except Exception as error:
            self._refuse(call, error, spec)
        self._begin()
        weights = None if row_weights is None else row_weights.reshape(-1).contiguous()
        beside = self._runs_beside("combine_launched")
        job = self.backend.combine(
            y.reshape(-1, spec.hidden_size),
            weights,
            plan,
            self.link.header(call),
            wide=spec.wide_sums,
            num_sms=self.num_sms,
            beside=beside,
            inline=not beside,
        )
        return self._checked(lambda: job.result()[0])

    def replay(self, x: Tensor, plan: CudaPlan) -> CudaJob[Tensor]:  # type: ignore[override]
        """Layout rows of other rows [T, H] along a plan: the reversed combine."""
        spec = self._spec_for(x)
        call = self._replay_call("replayed dispatch", plan, spec)
        try:
            check_rows("x", x, spec, plan.num_tokens)
        # Whatever it is: peers wait for this rank.
        except Exception as error:
            self._refuse(call, error, spec)
        self._begin()
        beside = self._runs_beside("backward_combine_launched")
        job = self.backend.replay(
            x, plan, self.link.header(call), num_sms=self.num_sms, beside=beside, inline=not beside
        )
        return self._checked(lambda: self._shape(job.result()[0]))

    def combine_grads(  # type: ignore[override]
        self, grads: Tensor, weight_grads: Tensor, plan: CudaPlan
    ) -> CudaJob[tuple[Tensor, Tensor]]:
        """Gradients of x [T, H] and of topk_weights [T, K]: the reversed dispatch."""
        spec = self._spec_for(grads)
        call = self._replay_call("combine of gradients", plan, spec)
        self._begin()
        values = weight_grads if spec.layout == "compact" else weight_grads.reshape(-1)
        beside = self._runs_beside("backward_dispatch_launched")
        job = self.backend.combine(
            grads.reshape(-1, spec.hidden_size),
            None,
            plan,
            self.link.header(call),
            values=values,
            only_own_values=True,
            wide=spec.wide_sums,
            num_sms=self.num_sms,
            beside=beside,
            inline=not beside,
        )

        def landed() -> tuple[Tensor, Tensor]:
            dx, dweights = job.result()
            assert dweights is not None
            return dx, dweights

        return self._checked(landed)

    def host_counts(self, tokens_per_expert: Tensor) -> list[int]:
        """Choices that the last dispatch received for each local expert; without a wait for the device."""
        return tokens_per_expert.tolist() if self._listed is None else self._listed

    def fake_plan(self, topk_idx: Tensor, size: Callable[[], Any]) -> list[Tensor]:
        """What a tracer sees of a dispatch's plan; ``size()`` gives a size that only the exchange will know."""
        spec, num_tokens, most = self.spec, topk_idx.shape[0], self.spec.max_tokens_per_rank
        # NOTE: a symbol may turn out to be a number later, so what is asked for here must not depend on which it is.
        source = source_words(num_tokens, spec.top_k, spec.num_experts, spec.num_ranks)
        if most is None or (spec.layout != "slab" and spec.capacity is None):
            return CudaPlan.fake_tensors(topk_idx, source, size())
        received = received_words(most, static_sizes(spec, most)[1], spec.num_ranks, spec.top_k)
        return CudaPlan.fake_tensors(topk_idx, source, received)

    def _checked(self, finish: Callable[[], Any]) -> CudaJob:
        """A job that raises what is known to have gone wrong when it is waited for."""

        def land() -> Any:  # noqa: ANN401
            result = finish()
            self.link.check()
            return result

        return CudaJob(land)

    def _replay_call(self, kind: str, plan: CudaPlan, spec: ExchangeSpec) -> Call:
        call = self._call(kind, spec, plan.serial)
        error = self._refusal_of(plan)  # type: ignore[arg-type]
        if error is not None:
            self._refuse(call, error, spec)
        return call

    def _prepare(self, num_tokens: int, spec: ExchangeSpec) -> int:
        """Reserve memory where it is missing; returns the T that fixed sizes are meant for, 0 without a capacity."""
        fixed = self._has_fixed_sizes(spec)
        self.backend.ensure(num_tokens, *self._record(spec))
        if not fixed:
            return 0
        if spec.max_tokens_per_rank is not None:
            return spec.max_tokens_per_rank
        # Exchanges before any rank has tokens do not count; all ranks then agree again.
        if not self._first_tokens:
            self._first_tokens = self.backend.agree_tokens(num_tokens)
        return max(self._first_tokens, 1)

    @staticmethod
    def _has_fixed_sizes(spec: ExchangeSpec) -> bool:
        return spec.layout == "slab" or spec.capacity is not None

    def _will_agree(self, spec: ExchangeSpec) -> bool:
        """Whether peers that begin an exchange with a plan first agree on the T that a capacity is meant for."""
        return spec.capacity is not None and spec.max_tokens_per_rank is None and not self._first_tokens

    def _check_tokens(self, num_tokens: int, spec: ExchangeSpec) -> None:
        """Sizes are fixed with a capacity: by the constructor, or by the largest T of the first exchange."""
        most = self._first_tokens
        if spec.capacity is not None and spec.max_tokens_per_rank is None and most and num_tokens > most:
            raise ValueError(
                f"x has {num_tokens} tokens, but the capacity was sized for {most} at the first exchange: pass "
                "max_tokens_per_rank, the largest number of tokens that any rank will send"
            )


def _shape_of(*tensors: object) -> tuple[Any, ...] | None:
    """What the checks of arguments look at, but for values; None for arguments that have to be looked at anyway."""
    shape: list[Any] = []
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_contiguous():
            return None
        shape += (tensor.shape, tensor.dtype, tensor.device)
    return tuple(shape)


def make_exchanger(
    buffer: Buffer,
    spec: ExchangeSpec,
    expert_map: Tensor | None,
    validate: bool,
    number: int | None = None,
    hooks: Hooks | None = None,
    num_sms: int | None = None,
) -> Exchanger:
    """The exchanger for a Buffer's backend; arguments as in :class:`CudaExchanger`."""
    if isinstance(buffer.backend, CudaBackend):
        return CudaExchanger(buffer, spec, expert_map, validate, number, hooks, num_sms)
    return Exchanger(buffer, spec, expert_map, validate, number, hooks)
