"""Fine-tune a mixture-of-experts model of transformers with Trainer, its experts spread over ranks.

    torchrun --nproc-per-node 2 examples/transformers_finetune.py                       # a tiny model, from scratch
    torchrun --nproc-per-node 2 examples/transformers_finetune.py --lora                # LoRA on attention and experts
    torchrun --nproc-per-node 8 examples/transformers_finetune.py --model Qwen/Qwen3-30B-A3B --lora --bf16
    torchrun --nproc-per-node 2 examples/transformers_finetune.py --backend cuda        # moe_ep's own kernels

The text is read byte by byte for the tiny model, else with the model's own tokenizer. Works with transformers 5.0 and
later. Ranks that outnumber the GPUs share them.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset

from moe_ep.integrations.transformers import dispatchers, expert_parameters, parallelize
from moe_ep.integrations.transformers.trainer import ExpertParallelTrainer

LENGTH = 64


class Text(Dataset):
    """A text in pieces of ``LENGTH`` tokens, which are their own labels."""

    def __init__(self, ids: list[int]) -> None:
        self.pieces = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def join_group() -> None:
    """NCCL where every rank has a GPU, else gloo."""
    num_gpus, num_local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < num_gpus < num_local:
        # Trainer takes the GPU of this number.
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % num_gpus)
    if num_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if num_gpus >= num_local else "gloo")


def tiny_model() -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def with_lora(model: transformers.PreTrainedModel) -> torch.nn.Module:
    import peft

    config = peft.LoraConfig(
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    return peft.get_peft_model(model, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name on the Hub; a tiny model without it")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE")
    parser.add_argument("--output", default="finetuned")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--backend", choices=("auto", "torch", "cuda"), default="auto", help="of the exchanges")
    parser.add_argument("--json", type=Path, help="file to write the loss of every step to")
    options = parser.parse_args()

    join_group()
    transformers.set_seed(0)
    text = options.text.read_text(encoding="utf-8")
    if options.model:
        dtype = torch.bfloat16 if options.bf16 else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        ids = transformers.AutoTokenizer.from_pretrained(options.model)(text)["input_ids"]
    else:
        model, ids = tiny_model(), list(text.encode())
    if options.lora:
        model = with_lora(model)
    # Adapters before it, DDP and the optimizer, which Trainer makes, after it.
    parallelize(model, backend=options.backend)

    arguments = transformers.TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        bf16=options.bf16,
        logging_steps=1 if options.json else max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = ExpertParallelTrainer(model=model, args=arguments, train_dataset=Text(ids))
    trainer.train()
    trainer.save_model(options.output)
    if dist.get_rank() == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        own = sum(parameter.numel() for _, parameter in expert_parameters(model))
        print(f"{dist.get_world_size()} ranks, {own} parameters of experts on each: loss {losses[0]} -> {losses[-1]}")  # noqa: T201
        if options.json:
            backends = sorted({one.backend_name for made in dispatchers(model).values() for one in made})
            found = {"losses": losses, "device": trainer.args.device.type, "backends": backends}
            options.json.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
