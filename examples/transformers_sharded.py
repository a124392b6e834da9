"""Train a mixture-of-experts model that transformers shards as it loads it: FSDP2, experts over ranks, by moe_ep.

    torchrun --nproc-per-node 2 examples/transformers_sharded.py
    torchrun --nproc-per-node 2 examples/transformers_sharded.py --implementation all_to_all     # the same losses
    torchrun --nproc-per-node 8 examples/transformers_sharded.py --model Qwen/Qwen3-30B-A3B --dtype bfloat16

Works with transformers 5.23 and later. Ranks that outnumber the GPUs share them, without --output.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

import moe_ep.integrations.transformers  # noqa: F401  registers "moe_ep"
from moe_ep.integrations.fsdp import clip_grad_norm_

LENGTH, BATCH = 64, 8


def join_group() -> torch.device:
    """NCCL where every rank has a GPU, else gloo."""
    num_gpus, num_local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not num_gpus:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    # transformers takes the GPU of this number.
    os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % num_gpus)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl" if num_gpus >= num_local else "gloo")
    return device


def save_tiny_model(folder: str) -> None:
    """A model with a shared expert, for those who have none at hand."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.set_seed(0)
    transformers.Qwen2MoeForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name on the Hub; a tiny model without it")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE")
    parser.add_argument("--output", help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ep-size", type=int, help="ranks that share the experts; all of them without it")
    parser.add_argument("--implementation", default="moe_ep")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    device = join_group()
    if options.output and device.type == "cuda" and dist.get_backend() == "gloo":
        parser.error("--output needs a GPU for every rank: torch 2.11 crashed gathering shards on GPUs through gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    place = [options.model or tempfile.mkdtemp()]
    dist.broadcast_object_list(place, device=device)
    if options.model is None and rank == 0:
        save_tiny_model(place[0])
    dist.barrier()

    config = DistributedConfig(
        fsdp_size=num_ranks, ep_size=options.ep_size or num_ranks, ep_implementation=options.implementation
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place[0], dtype=getattr(torch, options.dtype), distributed_config=config
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=True)

    text = options.text.read_text(encoding="utf-8")
    if options.model:
        ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(options.model)(text)["input_ids"])
    else:
        ids = torch.tensor(list(text.encode()))
    generator = torch.Generator().manual_seed(1 + rank)
    for step in range(options.steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([ids[start : start + LENGTH] for start in starts]).to(device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step}: loss {loss.item():.4f}, norm of the gradient {norm.item():.3f}", flush=True)  # noqa: T201
    if options.output:
        # Whole tensors under their usual names: it loads anywhere.
        model.save_pretrained(options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
