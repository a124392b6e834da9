"""``moe-ep generate``: continue a text with a model that ``moe-ep demo`` has trained."""

import argparse
import sys
from pathlib import Path

import torch

from moe_ep.cli.demo import checkpoint as checkpoints
from moe_ep.cli.demo.options import CHECKPOINT_NAME, DemoOptions, UsageError, check_temperature
from moe_ep.cli.demo.sampling import generate, load_unsharded, printable, prompt_bytes


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``moe-ep generate``."""
    parser.add_argument(
        "--checkpoint", type=Path, default=DemoOptions.out / CHECKPOINT_NAME, metavar="FILE", help="default %(default)s"
    )
    parser.add_argument("--prompt", default=DemoOptions.prompt, help="text to continue (default %(default)r)")
    parser.add_argument("--bytes", type=int, default=400, help="bytes to add (default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=DemoOptions.temperature, help="0: always the likeliest byte"
    )
    parser.add_argument("--top-k", type=int, default=0, help="choose among the K likeliest bytes (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another text")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run_generate(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation; returns the exit code: 0, or 2 when an argument is wrong."""
    try:
        _validate(args)
        device = _device(args.device)
        model = load_unsharded(checkpoints.load(args.checkpoint), device)
    except UsageError as error:
        print(f"moe-ep generate: {error}", file=sys.stderr)
        return 2
    prompt = prompt_bytes(args.prompt)
    added = generate(
        model, prompt, num_bytes=args.bytes, temperature=args.temperature, top_k=args.top_k, seed=args.seed
    )
    print(printable(prompt + added))
    return 0


def _validate(args: argparse.Namespace) -> None:
    check_temperature(args.temperature)
    for name in ("bytes", "top_k"):
        value = getattr(args, name)
        if value < 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} is negative; give 0 or more")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU on this machine; take --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
