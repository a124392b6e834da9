"""Train a small model whose sparse layer is DeepSpeed's MoE, with moe_ep moving the tokens.

    torchrun --nproc-per-node 2 examples/deepspeed_train.py            # or: deepspeed examples/deepspeed_train.py
    torchrun --nproc-per-node 2 examples/deepspeed_train.py --stock    # DeepSpeed's own exchange, same losses

On a machine without GPUs set DS_ACCELERATOR=cpu; DeepSpeed then compiles an operator at the first start.
"""

import argparse

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from moe_ep.integrations.deepspeed import convert

HIDDEN = 64


class Model(nn.Module):
    """Learns to sort: the targets are the sorted inputs."""

    def __init__(self, ep_size: int, top_k: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, HIDDEN)
        expert = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))
        self.moe = MoE(HIDDEN, expert, num_experts=8, ep_size=ep_size, k=top_k, drop_tokens=False)
        self.last = nn.Linear(HIDDEN, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.first(x))
        out, balance, _ = self.moe(hidden)
        target = x.sort(dim=-1).values
        return (self.last(hidden + out) - target).square().mean() + 0.01 * balance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--zero", type=int, default=2, help="ZeRO stage, 0 to 2")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--stock", action="store_true", help="leave the exchange to DeepSpeed")
    args, _ = parser.parse_known_args()

    deepspeed.init_distributed()
    rank, num_ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": args.zero},
        "zero_allow_untested_optimizer": True,
    }
    torch.manual_seed(0)
    model = Model(ep_size=num_ranks, top_k=args.top_k)
    if not args.stock:
        convert(model, config=config)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    device = get_accelerator().current_device_name()
    torch.manual_seed(1 + rank)
    for step in range(args.steps):
        # Every rank has its own number of tokens. DeepSpeed's own exchange takes that with drop_tokens=False and k > 1.
        loss = engine(torch.rand(4, 32 + rank, 16).to(device))
        engine.backward(loss)
        engine.step()
        if step in (0, args.steps - 1):
            print(f"rank {rank}: step {step}: loss {loss.item():.4f}", flush=True)  # noqa: T201
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    main()
