"""Trains a small language model whose experts are spread over ranks, under FSDP2 or DDP; torch is all it needs.

    torchrun --nproc-per-node 4 examples/fsdp_train.py --ep 2 --save /tmp/checkpoint
    torchrun --nproc-per-node 2 examples/fsdp_train.py --ep 2 --load /tmp/checkpoint --wrapper ddp
    torchrun --nproc-per-node 2 examples/fsdp_train.py --backend cuda               # moe_ep's own kernels

On GPUs where there is one for each rank, else on the CPU. The second command goes on from what the first has saved, on
another number of ranks. The task: say which letter comes next in texts that repeat a random word.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_ep.integrations.fsdp import apply_ep, clip_grad_norm_, dense_mesh, parameter_groups, wrap_ddp
from moe_ep.layers import MoELayer

VOCABULARY, LENGTH, WORD, SEQUENCES, HIDDEN = 32, 48, 6, 16, 64

# Settings of the optimizer are stored by parameter: the wrappers have different parameter groups.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class Block(nn.Module):
    def __init__(self, num_experts: int, layer_idx: int, backend: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        # All experts on every rank, until apply_ep or wrap_ddp leaves each rank its own.
        self.moe = MoELayer(
            None,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_experts=num_experts,
            top_k=2,
            aux_loss_coef=0.01,
            layer_idx=layer_idx,
            backend=backend,
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.moe(self.norms[1](x))


class LanguageModel(nn.Module):
    def __init__(self, num_experts: int, backend: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(Block(num_experts, i, backend) for i in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def wrap(model: nn.Module, wrapper: str, device: str, ep: int) -> nn.Module:
    ranks = dist.get_world_size()
    if wrapper == "ddp":
        return wrap_ddp(model, init_device_mesh(device, (ranks // ep, ep), mesh_dim_names=("replicate", "ep")))
    mesh: DeviceMesh = init_device_mesh(device, (ranks // ep, ep), mesh_dim_names=("efsdp", "ep"))
    apply_ep(model, mesh)
    dense = dense_mesh(mesh)
    for block in model.blocks:
        fully_shard(block, mesh=dense)
    return fully_shard(model, mesh=dense)


def batch(generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    words = torch.randint(VOCABULARY, (SEQUENCES, WORD), generator=generator)
    text = words.repeat(1, LENGTH // WORD + 1)[:, : LENGTH + 1].to(device)
    return text[:, :-1], text[:, 1:]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, device: str) -> list[float]:
    """The loss of every step, averaged over ranks."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    losses = []
    for _ in range(steps):
        ids, labels = batch(generator, device)
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    means = torch.stack(losses)
    dist.all_reduce(means)
    return (means / dist.get_world_size()).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrapper", choices=("fsdp2", "ddp"), default="fsdp2")
    parser.add_argument("--ep", type=int, help="ranks that share a set of experts (default: all)")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--backend", choices=("auto", "torch", "cuda"), default="auto", help="of the exchanges")
    parser.add_argument("--json", type=Path, help="file to write the loss of every step to")
    parser.add_argument("--save", type=Path, help="folder to write a checkpoint to")
    parser.add_argument("--load", type=Path, help="folder of a checkpoint to go on from")
    args = parser.parse_args()

    local, num_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if torch.cuda.device_count() >= num_local else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")

    torch.manual_seed(0)
    ep = args.ep or dist.get_world_size()
    model = wrap(LanguageModel(args.experts, args.backend).to(device), args.wrapper, device, ep)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3)
    if args.load:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=BY_NAME), strict=True))
        dcp.load(states, checkpoint_id=args.load)
        model_state, optimizer_state = states["model"], states["optimizer"]
        set_state_dict(
            model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=BY_NAME
        )
    losses = train(model, optimizer, args.steps, device)
    if dist.get_rank() == 0:
        print(f"{args.wrapper}, {args.experts} experts over {ep} of {dist.get_world_size()} ranks, {device}:", end=" ")
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
        if args.json:
            backends = sorted({m.dispatcher.backend_name for m in model.modules() if isinstance(m, MoELayer)})
            args.json.write_text(json.dumps({"losses": losses, "device": device, "backends": backends}))
    if args.save:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=BY_NAME), strict=True))
        dcp.save(states, checkpoint_id=args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
