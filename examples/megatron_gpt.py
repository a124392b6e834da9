"""Trains a small GPT of Megatron-Core whose experts are spread over ranks, with moe_ep moving the tokens.

    torchrun --nproc-per-node 2 examples/megatron_gpt.py
    torchrun --nproc-per-node 2 examples/megatron_gpt.py --backend cuda     # moe_ep's own kernels

Needs megatron-core 0.16.1 and a GPU per rank; neither TransformerEngine nor Apex. The task: say which letter comes next
in texts that repeat a random word.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_ep.integrations.megatron import patch_model

VOCABULARY, LENGTH, WORD, SEQUENCES = 32, 48, 6, 16

# Megatron-Core 0.16 defines this name with TransformerEngine alone, and its router reads it in any case.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


def make_model(num_experts: int, shared: bool) -> GPTModel:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        moe_ffn_hidden_size=64,
        num_moe_experts=num_experts,
        moe_router_topk=2,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_shared_expert_intermediate_size=64 if shared else None,
        moe_shared_expert_overlap=shared,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(num_experts=num_experts, moe_grouped_gemm=False)
    return GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope")


def batch(generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, labels, positions and a causal mask; every text repeats a word of its own."""
    words = torch.randint(VOCABULARY, (SEQUENCES, WORD), generator=generator)
    text = words.repeat(1, LENGTH // WORD + 1)[:, : LENGTH + 1].to(device)
    positions = torch.arange(LENGTH, device=device).expand(SEQUENCES, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=device).triu(1)[None, None]
    return text[:, :-1].contiguous(), text[:, 1:].contiguous(), positions, mask


def train(model: Any, steps: int, device: torch.device) -> list[float]:
    """Megatron's own data parallelism and optimizer; returns the losses, averaged over ranks."""
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=5e-3, clip_grad=0.0), [ddp])
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    losses = []
    for _ in range(steps):
        ids, labels, positions, mask = batch(generator, device)
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = ddp(ids, positions, mask, labels=labels).mean()
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared-expert", action="store_true", help="one more expert, beside the exchanges")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("auto", "torch", "cuda"), default="auto", help="of the exchanges")
    parser.add_argument("--json", type=Path, help="file to write the loss of every step to")
    options = parser.parse_args()

    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(0)
    # Weights are drawn on the CPU: the same with and without GPUs.
    torch.manual_seed(0)

    model = make_model(options.experts, options.shared_expert).to(device)
    layers = patch_model(model, backend=options.backend)

    losses = train(model, options.steps, device)
    if dist.get_rank() == 0:
        where = f"{layers} MoE layers, {options.experts} experts on {dist.get_world_size()} ranks"
        print(f"{where}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")  # noqa: T201
        if options.json:
            dispatchers = [module.token_dispatcher for module in model.modules() if isinstance(module, MoELayer)]
            backends = sorted({one.backend_name for one in dispatchers})
            found = {"losses": losses, "device": device.type, "backends": backends}
            options.json.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
