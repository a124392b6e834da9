"""Thousands of exchanges among ranks that run at the same time on one GPU, each checked: a program of its own.

``python -m tests.gpu.stress --exchanges 20000 --ranks 4`` ends with a line of JSON, or raises at the first mismatch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from typing import Any

import torch

from moe_ep.config import Capacity, ExchangeSpec
from moe_ep.testing import make_routing
from tests.gpu.thread_ranks import ThreadRank, run_thread_ranks

_SKEW_CYCLES = 200_000
_KINDS = ("uniform", "zipf", "one", "empty", "holes")


def expected_rows(spec: ExchangeSpec, rank: int, ids: list[torch.Tensor], xs: list[torch.Tensor]) -> torch.Tensor:
    """Expanded rows without padding, in the promised order: local expert, source rank, token."""
    local = spec.num_local_experts
    parts = [
        xs[source][(ids[source] == expert).nonzero()[:, 0]]
        for expert in range(rank * local, (rank + 1) * local)
        for source in range(spec.num_ranks)
    ]
    return torch.cat(parts)


def stress(me: ThreadRank, seed: int, num_exchanges: int) -> int:
    """Rounds of dispatch, combine and replay over changing shapes, each after a delay that differs between ranks."""
    draw, skew = random.Random(seed), random.Random(seed * 100 + me.rank)
    done = 0
    side = torch.cuda.Stream()
    left = torch.randn(1024, 1024, device="cuda")
    while done < num_exchanges:
        hidden = draw.choice((8, 64, 520, 2048, 7168))
        spec = ExchangeSpec(
            num_experts=draw.choice((1, 2, 8)) * me.size,
            hidden_size=hidden,
            top_k=draw.choice((1, 2)) if me.size == 1 else draw.choice((1, 2, min(4, me.size))),
            num_ranks=me.size,
            dtype=torch.float32 if hidden < 2048 else torch.bfloat16,
            capacity=Capacity(per_expert=512) if draw.random() < 0.5 else None,
        )
        if spec.top_k > spec.num_experts:
            continue
        tokens = [draw.choice((0, 1, 5, 33, 64)) for _ in range(me.size)]
        me.backend.bulk = draw.random() < 0.7
        kind, routing_seed = draw.choice(_KINDS), draw.randrange(1 << 30)
        ids, xs = [], []
        for source, count in enumerate(tokens):
            topk_idx, _ = make_routing(count, spec.top_k, spec.num_experts, kind=kind, seed=routing_seed + source)
            ids.append(topk_idx.cuda())
            generator = torch.Generator().manual_seed(routing_seed + source)
            xs.append(torch.randint(-4, 5, (count, hidden), generator=generator).to("cuda", spec.dtype))
        want = expected_rows(spec, me.rank, ids, xs)
        chosen = (ids[me.rank] >= 0).sum(1, keepdim=True).to(spec.dtype)
        weights = torch.ones(tokens[me.rank], spec.top_k, device="cuda")
        # NOTE: every rank repeats a shape equally often, so that all issue the same exchanges.
        for _ in range(10):
            done += 3
            if skew.random() < 0.5:
                torch.cuda._sleep(skew.randrange(_SKEW_CYCLES))
            if skew.random() < 0.2:
                with torch.cuda.stream(side):
                    left @ left
            result = me.dispatch(
                xs[me.rank], ids[me.rank], weights, spec, max_tokens=64 if spec.capacity is not None else 0
            ).result()
            rows = result.rows
            if spec.capacity is not None:
                places = torch.arange(rows.shape[0], device="cuda") % 512
                rows = rows[places < result.tokens_per_expert.repeat_interleave(512)]
            _check(torch.equal(rows, want), "rows", me, spec, tokens, kind)
            out, _ = me.combine(result.rows, None, result.plan).result()
            _check(torch.equal(out, xs[me.rank] * chosen), "sums", me, spec, tokens, kind)
            again, _ = me.replay(xs[me.rank], result.plan).result()
            if spec.capacity is not None:
                again = again[places < result.tokens_per_expert.repeat_interleave(512)]
            _check(torch.equal(again, want), "replayed rows", me, spec, tokens, kind)
    return done


def _check(good: bool, what: str, me: ThreadRank, *about: Any) -> None:  # noqa: ANN401
    if not good:
        # Outputs of an exchange that failed are nobody's.
        me.backend.link.check()
        raise AssertionError(f"{what} differ on rank {me.rank}: {about}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exchanges", type=int, default=20_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--granted-bytes", type=int, default=0)
    options = parser.parse_args()
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "32" or os.environ.get("CUDA_MODULE_LOADING") != "EAGER":
        sys.exit(
            "set CUDA_DEVICE_MAX_CONNECTIONS=32, since streams of all ranks need queues of their own, and "
            "CUDA_MODULE_LOADING=EAGER, since loading a kernel waits for those that run"
        )
    start = time.monotonic()
    done = run_thread_ranks(options.ranks, stress, options.seed, options.exchanges, granted_bytes=options.granted_bytes)
    told = {**vars(options), "done": done[0], "seconds": round(time.monotonic() - start, 1), "mismatches": 0}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
