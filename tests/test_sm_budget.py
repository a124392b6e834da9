"""SM budgets: when torch's carve-out is set, to what, and that it comes back; with a fake setter in torch's place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import moe_ep
from moe_ep.errors import PeerAbortedError
from moe_ep.events import Done
from moe_ep.layers import MoELayer
from moe_ep.sm_budget import Carveout, SmBudget
from moe_ep.testing import RankContext
from tests.checks import Case
from tests.sharded import make_case, make_leaves

Ranks = Callable[..., list]
GPU = torch.device("cuda")


class Setting:
    """Stands for torch's process-wide number."""

    def __init__(self, value: int | None = None) -> None:
        self.value, self.log = value, []

    def carveout(self) -> Carveout:
        return Carveout(lambda: self.value, self.set)

    def set(self, value: int | None) -> None:
        self.value = value
        self.log.append(value)


def test_the_largest_budget_in_flight_counts_and_the_callers_number_comes_back() -> None:
    setting = Setting(6)
    carveout = setting.carveout()
    small, large = SmBudget(4, carveout), SmBudget(20, carveout)
    first, second, third = (budget.hold(Done(n), GPU) for n, budget in enumerate((small, large, small)))
    assert setting.log == [6, 20, 20]
    assert [second.result(), first.result()] == [1, 0]
    assert setting.value == 6
    # One that nobody waits for.
    del third
    assert setting.log == [6, 20, 20, 6, 6, 6]


def test_an_error_ends_the_budget() -> None:
    setting = Setting()

    class Failing(Done):
        def result(self) -> None:
            raise PeerAbortedError("rank 1 left", rank=1, reason="")

    job = SmBudget(8, setting.carveout()).hold(Failing(None), GPU)
    with pytest.raises(PeerAbortedError):
        job.result()
    assert setting.log == [8, None]


@pytest.mark.parametrize("num_sms", [None, 0])
def test_no_budget_touches_nothing(num_sms: int | None) -> None:
    setting, job = Setting(), Done(3)
    assert SmBudget(num_sms, setting.carveout()).hold(job, GPU) is job
    assert SmBudget(8, setting.carveout()).hold(job, torch.device("cpu")) is job
    assert setting.log == []


def test_torchs_own_setting_comes_back() -> None:
    before = torch._C._get_sm_carveout_experimental()
    job = SmBudget(8).hold(Done(3), GPU)
    assert torch._C._get_sm_carveout_experimental() == 8
    assert job.result() == 3
    assert torch._C._get_sm_carveout_experimental() == before


def budget_phases(ctx: RankContext) -> list[tuple[str, int | None]]:
    """The number that GEMMs meet at each phase, forward and backward."""
    case, setting = make_case(ctx.world_size), Setting()
    dispatcher = case.dispatcher(ctx.group, sm_budget=16)
    assert dispatcher._exchanger.sm_budget.num_sms == 16
    dispatcher._exchanger.sm_budget = SmBudget(16, setting.carveout(), device_type="cpu")
    leaves, seen = make_leaves(case, ctx.rank), []
    for phase in moe_ep.hooks.PHASES:
        dispatcher.register_hook(phase, lambda event: seen.append((event.phase, setting.value)))
    routed = dispatcher.dispatch_async(leaves.x, case.routing(ctx.rank)[0], leaves.topk_weights).wait()
    dispatcher.combine_async(routed.x, routed.handle, routed.weights).wait().sum().backward()
    assert setting.log == [16, None] * 4
    # Nothing can run beside an exchange that is waited for where it is issued.
    plain = dispatcher.dispatch(leaves.x, case.routing(ctx.rank)[0], leaves.topk_weights)
    dispatcher.combine(plain.x, plain.handle, plain.weights)
    assert setting.log == [16, None] * 4
    return seen[:8]


def test_gemms_beside_an_exchange_meet_the_budget(ranks: Ranks) -> None:
    names = ("dispatch", "combine", "backward_combine", "backward_dispatch")
    expected = [(f"{name}_{phase}", sms) for name in names for phase, sms in (("launched", 16), ("ready", None))]
    assert ranks(2, budget_phases) == [expected] * 2


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_wrong_budgets_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="sm_budget=.*must be an int of 0 or more"):
        Case(tokens=(3,), num_experts=4).dispatcher(None, sm_budget=value)


def test_a_cpu_has_no_sms_and_layers_pass_their_budget_on() -> None:
    layer = MoELayer(None, hidden_size=16, intermediate_size=32, num_experts=4, top_k=2, sm_budget=8)
    twin = moe_ep.TokenDispatcher(None, num_experts=4, hidden_size=16, top_k=2, dtype=torch.float32, sm_budget=0)
    assert (layer.dispatcher.sm_budget, twin.sm_budget) == (8, 0)
    before = torch._C._get_sm_carveout_experimental()
    routed = layer.dispatcher.dispatch_async(torch.ones(3, 16), torch.tensor([[0, 1]] * 3), torch.ones(3, 2))
    assert torch._C._get_sm_carveout_experimental() == before
    routed.wait()
