"""Train torchtitan's DeepSeek-V3, cut down to two layers, with moe_ep moving the tokens of its MoE.

    torchrun --nproc-per-node 2 examples/torchtitan_train.py
    torchrun --nproc-per-node 2 examples/torchtitan_train.py --override.imports    # torchtitan's own dispatcher

It does what torchtitan's Trainer does with a config, on tokens that are made up, so that it needs no dataset. With
torchtitan's own command line the override is all there is to add:

    torchrun --nproc-per-node 8 -m torchtitan.train --module deepseek_v3 --config deepseek_v3_16b \\
        --override.imports moe_ep.integrations.torchtitan.dispatcher
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import distribute_tensor
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig, apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_, get_spmd_context, set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.tools.utils import device_module, device_type
from torchtitan.trainer import Trainer

VOCABULARY = 64


def config_of(imports: list[str], num_ranks: int) -> Trainer.Config:
    """The debug model of torchtitan's registry, with experts over all ranks."""
    config = deepseek_v3_debugmodel()
    model = config.model_spec.model
    model.layers = model.layers[:2]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.training = TrainingConfig(local_batch_size=4, seq_len=32, disable_cuda_graphs=True)
    config.parallelism = ParallelismConfig(expert_parallel_degree=num_ranks, spmd_backend="partial_dtensor")
    config.activation_checkpoint = None
    config.optimizer = default_adamw(lr=1e-3)
    config.override.imports = imports
    return config


def build(config: Trainer.Config, dims: ParallelDims) -> torch.nn.Module:
    """The model, sharded as torchtitan shards it."""
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    if config.override.imports:
        apply_overrides(config.override, config)
    with torch.device("meta"):
        model = spec.model.build()
    model = spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=config.activation_checkpoint,
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The factor is 1, and only NCCL has scaled sums.
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=device_type)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
        # All gates alike on every device: random numbers of sharded tensors are not, on CPUs.
        gate = model.layers["1"].moe.router.gate.weight
        gate.copy_(distribute_tensor(0.02 * torch.randn(gate.shape), gate.device_mesh, gate.placements))
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--override.imports", dest="imports", nargs="*")
    args = parser.parse_args()
    imports = ["moe_ep.integrations.torchtitan.dispatcher"] if args.imports is None else args.imports

    device = torch.device(device_type, int(os.environ["LOCAL_RANK"]))
    device_module.set_device(device)
    dist.init_process_group()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    config = config_of(imports, num_ranks)
    set_spmd_backend(config.parallelism.spmd_backend)
    dims = ParallelDims.from_config(config.parallelism, num_ranks)
    dims.build_mesh()
    torch.manual_seed(0)
    model = build(config, dims)
    optimizers = config.optimizer.build(model_parts=[model])
    config.model_spec.post_optimizer_build_fn(optimizers, [model], dims)
    context = get_spmd_context(parallel_dims=dims)

    torch.manual_seed(1 + rank)
    for step in range(args.steps):
        # Each token follows from the one before.
        start = torch.randint(VOCABULARY, (4, 1))
        tokens = ((start + torch.arange(33) * 5) % VOCABULARY).to(device_type)
        optimizers.zero_grad()
        with context():
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()) / num_ranks
            loss.backward()
        clip_grad_norm_(list(model.parameters()), 1.0, ep_enabled=dims.ep_enabled)
        optimizers.step()
        if step in (0, args.steps - 1):
            print(f"rank {rank}: step {step}: loss {num_ranks * loss.item():.3f}", flush=True)  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
