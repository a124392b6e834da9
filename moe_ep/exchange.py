"""One dispatcher's exchanges: settings, headers, hooks, overflow and counters, without autograd.

``Exchanger`` turns validated calls into jobs of its Buffer. Every job announces itself with a header first, so an error
of one rank reaches the others before any payload moves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_ep.backends.control import Call
from moe_ep.backends.lease import LentJob
from moe_ep.backends.types import Announce, Counted, Dispatch
from moe_ep.buffer import Buffer
from moe_ep.config import ExchangeSpec
from moe_ep.errors import AgreedError, CapacityError, StaleHandleError
from moe_ep.events import Job
from moe_ep.handle import Overflow, Plan
from moe_ep.hooks import Hooks
from moe_ep.plan import logical_to_physical
from moe_ep.sm_budget import SmBudget
from moe_ep.untraced import untraced
from moe_ep.validate import check_chunk, check_layout_rows, check_routing, check_row_weights, check_rows

_CPU = torch.device("cpu")


class Exchanger:
    """Carries out the exchanges of one ``TokenDispatcher``.

    Args:
        buffer: where they run.
        spec: the settings, compared among ranks by the dispatcher.
        expert_map: [E_logical, max_replicas] int32 physical ids, or None.
        validate: whether to read and check ids.
        number: of the dispatcher that this one copies; None for a new one, which all ranks make together.
        hooks: to go on with; None for none yet.
    """

    def __init__(
        self,
        buffer: Buffer,
        spec: ExchangeSpec,
        expert_map: Tensor | None,
        validate: bool,
        number: int | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.buffer = buffer
        # A shared Buffer does not keep its group alive; what exchanges through it does.
        self.group = buffer.group
        self.spec = spec
        self.expert_map = expert_map
        self.validate = validate
        self.layer: int | str | None = None
        # The same on all ranks, and in copies: layers with equal settings must not be taken for one another.
        self.number = buffer.next_dispatcher() if number is None else number
        self.id = register(self)
        self.hooks = Hooks() if hooks is None else hooks
        self.sm_budget = SmBudget(None)
        self._seq = 0
        self._first_tokens: int | None = None
        self.overlap = False
        self._overflow: Overflow | None = None
        self._overflow_incarnation = 0
        # Of settings, and what they are in words.
        self._digests: dict[tuple[ExchangeSpec, int, bool, bool], tuple[int, str]] = {}
        self.num_exchanges = 0
        with torch.inference_mode(False):
            self.choices_received = torch.zeros(spec.num_local_experts, dtype=torch.int64, device="cpu")

    def fire(self, phase: str, seq: int) -> None:
        """Run the hooks of a phase; what they raise is raised here."""
        if self.hooks.any(phase):
            self.hooks.fire(phase, self.layer, seq, self.buffer.get_comm_stream())

    # Overflow

    def raise_overflow(self) -> None:
        """Raise, once, the CapacityError of an earlier exchange. All ranks see the same."""
        overflow, self._overflow = self._overflow, None
        # Ranks that failed in the overflowing exchange do not know of it; after reset() all are equal.
        if overflow is not None and self._overflow_incarnation == self.buffer.control.incarnation:
            raise CapacityError(
                f"routing needed {overflow.needed} rows on rank {overflow.rank}, its capacity gives {overflow.given}: "
                'raise the capacity, balance the router, or use on_overflow="drop"; outputs since then are NaN',
                rank=overflow.rank,
                needed=overflow.needed,
                given=overflow.given,
            )

    # Exchanges. Each returns a job; its result() is what the docstring says.

    def plan(self, chunks: list[Tensor]) -> list[Counted]:
        """Exchange the counts of several sets of tokens at once; blocks."""
        spec = self.spec
        error: Exception | None = None
        try:
            if not isinstance(chunks, list | tuple) or not chunks:
                raise ValueError(f"chunks is {type(chunks).__name__}; pass a list of at least one topk_idx")
            for topk_idx in chunks:
                check_chunk(topk_idx, spec, self._num_ids(), self.validate)
        # Here and below, whatever it is: peers wait for this rank's header.
        except Exception as failure:
            error = failure

        def run() -> list[Counted]:
            words = None if error else torch.cat([self._count_words(topk_idx, spec) for topk_idx in chunks])
            table = self.buffer.control.open(self._call("plan", spec, 0, len(chunks)), words, error)
            return [Counted.from_table(part, spec) for part in table.split(Counted.num_words(spec), dim=1)]

        return self._launch(run, error).result()

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor,
        topk_weights: Tensor,
        planned: Counted | None,
        lends: bool = False,
    ) -> Job[Dispatch]:
        """Rows to the ranks of their experts; with ``lends`` they are over when the next exchange is launched."""
        spec = self._spec_for(x)
        error: Exception | None = None
        rows = scales = None
        try:
            rows, scales = check_rows("x", x, spec)
            self.buffer.backend.lease.check("x", rows)
            if topk_weights is None:
                raise ValueError("topk_weights are missing: pass the router's [T, K] weights, or ones")
            check_routing(rows, topk_idx, topk_weights, spec, self._num_ids(), self.validate)
            if planned is not None:
                self._check_planned(planned, topk_idx)
        except Exception as failure:
            error = failure

        def run() -> Dispatch:
            control = self.buffer.control
            call = self._call("dispatch", spec, 0, int(planned is None), scales is not None, lends)
            if error is not None:
                control.open(call, error=error)
            assert rows is not None
            ids = self._physical(topk_idx)
            words = self.buffer.backend.count_words(ids, spec) if planned is None else None
            announce = functools.partial(control.begin, call, words, None)
            result = self.buffer.backend.dispatch(
                rows, scales, ids, topk_weights, planned, announce, self._agree_tokens, spec, self.id
            )
            self.choices_received += result.groups.counts
            if result.plan.overflowed:
                self._overflow, self._overflow_incarnation = result.groups.overflow, control.incarnation
            return result

        job = self._launch(run, error, _CPU if rows is None else rows.device)
        return LentJob(job, self.buffer.backend.lease, lambda result: result.rows) if lends else job

    def combine(self, y: Tensor, row_weights: Tensor | None, plan: Plan) -> Job[Tensor]:
        """[T, H]: each token's weighted sum."""
        spec = self._spec_for(y)
        error = self._refusal_of(plan)
        try:
            if error is None:
                check_layout_rows("y", y, plan, spec)
                check_row_weights(row_weights, plan, spec)
                self.buffer.backend.lease.check("y", y)
        except Exception as failure:
            error = failure

        def run() -> Tensor:
            announce = self._announce("combine", spec, plan, error)
            weights = None if row_weights is None else row_weights.reshape(-1)
            rows = y.reshape(-1, spec.hidden_size)
            return self.buffer.backend.combine(rows, weights, plan, announce=announce, wide=spec.wide_sums)

        return self._launch(run, error, plan.device)

    @untraced
    def refuse(self, kind: str, error: Exception, lends: bool = False) -> NoReturn:
        """Raise an error that no operator would carry to the peers, after telling them.

        Args:
            kind: of the exchange that they begin.
            error: to be raised.
            lends: as they call it.
        """
        call = self._call(kind, self.spec, 0)
        self._launch(lambda: self.buffer.control.open(call, error=error), error)
        raise AssertionError("unreachable: opening an exchange with an error raises it")

    def replay(self, x: Tensor, plan: Plan) -> Job[Tensor]:
        """Layout rows of other rows [T, H] along a plan: the reversed combine."""
        spec = self._spec_for(x)
        error = self._refusal_of(plan)
        try:
            if error is None:
                check_rows("x", x, spec, plan.num_tokens)
        except Exception as failure:
            error = failure

        def run() -> Tensor:
            announce = self._announce("replayed dispatch", spec, plan, error)
            return self._shape(self.buffer.backend.replay(x, plan, announce=announce)[0])

        return self._launch(run, error, plan.device)

    def combine_grads(self, grads: Tensor, weight_grads: Tensor, plan: Plan) -> Job[tuple[Tensor, Tensor]]:
        """Gradients of x [T, H] and of topk_weights [T, K]: the reversed dispatch."""
        spec = self._spec_for(grads)
        error = self._refusal_of(plan)

        def run() -> tuple[Tensor, Tensor]:
            announce = self._announce("combine of gradients", spec, plan, error)
            flat = weight_grads if spec.layout == "compact" else weight_grads.reshape(-1)
            rows = grads.reshape(-1, spec.hidden_size)
            return self.buffer.backend.combine_grads(rows, flat, plan, announce, wide=spec.wide_sums)

        return self._launch(run, error, plan.device)

    def host_counts(self, tokens_per_expert: Tensor) -> list[int]:
        """Choices that the last dispatch received for each local expert."""
        return tokens_per_expert.tolist()

    def fake_plan(self, topk_idx: Tensor, size: Callable[[], Any]) -> list[Tensor]:
        """What a tracer sees of a dispatch's plan; ``size()`` gives a size that only the exchange will know."""
        return Plan.fake_tensors(topk_idx, self.spec.num_ranks, size)

    def next_seq(self) -> int:
        """Number of the exchange being launched, for hooks."""
        self._seq += 1
        return self._seq

    def layout_rows(self, result: Dispatch) -> tuple[Tensor, Tensor]:
        """Rows and weights of a dispatch in the shape users see."""
        assert result.row_weights is not None
        weights = result.row_weights
        if self.spec.layout == "slab":
            weights = weights.view(self.spec.num_local_experts, -1)
        return self._shape(result.rows), weights

    def _shape(self, rows: Tensor) -> Tensor:
        if self.spec.layout == "slab":
            return rows.view(self.spec.num_local_experts, -1, self.spec.hidden_size)
        return rows

    def _num_ids(self) -> int:
        return self.spec.num_experts if self.expert_map is None else self.expert_map.shape[0]

    def _physical(self, topk_idx: Tensor) -> Tensor:
        return topk_idx if self.expert_map is None else logical_to_physical(topk_idx, self.expert_map)

    def _spec_for(self, x: object) -> ExchangeSpec:
        """The settings with the dtype that autocast gives the rows, where it is on."""
        if isinstance(x, Tensor) and x.dtype != self.spec.dtype and torch.is_autocast_enabled(x.device.type):
            return _with_dtype(self.spec, torch.get_autocast_dtype(x.device.type))
        if isinstance(x, Tensor) and x.dtype in self._autocast_dtypes:
            return _with_dtype(self.spec, x.dtype)
        return self.spec

    @functools.cached_property
    def _autocast_dtypes(self) -> set[torch.dtype]:
        """Dtypes that autocast gave rows; backward runs outside of autocast and meets them again."""
        return set()

    def allow_dtype(self, dtype: torch.dtype) -> None:
        """Accept rows of an autocast dtype from now on."""
        self._autocast_dtypes.add(dtype)

    def _refusal_of(self, plan: Plan) -> Exception | None:
        if plan.owner != self.id:
            return StaleHandleError(
                "the handle was made by another dispatcher: pass the handle that this dispatcher's dispatch returned"
            )
        if plan.incarnation != self.buffer.control.incarnation:
            return StaleHandleError("the handle is from before reset(): dispatch again")
        return None

    def _agree_tokens(self, largest: int) -> int:
        """The T that ``Capacity(factor=...)`` is meant for: given, or that of the first exchange; never larger later.

        Sizes must not depend on what came in between: a recomputed forward has to equal the first. Exchanges before any
        rank has tokens say nothing about sizes and do not count.
        """
        spec = self.spec
        if spec.max_tokens_per_rank is not None:
            return spec.max_tokens_per_rank
        if not self._first_tokens:
            self._first_tokens = max(largest, self.buffer.backend.reserved_tokens)
        if spec.capacity is not None and spec.capacity.factor is not None and largest > self._first_tokens:
            raise AgreedError(
                f"a rank sends {largest} tokens, but Capacity(factor=...) was sized for {self._first_tokens} at the "
                "first exchange: pass max_tokens_per_rank, the largest number of tokens that any rank will send"
            )
        return self._first_tokens

    def _check_planned(self, planned: Counted, topk_idx: Tensor) -> None:
        """Sizes on the wire follow from planned counts: those of other choices would tear the exchange apart."""
        if not isinstance(planned, Counted):
            raise ValueError(f"planned is {type(planned).__name__}; pass one entry of what plan() returned")
        rank = self.buffer.rank
        num_tokens = int(planned.tokens[rank])
        if num_tokens != topk_idx.shape[0]:
            raise ValueError(
                f"planned counts are of {num_tokens} tokens but x has {topk_idx.shape[0]}: "
                "pass what plan() returned for this topk_idx"
            )
        if self.validate:
            words = [planned.tokens[rank : rank + 1], planned.choices[rank]]
            if not self.spec.per_choice:
                words.append(planned.rows[rank])
            if not torch.equal(torch.cat(words), self._count_words(topk_idx, self.spec)):
                raise ValueError("planned counts are of other choices: pass what plan() returned for this topk_idx")

    def _count_words(self, topk_idx: Tensor, spec: ExchangeSpec) -> Tensor:
        return self.buffer.backend.count_words(self._physical(topk_idx), spec)

    def _announce(self, kind: str, spec: ExchangeSpec, plan: Plan, error: Exception | None) -> Announce:
        """How to begin a replay; an error of this rank is announced, and raised, here."""
        call = self._call(kind, spec, plan.serial)
        if error is not None:
            self.buffer.control.open(call, error=error)
        return functools.partial(self.buffer.control.begin, call, None, None)

    def _call(
        self,
        kind: str,
        spec: ExchangeSpec,
        serial: int,
        num_chunks: int = 1,
        fp8: bool = False,
        lends: bool = False,
    ) -> Call:
        key = (spec, num_chunks, fp8, lends)
        known = self._digests.get(key)
        if known is None:
            digest = (spec.digest() + 1_000_003 * self.number + 31 * num_chunks + fp8 + 2 * lends) & 0x7FFFFFFF
            out = ', out="arena"' if lends else ""
            known = digest, f"dispatcher {self.number} of the Buffer, {spec.describe()}{out}"
            self._digests[key] = known
        return Call(kind, known[0], serial, known[1])

    def _guarded(self, run: Callable[[], Any]) -> Any:
        # In the order of exchanges, so that all ranks raise at the same one.
        self.raise_overflow()
        self.num_exchanges += 1
        return run()

    def _launch(self, run: Callable[[], Any], error: Exception | None, device: torch.device = _CPU) -> Job:
        """Start a job; without ``overlap`` it runs to its end here. An error of this rank's input is raised here.

        Work for a GPU is issued here in any case: on another thread it would not be ordered with the current stream.
        """
        self.buffer.backend.lease.end()
        start = self.buffer.submit if self.overlap and device.type == "cpu" else self.buffer.run_job
        job = start(lambda: self._guarded(run))
        if error is not None:
            job.result()
        return job

    @contextlib.contextmanager
    def overlapped(self) -> Iterator[None]:
        """Jobs started inside run beside the caller, on the communication thread."""
        before, self.overlap = self.overlap, True
        try:
            yield
        finally:
            self.overlap = before


@functools.lru_cache(maxsize=256)
def _with_dtype(spec: ExchangeSpec, dtype: torch.dtype) -> ExchangeSpec:
    return dataclasses.replace(spec, dtype=dtype)


def allow_dtype(exchanger_id: int, dtype: torch.dtype) -> None:
    """Accept rows of an autocast dtype from now on; while tracing too, since graphs run with autocast off."""
    lookup(exchanger_id).allow_dtype(dtype)


# NOTE: torch.compiler.assume_constant_result, which runs it while tracing, would load the compiler at import.
allow_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]

_LIVE: weakref.WeakValueDictionary[int, Exchanger] = weakref.WeakValueDictionary()
_num_registered = 0
# Another one whenever outputs of an operator have other shapes for the same settings.
_GRAPH_FORMAT = 1


def register(exchanger: Exchanger) -> int:
    """Give an exchanger a number that operators can carry; the table does not keep it alive.

    The number tells settings apart, too. Inductor keeps compiled graphs on disk by their text, of which it is a part: a
    later process whose dispatcher has another capacity, say, must not be given a graph made for other shapes.
    """
    global _num_registered
    _num_registered += 1
    told = f"{_GRAPH_FORMAT} {type(exchanger).__name__} {exchanger.spec.describe()}"
    number = (zlib.crc32(told.encode()) & 0x7FFFFFFF) << 32 | _num_registered
    _LIVE[number] = exchanger
    return number


def lookup(exchanger_id: int) -> Exchanger:
    """The live exchanger of a number.

    Raises:
        StaleHandleError: when its dispatcher is gone.
    """
    exchanger = _LIVE.get(exchanger_id)
    if exchanger is None:
        raise StaleHandleError("the dispatcher of this exchange no longer exists: keep it alive until backward is done")
    return exchanger
