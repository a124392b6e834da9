"""What the demo's tests share: a small model and its options."""

import argparse
from dataclasses import replace

import torch

from moe_ep.cli import demo
from moe_ep.cli.demo.options import DemoOptions, ModelOptions, TrainOptions

MODEL = ModelOptions(layers=2, hidden=32, heads=2, experts=12, top_k=2, expert_hidden=16, seq=24)
# The same, smaller, on the command line.
SMALL = ["--layers", "2", "--hidden", "32", "--heads", "2", "--experts", "4", "--expert-hidden", "16", "--seq", "24"]
SMALL += ["--batch", "5", "--sample-bytes", "12", "--warmup", "2"]
CPU = torch.device("cpu")


def small_options(text, out, *, ranks=1, steps=4, batch=5, dtype="float32", **changes):
    train = TrainOptions(batch=batch, warmup=2, text=(str(text),))
    return DemoOptions(
        model=replace(MODEL, dtype=dtype), train=train, steps=steps, ranks=ranks, out=out, sample_bytes=8, **changes
    )


def parse(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])
