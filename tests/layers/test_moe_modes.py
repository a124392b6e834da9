"""The layer under what training does to it: checkpointing, autocast, copies, files, wrappers, compilation."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_ep.layers import ignore_experts_in_ddp, scale_expert_gradients, set_loss_scale
from tests.layers.test_moe import CASES, SHARED, SLAB, Case, H, K, expected

AUX = {"aux_loss_coef": 0.5, "scope": "group", "use_correction_bias": True}


def own_batch(ctx, case):
    x, probe = (t.split(case.sizes(ctx.world_size))[ctx.rank] for t in case.batch(ctx.world_size))
    return x.clone().requires_grad_(), probe


def gradients(layer, x):
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    grads["x"], x.grad = x.grad, None
    layer.zero_grad()
    return grads


def assert_same(ours, theirs, atol=1e-13):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


class Block(nn.Module):
    """Two layers around something dense, so that handles replay after another layer's exchanges."""

    def __init__(self, group, case, **options):
        super().__init__()
        self.first = case.layer(group, layer_idx=0, **options)
        self.dense = nn.Linear(H, H, dtype=case.dtype)
        self.second = case.layer(group, layer_idx=1, **options)

    def forward(self, x):
        return self.second(torch.tanh(self.dense(self.first(x))))


def checkpointed(ctx, options):
    case = Case({**AUX, **options})
    torch.manual_seed(0)
    block, (x, probe) = Block(ctx.group, case), own_batch(ctx, case)
    found = []
    for use_reentrant in (None, True, False):
        run = block if use_reentrant is None else lambda t, mode=use_reentrant: checkpoint(block, t, use_reentrant=mode)
        block.first.reset_stats()
        block.first.router.bias_counts.zero_()
        (run(x) * probe).sum().backward()
        assert block.first.tokens_per_expert.sum() == len(x) * K
        assert torch.equal(block.first.router.bias_counts, block.first.tokens_per_expert)
        found.append(gradients(block, x))
    for grads in found[1:]:
        assert_same(grads, found[0], atol=0)


@pytest.mark.parametrize(
    "options", [SHARED, {"num_chunks": 3, "late_wgrad": True}, SLAB], ids=["one", "chunks", "slab"]
)
def test_checkpointing_gives_the_same_bits(ranks, options):
    ranks(2, checkpointed, options)
    ranks(3, checkpointed, options)


def checkpointed_parts(ctx):
    case = Case({"late_wgrad": True})
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    (layer(x) * probe).sum().backward()
    plain = gradients(layer, x)
    run = layer.experts.forward
    for use_reentrant in (True, False):
        layer.experts.forward = lambda rows, ends, row_weights, mode=use_reentrant, **options: checkpoint(
            lambda r, w: run(r, ends, w, **options), rows, row_weights, use_reentrant=mode
        )
        (layer(x) * probe).sum().backward()
        assert_same(gradients(layer, x), plain)


def test_checkpointing_the_experts_alone(ranks):
    ranks(2, checkpointed_parts)


def autocast(ctx, dtype, options):
    # A coefficient that shows in the gradient when its scale is forgotten.
    case = Case({**SHARED, "aux_loss_coef": 50.0, **options}, dtype=torch.float32)
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    set_loss_scale(layer, scaler.get_scale())
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    assert out.dtype == dtype
    scaler.scale((out.float() * probe).sum()).backward()
    x.grad /= scaler.get_scale()
    scaler.unscale_(optimizer)
    low = gradients(layer, x)
    set_loss_scale(layer, 1.0)
    (layer(x) * probe).sum().backward()
    full = gradients(layer, x)
    assert all(low[name].dtype == torch.float32 for name in full)
    # About ten tensors on the way are rounded to eps / 2 of values up to 8 times the largest result.
    eps = 10 * 4 * torch.finfo(dtype).eps
    for name, value in full.items():
        limit = eps * max(1.0, value.abs().max().item() if value.numel() else 0)
        torch.testing.assert_close(low[name], value, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}")
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("options", [{}, {"num_chunks": 2, "late_wgrad": True}], ids=["one", "chunks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(ranks, dtype, options):
    ranks(2, autocast, dtype, options)


def frozen(ctx, options):
    case = Case(options)
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    (layer(x) * probe).sum().backward()
    plain = gradients(layer, x)
    parts = {"experts.": layer.experts, "router.": layer.router}
    for names in (("experts.",), ("router.",), ("experts.", "router.")):
        for name in names:
            parts[name].requires_grad_(False)
        (layer(x) * probe).sum().backward()
        assert_same(gradients(layer, x), {n: g for n, g in plain.items() if not n.startswith(names)}, atol=0)
        layer.requires_grad_(True)
    # An input that needs no gradient, on one rank only.
    (layer(x.detach() if ctx.rank else x) * probe).sum().backward()
    if ctx.rank:
        x.grad = plain["x"]
    assert_same(gradients(layer, x), plain, atol=0)


@pytest.mark.parametrize("options", [{}, {"num_chunks": 2, "late_wgrad": True, "weights": "combine"}])
def test_frozen_parts_leave_the_other_gradients_alone(ranks, options):
    ranks(2, frozen, options)


def copied(ctx):
    case = CASES["shared"]
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    out = layer(x)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(x), out)
    with torch.no_grad():
        clone.experts.w_down.zero_()
    assert torch.equal(layer(x), out)
    file = io.BytesIO()
    torch.save(layer, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    loaded.set_group(ctx.group)
    result = loaded(x)
    assert torch.equal(result, out)
    (result * probe).sum().backward()
    moved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with pytest.raises(ValueError, match="build a new layer and call load_full_state_dict"):
        moved.set_group(None)


def test_copies_and_files(ranks):
    ranks(2, copied)
    layer = Case(SHARED).layer(None)
    x, _ = Case().batch(1)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def on_meta(ctx):
    case = Case({**SHARED, "use_correction_bias": True})
    layer, (x, _) = case.layer(ctx.group, device="meta"), own_batch(ctx, case)
    assert all(t.is_meta for t in itertools.chain(layer.parameters(), layer.buffers()))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer(x), case.layer(ctx.group)(x))


def test_construction_on_meta(ranks):
    ranks(2, on_meta)


def cast(ctx):
    layer = Case(SHARED, dtype=torch.float32).layer(ctx.group)
    x, _ = own_batch(ctx, Case())
    out = layer.double()(x)
    assert out.dtype == torch.float64
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_change_of_dtype(ranks):
    ranks(2, cast)


def mean_gradients(case, num_ranks):
    """The unsharded layer's gradients of the mean over ranks of each rank's loss."""
    return {name: grad / num_ranks for name, grad in expected(case, num_ranks).grads.items() if name != "x"}


def own_view(ctx, grads):
    return {n: g.chunk(ctx.world_size)[ctx.rank] if n.startswith("experts.") else g for n, g in grads.items()}


def under_ddp(ctx, options):
    case = Case({**SHARED, **options})
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    names = ignore_experts_in_ddp(layer)
    assert {"experts.w_gate_up", "experts.w_down", "tokens_per_expert"} <= set(names)
    wrapped = DistributedDataParallel(layer, process_group=ctx.group)
    for _ in range(2):
        layer.zero_grad()
        (wrapped(x) * probe).sum().backward()
        scale_expert_gradients(layer, ctx.world_size)
        grads = gradients(layer, x)
        grads.pop("x")
        assert_same(grads, own_view(ctx, mean_gradients(case, ctx.world_size)), atol=1e-12)
    assert layer.tokens_per_expert.sum() == 2 * len(x) * K


@pytest.mark.parametrize("options", [{}, {"num_chunks": 2, "late_wgrad": True}], ids=["one", "chunks"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_data_parallel_gradients_equal_the_unsharded_ones(ranks, num_ranks, options):
    ranks(num_ranks, under_ddp, options)


def under_fsdp(ctx, options):
    case = Case({**SHARED, **options})
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    whole = layer.gather_full_state_dict()
    mesh = DeviceMesh.from_group(ctx.group, "cpu")
    fully_shard(layer, mesh=mesh, ignored_params=set(layer.experts.parameters()))
    for _ in range(2):
        layer.zero_grad()
        (layer(x) * probe).sum().backward()
        scale_expert_gradients(layer, ctx.world_size)
        grads = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in layer.named_parameters()}
        assert_same(grads, own_view(ctx, mean_gradients(case, ctx.world_size)), atol=1e-12)
    assert_same(layer.gather_full_state_dict(), whole, atol=0)
    layer.reset_parameters()
    assert_same(layer.gather_full_state_dict(), whole, atol=0)
    layer.load_full_state_dict({name: value + 1 for name, value in whole.items()})
    assert_same(layer.gather_full_state_dict(), {name: value + 1 for name, value in whole.items()}, atol=0)


@pytest.mark.parametrize("options", [{}, {"num_chunks": 2, "late_wgrad": True}], ids=["one", "chunks"])
def test_fully_sharded_gradients_equal_the_unsharded_ones(ranks, options):
    ranks(2, under_fsdp, options)


def with_a_mesh(ctx):
    case = CASES["expanded"]
    x, _ = own_batch(ctx, case)
    layer = case.layer(DeviceMesh.from_group(ctx.group, "cpu"))
    assert torch.equal(layer(x), case.layer(ctx.group)(x))


def test_a_device_mesh_is_a_group(ranks):
    ranks(2, with_a_mesh)


def compiled(ctx, dtype, options):
    case = Case({**SHARED, **options}, dtype=dtype)
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    (layer(x) * probe).sum().backward()
    plain = gradients(layer, x)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        (run(x) * probe).sum().backward()
        # The same operations in another order of sums of few terms.
        assert_same(gradients(layer, x), plain, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "options"), [(torch.float32, {}), (torch.float64, {"layout": "compact"})])
def test_compiles_without_a_break(ranks, dtype, options):
    ranks(2, compiled, dtype, options, timeout=120)


def test_compiles_without_a_group():
    layer = Case(SHARED).layer(None)
    x, _ = Case().batch(1)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), layer(x), rtol=0, atol=1e-13)


def test_chunks_break_the_graph_and_give_the_same():
    layer = Case({"num_chunks": 2}).layer(None)
    x, _ = Case().batch(1)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x), rtol=0, atol=1e-13)


def schedule(ctx, options):
    """The order of launches and waits that hooks see, forward and backward."""
    case = Case({**SHARED, **options}, uneven=False)
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    seen = []
    for way, kind, phase in itertools.product(("", "backward_"), ("dispatch", "combine"), ("launched", "ready")):
        layer.dispatcher.register_hook(f"{way}{kind}_{phase}", lambda event: seen.append(event.phase))
    layer.experts.w_gate_up.register_hook(lambda grad: seen.append("weight_gradient"))
    layer.shared_expert.w_gate_up.register_hook(lambda grad: seen.append("shared_gradient"))
    layer.shared_expert.w_down.register_hook(lambda grad: seen.append("shared_down_gradient"))
    second_half = layer.shared_expert.second_half
    layer.shared_expert.second_half = lambda hidden: (seen.append("shared_down"), second_half(hidden))[1]
    (layer(x) * probe).sum().backward()
    return seen


def test_backward_hides_weight_gradients_under_the_reversed_dispatch(ranks):
    for late in (False, True):
        seen = ranks(2, schedule, {"late_wgrad": late})[0]
        launched, ready = seen.index("backward_dispatch_launched"), seen.index("backward_dispatch_ready")
        assert launched < seen.index("shared_gradient") < ready
        assert (launched < seen.index("weight_gradient") < ready) == late


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_the_shared_experts_second_product_runs_beside_combine(ranks, num_chunks):
    seen = ranks(2, schedule, {"num_chunks": num_chunks})[0]
    # The last launch of several comes before the first wait.
    for way, work in (("", "shared_down"), ("backward_", "shared_down_gradient")):
        launches = [i for i, name in enumerate(seen) if name == f"{way}combine_launched"]
        assert len(launches) == num_chunks
        assert launches[-1 if not way else 0] < seen.index(work) < seen.index(f"{way}combine_ready")


def headers(ctx, num_chunks):
    """The exchanges of a forward as their headers announce them, and whether counts of choices travel along."""
    case = Case({"num_chunks": num_chunks})
    layer, (x, _) = case.layer(ctx.group), own_batch(ctx, case)
    control, seen = layer.dispatcher.buffer.control, []
    begin = control.begin

    def record(call, words=None, *others):
        seen.append((call.kind, words is not None))
        return begin(call, words, *others)

    control.begin = record
    try:
        layer(x)
    finally:
        control.begin = begin
    return seen


def test_chunks_are_planned_in_one_exchange(ranks):
    for seen in ranks(2, headers, 3):
        assert seen.count(("plan", True)) == 1
        assert seen.count(("dispatch", False)) == seen.count(("combine", False)) == 3
        assert len(seen) == 7
    assert all(seen == [("dispatch", True), ("combine", False)] for seen in ranks(2, headers, 1))


def test_chunks_are_pipelined(ranks):
    seen = ranks(2, schedule, {"num_chunks": 3})[0]
    forward = [phase for phase in seen if phase.startswith(("dispatch", "combine"))]
    d, r, c, w = "dispatch_launched", "dispatch_ready", "combine_launched", "combine_ready"
    assert forward == [d, d, r, c, d, r, c, r, c, w, w, w]


def trains(ctx):
    case = Case({**SHARED, **AUX, "num_chunks": 2, "late_wgrad": True}, dtype=torch.float32)
    layer, (x, probe) = case.layer(ctx.group), own_batch(ctx, case)
    optimizer, losses = torch.optim.Adam(layer.parameters(), lr=1e-2), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (layer(x.detach()) - probe).square().mean() if len(x) else layer(x.detach()).sum()
        loss.backward()
        optimizer.step()
        layer.update_bias()
        losses.append(loss.item())
    return losses, layer.router.correction_bias


def test_a_layer_learns(ranks):
    results = ranks(3, trains)
    assert all(losses[-1] < 0.9 * losses[0] for losses, _ in results if losses[0])
    assert all(torch.equal(bias, results[0][1]) for _, bias in results)
    assert results[0][1].abs().sum() > 0
