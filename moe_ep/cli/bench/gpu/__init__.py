"""The bench of the CUDA backend: exchanges against their floor and against NCCL, all measured in one run."""

import argparse
import os
import sys
import time
from typing import Any

import torch

from moe_ep.backends.cuda import load_extension
from moe_ep.cli.bench.cases import Shape, check_shape
from moe_ep.cli.bench.gpu.baselines import MOST_CAPTURED_TOKENS, measure_baselines
from moe_ep.cli.bench.gpu.context import Context, Settings
from moe_ep.cli.bench.gpu.curves import measure_laps, measure_sms
from moe_ep.cli.bench.gpu.decode import decode_tokens, measure_decode
from moe_ep.cli.bench.gpu.exchange import measure_case
from moe_ep.cli.bench.gpu.layer import measure_layer
from moe_ep.cli.bench.gpu.overlap import measure_overlap
from moe_ep.cli.bench.launch import launch, pick_device, run_in_world, under_torchrun
from moe_ep.cli.bench.timing import Rank
from moe_ep.errors import NotBuiltError

PARTS = ("sweep", "decode", "sms", "laps", "overlap", "layer")
DEFAULT_SHAPE = "7168:8:256"
DEFAULT_TOKENS = (1, 8, 32, 128, 512, 1024, 4096, 8192)
DEFAULT_ROUTINGS = ("uniform", "zipf")
DEFAULT_REPEATS = 20
CURVE_TOKENS = 4096
SM_COUNTS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LAPS = (1, 2, 4)
# Beside a GEMM; None takes the defaults.
OVERLAP_SMS = (8, 16, None)
GEMM = 8192
INTERMEDIATE = 2048
CHUNKS = (1, 2, 4)
# The quick run reaches every part in seconds; its figures mean little.
QUICK_TOKENS = (32, 1024)
QUICK_CURVE_TOKENS = 1024
QUICK_REPEATS = 5
QUICK_SM_COUNTS = (8, 16)
QUICK_LAPS = (1, 2)
QUICK_OVERLAP_SMS = (8,)
QUICK_LAYER_EXPERTS = 32
QUICK_CHUNKS = (1, 2)
_MOST_RANKS = 16


def measure(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Rows of every part asked for; None on the ranks of a torchrun world that do not report.

    Raises:
        NotBuiltError: without GPUs, or without kernels in this build.
        ValueError: options that cannot work, or that have no meaning here.
    """
    settings = settings_from(args)
    require_kernels()
    if under_torchrun():
        world = int(os.environ["WORLD_SIZE"])
        check_ranks(world, settings)
        pick_device("cuda", int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        return run_in_world("cuda", take_parts, settings)
    rows = []
    counts = args.ranks or [_default_ranks(settings)]
    for ranks in counts:
        check_ranks(ranks, settings)
        pick_device("cuda", ranks)
    for ranks in counts:
        rows += launch(ranks, "cuda", take_parts, settings)
    return rows


def require_kernels() -> None:
    """Raise NotBuiltError unless there are GPUs and kernels for them."""
    if not torch.cuda.is_available():
        raise NotBuiltError(
            "bench with backend='cuda' measures the cuda backend on GPUs, and torch sees none here: run it where there "
            "are some, or use backend='torch', which also runs on the CPU; see moe-ep doctor"
        )
    if not load_extension().build_info()["cuda"]:
        raise NotBuiltError(
            "bench with backend='cuda' needs the cuda backend, and moe_ep._C was built without kernels: install from "
            "source where nvcc is found, or use backend='torch'; see moe-ep doctor"
        )


def settings_from(args: argparse.Namespace) -> Settings:
    """What the command line asks for.

    Raises:
        ValueError: for an option that has no meaning with backend cuda, or a value that cannot be.
    """
    _refuse_others(args)
    quick = args.quick
    shapes = args.shapes or [DEFAULT_SHAPE]
    if len(shapes) != 1:
        raise ValueError(f"shapes={' '.join(shapes)}: with backend=cuda one shape is measured in a run; give one H:K:E")
    shape = Shape.parse(shapes[0])
    tokens = tuple(args.tokens or (QUICK_TOKENS if quick else DEFAULT_TOKENS))
    for count in tokens:
        if count < 1:
            raise ValueError(f"tokens={count} must be 1 or more")
    if "decode" in (args.part or ()) and not decode_tokens(tokens):
        raise ValueError(
            f"part=decode measures up to {MOST_CAPTURED_TOKENS} tokens per rank: give one such number with --tokens"
        )
    repeats = args.pairs if args.pairs is not None else QUICK_REPEATS if quick else DEFAULT_REPEATS
    if repeats < 1:
        raise ValueError(f"pairs={repeats} must be 1 or more; 20 gives a usable median")
    experts = min(shape.experts, QUICK_LAYER_EXPERTS) if quick else shape.experts
    return Settings(
        parts=tuple(part for part in PARTS if part in (args.part or PARTS)),
        shape=shape,
        tokens=tokens,
        routings=(args.routing,) if args.routing else DEFAULT_ROUTINGS[:1] if quick else DEFAULT_ROUTINGS,
        curve_tokens=QUICK_CURVE_TOKENS if quick else CURVE_TOKENS,
        sm_counts=QUICK_SM_COUNTS if quick else SM_COUNTS,
        laps=QUICK_LAPS if quick else LAPS,
        overlap_sms=QUICK_OVERLAP_SMS if quick else OVERLAP_SMS,
        gemm=GEMM,
        layer=Shape(hidden=shape.hidden, top_k=min(shape.top_k, experts), experts=experts),
        intermediate=INTERMEDIATE,
        chunks=QUICK_CHUNKS if quick else CHUNKS,
        repeats=repeats,
    )


def check_ranks(ranks: int, settings: Settings) -> None:
    """Raise ValueError unless the layers can be spread over so many ranks of one node."""
    if not 1 <= ranks <= _MOST_RANKS:
        raise ValueError(f"ranks={ranks} must be 1 to {_MOST_RANKS}")
    for shape in (settings.shape, settings.layer):
        check_shape(shape, ranks=ranks, dtype=torch.bfloat16)


@torch.no_grad()
def take_parts(rank: Rank, settings: Settings) -> list[dict[str, Any]]:
    """Measure all parts on every rank of a world; the rows are the same on all of them. Collective."""
    context = Context(rank, settings)
    begin = time.monotonic()

    def tell(what: str) -> None:
        if rank.rank == 0:
            print(f"  {time.monotonic() - begin:5.1f} s: {what}, R={rank.size}", file=sys.stderr, flush=True)

    if "sweep" in settings.parts:
        for routing in settings.routings:
            for tokens in settings.tokens:
                tell(f"T={tokens} {routing}")
                inputs = context.inputs(tokens, routing)
                measure_case(context, inputs, measure_baselines(context, inputs))
                del inputs
                torch.cuda.empty_cache()
    others = {
        "decode": measure_decode,
        "sms": measure_sms,
        "laps": measure_laps,
        "overlap": measure_overlap,
        "layer": measure_layer,
    }
    for part, run in others.items():
        if part in settings.parts:
            tell(part)
            run(context)
            torch.cuda.empty_cache()
    context.floor.close()
    tell("done")
    return context.rows


def _default_ranks(settings: Settings) -> int:
    """All GPUs, or as many as the experts can be spread over."""
    most = min(torch.cuda.device_count(), _MOST_RANKS)
    both = (settings.shape.experts, settings.layer.experts)
    return next(ranks for ranks in range(most, 0, -1) if not any(experts % ranks for experts in both))


def _refuse_others(args: argparse.Namespace) -> None:
    """Raise ValueError for options of the other backend's bench."""
    given = {
        "--op": args.op,
        "--dtype": args.dtype,
        "--layer-tokens": args.layer_tokens,
        "--layer-shapes": args.layer_shapes,
        "--assert": args.assert_targets,
    }
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} has no meaning with backend=cuda: choose what is measured with --part")
    if args.device == "cpu":
        raise ValueError("device=cpu cannot be used with backend=cuda, which runs on GPUs; use backend=torch")
