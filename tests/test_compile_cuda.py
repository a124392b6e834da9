"""Plans of the CUDA backend under torch.compile, without a GPU: as it allocates them, beside exchanges on the CPU."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

import moe_ep
from moe_ep.backends.cuda_counting import Counts, source_words
from moe_ep.backends.cuda_outputs import Outputs
from moe_ep.backends.cuda_reserving import static_sizes
from moe_ep.backends.types import Dispatch
from moe_ep.events import Job
from moe_ep.exchange_cuda import CudaExchanger
from moe_ep.handle import Plan
from moe_ep.ops import NUM_EXTRAS, extras_of
from tests.sharded import make_case
from tests.test_compile import COMPILED, KEPT, operator_inputs, run_steps

pytest.importorskip("moe_ep._C", reason="moe_ep._C is not built")

OPERATORS = ("dispatch", "combine", "dispatch_replay", "combine_grads")


class Finished(Job):
    """A job that is over."""

    def __init__(self, value: Any) -> None:
        self._over = value

    def result(self) -> Any:
        return self._over


class Silent:
    """Stands for a call that nobody launches."""

    def set_output(self, *_: object) -> None:
        pass


class StandIn:
    """Gives an exchanger of the torch backend the plans of the CUDA backend, allocated by the code that it uses.

    Rows move by the torch plan, which the serial number of the other leads to.
    """

    def __init__(self, dispatcher: moe_ep.TokenDispatcher) -> None:
        exchanger = dispatcher._exchanger
        self.spec = exchanger.spec
        self.plans: dict[int, Plan] = {}
        self.whole = {name: getattr(exchanger, name) for name in ("dispatch", "combine", "replay", "combine_grads")}
        exchanger.fake_plan = types.MethodType(CudaExchanger.fake_plan, exchanger)
        exchanger.dispatch = self.dispatch
        exchanger.combine = lambda y, weights, plan: self.whole["combine"](y, weights, self.plans[plan.serial])
        exchanger.replay = lambda x, plan: self.whole["replay"](x, self.plans[plan.serial])
        exchanger.combine_grads = lambda rows, weights, plan: self.whole["combine_grads"](
            rows, weights, self.plans[plan.serial]
        )

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, planned: None, lends: bool) -> Finished:
        done: Dispatch = self.whole["dispatch"](x, topk_idx, topk_weights, planned, lends).result()
        plan, spec = done.plan, self.spec
        self.plans[plan.serial] = plan
        num_tokens, local = topk_idx.shape[0], spec.num_local_experts
        source = torch.zeros(source_words(num_tokens, *topk_idx.shape[1:], spec.num_experts, 1), dtype=torch.int32)
        overflow = torch.zeros((), dtype=torch.bool)
        counts = Counts(topk_idx, source, source.new_zeros(local), source.new_zeros(local), overflow, Silent())
        out = Outputs(spec, (x, None, topk_weights), counts, (plan.owner, 0, plan.serial), False)
        exact, most = spec.layout != "slab" and spec.capacity is None, spec.max_tokens_per_rank or num_tokens
        sizes = (plan.num_wire, num_tokens) if exact else (static_sizes(spec, most)[1], most)
        out.allocate(plan.num_rows, *sizes)
        result = out.result()
        for name in ("rows", "row_weights", "topk_idx", "tokens_per_expert", "expert_ends"):
            if getattr(done, name) is not None:
                getattr(result, name).copy_(getattr(done, name))
        # Undefined in part; runs are compared.
        result.plan.received.zero_()
        return Finished(dataclasses.replace(result, groups=done.groups))


@pytest.mark.parametrize("mode", ["expanded", "compact", "slab, experts", "rows", "per expert", "factor"])
def test_compiles_into_one_graph(mode: str) -> None:
    assert run_steps(0, None, 1, mode, "aot_eager", StandIn) <= 3


@pytest.mark.parametrize("mode", ["compact", "per expert"])
def test_inductor(mode: str) -> None:
    assert run_steps(0, None, 1, mode, "inductor", StandIn) <= 3


@pytest.mark.parametrize("mode", ["expanded", "per expert"])
def test_inductor_where_as_many_tokens_as_choices_share_a_symbol(mode: str) -> None:
    # The number of choices is known, so the symbol turns out to be 3 after the dispatch has been traced.
    assert run_steps(0, None, 1, mode, "inductor", StandIn, steps=[(3,), (7,)]) <= 3


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("mode", ["expanded", "compact", "per expert", "compact rows"])
def test_operators_pass_opcheck(mode: str, name: str) -> None:
    # The rest compares two calls, whose plans have different numbers.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(getattr(torch.ops.moe_ep, name).default, operator_inputs(mode, name, StandIn), test_utils=tests)


@pytest.mark.parametrize("mode", ["expanded", "per expert"])
def test_outputs_that_share_memory_are_refused(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: ends of groups in the memory of the counts."""

    def share(result: Dispatch) -> list[Tensor]:
        shared = dataclasses.replace(result, expert_ends=result.tokens_per_expert[:])
        return extras_of(shared)

    monkeypatch.setattr("moe_ep.ops.extras_of", share)
    operator, inputs = torch.ops.moe_ep.dispatch.default, operator_inputs(mode, "dispatch", StandIn)
    with pytest.raises(Exception, match="alias"):
        opcheck(operator, inputs, test_utils="test_schema")


@pytest.mark.parametrize("mode", ["expanded", "compact", "slab", "factor", "rows", "per expert", "compact rows"])
def test_fakes_are_on_the_gpu_with_numbers_on_the_host(mode: str) -> None:
    case = make_case(1, **COMPILED[mode])
    dispatcher = case.dispatcher(None)
    KEPT.append(dispatcher)
    StandIn(dispatcher)
    real = dispatcher.dispatch(case.x(0), *case.routing(0)).handle.tensors
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(7, 4, dtype=torch.float64, device="cuda")
        topk_idx = torch.empty(7, 3, dtype=torch.int64, device="cuda")
        weights, anchor = torch.empty(7, 3, dtype=torch.float64, device="cuda"), torch.zeros((), device="cpu")
        rows, row_weights, counts, tensors = torch.ops.moe_ep.dispatch(
            x, topk_idx, weights, anchor, dispatcher._exchanger.id
        )
        given = None if case.weights == "experts" else row_weights
        plan = tensors[NUM_EXTRAS:]
        out = torch.ops.moe_ep.combine(rows, given, plan, anchor, dispatcher._exchanger.id)
        grads = torch.ops.moe_ep.combine_grads(rows, row_weights, plan, dispatcher._exchanger.id)
    assert plan[0].device.type == "cpu"
    others = (rows, row_weights, counts, out, *grads, *tensors[:NUM_EXTRAS], *plan[1:])
    assert all(tensor.device.type == "cuda" for tensor in others)
    assert out.shape == grads[0].shape == x.shape
    assert grads[1].shape == weights.shape
    for fake, tensor in zip(plan, real, strict=True):
        assert fake.dtype == tensor.dtype
        assert fake.dim() == tensor.dim()
        known = [size if isinstance(size, int) else None for size in fake.shape]
        assert all(size in (None, actual) for size, actual in zip(known, tensor.shape, strict=True))
        # Sizes are left to the exchange only where nothing fixes them.
        exact = case.capacity is None and case.layout != "slab"
        assert exact or case.max_tokens_per_rank is None or None not in known
