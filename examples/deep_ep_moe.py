"""Train a small mixture of experts written against the `deep_ep` module, with moe_ep behind that name.

    torchrun --nproc-per-node 2 examples/deep_ep_moe.py                     # gloo on CPUs, or NCCL where there are GPUs
    torchrun --nproc-per-node 2 examples/deep_ep_moe.py --backend torch     # through the process group on GPUs, too

Backward is the other exchange along the same handle, as programs of this interface do it: that of a dispatch is a
combine, that of a combine a dispatch. Tokens are spread unevenly, and losses are the same on any number of ranks.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ep.integrations import deep_ep

# Before anything that imports deep_ep.
deep_ep.install()

from deep_ep import Buffer  # noqa: E402

HIDDEN, NUM_EXPERTS, TOP_K = 64, 8, 2
NUM_TOKENS = 257


class Dispatch(torch.autograd.Function):
    """Rows and router weights to the ranks of their experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, topk_idx: Tensor, buffer: Buffer) -> tuple:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
        rows, local_idx, row_weights, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer, ctx.handle = buffer, handle
        ctx.mark_non_differentiable(local_idx)
        return rows, row_weights, local_idx, handle

    @staticmethod
    def backward(ctx: Any, grad: Tensor, weight_grad: Tensor, *_: Any) -> tuple:
        dx, dweights, _ = ctx.buffer.combine(grad.contiguous(), ctx.handle, topk_weights=weight_grad.contiguous())
        return dx, dweights, None, None


class Combine(torch.autograd.Function):
    """Rows back to their tokens, summed over the ranks that had them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, buffer: Buffer) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(rows, handle)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None


class MoE(nn.Module):
    """Learns to sort: the targets are the sorted inputs."""

    def __init__(self, buffer: Buffer) -> None:
        super().__init__()
        self.buffer = buffer
        self.first, self.last = nn.Linear(16, HIDDEN), nn.Linear(HIDDEN, 16)
        self.router = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
        # All ranks draw all experts, so that a run is the same on any number of ranks, and keep their own.
        experts = [
            nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))
            for _ in range(NUM_EXPERTS)
        ]
        local = NUM_EXPERTS // buffer.group_size
        self.experts = nn.ModuleList(experts[buffer.rank * local : (buffer.rank + 1) * local])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.first(x))
        weights, topk_idx = self.router(hidden).softmax(-1).topk(TOP_K, dim=-1)
        rows, row_weights, local_idx, handle = Dispatch.apply(hidden, weights, topk_idx, self.buffer)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, choice = (local_idx == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(rows[row]) * row_weights[row, choice].unsqueeze(1))
        mixed = Combine.apply(out, handle, self.buffer)
        return (self.last(mixed) - x.sort(dim=-1).values).square().sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--backend", choices=("auto", "torch", "cuda"), default="auto", help="of the exchanges")
    parser.add_argument("--json", type=Path, help="file to write the loss of every step to")
    args = parser.parse_args()

    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    buffer = Buffer(dist.group.WORLD, backend=args.backend)
    model = MoE(buffer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    shared = [p for name, p in model.named_parameters() if not name.startswith("experts")]

    torch.manual_seed(1)
    losses = []
    for _ in range(args.steps):
        tokens = torch.rand(NUM_TOKENS, 16).tensor_split(num_ranks)[rank]
        loss = model(tokens.to(device)) / (NUM_TOKENS * 16)
        loss.backward()
        # Experts have received every rank's gradients with their rows; the rest is summed here.
        for parameter in shared:
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    told = torch.stack(losses)
    dist.all_reduce(told)
    if rank == 0:
        for step in sorted({0, args.steps - 1}):
            print(f"step {step}: loss {told[step].item():.6f}", flush=True)  # noqa: T201
        if args.json:
            backends = [buffer.backend_name]
            args.json.write_text(json.dumps({"losses": told.tolist(), "device": device.type, "backends": backends}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
