import pytest
import torch
from torch import nn

from moe_ep.layers import (
    MoELayer,
    expert_parameters,
    gather_full_state_dict,
    load_full_state_dict,
    reshard,
    scale_expert_gradients,
)

H, E = 16, 12


class Model(nn.Module):
    """Two MoE layers and something dense."""

    def __init__(self, group, seed=0, **options):
        super().__init__()
        sizes = {"hidden_size": H, "intermediate_size": 8, "num_experts": E, "top_k": 2}
        options = {"shared_intermediate_size": 8, "use_correction_bias": True, "seed": seed, **options}
        self.layers = nn.ModuleList(MoELayer(group, **sizes, layer_idx=i, **options) for i in range(2))
        self.norm = nn.LayerNorm(H)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def gather(ctx):
    model = Model(ctx.group)
    assert model.state_dict()["layers.0.experts.w_down"].shape[0] == E // ctx.world_size
    return gather_full_state_dict(model, ctx.group), model.state_dict()


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_full_view_is_the_unsharded_model(ranks, num_ranks):
    whole = Model(None).state_dict()
    results = ranks(num_ranks, gather)
    for full, _ in results:
        assert_equal(full, whole)
    views = [view for _, view in results]
    assert_equal(reshard(views, 1)[0], whole)
    assert_equal(gather_full_state_dict(Model(None), None), whole)


def load(ctx, full, x):
    model = Model(ctx.group, seed=9)
    load_full_state_dict(model, full, ctx.group)
    return model(x)


def test_full_view_loads_on_any_number_of_ranks(ranks):
    model, x = Model(None, seed=4), torch.randn(5, H)
    expected = model(x)
    for num_ranks in (2, 3):
        for out in ranks(num_ranks, load, model.state_dict(), x):
            # Sums of at most 2 * (H + 8 + 2) terms of size about 1, in another order.
            torch.testing.assert_close(out, expected, rtol=0, atol=52 * torch.finfo(torch.float32).eps)
    other = Model(None, seed=9)
    load_full_state_dict(other, model.state_dict(), None)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize(("before", "after"), [(4, 3), (2, 4), (1, 6), (3, 1), (2, 2)])
def test_reshard(before, after):
    full = Model(None).state_dict()
    views = reshard([full], before)
    assert views[0]["layers.1.experts.w_gate_up"].shape[0] == E // before
    assert torch.equal(views[-1]["layers.0.experts.w_down"], full["layers.0.experts.w_down"][-E // before :])
    changed = reshard(views, after)
    assert len(changed) == after
    for ours, theirs in zip(changed, reshard([full], after), strict=True):
        assert_equal(ours, theirs)


def test_reshard_refuses_what_does_not_fit():
    full = Model(None).state_dict()
    with pytest.raises(ValueError, match="12 experts: 5 ranks"):
        reshard([full], 5)
    with pytest.raises(ValueError, match="views is empty"):
        reshard([], 2)
    other = dict(full)
    del other["norm.weight"]
    with pytest.raises(ValueError, match="norm.weight"):
        reshard([full, other], 2)


def test_loading_names_what_is_missing_or_misshapen():
    model, full = Model(None), Model(None).state_dict()
    with pytest.raises(RuntimeError, match="norm.weight"):
        load_full_state_dict(model, {name: value for name, value in full.items() if name != "norm.weight"}, None)
    with pytest.raises(RuntimeError, match="size mismatch for layers.0.experts.w_down"):
        load_full_state_dict(model, full | {"layers.0.experts.w_down": torch.zeros(3, H, 8)}, None)


def test_scaling_touches_expert_gradients_only():
    model = Model(None)
    assert len(list(expert_parameters(model))) == 4
    model(torch.randn(4, H)).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    scale_expert_gradients(model, 4)
    for name, parameter in model.named_parameters():
        divisor = 4 if ".experts." in name else 1
        assert torch.equal(parameter.grad, before[name] / divisor), name
    scale_expert_gradients(nn.Linear(2, 2), 4)
