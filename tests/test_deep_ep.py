"""The module that stands in for deep_ep, as a program that knows only that name uses it."""

import importlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import moe_ep
from moe_ep.errors import StaleHandleError
from moe_ep.integrations import deep_ep as ours
from moe_ep.testing import RankContext, make_routing
from tests.test_readme import ROOT, run_first_example

Ranks = Callable[..., list]


@pytest.fixture
def installed() -> Iterator[types.ModuleType]:
    yield ours.install()
    ours.uninstall()


def test_names(installed: types.ModuleType) -> None:
    import deep_ep
    import deep_ep.utils
    from deep_ep import Buffer, Config
    from deep_ep.utils import EventHandle, EventOverlap

    assert deep_ep is installed is ours
    assert (Buffer, Config) == (ours.Buffer, moe_ep.Config)
    assert issubclass(Buffer, moe_ep.Buffer)
    assert (EventHandle, EventOverlap) == (moe_ep.EventHandle, moe_ep.EventOverlap)
    assert (deep_ep.EventHandle, deep_ep.EventOverlap) == (EventHandle, EventOverlap)
    assert deep_ep.utils is ours.utils
    assert importlib.import_module("deep_ep.buffer").Buffer is Buffer
    assert deep_ep.topk_idx_t is torch.int64
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("deep_ep.legacy")


def test_installing_twice_and_taking_it_back() -> None:
    assert ours.install() is ours.install()
    ours.uninstall()
    ours.uninstall()
    assert not [name for name in sys.modules if name.startswith("deep_ep")]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("deep_ep")


def test_an_installed_one_is_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_ep").mkdir()
    (tmp_path / "deep_ep" / "__init__.py").write_text("Buffer = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    refused = pytest.raises(ImportError, match=r"deep_ep is already here .*replace=True")
    with refused:
        ours.install()
    other = importlib.import_module("deep_ep")
    with refused:
        ours.install()
    assert sys.modules["deep_ep"] is other
    assert ours.install(replace=True) is sys.modules["deep_ep"] is ours
    ours.uninstall()


def test_a_framework_that_has_looked_already(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "megatron.core.transformer.moe.fused_a2a"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(ImportError, match=r"fused_a2a has been imported already .*call install\(\) before"):
        ours.install()
    assert "deep_ep" not in sys.modules


def test_importing_it_installs_nothing() -> None:
    script = "import sys; from moe_ep.integrations import deep_ep; print('deep_ep' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def exchange_by_name(ctx: RankContext) -> None:
    """Dispatch and combine as callers of that interface write them, forward and replayed."""
    ours.install()
    try:
        from deep_ep import Buffer
        from deep_ep.utils import EventHandle, EventOverlap

        hidden, experts, tokens = 64, 2 * ctx.world_size, 5 + ctx.rank
        Buffer.set_num_sms(24)
        sizes = [Buffer.get_dispatch_config(ctx.world_size), Buffer.get_combine_config(ctx.world_size)]
        nvl, rdma = (
            max(getattr(config, f"get_{kind}_buffer_size_hint")(hidden * 4, ctx.world_size) for config in sizes)
            for kind in ("nvl", "rdma")
        )
        buffer = Buffer(ctx.group, nvl, rdma)
        assert (buffer.group, buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (ctx.group, nvl, rdma)
        x = torch.arange(tokens * hidden, dtype=torch.float32).view(tokens, hidden) + 1000 * ctx.rank
        topk_idx, topk_weights = make_routing(tokens, 2, experts, kind="holes", seed=ctx.rank)

        captured = EventOverlap(EventHandle())
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
            topk_idx, experts, previous_event=captured, async_finish=True, allocate_on_comm_stream=True
        )
        rows, ids, weights, counts, handle, event = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        assert counts == [int((ids == expert).sum()) for expert in range(experts // ctx.world_size)]
        home, home_weights, event = buffer.combine(
            rows, handle, topk_weights=weights, previous_event=Buffer.capture(), async_finish=True
        )
        with event:
            again = buffer.dispatch(x, handle=handle)[0]
        assert torch.equal(home, x * in_rank.sum(1, keepdim=True))
        assert torch.equal(home_weights, topk_weights)
        assert torch.equal(again, rows)
    finally:
        ours.uninstall()
        Buffer.num_sms = None


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_exchanges_under_that_name(ranks: Ranks, num_ranks: int) -> None:
    ranks(num_ranks, exchange_by_name)


def replay_through_another(ctx: RankContext) -> None:
    """A framework makes a larger Buffer while a handle of the smaller one waits."""
    x = torch.arange(3 * 8, dtype=torch.float32).view(3, 8) + ctx.rank
    topk_idx = torch.tensor([[0], [1], [-1]])
    first, second = ours.Buffer(ctx.group), ours.Buffer(ctx.group)
    per_rank, _, per_expert, in_rank, _ = first.get_dispatch_layout(topk_idx, 2)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    rows, *_, handle, _ = first.dispatch(x, **layout, topk_idx=topk_idx)
    del first
    assert torch.equal(second.combine(rows, handle)[0], x * in_rank.sum(1, keepdim=True))
    elsewhere = ours.Buffer(ctx.new_group())
    with pytest.raises(StaleHandleError, match="another Buffer"):
        elsewhere.combine(rows, handle)


def test_handles_outlive_their_buffer(ranks: Ranks) -> None:
    ranks(2, replay_through_another)


def test_page(tmp_path: Path) -> None:
    output = run_first_example("docs/deep_ep.md", tmp_path)
    received = [int(count) for count in re.findall(r"rank [01]: (\d+) choices received, True", output)]
    assert len(received) == 2
    assert sum(received) == 10


def run_example(num_ranks: int) -> list[float]:
    """First and last loss of the example."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += [str(ROOT / "examples/deep_ep_moe.py"), "--steps", "7", "--backend", "torch"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", done.stdout)]


def test_example() -> None:
    alone, spread = run_example(1), run_example(2)
    assert alone[1] < 0.6 * alone[0]
    # Printed with six digits, of sums in other orders. Halved gradients of experts alone move the last by 3e-5.
    assert spread == pytest.approx(alone, abs=5e-6)
